use std::collections::BTreeSet;

use mesh_core::{
    index::Resource,
    policy::{Policy, Rule},
};
use serde_json::{Value, json};

use super::*;
use crate::index::{self, ClusterIndex};

fn settings() -> Settings {
    Settings { root_namespace: "istio-system".into(), revision: "default".into() }
}

fn told(kind: Kind, news: News) -> Told {
    Told { kind, news, at: Instant::now() }
}

fn set(kind: Kind, mut object: Value) -> Told {
    object["kind"] = json!(kind.name());
    received(object, &settings())
}

fn policy(name: &str, spec: Value) -> Told {
    let metadata = json!({"namespace": "demo", "name": name, "resourceVersion": "1", "managedFields": [{"x": 1}]});
    set(Kind::AuthorizationPolicy, json!({"metadata": metadata, "spec": spec}))
}

/// `kind ns/name`, `-` before those that are gone.
fn changes(objects: &mut Objects) -> Vec<String> {
    let name = |(key, object): ObjectChange| format!("{}{key}", if object.is_some() { "" } else { "-" });
    objects.changes().into_iter().map(name).collect()
}

const KIND: Kind = Kind::AuthorizationPolicy;

#[test]
fn a_new_list_is_exactly_the_difference_to_what_was_known() {
    let mut objects = Objects::new(settings());
    let (narrow, wide) = (json!({"rules": []}), json!({"rules": [{}]}));
    let first = [policy("a", narrow.clone()), policy("b", narrow.clone()), policy("c", narrow.clone())];
    objects.on(told(KIND, News::Listing));
    first.into_iter().for_each(|told| drop(objects.on(told)));
    objects.on(told(KIND, News::Listed));
    assert_eq!(changes(&mut objects).len(), 3);

    // A list that breaks off takes nothing back.
    objects.on(told(KIND, News::Listing));
    objects.on(policy("a", narrow.clone()));
    objects.on(told(KIND, News::Failing("cut".into())));
    assert_eq!(changes(&mut objects), Vec::<String>::new());

    objects.on(told(KIND, News::Listing));
    for told in [policy("a", narrow.clone()), policy("c", wide), policy("d", narrow)] {
        objects.on(told);
    }
    let before_the_end = changes(&mut objects);
    objects.on(told(KIND, News::Listed));
    assert_eq!(before_the_end, ["AuthorizationPolicy demo/c", "AuthorizationPolicy demo/d"]);
    assert_eq!(changes(&mut objects), ["-AuthorizationPolicy demo/b"]);
}

#[test]
fn a_wrong_object_keeps_its_last_good_version_and_is_told_by_its_name_and_field() {
    let mut objects = Objects::new(settings());
    let wrong = || json!({"rules": [{"form": []}]});
    objects.on(policy("known", json!({"rules": []})));
    objects.on(policy("known", wrong()));
    objects.on(policy("new", wrong()));
    let changes: BTreeMap<String, Arc<crate::objects::Object>> =
        objects.changes().into_iter().map(|(key, object)| (key.to_string(), object.unwrap())).collect();
    let of = |name: &str| match &changes[name].spec {
        crate::objects::Spec::AuthorizationPolicy(policy) => policy.policy.clone().unwrap(),
        _ => panic!(),
    };
    assert_eq!(of("AuthorizationPolicy demo/known").rules.len(), 0);
    let stand_in = of("AuthorizationPolicy demo/new");
    assert_eq!(stand_in.action, mesh_core::policy::Action::Deny);
    let origin = "AuthorizationPolicy demo/new (rejected: unknown field) (spec.rules[0].form)";
    assert_eq!(stand_in.origin.to_string(), origin);
    let problems: Vec<String> = objects.problems().iter().map(ToString::to_string).collect();
    let told = |name: &str| {
        format!("AuthorizationPolicy demo/{name}: spec.rules[0].form: unknown field; did you mean `from`?")
    };
    assert_eq!(problems, [told("known"), told("new")]);
}

