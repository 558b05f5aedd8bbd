//! A small API server in this process: objects by path, applied, listed and deleted as the real one does it, as far as this program sees.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::{
    body::{Bytes, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use kube::{Client, Config};
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinSet};

use super::{Cluster, Kind, Object};

/// Ends with its last reference.
#[derive(Debug)]
pub(crate) struct FakeApi {
    store: Arc<Mutex<Store>>,
    address: SocketAddr,
    tasks: JoinSet<()>,
}

#[derive(Debug, Default)]
struct Store {
    objects: BTreeMap<String, Value>,
    forbidden: BTreeSet<String>,
    /// Method and path of everything that would change something.
    changes: Vec<String>,
    version: u64,
}

impl FakeApi {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, store) = (listener.local_addr().unwrap(), Arc::new(Mutex::new(Store::default())));
        let mut tasks = JoinSet::new();
        let served = store.clone();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((socket, _)) = listener.accept().await {
                let store = served.clone();
                let service = service_fn(move |request| answer(store.clone(), request));
                connections.spawn(async move {
                    drop(http1::Builder::new().serve_connection(TokioIo::new(socket), service).await)
                });
            }
        });
        Self { store, address, tasks }
    }

    pub(crate) fn cluster(&self) -> Cluster {
        let mut config = Config::new(format!("http://{}", self.address).parse().unwrap());
        config.default_retry = false;
        let (server, namespace) = (format!("http://{} (context fake)", self.address), "default".to_owned());
        Cluster { client: Client::try_from(config).unwrap(), server, namespace }
    }

    pub(crate) fn put(&self, object: Value) {
        let path = Object::new(object.clone()).unwrap().path();
        self.store().objects.insert(path, object);
    }

    /// An object of a kind that no installation has.
    pub(crate) fn put_at(&self, path: &str, object: Value) {
        self.store().objects.insert(path.to_owned(), object);
    }

    pub(crate) fn forbid(&self, path: &str) {
        self.store().forbidden.insert(path.to_owned());
    }

    pub(crate) fn object(&self, path: &str) -> Option<Value> {
        self.store().objects.get(path).cloned()
    }

    pub(crate) fn paths(&self) -> Vec<String> {
        self.store().objects.keys().cloned().collect()
    }

    /// What was changed since the last time.
    pub(crate) fn changes(&self) -> Vec<String> {
        std::mem::take(&mut self.store().changes)
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for FakeApi {
    fn drop(&mut self) {
        self.tasks.abort_all();
    }
}

async fn answer(store: Arc<Mutex<Store>>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let (parts, body) = request.into_parts();
    let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let body = serde_json::from_slice(&body).unwrap_or_default();
    let (path, query) = (parts.uri.path(), parts.uri.query().unwrap_or_default());
    let mut store = store.lock().unwrap_or_else(PoisonError::into_inner);
    let (status, answer) = store.answer(&parts.method, path, query, body);
    let answer = Response::builder().status(status).body(Full::from(answer.to_string()));
    Ok(answer.unwrap_or_default())
}

impl Store {
    fn answer(&mut self, method: &Method, path: &str, query: &str, body: Value) -> (StatusCode, Value) {
        let no = |status: StatusCode| (status, json!({ "kind": "Status", "message": format!("no: {status}") }));
        if self.forbidden.contains(path) {
            return no(StatusCode::FORBIDDEN);
        }
        if *method != Method::GET && !query.contains("dryRun") && !path.contains("selfsubjectaccessreviews") {
            self.changes.push(format!("{method} {path}"));
        }
        match *method {
            Method::GET if path == "/version" => (StatusCode::OK, json!({ "gitVersion": "v1.34.0", "minor": "34" })),
            Method::GET => match (self.objects.get(path), self.list(path, query)) {
                (Some(object), _) => (StatusCode::OK, object.clone()),
                (None, Some(list)) => (StatusCode::OK, list),
                (None, None) => no(StatusCode::NOT_FOUND),
            },
            Method::POST => (StatusCode::CREATED, json!({ "status": { "allowed": true } })),
            Method::PATCH if !query.contains("fieldManager") => match self.objects.get_mut(path) {
                Some(object) => {
                    merge(object, &body);
                    (StatusCode::OK, object.clone())
                }
                None => no(StatusCode::NOT_FOUND),
            },
            Method::PATCH => {
                let mut object = body;
                self.version += 1;
                object["metadata"]["resourceVersion"] = self.version.to_string().into();
                object["status"]["conditions"] = json!([{ "type": "Established", "status": "True" }]);
                if !query.contains("dryRun") {
                    self.objects.insert(path.to_owned(), object.clone());
                }
                (StatusCode::OK, object)
            }
            Method::DELETE => match self.objects.remove(path) {
                Some(object) => (StatusCode::OK, object),
                None => no(StatusCode::NOT_FOUND),
            },
            _ => no(StatusCode::METHOD_NOT_ALLOWED),
        }
    }

    /// `None` for a path that is no collection of a known kind.
    fn list(&self, path: &str, query: &str) -> Option<Value> {
        let plural = path.rsplit('/').next()?;
        let defined = format!("/customresourcedefinitions/{plural}.");
        let known = ["pods", "nodes", "jobs", "leases"].contains(&plural)
            || super::KINDS.iter().any(|kind: &Kind| kind.plural() == plural)
            || self.objects.keys().any(|path| path.contains(&defined));
        if !known {
            return None;
        }
        let parameter = |name: &str| {
            query
                .split('&')
                .find_map(|pair| pair.strip_prefix(&format!("{name}=")))
                .map(|text| text.replace("%3D", "=").replace("%2F", "/"))
        };
        let root = path.trim_end_matches(plural);
        let within = |object_path: &&String| {
            let (group, namespace) = root.split_once("namespaces/").unwrap_or((root, ""));
            object_path.starts_with(group)
                && object_path.contains(&format!("/{plural}/"))
                && (namespace.is_empty() || object_path.starts_with(root))
        };
        let selected = |object: &&Value| {
            let metadata = &object["metadata"];
            let label = parameter("labelSelector")
                .is_none_or(|text| text.split_once('=').is_some_and(|(key, value)| metadata["labels"][key] == value));
            label
                && parameter("fieldSelector")
                    .is_none_or(|text| text.strip_prefix("metadata.name=").is_some_and(|name| metadata["name"] == name))
        };
        let all: Vec<&Value> =
            self.objects.iter().filter(|(path, _)| within(path)).map(|(_, object)| object).filter(selected).collect();
        let start: usize = parameter("continue").and_then(|text| text.parse().ok()).unwrap_or(0);
        let limit: usize = parameter("limit").and_then(|text| text.parse().ok()).unwrap_or(usize::MAX);
        let page: Vec<&&Value> = all.iter().skip(start).take(limit).collect();
        let next = start + page.len();
        let token = if next < all.len() { next.to_string() } else { String::new() };
        Some(json!({ "items": page, "metadata": { "continue": token } }))
    }
}

/// RFC 7396.
fn merge(object: &mut Value, patch: &Value) {
    let Some(patch) = patch.as_object() else { return };
    for (key, value) in patch {
        match value {
            Value::Null => drop(object.as_object_mut().map(|object| object.remove(key))),
            Value::Object(_) => merge(&mut object[key], value),
            _ => object[key] = value.clone(),
        }
    }
}
