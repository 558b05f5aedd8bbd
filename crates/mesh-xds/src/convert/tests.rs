use mesh_core::{
    origin::Origin,
    policy::{Action, Clause, Match, Policy, Rule, Scope, ServiceAccountMatch, StringMatch},
    service::{
        AppProtocol, HealthPolicy, IpFamilies, LoadBalancing, LoadBalancingMode, Scope as LbScope, Service,
        ServicePort, Visibility,
    },
    workload::{
        ApplicationTunnel, Health, Locality, NetworkMode, OutboundPolicy, PortMapping, TunnelProtocol, Workload,
        WorkloadType,
    },
};
use proptest::prelude::*;

use super::*;

fn text() -> impl Strategy<Value = Arc<str>> {
    "[a-z][a-z0-9.-]{0,12}".prop_map(Into::into)
}

fn ip() -> impl Strategy<Value = IpAddr> {
    prop_oneof![any::<[u8; 4]>().prop_map(IpAddr::from), any::<[u8; 16]>().prop_map(IpAddr::from)]
        .prop_map(canonical_ip)
}

fn prefix() -> impl Strategy<Value = IpNet> {
    (ip(), any::<u8>()).prop_map(|(ip, n)| {
        let max = if ip.is_ipv4() { 32 } else { 128 };
        IpNet::new(ip, n % (max + 1)).unwrap()
    })
}

fn gateway() -> impl Strategy<Value = GatewayAddress> {
    let destination = prop_oneof![
        (text(), ip()).prop_map(|(network, ip)| GatewayDestination::Address(NetworkAddress::new(network, ip))),
        (text(), text()).prop_map(|(namespace, hostname)| GatewayDestination::Hostname { namespace, hostname }),
    ];
    (destination, any::<u16>())
        .prop_map(|(destination, hbone_mtls_port)| GatewayAddress { destination, hbone_mtls_port })
}

prop_compose! {
    fn workload()(
        (uid, name, namespace, account, domain) in (text(), text(), text(), text(), text()),
        addresses in prop::collection::vec(ip(), 0..3),
        (hbone, host, unhealthy, native) in (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>()),
        waypoint in prop::option::of(gateway()),
        tunnel in prop::option::of((any::<bool>(), 1u16..)),
        (zone, subzone, network, cluster, node) in (text(), text(), text(), text(), text()),
        (canonical, revision, owner, hostname) in (text(), text(), text(), text()),
        kind in 0..4usize,
        policies in prop::collection::btree_set(text(), 0..3),
        services in prop::collection::btree_map(text().prop_map(|t| Arc::from(format!("ns/{t}"))),
            prop::collection::vec((any::<u16>(), any::<u16>()), 0..3), 0..3),
        capacity in any::<u32>(),
        registry_only in prop::option::of(any::<bool>()),
    ) -> Workload {
        let mut w = Workload::new(uid, namespace, name);
        w.service_account = account;
        w.trust_domain = domain;
        w.addresses = addresses;
        w.tunnel_protocol = if hbone { TunnelProtocol::Hbone } else { TunnelProtocol::None };
        w.network_mode = if host { NetworkMode::HostNetwork } else { NetworkMode::Standard };
        w.health = if unhealthy { Health::Unhealthy } else { Health::Healthy };
        w.workload_type = [WorkloadType::CronJob, WorkloadType::Deployment, WorkloadType::Job, WorkloadType::Pod][kind];
        (w.network, w.cluster_id, w.node, w.hostname) = (network, cluster, node, hostname);
        (w.canonical_name, w.canonical_revision, w.workload_name) = (canonical, revision, owner);
        w.native_tunnel = native;
        w.waypoint = waypoint.clone();
        w.network_gateway = waypoint;
        w.application_tunnel = tunnel.map(|(proxy_protocol, port)| ApplicationTunnel { proxy_protocol, port: Some(port) });
        w.locality = Locality { region: format!("r-{zone}").into(), zone, subzone };
        w.authorization_policies = policies.into_iter().collect();
        w.services = services.into_iter().map(|(k, v)| (k, v.into_iter()
            .map(|(service_port, target_port)| PortMapping { service_port, target_port }).collect())).collect();
        w.capacity = capacity;
        w.outbound_policy = registry_only
            .map(|only| if only { OutboundPolicy::RegistryOnly } else { OutboundPolicy::AllowAny });
        w
    }
}

