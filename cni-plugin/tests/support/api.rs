//! A small API server: objects by path, list, watch and merge patch, and what becomes of a client when it stops answering.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use futures_util::stream;
use http::{Method, StatusCode};
use http_body_util::{BodyExt, StreamBody, combinators::BoxBody};
use hyper::{
    body::{Frame, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::watch};

type Response = http::Response<BoxBody<Bytes, Infallible>>;

/// Cheap to clone; all clones are one server.
#[derive(Clone)]
pub(crate) struct Api {
    shared: Arc<Mutex<State>>,
    /// The newest version of anything; wakes watches.
    version: watch::Sender<u64>,
    mood: watch::Sender<Mood>,
    pub(crate) address: SocketAddr,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mood {
    Working,
    /// Takes requests and says nothing; watches fall silent.
    Frozen,
    /// Refuses everything with this status; watches end.
    Refusing(u16),
}

#[derive(Default)]
struct State {
    /// By collection and `namespace/name`.
    objects: BTreeMap<(String, String), Value>,
    history: Vec<(u64, String, &'static str, Value)>,
    /// Every request that is no list or watch.
    asked: Vec<String>,
}

impl Api {
    /// Serves on loopback for as long as the runtime lives.
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let api = Self {
            shared: Arc::default(),
            version: watch::Sender::new(1),
            mood: watch::Sender::new(Mood::Working),
            address: listener.local_addr().expect("address"),
        };
        let serving = api.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let api = serving.clone();
                tokio::spawn(async move {
                    let service = service_fn(|request| {
                        let api = api.clone();
                        async move { Ok::<_, Infallible>(api.answer(request).await) }
                    });
                    drop(http1::Builder::new().serve_connection(TokioIo::new(stream), service).await);
                });
            }
        });
        api
    }

    pub(crate) fn kubeconfig(&self) -> String {
        json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "k", "cluster": {"server": format!("http://{}", self.address)}}],
            "users": [{"name": "u", "user": {}}],
            "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        })
        .to_string()
    }

    pub(crate) fn set(&self, mood: Mood) {
        self.mood.send_replace(mood);
    }

    /// `collection` is as in the path: `pods`, `namespaces`, `daemonsets`, …
    pub(crate) fn put(&self, collection: &str, mut object: Value) {
        let key = (collection.to_owned(), key_of(&object));
        let mut state = self.shared.lock().expect("lock");
        let version = *self.version.borrow() + 1;
        object["metadata"]["resourceVersion"] = version.to_string().into();
        let kind = if state.objects.contains_key(&key) { "MODIFIED" } else { "ADDED" };
        state.history.push((version, collection.to_owned(), kind, object.clone()));
        state.objects.insert(key, object);
        drop(state);
        self.version.send_replace(version);
    }

    pub(crate) fn delete(&self, collection: &str, key: &str) {
        let mut state = self.shared.lock().expect("lock");
        let version = *self.version.borrow() + 1;
        if let Some(mut object) = state.objects.remove(&(collection.to_owned(), key.to_owned())) {
            object["metadata"]["resourceVersion"] = version.to_string().into();
            state.history.push((version, collection.to_owned(), "DELETED", object));
        }
        drop(state);
        self.version.send_replace(version);
    }

    pub(crate) fn object(&self, collection: &str, key: &str) -> Option<Value> {
        self.shared.lock().expect("lock").objects.get(&(collection.to_owned(), key.to_owned())).cloned()
    }

    /// Requests that were no list or watch: `METHOD path body`.
    pub(crate) fn asked(&self) -> Vec<String> {
        self.shared.lock().expect("lock").asked.clone()
    }

    async fn answer(&self, request: http::Request<Incoming>) -> Response {
        let mood = *self.mood.borrow();
        match mood {
            Mood::Frozen => {
                drop(self.mood.subscribe().wait_for(|mood| *mood != Mood::Frozen).await);
                failure(503, "was frozen")
            }
            Mood::Refusing(code) => failure(code, "as the test wants it"),
            Mood::Working => self.work(request).await,
        }
    }

    async fn work(&self, request: http::Request<Incoming>) -> Response {
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        let query = request.uri().query().unwrap_or_default().to_owned();
        let (collection, key, subresource) = target(&path);
        let body = request.into_body().collect().await.expect("body").to_bytes();
        let text = String::from_utf8_lossy(&body).into_owned();
        if key.is_some() || method != Method::GET {
            self.shared.lock().expect("lock").asked.push(format!("{method} {path} {text}"));
        }
        match (&method, key) {
            (&Method::GET, None) if query.contains("watch=true") => self.watch(collection, &query),
            (&Method::GET, None) => self.list(&collection),
            (&Method::GET, Some(key)) => {
                self.object(&collection, &key).map_or_else(|| failure(404, "no such"), |o| answer(&o))
            }
            (&Method::PATCH, Some(key)) => self.patch(&collection, &key, subresource, &body),
            (&Method::POST, None) => {
                self.put(&collection, serde_json::from_slice(&body).expect("an object"));
                http::Response::builder().status(StatusCode::CREATED).body(whole(body)).expect("response")
            }
            _ => failure(405, "not played"),
        }
    }

    fn list(&self, collection: &str) -> Response {
        let state = self.shared.lock().expect("lock");
        let items = state.objects.iter().filter(|((c, _), _)| c == collection).map(|(_, object)| object.clone());
        let items: Vec<Value> = items.collect();
        let version = self.version.borrow().to_string();
        answer(&json!({"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": version}, "items": items}))
    }

    fn watch(&self, collection: String, query: &str) -> Response {
        let from = query.split('&').find_map(|pair| pair.strip_prefix("resourceVersion="));
        let from: u64 = from.and_then(|v| v.parse().ok()).unwrap_or(0);
        let follow = (self.clone(), self.version.subscribe(), self.mood.subscribe(), from);
        let events = stream::unfold(follow, move |(api, mut versions, mut mood, seen)| {
            let collection = collection.clone();
            async move {
                loop {
                    let now = *mood.borrow_and_update();
                    match now {
                        Mood::Working => {
                            if let Some((version, line)) = api.event_after(&collection, seen) {
                                return Some((Ok(Frame::data(Bytes::from(line))), (api, versions, mood, version)));
                            }
                        }
                        Mood::Frozen => {}
                        Mood::Refusing(_) => return None,
                    }
                    tokio::select! {
                        changed = versions.changed() => drop(changed.ok()?),
                        changed = mood.changed() => drop(changed.ok()?),
                    }
                }
            }
        });
        http::Response::new(BodyExt::boxed(StreamBody::new(events)))
    }

    fn event_after(&self, collection: &str, seen: u64) -> Option<(u64, String)> {
        let state = self.shared.lock().expect("lock");
        let next = state.history.iter().find(|(version, c, _, _)| *version > seen && c == collection);
        next.map(|(version, _, kind, object)| (*version, format!("{}\n", json!({"type": kind, "object": object}))))
    }

    fn patch(&self, collection: &str, key: &str, subresource: Option<String>, body: &[u8]) -> Response {
        let patch: Value = serde_json::from_slice(body).expect("a patch");
        let Some(mut object) = self.object(collection, key) else { return failure(404, "no such object") };
        assert!(
            collection != "pods" || subresource.as_deref() == Some("status"),
            "pods are patched through status only"
        );
        if let Some(operations) = patch.as_array() {
            if let Err(code) = json_patch(&mut object, operations) {
                return failure(code, "the test operation failed");
            }
        } else {
            if patch["metadata"]["uid"].is_string() && patch["metadata"]["uid"] != object["metadata"]["uid"] {
                return failure(422, "metadata.uid: field is immutable");
            }
            merge(&mut object, &patch);
        }
        self.put(collection, object.clone());
        answer(&object)
    }
}

