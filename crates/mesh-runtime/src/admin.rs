//! The small HTTP/1.1 server behind admin, metrics and readiness ports.

use std::{collections::BTreeMap, convert::Infallible, future::Future, io, pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};

use crate::{crowd::Crowd, drain::DrainWatcher, metrics::Registry, readiness::Readiness};

pub mod scrape;

/// Open admin connections at once. One more takes the place of the oldest, so that nobody who does not read what he asked for keeps the
/// kubelet's probes out.
const MAX_CONNECTIONS: usize = 64;
const HEADER_TIMEOUT: Duration = Duration::from_secs(2);
const HEADER_BYTES: usize = 8 * 1024;

/// What a handler sees: method, path, decoded query, headers. Bodies are not read.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: Method,
    pub path: String,
    pub query: BTreeMap<String, String>,
    pub headers: HeaderMap,
}

impl Request {
    /// A query parameter, empty counting as absent.
    pub fn query(&self, name: &str) -> Option<&str> {
        self.query.get(name).map(String::as_str).filter(|v| !v.is_empty())
    }
}

pub type Response = http::Response<Full<Bytes>>;
type HandlerFuture = Pin<Box<dyn Future<Output = Response> + Send>>;
type Handler = Arc<dyn Fn(Request) -> HandlerFuture + Send + Sync>;

/// Routes of one port.
#[derive(Clone, Default)]
pub struct AdminServer {
    routes: BTreeMap<String, Handler>,
}

impl std::fmt::Debug for AdminServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AdminServer").field("routes", &self.routes.keys()).finish()
    }
}

impl AdminServer {
    pub fn new() -> Self {
        Self::default()
    }

    /// Serves `path` exactly.
    #[must_use]
    pub fn route<F, R>(mut self, path: &str, handler: F) -> Self
    where
        F: Fn(Request) -> R + Send + Sync + 'static,
        R: Future<Output = Response> + Send + 'static,
    {
        self.routes.insert(path.to_owned(), Arc::new(move |request| Box::pin(handler(request))));
        self
    }

    /// `/metrics` and `/stats/prometheus`: OpenMetrics text, compressed as the scraper asks.
    #[must_use]
    pub fn metrics(self, registry: &Registry) -> Self {
        let (a, b) = (registry.clone(), registry.clone());
        self.route("/metrics", move |request| scrape::metrics(a.clone(), request))
            .route("/stats/prometheus", move |request| scrape::metrics(b.clone(), request))
    }

    /// `path` answers 200 `ready`, or 500 naming what is pending.
    #[must_use]
    pub fn readiness(self, path: &str, readiness: &Readiness) -> Self {
        let readiness = readiness.clone();
        self.route(path, move |request| std::future::ready(ready(&request, &readiness)))
    }

    /// Serves until the drain starts, then finishes requests in flight.
    ///
    /// # Errors
    /// When the listener cannot be registered with the runtime.
    pub async fn serve(self, listener: std::net::TcpListener, drain: DrainWatcher) -> io::Result<()> {
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        let routes = Arc::new(self);
        let mut connections = Crowd::new(MAX_CONNECTIONS);
        let stop = drain.signalled();
        tokio::pin!(stop);
        loop {
            let accepted = tokio::select! {
                _ = &mut stop => break,
                // Reap what has finished; an empty set is disabled by the guard.
                Some(_) = connections.ended(), if !connections.is_empty() => continue,
                accepted = accept(&listener) => accepted,
            };
            let Some(stream) = accepted else { continue };
            connections.admit(connection(routes.clone(), stream, drain.clone()));
        }
        connections.finish().await;
        Ok(())
    }
}

async fn accept(listener: &TcpListener) -> Option<TcpStream> {
    match listener.accept().await {
        Ok((stream, _)) => Some(stream),
        Err(error) => {
            // Out of descriptors, most likely: spinning would make it worse.
            tracing::warn!(%error, "admin accept failed");
            tokio::time::sleep(Duration::from_millis(50)).await;
            None
        }
    }
}

async fn connection(routes: Arc<AdminServer>, stream: TcpStream, drain: DrainWatcher) {
    let service = service_fn(|request: http::Request<Incoming>| {
        let routes = routes.clone();
        async move { Ok::<_, Infallible>(dispatch(&routes, &request).await) }
    });
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(HEADER_BYTES)
        .half_close(true)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(serving);
    let result = tokio::select! {
        result = &mut serving => result,
        (_, _guard) = drain.signalled() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "admin connection ended");
    }
}

async fn dispatch(routes: &AdminServer, request: &http::Request<Incoming>) -> Response {
    let path = request.uri().path();
    let Some(handler) = routes.routes.get(path) else {
        let known: Vec<&str> = routes.routes.keys().map(String::as_str).collect();
        return text(StatusCode::NOT_FOUND, format!("no such page; there are: {}\n", known.join(" ")));
    };
    let request = Request {
        method: request.method().clone(),
        path: path.to_owned(),
        query: parse_query(request.uri().query().unwrap_or_default()),
        headers: request.headers().clone(),
    };
    handler(request).await
}