#[test]
fn a_kind_that_does_not_exist_is_empty_and_said_once_until_it_does() {
    let mut objects = Objects::new(settings());
    assert!(objects.awaited().any(|kind| kind == KIND));
    assert_eq!(objects.on(told(KIND, News::Unknown)), Some(Turn::Unknown(KIND)));
    assert_eq!(objects.on(told(KIND, News::Unknown)), None);
    assert!(!objects.awaited().any(|kind| kind == KIND));
    let told_of = "AuthorizationPolicy (all): the API server does not know this kind: no such policy can be in force; install its definition (`crds.enabled` of the chart, or `fairwayd definitions`)";
    assert_eq!(objects.problems().iter().map(ToString::to_string).collect::<Vec<_>>(), [told_of]);
    objects.on(told(Kind::Gateway, News::Unknown));
    assert_eq!(objects.problems().len(), 1, "a kind that closes nothing may be missing");
    objects.on(told(KIND, News::Listing));
    objects.on(policy("a", json!({})));
    objects.on(told(KIND, News::Listed));
    assert_eq!(objects.problems(), Vec::new());
    assert_eq!(changes(&mut objects), ["AuthorizationPolicy demo/a"]);
    assert_eq!(objects.on(told(KIND, News::Unknown)), Some(Turn::Unknown(KIND)));
    assert_eq!(changes(&mut objects), ["-AuthorizationPolicy demo/a"]);
}

#[test]
fn a_failing_watch_is_a_problem_until_it_recovers() {
    let mut objects = Objects::new(settings());
    objects.on(policy("a", json!({})));
    objects.on(told(KIND, News::Failing("refused".into())));
    let told_of = "AuthorizationPolicy (all): the API server cannot be watched; see the log for why; what was last read stays in force";
    assert_eq!(objects.watch_problems().iter().map(ToString::to_string).collect::<Vec<_>>(), [told_of]);
    assert_eq!(objects.problems(), Vec::new(), "the configuration may be right");
    objects.on(told(KIND, News::Recovered));
    assert_eq!(objects.watch_problems(), Vec::new());
    assert_eq!(objects.len(), 0, "nothing is in force before it was asked for");
    assert_eq!(changes(&mut objects).len(), 1);
}

#[test]
fn a_kind_at_another_version_is_waited_for_and_takes_nothing_back() {
    let mut objects = Objects::new(settings());
    let unserved = || told(KIND, News::Unserved("served otherwise".into()));
    assert_eq!(objects.on(unserved()), Some(Turn::Failed(KIND, "served otherwise".into())));
    assert!(objects.awaited().any(|kind| kind == KIND), "a start waits");
    objects.on(told(KIND, News::Listing));
    objects.on(policy("a", json!({})));
    objects.on(told(KIND, News::Listed));
    objects.on(unserved());
    assert_eq!(changes(&mut objects), ["AuthorizationPolicy demo/a"]);
    let told_of =
        "AuthorizationPolicy (all): served otherwise; until then what was last read stays in force, and a start waits";
    assert_eq!(objects.watch_problems().iter().map(ToString::to_string).collect::<Vec<_>>(), [told_of]);
}

#[test]
fn configuration_of_another_revision_is_none_of_ours() {
    for (revision, ours) in [(None, true), (Some(""), true), (Some("default"), true), (Some("canary"), false)] {
        let mut objects = Objects::new(settings());
        let labels = revision.map_or_else(|| json!({}), |revision| json!({"istio.io/rev": revision}));
        let metadata = |name: &str| json!({"namespace": "demo", "name": name, "labels": labels});
        objects.on(set(KIND, json!({"metadata": metadata("p"), "spec": {}})));
        objects.on(set(Kind::Pod, json!({"metadata": metadata("p"), "spec": {"nodeName": "n"}})));
        let expected: &[&str] = if ours { &["AuthorizationPolicy demo/p", "Pod demo/p"] } else { &["Pod demo/p"] };
        assert_eq!(changes(&mut objects), expected, "{revision:?}");
    }
}