fn key_of(object: &Value) -> String {
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
    format!("{}/{}", text("namespace"), text("name"))
}

/// Collection, key and subresource of a path.
fn target(path: &str) -> (String, Option<String>, Option<String>) {
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    let skip = if parts[0] == "api" { 2 } else { 3 };
    let (namespace, rest) = match &parts[skip..] {
        ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (*namespace, rest),
        rest => ("", rest),
    };
    let key = rest.get(1).map(|name| format!("{namespace}/{name}"));
    (rest[0].to_owned(), key, rest.get(2).map(|s| (*s).to_owned()))
}

/// RFC 7386.
fn merge(target: &mut Value, patch: &Value) {
    let Some(fields) = patch.as_object() else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (name, value) in fields {
        if value.is_null() {
            target.as_object_mut().expect("an object").remove(name);
        } else {
            merge(&mut target[name], value);
        }
    }
}

/// `test`, `replace` and `remove` of RFC 6902.
fn json_patch(target: &mut Value, operations: &[Value]) -> Result<(), u16> {
    for operation in operations {
        let path = operation["path"].as_str().expect("a path");
        let found = target.pointer(path).cloned().ok_or(422u16)?;
        match operation["op"].as_str().expect("an operation") {
            "test" if found == operation["value"] => {}
            "test" => return Err(422),
            "replace" => *target.pointer_mut(path).ok_or(422u16)? = operation["value"].clone(),
            "remove" => {
                let (parent, last) = path.rsplit_once('/').expect("a parent");
                match target.pointer_mut(parent) {
                    Some(Value::Array(items)) => drop(items.remove(last.parse().expect("an index"))),
                    Some(Value::Object(fields)) => drop(fields.remove(last)),
                    _ => return Err(422),
                }
            }
            other => panic!("{other} is not played"),
        }
    }
    Ok(())
}

fn answer(object: &Value) -> Response {
    http::Response::new(whole(Bytes::from(object.to_string())))
}

fn failure(code: u16, message: &str) -> Response {
    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "message": message, "reason": "Test"});
    let body = whole(Bytes::from(status.to_string()));
    http::Response::builder().status(code).body(body).expect("response")
}

fn whole(bytes: Bytes) -> BoxBody<Bytes, Infallible> {
    http_body_util::Full::new(bytes).boxed()
}
