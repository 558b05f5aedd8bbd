//! The node agent: one task that decides ([`driver`] around [`enroll`]), and around it the source of pods, the plugin's socket, ZDS
//! and the admin port.

use std::{
    ffi::OsString,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use http::StatusCode;
use mesh_net::{NetNs, SeqListener};
use mesh_runtime::{
    admin::{self, AdminServer},
    drain,
    env::{Problems, ProcessEnv, Reader, Vars},
    metrics::Registry,
    readiness::Readiness,
    signal::Shutdown,
    telemetry,
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
};

pub mod driver;
pub mod enroll;
pub mod files;
pub mod report;
pub mod server;
pub mod source;
pub mod zds;

use driver::{Driver, Settings};
use enroll::Pace;
use report::{Metrics, Reports};
use source::{FolderSource, PodSource};

use crate::rules::{Options, model};

const STOP_LIMIT: Duration = Duration::from_secs(5);
const QUEUED_CALLS: usize = 64;

/// What the environment says.
#[derive(Clone, Debug)]
pub struct Config {
    pub node: String,
    pub zds_socket: PathBuf,
    pub run_dir: PathBuf,
    pub excluded_namespaces: Vec<String>,
    pub options: Options,
    pub manifests: PathBuf,
    pub sandboxes: Option<PathBuf>,
    pub admin: SocketAddr,
    pub grace: Duration,
    pub log_filter: String,
    pub log_format: telemetry::Format,
}

impl Config {
    /// Reads the environment; every problem is reported at once.
    pub fn from_env(vars: &dyn Vars) -> Result<Self, Problems> {
        let env = Reader::new(vars);
        let path = |name: &str, default: &str| PathBuf::from(env.string(name, default));
        let json = env.string("LOG_FORMAT", "plain") == "json";
        let config = Self {
            node: env.required("NODE_NAME", "the name of this node"),
            zds_socket: path("ZTUNNEL_UDS_ADDRESS", "/var/run/ztunnel/ztunnel.sock"),
            run_dir: path("CNI_AGENT_RUN_DIR", "/var/run/istio-cni"),
            excluded_namespaces: list(&env.raw("EXCLUDE_NAMESPACES").unwrap_or_else(|| "kube-system".into())),
            options: Options {
                dns: env.bool("AMBIENT_DNS_CAPTURE", true),
                ipv6: env.bool("AMBIENT_IPV6", true),
                probe_v4: env.parse::<Ipv4Addr>("HOST_PROBE_SNAT_IP", model::PROBE_V4, "an IPv4 address"),
                probe_v6: env.parse::<Ipv6Addr>("HOST_PROBE_SNAT_IPV6", model::PROBE_V6, "an IPv6 address"),
                ..Options::default()
            },
            manifests: env.required("FAIRWAY_MANIFESTS", "the folder of manifests that describes the pods").into(),
            sandboxes: env.optional("FAIRWAY_SANDBOXES").map(PathBuf::from),
            admin: env.parse("FAIRWAY_ADMIN_ADDR", SocketAddr::from(([127, 0, 0, 1], 15014)), "IP:PORT"),
            grace: env.duration("FAIRWAY_UNENROL_GRACE", Pace::default().grace),
            log_filter: env.string("RUST_LOG", "info"),
            log_format: if json { telemetry::Format::Json } else { telemetry::Format::Plain },
        };
        env.finish().map(|()| config)
    }
}

fn list(text: &str) -> Vec<String> {
    text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(str::to_owned).collect()
}

/// The agent as a program; it takes no arguments but is configured by its environment.
pub fn agent_main(args: Vec<OsString>) -> ExitCode {
    if let Some(argument) = args.first() {
        eprintln!("unexpected argument `{}`: the agent is configured by its environment", argument.display());
        return ExitCode::from(2);
    }
    match Config::from_env(&ProcessEnv).map_err(anyhow::Error::from).and_then(start) {
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
        let mut agent = Agent::start(config)?;
        let failed = tokio::select! {
            signal = shutdown.recv() => {
                tracing::info!(signal, "stopping; enrolled pods stay enrolled");
                false
            }
            () = agent.failed() => true,
        };
        agent.stop().await;
        // The supervisor starts a new one, which finds everything as it is.
        anyhow::ensure!(!failed, "a task of the agent ended by itself; its reason is in the log");
        Ok(())
    })
}

/// A running agent.
pub struct Agent {
    drain: drain::DrainTrigger,
    tasks: JoinSet<()>,
    /// Where the admin port is, also when the configuration left the port to the kernel.
    pub admin: SocketAddr,
}