prop_compose! {
    fn matching()(
        strings in prop::collection::vec(prop_oneof![
            text().prop_map(StringMatch::Exact), text().prop_map(StringMatch::Prefix),
            text().prop_map(StringMatch::Suffix), Just(StringMatch::Presence)], 0..3),
        ips in prop::collection::vec(prefix(), 0..3),
        ports in prop::collection::vec(any::<u16>(), 0..3),
        accounts in prop::collection::vec((text(), text()), 0..3),
        field in 0..6usize,
    ) -> Match {
        let accounts: Vec<ServiceAccountMatch> = accounts.into_iter()
            .map(|(namespace, service_account)| ServiceAccountMatch { namespace, service_account }).collect();
        // Each of a kind by itself, so that none can take another's place.
        match field {
            0 => Match { namespaces: strings.clone(), source_ips: ips, ..Match::default() },
            1 => Match { not_namespaces: strings.clone(), not_source_ips: ips, ..Match::default() },
            2 => Match { principals: strings.clone(), destination_ips: ips, ..Match::default() },
            3 => Match { not_principals: strings.clone(), not_destination_ips: ips, ..Match::default() },
            4 => Match { destination_ports: ports, service_accounts: accounts, ..Match::default() },
            _ => Match { not_destination_ports: ports, not_service_accounts: accounts, ..Match::default() },
        }
    }
}

prop_compose! {
    fn policy()(
        (name, namespace, file) in (text(), text(), text()),
        (deny, dry_run) in any::<(bool, bool)>(), scope in 0..3usize, line in 1u32..9999,
        clauses in prop::collection::vec(prop::collection::vec(matching(), 0..3), 0..3),
    ) -> Policy {
        let origin = Origin { object: format!("AuthorizationPolicy {namespace}/{name}").into(), file: Some(file), line: Some(line), field: None };
        let rule = Rule {
            clauses: clauses.into_iter().map(|matches| Clause { matches }).collect(),
            origin: Origin { field: Some("spec.rules[0]".into()), line: Some(line + 3), ..origin.clone() },
        };
        Policy {
            name, namespace, rules: vec![rule], dry_run, origin,
            action: if deny { Action::Deny } else { Action::Allow },
            scope: [Scope::Global, Scope::Namespace, Scope::WorkloadSelector][scope],
        }
    }
}

const SCOPES: [LbScope; 6] =
    [LbScope::Network, LbScope::Region, LbScope::Zone, LbScope::Subzone, LbScope::Node, LbScope::Cluster];
const PROTOCOLS: [AppProtocol; 6] = [
    AppProtocol::Grpc,
    AppProtocol::Http11,
    AppProtocol::Http2,
    AppProtocol::Tcp,
    AppProtocol::Tls,
    AppProtocol::Unknown,
];

prop_compose! {
    fn service()(
        (namespace, name, hostname) in (text(), text(), text()),
        vips in prop::collection::vec((text(), ip()), 0..3),
        waypoint in prop::option::of(gateway()),
        balanced in prop::option::of((0..4usize, any::<bool>(), prop::sample::subsequence(SCOPES.to_vec(), 0..6))),
        ports in prop::collection::vec((any::<u16>(), any::<u16>(), 0..6usize), 0..3),
        names in prop::collection::vec(text(), 0..3),
        (families, canonical, ingress, private) in (0..4usize, any::<bool>(), any::<bool>(), any::<bool>()),
        range in "10\\.[0-9]\\.0\\.0/16",
    ) -> Service {
        let mut s = Service::new(namespace, name, hostname);
        s.vips = vips.into_iter().map(|(network, ip)| NetworkAddress::new(network, ip)).collect();
        s.cidr_vips = vec![("".into(), range.parse().unwrap())];
        s.weighted_waypoints = waypoint.iter().map(|g| (g.clone(), 7)).collect();
        s.waypoint = waypoint;
        s.load_balancing = balanced.map(|(mode, any_health, routing_preference)| LoadBalancing {
            routing_preference,
            mode: [LoadBalancingMode::Failover, LoadBalancingMode::Passthrough, LoadBalancingMode::Standard, LoadBalancingMode::Strict][mode],
            health_policy: if any_health { HealthPolicy::AllowAll } else { HealthPolicy::OnlyHealthy },
        });
        s.ports = ports.into_iter().map(|(service_port, target_port, protocol)| ServicePort {
            mapping: PortMapping { service_port, target_port },
            app_protocol: PROTOCOLS[protocol],
        }).collect();
        s.subject_alt_names = names;
        s.ip_families = [IpFamilies::Automatic, IpFamilies::Dual, IpFamilies::Ipv4Only, IpFamilies::Ipv6Only][families];
        s.canonical = canonical;
        s.ingress_use_waypoint = ingress;
        s.visibility = if private { Visibility::Namespace } else { Visibility::Public };
        s
    }
}

