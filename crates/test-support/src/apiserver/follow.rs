//! Watches.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::{Response, body::Frame};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::{Mood, Shared, answer::Body, lock, request::Target};

/// Events that wait for a client.
const QUEUE: usize = 16;

pub(super) fn watch(shared: Arc<Shared>, target: Target) -> Response<Body> {
    let (sender, events) = mpsc::channel(QUEUE);
    // Ends when the client goes, or is sent away.
    tokio::spawn(async move {
        // As real ones do, though not at once when nobody says how long.
        let length = Duration::from_secs(target.number("timeoutSeconds").unwrap_or(3600));
        drop(tokio::time::timeout(length, follow(&shared, &target, sender)).await);
    });
    let mut response = Response::new(StreamBody::new(ReceiverStream::new(events)).boxed_unsync());
    let json = hyper::header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(hyper::header::CONTENT_TYPE, json);
    response
}

type Line = Result<Frame<Bytes>, std::convert::Infallible>;

async fn follow(shared: &Shared, target: &Target, sender: mpsc::Sender<Line>) {
    let (mut changed, mut cut) = (shared.changed.subscribe(), shared.cut.subscribe());
    let mut mood = shared.mood.subscribe();
    let mut seen = target.number("resourceVersion").unwrap_or(0);
    loop {
        changed.mark_unchanged();
        let told = news(shared, target, &mut seen);
        let now = mood.wait_for(|mood| *mood != Mood::Frozen).await.map(|mood| *mood).ok();
        if now != Some(Mood::Working) {
            return;
        }
        for line in told {
            if sender.send(Ok(Frame::data(Bytes::from(line)))).await.is_err() {
                return;
            }
        }
        tokio::select! {
            changed = changed.changed() => if changed.is_err() { return },
            changed = mood.changed() => if changed.is_err() { return },
            _ = cut.changed() => return,
            () = sender.closed() => return,
        }
    }
}

/// What happened since, one line for each event.
fn news(shared: &Shared, target: &Target, seen: &mut u64) -> Vec<String> {
    let line = |change: &str, object: Value| format!("{}\n", json!({"type": change, "object": object}));
    let store = lock(&shared.store);
    if *seen < store.forgotten {
        let gone = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "too old", "reason": "Expired", "code": 410});
        return vec![line("ERROR", gone)];
    }
    let new = store.log_after(&target.resource, *seen).iter();
    let new = new.filter(|logged| target.selects(&logged.key, || logged.text.value()));
    let event = |change: &str, object: &str| format!("{{\"type\":\"{change}\",\"object\":{object}}}\n");
    let mut told: Vec<String> = new.map(|logged| event(logged.change, &logged.text.whole())).collect();
    if told.is_empty() && store.version > *seen && shared.options.bookmarks {
        let metadata = json!({"resourceVersion": store.version.to_string()});
        told.push(line("BOOKMARK", json!({"kind": "Bookmark", "apiVersion": "v1", "metadata": metadata})));
    }
    *seen = store.version.max(*seen);
    told
}
