use serde_json::{Value, json};

use super::*;
use crate::admission::message;

fn settings() -> Settings {
    Settings { root_namespace: "istio-system".into(), revision: "default".into() }
}

fn review(operation: &str, object: &Value, old: &Value) -> Value {
    let (group, kind) = (object["apiVersion"].as_str().unwrap_or("x/v1"), object["kind"].as_str().unwrap_or("X"));
    let group = group.split_once('/').map_or("", |(group, _)| group);
    json!({
        "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
        "request": {
            "uid": "u-1", "kind": {"group": group, "version": "v1", "kind": kind}, "operation": operation,
            "name": "x", "namespace": "demo", "object": object, "oldObject": old, "options": {}, "dryRun": false,
        },
    })
}

/// What is judged, and the answer to it.
fn asked(review: &Value) -> (Judgement, Value) {
    let body = review.to_string();
    let request = message::read(body.as_bytes()).unwrap();
    let judgement = judge(&request, &settings());
    let answer = message::answer(&request, &judgement);
    assert_eq!((&answer["response"]["uid"], &answer["kind"]), (&json!("u-1"), &json!("AdmissionReview")));
    assert_eq!(answer["response"]["allowed"], !matches!(judgement, Judgement::Denied(_)));
    (judgement, answer["response"].clone())
}

fn created(object: &Value) -> (Judgement, Value) {
    asked(&review("CREATE", object, &Value::Null))
}

fn object(api_version: &str, kind: &str, spec: Value) -> Value {
    json!({
        "apiVersion": api_version, "kind": kind, "metadata": {"name": "x", "namespace": "demo", "managedFields": [{}]},
        "spec": spec,
    })
}

fn policy(spec: Value) -> Value {
    object("security.istio.io/v1", "AuthorizationPolicy", spec)
}

fn peers(spec: Value) -> Value {
    object("security.istio.io/v1", "PeerAuthentication", spec)
}

fn entry(spec: Value) -> Value {
    object("networking.istio.io/v1", "ServiceEntry", spec)
}

fn workload(spec: Value) -> Value {
    object("networking.istio.io/v1", "WorkloadEntry", spec)
}

#[test]
fn what_means_what_it_says_is_allowed_without_a_word() {
    let of_another = {
        let mut of_another = policy(json!({"rules": [{"form": []}]}));
        of_another["metadata"]["labels"] = json!({"istio.io/rev": "other"});
        of_another
    };
    for good in [
        policy(
            json!({"rules": [{"from": [{"source": {"namespaces": ["a"]}}], "to": [{"operation": {"ports": ["80"]}}]}]}),
        ),
        policy(json!({})),
        policy(
            json!({"targetRefs": [{"kind": "Service", "name": "w"}], "rules": [{"to": [{"operation": {"paths": ["/"]}}]}]}),
        ),
        policy(
            json!({"targetRefs": [{"kind": "Service", "name": "w"}], "action": "CUSTOM", "provider": {"name": "p"}, "rules": [{}]}),
        ),
        peers(json!({"mtls": {"mode": "STRICT"}})),
        entry(
            json!({"hosts": ["a.example"], "resolution": "DNS", "ports": [{"number": 443, "name": "tls", "protocol": "TLS"}]}),
        ),
        workload(json!({"address": "10.0.0.1", "labels": {"app": "a"}})),
        of_another,
    ] {
        assert_eq!(created(&good), (Judgement::Allowed, json!({"uid": "u-1", "allowed": true})), "{good}");
    }
}