fn round_trip(resource: &Resource) -> Resource {
    let encoded = resource_to_wire(resource);
    resource_from_wire(encoded.type_url, &encoded.body).unwrap()
}

proptest! {
    #[test]
    fn workloads_survive_the_wire(w in workload()) {
        let Resource::Workload(back) = round_trip(&Resource::Workload(Arc::new(w.clone()))) else { panic!("kind changed") };
        prop_assert_eq!(&*back, &w);
    }

    #[test]
    fn services_survive_the_wire(s in service()) {
        let Resource::Service(back) = round_trip(&Resource::Service(Arc::new(s.clone()))) else { panic!("kind changed") };
        prop_assert_eq!(&*back, &s);
    }

    #[test]
    fn policies_survive_the_wire_with_file_and_line(p in policy()) {
        let Resource::Policy(back) = round_trip(&Resource::Policy(Arc::new(p.clone()))) else { panic!("kind changed") };
        prop_assert_eq!(&*back, &p);
    }

    #[test]
    fn any_bytes_are_a_resource_or_a_reason(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        for type_url in [ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL, "x"] {
            if let Err(problem) = resource_from_wire(type_url, &bytes) {
                prop_assert!(!problem.field.is_empty());
                unreadable_policy("ns/name", &bytes, &problem);
            }
        }
    }
}

fn rejected(message: wire::Workload) -> String {
    workload_from_wire(message).unwrap_err().to_string()
}

#[test]
fn a_rejection_names_the_field() {
    let base = || wire::Workload { uid: "u".to_owned(), ..wire::Workload::default() };
    assert_eq!(rejected(wire::Workload::default()), "uid: is empty");
    assert!(rejected(wire::Workload { addresses: vec![vec![1, 2, 3].into()], ..base() }).starts_with("addresses:"));
    assert!(rejected(wire::Workload { tunnel_protocol: 9, ..base() }).starts_with("tunnel_protocol: unknown value 9"));
    let services = [("no-slash".to_owned(), wire::PortList::default())].into();
    assert!(rejected(wire::Workload { services, ..base() }).contains("not namespace/hostname"));
    let waypoint = Some(wire::GatewayAddress::default());
    assert_eq!(rejected(wire::Workload { waypoint, ..base() }), "waypoint: has no destination");
}

#[test]
fn an_outbound_policy_that_is_not_one_rejects_the_workload() {
    let with = |change: fn(&mut wire::Extension)| {
        let mut limited = Workload::new("u", "ns", "name");
        limited.outbound_policy = Some(OutboundPolicy::RegistryOnly);
        let mut message = workload_to_wire(&limited);
        change(&mut message.extensions[0]);
        workload_from_wire(message)
    };
    assert_eq!(with(|_| ()).unwrap().outbound_policy, Some(OutboundPolicy::RegistryOnly));
    let told = |change| with(change).unwrap_err().to_string();
    assert!(told(|extension| extension.config = None).starts_with("extensions: fairway.outbound_traffic_policy"));
    assert!(told(|extension| extension.config.as_mut().unwrap().type_url.clear()).contains("does not hold"));
    assert!(told(|extension| extension.config.as_mut().unwrap().value = vec![0xff]).contains("cannot be decoded"));
}

