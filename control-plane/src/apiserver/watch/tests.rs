use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use http::{Request, Response, StatusCode};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Client, ResourceExt as _, client::Body};
use serde_json::{Value, json};

use super::*;

/// What the API server answers, request by request; the last answer is given for ever.
fn client(script: Vec<(StatusCode, Value)>) -> Client {
    let script = Mutex::new(VecDeque::from(script));
    answering(move |_| {
        let mut script = script.lock().unwrap();
        if script.len() > 1 { script.pop_front().unwrap() } else { script[0].clone() }
    })
}

/// What the API server answers, by path.
fn answering(answer: impl Fn(&str) -> (StatusCode, Value) + Send + Sync + 'static) -> Client {
    let answer = Arc::new(answer);
    let service = tower::service_fn(move |request: Request<Body>| {
        let (code, body) = answer(request.uri().path());
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
        Event::Unserved(why) => format!("unserved: {why}"),
        Event::Failing(_) => "failing".to_owned(),
        Event::Recovered => "recovered".to_owned(),
    }
}

/// What is told up to and with the last of these.
async fn hear(script: Vec<(StatusCode, Value)>, expected: &[&str]) -> Duration {
    hear_of(client(script), None, expected).await
}

async fn hear_of(client: Client, doubted: Option<ApiResource>, expected: &[&str]) -> Duration {
    let (sender, mut events) = mpsc::channel(1);
    let api: Api<ConfigMap> = Api::all(client);
    let began = Instant::now();
    let heard = async {
        for expected in expected {
            assert_eq!(events.recv().await.as_deref(), Some(*expected));
        }
        began.elapsed()
    };
    tokio::select! {
        () = watch(api, "", doubted, sender, told) => panic!("it ended"),
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

fn policies() -> Option<ApiResource> {
    let (group, version, plural) = ("security.istio.io", "v1", "authorizationpolicies");
    let kind = "AuthorizationPolicy".to_owned();
    let api_version = format!("{group}/{version}");
    Some(ApiResource { group: group.into(), version: version.into(), api_version, kind, plural: plural.into() })
}

/// A server that has a kind at one version, and lists nothing.
fn offering(version: &'static str) -> Client {
    let group = format!("/apis/security.istio.io/{version}");
    answering(move |path| match path {
        "/apis/security.istio.io" => {
            let versions = json!([{"groupVersion": format!("security.istio.io/{version}"), "version": version}]);
            (
                StatusCode::OK,
                json!({"kind": "APIGroup", "apiVersion": "v1", "name": "security.istio.io", "versions": versions}),
            )
        }
        path if path == group => {
            let resource = json!({"name": "authorizationpolicies", "singularName": "", "namespaced": true, "kind": "AuthorizationPolicy", "verbs": []});
            (
                StatusCode::OK,
                json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": "", "resources": [resource]}),
            )
        }
        _ => failure(StatusCode::NOT_FOUND),
    })
}

#[tokio::test(start_paused = true)]
async fn a_doubted_kind_that_was_never_known_is_believed_absent_only_after_a_while() {
    let nowhere = || client(vec![failure(StatusCode::NOT_FOUND)]);
    let waits = ["listing", "listing", "listing", "listing", "unknown", "listing", "unknown"];
    assert!(hear_of(nowhere(), policies(), &waits).await >= UNKNOWN_BELIEVED);
}

#[tokio::test(start_paused = true)]
async fn a_doubted_kind_without_definition_is_absent_at_once() {
    const NAME: &str = "authorizationpolicies.security.istio.io";
    let of = |name: &'static str| {
        answering(move |path| match path.strip_prefix("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/") {
            Some(NAME) => {
                let (code, mut status) = failure(StatusCode::NOT_FOUND);
                status["details"] =
                    json!({"group": "apiextensions.k8s.io", "kind": "customresourcedefinitions", "name": name});
                (code, status)
            }
            _ => failure(StatusCode::NOT_FOUND),
        })
    };
    assert!(hear_of(of(NAME), policies(), &["listing", "unknown"]).await < UNKNOWN_RETRY);
    let waits = ["listing", "listing", "listing", "listing", "unknown"];
    assert!(hear_of(of("something.else"), policies(), &waits).await >= UNKNOWN_BELIEVED);
}

#[tokio::test(start_paused = true)]
async fn a_doubted_kind_that_a_server_knows_a_little_later_is_never_told_to_be_absent() {
    let lists = AtomicUsize::new(0);
    let starting = answering(move |path| match path {
        "/api/v1/configmaps" if lists.fetch_add(1, Ordering::Relaxed) >= 2 => list(&["a"]),
        _ => failure(StatusCode::NOT_FOUND),
    });
    hear_of(starting, policies(), &["listing", "listing", "listing", "set a", "listed"]).await;
}

#[tokio::test(start_paused = true)]
async fn a_doubted_kind_at_another_version_is_never_believed_absent() {
    let told = "unserved: the API server has authorizationpolicies.security.istio.io at version v1beta1 and not at v1, which is read here: install definitions that serve v1 (those of `fairwayd definitions`, or of a newer Istio)";
    let long = ["listing", told].repeat(8);
    assert!(hear_of(offering("v1beta1"), policies(), &long).await >= 2 * UNKNOWN_BELIEVED);
    let told =
        "unserved: the API server has authorizationpolicies.security.istio.io at version v1 and does not serve it yet";
    hear_of(offering("v1"), policies(), &["listing", told, "listing", told]).await;
}

#[tokio::test(start_paused = true)]
async fn a_doubted_kind_is_not_believed_absent_while_the_server_does_not_say_what_it_has() {
    let silent = answering(|path| match path {
        "/apis/security.istio.io" => failure(StatusCode::SERVICE_UNAVAILABLE),
        _ => failure(StatusCode::NOT_FOUND),
    });
    hear_of(silent, policies(), &["listing", "failing"].repeat(8)).await;
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_decoded_is_not_skipped_but_listed() {
    let event = (StatusCode::OK, json!({"type": "ADDED", "object": "nonsense"}));
    hear(vec![list(&[]), event, list(&["a"])], &["listing", "listed", "failing", "listing", "recovered", "set a"])
        .await;
}
