use mesh_core::{
    service::Service,
    workload::{ApplicationTunnel, GatewayAddress, GatewayDestination, OutboundPolicy},
};

use super::*;

pub(super) fn gateway(meta: &str, more: &str) -> String {
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{{meta}}}\n\
         spec: {{gatewayClassName: istio-waypoint, listeners: [{{name: mesh, port: 15008, protocol: HBONE{more}}}]}}\n"
    )
}

pub(super) fn namespace(name: &str, labels: &str) -> String {
    format!("---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {{{labels}}}}}\n")
}

fn any_service(namespace: &str, name: &str, labels: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{namespace: {namespace}, name: {name}, labels: {{{labels}}}}}\nspec: {{selector: {{app: {name}}}, ports: [{{port: 80}}]}}\n"
    )
}

/// Gateway `wp` of `demo`, and its Service.
fn waypoint(labels: &str, more: &str) -> String {
    gateway(&format!("namespace: demo, name: wp, labels: {{{labels}}}"), more) + &any_service("demo", "wp", "")
}

fn to(namespace: &str, hostname: &str) -> Option<GatewayAddress> {
    let destination = GatewayDestination::Hostname { namespace: namespace.into(), hostname: hostname.into() };
    Some(GatewayAddress { destination, hbone_mtls_port: 15008 })
}

fn wp() -> Option<GatewayAddress> {
    to("demo", "wp.demo.svc.cluster.local")
}

fn web(world: &World) -> Service {
    world.model.service(WEB).unwrap().as_ref().clone()
}

fn problems(world: &World) -> Vec<String> {
    world.index.problems().map(ToString::to_string).collect()
}

const USE: &str = "istio.io/use-waypoint: wp";

#[test]
fn a_label_on_the_object_or_its_namespace_binds_it() {
    let own = World::of(&(waypoint("", "") + &any_service("demo", "web", USE)));
    assert_eq!((web(&own).waypoint, problems(&own)), (wp(), vec![]));
    let inherited = World::of(&(waypoint("", "") + &namespace("demo", USE) + &any_service("demo", "web", "")));
    assert_eq!(web(&inherited).waypoint, wp());
    let wp_service = inherited.model.service("demo/wp.demo.svc.cluster.local").unwrap();
    assert_eq!(wp_service.waypoint, None, "a waypoint's own service has none");
    let opted_out = any_service("demo", "web", "istio.io/use-waypoint: none");
    assert_eq!(web(&World::of(&(waypoint("", "") + &namespace("demo", USE) + &opted_out))).waypoint, None);
    let entry =
        entry(&format!("namespace: demo, name: api, labels: {{{USE}}}"), "{hosts: [api.example.com], resolution: DNS}");
    let world = World::of(&(waypoint("", "") + &entry));
    assert_eq!(world.model.service("demo/api.example.com").unwrap().waypoint, wp());
}

#[test]
fn the_kind_of_traffic_decides_between_services_and_workloads() {
    let bound = |serves: &str| {
        let label = format!("istio.io/waypoint-for: {serves}");
        let text = waypoint(&label, "") + &namespace("demo", USE) + &any_service("demo", "web", "");
        let world = World::of(&(text + &pod("web", "10.0.0.1", "")));
        assert_eq!(problems(&world), Vec::<String>::new(), "an inherited label may suit only some");
        (web(&world).waypoint.is_some(), world.workload("web").waypoint.is_some())
    };
    assert_eq!(bound("service"), (true, false));
    assert_eq!(bound("workload"), (false, true));
    assert_eq!(bound("all"), (true, true));
    assert_eq!(bound("none"), (false, false));
    let own = waypoint("istio.io/waypoint-for: workload", "") + &any_service("demo", "web", USE);
    assert!(problems(&World::of(&own))[0].contains("does not serve service traffic"));
}

