use mesh_core::{
    authorize::{Connection, authorize},
    identity::Identity,
    index::Index,
    service::{HealthPolicy, IpFamilies, LoadBalancingMode},
    workload::{Health, NetworkMode, PortMapping, TunnelProtocol, Workload, WorkloadType},
};
use proptest::prelude::*;

use super::*;
use crate::{objects, source::Catalogue};

fn settings() -> Settings {
    Settings {
        root_namespace: "istio-system".into(),
        trust_domain: "cluster.local".into(),
        cluster_id: "Kubernetes".into(),
        cluster_domain: "cluster.local".into(),
        allow_from_waypoint: true,
    }
}

mod egress;
mod policy;
mod waypoint;

/// A catalogue and the index that follows it.
struct World {
    catalogue: Catalogue,
    index: ClusterIndex,
    model: Index,
}

impl World {
    fn new() -> Self {
        let catalogue =
            Catalogue::new(objects::Settings { root_namespace: "istio-system".into(), revision: "default".into() });
        Self { catalogue, index: ClusterIndex::new(settings()), model: Index::default() }
    }

    fn of(text: &str) -> Self {
        let mut world = Self::new();
        world.set("f.yaml", text);
        assert_eq!(world.catalogue.problems(), Vec::new());
        world
    }

    /// Keys of the resources that came out different, `-` before those that are gone.
    fn set(&mut self, file: &str, text: &str) -> Vec<String> {
        self.catalogue.set_file(&file.into(), text);
        let changes = self.index.apply(self.catalogue.changes());
        self.model = self.index.model();
        let describe = |change: ResourceChange| match (change.before, change.after) {
            (_, Some(resource)) => key(&resource),
            (before, None) => format!("-{}", before.map(|r| key(&r)).unwrap_or_default()),
        };
        changes.into_iter().map(describe).collect()
    }

    fn workload(&self, name: &str) -> &Workload {
        self.model.workload(&format!("Kubernetes//Pod/demo/{name}")).unwrap()
    }

    fn allows(&self, destination: &str, port: u16, source: Option<&str>) -> bool {
        let identity: Option<Identity> = source.map(|account| Identity::new("cluster.local", "demo", account));
        let connection = Connection {
            source_ip: "10.0.0.99".parse().unwrap(),
            source_identity: identity.as_ref(),
            destination: (self.workload(destination).addresses[0], port).into(),
        };
        authorize(&self.model.policies_for(self.workload(destination)), &connection).is_allowed()
    }
}

fn key(resource: &Resource) -> String {
    match resource.key() {
        ResourceKey::Address(key) | ResourceKey::Policy(key) => key.to_string(),
    }
}

fn pod(name: &str, ip: &str, more: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{namespace: demo, name: {name}, uid: uid-{name}, labels: {{app: {name}}}}}\n\
         spec: {{nodeName: n1, serviceAccountName: {name}, containers: [{{ports: [{{name: http, containerPort: 8080}}]}}]}}\n\
         status: {{podIPs: [{{ip: {ip}}}], conditions: [{{type: Ready, status: \"True\"}}]}}\n{more}"
    )
}

fn enrolment(name: &str, uid: &str, redirection: &str) -> String {
    format!(
        "---\napiVersion: fairway.dev/v1alpha1\nkind: PodEnrolment\nmetadata: {{namespace: demo, name: {name}}}\n\
         spec: {{podUid: {uid}, redirection: {redirection}}}\n"
    )
}

fn service(spec: &str) -> String {
    format!("---\napiVersion: v1\nkind: Service\nmetadata: {{namespace: demo, name: web}}\nspec: {spec}\n")
}

fn peer(namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{namespace: {namespace}, name: {name}}}\nspec: {spec}\n"
    )
}

fn authz(namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{namespace: {namespace}, name: {name}}}\nspec: {spec}\n"
    )
}

fn entry(meta: &str, spec: &str) -> String {
    format!("---\napiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{{meta}}}\nspec: {spec}\n")
}

fn workload_entry(spec: &str) -> String {
    format!(
        "---\napiVersion: networking.istio.io/v1beta1\nkind: WorkloadEntry\nmetadata: {{namespace: demo, name: vm, labels: {{app: vm}}}}\nspec: {spec}\n"
    )
}

const WEB: &str = "demo/web.demo.svc.cluster.local";