fn ready(request: &Request, readiness: &Readiness) -> Response {
    if request.method != Method::GET {
        return text(StatusCode::METHOD_NOT_ALLOWED, "use GET\n");
    }
    match readiness.list() {
        pending if pending.is_empty() => text(StatusCode::OK, "ready\n"),
        pending => text(StatusCode::INTERNAL_SERVER_ERROR, format!("not ready, pending: {}\n", pending.join(", "))),
    }
}

/// A plain-text answer.
pub fn text(status: StatusCode, body: impl Into<Bytes>) -> Response {
    answer(status, "text/plain; charset=utf-8", body.into())
}

/// An HTML answer.
pub fn html(status: StatusCode, body: impl Into<Bytes>) -> Response {
    answer(status, "text/html; charset=utf-8", body.into())
}

/// A binary answer.
pub fn binary(status: StatusCode, body: impl Into<Bytes>) -> Response {
    answer(status, "application/octet-stream", body.into())
}

/// A JSON answer; the body is already encoded.
pub fn json(status: StatusCode, body: impl Into<Bytes>) -> Response {
    answer(status, "application/json", body.into())
}

fn answer(status: StatusCode, content_type: &'static str, body: Bytes) -> Response {
    let mut response = http::Response::new(Full::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    response
}

/// `a=b&c=d` with percent-decoding; a later value of the same name wins.
pub fn parse_query(query: &str) -> BTreeMap<String, String> {
    query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .map(|(k, v)| (percent_decode(k), percent_decode(v)))
        .collect()
}

fn percent_decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let hex = bytes
            .get(i + 1..i + 3)
            .and_then(|h| std::str::from_utf8(h).ok())
            .and_then(|h| u8::from_str_radix(h, 16).ok());
        match (bytes[i], hex) {
            (b'%', Some(byte)) => {
                out.push(byte);
                i += 3;
            }
            (b'+', _) => {
                out.push(b' ');
                i += 1;
            }
            (byte, _) => {
                out.push(byte);
                i += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::drain;

    async fn ask(address: std::net::SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn serves_readiness_metrics_and_says_what_exists() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (trigger, watcher) = drain::channel();
        let readiness = Readiness::default();
        let pending = readiness.pending("xds");
        let server = AdminServer::new().metrics(&Registry::new()).readiness("/healthz/ready", &readiness);
        let serving = tokio::spawn(server.serve(listener, watcher));

        let get = |path: &str| format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        assert!(ask(address, &get("/healthz/ready")).await.contains("not ready, pending: xds"));
        drop(pending);
        assert!(ask(address, &get("/healthz/ready")).await.starts_with("HTTP/1.1 200"));
        assert!(ask(address, &get("/metrics")).await.contains("process_open_fds"));
        assert!(ask(address, &get("/nothing")).await.contains("there are: /healthz/ready /metrics"));
        assert!(ask(address, "\u{1}\u{2} nonsense\r\n\r\n").await.starts_with("HTTP/1.1 400"));

        assert_eq!(trigger.drain(Duration::from_secs(5)).await, drain::Drained::Complete);
        serving.await.unwrap().unwrap();
    }

    fn serve() -> (std::net::SocketAddr, drain::DrainTrigger) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (trigger, watcher) = drain::channel();
        tokio::spawn(AdminServer::new().readiness("/healthz/ready", &Readiness::default()).serve(listener, watcher));
        (address, trigger)
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_dawdles_over_its_headers_is_hung_up_on() {
        let (address, _trigger) = serve();
        assert_eq!(ask(address, "GET /healthz/ready HTTP/1.1\r\nhost: x").await, "");
    }

    #[tokio::test]
    async fn peers_who_take_every_place_and_stay_keep_nobody_out() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (_trigger, watcher) = drain::channel();
        let server = AdminServer::new().readiness("/healthz/ready", &Readiness::default());
        // As a page is that its reader does not read.
        let server = server.route("/endless", |_| std::future::pending());
        let serving = tokio::spawn(server.serve(listener, watcher));
        let mut staying = Vec::new();
        for _ in 0..=MAX_CONNECTIONS {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(b"GET /endless HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
            staying.push(stream);
        }
        let request = "GET /healthz/ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        let asked = tokio::time::timeout(Duration::from_secs(30), ask(address, request));
        assert!(asked.await.expect("answered").starts_with("HTTP/1.1 200"));
        serving.abort();
    }

    #[tokio::test]
    async fn headers_beyond_the_buffer_are_refused() {
        let (address, _trigger) = serve();
        let request = format!("GET /healthz/ready HTTP/1.1\r\nhost: x\r\nlong: {}", "x".repeat(HEADER_BYTES));
        assert!(ask(address, &request).await.starts_with("HTTP/1.1 431"));
    }

    #[tokio::test]
    async fn a_client_may_close_its_side_before_it_has_its_answer() {
        let (address, _trigger) = serve();
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET /healthz/ready HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("ready\n"), "{answer}");
    }

    #[tokio::test]
    async fn readiness_is_asked_by_get_alone() {
        let (address, _trigger) = serve();
        let answer = ask(address, "POST /healthz/ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 405"), "{answer}");
    }

    #[test]
    fn queries_decode() {
        let query = parse_query("a=1&b=x%2Fy+z&c&a=2&d=%zz");
        assert_eq!(query["a"], "2");
        assert_eq!(query["b"], "x/y z");
        assert_eq!(query["c"], "");
        assert_eq!(query["d"], "%zz");
    }
}
