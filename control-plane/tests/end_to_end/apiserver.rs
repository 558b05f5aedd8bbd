//! A small Kubernetes API server over loopback: lists with pages, watches with bookmarks, 404, 409 and 410, server-side apply, token
//! reviews. It can be told to forget history, to end its watches, to answer nothing, and to know a kind later.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard},
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Frame, Incoming},
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use serde_json::{Map, Value, json};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    task::JoinSet,
};
use tokio_stream::wrappers::ReceiverStream;

/// However large a page a client asks for.
const PAGE: usize = 2;

type Body = UnsyncBoxBody<Bytes, Infallible>;

/// Where an object is: `api/v1/pods` or `apis/group/version/plural`, namespace, name.
type Key = (String, String, String);

#[derive(Debug)]
struct Logged {
    version: u64,
    change: &'static str,
    resource: String,
    object: Value,
}

#[derive(Debug, Default)]
struct State {
    objects: BTreeMap<Key, Value>,
    version: u64,
    log: Vec<Logged>,
    /// Watches from before this are gone.
    forgotten: u64,
    unknown: BTreeSet<String>,
    /// By token.
    reviews: HashMap<String, Value>,
    /// What each field manager last applied.
    applied: HashMap<(Key, String), Value>,
    /// `METHOD path` of every request.
    requests: Vec<String>,
}

#[derive(Debug)]
pub(crate) struct ApiServer {
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
    _tasks: JoinSet<()>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// The version.
    changed: watch::Sender<u64>,
    frozen: watch::Sender<bool>,
    /// Counts up to end watches.
    cut: watch::Sender<u64>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

impl ApiServer {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            state: Mutex::new(State { version: 1, ..State::default() }),
            changed: watch::Sender::new(1),
            frozen: watch::Sender::new(false),
            cut: watch::Sender::new(0),
        });
        let mut tasks = JoinSet::new();
        let serving = shared.clone();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let shared = serving.clone();
                connections.spawn(async move {
                    let service = service_fn(move |request| answer(shared.clone(), request));
                    let served = hyper::server::conn::http1::Builder::new();
                    drop(served.serve_connection(TokioIo::new(stream), service).await);
                });
            }
        });
        Self { address, shared, _tasks: tasks }
    }

    pub(crate) fn config(&self) -> kube::Config {
        let mut config = kube::Config::new(format!("http://{}", self.address).parse().unwrap());
        config.default_retry = false;
        config
    }

    /// Creates or replaces an object of a resource, `api/v1/pods` say.
    pub(crate) fn put(&self, resource: &str, object: Value) {
        self.shared.lock().put(resource, object);
        self.shared.announce();
    }

    pub(crate) fn delete(&self, resource: &str, namespace: &str, name: &str) {
        self.shared.lock().delete(&key(resource, namespace, name));
        self.shared.announce();
    }

    pub(crate) fn get(&self, resource: &str, namespace: &str, name: &str) -> Option<Value> {
        self.shared.lock().objects.get(&key(resource, namespace, name)).cloned()
    }

    /// Whether a kind is installed; all are unless said otherwise.
    pub(crate) fn know(&self, resource: &str, known: bool) {
        let mut state = self.shared.lock();
        match known {
            true => state.unknown.remove(resource),
            false => state.unknown.insert(resource.to_owned()),
        };
    }

    /// What a token is reviewed as.
    pub(crate) fn review(&self, token: &str, status: Value) {
        self.shared.lock().reviews.insert(token.to_owned(), status);
    }

    /// Ends every watch, so that clients come again.
    pub(crate) fn cut(&self) {
        self.shared.cut.send_modify(|count| *count += 1);
    }

    /// Ends every watch, and forgets what happened so far: clients have to list again.
    pub(crate) fn forget(&self) {
        {
            let mut state = self.shared.lock();
            state.version += 1;
            state.forgotten = state.version;
            state.log.clear();
        }
        self.cut();
    }

    /// From now on nothing is answered, or again.
    pub(crate) fn freeze(&self, frozen: bool) {
        self.shared.frozen.send_replace(frozen);
    }

    pub(crate) fn requests(&self) -> Vec<String> {
        self.shared.lock().requests.clone()
    }
}