impl Agent {
    /// Binds every socket, so that a caller can connect as soon as this returns, and starts the agent's tasks on the current runtime.
    pub fn start(config: Config) -> anyhow::Result<Self> {
        use anyhow::Context;
        let plugin_socket = server::bind(&config.run_dir)
            .with_context(|| format!("CNI_AGENT_RUN_DIR: cannot listen in {}", config.run_dir.display()))?;
        if let Some(folder) = config.zds_socket.parent() {
            std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        }
        let ztunnels = SeqListener::bind(&config.zds_socket)
            .with_context(|| format!("ZTUNNEL_UDS_ADDRESS: cannot listen on {}", config.zds_socket.display()))?;
        let admin_listener = TcpListener::bind(config.admin)
            .with_context(|| format!("FAIRWAY_ADMIN_ADDR: cannot listen on {}", config.admin))?;
        let admin = admin_listener.local_addr()?;

        let (registry, readiness, zds) = (Registry::new(), Readiness::default(), zds::Zds::default());
        let (trigger, watcher) = drain::channel();
        let (views_tx, views) = watch::channel(None);
        let (calls_tx, calls) = mpsc::channel(QUEUED_CALLS);
        let (reports_tx, reports) = watch::channel(Reports::default());
        let (synced_tx, synced) = oneshot::channel();
        let source: Box<dyn PodSource> = Box::new(FolderSource::new(config.manifests.clone(), config.node.clone()));
        let settings = Settings {
            pace: Pace { grace: config.grace, ..Pace::default() },
            node: config.node,
            run_dir: config.run_dir,
            manifests: config.manifests,
            sandboxes: config.sandboxes,
            excluded_namespaces: config.excluded_namespaces,
            options: config.options,
            home: NetNs::current()?.id()?,
        };
        let pending = readiness.pending("first pass over the pods of the node");
        let driver = Driver::new(settings, zds.clone(), Metrics::new(&registry), reports_tx, pending, synced_tx);

        let mut tasks = JoinSet::new();
        tasks.spawn(source.run(views_tx, watcher.clone()));
        tasks.spawn(driver.run(views, calls, watcher.clone()));
        tasks.spawn(server::serve(plugin_socket, calls_tx, watcher.clone()));
        let zds_drain = watcher.clone();
        tasks.spawn(async move {
            // A ztunnel that connects earlier waits in the backlog: its first snapshot must be whole.
            if synced.await.is_ok() {
                zds.serve(ztunnels, zds_drain).await;
            }
        });
        tasks.spawn(async move {
            if let Err(error) = admin_routes(&registry, &readiness, reports).serve(admin_listener, watcher).await {
                tracing::error!(%error, "the admin port failed");
            }
        });
        Ok(Self { drain: trigger, tasks, admin })
    }

    /// Completes when a task has ended although nobody asked it to. Cancel safe.
    pub async fn failed(&mut self) {
        if let Some(Err(error)) = self.tasks.join_next().await {
            tracing::error!(%error, "a task failed");
        }
    }

    /// Stops every task and waits for it. Enrolled pods stay enrolled.
    pub async fn stop(mut self) {
        self.drain.drain(STOP_LIMIT).await;
        self.tasks.shutdown().await;
    }
}

fn admin_routes(registry: &Registry, readiness: &Readiness, reports: watch::Receiver<Reports>) -> AdminServer {
    AdminServer::new().metrics(registry).readiness("/readyz", readiness).route("/debug/pods", move |_| {
        let reports: Reports = Arc::clone(&reports.borrow());
        let body = serde_json::to_vec_pretty(&*reports).unwrap_or_default();
        std::future::ready(admin::json(StatusCode::OK, body))
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn every_problem_of_the_environment_is_named() {
        let vars = [("AMBIENT_DNS_CAPTURE", "perhaps"), ("FAIRWAY_ADMIN_ADDR", "here"), ("HOST_PROBE_SNAT_IP", "::1")];
        let vars: HashMap<String, String> = vars.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let problems = Config::from_env(&vars).expect_err("problems").to_string();
        for name in
            ["NODE_NAME", "FAIRWAY_MANIFESTS", "AMBIENT_DNS_CAPTURE", "FAIRWAY_ADMIN_ADDR", "HOST_PROBE_SNAT_IP"]
        {
            assert!(problems.contains(name), "{name} is missing in {problems}");
        }
    }

    #[test]
    fn lists_forgive_blanks() {
        assert_eq!(list(" a, ,b,"), ["a", "b"]);
    }
}