#[test]
fn a_pod_becomes_a_workload_with_its_locality_and_names() {
    let text = "apiVersion: v1\nkind: Pod\nmetadata:\n  namespace: demo\n  name: web-5d4-x\n  labels: {app: web, version: v2, pod-template-hash: 5d4}\n  ownerReferences: [{kind: ReplicaSet, name: web-5d4, controller: true}]\nspec: {nodeName: n1}\nstatus: {podIPs: [{ip: 10.0.0.1}, {ip: \"2001:db8::1\"}]}\n---\napiVersion: v1\nkind: Node\nmetadata: {name: n1, labels: {topology.kubernetes.io/region: r, topology.kubernetes.io/zone: z}}\n---\napiVersion: v1\nkind: Namespace\nmetadata: {name: istio-system, labels: {topology.istio.io/network: net}}\n";
    let world = World::of(text);
    let w = world.workload("web-5d4-x");
    assert_eq!((&*w.workload_name, w.workload_type), ("web", WorkloadType::Deployment));
    assert_eq!((&*w.canonical_name, &*w.canonical_revision), ("web", "v2"));
    assert_eq!((&*w.locality.region, &*w.locality.zone, &*w.network), ("r", "z", "net"));
    assert_eq!((w.addresses.len(), &*w.service_account, w.health), (2, "default", Health::Unhealthy));
}

#[test]
fn pods_that_have_no_address_or_have_ended_are_no_workloads() {
    let ended = pod("a", "10.0.0.1", "").replace("status: {", "status: {phase: Succeeded, ");
    assert_eq!(World::of(&ended).model.workloads().count(), 0);
    let pending = pod("a", "10.0.0.1", "").replace("podIPs: [{ip: 10.0.0.1}], ", "");
    assert_eq!(World::of(&pending).model.workloads().count(), 0);
}

#[test]
fn only_a_matching_enrolment_makes_a_pod_speak_hbone() {
    let protocol = |text: &str| World::of(&(pod("a", "10.0.0.1", "") + text)).workload("a").tunnel_protocol;
    assert_eq!(protocol(""), TunnelProtocol::None);
    assert_eq!(protocol(&enrolment("a", "uid-a", "enabled")), TunnelProtocol::Hbone);
    assert_eq!(protocol(&enrolment("a", "uid-a", "pending")), TunnelProtocol::None);
    assert_eq!(protocol(&enrolment("a", "uid-before", "enabled")), TunnelProtocol::None);
}

#[test]
fn host_network_pods_never_speak_hbone() {
    let text = pod("a", "10.0.0.1", &enrolment("a", "uid-a", "enabled"))
        .replace("spec: {nodeName", "spec: {hostNetwork: true, nodeName");
    let world = World::of(&text);
    let w = world.workload("a");
    assert_eq!((w.network_mode, w.tunnel_protocol), (NetworkMode::HostNetwork, TunnelProtocol::None));
}

#[test]
fn a_selector_makes_pods_endpoints_and_a_named_port_only_where_it_exists() {
    let spec = "{selector: {app: web}, clusterIP: 10.1.0.1, ports: [{port: 80, targetPort: http}, {port: 81, targetPort: other}, {port: 53, protocol: UDP}]}";
    let world = World::of(&(pod("web", "10.0.0.1", "") + &pod("else", "10.0.0.2", "") + &service(spec)));
    let mapping = |service_port, target_port| PortMapping { service_port, target_port };
    assert_eq!(world.workload("web").services.get(WEB).unwrap()[..], [mapping(80, 8080)]);
    assert!(world.workload("else").services.is_empty());
    let service = world.model.service(WEB).unwrap();
    assert_eq!(service.ports.iter().map(|p| p.mapping).collect::<Vec<_>>(), [mapping(80, 0), mapping(81, 0)]);
    assert_eq!(service.vips[0].to_string(), "/10.1.0.1");
}

#[test]
fn slices_give_services_without_selector_their_endpoints() {
    let slice = "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {namespace: demo, name: web-1, labels: {kubernetes.io/service-name: web}}\naddressType: IPv4\nports: [{name: http, port: 9090}]\nendpoints:\n- {addresses: [10.0.0.1], targetRef: {kind: Pod, name: web, uid: uid-web}}\n- {addresses: [10.0.0.2], targetRef: {kind: Pod, name: else, uid: stale}}\n- {addresses: [192.0.2.1], conditions: {ready: false}}\n";
    let text = pod("web", "10.0.0.1", "")
        + &pod("else", "10.0.0.2", "")
        + &service("{ports: [{name: http, port: 80}]}")
        + slice;
    let world = World::of(&text);
    assert_eq!(
        world.workload("web").services.get(WEB).unwrap()[..],
        [PortMapping { service_port: 80, target_port: 9090 }]
    );
    assert!(world.workload("else").services.is_empty(), "the slice names an earlier pod of that name");
    let bare = world.model.workload("Kubernetes/discovery.k8s.io/EndpointSlice/demo/web-1/192.0.2.1").unwrap();
    assert_eq!((bare.health, bare.services.get(WEB).unwrap()[..].len()), (Health::Unhealthy, 1));
    assert_eq!(world.model.workloads().count(), 3);
}