#[test]
fn sidecar_tls_counts_as_plain_tcp() {
    let message = wire::Workload { uid: "u".to_owned(), tunnel_protocol: 2, ..wire::Workload::default() };
    assert_eq!(workload_from_wire(message).unwrap().tunnel_protocol, TunnelProtocol::None);
}

#[test]
fn wire_defaults_are_filled_in_once() {
    let w = workload_from_wire(wire::Workload { uid: "u".to_owned(), ..wire::Workload::default() }).unwrap();
    assert_eq!(
        (&*w.trust_domain, &*w.service_account, &*w.cluster_id, w.capacity),
        ("cluster.local", "default", "Kubernetes", 1)
    );
}

#[test]
fn a_policy_that_cannot_be_read_denies_its_scope() {
    let newer = proto::security::Authorization {
        name: "p".to_owned(),
        namespace: "ns".to_owned(),
        scope: 2,
        action: 9,
        ..Default::default()
    };
    let body = newer.encode_to_vec();
    let problem = resource_from_wire(AUTHORIZATION_TYPE_URL, &body).unwrap_err();
    let stand_in = unreadable_policy("ns/p", &body, &problem);
    assert_eq!((stand_in.action, stand_in.scope), (Action::Deny, Scope::WorkloadSelector));
    assert_eq!(stand_in.rules.len(), 1);
    let garbage = unreadable_policy("ns/p", &[0xff; 7], &problem);
    assert_eq!((garbage.scope, &*garbage.namespace), (Scope::Namespace, "ns"));
}

#[test]
fn the_stand_in_for_a_policy_covers_no_less_than_the_policy_did() {
    let problem = Unacceptable::new("resource", "undecodable");
    let policy = |namespace: &str, scope| {
        let (name, namespace) = ("p".to_owned(), namespace.to_owned());
        proto::security::Authorization { name, namespace, scope, action: 9, ..Default::default() }.encode_to_vec()
    };
    // A rule that is cut short makes the whole message undecodable.
    let cut = |mut body: Vec<u8>| {
        body.extend([0x2a, 0x7f, 0x01]);
        assert!(proto::security::Authorization::decode(&body[..]).is_err());
        body
    };
    let table = [
        ("istio-system", cut(policy("istio-system", 0)), Scope::Global),
        ("istio-system", vec![0xff; 7], Scope::Global),
        ("istio-system", policy("istio-system", 9), Scope::Global),
        ("istio-system", policy("istio-system", 0), Scope::Global),
        ("istio-system", policy("istio-system", 1), Scope::Namespace),
        ("istio-system", policy("istio-system", 2), Scope::WorkloadSelector),
        ("ns", cut(policy("ns", 2)), Scope::Namespace),
        ("ns", vec![0xff; 7], Scope::Namespace),
        ("ns", policy("ns", 9), Scope::Namespace),
        ("ns", policy("ns", 1), Scope::Namespace),
        ("ns", policy("ns", 2), Scope::WorkloadSelector),
    ];
    for (namespace, body, expected) in table {
        let stand_in = unreadable_policy(&format!("{namespace}/p"), &body, &problem);
        assert_eq!((stand_in.scope, stand_in.action), (expected, Action::Deny), "{namespace} {body:?}");
        assert_eq!(&*stand_in.namespace, namespace);
    }
}

#[test]
fn a_mapped_vip_is_an_ipv4_vip_and_stays_one() {
    let mapped = || wire::NetworkAddress {
        network: String::new(),
        address: std::net::Ipv4Addr::new(10, 0, 0, 9).to_ipv6_mapped().octets().to_vec().into(),
        length: None,
    };
    for length in [None, Some(128)] {
        let message = wire::Service {
            hostname: "h".to_owned(),
            addresses: vec![wire::NetworkAddress { length, ..mapped() }],
            ..wire::Service::default()
        };
        let service = service_from_wire(message).unwrap();
        assert_eq!(service.vips[0].to_string(), "/10.0.0.9");
        assert!(service.cidr_vips.is_empty());
    }
}

#[test]
fn a_policy_without_a_name_is_refused() {
    assert_eq!(policy_from_wire(proto::security::Authorization::default()).unwrap_err().to_string(), "name: is empty");
}
