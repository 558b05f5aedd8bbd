//! Callers of a cluster: their tokens as the API server reviews them, and their nodes as those of their pods.
//!
//! An answer is kept for a while under the token's digest, never under the token. While the API server does not answer, one that was
//! good goes on being good until the token itself expires: certificates are renewed and proxies reconnect without it.
//!
//! Anybody may bring tokens, and each that is not known costs a review. So one that by its own word is for somebody else, or of no pod
//! that is known here, is never asked about; an address has few reviews at a time, and few in vain of each pod it claims to be.

mod answers;
mod attempts;
mod claims;
mod turns;

use std::{
    collections::HashMap,
    net::IpAddr,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use futures_util::{
    FutureExt as _,
    future::{BoxFuture, Shared, WeakShared},
};
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::{Api, Client, api::PostParams};
use mesh_runtime::telemetry::error_chain;
use mesh_xds::server::Caller;
use tokio::{sync::watch, time::Instant};

use self::{
    answers::{Answers, Digest, Known},
    attempts::{Attempts, Claimant},
    claims::Claimed,
    turns::{Turn, Turns},
};
use crate::{
    apiserver::answer::within,
    callers::{NotBelieved, Tokens},
    metrics::Metrics,
    pipeline::Snapshot,
    placement::Placements,
    token::AUDIENCE,
};

/// The API server must have answered by then. As long a caller waits for his turn.
const DEADLINE: Duration = Duration::from_secs(5);
/// Reviews at once; who comes on top of that is told to come again.
const MAX_FLIGHTS: usize = 256;

/// The pod a token is bound to, and its account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bearer {
    namespace: Arc<str>,
    service_account: Arc<str>,
    pod: Arc<str>,
    pod_uid: Arc<str>,
}

/// What a review comes to: a bearer, or why there is none.
type Outcome = Result<Bearer, NotBelieved>;

pub(crate) struct TokenReviews {
    client: Client,
    state: watch::Receiver<Snapshot>,
    metrics: Metrics,
    turns: Turns,
    inner: Arc<Mutex<Inner>>,
}

type Flight = BoxFuture<'static, Outcome>;

#[derive(Default)]
struct Inner {
    answers: Answers,
    attempts: Attempts,
    /// Reviews under way, held by who waits for them: all who ask about one token wait for the same answer.
    flights: HashMap<Digest, WeakShared<Flight>>,
}

impl Inner {
    /// An answer, or a review under way.
    fn known(&self, digest: &Digest) -> Option<Shared<Flight>> {
        match self.answers.of(digest, Instant::now()) {
            Known::Fresh(answer) => Some(std::future::ready(answer).boxed().shared()),
            _ => self.flights.get(digest).and_then(WeakShared::upgrade),
        }
    }

    /// What was believed before, in place of a better answer.
    fn instead(&mut self, digest: &Digest, now: Instant, why: String) -> Outcome {
        match self.answers.of(digest, now) {
            Known::Fresh(answer) => answer,
            Known::Stale(bearer) => {
                tracing::warn!(why, pod = %bearer.pod, "the token is not reviewed; believing what was said of it before");
                self.answers.lean_on(digest, now);
                Ok(bearer)
            }
            Known::Nothing => Err(NotBelieved::Unknown(why)),
        }
    }
}

impl TokenReviews {
    pub(crate) fn new(client: Client, state: watch::Receiver<Snapshot>, metrics: Metrics) -> Self {
        Self { client, state, metrics, turns: Turns::default(), inner: Arc::default() }
    }

    async fn reviewed(&self, token: &str, from: IpAddr) -> Outcome {
        let Claimed { bearer: claimed, ends } = claims::read(token).map_err(NotBelieved::Refused)?;
        let left = ends.duration_since(SystemTime::now()).unwrap_or_default();
        if left.is_zero() {
            return Err(NotBelieved::Refused("the token has expired".to_owned()));
        }
        let digest = answers::digest(token);
        let known = lock(&self.inner).known(&digest);
        if let Some(known) = known {
            return known.await;
        }
        // What would not be let in if it were authentic.
        place(&claimed, &self.placements())?;
        let turn = self.turns.of(from, DEADLINE).await;
        let flight = {
            let mut inner = lock(&self.inner);
            let now = Instant::now();
            let Some(turn) = turn else {
                return inner.instead(&digest, now, format!("too many tokens of {from} wait for their review"));
            };
            // Somebody else may have asked meanwhile.
            match inner.known(&digest) {
                Some(known) => known,
                None => {
                    inner.flights.retain(|_, flight| flight.upgrade().is_some());
                    if inner.flights.len() >= MAX_FLIGHTS {
                        return inner.instead(&digest, now, "too many token reviews are under way".to_owned());
                    }
                    let claimant = (from, claimed.pod_uid);
                    if !inner.attempts.begin(claimant.clone(), now) {
                        let why = format!(
                            "too many tokens from {from} that claimed to be of pod {} were refused",
                            claimed.pod
                        );
                        return inner.instead(&digest, now, why);
                    }
                    let flight = self.review(token.to_owned(), digest, left, claimant, turn).boxed().shared();
                    inner.flights.extend(flight.downgrade().map(|flight| (digest, flight)));
                    flight
                }
            }
        };
        flight.await
    }

