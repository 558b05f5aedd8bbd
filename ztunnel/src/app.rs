//! Wiring: what is started in which order, and how the process leaves.
//!
//! Up: certificates and workers, then admin ports (so that a start that hangs can be looked at), then discovery, then pods. Down: leave
//! readiness, stop accepting, tell peers, wait, cut what is left; discovery and certificates serve until the last flow has ended.

use std::{ffi::OsString, net::SocketAddr, process::ExitCode, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use mesh_identity::{CaClient, GrpcCa, GrpcCaConfig, KeyStore, Manager as Identities, Trust};
use mesh_net::{NetNs, SocketOptions, limits, sockets};
use mesh_runtime::{
    admin::AdminServer,
    drain::{self, DrainTrigger, DrainWatcher, Drained},
    env::ProcessEnv,
    metrics::Registry,
    private::PrivateFolder,
    readiness::Readiness,
    signal::Shutdown,
    telemetry,
    workers::Workers,
};
use tokio::{runtime::Handle, task::JoinSet};
use tokio_util::sync::CancellationToken;

use crate::{
    admin,
    config::{Config, ProxyMode},
    crl::RevocationLists,
    discovery::Discovery,
    inpod::manager::{Manager, PodTable, StartPod},
    local::Local,
    lookup::Lookups,
    metrics::ControlMetrics,
    outcome::Outcomes,
    pods::{self, Shared},
    proxy::listeners,
    state::State,
};

const HELP: &str = "usage: ztunnel [proxy | version | help]\n\n\
    proxy    run the node proxy (the default); configured by environment variables\n\
    version  say which version this is\n\
    help     say this\n";
/// Threads of the control runtime: discovery must not wait for a configuration dump.
const CONTROL_THREADS: usize = 2;
/// Pods cut their own flows at the deadline; this much later the process stops waiting for them.
const SLACK: Duration = Duration::from_secs(1);

/// The program; `args` without its name.
pub fn main(args: Vec<OsString>) -> ExitCode {
    let command = args.first().map(|arg| arg.to_string_lossy().into_owned());
    match command.as_deref() {
        // Charts pass further words, which mean nothing.
        None | Some("proxy") => report(run()),
        Some("version") => {
            println!("{}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        Some("help" | "--help" | "-h") => {
            print!("{HELP}");
            ExitCode::SUCCESS
        }
        Some(other) => {
            eprint!("unknown command `{other}`\n{HELP}");
            ExitCode::FAILURE
        }
    }
}

fn report(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ztunnel: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let config = Config::from_env(&ProcessEnv)?;
    telemetry::init(&config.log_filter, config.log_format)
        .map_err(|problem| anyhow::anyhow!("RUST_LOG=`{}`: {problem}", config.log_filter))?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), config = %effective(&config), "starting");
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let runtime = builder.worker_threads(CONTROL_THREADS).thread_name("control").enable_all().build();
    let served = runtime.context("cannot start the control runtime")?.block_on(serve(config));
    telemetry::flush(SLACK);
    served
}

fn effective(config: &Config) -> String {
    serde_json::to_string(config).unwrap_or_else(|error| error.to_string())
}

async fn serve(config: Config) -> Result<()> {
    match limits::raise_descriptor_limit() {
        Ok(limit) => tracing::info!(limit, "descriptor limit raised"),
        Err(error) => tracing::warn!(%error, "cannot raise the descriptor limit"),
    }
    let mut signals = Shutdown::new().context("cannot listen for signals")?;
    let app = App::start(config).await?;
    let quit = app.quit.clone();
    let cause = tokio::select! {
        name = signals.recv() => name,
        () = quit.cancelled() => "quitquitquit",
    };
    tracing::info!(cause, deadline = ?app.shared.config.drain_deadline, "draining");
    tokio::select! {
        drained = app.stop() => match drained {
            Drained::Complete => tracing::info!("drained"),
            Drained::Forced => tracing::warn!("drain duration expired with pending connections, forcefully shutting down"),
        },
        name = signals.recv() => tracing::warn!(cause = name, "told twice: leaving at once"),
    }
    Ok(())
}

/// Which of the processes on this node this one is. Only the owner accepts connections; a standby is ready when it could take over, and a
/// relieved one stays ready and silent until it is told to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Standby,
    Owner,
    Relieved,
}

impl Role {
    /// Readiness tasks that a process of this role waits for.
    pub fn waits_for(self) -> &'static [&'static str] {
        match self {
            Self::Standby => &["state manager"],
            Self::Owner => &["state manager", "proxy"],
            Self::Relieved => &[],
        }
    }
}

