//! A Kubernetes cluster, as whoever runs this may see and change it.
//!
//! Objects are JSON here: what is installed comes as such, and what is asked for is read field by field. Every request has a deadline, and
//! an error says what was asked of which server.

mod connection;
#[cfg(test)]
pub(crate) mod fake;
mod forward;
mod kinds;
pub(crate) mod rollout;

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use http::{
    Method, Request, StatusCode,
    header::{ACCEPT, CONTENT_TYPE, DATE},
};
use http_body_util::{BodyExt as _, Limited};
use kube::{Client, client::Body};
use serde_json::Value;

pub(crate) use self::{
    connection::{Connection, is_configured},
    kinds::{KINDS, Kind, Object},
};

/// As field manager, and as the value of `app.kubernetes.io/managed-by`.
pub(crate) const MANAGER: &str = "fairway";
const DEADLINE: Duration = Duration::from_secs(30);
/// Of one answer; lists come in pages far smaller.
const ANSWER_LIMIT: usize = 64 << 20;
const PAGE: usize = 500;
const JSON: &str = "application/json";
const METADATA: &str = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1";
const METADATA_LIST: &str = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1";

/// Runs what asks a cluster.
pub(crate) fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}

#[derive(Clone)]
pub(crate) struct Cluster {
    client: Client,
    /// Where requests go, and by which context.
    pub(crate) server: String,
    /// The context's.
    pub(crate) namespace: String,
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster").field("server", &self.server).finish_non_exhaustive()
    }
}

/// The server's answer was no, or there was none.
#[derive(Debug)]
pub(crate) struct Refused {
    asked: String,
    server: String,
    /// None: no answer at all.
    status: Option<StatusCode>,
    said: String,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { asked, server, said, .. } = self;
        match self.status {
            None => write!(f, "{server} does not answer {asked}: {said}")?,
            Some(status) => write!(f, "{server} says {status} to {asked}: {said}")?,
        }
        f.write_str(match self.status {
            None => "; is this the right cluster (--context), and can it be reached from here?",
            Some(StatusCode::UNAUTHORIZED) => "; log in again, or choose another user with --context",
            Some(StatusCode::FORBIDDEN) => "; ask for this permission, or choose another user with --context",
            Some(_) => "",
        })
    }
}

impl Refused {
    /// `403 Forbidden to GET /api/v1/nodes`.
    pub(crate) fn briefly(&self) -> String {
        let answer = self.status.map_or_else(|| "no answer".to_owned(), |status| status.to_string());
        format!("{answer} to {}", self.asked)
    }
}

impl std::error::Error for Refused {}

/// What became of an object that was applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Applied {
    Created,
    Changed,
    Unchanged,
}

impl Cluster {
    /// `None` when there is no such object, or no such kind.
    pub(crate) async fn get(&self, path: &str) -> anyhow::Result<Option<Value>> {
        self.object(path, JSON).await
    }

    /// As [`Self::get`], with the object's metadata only: for what it holds is nobody's business, or large.
    pub(crate) async fn get_metadata(&self, path: &str) -> anyhow::Result<Option<Value>> {
        self.object(path, METADATA).await
    }

    async fn object(&self, path: &str, accept: &'static str) -> anyhow::Result<Option<Value>> {
        match self.send(Method::GET, path, accept, None).await {
            Ok(value) => Ok(Some(value)),
            Err(refused) if refused.status == Some(StatusCode::NOT_FOUND) => Ok(None),
            Err(refused) => Err(refused.into()),
        }
    }

    /// Every object; none of a kind that is not installed. `query`: selectors, such as `labelSelector=a%3Db`.
    pub(crate) async fn list(&self, path: &str, query: &str) -> anyhow::Result<Vec<Value>> {
        self.pages(path, query, JSON).await
    }

    /// As [`Self::list`], with the objects' metadata only.
    pub(crate) async fn list_metadata(&self, path: &str, query: &str) -> anyhow::Result<Vec<Value>> {
        self.pages(path, query, METADATA_LIST).await
    }

    async fn pages(&self, path: &str, query: &str, accept: &'static str) -> anyhow::Result<Vec<Value>> {
        let (mut items, mut next) = (Vec::new(), String::new());
        loop {
            let page = format!("{path}?limit={PAGE}&{query}{next}");
            let mut answer = match self.send(Method::GET, &page, accept, None).await {
                Ok(answer) => answer,
                Err(refused) if refused.status == Some(StatusCode::NOT_FOUND) => return Ok(items),
                Err(refused) => return Err(refused.into()),
            };
            if let Value::Array(some) = answer["items"].take() {
                items.extend(some);
            }
            match answer["metadata"]["continue"].as_str() {
                Some(token) if !token.is_empty() => next = format!("&continue={}", escape(token)),
                _ => return Ok(items),
            }
        }
    }