#[test]
fn what_is_wrong_is_denied_with_every_problem_its_field_and_its_remedy() {
    let told = |object: &Value| {
        let (judgement, response) = created(object);
        assert_eq!(judgement.label(), "denied", "{object}");
        assert_eq!(response["status"]["code"], 422);
        response["status"]["message"].as_str().unwrap().to_owned()
    };
    let both = policy(json!({"action": "PERMIT", "rules": [{"form": []}]}));
    let expected = "AuthorizationPolicy demo/x would not mean what it says:\n\
        - spec.action: `PERMIT` is not an action; expected ALLOW or DENY\n\
        - spec.rules[0].form: unknown field; did you mean `from`?";
    assert_eq!(told(&both), expected);
    for (wrong, part) in [
        (peers(json!({"mtls": {"mode": "STRONG"}})), "- spec.mtls.mode: `STRONG` is not valid here; expected one of"),
        (entry(json!({"hosts": ["a.example"], "resolution": "DSN"})), "- spec.resolution: "),
        (workload(json!({"address": "nowhere!"})), "- spec.address: "),
        (policy(json!([])), "- spec: expected fields, found a list"),
    ] {
        let told = told(&wrong);
        assert!(told.contains(part), "{part}: {told}");
    }
    let many: Vec<Value> = (0..1000).map(|_| json!({"x".repeat(5000): 1})).collect();
    let told = told(&policy(json!({"rules": many})));
    assert!(told.ends_with("- … and 980 more") && told.len() < 40_000, "{} bytes", told.len());
}

#[test]
fn an_object_that_is_yet_to_be_named_is_judged_too() {
    let mut unnamed = policy(json!({"rules": [{}]}));
    unnamed["metadata"] = json!({"generateName": "x-", "namespace": "demo"});
    assert_eq!(created(&unnamed).0, Judgement::Allowed);
    unnamed["spec"] = json!({"rule": []});
    let Judgement::Denied(told) = created(&unnamed).0 else { panic!() };
    assert!(told.starts_with("AuthorizationPolicy demo/x-00000 would"), "{told}");
}

#[test]
fn what_has_less_effect_than_it_says_is_allowed_with_a_warning() {
    for (object, warning) in [
        (
            policy(json!({"rules": [{"to": [{"operation": {"paths": ["/"]}}]}]})),
            "spec.rules[0]: layer-7 conditions (spec.rules[0].to[0].operation.paths) are not known at layer 4: the rule is left out, so it \
             allows nothing; use a waypoint, or ports and sources only",
        ),
        (
            policy(json!({"action": "AUDIT", "rules": [{}]})),
            "its condition ZtunnelAccepted will be False: spec.action: AUDIT has no effect at layer 4; annotate an ALLOW or DENY policy \
             with istio.io/dry-run: \"true\"",
        ),
        // For others than ztunnel, such as an ingress gateway: it is in nobody's way.
        (
            policy(json!({"action": "CUSTOM", "provider": {"name": "p"}, "rules": [{}]})),
            "spec.action: CUSTOM needs an external authorizer, which is not supported at layer 4; use ALLOW or DENY, or targetRefs",
        ),
        (
            entry(json!({"hosts": ["*.example"], "resolution": "DYNAMIC_DNS"})),
            "spec.resolution: DYNAMIC_DNS needs a waypoint, which looks each name up; use NONE, STATIC or DNS",
        ),
        (
            peers(json!({"portLevelMtls": {"80": {"mode": "STRICT"}}})),
            "spec.portLevelMtls: port exceptions have no effect without a selector; add `selector:`, or remove them",
        ),
    ] {
        let (judgement, response) = created(&object);
        assert_eq!(judgement.label(), "warned", "{object}");
        assert_eq!(response, json!({"uid": "u-1", "allowed": true, "warnings": [warning]}));
    }
}

