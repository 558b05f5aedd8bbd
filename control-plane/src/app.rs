//! The running control plane: source → index → publish in one task, the gRPC services, the admin server.

use std::{
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use kube::{Api, Client};
use mesh_identity::authority::{AuthorityError, SigningAuthority};
use mesh_runtime::{
    drain::{self, DrainTrigger, DrainWatcher, Drained},
    metrics::Registry,
    readiness::Readiness,
};
use mesh_xds::server::{Cache, DeltaService};
use proto::ca::istio_certificate_service_server::IstioCertificateServiceServer;
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    task::JoinSet,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use crate::{
    ca::{CertificateService, IssuePolicy},
    callers::{Bearers, Tokens},
    index,
    keeper::{
        self, Keeper, KeeperError,
        secret::{self, SecretError},
    },
    lease,
    metrics::Metrics,
    objects, pages,
    pipeline::{Pipeline, cluster::ClusterPipeline, folder::FolderPipeline},
    problem::Problem,
    review::TokenReviews,
    source::kubernetes::{Feed, Objects},
    tls::{self, Certificate, CertificateError},
    token::{TokenKey, TokenKeyError},
};

/// Calls in flight may finish this long after the drain began; discovery streams never finish by themselves.
const GRACE: Duration = Duration::from_millis(500);
/// Everything has stopped by then, or is aborted.
const STOP_DEADLINE: Duration = Duration::from_secs(5);
/// The namespace the control plane runs in unless told otherwise.
pub const NAMESPACE: &str = "istio-system";

/// What `fairwayd run` is told.
#[derive(Clone, Debug)]
pub struct Config {
    pub source: Source,
    /// Where this runs; also the root namespace, whose policies apply to the whole mesh.
    pub namespace: String,
    pub cluster_id: String,
    /// The `cluster.local` of `web.demo.svc.cluster.local`.
    pub cluster_domain: String,
    /// Configuration labelled with another `istio.io/rev` is ignored.
    pub revision: String,
    /// Where discovery and the CA are served; port 0 picks one.
    pub listen: SocketAddr,
    pub admin: SocketAddr,
    pub trust_domain: String,
    /// Default and maximum life of workload certificates.
    pub workload_cert_ttl: Duration,
    /// Further names the server is reached by.
    pub server_names: Vec<String>,
    /// Service accounts, `(namespace, name)`, of the node proxies.
    pub trusted_accounts: Vec<(String, String)>,
    /// Whether who uses a waypoint accepts connections from it only (Istio's `PILOT_AUTO_ALLOW_WAYPOINT_POLICY`).
    pub default_allow_from_waypoint: bool,
}

/// Where objects come from, and where keys are kept.
#[derive(Clone, Debug)]
pub enum Source {
    Folder {
        /// Of manifests.
        manifests: PathBuf,
        /// Of keys and certificates; made when missing.
        state: PathBuf,
    },
    Kubernetes {
        /// How the API server is reached.
        api_server: Box<kube::Config>,
        /// Where a CA may be mounted; without one it is kept in a Secret.
        ca_folder: PathBuf,
        /// This replica, among those that stand for election.
        identity: String,
    },
}

impl Config {
    /// Everything else as it is by default.
    pub fn new(source: Source, listen: SocketAddr, admin: SocketAddr) -> Self {
        Self {
            source,
            namespace: NAMESPACE.to_owned(),
            cluster_id: "Kubernetes".to_owned(),
            cluster_domain: "cluster.local".to_owned(),
            revision: "default".to_owned(),
            listen,
            admin,
            trust_domain: mesh_core::identity::DEFAULT_TRUST_DOMAIN.to_owned(),
            workload_cert_ttl: Duration::from_secs(24 * 3600),
            server_names: Vec::new(),
            trusted_accounts: Vec::new(),
            default_allow_from_waypoint: false,
        }
    }

    /// How objects are read: shared by `run` and `check`.
    pub(crate) fn object_settings(&self) -> objects::Settings {
        objects::Settings { root_namespace: self.namespace.as_str().into(), revision: self.revision.as_str().into() }
    }

    /// What they are turned into: shared by `run` and `check`.
    pub(crate) fn index_settings(&self) -> index::Settings {
        index::Settings {
            root_namespace: self.namespace.as_str().into(),
            trust_domain: self.trust_domain.as_str().into(),
            cluster_id: self.cluster_id.as_str().into(),
            cluster_domain: self.cluster_domain.as_str().into(),
            allow_from_waypoint: self.default_allow_from_waypoint,
        }
    }

    fn issue_policy(&self) -> IssuePolicy {
        let shared = |(namespace, name): &(String, String)| (namespace.as_str().into(), name.as_str().into());
        IssuePolicy {
            trust_domain: self.trust_domain.as_str().into(),
            trusted_accounts: self.trusted_accounts.iter().map(shared).collect(),
            ttl: self.workload_cert_ttl,
        }
    }

    /// What the server's certificate is for.
    fn server_names(&self) -> Vec<String> {
        let Self { namespace, cluster_domain, .. } = self;
        let service = |name| [format!("{name}.{namespace}.svc"), format!("{name}.{namespace}.svc.{cluster_domain}")];
        let mut names: Vec<String> = ["fairwayd", "istiod"].into_iter().flat_map(service).collect();
        names.push("localhost".to_owned());
        if !self.listen.ip().is_unspecified() {
            names.push(self.listen.ip().to_string());
        }
        names.extend(self.server_names.iter().cloned());
        names
    }
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("the CA's files in the state folder cannot be opened")]
    Authority(#[source] AuthorityError),
    #[error("the CA cannot be opened")]
    Secret(#[from] SecretError),
    #[error("the CA in {folder} is not usable; correct it, or do not mount it to have one kept in a Secret", folder = folder.display())]
    Folder {
        folder: PathBuf,
        #[source]
        source: KeeperError,
    },
    #[error("the API server cannot be used")]
    ApiServer(#[source] Box<kube::Error>),
    #[error("the token key in the state folder cannot be opened")]
    TokenKey(#[from] TokenKeyError),
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    #[error("cannot listen on {address}; give another with {flag}")]
    Listen {
        address: SocketAddr,
        flag: &'static str,
        #[source]
        source: io::Error,
    },
}

/// A control plane that serves until stopped.
pub struct Running {
    pub address: SocketAddr,
    pub admin_address: SocketAddr,
    trigger: DrainTrigger,
    tasks: JoinSet<Result<(), TaskFailed>>,
}

/// A part of the control plane ended that must not.
#[derive(Debug, thiserror::Error)]
#[error("{part} failed")]
pub struct TaskFailed {
    part: &'static str,
    #[source]
    source: Box<dyn std::error::Error + Send + Sync>,
}

impl TaskFailed {
    pub(crate) fn of<E: Into<Box<dyn std::error::Error + Send + Sync>>>(part: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self { part, source: source.into() }
    }
}

/// Binds and starts everything. Must be called within a tokio runtime.
///
/// # Errors
/// When the state folder or an address is unusable.
pub async fn start(config: Config) -> Result<Running, StartError> {
    let registry = Registry::new();
    let metrics = Metrics::register(&registry);
    let readiness = Readiness::default();
    let cache = Arc::new(Cache::new());
    let pipeline = Pipeline::new(config.index_settings(), cache.clone(), metrics.clone(), readiness.clone());
    let state = pipeline.subscribe();
    let (trigger, drain) = drain::channel();
    let mut tasks = JoinSet::new();
    let Opened { authority, problem, tokens, run } = open(&config, pipeline, &metrics).await?;
    let bearers = Bearers { tokens, metrics: metrics.clone() };
    let certificate = Certificate::new(authority.clone(), config.server_names(), SystemTime::now())?;

    let listener = TcpListener::bind(config.listen).await.map_err(listen_error(config.listen, "--listen"))?;
    let address = listener.local_addr().map_err(listen_error(config.listen, "--listen"))?;
    let admin = std::net::TcpListener::bind(config.admin).map_err(listen_error(config.admin, "--admin"))?;
    let admin_address = admin.local_addr().map_err(listen_error(config.admin, "--admin"))?;

    let observer = metrics.clone();
    let discovery =
        DeltaService::new(cache, Arc::new(bearers.clone()), Arc::new(move |event| observer.observe(&event)))
            .into_server();
    let policy = Arc::new(config.issue_policy());
    let certificates = CertificateService { authority, bearers, policy, state: state.clone(), metrics };
    let router = Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .max_concurrent_streams(Some(128))
        .add_service(discovery)
        .add_service(IstioCertificateServiceServer::new(certificates));

    tasks.spawn(serve(router, listener, certificate, drain.clone()));
    let (pages, watcher) = (pages::server(&registry, &readiness, state, problem), drain.clone());
    tasks.spawn(async move { pages.serve(admin, watcher).await.map_err(TaskFailed::of("the admin server")) });
    run(&mut tasks, &drain);
    drop(drain);
    tracing::info!(%address, admin = %admin_address, source = %config.source, "control plane started");
    Ok(Running { address, admin_address, trigger, tasks })
}

type Tasks = JoinSet<Result<(), TaskFailed>>;
type Start = Box<dyn FnOnce(&mut Tasks, &DrainWatcher) + Send>;

/// What depends on the source.
struct Opened {
    authority: watch::Receiver<Arc<SigningAuthority>>,
    /// What is wrong with the CA as it is kept.
    problem: watch::Receiver<Option<Problem>>,
    tokens: Arc<dyn Tokens>,
    /// Starts what reads the source, and writes to it, until the drain.
    run: Start,
}

async fn open(config: &Config, pipeline: Pipeline, metrics: &Metrics) -> Result<Opened, StartError> {
    match &config.source {
        Source::Folder { manifests, state } => {
            let authority = SigningAuthority::open(state, &config.trust_domain).map_err(StartError::Authority)?;
            let tokens = Arc::new(TokenKey::open(state)?);
            metrics.show_authority(&authority);
            let pipeline = FolderPipeline::new(manifests.clone(), config.object_settings(), pipeline);
            let run = move |tasks: &mut Tasks, drain: &DrainWatcher| drop(tasks.spawn(pipeline.run(drain.clone())));
            let (authority, problem) = (watch::channel(Arc::new(authority)).1, watch::channel(None).1);
            Ok(Opened { authority, problem, tokens, run: Box::new(run) })
        }
        Source::Kubernetes { api_server, ca_folder, identity } => {
            let client = Client::try_from((**api_server).clone());
            let client = client.map_err(|error| StartError::ApiServer(Box::new(error)))?;
            let secrets = Api::namespaced(client.clone(), &config.namespace);
            let mounted = keeper::folder::is_mounted(ca_folder).then(|| ca_folder.clone());
            let (authority, place) = match &mounted {
                Some(folder) => {
                    let read = keeper::folder::authority(folder, SystemTime::now());
                    let read = read.map_err(|source| StartError::Folder { folder: folder.clone(), source })?;
                    (read, folder.display().to_string())
                }
                None => {
                    let opened = secret::open(&secrets, &config.namespace, &config.trust_domain).await?;
                    (opened, format!("Secret {}/{}", config.namespace, secret::NAME))
                }
            };
            let keeper = Arc::new(Keeper::new(authority, place.into(), metrics.clone()));
            let (authority, problem) = (keeper.authority(), keeper.problem());
            let tokens = Arc::new(TokenReviews::new(client.clone(), pipeline.subscribe(), metrics.clone()));
            let settings = config.object_settings();
            let pipeline = ClusterPipeline::new(Objects::new(settings.clone()), pipeline, metrics.clone());
            let leases = Api::namespaced(client.clone(), &config.namespace);
            let (identity, metrics, signer) = (identity.clone(), metrics.clone(), authority.clone());
            let run = move |tasks: &mut Tasks, drain: &DrainWatcher| {
                let (leading, leads) = watch::channel(false);
                tasks.spawn(pipeline.run(Feed::start(&client, &settings), drain.clone()));
                match mounted {
                    Some(folder) => tasks.spawn(keeper::folder::follow(keeper, folder, drain.clone())),
                    None => tasks.spawn(secret::follow(keeper, secrets, drain.clone())),
                };
                tasks.spawn(lease::run(leases, identity, leading, metrics.clone(), drain.clone()));
                tasks.spawn(keeper::roots::publish(client, signer, leads, metrics, drain.clone()));
            };
            Ok(Opened { authority, problem, tokens, run: Box::new(run) })
        }
    }
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Folder { manifests, .. } => write!(f, "{}", manifests.display()),
            Self::Kubernetes { api_server, .. } => write!(f, "{}", api_server.cluster_url),
        }
    }
}

impl Running {
    /// Completes when a part ends by itself, which none should.
    pub async fn failed(&mut self) -> TaskFailed {
        match self.tasks.join_next().await {
            Some(Ok(Err(error))) => error,
            Some(Err(error)) => TaskFailed::of("a task")(error),
            Some(Ok(Ok(()))) | None => TaskFailed::of("a task")("it ended without being told to"),
        }
    }

    /// Stops accepting, lets calls in flight finish for a moment, and waits until everything has stopped.
    pub async fn stop(mut self) {
        if self.trigger.drain(STOP_DEADLINE).await == Drained::Forced {
            tracing::warn!("not everything stopped in time");
        }
        self.tasks.shutdown().await;
    }
}

fn listen_error(address: SocketAddr, flag: &'static str) -> impl FnOnce(io::Error) -> StartError {
    move |source| StartError::Listen { address, flag, source }
}

type Router = tonic::transport::server::Router;

async fn serve(
    router: Router,
    listener: TcpListener,
    certificate: Certificate,
    drain: DrainWatcher,
) -> Result<(), TaskFailed> {
    let stop = CancellationToken::new();
    let stop_accepting = CancellationToken::new();
    let (sender, connections) = mpsc::channel(16);
    let accepting = tls::accept(listener, certificate, sender, stop_accepting.clone(), stop.clone());
    let graceful = async {
        drop(drain.signalled().await);
        stop_accepting.cancel();
    };
    let serving = router.serve_with_incoming_shutdown(ReceiverStream::new(connections), graceful);
    let ending = async {
        let (_, guard) = drain.signalled().await;
        tokio::time::sleep(GRACE).await;
        stop.cancel();
        drop(guard);
    };
    let ((), served, ()) = tokio::join!(accepting, serving, ending);
    served.map_err(TaskFailed::of("the gRPC server"))
}
