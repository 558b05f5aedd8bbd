//! Who writes: of all replicas, the one that holds the Lease.
//!
//! [`election`] decides, without I/O or clock; here its decisions are carried out. Everybody serves; only what must not be written by two
//! waits for this.

mod election;

use std::time::Duration;

use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};
use kube::{Api, api::PostParams};
use mesh_runtime::{drain::DrainWatcher, telemetry::error_chain};
use tokio::{sync::watch, time::Instant};

use self::election::{Election, LASTS, Next, Record};
use crate::{
    apiserver::answer::{NoAnswer, within},
    app::TaskFailed,
    metrics::Metrics,
};

const NAME: &str = "fairwayd";
/// For one answer of the API server.
const DEADLINE: Duration = Duration::from_secs(4);
/// After something went wrong.
const RETRY: Duration = Duration::from_secs(1);

/// Stands for election until the drain, then lets go. `leads` tells the writers of this replica whether they may.
pub(crate) async fn run(
    api: Api<Lease>,
    identity: String,
    leads: watch::Sender<bool>,
    metrics: Metrics,
    drain: DrainWatcher,
) -> Result<(), TaskFailed> {
    let mut candidate = Candidate { api, election: Election::new(identity), lease: None, failing: false };
    let announce = |leading: bool| {
        let changed = leads.send_if_modified(|leads| std::mem::replace(leads, leading) != leading);
        if changed {
            metrics.leader.set(i64::from(leading));
            tracing::info!(leading, "the lease changed hands");
        }
    };
    loop {
        // Writers stop when the lease could be another's, whatever is under way here.
        let ends = candidate.election.ends();
        let pause = tokio::select! {
            pause = candidate.step() => pause,
            () = passed(ends) => Duration::ZERO,
            _ = drain.signalled() => break,
        };
        announce(candidate.election.leads(Instant::now()));
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = passed(candidate.election.ends()) => {}
            _ = drain.signalled() => break,
        }
        announce(candidate.election.leads(Instant::now()));
    }
    let (_, _guard) = drain.signalled().await;
    announce(false);
    candidate.release().await;
    Ok(())
}

/// Does `work` whenever this replica leads; it is dropped when the lead is lost, with what it was about to write. `None` once the drain has
/// begun, or nobody stands for election any more; else what the work, which should have none, ended with.
pub(crate) async fn whenever_leading<W: Future>(
    mut leads: watch::Receiver<bool>,
    drain: &DrainWatcher,
    work: impl Fn() -> W,
) -> Option<W::Output> {
    let in_turn = async {
        loop {
            leads.wait_for(|leads| *leads).await.ok()?;
            tokio::select! {
                ended = work() => return Some(ended),
                lost = leads.wait_for(|leads| !leads) => drop(lost.ok()?),
            }
        }
    };
    tokio::select! {
        ended = in_turn => ended,
        _ = drain.signalled() => None,
    }
}

/// When that has passed; never for what has passed long ago, or does not come.
async fn passed(at: Option<Instant>) {
    match at.filter(|at| *at > Instant::now()) {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

struct Candidate {
    api: Api<Lease>,
    election: Election,
    /// As it was seen last; writing it names its version, so that of two who write one fails.
    lease: Option<Lease>,
    failing: bool,
}

/// Why the lease was not read or written.
#[derive(Debug, thiserror::Error)]
enum Unanswered {
    /// As it goes where there are several.
    #[error("another wrote it first")]
    Raced,
    #[error("{0}")]
    Failed(String),
}

impl Candidate {
    /// Looks, and writes if it is time to; how long to wait then.
    async fn step(&mut self) -> Duration {
        match self.look_and_write().await {
            Ok(pause) => {
                self.failing = false;
                pause
            }
            Err(Unanswered::Failed(why)) if !std::mem::replace(&mut self.failing, true) => {
                tracing::warn!(why, "the lease cannot be read or written; this replica writes nothing meanwhile");
                RETRY
            }
            Err(why) => {
                tracing::debug!(%why, "the lease cannot be read or written yet");
                RETRY
            }
        }
    }

    async fn look_and_write(&mut self) -> Result<Duration, Unanswered> {
        self.lease = answered(self.api.get_opt(NAME)).await?;
        self.election.observe(self.lease.as_ref().map(record), Instant::now());
        match self.election.next(Instant::now()) {
            Next::Wait(pause) => Ok(pause),
            next @ (Next::Acquire | Next::Renew) => {
                let begun = Instant::now();
                let identity = self.election.identity().to_owned();
                let written = self.write(&identity, next == Next::Acquire).await?;
                self.election.written(record(&written), begun);
                self.lease = Some(written);
                Ok(match self.election.next(Instant::now()) {
                    Next::Wait(pause) => pause,
                    Next::Acquire | Next::Renew => Duration::ZERO,
                })
            }
        }
    }

    async fn write(&self, holder: &str, acquires: bool) -> Result<Lease, Unanswered> {
        let now = MicroTime(Timestamp::now());
        let before = self.lease.as_ref().and_then(|lease| lease.spec.clone()).unwrap_or_default();
        let spec = LeaseSpec {
            holder_identity: Some(holder.to_owned()),
            lease_duration_seconds: i32::try_from(LASTS.as_secs()).ok(),
            acquire_time: if acquires { Some(now.clone()) } else { before.acquire_time.clone() },
            renew_time: Some(now),
            lease_transitions: Some(self.election.transitions()),
            ..before
        };
        let params = PostParams::default();
        match self.lease.clone() {
            Some(lease) => {
                let lease = Lease { spec: Some(spec), ..lease };
                answered(self.api.replace(NAME, &params, &lease)).await
            }
            None => {
                let metadata = ObjectMeta { name: Some(NAME.to_owned()), ..ObjectMeta::default() };
                answered(self.api.create(&params, &Lease { metadata, spec: Some(spec) })).await
            }
        }
    }

    /// Lets another take over at once.
    async fn release(self) {
        if self.election.leads(Instant::now())
            && let Err(why) = self.write("", false).await
        {
            tracing::info!(%why, "the lease was not let go; it expires by itself");
        }
    }
}

async fn answered<T>(answer: impl Future<Output = kube::Result<T>>) -> Result<T, Unanswered> {
    within(DEADLINE, answer).await.map_err(|error| match error {
        NoAnswer::Failed(kube::Error::Api(status)) if status.code == 409 => Unanswered::Raced,
        error => Unanswered::Failed(error_chain(&error)),
    })
}

fn record(lease: &Lease) -> Record {
    let spec = lease.spec.as_ref();
    let seconds = spec.and_then(|spec| spec.lease_duration_seconds).and_then(|s| u64::try_from(s).ok());
    Record {
        holder: spec.and_then(|spec| spec.holder_identity.clone()).unwrap_or_default(),
        version: lease.metadata.resource_version.clone().unwrap_or_default(),
        lasts: seconds.map_or(LASTS, Duration::from_secs),
        transitions: spec.and_then(|spec| spec.lease_transitions).unwrap_or_default(),
    }
}
