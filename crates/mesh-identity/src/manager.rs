//! One certificate per identity, fetched once however many wait, renewed in time, kept while it is valid.
//!
//! A task owned by the caller does all the work; readers find valid certificates in a shared map without asking it.

use mesh_runtime::telemetry::error_chain;
use std::{
    collections::HashMap,
    future::Future,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use arc_swap::ArcSwap;
use mesh_core::identity::Identity;
use rpds::HashTrieMapSync;
use tokio::{
    sync::{Notify, mpsc, oneshot},
    task::{JoinError, JoinSet},
    time::Instant,
};

pub use crate::schedule::Priority;
use crate::{
    ca::{CaClient, CaError},
    csr::{Csr, CsrError},
    schedule::Schedule,
    store::KeyStore,
    svid::{Svid, SvidError},
    trust::Trust,
};

/// Askers in the task's queue; further ones wait for room.
const WANTS: usize = 1024;

/// Where the manager gets time from (certificates are judged by the wall clock), and what goes for all its certificates.
#[derive(Clone)]
pub struct Config {
    pub clock: Arc<dyn Fn() -> SystemTime + Send + Sync>,
    /// How the certificates are used.
    pub trust: Arc<Trust>,
    /// Where certificates outlive the process.
    pub store: Option<Arc<KeyStore>>,
}

impl Default for Config {
    fn default() -> Self {
        Self { clock: Arc::new(SystemTime::now), trust: Arc::default(), store: None }
    }
}

impl std::fmt::Debug for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Config").finish_non_exhaustive()
    }
}

/// Why there is no certificate. Cheap to clone: every waiter gets it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("certificate for {identity} failed")]
    Fetch { identity: Identity, source: Arc<FetchError> },
    #[error("the identity is no longer needed")]
    Forgotten,
    #[error("the certificate manager has stopped")]
    Stopped,
}