#[test]
fn what_is_not_ours_or_cannot_be_read_is_allowed_with_a_warning() {
    let good = policy(json!({}));
    let pod = object("v1", "Pod", json!({"containers": []}));
    let namesake = object("other.example/v1", "AuthorizationPolicy", json!({"rules": [{"form": []}]}));
    for (review, part) in [
        (review("DELETE", &Value::Null, &good), "created and updated only"),
        (review("CONNECT", &good, &Value::Null), "created and updated only"),
        (review("CREATE", &pod, &Value::Null), "none of the mesh's"),
        (review("CREATE", &namesake, &Value::Null), "none of the mesh's"),
        (
            review("CREATE", &object("security.istio.io/v1", "RequestAuthentication", json!({})), &Value::Null),
            "none of the mesh's",
        ),
        (
            {
                let mut empty = review("CREATE", &good, &Value::Null);
                empty["request"]["object"] = Value::Null;
                empty
            },
            "no object",
        ),
        (
            {
                let mut text = review("CREATE", &good, &Value::Null);
                text["request"]["object"] = json!("text");
                text
            },
            "cannot be read",
        ),
        (
            {
                let mut large = review("CREATE", &good, &Value::Null);
                large["request"]["object"]["spec"] = json!(vec![0; MAX_NODES + 1]);
                large
            },
            "too large",
        ),
    ] {
        let request = review.to_string();
        let (judgement, response) = asked(&review);
        assert_eq!(judgement.label(), "passed", "{}", &request[..200]);
        let warning = response["warnings"][0].as_str().unwrap();
        assert!(warning.starts_with("not judged by fairwayd: ") && warning.contains(part), "{part}: {warning}");
    }
}

#[test]
fn a_request_that_is_no_review_is_told_so() {
    for body in ["", "{}", "[]", "null", r#"{"apiVersion":"admission.k8s.io/v1beta1","kind":"AdmissionReview"}"#] {
        assert!(message::read(body.as_bytes()).is_err(), "{body}");
    }
    let empty = r#"{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview"}"#;
    assert_eq!(message::read(empty.as_bytes()).unwrap_err(), "the AdmissionReview has no request");
}

#[test]
fn who_touches_only_the_metadata_of_what_was_wrong_before_is_let_through() {
    let wrong = policy(json!({"rules": [{"form": []}]}));
    let with = |object: &Value, change: fn(&mut Value)| {
        let mut object = object.clone();
        change(&mut object);
        object
    };
    let updated = |old: &Value, new: &Value| asked(&review("UPDATE", new, old)).0;
    let finalizer = with(&wrong, |object| object["metadata"]["finalizers"] = json!(["a.example/b"]));
    let status = with(&wrong, |object| object["status"] = json!({"conditions": []}));
    for touched in [&wrong, &finalizer, &status] {
        let Judgement::Warned(warnings) = updated(&wrong, touched) else { panic!("{touched}") };
        assert_eq!(
            warnings[0],
            "AuthorizationPolicy demo/x was wrong before and still is; it is not in force as it is written"
        );
        assert_eq!(warnings[1], "spec.rules[0].form: unknown field; did you mean `from`?");
    }
    let other = with(&wrong, |object| object["spec"]["action"] = json!("DENY"));
    assert_eq!(updated(&wrong, &other).label(), "denied", "who changes what it asks for can put it right");
    let good = policy(json!({"rules": [{}]}));
    assert_eq!(updated(&good, &wrong).label(), "denied");
    assert_eq!(updated(&wrong, &good), Judgement::Allowed);
    let going = with(&other, |object| object["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z"));
    assert_eq!(updated(&wrong, &going), Judgement::Passed(None), "nothing keeps an object from going");
    let elsewhere = with(&wrong, |object| object["metadata"]["labels"] = json!({"istio.io/rev": "other"}));
    assert_eq!(updated(&elsewhere, &wrong).label(), "denied", "it was none of ours before");
    let mut of_status = review("UPDATE", &other, &wrong);
    of_status["request"]["subResource"] = json!("status");
    assert_eq!(asked(&of_status).0, Judgement::Passed(None));
}

#[test]
fn what_is_nested_too_deep_to_be_read_is_denied_as_what_nobody_knows() {
    let deep = (0..300).fold(json!({}), |within, _| json!({ "y": within }));
    let (judgement, answer) = created(&policy(json!({"rules": [{}], "x": deep})));
    assert!(matches!(judgement, Judgement::Denied(_)), "{judgement:?}");
    assert!(
        answer["status"]["message"].as_str().is_some_and(|told| told.contains("spec.x: unknown field")),
        "{answer}"
    );
}
