//! The socket the plugin calls: HTTP/1.1, one route.

use std::{convert::Infallible, fs, io, os::unix::fs::PermissionsExt, path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Method, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use mesh_runtime::drain::DrainWatcher;
use tokio::{
    net::{UnixListener, UnixStream},
    sync::{Semaphore, mpsc, oneshot},
    task::JoinSet,
    time::timeout,
};

use crate::request::{AddAnswer, AddRequest, MAX_BODY, parse_request, socket_path};

/// A plugin's question and where its answer goes.
#[derive(Debug)]
pub struct AddCall {
    pub request: AddRequest,
    /// `Err`: the reason, in words for the pod's event.
    pub reply: oneshot::Sender<Result<AddAnswer, String>>,
}

/// After a failed accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
const MAX_CONNECTIONS: usize = 256;
const READ_LIMIT: Duration = Duration::from_secs(2);

/// Binds the plugin's socket in the run directory, replacing one left behind. Only root may connect.
pub fn bind(run_dir: &Path) -> io::Result<UnixListener> {
    fs::create_dir_all(run_dir)?;
    let path = socket_path(run_dir);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves until the drain starts, then lets open requests finish.
pub async fn serve(listener: UnixListener, calls: mpsc::Sender<AddCall>, drain: DrainWatcher) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    let stop = drain.signalled();
    tokio::pin!(stop);
    loop {
        let accepted = tokio::select! {
            _ = &mut stop => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => continue,
            accepted = async { (permits.clone().acquire_owned().await, listener.accept().await) } => accepted,
        };
        match accepted {
            (Ok(permit), Ok((stream, _))) => {
                let calls = calls.clone();
                connections.spawn(async move {
                    connection(stream, calls).await;
                    drop(permit);
                });
            }
            (_, Err(error)) => {
                // Out of descriptors, most likely: spinning would make it worse.
                tracing::warn!(%error, "cannot accept the plugin's connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
            // The semaphore is never closed.
            (Err(_), Ok(_)) => {}
        }
    }
    connections.join_all().await;
}

async fn connection(stream: UnixStream, calls: mpsc::Sender<AddCall>) {
    let service = service_fn(|request| {
        let calls = calls.clone();
        async move {
            let (status, body) = answer(request, &calls).await;
            tracing::debug!(%status, body, "plugin request");
            let mut response = http::Response::new(Full::new(Bytes::from(body)));
            *response.status_mut() = status;
            Ok::<_, Infallible>(response)
        }
    });
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(READ_LIMIT)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = serving.await {
        tracing::debug!(%error, "plugin connection ended");
    }
}

async fn answer(request: http::Request<Incoming>, calls: &mpsc::Sender<AddCall>) -> (StatusCode, String) {
    if (request.method(), request.uri().path()) != (&Method::POST, "/cmdadd") {
        return (StatusCode::NOT_FOUND, "there is only POST /cmdadd".into());
    }
    let body = match timeout(READ_LIMIT, Limited::new(request.into_body(), MAX_BODY).collect()).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(error)) => return (StatusCode::BAD_REQUEST, format!("the body cannot be read: {error}")),
        Err(_) => return (StatusCode::REQUEST_TIMEOUT, "the body did not arrive in time".into()),
    };
    match parse_request(&body) {
        Ok(request) => ask(request, calls).await,
        Err(problem) => (StatusCode::BAD_REQUEST, problem),
    }
}

async fn ask(request: AddRequest, calls: &mpsc::Sender<AddCall>) -> (StatusCode, String) {
    let (reply, answer) = oneshot::channel();
    if calls.send(AddCall { request, reply }).await.is_err() {
        return (StatusCode::SERVICE_UNAVAILABLE, "the node agent is stopping".into());
    }
    match answer.await {
        Ok(Ok(answer)) => (StatusCode::OK, serde_json::to_string(&answer).unwrap_or_default()),
        Ok(Err(reason)) => (StatusCode::INTERNAL_SERVER_ERROR, reason),
        Err(_) => (StatusCode::SERVICE_UNAVAILABLE, "the node agent is stopping".into()),
    }
}

#[cfg(test)]
mod tests {
    use mesh_runtime::drain;

    use super::*;
    use crate::request::post;

    #[tokio::test]
    async fn questions_reach_the_agent_and_nonsense_does_not() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (calls, mut asked) = mpsc::channel(1);
        let (trigger, watcher) = drain::channel();
        let serving = tokio::spawn(serve(bind(dir.path()).expect("bind"), calls, watcher));
        let socket = socket_path(dir.path());
        let send = move |path: &'static str, body: &'static str| {
            let socket = socket.clone();
            tokio::task::spawn_blocking(move || {
                post(&socket, path, body.into(), Duration::from_secs(10)).expect("answer")
            })
        };
        assert_eq!(send("/other", "{}").await.expect("sent").0, 404);
        let (status, why) = send("/cmdadd", "{").await.expect("sent");
        assert_eq!((status, why.contains("not an ADD request")), (400, true));
        let question = send("/cmdadd", r#"{"Netns":"/n","PodName":"a","PodNamespace":"b"}"#);
        let call = asked.recv().await.expect("asked");
        assert_eq!(call.request.pod_name, "a");
        call.reply.send(Err("no ztunnel is connected".into())).expect("waiting");
        assert_eq!(question.await.expect("sent"), (500, "no ztunnel is connected".into()));
        trigger.drain(Duration::from_secs(5)).await;
        serving.await.expect("served");
    }
}