#[test]
fn a_label_that_cannot_be_followed_binds_nothing_and_is_told() {
    let labelled = "---\napiVersion: v1\nkind: Service\nmetadata:\n  namespace: demo\n  name: web\n  labels:\n    app: web\n    istio.io/use-waypoint: nobody\nspec: {ports: [{port: 80}]}\n";
    let mut world = World::of(&(namespace("demo", USE) + &waypoint("", "") + labelled));
    assert_eq!(web(&world).waypoint, None, "it does not fall back to the namespace's");
    let told = "f.yaml:23: metadata.labels.istio.io/use-waypoint: waypoint demo/nobody does not exist, so nothing goes through it; create the Gateway";
    assert!(problems(&world).len() == 1 && problems(&world)[0].starts_with(told), "{:?}", problems(&world));
    world.set("late.yaml", &(gateway("namespace: demo, name: nobody", "")));
    assert!(problems(&world)[0].contains("has no Service of its name and no address"));
    world.set("service.yaml", &any_service("demo", "nobody", ""));
    assert_eq!((problems(&world), web(&world).waypoint), (vec![], to("demo", "nobody.demo.svc.cluster.local")));
}

#[test]
fn a_waypoint_without_a_service_is_known_by_its_status() {
    let with = |addresses: &str| {
        let gateway = gateway("namespace: demo, name: wp", "") + &format!("status: {{addresses: [{addresses}]}}\n");
        web(&World::of(&(gateway + &any_service("demo", "web", USE)))).waypoint
    };
    assert_eq!(
        with("{type: IPAddress, value: 10.0.0.1}, {type: Hostname, value: wp.example}"),
        to("demo", "wp.example")
    );
    let address = with("{value: 10.0.0.1}").unwrap().destination;
    assert!(matches!(address, GatewayDestination::Address(a) if a.to_string() == "/10.0.0.1"));
    assert_eq!(with(""), None);
}

#[test]
fn another_namespace_has_to_be_admitted() {
    let bound = |routes: &str| {
        let gateway = gateway("namespace: egress, name: wp", routes) + &any_service("egress", "wp", "");
        let labels = "istio.io/use-waypoint: wp, istio.io/use-waypoint-namespace: egress";
        let world = World::of(&(gateway + &namespace("demo", "team: a") + &any_service("demo", "web", labels)));
        (web(&world).waypoint == to("egress", "wp.egress.svc.cluster.local"), problems(&world).len())
    };
    let from = |from: &str| format!(", allowedRoutes: {{namespaces: {{from: {from}}}}}");
    let selecting = |labels: &str| from(&format!("Selector, selector: {{matchLabels: {{{labels}}}}}"));
    assert_eq!(bound(""), (false, 1));
    assert_eq!(bound(&from("Same")), (false, 1));
    assert_eq!(bound(&from("All")), (true, 0));
    assert_eq!(bound(&selecting("team: a")), (true, 0));
    assert_eq!(bound(&selecting("kubernetes.io/metadata.name: demo")), (true, 0));
    assert_eq!(bound(&selecting("team: b")), (false, 1));
    let private = entry(
        "namespace: demo, name: api, labels: {istio.io/use-waypoint: wp, istio.io/use-waypoint-namespace: egress}",
        "{hosts: [a.b], resolution: DNS, exportTo: [.]}",
    );
    let gateway = gateway("namespace: egress, name: wp", &from("All")) + &any_service("egress", "wp", "");
    assert!(problems(&World::of(&(gateway + &private)))[0].contains("exported to its own namespace only"));
}