/// One failed attempt.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error(transparent)]
    Ca(#[from] CaError),
    #[error(transparent)]
    Csr(#[from] CsrError),
    #[error("the CA's answer is not usable: {0}")]
    Svid(#[from] SvidError),
    #[error("the CA's certificate has expired already; compare both clocks")]
    Expired,
    #[error("the attempt was aborted")]
    Aborted,
}

/// One line of the manager's state.
#[derive(Clone, Debug)]
pub struct Entry {
    pub identity: Identity,
    pub state: EntryState,
    /// The certificate held, if any; kept while valid even when its renewal fails.
    pub svid: Option<Arc<Svid>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryState {
    Available,
    Initializing,
    /// The last failure, causes included.
    Unavailable(String),
}

/// A handle; clones share the manager.
#[derive(Clone, Debug)]
pub struct Manager {
    wants: mpsc::Sender<Want>,
    shared: Arc<Shared>,
    config: Config,
}

#[derive(Debug, Default)]
struct Shared {
    /// Persistent: publishing costs the same however many identities a node has.
    entries: ArcSwap<HashTrieMapSync<Identity, Entry>>,
    hints: Mutex<HashMap<Identity, Hint>>,
    hinted: Notify,
    /// Numbers hints and commands in the order they were given.
    order: AtomicU64,
}

/// The last thing said of an identity that nobody waits for. One per identity, hence bounded by the node's workloads.
#[derive(Clone, Copy, Debug)]
struct Hint {
    warm: bool,
    order: u64,
}

impl Shared {
    fn next(&self) -> u64 {
        self.order.fetch_add(1, Ordering::Relaxed)
    }

    fn hints(&self) -> MutexGuard<'_, HashMap<Identity, Hint>> {
        // Whole entries are put in and taken out: a panic elsewhere leaves none torn.
        self.hints.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An asker that waits.
#[derive(Debug)]
struct Want {
    identity: Identity,
    priority: Priority,
    reply: Reply,
    order: u64,
}

type Reply = oneshot::Sender<Result<Arc<Svid>, IdentityError>>;

impl Manager {
    /// The handle, and the task that must run for it; the task ends when the last handle is gone.
    pub fn new(config: Config, ca: Arc<dyn CaClient>) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let (wants, queue) = mpsc::channel(WANTS);
        let shared = Arc::new(Shared::default());
        let kept = config.store.iter().flat_map(|store| store.load((config.clock)(), &config.trust));
        let kept: HashMap<Identity, Svid> = kept.map(|svid| (svid.identity.clone(), svid)).collect();
        let task = Task {
            ca,
            clock: config.clock.clone(),
            trust: config.trust.clone(),
            store: config.store.clone(),
            generation: kept.values().map(|svid| svid.generation).max().unwrap_or(0),
            kept,
            started: Instant::now(),
            shared: shared.clone(),
            schedule: Schedule::default(),
            entries: HashTrieMapSync::default(),
            waiters: HashMap::new(),
            attempts: JoinSet::new(),
            in_flight: HashMap::new(),
        };
        (Self { wants, shared, config }, task.run(queue))
    }

    /// The valid certificate of `identity`: at once when there is one, else after the attempt that this call waits for (started or
    /// joined). Unbounded: the caller sets the deadline. Cancel safe.
    ///
    /// # Errors
    /// [`IdentityError::Fetch`] when that attempt failed.
    pub async fn certificate(&self, identity: &Identity, priority: Priority) -> Result<Arc<Svid>, IdentityError> {
        if let Some(svid) = self.cached(identity) {
            return Ok(svid);
        }
        let (reply, answer) = oneshot::channel();
        let want = Want { identity: identity.clone(), priority, reply, order: self.shared.next() };
        self.wants.send(want).await.map_err(|_| IdentityError::Stopped)?;
        answer.await.map_err(|_| IdentityError::Stopped)?
    }

    /// The valid certificate of `identity`, if it is here now.
    pub fn cached(&self, identity: &Identity) -> Option<Arc<Svid>> {
        let entries = self.shared.entries.load();
        entries.get(identity)?.svid.clone().filter(|svid| svid.is_valid_at((self.config.clock)()))
    }

    /// What all its certificates are used by.
    pub fn trust(&self) -> &Arc<Trust> {
        &self.config.trust
    }

    /// Fetches ahead of need, however many are announced at once.
    pub fn warm(&self, identity: Identity) {
        self.hint(identity, true);
    }

    /// Drops the identity's certificate and plans; waiters get [`IdentityError::Forgotten`].
    pub fn forget(&self, identity: &Identity) {
        self.hint(identity.clone(), false);
    }

    /// Every identity known, sorted.
    pub fn entries(&self) -> Vec<Entry> {
        let mut entries: Vec<Entry> = self.shared.entries.load().values().cloned().collect();
        entries.sort_by(|a, b| a.identity.cmp(&b.identity));
        entries
    }

    fn hint(&self, identity: Identity, warm: bool) {
        let order = self.shared.next();
        self.shared.hints().insert(identity, Hint { warm, order });
        self.shared.hinted.notify_one();
    }
}

struct Task {
    ca: Arc<dyn CaClient>,
    clock: Arc<dyn Fn() -> SystemTime + Send + Sync>,
    trust: Arc<Trust>,
    store: Option<Arc<KeyStore>>,
    /// From before the start, until somebody wants them: their pods may be gone.
    kept: HashMap<Identity, Svid>,
    started: Instant,
    shared: Arc<Shared>,
    schedule: Schedule,
    entries: HashTrieMapSync<Identity, Entry>,
    /// Bounded by the connections that wait.
    waiters: HashMap<Identity, Vec<Reply>>,
    attempts: JoinSet<Result<Svid, FetchError>>,
    in_flight: HashMap<tokio::task::Id, Identity>,
    generation: u64,
}

impl Task {
    async fn run(mut self, mut queue: mpsc::Receiver<Want>) {
        let shared = self.shared.clone();
        loop {
            self.start_due();
            let due = self.schedule.next_due().map(|due| self.started + due);
            tokio::select! {
                // Askers first: a hint that came after one must not be acted upon before it.
                biased;
                want = queue.recv() => match want {
                    Some(want) => self.asked(want),
                    // What was given up must not be found again at the next start.
                    None => return self.take_hints(),
                },
                () = shared.hinted.notified() => self.take_hints(),
                Some(done) = self.attempts.join_next_with_id() => self.finished(done),
                () = sleep_until(due) => {}
            }
        }
    }

    fn asked(&mut self, want: Want) {
        let Want { identity, priority, reply, order } = want;
        let earlier = {
            let mut hints = self.shared.hints();
            let earlier = hints.get(&identity).is_some_and(|hint| hint.order < order);
            earlier.then(|| hints.remove(&identity)).flatten()
        };
        if earlier.is_some_and(|hint| !hint.warm) {
            self.forget(&identity);
        }
        self.want(identity, priority, Some(reply));
        self.publish();
    }

    fn take_hints(&mut self) {
        let hints = std::mem::take(&mut *self.shared.hints());
        for (identity, hint) in hints {
            if hint.warm {
                self.want(identity, Priority::Warmup, None);
            } else {
                self.forget(&identity);
            }
        }
        self.publish();
    }

    /// The caller publishes.
    fn want(&mut self, identity: Identity, priority: Priority, reply: Option<Reply>) {
        let held = self.entries.get(&identity).and_then(|entry| entry.svid.clone());
        if let Some(svid) = held.filter(|svid| svid.is_valid_at((self.clock)())) {
            // Renewed between the asker's look and now.
            drop(reply.map(|reply| reply.send(Ok(svid))));
            return;
        }
        if let Some(svid) = self.adopt(&identity) {
            drop(reply.map(|reply| reply.send(Ok(svid))));
            return;
        }
        self.schedule.want(&identity, priority, self.started.elapsed());
        if let Some(reply) = reply {
            self.waiters.entry(identity.clone()).or_default().push(reply);
        }
        if !self.entries.contains_key(&identity) {
            let entry = Entry { identity: identity.clone(), state: EntryState::Initializing, svid: None };
            self.entries.insert_mut(identity, entry);
        }
    }

    /// The certificate that was kept for this identity, taken into use.
    fn adopt(&mut self, identity: &Identity) -> Option<Arc<Svid>> {
        let now = (self.clock)();
        let svid = Arc::new(self.kept.remove(identity).filter(|svid| svid.is_valid_at(now))?);
        let life = svid.not_after.duration_since(now).unwrap_or_default();
        self.schedule.adopt(identity, life, rand::random(), self.started.elapsed());
        tracing::debug!(%identity, ?life, "certificate from before the start");
        let entry = Entry { identity: identity.clone(), state: EntryState::Available, svid: Some(svid.clone()) };
        self.entries.insert_mut(identity.clone(), entry);
        // Before the asker hears of it.
        self.publish();
        Some(svid)
    }

    /// What nobody wanted in time.
    fn drop_expired(&mut self, now: SystemTime) {
        let store = &self.store;
        self.kept.retain(|identity, svid| {
            let valid = svid.is_valid_at(now);
            if !valid {
                store.iter().for_each(|store| store.remove(identity));
            }
            valid
        });
    }

    /// The caller publishes.
    fn forget(&mut self, identity: &Identity) {
        self.kept.remove(identity);
        self.store.iter().for_each(|store| store.remove(identity));
        self.schedule.forget(identity);
        self.answer(identity, &Err(IdentityError::Forgotten));
        self.entries.remove_mut(identity);
    }

    fn start_due(&mut self) {
        while let Some(identity) = self.schedule.start(self.started.elapsed()) {
            self.generation += 1;
            let (ca, generation, wanted) = (self.ca.clone(), self.generation, identity.clone());
            let trust = self.trust.clone();
            let attempt = self.attempts.spawn(async move { fetch(&*ca, &wanted, generation, trust).await });
            self.in_flight.insert(attempt.id(), identity);
        }
    }

    fn finished(&mut self, done: Result<(tokio::task::Id, Result<Svid, FetchError>), JoinError>) {
        // A panic in a CA client is a failed attempt like any other.
        let (id, result) = done.unwrap_or_else(|error| (error.id(), Err(FetchError::Aborted)));
        let Some(identity) = self.in_flight.remove(&id) else { return };
        let now = (self.clock)();
        self.drop_expired(now);
        match result {
            Ok(svid) if !svid.is_valid_at(now) => self.failed(identity, Arc::new(FetchError::Expired), now),
            Ok(svid) => self.succeeded(identity, Arc::new(svid), now),
            Err(error) => self.failed(identity, Arc::new(error), now),
        }
    }

    fn succeeded(&mut self, identity: Identity, svid: Arc<Svid>, now: SystemTime) {
        // Life counts from now, not from a notBefore that was dated back.
        let life = svid.not_after.duration_since(now).unwrap_or_default();
        if !self.schedule.succeeded(&identity, life, rand::random(), self.started.elapsed()) {
            return;
        }
        tracing::debug!(%identity, ?life, "certificate ready");
        self.answer(&identity, &Ok(svid.clone()));
        // A few kilobytes, to memory where the operator chose well: not worth another thread.
        self.store.iter().for_each(|store| store.save(&svid));
        let roots = svid.roots.clone();
        let entry = Entry { identity: identity.clone(), state: EntryState::Available, svid: Some(svid) };
        let before = self.entries.get(&identity).and_then(|entry| entry.svid.clone());
        self.entries.insert_mut(identity, entry);
        self.publish();
        if before.is_none_or(|before| before.roots != roots) {
            self.trust.changed();
        }
    }

    fn failed(&mut self, identity: Identity, error: Arc<FetchError>, now: SystemTime) {
        let held =
            self.entries.get(&identity).and_then(|entry| entry.svid.clone()).filter(|svid| svid.is_valid_at(now));
        let left = held.as_ref().and_then(|svid| svid.not_after.duration_since(now).ok());
        if !self.schedule.failed(&identity, left, rand::random(), self.started.elapsed()) {
            return;
        }
        let text = error_chain(&*error);
        tracing::warn!(%identity, error = text, held = held.is_some(), "certificate request failed");
        self.answer(&identity, &Err(IdentityError::Fetch { identity: identity.clone(), source: error }));
        let state = if held.is_some() { EntryState::Available } else { EntryState::Unavailable(text) };
        self.entries.insert_mut(identity.clone(), Entry { identity, state, svid: held });
        self.publish();
    }

    fn answer(&mut self, identity: &Identity, result: &Result<Arc<Svid>, IdentityError>) {
        for reply in self.waiters.remove(identity).unwrap_or_default() {
            // Whoever stopped waiting needs no answer.
            drop(reply.send(result.clone()));
        }
    }

    fn publish(&self) {
        self.shared.entries.store(Arc::new(self.entries.clone()));
    }
}

async fn fetch(ca: &dyn CaClient, identity: &Identity, generation: u64, trust: Arc<Trust>) -> Result<Svid, FetchError> {
    let csr = Csr::generate(identity)?;
    let answer = ca.sign(identity, csr.pem).await?;
    Ok(Svid::trusting(identity.clone(), csr.key, &answer, generation, trust)?)
}

async fn sleep_until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
