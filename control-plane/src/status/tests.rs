use super::*;
use crate::{
    index::Settings as IndexSettings,
    objects::Settings,
    source::kubernetes::{Objects, received},
};

/// Objects as the API server has them, and the index of them.
struct World {
    objects: Objects,
    index: ClusterIndex,
}

impl World {
    fn of(all: &[Value]) -> Self {
        let settings = Settings { root_namespace: "istio-system".into(), revision: "default".into() };
        let mut objects = Objects::new(settings.clone());
        for object in all {
            objects.on(received(object.clone(), &settings));
        }
        let mut index = ClusterIndex::new(IndexSettings {
            root_namespace: "istio-system".into(),
            trust_domain: "cluster.local".into(),
            cluster_id: "Kubernetes".into(),
            cluster_domain: "cluster.local".into(),
            allow_from_waypoint: false,
        });
        index.apply(objects.changes());
        Self { objects, index }
    }

    fn wanted(&self, kind: Kind, name: &str) -> (Wanted, Status) {
        let key = ObjectKey::new(kind, &"demo".into(), &name.into());
        let (stated, problems) = self.objects.stated(&key).unwrap();
        (wanted(&key, stated, problems, &self.index), stated.status.clone())
    }

    /// `Type=Status Reason` of each condition.
    fn told(&self, kind: Kind, name: &str) -> Vec<String> {
        let conditions = self.wanted(kind, name).0.conditions;
        conditions.iter().map(|told| format!("{}={} {}", told.kind, told.is_true, told.reason)).collect()
    }
}

fn object(api_version: &str, kind: &str, metadata: Value, spec: Value) -> Value {
    let mut object = json!({"apiVersion": api_version, "kind": kind, "metadata": metadata, "spec": spec});
    object["metadata"]["namespace"] = json!("demo");
    object["metadata"]["generation"] = json!(7);
    object
}

fn policy(name: &str, spec: Value) -> Value {
    object("security.istio.io/v1", "AuthorizationPolicy", json!({"name": name}), spec)
}

#[test]
fn a_policy_is_told_whether_ztunnel_enforces_it_as_written() {
    let all = [
        ("good", json!({"rules": [{}]}), &["ZtunnelAccepted=true Accepted"][..]),
        (
            "layer-7",
            json!({"rules": [{"to": [{"operation": {"paths": ["/"]}}]}]}),
            &["ZtunnelAccepted=true UnsupportedValue"],
        ),
        ("wrong", json!({"rules": [{"form": []}]}), &["ZtunnelAccepted=false UnsupportedValue"]),
        ("custom", json!({"action": "CUSTOM"}), &["ZtunnelAccepted=false UnsupportedValue"]),
        ("audit", json!({"action": "AUDIT"}), &["ZtunnelAccepted=false UnsupportedValue"]),
        ("for-waypoints", json!({"targetRefs": [{"kind": "Service", "name": "web"}], "rules": [{}]}), &[]),
    ];
    let world = World::of(&all.clone().map(|(name, spec, _)| policy(name, spec)));
    for (name, _, expected) in all {
        assert_eq!(world.told(Kind::AuthorizationPolicy, name), expected, "{name}");
    }
    let (wanted, _) = world.wanted(Kind::AuthorizationPolicy, "wrong");
    let told = &wanted.conditions[0];
    assert!(told.message.contains("spec.rules[0].form: unknown field; did you mean `from`?"), "{}", told.message);
    assert_eq!(told.observed_generation, Some(7));
}

#[test]
fn a_peer_authentication_is_told_only_that_it_is_rejected() {
    let peer = |name: &str, mode: &str| {
        let spec = json!({"mtls": {"mode": mode}});
        object("security.istio.io/v1", "PeerAuthentication", json!({"name": name}), spec)
    };
    let world = World::of(&[peer("good", "STRICT"), peer("wrong", "SRTICT")]);
    assert_eq!(world.told(Kind::PeerAuthentication, "good"), Vec::<String>::new());
    assert_eq!(world.told(Kind::PeerAuthentication, "wrong"), ["ZtunnelAccepted=false UnsupportedValue"]);
}

