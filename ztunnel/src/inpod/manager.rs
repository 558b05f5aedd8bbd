//! The pods of this node, from the agent's words to listening sockets.
//!
//! Losing the agent changes nothing for pods being served; only a complete snapshot of a later session says who is gone. What goes
//! wrong with one pod is told to the agent, remembered and retried; what goes wrong with the session starts a new one.

use mesh_runtime::telemetry::error_chain;
use std::{
    collections::{BTreeMap, HashSet},
    io,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::future::join_all;
use mesh_identity::ca::BoxFuture;
use mesh_net::{NetNs, NetNsId, SeqStream};
use mesh_runtime::{
    drain::{DrainMode, DrainWatcher, Drained},
    readiness::{Pending, Readiness},
};
use mesh_xds::backoff::Backoff;
use serde::Serialize;
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::{
    WorkloadInfo,
    protocol::{self, ProtocolError, Session, Step},
};
use crate::{
    error::StartError,
    local::Local,
    metrics::ControlMetrics,
    pods::{ConnectionsDump, PodHandle, Prober},
};

/// Upstream's messages stay below 1 KiB; a longer one is refused by the kernel's truncation flag.
const PACKET: usize = 4096;
/// The longest pause before the agent is looked for again. Its socket is on this node, so looking costs nothing; and Istio's agent puts
/// its rules into pods that run already before it announces them, which refuses their connections until it finds us.
const AGENT_AGAIN: Duration = Duration::from_secs(1);
const RETRY: Duration = Duration::from_secs(5);
/// The agent gives up on an acknowledgement after 5 s.
const START_DEADLINE: Duration = Duration::from_secs(4);
const SEND_DEADLINE: Duration = Duration::from_secs(5);
/// For flows of a pod that is gone: they are cut, not drained.
const STOP_DEADLINE: Duration = Duration::from_secs(1);

/// Serves one pod in its namespace.
pub type StartPod = Box<dyn Fn(WorkloadInfo, NetNs) -> BoxFuture<'static, Result<PodHandle, StartError>> + Send + Sync>;

/// See [`Manager::run`].
pub struct Manager {
    socket: PathBuf,
    start: StartPod,
    pods: PodTable,
    local: Arc<Local>,
    metrics: ControlMetrics,
    drain_deadline: Duration,
    readiness: Readiness,
    not_ready: Option<Pending>,
    /// Why there is no agent, as last told.
    without_agent: Option<String>,
}

/// Why a session is over.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("cannot reach the node agent at {path}")]
    Connect { path: String, source: io::Error },
    #[error("the node agent closed the connection")]
    Closed,
    #[error("the connection to the node agent failed")]
    Io(#[from] io::Error),
    #[error("the node agent does not read")]
    Stuck,
    #[error("the node agent broke the protocol")]
    Protocol(#[source] ProtocolError),
}

/// Why a pod could not be served; the text goes to the agent.
#[derive(Debug, thiserror::Error)]
enum AddError {
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("the pod's descriptor is not usable")]
    Namespace(#[from] io::Error),
    #[error("its listeners were not up within {START_DEADLINE:?}")]
    Slow,
}

impl Manager {
    /// `pods` shows what is being served; it is the caller's to look at. Not ready until the first snapshot.
    pub fn new(
        socket: PathBuf,
        start: StartPod,
        pods: PodTable,
        local: Arc<Local>,
        metrics: ControlMetrics,
        readiness: Readiness,
        drain_deadline: Duration,
    ) -> Self {
        let mut manager = Self {
            socket,
            start,
            pods,
            local,
            metrics,
            drain_deadline,
            readiness,
            not_ready: None,
            without_agent: None,
        };
        manager.set_ready(false);
        manager
    }

    /// Follows the agent until the drain starts, then stops every pod: orderly, within the deadline.
    pub async fn run(mut self, drain: DrainWatcher) {
        let mut backoff = Backoff::capped(AGENT_AGAIN);
        let (mode, _guard) = loop {
            tokio::select! {
                // First, so that no pod is taken in while leaving.
                biased;
                signalled = drain.signalled() => break signalled,
                () = self.follow(&mut backoff) => {}
            }
        };
        self.pods.stop_all(mode, self.drain_deadline).await;
    }

    /// One session and the pause after it. May be dropped at any await: pods live in the table.
    async fn follow(&mut self, backoff: &mut Backoff) {
        let ended = self.session(backoff).await;
        self.set_ready(false);
        let delay = backoff.next_delay(&mut rand::rng());
        let error = error_chain(&ended);
        // Once, not every second.
        if self.without_agent.as_ref() != Some(&error) {
            tracing::warn!(error, "no node agent: pods stay served, new ones wait");
            self.without_agent = Some(error);
        }
        tokio::time::sleep(delay).await;
        self.retry_waiting().await;
    }

    async fn session(&mut self, backoff: &mut Backoff) -> Ended {
        let stream = match SeqStream::connect(&self.socket) {
            Ok(stream) => stream,
            Err(source) => return Ended::Connect { path: self.socket.display().to_string(), source },
        };
        match self.serve(&stream, backoff).await {
            Ok(()) => Ended::Closed,
            Err(ended) => ended,
        }
    }

    async fn serve(&mut self, stream: &SeqStream, backoff: &mut Backoff) -> Result<(), Ended> {
        send(stream, &protocol::hello()).await?;
        let mut session = Session::default();
        let mut retry = interval(RETRY);
        retry.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut buffer = [0; PACKET];
        loop {
            let received = tokio::select! {
                // Both are cancel safe.
                received = stream.recv(&mut buffer) => received,
                _ = retry.tick() => {
                    self.retry_waiting().await;
                    self.set_ready(session.is_complete());
                    continue;
                }
            };
            let answer = match received {
                Ok((0, _)) => return Ok(()),
                Ok((length, descriptors)) => self.answer(&mut session, &buffer[..length], descriptors).await,
                Err(error) => {
                    // The packet is lost, but it was one: it gets its answer.
                    send(stream, &protocol::ack(Some(&error.to_string()))).await?;
                    return Err(error.into());
                }
            };
            let text = answer.as_ref().err().map(|error| error_chain(error));
            send(stream, &protocol::ack(text.as_deref())).await?;
            if let Err(Refused::Protocol(error)) = answer
                && error.ends_session()
            {
                return Err(Ended::Protocol(error));
            }
            if session.is_complete() {
                backoff.reset();
                self.without_agent = None;
            }
            self.set_ready(session.is_complete());
        }
    }

    async fn answer(&mut self, session: &mut Session, packet: &[u8], fds: Vec<OwnedFd>) -> Result<(), Refused> {
        let message = protocol::parse(packet, fds)?;
        match session.step(message)? {
            Step::Nothing => {}
            Step::Start { info, netns } => self.add(info, netns).await?,
            Step::Stop { uid } => self.stop(&uid).await,
            Step::Forget { uid } => drop(self.pods.lock().waiting.remove(&uid)),
            Step::Reap { keep } => self.reap(&keep).await,
        }
        Ok(())
    }

    async fn add(&mut self, info: WorkloadInfo, netns: OwnedFd) -> Result<(), AddError> {
        let netns = NetNs::from_fd(netns)?;
        let id = netns.id()?;
        let served = self.pods.lock().up.get(&info.uid).map(|up| up.netns);
        match served {
            Some(Some(same)) if same == id => return Ok(()),
            // The pod's sandbox was made anew: what listens in the old one serves nobody.
            Some(_) => self.stop(&info.uid).await,
            None => {}
        }
        self.start(info, netns, id).await
    }

    async fn start(&mut self, info: WorkloadInfo, netns: NetNs, id: NetNsId) -> Result<(), AddError> {
        self.local.pod_arrived(&info);
        let started = match timeout(START_DEADLINE, (self.start)(info.clone(), netns.clone())).await {
            Ok(started) => started.map_err(AddError::from),
            Err(_) => Err(AddError::Slow),
        };
        let result = match started {
            Ok(handle) => {
                tracing::info!(pod = &*info.name, namespace = &*info.namespace, uid = &*info.uid, "serving");
                self.metrics.proxies_started.inc();
                let mut table = self.pods.lock();
                table.waiting.remove(&info.uid);
                table.up.insert(info.uid, Up { handle, netns: Some(id) });
                Ok(())
            }
            Err(error) => {
                let text = error_chain(&error);
                tracing::warn!(pod = &*info.name, namespace = &*info.namespace, error = text, "cannot serve; retrying");
                self.pods.lock().waiting.insert(info.uid.clone(), Waiting { info, netns });
                Err(error)
            }
        };
        self.count();
        result
    }

    async fn retry_waiting(&mut self) {
        let waiting = std::mem::take(&mut self.pods.lock().waiting);
        for (_, Waiting { info, netns }) in waiting {
            let Ok(id) = netns.id() else { continue };
            // A failure is logged, and waits again.
            drop(self.start(info, netns, id).await);
        }
    }

    async fn stop(&mut self, uid: &str) {
        let up = {
            let mut table = self.pods.lock();
            table.waiting.remove(uid);
            table.up.remove(uid)
        };
        if let Some(Up { handle, .. }) = up {
            let info = handle.info().clone();
            handle.stop(DrainMode::Immediate, STOP_DEADLINE).await;
            self.metrics.proxies_stopped.inc();
            tracing::info!(pod = &*info.name, namespace = &*info.namespace, uid, "no longer served");
        }
        self.local.pod_left(uid);
        self.count();
    }

    async fn reap(&mut self, keep: &HashSet<Arc<str>>) {
        let gone: Vec<Arc<str>> = {
            let table = self.pods.lock();
            // Pods that no agent announced are none of its business.
            let announced = table.up.iter().filter(|(_, up)| up.netns.is_some()).map(|(uid, _)| uid);
            announced.chain(table.waiting.keys()).filter(|uid| !keep.contains(*uid)).cloned().collect()
        };
        for uid in gone {
            self.stop(&uid).await;
        }
    }

    fn set_ready(&mut self, session_complete: bool) {
        let ready = session_complete && self.pods.lock().waiting.is_empty();
        match (ready, &self.not_ready) {
            (true, _) => self.not_ready = None,
            (false, None) => self.not_ready = Some(self.readiness.pending("workload proxy manager")),
            (false, Some(_)) => {}
        }
    }

    fn count(&self) {
        let table = self.pods.lock();
        let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        self.metrics.proxies_active.set(count(table.up.len()));
        self.metrics.proxies_pending.set(count(table.waiting.len()));
    }
}

/// Why a request is answered with an error.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error(transparent)]
    Add(#[from] AddError),
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
}

async fn send(stream: &SeqStream, packet: &[u8]) -> Result<(), Ended> {
    match timeout(SEND_DEADLINE, stream.send(packet, None)).await {
        Ok(sent) => Ok(sent?),
        Err(_) => Err(Ended::Stuck),
    }
}

/// Who is being served, and who waits for another attempt. Clones share the table.
#[derive(Clone, Debug, Default)]
pub struct PodTable(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    up: BTreeMap<Arc<str>, Up>,
    waiting: BTreeMap<Arc<str>, Waiting>,
    /// A graceful stop of all came to its deadline.
    cut: bool,
}

#[derive(Debug)]
struct Up {
    handle: PodHandle,
    /// `None`: this process's own.
    netns: Option<NetNsId>,
}

#[derive(Debug)]
struct Waiting {
    info: WorkloadInfo,
    netns: NetNs,
}

/// One pod in the configuration dump.
#[derive(Debug, Serialize)]
pub struct PodState {
    pub state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connections: Option<ConnectionsDump>,
    pub info: WorkloadInfo,
}

impl PodTable {
    /// Takes in a pod that no agent announced.
    pub fn insert(&self, handle: PodHandle) {
        self.lock().up.insert(handle.info().uid.clone(), Up { handle, netns: None });
    }

    /// Stops every pod, all at once, and returns when the last is gone or `deadline` has passed.
    pub async fn stop_all(&self, mode: DrainMode, deadline: Duration) {
        let table = std::mem::take(&mut *self.lock());
        let stopped = join_all(table.up.into_values().map(|up| up.handle.stop(mode, deadline))).await;
        self.lock().cut = stopped.contains(&Drained::Forced);
    }

    /// Whether [`Self::stop_all`] had to cut what was still open at its deadline.
    pub fn were_cut(&self) -> bool {
        self.lock().cut
    }

    /// For trying ways of a pod that is being served.
    pub fn prober(&self, namespace: &str, name: &str) -> Option<Prober> {
        let table = self.lock();
        let handles = table.up.values().map(|up| &up.handle);
        let of_pod = |handle: &&PodHandle| *handle.info().namespace == *namespace && *handle.info().name == *name;
        handles.into_iter().find(of_pod).map(|handle| handle.prober().clone())
    }

    /// Every pod by uid.
    pub fn dump(&self) -> BTreeMap<Arc<str>, PodState> {
        let table = self.lock();
        let up = table.up.iter().map(|(uid, Up { handle, .. })| {
            let connections = Some(handle.connections());
            (uid.clone(), PodState { state: "Up", connections, info: handle.info().clone() })
        });
        let waiting = table.waiting.iter().map(|(uid, Waiting { info, .. })| {
            (uid.clone(), PodState { state: "Pending", connections: None, info: info.clone() })
        });
        up.chain(waiting).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