#[test]
fn service_options_become_load_balancing() {
    let of = |spec: &str| World::of(&service(spec)).model.service(WEB).cloned();
    let lb = |spec: &str| {
        of(spec).unwrap().load_balancing.clone().map(|lb| (lb.mode, lb.routing_preference.len(), lb.health_policy))
    };
    assert_eq!(lb("{clusterIP: None}"), None);
    assert_eq!(lb("{internalTrafficPolicy: Local}"), Some((LoadBalancingMode::Strict, 1, HealthPolicy::OnlyHealthy)));
    assert_eq!(
        lb("{trafficDistribution: PreferClose}"),
        Some((LoadBalancingMode::Failover, 3, HealthPolicy::OnlyHealthy))
    );
    assert_eq!(
        lb("{trafficDistribution: PreferSameNode}"),
        Some((LoadBalancingMode::Failover, 5, HealthPolicy::OnlyHealthy))
    );
    assert_eq!(lb("{publishNotReadyAddresses: true}"), Some((LoadBalancingMode::Standard, 0, HealthPolicy::AllowAll)));
    let dual = of("{clusterIPs: [10.1.0.1, \"2001:db8::1\"], ipFamilies: [IPv4, IPv6]}").unwrap();
    assert_eq!((dual.vips.len(), dual.ip_families), (2, IpFamilies::Dual));
    assert_eq!(of("{clusterIP: None}").unwrap().vips, []);
    assert!(of("{type: ExternalName, externalName: example.com}").is_none());
}

#[test]
fn authorization_policies_translate_to_what_they_say() {
    let pods = pod("web", "10.0.0.1", "") + &pod("else", "10.0.0.2", "");
    let spec = "{selector: {matchLabels: {app: web}}, rules: [{from: [{source: {serviceAccounts: [client]}}], to: [{operation: {ports: [\"80\"]}}]}, {from: [{source: {principals: [\"*/sa/admin\"]}}]}]}";
    let world = World::of(&(pods.clone() + &authz("demo", "p", spec)));
    assert_eq!(world.workload("web").authorization_policies, ["demo/p".into()]);
    for (destination, port, source, allowed) in [
        ("web", 80, Some("client"), true),
        ("web", 81, Some("client"), false),
        ("web", 81, Some("admin"), true),
        ("web", 80, None, false),
        ("else", 81, None, true),
    ] {
        assert_eq!(world.allows(destination, port, source), allowed, "{destination} {port} {source:?}");
    }
    let nothing = World::of(&(pods.clone() + &authz("demo", "allow-nothing", "{}")));
    assert!(!nothing.allows("else", 80, Some("client")));
    let mesh_wide = World::of(&(pods.clone() + &authz("istio-system", "deny-all", "{action: DENY, rules: [{}]}")));
    assert!(!mesh_wide.allows("else", 80, Some("client")));
    let root_selector = World::of(&(pods + &authz("istio-system", "p", "{selector: {matchLabels: {app: web}}}")));
    assert_eq!((root_selector.allows("web", 80, None), root_selector.allows("else", 80, None)), (false, true));
}

#[test]
fn layer_7_conditions_make_an_allow_stricter_and_leave_the_rest_of_a_deny() {
    let with = |spec: &str| {
        let mut world = World::new();
        world.set("f.yaml", &(pod("web", "10.0.0.1", "") + &authz("demo", "p", spec)));
        assert_eq!(world.catalogue.problems().len(), 1);
        world.allows("web", 80, Some("client"))
    };
    assert!(!with("{rules: [{to: [{operation: {methods: [GET]}}]}]}"));
    assert!(!with("{action: DENY, rules: [{to: [{operation: {methods: [GET], ports: [\"80\"]}}]}]}"));
    assert!(with("{action: DENY, rules: [{to: [{operation: {methods: [GET]}}]}]}"));
    assert!(with("{action: DENY, rules: [{when: [{key: \"request.headers[x]\", values: [y]}]}]}"));
}

