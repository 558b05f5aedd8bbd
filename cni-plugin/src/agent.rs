//! The node agent: one task that decides ([`driver`] around [`enroll`]), and around it the source of pods, the plugin's socket, ZDS
//! and the admin port.

use std::{
    ffi::OsString,
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use http::StatusCode;
use mesh_net::SeqListener;
use mesh_runtime::{
    admin::{self, AdminServer},
    drain,
    env::ProcessEnv,
    metrics::Registry,
    readiness::Readiness,
    signal::Shutdown,
    telemetry, whole_file,
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
};

pub mod api;
pub mod config;
pub mod driver;
pub mod enroll;
pub mod host;
pub mod install;
pub mod leave;
pub mod notices;
pub mod preflight;
pub mod probes;
pub mod report;
pub mod sandbox;
pub mod server;
pub mod source;
pub mod status;
pub mod taint;
pub mod zds;

pub use config::Config;
use config::{Kubernetes, World};
use driver::{Driver, Settings};
use enroll::Pace;
use host::Host;
use leave::{Bound, Done, Fate, Standing, Traces};
use probes::Probes;
use report::{Metrics, Reports};
use sandbox::Sandboxes;
use source::{FolderSource, KubernetesSource, PodSource};
use status::{AnnotationStatus, FolderStatus, StatusWriter};

use crate::{decision::Decisions, request::socket_path};

const STOP_LIMIT: Duration = Duration::from_secs(5);
/// Of captured flows when everything is removed: well within the grace period of a pod.
const LAST_GRACE: Duration = Duration::from_secs(10);
/// Of all agents together: more than the grace period of their pods.
const RETIRE_LIMIT: Duration = Duration::from_secs(60);
const QUEUED_CALLS: usize = 64;

/// The agent as a program, configured by its environment. With the argument `cleanup` it removes from the node what an agent left
/// behind, says what, and ends; with `retire` it ends the agents of all nodes, before a release is removed.
pub fn agent_main(args: Vec<OsString>) -> ExitCode {
    let act = match args.first() {
        None => start,
        Some(command) if command == "cleanup" && args.len() == 1 => cleanup,
        Some(command) if command == "retire" && args.len() == 1 => retire,
        Some(argument) => {
            let argument = argument.display();
            eprintln!(
                "unexpected argument `{argument}`: there are `cleanup` and `retire`; all else is in the environment"
            );
            return ExitCode::from(2);
        }
    };
    match Config::from_env(&ProcessEnv).map_err(anyhow::Error::from).and_then(act) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(config: Config) -> anyhow::Result<()> {
    telemetry::init(&config.log_filter, config.log_format).map_err(|e| anyhow::anyhow!("RUST_LOG: {e}"))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut shutdown = Shutdown::new()?;
        let mut agent = Agent::start(config).await?;
        let failed = tokio::select! {
            signal = shutdown.recv() => {
                tracing::info!(signal, "stopping");
                false
            }
            () = agent.failed() => true,
        };
        if failed {
            agent.stop().await;
        } else {
            agent.leave().await;
        }
        // The supervisor starts a new one, which finds everything as it is.
        anyhow::ensure!(!failed, "a task of the agent ended by itself; its reason is in the log");
        Ok(())
    })
}

fn cleanup(config: Config) -> anyhow::Result<()> {
    telemetry::init(&config.log_filter, config.log_format).map_err(|e| anyhow::anyhow!("RUST_LOG: {e}"))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let World::Kubernetes(kubernetes) = &config.world else {
            anyhow::bail!("FAIRWAY_MANIFESTS is set: in the lab, `fairway lab down` removes everything");
        };
        let client = kubernetes.api.client().await;
        let client = client.inspect_err(|error| eprintln!("annotations stay as they are: {error:#}")).ok();
        let done = traces(&config, host(kubernetes)?, kubernetes).remove(client.as_ref()).await;
        done.removed.iter().for_each(|what| println!("removed {what}"));
        println!("{} removed, {} failed", done.removed.len(), done.failed.len());
        anyhow::ensure!(done.failed.is_empty(), "not everything could be removed:\n  {}", done.failed.join("\n  "));
        Ok(())
    })
}