#[test]
fn what_cannot_be_followed_is_told_where_it_is_written() {
    let world = |labelled: &str| {
        let mut world = World::new();
        world.set("f.yaml", &(waypoint("istio.io/waypoint-for: all", "") + labelled));
        world
    };
    let field = |labelled: &str| {
        let world = world(labelled);
        let found: Vec<_> =
            world.index.problems().chain(&world.catalogue.problems()).map(|p| p.field.clone()).collect();
        assert_eq!(found.len(), 1, "{found:?}");
        found[0].clone()
    };
    let canary = any_service("demo", "web", &format!("{USE}, istio.io/use-waypoint-canary: nobody"));
    let canary = canary.replace("labels:", "annotations: {istio.io/use-waypoint-canary-weight: \"9\"}, labels:");
    assert_eq!(field(&canary), "metadata.labels.istio.io/use-waypoint-canary");
    let endpoint = entry(
        "namespace: demo, name: api",
        "{hosts: [a.b], resolution: STATIC, endpoints: [{address: 192.0.2.1}, {address: 192.0.2.2, labels: {istio.io/use-waypoint: nobody}}]}",
    );
    assert_eq!(field(&endpoint), "spec.endpoints[1].labels.istio.io/use-waypoint");
    let vm = workload_entry("{address: 192.0.2.9, labels: {istio.io/use-waypoint: nobody}}");
    assert_eq!(field(&vm), "spec.labels.istio.io/use-waypoint");
    let ingress = any_service("demo", "web", "istio.io/ingress-use-waypoint: \"yes\"");
    assert_eq!(field(&ingress), "metadata.labels.istio.io/ingress-use-waypoint");
    assert!(!web(&world(&ingress)).ingress_use_waypoint);
}

#[test]
fn a_workload_entry_is_bound_by_the_labels_of_its_spec_before_those_of_the_object() {
    let vm = |labels: &str| {
        workload_entry(&format!("{{address: 192.0.2.9, labels: {{{labels}}}}}"))
            .replace("labels: {app: vm}", "labels: {istio.io/use-waypoint: other}")
    };
    let mut world = World::of(&vm(USE));
    let bound = |world: &World| {
        let uid = "Kubernetes/networking.istio.io/WorkloadEntry/demo/vm";
        world.model.workload(uid).unwrap().waypoint.clone()
    };
    assert_eq!((bound(&world), problems(&world).len()), (None, 1));
    world.set("wp.yaml", &waypoint("istio.io/waypoint-for: all", ""));
    assert_eq!((bound(&world), problems(&world)), (wp(), vec![]));
    world.set("f.yaml", &vm(""));
    assert_eq!((bound(&world), problems(&world).len()), (None, 1), "the object's counts where the spec has none");
}

