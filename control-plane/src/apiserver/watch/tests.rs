use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
};

use http::{Request, Response, StatusCode};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Client, ResourceExt as _, client::Body};
use serde_json::{Value, json};

use super::*;

/// What the API server answers, request by request; the last answer is given for ever.
fn client(script: Vec<(StatusCode, Value)>) -> Client {
    let script = Arc::new(Mutex::new(VecDeque::from(script)));
    let service = tower::service_fn(move |_: Request<Body>| {
        let mut script = script.lock().unwrap();
        let (code, body) = if script.len() > 1 { script.pop_front().unwrap() } else { script[0].clone() };
        let response = Response::builder().status(code).body(Body::from(format!("{body}\n").into_bytes())).unwrap();
        async move { Ok::<_, std::convert::Infallible>(response) }
    });
    Client::new(service, "default")
}

fn list(names: &[&str]) -> (StatusCode, Value) {
    let item = |name: &&str| json!({"metadata": {"name": name, "resourceVersion": "1"}});
    let items: Vec<Value> = names.iter().map(item).collect();
    (StatusCode::OK, json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": items}))
}

fn failure(code: StatusCode) -> (StatusCode, Value) {
    let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": "m", "reason": "r", "code": code.as_u16()});
    (code, status)
}

fn told(event: Event<ConfigMap>) -> String {
    match event {
        Event::Listing => "listing".to_owned(),
        Event::Set(object) => format!("set {}", object.name_any()),
        Event::Listed => "listed".to_owned(),
        Event::Gone(object) => format!("gone {}", object.name_any()),
        Event::Unknown => "unknown".to_owned(),
        Event::Failing(_) => "failing".to_owned(),
        Event::Recovered => "recovered".to_owned(),
    }
}

/// What is told up to and with the last of these.
async fn hear(script: Vec<(StatusCode, Value)>, expected: &[&str]) -> Duration {
    let (sender, mut events) = mpsc::channel(1);
    let api: Api<ConfigMap> = Api::all(client(script));
    let began = Instant::now();
    let heard = async {
        for expected in expected {
            assert_eq!(events.recv().await.as_deref(), Some(*expected));
        }
        began.elapsed()
    };
    tokio::select! {
        () = watch(api, "", sender, told) => panic!("it ended"),
        elapsed = heard => elapsed,
    }
}

#[tokio::test(start_paused = true)]
async fn a_version_that_is_too_old_to_begin_with_leads_to_a_new_list() {
    let script = vec![list(&["a"]), failure(StatusCode::GONE), list(&["b"]), failure(StatusCode::GONE)];
    hear(script, &["listing", "set a", "listed", "failing", "listing", "recovered", "set b", "listed"]).await;
}

#[tokio::test(start_paused = true)]
async fn a_kind_that_vanishes_is_believed_gone_only_after_a_while() {
    let at_once = hear(vec![failure(StatusCode::NOT_FOUND)], &["listing", "unknown"]).await;
    assert!(at_once < UNKNOWN_RETRY, "one that never was known has no objects");
    let script = vec![list(&["a"]), failure(StatusCode::NOT_FOUND)];
    let first = ["listing", "set a", "listed", "listing", "listing", "listing", "unknown"];
    assert!(hear(script, &first).await >= UNKNOWN_BELIEVED);
    let script = vec![list(&["a"]), failure(StatusCode::NOT_FOUND), failure(StatusCode::NOT_FOUND), list(&["a"])];
    hear(script, &["listing", "set a", "listed", "listing", "listing", "set a", "listed"]).await;
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_decoded_is_not_skipped_but_listed() {
    let event = (StatusCode::OK, json!({"type": "ADDED", "object": "nonsense"}));
    hear(vec![list(&[]), event, list(&["a"])], &["listing", "listed", "failing", "listing", "recovered", "set a"])
        .await;
}