impl Shared {
    fn announce(&self) {
        let version = self.lock().version;
        self.changed.send_replace(version);
    }
}

fn key(resource: &str, namespace: &str, name: &str) -> Key {
    (resource.to_owned(), namespace.to_owned(), name.to_owned())
}

fn text(object: &Value, field: &str) -> String {
    object["metadata"][field].as_str().unwrap_or_default().to_owned()
}

impl State {
    fn put(&mut self, resource: &str, mut object: Value) -> Value {
        self.version += 1;
        let key = key(resource, &text(&object, "namespace"), &text(&object, "name"));
        let old = self.objects.get(&key);
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        if object["metadata"]["uid"].is_null() {
            let uid = old.map_or_else(|| format!("uid-{}", self.version), |old| text(old, "uid"));
            object["metadata"]["uid"] = json!(uid);
        }
        let change = if old.is_some() { "MODIFIED" } else { "ADDED" };
        self.objects.insert(key, object.clone());
        self.log.push(Logged { version: self.version, change, resource: resource.to_owned(), object: object.clone() });
        object
    }

    fn delete(&mut self, key: &Key) -> Option<Value> {
        let mut object = self.objects.remove(key)?;
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let (version, resource) = (self.version, key.0.clone());
        self.log.push(Logged { version, change: "DELETED", resource, object: object.clone() });
        Some(object)
    }

    /// Merges what a manager applies, and takes back what it applied before and does not any more.
    fn apply(&mut self, at: &Key, manager: &str, applied: Value) -> Option<Value> {
        let mut object = self.objects.get(at).cloned()?;
        if let Some(before) = self.applied.insert((at.clone(), manager.to_owned()), applied.clone()) {
            prune(&mut object, &before, &applied);
        }
        merge(&mut object, &applied);
        Some(self.put(&at.0, object))
    }
}

fn merge(into: &mut Value, from: &Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (field, value) in from {
                merge(into.entry(field).or_insert(Value::Null), value);
            }
        }
        (Value::Array(into), Value::Array(from)) if from.iter().all(|item| item["type"].is_string()) => {
            for item in from {
                match into.iter_mut().find(|other| other["type"] == item["type"]) {
                    Some(other) => *other = item.clone(),
                    None => into.push(item.clone()),
                }
            }
        }
        (into, from) => *into = from.clone(),
    }
}

fn prune(object: &mut Value, before: &Value, now: &Value) {
    match (object, before) {
        (Value::Object(object), Value::Object(before)) => {
            for (field, value) in before {
                match (object.get_mut(field), now.get(field)) {
                    (Some(inner), Some(now)) => prune(inner, value, now),
                    (Some(inner), None) if inner.is_object() || inner.is_array() => prune(inner, value, &Value::Null),
                    (Some(_), None) => drop(object.remove(field)),
                    (None, _) => {}
                }
            }
        }
        (Value::Array(object), Value::Array(before)) => {
            let kept = |item: &Value| now.as_array().is_some_and(|now| now.iter().any(|n| n["type"] == item["type"]));
            object.retain(|item| kept(item) || !before.iter().any(|b| b["type"] == item["type"]));
        }
        _ => {}
    }
}

/// What a request is about.
struct Target {
    resource: String,
    namespace: Option<String>,
    name: Option<String>,
    query: HashMap<String, String>,
}

