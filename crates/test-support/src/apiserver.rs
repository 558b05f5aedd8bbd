//! A small Kubernetes API server over loopback: lists with pages, watches with bookmarks, 404, 409 and 410, patches, server-side apply,
//! reviews of tokens and of access. It can be told to forget history, to end its watches, to answer nothing, to refuse, and to know a
//! kind later. It plays what somebody's test needs; what it does not play it refuses, so that nobody relies on it.

mod answer;
mod follow;
mod patch;
mod request;
mod store;

use std::{
    fmt,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::watch, task::JoinSet};

pub use request::Asked;
use request::Target;
use store::{Key, Store};

/// How a server behaves where real ones differ.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Objects per page of a list, however many are asked for.
    pub page: usize,
    /// Whether a watch hears of every change elsewhere by a bookmark, rather than never.
    pub bookmarks: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { page: usize::MAX, bookmarks: false }
    }
}

/// Whether a server answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mood {
    Working,
    /// Takes requests and says nothing; watches fall silent.
    Frozen,
    /// Refuses everything with this status; watches end.
    Refusing(u16),
}

/// Ends when dropped. Resources are named as in paths: `api/v1/pods`, `apis/apps/v1/daemonsets`; the namespace of what has none is empty.
#[derive(Debug)]
pub struct ApiServer {
    pub address: SocketAddr,
    shared: Arc<Shared>,
    _tasks: JoinSet<()>,
}

type Rule = Box<dyn Fn(&Asked) -> Option<u16> + Send>;

struct Shared {
    options: Options,
    store: Mutex<Store>,
    /// Every request so far.
    asked: Mutex<Vec<Asked>>,
    refuse: Mutex<Option<Rule>>,
    /// The version of the store.
    changed: watch::Sender<u64>,
    mood: watch::Sender<Mood>,
    /// Counts up to end watches.
    cut: watch::Sender<u64>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("options", &self.options).finish_non_exhaustive()
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn announce(&self) {
        let version = lock(&self.store).version;
        self.changed.send_replace(version);
    }
}

impl ApiServer {
    /// Must be called within a tokio runtime, which serves it.
    pub async fn start() -> Self {
        Self::with(Options::default()).await
    }

    /// # Panics
    /// When loopback has no port left.
    pub async fn with(options: Options) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let store = Store::default();
        let shared = Arc::new(Shared {
            options,
            changed: watch::Sender::new(store.version),
            store: Mutex::new(store),
            asked: Mutex::default(),
            refuse: Mutex::default(),
            mood: watch::Sender::new(Mood::Working),
            cut: watch::Sender::new(0),
        });
        let mut tasks = JoinSet::new();
        let serving = shared.clone();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                while connections.try_join_next().is_some() {}
                let shared = serving.clone();
                connections.spawn(async move {
                    let service = service_fn(move |request| answer::answer(shared.clone(), request));
                    drop(http1::Builder::new().serve_connection(TokioIo::new(stream), service).await);
                });
            }
        });
        Self { address, shared, _tasks: tasks }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// With which programs find this server.
    pub fn kubeconfig(&self) -> String {
        json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "k", "cluster": {"server": self.url()}}],
            "users": [{"name": "u", "user": {}}],
            "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        })
        .to_string()
    }

    /// Creates or replaces an object.
    pub fn put(&self, resource: &str, object: Value) {
        lock(&self.shared.store).put(resource, object);
        self.shared.announce();
    }

    /// For good, finalizers or not.
    pub fn delete(&self, resource: &str, namespace: &str, name: &str) {
        lock(&self.shared.store).delete(&Key::new(resource, namespace, name));
        self.shared.announce();
    }

    pub fn get(&self, resource: &str, namespace: &str, name: &str) -> Option<Value> {
        lock(&self.shared.store).get(&Key::new(resource, namespace, name))
    }

    /// What there is under a path, `/api/v1/nodes/n1` say.
    pub fn at(&self, path: &str) -> Option<Value> {
        let target = Target::of(&path.parse().ok()?)?;
        lock(&self.shared.store).get(&target.key())
    }

    /// Paths of all objects, sorted.
    pub fn paths(&self) -> Vec<String> {
        let mut paths: Vec<String> = lock(&self.shared.store).keys().map(|key| key.path()).collect();
        paths.sort();
        paths
    }

    /// Whether a kind is installed; all are unless said otherwise.
    pub fn know(&self, resource: &str, known: bool) {
        lock(&self.shared.store).know(resource, known);
    }

    /// What a token is reviewed as; others are not authentic.
    pub fn review(&self, token: &str, status: Value) {
        lock(&self.shared.store).reviews.insert(token.to_owned(), status);
    }

    /// From now on, requests are refused with the status that this says.
    pub fn refuse(&self, rule: impl Fn(&Asked) -> Option<u16> + Send + 'static) {
        *lock(&self.shared.refuse) = Some(Box::new(rule));
    }

    pub fn set(&self, mood: Mood) {
        self.shared.mood.send_replace(mood);
    }

    /// Ends every watch, so that clients come again.
    pub fn cut(&self) {
        self.shared.cut.send_modify(|count| *count += 1);
    }

    /// Ends every watch, and forgets what happened so far: clients have to list again.
    pub fn forget(&self) {
        lock(&self.shared.store).forget();
        self.cut();
    }

    /// Every request so far.
    pub fn asked(&self) -> Vec<Asked> {
        lock(&self.shared.asked).clone()
    }
}
