//! The tunnels of one worker, shared by the flows that may share them.
//!
//! The module `state` decides; this gives it tasks, time and sockets. A dial runs in a task of the pool, so that the flow that
//! started it may give up without failing the others.

mod state;

use std::{
    cell::RefCell,
    collections::HashMap,
    hash::BuildHasher as _,
    net::{IpAddr, SocketAddr},
    rc::{Rc, Weak},
    sync::Arc,
    time::Duration,
};

use foldhash::fast::RandomState;
use mesh_core::{headers::Authority, identity::Identity};
use tokio::{
    sync::{Notify, oneshot},
    task::{AbortHandle, JoinSet},
    time::{Instant, sleep_until},
};

use self::state::{Checkout, State, TunnelId};
use crate::{
    LocalBoxFuture,
    client::{self, Sender},
    config::Settings,
    connect::{ConnectRequest, ConnectResponse},
    driver::Driver,
    engine::flow::Budget,
    error::Error,
    snapshot::{Role, TunnelSnapshot},
    stream::{Held, TunnelStream},
    tls::Secured,
};

/// Who goes where: flows share a tunnel exactly when these agree. The far side takes a tunnel's TCP peer for the source, so pods
/// never share one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TunnelKey {
    pub source_uid: Arc<str>,
    pub source_ip: IpAddr,
    pub source_identity: Identity,
    /// Of the certificate that speaks for it: new flows go by the newest, open ones stay where they are.
    pub generation: u64,
    pub destination: SocketAddr,
    /// Whom the peer's certificate may name.
    pub accepted: Arc<[Identity]>,
    pub network: Arc<str>,
}

/// Dials and does the TLS handshake, within deadlines of its own.
pub trait Connector {
    fn connect(&self, key: &TunnelKey) -> LocalBoxFuture<'_, Result<Secured, Error>>;

    /// A tunnel ended otherwise than in order.
    fn failed(&self, _key: &TunnelKey, _error: &Error) {}
}

#[derive(Clone, Debug)]
pub struct PoolConfig {
    pub settings: Settings,
    /// Streams per tunnel, however many the peer would take.
    pub max_streams: usize,
    /// After which an unused tunnel is closed.
    pub idle: Duration,
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self { settings: Settings::default(), max_streams: client::ASSUMED_STREAMS, idle: Duration::from_secs(300) }
    }
}

/// Tunnels of one worker; clones share. Must be used within a `LocalSet`.
#[derive(Clone)]
pub struct Pool(Rc<Inner>);

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("tunnels", &self.0.tunnels.borrow().len()).finish_non_exhaustive()
    }
}

struct Inner {
    config: PoolConfig,
    budget: Budget,
    connector: Rc<dyn Connector>,
    started: Instant,
    state: RefCell<State<TunnelKey, Error>>,
    hasher: RandomState,
    tunnels: RefCell<HashMap<TunnelId, Tunnel>>,
    /// Flows waiting for a dial; bounded by the flows.
    waiters: RefCell<HashMap<TunnelKey, Vec<Waiter>>>,
    dials: RefCell<HashMap<TunnelKey, AbortHandle>>,
    /// Dials and drivers; they end with the pool.
    tasks: RefCell<JoinSet<()>>,
}

/// Told when the dial is over.
type Waiter = oneshot::Sender<Result<(), Error>>;

struct Tunnel {
    /// Shared with the streams' leases: a key is large, and there is a lease for every idle flow.
    key: Rc<TunnelKey>,
    sender: Sender,
    driver: AbortHandle,
    /// Wakes the task that closes unused tunnels.
    released: Rc<Notify>,
}

impl Pool {
    /// `budget` is whom the tunnels' memory is charged to.
    pub fn new(config: PoolConfig, budget: Budget, connector: Rc<dyn Connector>) -> Self {
        let state = RefCell::new(State::new(config.max_streams));
        Self(Rc::new(Inner {
            config,
            budget,
            connector,
            started: Instant::now(),
            state,
            hasher: RandomState::default(),
            tunnels: RefCell::default(),
            waiters: RefCell::default(),
            dials: RefCell::default(),
            tasks: RefCell::default(),
        }))
    }