impl Target {
    fn of(uri: &hyper::Uri) -> Self {
        let mut parts: Vec<&str> = uri.path().trim_start_matches('/').split('/').collect();
        let mut resource: Vec<&str> = parts.drain(..if parts[0] == "api" { 2 } else { 3 }).collect();
        let namespace = (parts.len() > 2 && parts[0] == "namespaces").then(|| {
            let taken: Vec<&str> = parts.drain(..2).collect();
            taken[1].to_owned()
        });
        resource.push(parts[0]);
        let decoded = |text: &str| text.replace("%3D", "=").replace("%2C", ",").replace('+', " ");
        let pairs = uri.query().unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
        Self {
            resource: resource.join("/"),
            namespace,
            name: parts.get(1).map(|name| (*name).to_owned()),
            query: pairs.map(|(name, value)| (name.to_owned(), decoded(value))).collect(),
        }
    }

    fn key(&self) -> Key {
        let own = |text: &Option<String>| text.clone().unwrap_or_default();
        (self.resource.clone(), own(&self.namespace), own(&self.name))
    }

    fn number(&self, name: &str) -> Option<u64> {
        self.query.get(name)?.parse().ok()
    }

    fn selects(&self, object: &Value) -> bool {
        let within = self.namespace.as_ref().is_none_or(|namespace| text(object, "namespace") == *namespace);
        let selector = self.query.get("fieldSelector");
        let name = selector.and_then(|selector| selector.strip_prefix("metadata.name="));
        within && name.is_none_or(|name| text(object, "name") == name)
    }
}