#[test]
fn a_canary_gets_its_share_and_its_mistakes_keep_the_first() {
    let with = |weight: &str, canary: &str| {
        let service = format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{namespace: demo, name: web, labels: {{{USE}, istio.io/use-waypoint-canary: {canary}}}, annotations: {{istio.io/use-waypoint-canary-weight: \"{weight}\"}}}}\nspec: {{}}\n"
        );
        let other = gateway("namespace: demo, name: new", "") + &any_service("demo", "new", "");
        let mut world = World::new();
        world.set("f.yaml", &(waypoint("", "") + &other + &service));
        let found = world.catalogue.problems().len() + problems(&world).len();
        assert_eq!(web(&world).waypoint, wp());
        (web(&world).weighted_waypoints.iter().map(|(_, weight)| *weight).collect::<Vec<_>>(), found)
    };
    assert_eq!(with("20", "new"), (vec![80, 20], 0));
    assert_eq!(with("101", "new"), (vec![], 1));
    assert_eq!(with("20", "missing"), (vec![], 1));
    assert_eq!(with("20", "wp"), (vec![], 1));
}

#[test]
fn pods_of_a_waypoint_have_none_and_may_leave_hbone_to_ztunnel() {
    let text = waypoint("istio.io/waypoint-for: all", "").replace(
        "name: wp, labels",
        "name: wp, annotations: {ambient.istio.io/waypoint-inbound-binding: PROXY/15088}, labels",
    );
    let instance = pod("wp", "10.0.0.5", "")
        .replace("labels: {app: wp}", "labels: {app: wp, gateway.networking.k8s.io/gateway-name: wp}");
    let world = World::of(&(text + &namespace("demo", USE) + &instance + &pod("web", "10.0.0.1", "")));
    let instance = world.workload("wp");
    assert_eq!(instance.waypoint, None);
    assert_eq!(instance.application_tunnel, Some(ApplicationTunnel { proxy_protocol: true, port: Some(15088) }));
    assert_eq!(
        (world.workload("web").waypoint.clone(), world.workload("web").application_tunnel.clone()),
        (wp(), None)
    );
}

#[test]
fn who_uses_a_waypoint_can_be_closed_to_all_others() {
    let instance = pod("wp", "10.0.0.5", "")
        .replace("labels: {app: wp}", "labels: {app: wp, gateway.networking.k8s.io/gateway-name: wp}");
    let text = waypoint("", "") + &any_service("demo", "web", USE);
    let mut world = World::of(&(text + &pod("web", "10.0.0.1", "") + &pod("else", "10.0.0.2", "")));
    let key = "demo/istio_allow_waypoint_demo_wp";
    let closed = |world: &World| {
        world.workload("web").authorization_policies == [key.into()] && !world.allows("web", 80, Some("client"))
    };
    assert!(closed(&world) && !world.allows("web", 80, None), "without instances nobody is allowed");
    world.set("wp.yaml", &instance.replace("status: {", "status: {phase: Failed, "));
    assert!(closed(&world) && !world.allows("web", 80, Some("wp")), "an instance that ended is none");
    world.set("wp.yaml", &instance);
    assert!(closed(&world));
    assert!(world.allows("web", 80, Some("wp")));
    assert!(world.allows("else", 80, Some("client")) && world.allows("wp", 80, Some("client")));
    let unasked = ClusterIndex::new(Settings { allow_from_waypoint: false, ..settings() });
    let mut unasked = World { index: unasked, ..world };
    unasked.set("more.yaml", "");
    assert_eq!(unasked.model.policies().count(), 0);
}

#[test]
fn a_wrong_gateway_is_told() {
    let table = [
        (gateway("namespace: demo, name: wp", "").replace("15008", "15009"), "spec.gatewayClassName: a waypoint needs"),
        (waypoint("istio.io/waypoint-for: svc", ""), "label istio.io/waypoint-for `svc` is not a kind"),
        (waypoint("", ", allowedRoutes: {namespaces: {from: Any}}"), "namespaces.from: `Any` is not valid here"),
        (
            waypoint("", "").replace(
                "name: wp, labels",
                "name: wp, annotations: {ambient.istio.io/waypoint-inbound-binding: X/1}, labels",
            ),
            "waypoint-inbound-binding `X/1` cannot be read",
        ),
    ];
    for (text, expected) in table {
        let mut world = World::new();
        world.set("f.yaml", &text);
        let found: Vec<String> = world.catalogue.problems().iter().map(ToString::to_string).collect();
        assert!(found.iter().any(|p| p.contains(expected)), "{expected}: {found:?}");
    }
    let strange = ", allowedRoutes: {namespaces: {from: Selector, selector: {matchExpressions: []}}}";
    let meta = "namespace: demo, name: wp, annotations: {ambient.istio.io/waypoint-inbound-binding: X/1}";
    let other = gateway(meta, strange).replace("istio-waypoint", "nginx");
    assert_eq!(problems(&World::of(&(other + &any_service("demo", "web", USE)))).len(), 1, "it is no waypoint");
}

fn mesh(data: &str) -> String {
    format!(
        "# top\napiVersion: v1\nkind: ConfigMap\nmetadata: {{namespace: istio-system, name: istio}}\ndata:\n  {data}\n"
    )
}

#[test]
fn the_mesh_config_decides_what_pods_may_call() {
    let mut world = World::of(&pod("web", "10.0.0.1", ""));
    let policy = |world: &World| world.workload("web").outbound_policy;
    assert_eq!(policy(&world), None);
    let with = |mode: &str| {
        mesh(&format!("mesh: |-\n    accessLogFile: /dev/stdout\n    outboundTrafficPolicy:\n      mode: {mode}"))
    };
    assert_eq!(world.set("mesh.yaml", &with("REGISTRY_ONLY")), ["Kubernetes//Pod/demo/web"]);
    assert_eq!(policy(&world), Some(OutboundPolicy::RegistryOnly));
    assert_eq!(world.set("mesh.yaml", &with("REGISTRY")), Vec::<String>::new(), "what was last read stays");
    let told = "mesh.yaml:9: data.mesh.outboundTrafficPolicy.mode: `REGISTRY` is not valid here; expected one of ALLOW_ANY, REGISTRY_ONLY, ALLOW_ANY_DYNAMIC_DNS";
    assert_eq!(world.catalogue.problems()[0].to_string(), told);
    world.set("mesh.yaml", &with("ALLOW_ANY"));
    assert_eq!((policy(&world), world.catalogue.problems().len()), (None, 0));
    world.set("mesh.yaml", &mesh("mesh: \"outboundTrafficPolicy: {mode: REGISTRY_ONLY}\""));
    assert_eq!(policy(&world), Some(OutboundPolicy::RegistryOnly));
    world.set("mesh.yaml", &with("REGISTRY_ONLY").replace("name: istio}", "name: other}"));
    assert_eq!(policy(&world), None, "only the one ConfigMap is the mesh's");
    let twice = mesh("mesh: \"{outboundTrafficPolicyy: {}, outboundTrafficPolicy: {modee: ALLOW_ANY}}\"");
    world.set("mesh.yaml", &twice);
    assert_eq!(world.catalogue.problems().len(), 2, "every misspelt field is told");
}

#[test]
fn a_mesh_config_that_never_was_right_keeps_closed_what_it_was_to_close() {
    let (open, closed) = (None, Some(OutboundPolicy::RegistryOnly));
    for (text, expected) in [
        ("{accesLogFile: x}", open),
        ("{accesLogFile: x, outboundTrafficPolicy: {mode: ALLOW_ANY}}", open),
        ("{accesLogFile: x, outboundTrafficPolicy: null}", open),
        ("{accesLogFile: x, outboundTrafficPolicy: {mode: REGISTRY_ONLY}}", closed),
        ("{accesLogFile: x, outbound_traffic_policy: {mode: REGISTRY_ONLY}}", closed),
        ("{outboundTrafficPolcy: {mode: REGISTRY_ONLY}}", closed),
        ("{outboundTrafficPolicy: {mode: REGISTRY}}", closed),
        ("{outboundTrafficPolicy: {modes: ALLOW_ANY}}", closed),
        ("{outboundTrafficPolicy: {}, outboundTrafficPolcy: REGISTRY_ONLY}", closed),
        ("{outboundTrafficPolicy: {mode: REGISTRY_ONLY}", closed),
        ("{trustDomain: x", open),
    ] {
        let mut world = World::of(&pod("web", "10.0.0.1", ""));
        world.set("mesh.yaml", &mesh(&format!("mesh: \"{text}\"")));
        assert_eq!(world.workload("web").outbound_policy, expected, "{text}");
        assert!(!world.catalogue.problems().is_empty(), "{text}");
        // Once it is right, it decides; wrong again, it stays.
        world.set("mesh.yaml", &mesh("mesh: \"{meshMTLS: {}, ingress_class: x, mixerAddress: x}\""));
        assert_eq!((world.workload("web").outbound_policy, world.catalogue.problems()), (None, Vec::new()), "{text}");
        world.set("mesh.yaml", &mesh(&format!("mesh: \"{text}\"")));
        assert_eq!(world.workload("web").outbound_policy, None, "the last good version stays: {text}");
    }
    let mut world = World::of(&pod("web", "10.0.0.1", ""));
    world.set("mesh.yaml", &mesh("mesh: \"{outbound_traffic_policy: {mode: REGISTRY_ONLY}}\""));
    assert_eq!((world.workload("web").outbound_policy, world.catalogue.problems()), (closed, Vec::new()));
}

#[test]
fn a_mesh_config_that_cannot_be_read_is_told_at_its_line() {
    let told = |data: &str| {
        let mut world = World::new();
        world.set("mesh.yaml", &mesh(data));
        world.catalogue.problems().iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let malformed = told("mesh: |\n    a: 1\n    b: [");
    assert!(malformed.len() == 1 && malformed[0].starts_with("mesh.yaml:8: data.mesh: "), "{malformed:?}");
    assert!(
        told("mesh: |\n    trustDomainAliases:\n    - old\n")[0]
            .starts_with("mesh.yaml:7: data.mesh.trustDomainAliases: ")
    );
    assert!(told("other: x")[0].contains("`mesh` is missing"));
    assert_eq!(told("mesh: \"\""), Vec::<String>::new());
}