    /// Opens a stream on a tunnel of `key`, dialling one if none has room. Returns once the peer answered 200. Cancel safe.
    ///
    /// # Errors
    /// See [`Error`]; a tunnel on which the request was refused or lost takes no further streams. One slow answer says nothing about
    /// the others' tunnel: whether the peer is alive is for keep-alive to find out.
    pub async fn open(
        &self,
        key: &TunnelKey,
        request: &ConnectRequest,
    ) -> Result<(TunnelStream, ConnectResponse), Error> {
        let mut went_away = false;
        loop {
            let lease = self.lease(key, &request.authority).await?;
            let Some(sender) = self.0.tunnels.borrow().get(&lease.id).map(|tunnel| tunnel.sender.clone()) else {
                continue;
            };
            match sender.connect(request).await {
                Ok((mut stream, response)) => {
                    stream.held = Some(Box::new(lease));
                    return Ok((stream, response));
                }
                Err(error) => {
                    if !matches!(error, Error::Status(_) | Error::AnswerTimeout(_)) {
                        self.0.state.borrow_mut().close(key, lease.id);
                    }
                    // RFC 9113 §6.8: the request was not processed; the tunnel was merely old.
                    if matches!(error, Error::GoAway) && !std::mem::replace(&mut went_away, true) {
                        continue;
                    }
                    return Err(error);
                }
            }
        }
    }

    /// Drops every tunnel of a pod that has gone, with its streams and dials.
    pub fn retire(&self, source_uid: &str) {
        self.0.state.borrow_mut().remove_where(|key| &*key.source_uid == source_uid);
        self.0.tunnels.borrow_mut().retain(|_, tunnel| {
            let stays = &*tunnel.key.source_uid != source_uid;
            if !stays {
                tunnel.driver.abort();
            }
            stays
        });
        self.0.dials.borrow_mut().retain(|key, dial| {
            let stays = &*key.source_uid != source_uid;
            if !stays {
                dial.abort();
            }
            stays
        });
        let gone: Vec<TunnelKey> =
            self.0.waiters.borrow().keys().filter(|key| &*key.source_uid == source_uid).cloned().collect();
        gone.iter().for_each(|key| self.0.wake(key, &Err(Error::Retired)));
    }

    pub fn snapshot(&self) -> Vec<TunnelSnapshot> {
        let state = self.0.state.borrow();
        let mut all: Vec<_> = self
            .0
            .tunnels
            .borrow()
            .iter()
            .map(|(id, tunnel)| TunnelSnapshot {
                role: Role::Client,
                id: *id,
                peer: tunnel.key.destination.to_string(),
                settings: self.0.config.settings.clone(),
                peer_max_streams: tunnel.sender.max_streams(),
                closing: !tunnel.sender.is_usable() || state.is_closing(&tunnel.key, *id),
                streams: tunnel.sender.streams(),
            })
            .collect();
        all.sort_by_key(|tunnel| tunnel.id);
        all
    }

    async fn lease(&self, key: &TunnelKey, authority: &Authority) -> Result<Lease, Error> {
        let kind = self.0.kind(authority);
        loop {
            self.0.refresh(key);
            let checkout = self.0.state.borrow_mut().checkout(key, kind, self.0.now());
            match checkout {
                Checkout::Use(id) => {
                    let shared = self.0.tunnels.borrow().get(&id).map(|tunnel| tunnel.key.clone());
                    let key = shared.unwrap_or_else(|| Rc::new(key.clone()));
                    return Ok(Lease { pool: Rc::downgrade(&self.0), key, id, kind });
                }
                Checkout::Failed(error) => return Err(error),
                Checkout::Dial => self.0.dial(key),
                Checkout::Wait => {}
            }
            let (waiter, dialed) = oneshot::channel();
            self.0.waiters.borrow_mut().entry(key.clone()).or_default().push(waiter);
            dialed.await.map_err(|_| Error::Retired)??;
        }
    }
}

impl Inner {
    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// What kind of destination an authority is: flows to one are taken to resemble each other. Its hash will do.
    fn kind(&self, authority: &Authority) -> u64 {
        self.hasher.hash_one(authority.to_string())
    }

    fn refresh(&self, key: &TunnelKey) {
        let mut state = self.state.borrow_mut();
        let tunnels = self.tunnels.borrow();
        for id in state.ids(key) {
            match tunnels.get(&id) {
                Some(Tunnel { sender, .. }) if sender.is_usable() => {
                    state.set_limit(key, id, sender.max_streams().unwrap_or(usize::MAX), sender.is_busy());
                }
                _ => state.lost(key, id, Error::GoAway, self.now()),
            }
        }
    }