async fn answer(shared: Arc<Shared>, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let target = Target::of(request.uri());
    let (parts, body) = request.into_parts();
    let body = body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    shared.lock().requests.push(format!("{} {}", parts.method, parts.uri));
    drop(shared.frozen.subscribe().wait_for(|frozen| !frozen).await);
    if shared.lock().unknown.contains(&target.resource) {
        return Ok(status(StatusCode::NOT_FOUND, "NotFound"));
    }
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let response = match parts.method {
        Method::GET if target.query.get("watch").is_some_and(|watch| watch != "false") => {
            watching(shared.clone(), target)
        }
        Method::GET if target.name.is_some() => found(shared.lock().objects.get(&target.key()).cloned()),
        Method::GET => list(&shared.lock(), &target),
        Method::POST if target.resource.ends_with("/tokenreviews") => {
            let token = body["spec"]["token"].as_str().unwrap_or_default();
            let known = shared.lock().reviews.get(token).cloned();
            let mut review = body.clone();
            review["status"] = known.unwrap_or_else(|| json!({"authenticated": false, "error": "unknown token"}));
            json_answer(StatusCode::CREATED, &review)
        }
        Method::POST => {
            let mut state = shared.lock();
            let mut object = body;
            if let Some(namespace) = &target.namespace {
                object["metadata"]["namespace"] = json!(namespace);
            }
            let key = key(&target.resource, &text(&object, "namespace"), &text(&object, "name"));
            match state.objects.contains_key(&key) {
                true => status(StatusCode::CONFLICT, "AlreadyExists"),
                false => json_answer(StatusCode::CREATED, &state.put(&target.resource, object)),
            }
        }
        Method::PUT => {
            let mut state = shared.lock();
            let current = state.objects.get(&target.key()).map(|object| text(object, "resourceVersion"));
            let sent = text(&body, "resourceVersion");
            match current {
                None => status(StatusCode::NOT_FOUND, "NotFound"),
                Some(current) if !sent.is_empty() && sent != current => status(StatusCode::CONFLICT, "Conflict"),
                Some(_) => json_answer(StatusCode::OK, &state.put(&target.resource, body)),
            }
        }
        Method::PATCH => {
            let manager = target.query.get("fieldManager").cloned().unwrap_or_default();
            let mut state = shared.lock();
            if !state.objects.contains_key(&target.key()) && !parts.uri.path().ends_with("/status") {
                let mut object = body.clone();
                object["metadata"]["namespace"] = json!(target.namespace);
                state.put(&target.resource, object);
            }
            found(state.apply(&target.key(), &manager, body))
        }
        Method::DELETE => found(shared.lock().delete(&target.key())),
        _ => status(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed"),
    };
    shared.announce();
    Ok(response)
}

fn list(state: &State, target: &Target) -> Response<Body> {
    // The token of the next page says where it begins, and as of when the list is.
    let token = target.query.get("continue").and_then(|token| token.split_once('-'));
    let (start, version) =
        token.map_or((0, state.version), |(start, version)| (start.parse().unwrap_or(0), version.parse().unwrap_or(0)));
    if version < state.forgotten {
        return status(StatusCode::GONE, "Expired");
    }
    let of_kind = state.objects.iter().filter(|(key, _)| key.0 == target.resource).map(|(_, object)| object);
    let all: Vec<&Value> = of_kind.filter(|object| target.selects(object)).collect();
    let limit = target.number("limit").map_or(PAGE, |_| PAGE);
    let mut items: Vec<Value> = all.iter().skip(start).take(limit).map(|object| (*object).clone()).collect();
    for item in items.iter_mut().filter_map(Value::as_object_mut) {
        // As the real one does.
        item.remove("kind");
        item.remove("apiVersion");
    }
    let mut metadata = Map::from_iter([("resourceVersion".to_owned(), json!(version.to_string()))]);
    if start + limit < all.len() {
        metadata.insert("continue".to_owned(), json!(format!("{}-{version}", start + limit)));
    }
    json_answer(StatusCode::OK, &json!({"kind": "List", "apiVersion": "v1", "metadata": metadata, "items": items}))
}

fn watching(shared: Arc<Shared>, target: Target) -> Response<Body> {
    let (sender, events) = mpsc::channel(16);
    let mut seen = target.number("resourceVersion").unwrap_or(0);
    let (mut changed, mut cut) = (shared.changed.subscribe(), shared.cut.subscribe());
    let mut frozen = shared.frozen.subscribe();
    // Ends when the client goes, or is sent away.
    tokio::spawn(async move {
        cut.mark_unchanged();
        loop {
            let told: Vec<Value> = {
                let state = shared.lock();
                if seen < state.forgotten {
                    let gone = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "too old", "reason": "Expired", "code": 410});
                    vec![json!({"type": "ERROR", "object": gone})]
                } else {
                    let new = state.log.iter().filter(|logged| logged.version > seen);
                    let new = new.filter(|l| l.resource == target.resource && target.selects(&l.object));
                    let mut told: Vec<Value> =
                        new.map(|logged| json!({"type": logged.change, "object": logged.object})).collect();
                    if told.is_empty() && state.version > seen {
                        let metadata = json!({"resourceVersion": state.version.to_string()});
                        let object = json!({"kind": "Bookmark", "apiVersion": "v1", "metadata": metadata});
                        told.push(json!({"type": "BOOKMARK", "object": object}));
                    }
                    seen = seen.max(state.version);
                    told
                }
            };
            drop(frozen.wait_for(|frozen| !frozen).await);
            for event in told {
                let line = Bytes::from(format!("{event}\n"));
                if sender.send(Ok(Frame::data(line))).await.is_err() {
                    return;
                }
            }
            tokio::select! {
                changed = changed.changed() => if changed.is_err() { return },
                _ = cut.changed() => return,
                () = sender.closed() => return,
            }
        }
    });
    let body = StreamBody::new(ReceiverStream::new(events));
    Response::builder().header("content-type", "application/json").body(body.boxed_unsync()).unwrap()
}

fn found(object: Option<Value>) -> Response<Body> {
    match object {
        Some(object) => json_answer(StatusCode::OK, &object),
        None => status(StatusCode::NOT_FOUND, "NotFound"),
    }
}

fn status(code: StatusCode, reason: &str) -> Response<Body> {
    let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": reason, "reason": reason, "code": code.as_u16()});
    json_answer(code, &status)
}

fn json_answer(code: StatusCode, value: &Value) -> Response<Body> {
    let body = Full::new(Bytes::from(value.to_string())).boxed_unsync();
    Response::builder().status(code).header("content-type", "application/json").body(body).unwrap()
}