fn retire(config: Config) -> anyhow::Result<()> {
    telemetry::init(&config.log_filter, config.log_format).map_err(|e| anyhow::anyhow!("RUST_LOG: {e}"))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let World::Kubernetes(kubernetes) = &config.world else {
            anyhow::bail!("FAIRWAY_MANIFESTS is set: in the lab, `fairway lab down` ends the agents");
        };
        let client = kubernetes.api.client().await?;
        let left = leave::retire(&client, &kubernetes.namespace, &kubernetes.daemon_set, RETIRE_LIMIT).await?;
        // Of a node that is down; to wait for it is to keep everything.
        left.iter().for_each(|pod| println!("{pod} has not ended: `fairway-node cleanup` on its node"));
        println!("{} agents have not ended within {RETIRE_LIMIT:?}", left.len());
        Ok(())
    })
}

fn host(kubernetes: &Kubernetes) -> anyhow::Result<Host> {
    Host::mounted(kubernetes.host_root.clone(), kubernetes.host_proc.clone()).with_context(|| {
        let proc = kubernetes.host_proc.display();
        format!("HOST_PROC: {proc}/1/ns/net: mount the node's /proc there, and grant CAP_SYS_PTRACE")
    })
}

fn traces(config: &Config, host: Host, kubernetes: &Kubernetes) -> Traces {
    Traces {
        host,
        install: kubernetes.install.clone(),
        run_dir: config.run_dir.clone(),
        zds_socket: config.zds_socket.clone(),
        node: config.node.clone(),
        grace: config.grace.min(LAST_GRACE),
        sockets: Vec::new(),
    }
}

/// A running agent.
pub struct Agent {
    /// Of everything that acts; the ports and the sessions of ztunnels outlive it.
    work: drain::DrainTrigger,
    ports: drain::DrainTrigger,
    zds: zds::Zds,
    own: Option<Own>,
    tasks: JoinSet<()>,
    /// Where the admin port is, also when the configuration left the port to the kernel.
    pub admin: SocketAddr,
}