    /// The server's version, and the time it has.
    pub(crate) async fn version(&self) -> anyhow::Result<(Value, Option<SystemTime>)> {
        let (status, body, headers) = self.ask(Method::GET, "/version", JSON, None).await?;
        let version = serde_json::from_slice(&body).unwrap_or_default();
        if !status.is_success() {
            let said = String::from_utf8_lossy(&body).chars().take(200).collect();
            return Err(self.refused(&Method::GET, "/version", Some(status), said).into());
        }
        Ok((version, headers.get(DATE).and_then(|date| http_date(date.to_str().ok()?))))
    }

    /// Server-side apply, which takes over fields that somebody else has set. With `dry_run` the server only says what would become.
    pub(crate) async fn apply(&self, object: &Object, dry_run: bool) -> anyhow::Result<Applied> {
        let path = object.path();
        let before = self.get(&path).await?;
        let dry_run = if dry_run { "&dryRun=All" } else { "" };
        let path = format!("{path}?fieldManager={MANAGER}&force=true{dry_run}");
        let body = (Patch::Apply, object.value.clone());
        let after = self
            .send(Method::PATCH, &path, JSON, Some(body))
            .await
            .with_context(|| format!("cannot apply {object}"))?;
        Ok(match before {
            None => Applied::Created,
            Some(before) if essence(&before) == essence(&after) => Applied::Unchanged,
            Some(_) => Applied::Changed,
        })
    }

    pub(crate) async fn merge(&self, path: &str, patch: Value) -> anyhow::Result<()> {
        Ok(self.send(Method::PATCH, path, JSON, Some((Patch::Merge, patch))).await.map(drop)?)
    }

    pub(crate) async fn create(&self, path: &str, object: Value) -> anyhow::Result<Value> {
        Ok(self.send(Method::POST, path, JSON, Some((Patch::None, object))).await?)
    }

    /// Whether it was there. Foreground: what it owns goes before it.
    pub(crate) async fn delete(&self, path: &str) -> anyhow::Result<bool> {
        let how = serde_json::json!({ "apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Foreground" });
        match self.send(Method::DELETE, path, JSON, Some((Patch::None, how))).await {
            Ok(_) => Ok(true),
            Err(refused) if refused.status == Some(StatusCode::NOT_FOUND) => Ok(false),
            Err(refused) => Err(refused.into()),
        }
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        accept: &'static str,
        body: Option<(Patch, Value)>,
    ) -> Result<Value, Refused> {
        let (status, bytes, _) = self.ask(method.clone(), path, accept, body).await?;
        let json = serde_json::from_slice::<Value>(&bytes);
        if status.is_success() {
            let unreadable = |error: serde_json::Error| format!("not JSON: {error}");
            return json.map_err(|error| self.refused(&method, path, Some(status), unreadable(error)));
        }
        let said = json.ok().and_then(|answer| answer["message"].as_str().map(str::to_owned));
        let said = said.unwrap_or_else(|| String::from_utf8_lossy(&bytes).chars().take(200).collect());
        Err(self.refused(&method, path, Some(status), said))
    }

    /// Any answer, with its headers.
    async fn ask(
        &self,
        method: Method,
        path: &str,
        accept: &'static str,
        body: Option<(Patch, Value)>,
    ) -> Result<(StatusCode, Vec<u8>, http::HeaderMap), Refused> {
        let silent = |said: String| self.refused(&method, path, None, said);
        let mut request = Request::builder().method(&method).uri(path).header(ACCEPT, accept);
        let mut bytes = Vec::new();
        if let Some((patch, value)) = body {
            request = request.header(CONTENT_TYPE, patch.content_type());
            bytes = value.to_string().into_bytes();
        }
        let request = request.body(Body::from(bytes)).map_err(|error| silent(error.to_string()))?;
        let exchange = async {
            let answer = self.client.send(request).await.map_err(|error| silent(chain(&error)))?;
            let (parts, body) = answer.into_parts();
            let body = Limited::new(body, ANSWER_LIMIT).collect().await.map_err(|error| silent(error.to_string()))?;
            Ok((parts.status, body.to_bytes().to_vec(), parts.headers))
        };
        let within = tokio::time::timeout(DEADLINE, exchange).await;
        within.unwrap_or_else(|_| Err(silent(format!("nothing within {} s", DEADLINE.as_secs()))))
    }