    fn dial(self: &Rc<Self>, key: &TunnelKey) {
        let (pool, connector, settings) = (Rc::downgrade(self), self.connector.clone(), self.config.settings.clone());
        let budget = self.budget.clone();
        let wanted = key.clone();
        let dial = self.spawn(async move {
            let dialed = async {
                let io = connector.connect(&wanted).await?;
                let (sender, driver) = client::handshake(io, &settings, budget).await?;
                // Another dial would end the same way: this must count as a failure.
                if sender.max_streams() == Some(0) { Err(Error::Refused) } else { Ok((sender, driver)) }
            }
            .await;
            let Some(pool) = pool.upgrade() else { return };
            pool.dials.borrow_mut().remove(&wanted);
            match dialed {
                Ok((sender, driver)) => pool.established(&wanted, sender, driver),
                Err(error) => {
                    pool.state.borrow_mut().dial_failed(&wanted, error.clone(), pool.now());
                    pool.wake(&wanted, &Err(error));
                }
            }
        });
        self.dials.borrow_mut().insert(key.clone(), dial);
    }

    fn established(self: &Rc<Self>, key: &TunnelKey, sender: Sender, mut driver: Driver) {
        let Some(id) = self.state.borrow_mut().dialed(key, self.now()) else { return };
        let released = Rc::new(Notify::new());
        let shared = Rc::new(key.clone());
        let (pool, tunnel_key, idle) = (Rc::downgrade(self), shared.clone(), released.clone());
        let connector = self.connector.clone();
        let driver = self.spawn(async move {
            let ended = tokio::select! {
                ended = &mut driver => Some(ended),
                () = unused(&pool, &tunnel_key, id, &idle) => None,
            };
            if let Some(pool) = pool.upgrade() {
                let mut state = pool.state.borrow_mut();
                if ended.is_some() {
                    state.ended(&tunnel_key, id, Error::GoAway, pool.now());
                }
                state.remove(&tunnel_key, id, pool.now());
                let tunnel = pool.tunnels.borrow_mut().remove(&id);
                tunnel.iter().for_each(|tunnel| tunnel.sender.close());
            }
            // Unused: it says goodbye. A tunnel that fails while its last stream leaves comes this way, too.
            let ended = match ended {
                Some(ended) => ended,
                None => driver.await,
            };
            if let Err(error) = ended {
                connector.failed(&tunnel_key, &error);
            }
        });
        self.tunnels.borrow_mut().insert(id, Tunnel { key: shared, sender, driver, released });
        self.wake(key, &Ok(()));
    }

    fn wake(&self, key: &TunnelKey, result: &Result<(), Error>) {
        for waiter in self.waiters.borrow_mut().remove(key).unwrap_or_default() {
            // Whoever gave up needs no answer.
            drop(waiter.send(result.clone()));
        }
    }

    fn spawn(&self, task: impl Future<Output = ()> + 'static) -> AbortHandle {
        let mut tasks = self.tasks.borrow_mut();
        while tasks.try_join_next().is_some() {}
        tasks.spawn_local(task)
    }
}

/// Resolves when the tunnel has carried nothing for the idle time, or is closing and empty.
async fn unused(pool: &Weak<Inner>, key: &TunnelKey, id: TunnelId, released: &Notify) {
    loop {
        let Some(pool) = pool.upgrade() else { return };
        let look_again = pool.state.borrow_mut().expire(key, id, pool.config.idle, pool.now());
        let Some(at) = look_again.map(|at| pool.started + at) else { return };
        drop(pool);
        tokio::select! {
            () = sleep_until(at) => {}
            () = released.notified() => {}
        }
    }
}

/// One stream's place on a tunnel.
struct Lease {
    pool: Weak<Inner>,
    key: Rc<TunnelKey>,
    id: TunnelId,
    kind: u64,
}

impl Held for Lease {
    fn elephant(&self) {
        if let Some(pool) = self.pool.upgrade() {
            pool.state.borrow_mut().elephant(&self.key, self.id, self.kind, pool.now());
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let Some(pool) = self.pool.upgrade() else { return };
        pool.state.borrow_mut().release(&self.key, self.id, pool.now());
        if let Some(tunnel) = pool.tunnels.borrow().get(&self.id) {
            tunnel.released.notify_one();
        }
    }
}