#[test]
fn dry_run_policies_stay_dry_and_waypoint_policies_stay_out() {
    let dry = authz("demo", "p", "{action: DENY, rules: [{}]}")
        .replace("name: p}", "name: p, annotations: {istio.io/dry-run: \"true\"}}");
    assert!(World::of(&(pod("web", "10.0.0.1", "") + &dry)).allows("web", 80, None));
    let mut world = World::new();
    for (spec, problems) in [
        ("{targetRefs: [{kind: Service, name: web}]}", 1),
        ("{targetRefs: [{kind: Service, name: web}], action: CUSTOM, provider: {name: p}, rules: [{}]}", 1),
        // Wrong, and still nobody's to enforce here.
        ("{targetRefs: [{kind: Service, name: web}], rules: [{form: []}]}", 2),
    ] {
        world.set("f.yaml", &authz("demo", "p", spec));
        assert_eq!((world.model.policies().count(), world.catalogue.problems().len()), (0, problems), "{spec}");
    }
    // Attached to nothing, it is a policy of its namespace.
    for spec in ["{targetRefs: [], action: DENY, rules: [{}]}", "{targetRefs: x, rules: [{}]}"] {
        let mut world = World::new();
        world.set("f.yaml", &(pod("web", "10.0.0.1", "") + &authz("demo", "p", spec)));
        assert!(!world.allows("web", 80, None), "{spec}");
    }
}

/// Whether plaintext to `web` is refused on ports 80 and 8080.
fn strict_on(manifests: &[String]) -> (bool, bool) {
    let world = World::of(&(pod("web", "10.0.0.1", "") + &manifests.concat()));
    assert!(
        world.allows("web", 80, Some("client")) && world.allows("web", 8080, Some("client")),
        "identities are never refused"
    );
    let missing = world.model.policies_for(world.workload("web")).missing;
    assert!(missing.is_empty(), "{missing:?}");
    (!world.allows("web", 80, None), !world.allows("web", 8080, None))
}

#[test]
fn peer_authentication_levels_and_ports_combine_as_documented() {
    let mesh = |mode: &str| peer("istio-system", "default", &format!("{{mtls: {{mode: {mode}}}}}"));
    let namespace = |mode: &str| peer("demo", "default", &format!("{{mtls: {{mode: {mode}}}}}"));
    let own = |mtls: &str, ports: &str| {
        peer(
            "demo",
            "web",
            &format!("{{selector: {{matchLabels: {{app: web}}}}, mtls: {{mode: {mtls}}}, portLevelMtls: {{{ports}}}}}"),
        )
    };
    let port = |mode: &str| format!("\"8080\": {{mode: {mode}}}");
    let table: Vec<(&str, Vec<String>, (bool, bool))> = vec![
        ("nothing", vec![], (false, false)),
        ("mesh", vec![mesh("STRICT")], (true, true)),
        ("namespace", vec![namespace("STRICT")], (true, true)),
        ("namespace over mesh", vec![mesh("STRICT"), namespace("PERMISSIVE")], (false, false)),
        ("unset inherits", vec![mesh("STRICT"), namespace("UNSET")], (true, true)),
        ("workload over mesh", vec![mesh("STRICT"), own("DISABLE", "")], (false, false)),
        ("workload alone", vec![own("STRICT", "")], (true, true)),
        ("port exception", vec![own("STRICT", &port("PERMISSIVE"))], (true, false)),
        ("port exception to an inherited mode", vec![mesh("STRICT"), own("UNSET", &port("DISABLE"))], (true, false)),
        ("strict port", vec![own("PERMISSIVE", &port("STRICT"))], (false, true)),
        ("strict port, nothing inherited", vec![own("UNSET", &port("STRICT"))], (false, true)),
        ("all ports strict as inherited", vec![mesh("STRICT"), own("UNSET", &port("STRICT"))], (true, true)),
        ("three unset levels", vec![mesh("STRICT"), namespace("UNSET"), own("UNSET", "")], (true, true)),
        (
            "a selector in the root namespace does not apply",
            vec![own("STRICT", "").replace("namespace: demo", "namespace: istio-system")],
            (false, false),
        ),
    ];
    for (case, manifests, expected) in table {
        assert_eq!(strict_on(&manifests), expected, "{case}");
    }
}