#[test]
fn who_wants_a_waypoint_is_told_what_came_of_it() {
    let service = |name: &str, waypoint: Option<&str>| {
        let labels = waypoint.map_or_else(|| json!({}), |waypoint| json!({"istio.io/use-waypoint": waypoint}));
        let spec = json!({"clusterIP": "10.2.0.1", "ports": [{"port": 80}]});
        object("v1", "Service", json!({"name": name, "labels": labels}), spec)
    };
    let mut gateway = object(
        "gateway.networking.k8s.io/v1",
        "Gateway",
        json!({"name": "w", "labels": {"istio.io/waypoint-for": "service"}}),
        json!({"gatewayClassName": "istio-waypoint", "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE"}]}),
    );
    gateway["status"] = json!({"addresses": [{"type": "IPAddress", "value": "10.2.0.9"}]});
    let entry = |waypoint: &str| {
        let metadata = json!({"name": "vm", "labels": {"istio.io/use-waypoint": waypoint}});
        object("networking.istio.io/v1", "WorkloadEntry", metadata, json!({"address": "10.3.0.1"}))
    };
    let world = World::of(&[
        gateway,
        service("bound", Some("w")),
        service("lost", Some("nowhere")),
        service("plain", None),
        service("opted-out", Some("none")),
        entry("w"),
    ]);
    assert_eq!(world.told(Kind::Service, "bound"), ["istio.io/WaypointBound=true WaypointAccepted"]);
    assert_eq!(world.told(Kind::Service, "lost"), ["istio.io/WaypointBound=false WaypointIsNotReady"]);
    assert_eq!(world.told(Kind::WorkloadEntry, "vm"), ["istio.io/WaypointBound=false UnsupportedTrafficType"]);
    for silent in ["plain", "opted-out"] {
        assert_eq!(world.told(Kind::Service, silent), Vec::<String>::new(), "{silent}");
    }
    assert!(world.wanted(Kind::Service, "bound").0.conditions[0].message.contains("demo/w"));
}

fn service_entry(name: &str, annotations: Value, spec: Value) -> Value {
    let metadata = json!({"name": name, "annotations": annotations, "creationTimestamp": "2026-01-01T00:00:00Z"});
    object("networking.istio.io/v1", "ServiceEntry", metadata, spec)
}

#[test]
fn an_entry_is_told_its_addresses_and_what_only_a_waypoint_could_do() {
    let spec = |host: &str, resolution: &str| json!({"hosts": [host], "resolution": resolution});
    let race = json!({"istio.io/connect-strategy": "RACE_FIRST_TCP_CONNECT"});
    let world = World::of(&[
        service_entry("plain", json!({}), spec("a.example.com", "DNS")),
        service_entry("racing", race, spec("b.example.com", "DNS")),
        service_entry("dynamic", json!({}), spec("*.example.com", "DYNAMIC_DNS")),
        service_entry("through", json!({}), spec("c.example.com", "NONE")),
    ]);
    let missing = |reason: &str| [format!("istio.io/WaypointMissing=true {reason}")];
    assert_eq!(world.told(Kind::ServiceEntry, "plain"), Vec::<String>::new());
    assert_eq!(world.told(Kind::ServiceEntry, "racing"), missing("NoWaypointForRacingConnectStrategy"));
    assert_eq!(world.told(Kind::ServiceEntry, "dynamic"), missing("NoWaypointForWildcardService"));
    let (wanted, status) = world.wanted(Kind::ServiceEntry, "plain");
    let written = difference(&wanted, &status, "now").unwrap();
    let addresses = written["addresses"].as_array().unwrap();
    assert!(addresses.len() == 2 && addresses.iter().all(|address| address["host"] == "a.example.com"), "{written}");
    let (wanted, status) = world.wanted(Kind::ServiceEntry, "through");
    assert_eq!(difference(&wanted, &status, "now"), None, "passed through to wherever the client goes");
}

#[test]
fn addresses_that_a_status_names_are_kept() {
    let mut entry = service_entry("e", json!({}), json!({"hosts": ["a.example.com"], "resolution": "DNS"}));
    entry["status"] = json!({"addresses": [{"host": "a.example.com", "value": "240.240.0.7"}]});
    let world = World::of(&[entry]);
    let (wanted, status) = world.wanted(Kind::ServiceEntry, "e");
    assert_eq!(difference(&wanted, &status, "now"), None);
    let service = world.index.model().services().next().unwrap().clone();
    assert_eq!(service.vips.iter().map(|vip| vip.ip.to_string()).collect::<Vec<_>>(), ["240.240.0.7"]);
}

#[test]
fn only_what_differs_is_written_and_a_condition_keeps_its_time_until_it_turns() {
    let condition = |status: &str, reason: &str, since: &str| {
        json!({"type": "ZtunnelAccepted", "status": status, "reason": reason, "message": "accepted by ztunnel",
            "observedGeneration": 7, "lastTransitionTime": since})
    };
    let with = |conditions: Value| {
        let mut policy = policy("p", json!({"rules": [{}]}));
        policy["status"] = json!({"conditions": conditions});
        let (wanted, status) = World::of(&[policy]).wanted(Kind::AuthorizationPolicy, "p");
        difference(&wanted, &status, "now")
    };
    let foreign = json!({"type": "Reconciled", "status": "True"});
    assert_eq!(with(json!([condition("True", "Accepted", "then"), foreign])), None);
    let since = |written: Option<Value>| written.unwrap()["conditions"][0]["lastTransitionTime"].clone();
    assert_eq!(since(with(json!([condition("True", "Other", "then")]))), "then");
    assert_eq!(since(with(json!([condition("False", "Accepted", "then")]))), "now");
    assert_eq!(since(with(json!([]))), "now");
    // One that applies no more is taken away.
    let stale = json!({"type": "istio.io/WaypointBound", "status": "True", "lastTransitionTime": "then"});
    let written = with(json!([condition("True", "Accepted", "then"), stale])).unwrap();
    assert_eq!(written["conditions"].as_array().map(Vec::len), Some(1));
}
