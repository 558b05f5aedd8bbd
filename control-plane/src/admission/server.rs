//! The HTTPS server the API server calls: `POST /validate`.

use std::{convert::Infallible, sync::Arc, time::Duration};

use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use mesh_runtime::{
    admin::{Response, json, text},
    crowd::Crowd,
    drain::DrainWatcher,
};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, mpsc},
};
use tokio_util::sync::CancellationToken;

use super::{judgement::judge, message};
use crate::{
    app::TaskFailed,
    metrics::Metrics,
    objects::Settings,
    tls::{self, Certificate, Connection},
};

const PATH: &str = "/validate";
/// What an API server takes from a user, and sends on.
const MAX_BODY: usize = 3 * 1024 * 1024;
/// Of a connection, which carries one request: the API server gives up after two seconds.
const DEADLINE: Duration = Duration::from_secs(5);
/// Requests being received at once. One more takes the place of the oldest: anybody may connect, and the API server waits for two seconds.
const AT_ONCE: usize = 32;
/// Of them, being judged: each holds its object as a tree.
const JUDGED_AT_ONCE: usize = 2;
/// Answers under way may go out this long after the drain began.
const GRACE: Duration = Duration::from_millis(500);

struct Reviewer {
    settings: Settings,
    metrics: Metrics,
    judging: Arc<Semaphore>,
}

/// Serves until the drain.
pub(crate) async fn serve(
    listener: TcpListener,
    certificate: Certificate,
    settings: Settings,
    metrics: Metrics,
    drain: DrainWatcher,
) -> Result<(), TaskFailed> {
    let reviewer = Arc::new(Reviewer { settings, metrics, judging: Arc::new(Semaphore::new(JUDGED_AT_ONCE)) });
    let (stop_accepting, stop) = (CancellationToken::new(), CancellationToken::new());
    let (sender, mut connections) = mpsc::channel(1);
    let accepting = tls::accept(listener, certificate, sender, stop_accepting.clone(), stop.clone());
    let serving = async {
        let mut requests = Crowd::new(AT_ONCE);
        while let Some(connection) = connections.recv().await {
            let Ok(connection) = connection else { continue };
            if requests.admit(one(connection, reviewer.clone())) {
                reviewer.count("displaced");
            }
        }
        requests.finish().await;
    };
    let ending = async {
        let (_, guard) = drain.signalled().await;
        stop_accepting.cancel();
        tokio::time::sleep(GRACE).await;
        stop.cancel();
        drop(guard);
    };
    tokio::join!(accepting, serving, ending);
    Ok(())
}

/// One request, then the end: kept alive, a connection would stay with one replica, and could be closed under a request.
async fn one(connection: Connection, reviewer: Arc<Reviewer>) {
    let service = service_fn(|request| {
        let reviewer = reviewer.clone();
        async move { Ok::<_, Infallible>(reviewer.answer(request).await) }
    });
    let mut http = http1::Builder::new();
    http.keep_alive(false);
    match tokio::time::timeout(DEADLINE, http.serve_connection(TokioIo::new(connection), service)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a request for review was broken off"),
        Err(_) => {
            reviewer.count("timed_out");
            tracing::debug!("a request for review took longer than {DEADLINE:?}");
        }
    }
}

impl Reviewer {
    fn count(&self, result: &str) {
        self.metrics.admission_reviews.with_label_values(&[result]).inc();
    }

    async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Response {
        if request.uri().path() != PATH {
            return text(StatusCode::NOT_FOUND, format!("there is {PATH} only\n"));
        }
        if request.method() != Method::POST {
            return text(StatusCode::METHOD_NOT_ALLOWED, "use POST\n");
        }
        let body = match Limited::new(request.into_body(), MAX_BODY).collect().await {
            Ok(body) => body.to_bytes(),
            Err(error) if error.is::<LengthLimitError>() => {
                self.count("oversized");
                return text(StatusCode::PAYLOAD_TOO_LARGE, format!("at most {MAX_BODY} bytes\n"));
            }
            Err(error) => {
                self.count("malformed");
                return text(StatusCode::BAD_REQUEST, format!("{error}\n"));
            }
        };
        let permit = self.judging.clone().acquire_owned().await;
        let reviewer = self.clone();
        let reviewed = tokio::task::spawn_blocking(move || {
            // Until it has ended, whether or not anybody still waits for it.
            let _permit = permit;
            reviewer.review(&body)
        });
        reviewed.await.unwrap_or_else(|error| {
            self.count("failed");
            tracing::error!(%error, "a review ended without an answer");
            text(StatusCode::INTERNAL_SERVER_ERROR, "the review failed\n")
        })
    }

    /// Computes for a while if the object is large.
    fn review(&self, body: &[u8]) -> Response {
        let request = match message::read(body) {
            Ok(request) => request,
            Err(why) => {
                self.count("malformed");
                return text(StatusCode::BAD_REQUEST, format!("{why}\n"));
            }
        };
        let judgement = judge(&request, &self.settings);
        self.count(judgement.label());
        tracing::debug!(kind = request.kind.kind, operation = request.operation, ?judgement, "reviewed");
        json(StatusCode::OK, message::answer(&request, &judgement).to_string())
    }
}
