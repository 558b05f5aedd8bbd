//! One pod's life on the data plane: its listeners on a home worker, a share of its flows on any worker, and an orderly end.
//!
//! Every worker runs one task per pod, which owns the pod's flows there. Dropping the [`PodHandle`] ends them all at once.

use std::{
    net::{SocketAddr, UdpSocket},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use mesh_core::authorize::PolicySet;
use mesh_hbone::{Budget, Pool, PoolConfig, Process, Settings};
use mesh_identity::Manager;
use mesh_net::{NetNs, SocketOptions};
use mesh_runtime::{
    drain::{self, DrainMode, DrainTrigger, DrainWatcher, Drained},
    workers::{Occupied, WorkerHandle},
};
use tokio::{sync::mpsc, task::JoinSet};
use tracing::Span;

use crate::{
    config::Config,
    connections::{Connections, same_policies},
    dns::{self, Desk},
    inpod::WorkloadInfo,
    lookup::Lookups,
    outcome::Outcomes,
    proxy::{
        self,
        inbound::HandshakeSlots,
        listeners::{self, Accepted, Placement},
        outbound::RetryBudget,
        upstream::Dialer,
    },
    state::State,
    tunnels::Tunnels,
};
pub use crate::{
    connections::{ConnectionsDump, InboundConnection, OutboundConnection, Protocol},
    error::StartError,
    proxy::{listeners::Kind, probe::Prober},
};

/// Accepted sockets on their way to a worker; beyond it they wait in the listener's backlog.
const ARRIVALS: usize = 64;

/// What one pod's tunnels may keep for readers that do not read, on all workers.
const POD_MEMORY: usize = 64 << 20;

/// What all pods of the process share.
#[derive(Debug)]
pub struct Shared {
    pub config: Arc<Config>,
    pub state: State,
    pub identities: Manager,
    pub outcomes: Outcomes,
    pub lookups: Lookups,
    /// What tunnels of all pods may keep for readers that do not read.
    pub memory: Process,
    /// Never empty.
    pub workers: Vec<WorkerHandle>,
}

/// A pod being served. Dropping it ends everything of the pod at once.
#[derive(Debug)]
pub struct PodHandle {
    info: WorkloadInfo,
    listening: Vec<(Kind, SocketAddr)>,
    /// One part per worker.
    connections: Vec<Connections>,
    drain: DrainTrigger,
    prober: Prober,
    /// So that the next pod finds another home.
    _home: Occupied,
}

impl PodHandle {
    pub fn info(&self) -> &WorkloadInfo {
        &self.info
    }

    /// What is bound where.
    pub fn listening(&self) -> &[(Kind, SocketAddr)] {
        &self.listening
    }

    pub fn connections(&self) -> ConnectionsDump {
        let mut dump = ConnectionsDump::default();
        for part in &self.connections {
            part.dump_into(&mut dump);
        }
        dump
    }

    /// Tries ways from where the pod's connections start.
    pub fn prober(&self) -> &Prober {
        &self.prober
    }

    /// Stops listening. [`DrainMode::Graceful`]: tells peers to go elsewhere, lets open flows end until `deadline`, then cuts the
    /// rest. [`DrainMode::Immediate`]: cuts everything now. Returns when nothing of the pod is left, or was told to go.
    pub async fn stop(self, mode: DrainMode, deadline: Duration) -> Drained {
        match mode {
            DrainMode::Graceful => self.drain.drain(deadline).await,
            DrainMode::Immediate => self.drain.stop(deadline).await,
        }
    }
}

/// Serves a pod: all its listeners, inside `netns` when there is one. Returns when every listener is listening.
///
/// # Errors
/// When one cannot be bound; then none is.
pub async fn start(shared: &Arc<Shared>, info: WorkloadInfo, netns: Option<NetNs>) -> Result<PodHandle, StartError> {
    let sockets = shared.config.socket_options();
    let kinds = Kind::of_pod(&shared.config);
    serve(shared, Pod { info, netns, sockets }, &kinds).await
}

/// Serves the proxy's own HBONE port in its own namespace, so that mesh clients can scrape it under policy. Nothing is captured here,
/// so nothing is marked, and the client's address is not kept.
///
/// # Errors
/// When the port cannot be bound.
pub async fn start_self_listener(shared: &Arc<Shared>, info: WorkloadInfo) -> Result<PodHandle, StartError> {
    let sockets = SocketOptions { keepalive: shared.config.keepalive, ..SocketOptions::default() };
    serve(shared, Pod { info, netns: None, sockets }, &[Kind::Inbound]).await
}

struct Pod {
    info: WorkloadInfo,
    netns: Option<NetNs>,
    sockets: SocketOptions,
}

async fn serve(shared: &Arc<Shared>, pod: Pod, kinds: &[Kind]) -> Result<PodHandle, StartError> {
    let bound = listeners::bind(&shared.config, pod.netns.as_ref(), &pod.sockets, kinds)?;
    let home = shared.workers.iter().min_by_key(|worker| worker.load()).ok_or(StartError::NoWorkers)?.clone();
    let of_dns = |served: bool| bound.addresses.iter().filter(move |(kind, _)| kind.is_dns() == served);
    let ports: Arc<[u16]> = of_dns(false).map(|(_, address)| address.port()).collect();
    let names: Arc<[SocketAddr]> = of_dns(true).map(|(_, address)| *address).collect();
    let (trigger, watcher) = drain::channel();
    let (senders, receivers): (Vec<_>, Vec<_>) = shared.workers.iter().map(|_| mpsc::channel(ARRIVALS)).unzip();
    let placement = Placement::new(shared.workers.clone(), senders, home.clone());
    let mut at_home = Some(Home { listeners: bound.listeners, placement, datagrams: bound.datagrams });
    let mut handle = PodHandle {
        info: pod.info.clone(),
        listening: bound.addresses,
        connections: Vec::new(),
        drain: trigger,
        prober: Prober {
            shared: shared.clone(),
            netns: pod.netns.clone(),
            sockets: pod.sockets.clone(),
            worker: home.clone(),
        },
        _home: home.occupy(),
    };
    for (worker, arrivals) in shared.workers.iter().zip(receivers) {
        let connections = Connections::default();
        handle.connections.push(connections.clone());
        let part = Part {
            shared: shared.clone(),
            info: pod.info.clone(),
            netns: pod.netns.clone(),
            sockets: pod.sockets.clone(),
            transparent: bound.transparent,
            ports: ports.clone(),
            names: names.clone(),
            connections,
            worker: worker.clone(),
            drain: watcher.clone(),
        };
        let at_home = if worker.index() == home.index() { at_home.take() } else { None };
        worker.spawn(move || part.run(arrivals, at_home)).await?;
    }
    Ok(handle)
}

/// What only the pod's home worker has.
struct Home {
    listeners: Vec<listeners::Listener>,
    placement: Placement,
    /// Of DNS.
    datagrams: Vec<UdpSocket>,
}

/// What a worker needs to build its [`PodContext`].
struct Part {
    shared: Arc<Shared>,
    info: WorkloadInfo,
    netns: Option<NetNs>,
    sockets: SocketOptions,
    transparent: bool,
    ports: Arc<[u16]>,
    names: Arc<[SocketAddr]>,
    connections: Connections,
    worker: WorkerHandle,
    drain: DrainWatcher,
}

/// What the flows of one pod on one worker share.
pub(crate) struct PodContext {
    pub(crate) shared: Arc<Shared>,
    pub(crate) info: WorkloadInfo,
    pub(crate) netns: Option<NetNs>,
    pub(crate) sockets: SocketOptions,
    /// Whether applications see the client's address.
    pub(crate) transparent: bool,
    /// What this pod's listeners are bound to.
    ports: Arc<[u16]>,
    pub(crate) pool: Pool,
    /// What the pod's tunnels on this worker may keep for readers that do not read.
    pub(crate) memory: Budget,
    pub(crate) connections: Connections,
    pub(crate) tunnels: Rc<Tunnels>,
    pub(crate) handshakes: HandshakeSlots,
    pub(crate) retries: RetryBudget,
    pub(crate) dns: Desk,
    pub(crate) worker: WorkerHandle,
    pub(crate) drain: DrainWatcher,
    /// What is logged about the pod's connections is logged within.
    pub(crate) span: Span,
}

impl Part {
    async fn run(self, arrivals: mpsc::Receiver<Accepted>, home: Option<Home>) {
        let Self { shared, info, netns, sockets, transparent, ports, names, connections, worker, drain } = self;
        let tunnels = Rc::new(Tunnels::new(shared.identities.clone(), shared.outcomes.clone()));
        let dialer = Dialer {
            tunnels: tunnels.clone(),
            config: shared.config.clone(),
            identities: shared.identities.clone(),
            outcomes: shared.outcomes.clone(),
            netns: netns.clone(),
            sockets: sockets.clone(),
        };
        let memory = Budget::new(POD_MEMORY / shared.workers.len(), shared.memory.clone());
        let pool = Pool::new(pool_config(&shared.config), memory.clone(), Rc::new(dialer));
        let dns = Desk::new(&shared.config, &info.namespace, netns.as_ref().filter(|_| home.is_some()), names);
        let span = tracing::info_span!("proxy", wl = %format_args!("{}/{}", info.namespace, info.name));
        let pod = PodContext {
            span,
            shared,
            info,
            netns,
            sockets,
            transparent,
            ports,
            pool,
            memory,
            connections,
            tunnels,
            handshakes: HandshakeSlots::default(),
            retries: RetryBudget::default(),
            dns,
            worker,
            drain,
        };
        Rc::new(pod).run(arrivals, home).await;
    }
}

impl PodContext {
    /// Whether connecting to this port of the pod would be talking to ourselves.
    pub(crate) fn is_own_port(&self, port: u16) -> bool {
        self.shared.config.is_own_port(port) || self.ports.contains(&port)
    }

    /// Owns the pod's flows on this worker until the listeners have closed and the flows have ended, or all are told to stop.
    async fn run(self: Rc<Self>, mut arrivals: mpsc::Receiver<Accepted>, home: Option<Home>) {
        let mut flows = JoinSet::new();
        if let Some(Home { listeners, placement, datagrams }) = home {
            let placement = Rc::new(placement);
            for listener in listeners {
                flows.spawn_local(listeners::accept(self.clone(), listener, placement.clone()));
            }
            for socket in datagrams {
                flows.spawn_local(dns::datagrams::serve(self.clone(), socket));
            }
        }
        let mut versions = self.shared.state.versions();
        let mut policies = PolicySet::default();
        let mut trust = self.shared.identities.trust().changes();
        let watcher = self.drain.clone();
        let mut stopped = std::pin::pin!(watcher.stopped());
        let mut listening = true;
        while listening || !flows.is_empty() {
            tokio::select! {
                biased;
                () = &mut stopped => break,
                Ok(()) = versions.changed() => self.reevaluate(&mut policies).await,
                Ok(()) = trust.changed() => self.reverify().await,
                Some(done) = flows.join_next(), if !flows.is_empty() => report_panic(done),
                accepted = arrivals.recv(), if listening => match accepted {
                    Some(accepted) => proxy::serve(self.clone(), accepted, &mut flows),
                    None => listening = false,
                },
            }
        }
        flows.shutdown().await;
    }

    async fn reverify(&self) {
        let cut = self.tunnels.reverify().await;
        if cut > 0 {
            tracing::info!(pod = &*self.info.name, namespace = &*self.info.namespace, cut, "trust change");
        }
    }

    /// Asks again about open inbound flows when the policies in force for this pod are others than `last` time. By the workload as it is
    /// now: a policy newly attached to it cuts too.
    async fn reevaluate(&self, last: &mut PolicySet) {
        let index = self.shared.state.snapshot();
        let WorkloadInfo { namespace, name, service_account, .. } = &self.info;
        // A workload that vanished from the state says nothing about policy: its pod is about to go, or discovery restarts.
        let Some(workload) = index.local_workload(self.shared.state.node(), namespace, name, service_account) else {
            return;
        };
        let policies = index.policies_for(workload);
        drop(index);
        if !same_policies(last, &policies) {
            let cut = self.connections.reevaluate(&policies).await;
            if cut > 0 {
                tracing::info!(pod = &*self.info.name, namespace = &*self.info.namespace, cut, "policy change");
            }
            *last = policies;
        }
    }
}

/// A panic costs its connection only.
pub(crate) fn report_panic(done: Result<(), tokio::task::JoinError>) {
    if let Err(error) = done
        && error.is_panic()
    {
        tracing::error!(%error, "a connection's task panicked");
    }
}

pub(crate) fn hbone_settings(config: &Config) -> Settings {
    Settings {
        stream_window: config.stream_window,
        connection_window: config.connection_window,
        frame_size: config.frame_size,
        ..Settings::default()
    }
}

fn pool_config(config: &Config) -> PoolConfig {
    PoolConfig {
        settings: hbone_settings(config),
        max_streams: usize::from(config.pool_max_streams),
        idle: config.pool_idle,
    }
}
