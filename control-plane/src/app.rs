//! The running control plane: source → index → publish in one task, the gRPC services, the admin server; of a cluster, also who writes.

mod config;

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
    admission,
    ca::{CertificateService, MAX_REQUEST},
    callers::{Bearers, Tokens},
    keeper::{
        self, Keeper, KeeperError,
        secret::{self, SecretError},
    },
    lease,
    metrics::Metrics,
    pages,
    pipeline::{Pipeline, cluster::ClusterPipeline, folder::FolderPipeline},
    problem::Problem,
    review::TokenReviews,
    source::kubernetes::Objects,
    status::Sink,
    tls::{self, Certificate, CertificateError},
    token::{TokenKey, TokenKeyError},
};

pub use config::{Config, NAMESPACE, Source};

/// What a client may send of a request before it is read: of a large mesh those of reconnecting nodes are megabytes, and take turns.
const REQUEST_WINDOW: u32 = 256 * 1024;
/// Calls in flight may finish this long after the drain began; discovery streams never finish by themselves.
const GRACE: Duration = Duration::from_millis(500);
/// Of a connection, on their way to an answer; the others wait unread. What is received before its sender is known is thus bounded.
const CALLS: usize = 16;
/// Everything has stopped by then, or is aborted.
const STOP_DEADLINE: Duration = Duration::from_secs(5);
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
    pub webhook_address: Option<SocketAddr>,
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
    let policy = Arc::new(config.issue_policy());
    let bearers = Bearers { tokens, trusted: policy.trusted_accounts.clone(), metrics: metrics.clone() };
    let certificate =
        |protocol| Certificate::new(authority.clone(), config.server_names(), protocol, SystemTime::now());
    let (certificate, webhook_certificate) = (certificate(b"h2")?, certificate(b"http/1.1")?);

    let listener = TcpListener::bind(config.listen).await.map_err(listen_error(config.listen, "--listen"))?;
    let address = listener.local_addr().map_err(listen_error(config.listen, "--listen"))?;
    let admin = std::net::TcpListener::bind(config.admin).map_err(listen_error(config.admin, "--admin"))?;
    let admin_address = admin.local_addr().map_err(listen_error(config.admin, "--admin"))?;
    let webhook = match config.webhook.filter(|_| matches!(config.source, Source::Kubernetes { .. })) {
        Some(address) => Some(TcpListener::bind(address).await.map_err(listen_error(address, "--webhook"))?),
        None => None,
    };
    let webhook_address = webhook.as_ref().and_then(|listener| listener.local_addr().ok());

    let observer = metrics.clone();
    let published = cache.clone();
    let discovery =
        DeltaService::new(cache, Arc::new(bearers.clone()), Arc::new(move |event| observer.observe(&event)))
            .into_server();
    if let Some(listener) = webhook {
        let (settings, metrics, drain) = (config.object_settings(), metrics.clone(), drain.clone());
        tasks.spawn(admission::serve(listener, webhook_certificate, settings, metrics, drain));
    }
    let certificates = CertificateService { authority, bearers, policy, state: state.clone(), metrics };
    let router = Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .max_concurrent_streams(Some(128))
        .initial_stream_window_size(Some(REQUEST_WINDOW))
        .concurrency_limit_per_connection(CALLS)
        .add_service(discovery)
        .add_service(IstioCertificateServiceServer::new(certificates).max_decoding_message_size(MAX_REQUEST));

    tasks.spawn(serve(router, listener, certificate, drain.clone()));
    let (pages, watcher) = (pages::server(&registry, &readiness, state, published, problem), drain.clone());
    tasks.spawn(async move { pages.serve(admin, watcher).await.map_err(TaskFailed::of("the admin server")) });
    run(&mut tasks, &drain);
    drop(drain);
    tracing::info!(%address, admin = %admin_address, source = %config.source, "control plane started");
    Ok(Running { address, admin_address, webhook_address, trigger, tasks })
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
            let (settings, sink) = (config.object_settings(), Arc::new(Sink::default()));
            let pipeline =
                ClusterPipeline::new(Objects::new(settings.clone()), pipeline, sink.clone(), metrics.clone());
            let leases = Api::namespaced(client.clone(), &config.namespace);
            let (identity, metrics, signer) = (identity.clone(), metrics.clone(), authority.clone());
            let configuration = config.webhook.map(|_| keeper::bundle::name(&config.namespace));
            let api_server = (**api_server).clone();
            let run = move |tasks: &mut Tasks, drain: &DrainWatcher| {
                let (leading, leads) = watch::channel(false);
                tasks.spawn(pipeline.run(api_server, settings, drain.clone()));
                match mounted {
                    Some(folder) => tasks.spawn(keeper::folder::follow(keeper, folder, drain.clone())),
                    None => tasks.spawn(secret::follow(keeper, secrets, drain.clone())),
                };
                tasks.spawn(lease::run(leases, identity, leading, metrics.clone(), drain.clone()));
                let (of_roots, of_status) = (leads.clone(), leads.clone());
                tasks.spawn(sink.write(client.clone(), of_status, metrics.clone(), drain.clone()));
                if let Some(name) = configuration {
                    let (client, signer, metrics) = (client.clone(), signer.clone(), metrics.clone());
                    tasks.spawn(keeper::bundle::publish(client, name, signer, leads, metrics, drain.clone()));
                }
                tasks.spawn(keeper::roots::publish(client, signer, of_roots, metrics, drain.clone()));
            };
            Ok(Opened { authority, problem, tokens, run: Box::new(run) })
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