/// A running proxy.
pub struct App {
    pub shared: Arc<Shared>,
    /// Where the ports are bound.
    pub admin: SocketAddr,
    pub stats: SocketAddr,
    pub readiness: SocketAddr,
    /// Cancelled when somebody asked the process to leave.
    pub quit: CancellationToken,
    pub pods: PodTable,
    ready: Readiness,
    /// Ends what accepts traffic.
    flows: DrainTrigger,
    /// Ends what serves it: admin ports and discovery.
    services: DrainTrigger,
    tasks: JoinSet<()>,
    workers: Workers,
}

impl App {
    /// Starts everything; returns when every port of this process is bound. Pods come when they are announced.
    ///
    /// # Errors
    /// When a port is taken, a privilege is missing, or an address cannot be used; the text says which.
    pub async fn start(config: Config) -> Result<Self> {
        let ca = Arc::new(certificate_authority(&config)?);
        Self::start_with_ca(config, ca).await
    }

    /// [`Self::start`] with a certificate authority of the caller's.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn start_with_ca(config: Config, ca: Arc<dyn CaClient>) -> Result<Self> {
        if config.is_shared() {
            check_privileges(config.packet_mark)?;
        }
        if config.trust.control_tls12 {
            tracing::info!(
                "TLS12_ENABLED: TLS 1.2 is offered to the control plane and the CA; tunnels stay with TLS 1.3"
            );
        }
        let config = Arc::new(config);
        let (registry, ready) = (Registry::new(), Readiness::default());
        let mut waiting = Role::Owner.waits_for().iter().map(|task| ready.pending(*task));
        let (unsynced, starting) = (waiting.next(), waiting.next());
        drop(waiting);
        let metrics = ControlMetrics::new(&registry, &config.version);
        let workers = Workers::spawn(config.workers, "ztunnel").context("cannot start the worker threads")?;
        let trust = Arc::new(Trust::new(config.trust_domains(), config.trust.compliance));
        // Others who could write there could write policy; others who could read there could read the mesh.
        config.state_dir.as_deref().map(PrivateFolder::open).transpose().context("FAIRWAY_STATE_DIR")?;
        let keys = config.trust.keys_dir.as_deref().map(PrivateFolder::open).transpose().context("FAIRWAY_KEYS_DIR")?;
        let store = keys.map(KeyStore::new).map(Arc::new);
        let settings = mesh_identity::Config { trust: trust.clone(), store, ..mesh_identity::Config::default() };
        let (identities, certificates) = Identities::new(settings, ca);
        let state = State::new(config.node.clone());
        let shared = Arc::new(Shared {
            config: config.clone(),
            state: state.clone(),
            identities: identities.clone(),
            outcomes: Outcomes::new(&registry),
            lookups: Lookups::new(config.ipv6),
            memory: mesh_hbone::Process::default(),
            workers: workers.handles().to_vec(),
        });
        registry.runtimes(runtimes(&workers));
        let (flows, flows_watcher) = drain::channel();
        let (services, services_watcher) = drain::channel();
        let (pods, quit) = (PodTable::default(), CancellationToken::new());
        let mut tasks = JoinSet::new();
        tasks.spawn(certificates);
        if let Some(path) = &config.trust.crl_path {
            let mut lists = RevocationLists::new(path.clone(), trust, metrics.crl_loads.clone());
            // Before the first handshake.
            lists.load().await;
            tasks.spawn(lists.follow(services_watcher.clone()));
        }

        let mut ports = PortServer { tasks: &mut tasks, drain: &services_watcher };
        let context = admin::Context { shared: shared.clone(), pods: pods.clone(), quit: quit.clone() };
        let admin = ports.serve("admin", config.loopback(config.ports.admin), admin::server(context))?;
        let stats = AdminServer::new().metrics(&registry);
        let stats = ports.serve("metrics", config.wildcard(config.ports.stats), stats)?;
        let probe = AdminServer::new().readiness("/healthz/ready", &ready);
        let readiness = ports.serve("readiness", config.wildcard(config.ports.readiness), probe)?;

        let local = Arc::new(Local::new(config.clone(), state.clone(), identities));
        if let Some(source) = config.static_config.clone() {
            let written = state.load_static(source)?;
            tasks.spawn(written.follow(state.clone(), services_watcher.clone()));
            if config.xds.is_none() {
                // Nobody else will say more.
                state.update(|index| index.set_policies_complete(true));
                local.synced();
            }
        }
        if let (Some(upstream), Some(unsynced)) = (&config.xds, unsynced) {
            let discovery = Discovery::new(&config, upstream, state, local.clone(), unsynced, metrics.clone())
                .context("XDS_ADDRESS")?;
            tasks.spawn(discovery.run(services_watcher.clone()));
        }