    fn placements(&self) -> Placements {
        self.state.borrow().placements.clone()
    }

    /// Asks the API server, and keeps what it says.
    fn review(
        &self,
        token: String,
        digest: Digest,
        left: Duration,
        claimant: Claimant,
        turn: Turn,
    ) -> impl Future<Output = Outcome> + Send + 'static {
        let (api, inner, metrics) =
            (Api::<TokenReview>::all(self.client.clone()), self.inner.clone(), self.metrics.clone());
        async move {
            let spec = TokenReviewSpec { token: Some(token), audiences: Some(vec![AUDIENCE.to_owned()]) };
            let review = TokenReview { spec, ..TokenReview::default() };
            let (params, began) = (PostParams::default(), Instant::now());
            let answered = within(DEADLINE, api.create(&params, &review)).await;
            drop(turn);
            let now = Instant::now();
            let left = left.saturating_sub(now - began);
            let outcome = match answered {
                Ok(review) => Ok(review.status.unwrap_or_default()),
                Err(error) => Err(error_chain(&error)),
            };
            let mut inner = lock(&inner);
            inner.flights.remove(&digest);
            match outcome {
                Ok(status) => {
                    let answer = judge(&status).map_err(NotBelieved::Refused);
                    metrics
                        .token_reviews
                        .with_label_values(&[if answer.is_ok() { "believed" } else { "refused" }])
                        .inc();
                    if answer.is_ok() {
                        inner.attempts.believed(&claimant);
                    }
                    inner.answers.keep(digest, answer.clone(), now, left);
                    answer
                }
                Err(why) => {
                    metrics.token_reviews.with_label_values(&["unanswered"]).inc();
                    inner.attempts.unanswered(&claimant);
                    inner.instead(&digest, now, format!("the API server does not review the token: {why}"))
                }
            }
        }
    }
}

fn lock(inner: &Mutex<Inner>) -> MutexGuard<'_, Inner> {
    // Each map is changed one entry at a time.
    inner.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Tokens for TokenReviews {
    fn bearer<'a>(
        &'a self,
        token: &'a str,
        from: IpAddr,
    ) -> Pin<Box<dyn Future<Output = Result<Caller, NotBelieved>> + Send + 'a>> {
        Box::pin(async move {
            let bearer = self.reviewed(token, from).await?;
            place(&bearer, &self.placements())
        })
    }
}

/// The bearer, on the node of its pod. One that no watch has delivered yet will have been when the caller comes again.
fn place(bearer: &Bearer, placements: &Placements) -> Result<Caller, NotBelieved> {
    let Bearer { namespace, service_account, pod, pod_uid } = bearer.clone();
    let Some(placement) = placements.pod(&namespace, &pod).filter(|placement| placement.uid == pod_uid) else {
        return Err(NotBelieved::Unknown(format!("pod {namespace}/{pod} ({pod_uid}) is not known to run anywhere")));
    };
    if placement.service_account != service_account {
        let told = format!("pod {namespace}/{pod} runs as {}, not as {service_account}", placement.service_account);
        return Err(NotBelieved::Refused(told));
    }
    Ok(Caller { node: placement.node.clone(), namespace, service_account, pod })
}

/// What the API server's answer says.
fn judge(status: &TokenReviewStatus) -> Result<Bearer, String> {
    if status.authenticated != Some(true) {
        let why = status.error.as_deref().unwrap_or("it is not authentic");
        return Err(format!("the API server does not believe the token: {why}"));
    }
    // An API server that knows no audiences would let in tokens that were meant for others.
    if !status.audiences.iter().flatten().any(|audience| audience == AUDIENCE) {
        return Err(format!("the token is not meant for {AUDIENCE}"));
    }
    let user = status.user.as_ref();
    let name = user.and_then(|user| user.username.as_deref()).unwrap_or_default();
    let account = name.strip_prefix("system:serviceaccount:").and_then(|account| account.split_once(':'));
    let (namespace, service_account) = account.ok_or_else(|| format!("`{name}` is no service account"))?;
    let extra = |key: &str| -> Option<Arc<str>> {
        let values = user?.extra.as_ref()?.get(key)?;
        Some(values.first()?.as_str().into())
    };
    let pod = extra("authentication.kubernetes.io/pod-name").zip(extra("authentication.kubernetes.io/pod-uid"));
    let (pod, pod_uid) = pod.ok_or_else(|| format!("the token of {name} is bound to no pod"))?;
    Ok(Bearer { namespace: namespace.into(), service_account: service_account.into(), pod, pod_uid })
}

#[cfg(test)]
mod tests;
