//! The running control plane: source → index → publish in one task, the gRPC services, the admin server.

use std::{
    collections::{BTreeSet, HashSet},
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_core::index::Index;
use mesh_identity::authority::{AuthorityError, SigningAuthority};
use mesh_runtime::{
    drain::{self, DrainTrigger, DrainWatcher, Drained},
    folder::Watch,
    metrics::Registry,
    readiness::{Pending, Readiness},
};
use mesh_xds::server::{Cache, DeltaService};
use proto::ca::istio_certificate_service_server::IstioCertificateServiceServer;
use rustls_pki_types::{CertificateDer, pem::PemObject as _};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    task::{JoinError, JoinSet},
    time::Instant,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use crate::{
    ca::{CertificateService, IssuePolicy, TokenAuthenticator},
    index::{self, ClusterIndex},
    metrics::Metrics,
    objects, pages,
    problem::Problem,
    publish,
    source::{Folder, Version},
    tls::{self, Certificate, CertificateError},
    token::{TokenKey, TokenKeyError},
};

/// Calls in flight may finish this long after the drain began; discovery streams never finish by themselves.
const GRACE: Duration = Duration::from_millis(500);
/// Everything has stopped by then, or is aborted.
const STOP_DEADLINE: Duration = Duration::from_secs(5);
/// Manifests must have been quiet for this long before they are read.
const QUIET: Duration = Duration::from_millis(50);
/// A start waits this long for files it cannot read to be corrected: policies in them may still be in force at the nodes.
const UNREAD_LIMIT: Duration = Duration::from_secs(30);
const ROOT_NAMESPACE: &str = "istio-system";

/// What `fairwayd run` is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// Folder to read manifests from.
    pub manifests: PathBuf,
    /// Folder of keys and certificates; made when missing.
    pub state: PathBuf,
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

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("the CA's files in the state folder cannot be opened")]
    Authority(#[source] AuthorityError),
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

/// What the rest of the process may look at; replaced as a whole.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    pub(crate) index: Index,
    pub(crate) problems: Arc<[Problem]>,
    /// What was read for it.
    pub(crate) versions: Arc<HashSet<Version>>,
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

fn failed<E: Into<Box<dyn std::error::Error + Send + Sync>>>(part: &'static str) -> impl FnOnce(E) -> TaskFailed {
    move |source| TaskFailed { part, source: source.into() }
}

/// Binds and starts everything. Must be called within a tokio runtime.
///
/// # Errors
/// When the state folder or an address is unusable.
pub async fn start(config: Config) -> Result<Running, StartError> {
    let registry = Registry::new();
    let metrics = Metrics::register(&registry);
    let authority = SigningAuthority::open(&config.state, &config.trust_domain).map_err(StartError::Authority)?;
    let authority = Arc::new(authority);
    metrics.root_expiry.set(root_expiry(authority.root_pem()).unwrap_or(0.0));
    let authenticator = Arc::new(TokenAuthenticator { key: TokenKey::open(&config.state)?, metrics: metrics.clone() });
    let certificate = Certificate::new(authority.clone(), server_names(&config), SystemTime::now())?;

    let listener = TcpListener::bind(config.listen).await.map_err(listen_error(config.listen, "--listen"))?;
    let address = listener.local_addr().map_err(listen_error(config.listen, "--listen"))?;
    let admin = std::net::TcpListener::bind(config.admin).map_err(listen_error(config.admin, "--admin"))?;
    let admin_address = admin.local_addr().map_err(listen_error(config.admin, "--admin"))?;

    let (trigger, drain) = drain::channel();
    let readiness = Readiness::default();
    let cache = Arc::new(Cache::new());
    let pipeline = Pipeline::new(&config, cache.clone(), metrics.clone(), readiness.clone());
    let state = pipeline.snapshot.subscribe();
    let observer = metrics.clone();
    let discovery =
        DeltaService::new(cache, authenticator.clone(), Arc::new(move |event| observer.observe(&event))).into_server();
    let certificates = CertificateService {
        authority,
        authenticator,
        policy: Arc::new(issue_policy(&config)),
        state: state.clone(),
        metrics,
    };
    let router = Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .max_concurrent_streams(Some(128))
        .add_service(discovery)
        .add_service(IstioCertificateServiceServer::new(certificates));

    let mut tasks = JoinSet::new();
    tasks.spawn(serve(router, listener, certificate, drain.clone()));
    let (pages, watcher) = (pages::server(&registry, &readiness, state), drain.clone());
    tasks.spawn(async move { pages.serve(admin, watcher).await.map_err(failed("the admin server")) });
    tasks.spawn(pipeline.run(config.manifests.clone(), drain));
    tracing::info!(%address, admin = %admin_address, manifests = %config.manifests.display(), "control plane started");
    Ok(Running { address, admin_address, trigger, tasks })
}

impl Running {
    /// Completes when a part ends by itself, which none should.
    pub async fn failed(&mut self) -> TaskFailed {
        match self.tasks.join_next().await {
            Some(Ok(Err(error))) => error,
            Some(Err(error)) => failed("a task")(error),
            Some(Ok(Ok(()))) | None => failed("a task")("it ended without being told to"),
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

fn server_names(config: &Config) -> Vec<String> {
    let mut names = vec![format!("istiod.{ROOT_NAMESPACE}.svc"), "localhost".to_owned()];
    if !config.listen.ip().is_unspecified() {
        names.push(config.listen.ip().to_string());
    }
    names.extend(config.server_names.iter().cloned());
    names
}

fn issue_policy(config: &Config) -> IssuePolicy {
    let shared = |(namespace, name): &(String, String)| (namespace.as_str().into(), name.as_str().into());
    IssuePolicy {
        trust_domain: config.trust_domain.as_str().into(),
        trusted_accounts: config.trusted_accounts.iter().map(shared).collect(),
        ttl: config.workload_cert_ttl,
    }
}

fn root_expiry(pem: &str) -> Option<f64> {
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).ok()?;
    let (_, certificate) = x509_parser::parse_x509_certificate(&der).ok()?;
    // Seconds fit a double's 53 bits for some hundred million years.
    #[expect(clippy::cast_precision_loss, reason = "a timestamp")]
    Some(certificate.validity().not_after.timestamp() as f64)
}

/// How manifests are read: shared by `run` and `check`.
pub(crate) fn manifest_settings() -> objects::Settings {
    objects::Settings { root_namespace: ROOT_NAMESPACE.into() }
}

/// What the manifests are turned into: shared by `run` and `check`.
pub(crate) fn index_settings(trust_domain: &str, allow_from_waypoint: bool) -> index::Settings {
    index::Settings {
        root_namespace: ROOT_NAMESPACE.into(),
        trust_domain: trust_domain.into(),
        cluster_id: "Kubernetes".into(),
        cluster_domain: "cluster.local".into(),
        allow_from_waypoint,
    }
}

/// Folder → index → cache; owns all three.
struct Pipeline {
    folder: Folder,
    index: ClusterIndex,
    cache: Arc<Cache>,
    snapshot: watch::Sender<Snapshot>,
    reported: BTreeSet<Problem>,
    metrics: Metrics,
    readiness: Readiness,
    /// Dropped when the first full state has been published.
    starting: Option<Pending>,
    /// Files that could not be read at the start, and not since.
    unread: BTreeSet<Arc<str>>,
    /// When to start without those.
    unread_until: Option<Instant>,
}

impl Pipeline {
    fn new(config: &Config, cache: Arc<Cache>, metrics: Metrics, readiness: Readiness) -> Self {
        let index = ClusterIndex::new(index_settings(config.trust_domain.as_str(), config.default_allow_from_waypoint));
        let snapshot = watch::Sender::new(Snapshot {
            index: index.model().clone(),
            problems: Arc::default(),
            versions: Arc::default(),
        });
        let folder = Folder::new(config.manifests.clone(), manifest_settings());
        let starting = Some(readiness.pending("first full state"));
        let (reported, unread, unread_until) = Default::default();
        Self { folder, index, cache, snapshot, reported, metrics, readiness, starting, unread, unread_until }
    }

    async fn run(self, manifests: PathBuf, drain: DrainWatcher) -> Result<(), TaskFailed> {
        let mut pipeline = self;
        let mut watch = Watch::new(&manifests, QUIET);
        loop {
            let was_readable = pipeline.folder.is_readable();
            let step = tokio::task::spawn_blocking(|| pipeline.step(Instant::now()));
            pipeline = step.await.map_err(failed::<JoinError>("the source"))?;
            if !was_readable && pipeline.folder.is_readable() {
                // What was not there could not be watched; and a folder that is removed takes its watch with it.
                watch = Watch::new(&manifests, QUIET);
                continue;
            }
            let unread_until = pipeline.unread_until.filter(|until| *until > Instant::now());
            let waited = async {
                match unread_until {
                    Some(until) => tokio::time::sleep_until(until).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = watch.changed() => {}
                () = waited => {}
                _ = drain.signalled() => return Ok(()),
            }
        }
    }

    /// Reads what changed and publishes what follows from it. Blocks.
    fn step(mut self, now: Instant) -> Self {
        let changes = self.folder.scan();
        let read = self.folder.is_readable();
        if !changes.is_empty() {
            let objects = changes.len();
            let changes = self.index.apply(changes);
            let published = self.cache.publish(publish::cache_changes(&changes));
            tracing::info!(objects, published, version = self.index.model().version(), "manifests changed");
        }
        let unread = self.folder.catalogue.unread();
        match self.starting {
            Some(_) => self.unread = unread,
            None => self.unread.retain(|file| unread.contains(file)),
        }
        self.report();
        // An unreadable folder must not look like an empty mesh to those who connect.
        if read && self.starting.is_some() && !self.waits_for_unread(now) {
            self.cache.set_ready();
            self.starting = None;
            self.unread_until = None;
            tracing::info!(objects = self.folder.catalogue.len(), "first full state published");
        }
        self
    }

    /// Whether the start has to wait: nodes would drop the policies of files that cannot be read. Not for ever, for those of all other
    /// files count too.
    fn waits_for_unread(&mut self, now: Instant) -> bool {
        if self.unread.is_empty() {
            return false;
        }
        let files = self.unread.iter().map(|file| &**file).collect::<Vec<_>>().join(", ");
        let until = *self.unread_until.get_or_insert_with(|| {
            tracing::warn!(files, limit = ?UNREAD_LIMIT, "files cannot be read, waiting for them to be corrected or removed");
            now + UNREAD_LIMIT
        });
        let waits = now < until;
        if waits {
            self.starting = Some(self.readiness.pending(format!("manifests that cannot be read: {files}")));
        } else {
            tracing::error!(files, "starting without files that cannot be read: policies in them are not in force");
        }
        waits
    }

    /// Logs each problem once, and once more that it is gone.
    fn report(&mut self) {
        let unread = self.unread.iter().map(unread_problem);
        let problems: BTreeSet<Problem> =
            self.folder.problems().into_iter().chain(unread).chain(self.index.problems().cloned()).collect();
        for problem in problems.difference(&self.reported) {
            tracing::warn!(file = %problem.file, line = problem.line, field = problem.field, remedy = problem.remedy, "{}", problem.message);
        }
        for problem in self.reported.difference(&problems) {
            tracing::info!(file = %problem.file, line = problem.line, field = problem.field, "resolved: {}", problem.message);
        }
        let model = self.index.model();
        let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        self.metrics.problems.set(count(problems.len()));
        self.metrics.services.set(count(model.services().count()));
        self.metrics.workloads.set(count(model.workloads().count()));
        self.metrics.policies.set(count(model.policies().count()));
        self.snapshot.send_replace(Snapshot {
            index: model.clone(),
            problems: problems.iter().cloned().collect(),
            versions: Arc::new(self.folder.versions().collect()),
        });
        self.reported = problems;
    }
}

fn unread_problem(file: &Arc<str>) -> Problem {
    Problem {
        file: file.clone(),
        line: 1,
        field: String::new(),
        message: "the file could not be read whole since the control plane started".to_owned(),
        remedy: "correct or remove it; until then policies that cannot be read from it are not in force".to_owned(),
    }
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
    served.map_err(failed("the gRPC server"))
}

#[cfg(test)]
mod tests;