#[test]
fn the_same_objects_give_the_same_model_as_from_a_folder() {
    let documents = [
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "demo", "labels": {"istio.io/use-waypoint": "w"}}}),
        json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1", "labels": {"topology.kubernetes.io/zone": "z"}}}),
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": "demo", "name": "web-1", "uid": "u", "labels": {"app": "web"},
            "annotations": {"ambient.istio.io/redirection": "enabled"}},
            "spec": {"nodeName": "n1", "serviceAccountName": "web", "hostNetwork": false,
                "containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 8080}]}]},
            "status": {"phase": "Running", "podIPs": [{"ip": "10.1.0.1"}], "conditions": [{"type": "Ready", "status": "True"}]}}),
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "demo", "name": "web"},
            "spec": {"selector": {"app": "web"}, "clusterIP": "10.2.0.1", "ports": [{"name": "http", "port": 80, "targetPort": "http"}]}}),
        json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"namespace": "demo", "name": "web-x", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4", "ports": [{"name": "http", "port": 8080}], "endpoints": [{"addresses": ["10.9.0.1"]}]}),
        json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"namespace": "demo", "name": "p"},
            "spec": {"selector": {"matchLabels": {"app": "web"}}, "action": "DENY",
                "rules": [{"to": [{"operation": {"ports": ["81"]}}]}]}}),
        json!({"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication", "metadata": {"namespace": "istio-system", "name": "default"},
            "spec": {"mtls": {"mode": "STRICT"}}}),
        json!({"apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry", "metadata": {"namespace": "demo", "name": "ext", "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {"hosts": ["api.example.com"], "resolution": "DNS", "ports": [{"number": 443, "name": "tls", "protocol": "TLS"}]}}),
        json!({"apiVersion": "networking.istio.io/v1", "kind": "WorkloadEntry", "metadata": {"namespace": "demo", "name": "vm"},
            "spec": {"address": "10.3.0.1", "weight": 7}}),
        json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway", "metadata": {"namespace": "demo", "name": "w"},
            "spec": {"gatewayClassName": "istio-waypoint", "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE"}]},
            "status": {"addresses": [{"type": "IPAddress", "value": "10.2.0.9"}]}}),
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"namespace": "istio-system", "name": "istio"},
            "data": {"mesh": "outboundTrafficPolicy:\n  mode: REGISTRY_ONLY\n"}}),
    ];
    let index = || {
        ClusterIndex::new(index::Settings {
            root_namespace: "istio-system".into(),
            trust_domain: "cluster.local".into(),
            cluster_id: "Kubernetes".into(),
            cluster_domain: "cluster.local".into(),
            allow_from_waypoint: false,
        })
    };
    let mut objects = Objects::new(settings());
    let mut kinds = BTreeSet::new();
    for document in &documents {
        let name = document["kind"].as_str().unwrap();
        let kind = WATCHED.iter().find(|watched| watched.kind.name() == name).unwrap().kind;
        kinds.insert(name);
        // Items of lists do not say what they are.
        let mut item = document.clone();
        item.as_object_mut().unwrap().retain(|field, _| field != "kind" && field != "apiVersion");
        objects.on(set(kind, item));
    }
    assert_eq!(kinds.len(), WATCHED.len(), "a document of each kind");
    assert_eq!(objects.problems(), Vec::new());
    let mut from_api = index();
    from_api.apply(objects.changes());

    let mut catalogue = Catalogue::new(settings());
    let manifests: Vec<String> = documents.iter().map(|document| format!("---\n{document:#}\n")).collect();
    catalogue.set_file(&"all.yaml".into(), &manifests.concat());
    let mut from_folder = index();
    from_folder.apply(catalogue.changes());
    assert_eq!(resources(&from_api), resources(&from_folder));
    assert!(from_api.model().workloads().count() >= 4 && from_api.model().policies().count() >= 2);
}

/// By key, and without places: files and lines are the folder's only.
fn resources(index: &ClusterIndex) -> BTreeMap<String, Resource> {
    let model = index.model();
    let placeless = |policy: &Arc<Policy>| {
        let rules = policy.rules.iter().map(|rule| Rule { clauses: rule.clauses.clone(), ..Rule::default() }).collect();
        Arc::new(Policy { rules, origin: Default::default(), ..Policy::clone(policy) })
    };
    let workloads = model.workloads().map(|w| (w.uid.to_string(), Resource::Workload(w.clone())));
    let services = model.services().map(|s| (s.key().to_string(), Resource::Service(s.clone())));
    let policies = model.policies().map(|p| (format!("policy {}", p.key()), Resource::Policy(placeless(p))));
    workloads.chain(services).chain(policies).collect()
}