        serve_own_workload(&shared, &local, &pods).await?;
        match config.mode {
            ProxyMode::Dedicated => drop(tasks.spawn(stop_with(pods.clone(), config.drain_deadline, flows_watcher))),
            ProxyMode::Shared => {
                let start = start_pod(shared.clone());
                let deadline = config.drain_deadline;
                let socket = config.inpod_uds.clone();
                let manager = Manager::new(socket, start, pods.clone(), local, metrics, ready.clone(), deadline);
                tasks.spawn(manager.run(flows_watcher));
            }
        }
        drop(starting);
        Ok(Self { shared, admin, stats, readiness, quit, pods, ready, flows, services, tasks, workers })
    }

    /// Leaves: orderly within the configured deadline, then cutting what is left.
    pub async fn stop(mut self) -> Drained {
        // First out of readiness, so that nobody sends more.
        let leaving = self.ready.pending("shutting down");
        let drained = self.flows.drain(self.shared.config.drain_deadline + SLACK).await;
        // Pods cut their flows themselves, and are done then.
        let drained = if self.pods.were_cut() { Drained::Forced } else { drained };
        self.services.drain(SLACK).await;
        self.tasks.shutdown().await;
        let workers = self.workers;
        if tokio::task::spawn_blocking(move || workers.join()).await.is_err() {
            tracing::error!("cannot join the worker threads");
        }
        drop(leaving);
        drained
    }
}

/// Data-plane threads by their number, and the control runtime.
fn runtimes(workers: &Workers) -> Vec<(String, Handle)> {
    let data = workers.runtimes().iter().enumerate().map(|(i, runtime)| (i.to_string(), runtime.clone()));
    data.chain([("control".to_owned(), Handle::current())]).collect()
}

fn certificate_authority(config: &Config) -> Result<GrpcCa> {
    let config = GrpcCaConfig {
        server: config.ca.control_plane(config.trust.control_tls()),
        ttl: config.secret_ttl,
        // A node proxy asks on behalf of its pods; a dedicated one is what its token says.
        impersonate: config.is_shared(),
    };
    GrpcCa::new(config).context("CA_ADDRESS")
}

/// Fails early, and says what is missing, rather than at the first pod.
fn check_privileges(mark: Option<u32>) -> Result<()> {
    let setns = NetNs::current().and_then(|home| home.run(|| ()));
    setns.context("cannot enter network namespaces: CAP_SYS_ADMIN is needed")?;
    let options = SocketOptions { mark, ..SocketOptions::default() };
    let marked = sockets::tcp_socket(None, None, ([127, 0, 0, 1], 1).into(), &options);
    marked.context("cannot mark packets: CAP_NET_ADMIN is needed")?;
    Ok(())
}

/// The dedicated workload; or the proxy's own HBONE port, for scraping it from inside the mesh.
async fn serve_own_workload(shared: &Arc<Shared>, local: &Local, pods: &PodTable) -> Result<()> {
    let handle = match &shared.config.workload {
        Some(info) => {
            local.pod_arrived(info);
            pods::start(shared, info.clone(), None).await?
        }
        None => match shared.config.own_workload() {
            Some(info) => pods::start_self_listener(shared, info).await?,
            None => return Ok(()),
        },
    };
    pods.insert(handle);
    Ok(())
}

fn start_pod(shared: Arc<Shared>) -> StartPod {
    Box::new(move |info, netns| {
        let shared = shared.clone();
        Box::pin(async move { pods::start(&shared, info, Some(netns)).await })
    })
}

async fn stop_with(pods: PodTable, deadline: Duration, drain: DrainWatcher) {
    let (mode, _guard) = drain.signalled().await;
    pods.stop_all(mode, deadline).await;
}

/// Binds this process's own HTTP ports and serves them.
struct PortServer<'a> {
    tasks: &'a mut JoinSet<()>,
    drain: &'a DrainWatcher,
}

impl PortServer<'_> {
    fn serve(&mut self, name: &'static str, address: SocketAddr, server: AdminServer) -> Result<SocketAddr> {
        let listening = listeners::listen(None, address, &SocketOptions::default());
        let (listener, _) = listening.with_context(|| format!("failed to bind to address {address} for {name}"))?;
        let bound = listener.local_addr()?;
        tracing::info!(address = %bound, "{name} port");
        let drain = self.drain.clone();
        self.tasks.spawn(async move {
            if let Err(error) = server.serve(listener, drain).await {
                tracing::error!(%error, "{name} port failed");
            }
        });
        Ok(bound)
    }
}

#[cfg(test)]
mod tests;