#[test]
fn a_strict_denial_names_the_object_that_caused_it() {
    let world = World::of(&(pod("web", "10.0.0.1", "") + &peer("demo", "default", "\n  mtls:\n    mode: STRICT")));
    let destination = "10.0.0.1:80".parse().unwrap();
    let connection = Connection { source_ip: "10.0.0.9".parse().unwrap(), source_identity: None, destination };
    let decision = authorize(&world.model.policies_for(world.workload("web")), &connection);
    assert_eq!(decision.origin.unwrap().to_string(), "PeerAuthentication demo/default (f.yaml:12, spec.mtls)");
}

#[test]
fn a_change_reaches_what_depends_on_it_and_nothing_else() {
    let mut world = World::of(&(pod("web", "10.0.0.1", "") + &pod("else", "10.0.0.2", "")));
    let (web, other) = ("Kubernetes//Pod/demo/web", "Kubernetes//Pod/demo/else");
    assert_eq!(world.set("svc.yaml", &service("{selector: {app: web}, ports: [{port: 80}]}")), [web, WEB]);
    assert_eq!(world.set("svc.yaml", &service("{selector: {app: else}, ports: [{port: 80}]}")), [other, web]);
    assert_eq!(world.set("enrolment.yaml", &enrolment("web", "uid-web", "enabled")), [web]);
    assert_eq!(world.set("node.yaml", "apiVersion: v1\nkind: Node\nmetadata: {name: n1}\n"), Vec::<String>::new());
    let selecting = authz("demo", "p", "{selector: {matchLabels: {app: web}}}");
    assert_eq!(world.set("p.yaml", &selecting), ["demo/p", web]);
    assert_eq!(world.set("p.yaml", ""), ["-demo/p", web]);
    assert_eq!(world.set("svc.yaml", ""), [other.to_owned(), format!("-{WEB}")]);
}

/// Everything the model holds, in a comparable form.
fn contents(index: &ClusterIndex) -> Vec<String> {
    let model = index.model();
    let mut all: Vec<String> = model.workloads().map(|w| format!("{w:?}")).collect();
    all.extend(model.services().map(|s| format!("{s:?}")));
    all.extend(model.policies().map(|p| format!("{p:?}")));
    all.extend(index.problems().map(ToString::to_string));
    all.sort();
    all
}

fn any_entry() -> impl Strategy<Value = String> {
    let host = || proptest::sample::select(vec!["a.example.com", "b.example.com", "web.demo.svc.cluster.local"]);
    let spec = proptest::sample::select(vec![
        "resolution: DNS",
        "resolution: DNS, exportTo: [.]",
        "resolution: STATIC, endpoints: [{address: 192.0.2.7}]",
        "resolution: STATIC, workloadSelector: {labels: {app: web}}",
        "resolution: NONE, addresses: [192.0.2.0/24]",
    ]);
    let created = proptest::sample::select(vec!["2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"]);
    prop_oneof![
        (
            proptest::sample::select(vec!["x", "y"]),
            host(),
            spec,
            created,
            proptest::sample::select(vec!["demo", "istio-system"])
        )
            .prop_map(|(name, host, spec, created, namespace)| entry(
                &format!(
                    "namespace: {namespace}, name: {name}, creationTimestamp: \"{created}\", labels: {{app: web}}"
                ),
                &format!("{{hosts: [{host}], ports: [{{number: 443, name: tls}}], {spec}}}")
            )),
        (
            proptest::sample::select(vec!["web", "else"]),
            proptest::sample::select(vec!["", ", istio.io/use-waypoint: wp"])
        )
            .prop_map(|(app, label)| workload_entry(&format!("{{address: 192.0.2.9, labels: {{app: {app}{label}}}}}"))),
    ]
}