    fn refused(&self, method: &Method, path: &str, status: Option<StatusCode>, said: String) -> Refused {
        let path = path.split('?').next().unwrap_or(path);
        Refused { asked: format!("{method} {path}"), server: self.server.clone(), status, said }
    }
}

/// How a body is meant.
#[derive(Clone, Copy, Debug)]
enum Patch {
    Apply,
    Merge,
    None,
}

impl Patch {
    fn content_type(self) -> &'static str {
        match self {
            Self::Apply => "application/apply-patch+yaml",
            Self::Merge => "application/merge-patch+json",
            Self::None => "application/json",
        }
    }
}

/// An object without what changes though nobody changes it.
fn essence(object: &Value) -> Value {
    let mut object = object.clone();
    if let Some(metadata) = object["metadata"].as_object_mut() {
        for field in ["managedFields", "resourceVersion", "generation"] {
            metadata.remove(field);
        }
    }
    if let Some(fields) = object.as_object_mut() {
        fields.remove("status");
    }
    object
}

/// For a value in a query (RFC 3986 §3.4): all but what never means anything else there.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out.push(char::from(byte)),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

/// `Sat, 21 Nov 2026 17:13:25 GMT`, the only form that is sent.
fn http_date(text: &str) -> Option<SystemTime> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let parts: Vec<&str> = text.split(' ').collect();
    let [_, day, month, year, time, "GMT"] = parts.as_slice() else { return None };
    let month = MONTHS.iter().position(|name| name == month)? + 1;
    humantime::parse_rfc3339(&format!("{year}-{month:02}-{day}T{time}Z")).ok()
}

/// An error and what is behind it, each said once.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{fake::FakeApi, *};

    #[tokio::test]
    async fn lists_are_whole_however_many_pages_they_come_in() {
        let api = FakeApi::start().await;
        for n in 0..(PAGE + 7) {
            let name = format!("c{n:04}");
            api.put(json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": "n"}}));
        }
        api.server.know("apis/none.example/v1/things", false);
        let cluster = api.cluster();
        assert_eq!(cluster.list("/api/v1/configmaps", "").await.unwrap().len(), PAGE + 7);
        assert_eq!(
            cluster.list("/api/v1/namespaces/n/configmaps", "fieldSelector=metadata.name%3Dc0003").await.unwrap().len(),
            1
        );
        assert!(cluster.list("/apis/none.example/v1/things", "").await.unwrap().is_empty(), "a kind that is not there");
    }

    #[tokio::test]
    async fn an_error_says_what_was_asked_of_whom_and_what_to_do() {
        let api = FakeApi::start().await;
        let cluster = api.cluster();
        api.forbid("/api/v1/namespaces/n/secrets/s");
        let error = cluster.get("/api/v1/namespaces/n/secrets/s").await.unwrap_err().to_string();
        for part in [cluster.server.as_str(), "403", "GET /api/v1/namespaces/n/secrets/s", "ask for this permission"] {
            assert!(error.contains(part), "{part}: {error}");
        }
        drop(api);
        let error = cluster.get("/api/v1/nodes").await.unwrap_err().to_string();
        assert!(error.contains("does not answer") && error.contains("--context"), "{error}");
    }

    #[test]
    fn what_the_server_does_to_an_object_is_no_change_of_it() {
        let before = json!({"metadata": {"name": "a", "resourceVersion": "1", "generation": 1}, "spec": {"x": 1}, "status": {"y": 1}});
        let mut after = before.clone();
        after["metadata"]["resourceVersion"] = json!("2");
        after["status"]["y"] = json!(2);
        assert_eq!(essence(&before), essence(&after));
        after["spec"]["x"] = json!(2);
        assert_ne!(essence(&before), essence(&after));
    }

    #[test]
    fn the_servers_clock_is_read() {
        let time = http_date("Sat, 21 Nov 2026 17:13:25 GMT").unwrap();
        assert_eq!(humantime::format_rfc3339_seconds(time).to_string(), "2026-11-21T17:13:25Z");
        assert_eq!([http_date(""), http_date("Sat, 21 Foo 2026 17:13:25 GMT")], [None, None]);
    }

    #[test]
    fn a_value_with_signs_of_its_own_does_not_change_the_query() {
        assert_eq!(escape("a+b c&d#e%f=g"), "a%2Bb%20c%26d%23e%25f%3Dg");
        assert_eq!(escape("fairway.dev/install=a b"), "fairway.dev%2Finstall%3Da%20b");
    }
}