impl Agent {
    /// Binds every socket, so that a caller can connect as soon as this returns, and starts the agent's tasks on the current runtime.
    pub async fn start(config: Config) -> anyhow::Result<Self> {
        let plugin_socket = server::bind(&config.run_dir)
            .with_context(|| format!("CNI_AGENT_RUN_DIR: cannot listen in {}", config.run_dir.display()))?;
        whole_file::sweep(&Decisions::path(&config.run_dir))
            .with_context(|| format!("CNI_AGENT_RUN_DIR: cannot tidy up {}", config.run_dir.display()))?;
        if let Some(folder) = config.zds_socket.parent() {
            std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        }
        let ztunnels = SeqListener::bind(&config.zds_socket)
            .with_context(|| format!("ZTUNNEL_UDS_ADDRESS: cannot listen on {}", config.zds_socket.display()))?;
        let sockets = [socket_path(&config.run_dir), config.zds_socket.clone()].map(Bound::at);
        let sockets =
            sockets.into_iter().collect::<io::Result<Vec<_>>>().context("a socket that was just made is gone")?;
        let admin_listener = listen("FAIRWAY_ADMIN_ADDR", config.admin)?;
        let admin = admin_listener.local_addr()?;
        let health_listener = config.health.map(|address| listen("FAIRWAY_HEALTH_ADDR", address)).transpose()?;

        let (registry, readiness, zds) = (Registry::new(), Readiness::default(), zds::Zds::default());
        let pending = readiness.pending("first pass over the pods of the node");
        let ((work, watcher), (ports, ports_watcher)) = (drain::channel(), drain::channel());
        let (views_tx, views) = watch::channel(None);
        let (calls_tx, calls) = mpsc::channel(QUEUED_CALLS);
        let (reports_tx, reports) = watch::channel(Reports::default());
        let (synced_tx, synced) = oneshot::channel();
        let metrics = Metrics::new(&registry);
        let Node { host, source, sandboxes, status, mut own } = Node::of(&config, &metrics).await?;
        if let Some(own) = &mut own {
            own.traces.sockets = sockets;
        }
        let settings = Settings {
            pace: Pace { grace: config.grace, ..Pace::default() },
            node: config.node,
            run_dir: config.run_dir,
            sandboxes,
            status,
            excluded_namespaces: config.excluded_namespaces,
            options: config.options,
            host,
        };
        let mut tasks = JoinSet::new();
        if let Some(install) = own.as_ref().and_then(|own| own.traces.install.clone()) {
            let (installs, installed) = (metrics.installs.clone(), metrics.installed.clone());
            tasks.spawn(install::run(install, readiness.clone(), installs, installed, watcher.clone()));
        }
        if let Some(own) = &own {
            let notices = notices::Settings { node: own.traces.node.clone(), patience: own.patience };
            tasks.spawn(notices::run(own.client.clone(), notices, reports.clone(), watcher.clone()));
            if let Some(key) = own.taint.clone() {
                let node = own.traces.node.clone();
                tasks.spawn(taint::run(own.client.clone(), node, key, readiness.clone(), watcher.clone()));
            }
        }
        let probes = own.is_some().then(|| {
            let (wanted, wanted_rx) = watch::channel(probes::Wanted::default());
            let (marked_tx, marked) = watch::channel(Arc::default());
            let (host, options) = (settings.host.clone(), settings.options.clone());
            tasks.spawn(probes::run(host, options, wanted_rx, marked_tx, watcher.clone()));
            Probes { wanted, marked }
        });
        let driver = Driver::new(settings, zds.clone(), probes, metrics, reports_tx, pending, synced_tx);
        tasks.spawn(source.run(views_tx, watcher.clone()));
        tasks.spawn(driver.run(views, calls, watcher.clone()));
        tasks.spawn(server::serve(plugin_socket, calls_tx, watcher));
        let (sessions, zds_drain) = (zds.clone(), ports_watcher.clone());
        tasks.spawn(async move {
            // A ztunnel that connects earlier waits in the backlog: its first snapshot must be whole.
            if synced.await.is_ok() {
                sessions.serve(ztunnels, zds_drain).await;
            }
        });
        if let Some(listener) = health_listener {
            tasks.spawn(serve("health", health_routes(&readiness), listener, ports_watcher.clone()));
        }
        tasks.spawn(serve("admin", admin_routes(&registry, &readiness, reports), admin_listener, ports_watcher));
        Ok(Self { work, ports, zds, own, tasks, admin })
    }

    /// Completes when a task has ended although nobody asked it to. Cancel safe.
    pub async fn failed(&mut self) {
        if let Some(Err(error)) = self.tasks.join_next().await {
            tracing::error!(%error, "a task failed");
        }
    }

    /// Stops every task and waits for it. Enrolled pods stay enrolled.
    pub async fn stop(mut self) {
        self.work.drain(STOP_LIMIT).await;
        self.ports.drain(STOP_LIMIT).await;
        self.tasks.shutdown().await;
    }

    /// Stops for good or for a successor, whichever the API server says; see [`leave::fate`].
    pub async fn leave(mut self) {
        let Some(own) = self.own.take() else { return self.stop().await };
        let standing = own.standing().await;
        let fate = leave::fate(&standing, own.traces.install.as_ref().map(|install| &install.mode));
        tracing::info!(?standing, ?fate, "what becomes of what is on this node");
        self.work.drain(STOP_LIMIT).await;
        let done = match fate {
            Fate::Stay => Done::default(),
            Fate::Unchain => own.traces.unchain(),
            Fate::Remove => {
                let done = own.traces.remove(Some(&own.client)).await;
                self.zds.withdraw_all().await;
                done
            }
        };
        done.removed.iter().for_each(|what| tracing::info!(what, "removed"));
        done.failed.iter().for_each(|what| tracing::warn!(what, "could not be removed"));
        self.ports.drain(STOP_LIMIT).await;
        self.tasks.shutdown().await;
    }
}