fn any_binding() -> impl Strategy<Value = String> {
    let name = || proptest::sample::select(vec!["wp", "web"]);
    let home = || proptest::sample::select(vec!["demo", "istio-system"]);
    let label = proptest::sample::select(vec![
        "istio.io/use-waypoint: wp",
        "istio.io/use-waypoint: web",
        "istio.io/use-waypoint: none",
        "istio.io/use-waypoint: wp, istio.io/use-waypoint-namespace: istio-system",
        "istio.io/use-waypoint: wp, istio.io/use-waypoint-canary: web",
        "team: a",
    ]);
    let serves = proptest::sample::select(vec!["all", "service", "workload"]);
    let from = proptest::sample::select(vec!["Same", "All", "Selector, selector: {matchLabels: {team: a}}"]);
    let instance = |(name, gateway): (&str, &str)| {
        let labels = format!("labels: {{app: {name}, gateway.networking.k8s.io/gateway-name: {gateway}}}");
        pod(name, "10.0.0.7", "").replace(&format!("labels: {{app: {name}}}"), &labels)
    };
    prop_oneof![
        (home(), name(), serves, from).prop_map(|(namespace, name, serves, from)| waypoint::gateway(
            &format!("namespace: {namespace}, name: {name}, labels: {{istio.io/waypoint-for: {serves}}}"),
            &format!(", allowedRoutes: {{namespaces: {{from: {from}}}}}"),
        )),
        (home(), label.clone()).prop_map(|(name, labels)| waypoint::namespace(name, labels)),
        (home(), name(), label, name()).prop_map(|(namespace, name, labels, app)| format!("---\napiVersion: v1\nkind: Service\nmetadata: {{namespace: {namespace}, name: {name}, labels: {{{labels}}}}}\nspec: {{selector: {{app: {app}}}, ports: [{{port: 80}}]}}\n")),
        (name(), name()).prop_map(instance),
        proptest::sample::select(vec!["ALLOW_ANY", "REGISTRY_ONLY"]).prop_map(|mode| format!("---\napiVersion: v1\nkind: ConfigMap\nmetadata: {{namespace: istio-system, name: istio}}\ndata: {{mesh: \"outboundTrafficPolicy: {{mode: {mode}}}\"}}\n")),
    ]
}

fn any_manifest() -> impl Strategy<Value = String> {
    let name = || proptest::sample::select(vec!["web", "else"]);
    let namespace = || proptest::sample::select(vec!["demo", "istio-system"]);
    let selector = || {
        proptest::sample::select(vec![
            "",
            "selector: {matchLabels: {app: web}}, ",
            "selector: {matchLabels: {app: else}}, ",
        ])
    };
    let mode = || proptest::sample::select(vec!["STRICT", "PERMISSIVE", "UNSET"]);
    prop_oneof![
        1 => (name(), 1..4u8).prop_map(|(n, ip)| pod(n, &format!("10.0.0.{ip}"), "")),
        1 => (name(), name()).prop_map(|(n, uid)| enrolment(n, &format!("uid-{uid}"), "enabled")),
        1 => name().prop_map(|app| service(&format!("{{selector: {{app: {app}}}, ports: [{{port: 80, targetPort: http}}]}}"))),
        1 => Just(service("{ports: [{name: http, port: 80}]}")),
        1 => (name(), name()).prop_map(|(n, p)| format!("---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{namespace: demo, name: {n}, labels: {{kubernetes.io/service-name: web}}}}\nports: [{{name: http, port: 9}}]\nendpoints: [{{addresses: [10.0.0.1], targetRef: {{kind: Pod, name: {p}}}}}, {{addresses: [192.0.2.1]}}]\n")),
        1 => proptest::sample::select(vec!["a", "b"]).prop_map(|zone| format!("---\napiVersion: v1\nkind: Node\nmetadata: {{name: n1, labels: {{topology.kubernetes.io/zone: {zone}}}}}\n")),
        1 => (namespace(), proptest::sample::select(vec!["PreferClose", "x"])).prop_map(|(n, d)| format!("---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {n}, labels: {{topology.istio.io/network: {}}}, annotations: {{networking.istio.io/traffic-distribution: {d}}}}}\n", d.to_lowercase())),
        1 => (namespace(), name(), selector()).prop_map(|(ns, n, s)| authz(ns, n, &format!("{{{s}action: ALLOW}}"))),
        1 => (namespace(), name(), selector(), mode(), mode()).prop_map(|(ns, n, s, m, p)| {
            let ports = if s.is_empty() { String::new() } else { format!(", portLevelMtls: {{\"80\": {{mode: {p}}}}}") };
            peer(ns, n, &format!("{{{s}mtls: {{mode: {m}}}{ports}}}"))
        }),
        2 => any_entry(),
        4 => any_binding(),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn equals_a_rebuild_from_scratch(steps in prop::collection::vec((0..3u8, prop::collection::vec(any_manifest(), 0..4)), 1..8)) {
        let mut world = World::new();
        let mut files = BTreeMap::new();
        for (file, manifests) in steps {
            let (file, text) = (format!("{file}.yaml"), manifests.concat());
            world.set(&file, &text);
            files.insert(file, text);
        }
        let mut rebuilt = World::new();
        for (file, text) in &files {
            rebuilt.set(file, text);
        }
        prop_assert_eq!(contents(&world.index), contents(&rebuilt.index));
    }
}