/// What differs between a folder of manifests and Kubernetes.
struct Node {
    host: Host,
    source: Box<dyn PodSource>,
    sandboxes: Sandboxes,
    status: Box<dyn StatusWriter>,
    own: Option<Own>,
}

/// What it takes to leave a node of Kubernetes.
struct Own {
    client: kube::Client,
    taint: Option<String>,
    patience: Duration,
    safe_upgrade: bool,
    namespace: String,
    daemon_set: String,
    traces: Traces,
}

impl Own {
    async fn standing(&self) -> Standing {
        if !self.safe_upgrade {
            return Standing::Ends("AMBIENT_DISABLE_SAFE_UPGRADE is set");
        }
        leave::standing(&self.client, &self.namespace, &self.daemon_set, &self.traces.node).await
    }
}

impl Node {
    async fn of(config: &Config, metrics: &Metrics) -> anyhow::Result<Self> {
        let node = config.node.clone();
        Ok(match &config.world {
            World::Folder { manifests, sandboxes } => Self {
                host: Host::here()?,
                source: Box::new(FolderSource::new(manifests.clone(), node.clone())),
                sandboxes: Sandboxes::Records(sandboxes.clone()),
                status: Box::new(FolderStatus { manifests: manifests.clone(), node }),
                own: None,
            },
            World::Kubernetes(kubernetes) => {
                let host = preflight::check(kubernetes)?;
                let client = kubernetes.api.client().await?;
                let own = Own {
                    client: client.clone(),
                    taint: kubernetes.taint.clone(),
                    patience: kubernetes.patience,
                    safe_upgrade: kubernetes.safe_upgrade,
                    namespace: kubernetes.namespace.clone(),
                    daemon_set: kubernetes.daemon_set.clone(),
                    traces: traces(config, host.clone(), kubernetes),
                };
                Self {
                    host,
                    source: Box::new(KubernetesSource::new(client.clone(), node, metrics.watch_failures.clone())),
                    sandboxes: Sandboxes::Processes,
                    status: Box::new(AnnotationStatus(client)),
                    own: Some(own),
                }
            }
        })
    }
}

/// A node without IPv6 has no such wildcard; that of IPv4 means the same there.
fn listen(variable: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
    let bound = TcpListener::bind(address).or_else(|error| {
        let no_ipv6 = matches!(error.kind(), io::ErrorKind::AddrNotAvailable | io::ErrorKind::Unsupported)
            || error.raw_os_error() == Some(NO_SUCH_FAMILY);
        match address {
            SocketAddr::V6(v6) if no_ipv6 && v6.ip().is_unspecified() => {
                TcpListener::bind((Ipv4Addr::UNSPECIFIED, v6.port()))
            }
            _ => Err(error),
        }
    });
    bound.with_context(|| format!("{variable}: cannot listen on {address}"))
}

/// `EAFNOSUPPORT`, which the standard library has no name for.
const NO_SUCH_FAMILY: i32 = 97;

async fn serve(port: &'static str, routes: AdminServer, listener: TcpListener, drain: drain::DrainWatcher) {
    if let Err(error) = routes.serve(listener, drain).await {
        tracing::error!(port, %error, "a port failed");
    }
}

fn health_routes(readiness: &Readiness) -> AdminServer {
    let alive = |_| std::future::ready(admin::json(StatusCode::OK, b"{}".to_vec()));
    AdminServer::new().readiness("/readyz", readiness).route("/healthz", alive)
}

fn admin_routes(registry: &Registry, readiness: &Readiness, reports: watch::Receiver<Reports>) -> AdminServer {
    AdminServer::new().metrics(registry).readiness("/readyz", readiness).route("/debug/pods", move |_| {
        let reports: Reports = Arc::clone(&reports.borrow());
        let body = serde_json::to_vec_pretty(&*reports).unwrap_or_default();
        std::future::ready(admin::json(StatusCode::OK, body))
    })
}
