use rand::{SeedableRng, rngs::StdRng};

use super::*;
use crate::{
    index::{Delta, Provenance, Resource},
    service::{AppProtocol, HealthPolicy, LoadBalancing, ServicePort},
    workload::{Health, PortMapping, Ports},
};

fn pod(name: &str, ip: &str, change: impl FnOnce(&mut Workload)) -> Workload {
    let mut workload = Workload::new(format!("Kubernetes//Pod/demo/{name}"), "demo", name);
    workload.addresses = vec![ip.parse().unwrap()];
    workload.service_account = name.into();
    workload.tunnel_protocol = TunnelProtocol::Hbone;
    change(&mut workload);
    workload
}

fn serves(service: &str) -> impl FnOnce(&mut Workload) {
    let key = Arc::from(format!("demo/{service}.demo.svc.cluster.local"));
    move |w| w.services = [(key, Ports::new())].into_iter().collect()
}

fn service(name: &str, vip: &str, ports: &[(u16, u16)], change: impl FnOnce(&mut Service)) -> Service {
    let mut service = Service::new("demo", name, format!("{name}.demo.svc.cluster.local"));
    service.vips = vec![NetworkAddress::new("", vip.parse().unwrap())];
    let mapping = |&(service_port, target_port)| PortMapping { service_port, target_port };
    service.ports =
        ports.iter().map(mapping).map(|mapping| ServicePort { mapping, app_protocol: AppProtocol::Unknown }).collect();
    change(&mut service);
    service
}

fn index_of(workloads: Vec<Workload>, services: Vec<Service>) -> Index {
    let workloads = workloads.into_iter().map(|w| Resource::Workload(Arc::new(w)));
    let upserts = workloads.chain(services.into_iter().map(|s| Resource::Service(Arc::new(s)))).collect();
    let mut index = Index::default();
    index.apply(Delta { provenance: Provenance::Xds, upserts, removals: Vec::new() });
    index
}

fn client() -> Workload {
    pod("client", "10.0.0.9", |_| ())
}

fn select_from(source: &Workload, index: &Index, destination: &str) -> Selection {
    select_with(source, index, destination, &[])
}

fn select_with(source: &Workload, index: &Index, destination: &str, lookups: &[Lookup]) -> Selection {
    let request = Request {
        source,
        source_ip: source.addresses[0],
        destination: destination.parse().unwrap(),
        exclude: &[],
        outbound_policy: OutboundPolicy::AllowAny,
        lookups,
    };
    let selection = select(index, &request, &mut StdRng::seed_from_u64(1));
    assert_eq!(selection.decision.is_allowed(), !matches!(selection.next_hop, NextHop::Reject { .. }));
    selection
}

fn hop(index: &Index, destination: &str) -> NextHop {
    select_from(&client(), index, destination).next_hop
}

fn rejected(index: &Index, destination: &str) -> (Reason, String) {
    match hop(index, destination) {
        NextHop::Reject { reason, detail } => (reason, detail),
        other => panic!("{other:?}"),
    }
}

fn accounts(accepted: &[Identity]) -> Vec<&str> {
    accepted.iter().map(|i| &*i.service_account).collect()
}

fn waypoint_at(ip: &str) -> GatewayAddress {
    let destination = GatewayDestination::Address(NetworkAddress::new("", ip.parse().unwrap()));
    GatewayAddress { destination, hbone_mtls_port: 15008 }
}

fn waypoint_named(name: &str) -> GatewayAddress {
    let hostname = format!("{name}.demo.svc.cluster.local").into();
    let destination = GatewayDestination::Hostname { namespace: "demo".into(), hostname };
    GatewayAddress { destination, hbone_mtls_port: 15008 }
}

/// A waypoint `gate` behind VIP 10.1.0.2, and `web` at 10.1.0.1 that may use it.
fn with_waypoint(reference: GatewayAddress, change: impl FnOnce(&mut Service)) -> Index {
    let web = service("web", "10.1.0.1", &[(80, 8080)], |s| {
        s.waypoint = Some(reference);
        change(s);
    });
    let gate = service("gate", "10.1.0.2", &[(15008, 15008)], |s| {
        s.subject_alt_names = vec!["spiffe://td/ns/x/sa/vouched".into(), "not an identity".into()]
    });
    index_of(vec![pod("web", "10.0.0.1", serves("web")), pod("gate", "10.0.0.2", serves("gate"))], vec![web, gate])
}

#[test]
fn an_unknown_destination_is_passed_through() {
    let selection = select_from(&client(), &Index::default(), "[::ffff:192.0.2.1]:443");
    assert_eq!(selection.next_hop, NextHop::Passthrough { address: "192.0.2.1:443".parse().unwrap() });
    assert_eq!(selection.decision.explanation, "passed through to 192.0.2.1:443");
}

#[test]
fn a_workload_that_speaks_hbone_gets_it_with_its_own_identity() {
    let index = index_of(vec![pod("web", "10.0.0.1", |_| ())], vec![]);
    let NextHop::Hbone(tunnel) = hop(&index, "10.0.0.1:8080") else { panic!() };
    assert_eq!(tunnel.address, "10.0.0.1:15008".parse().unwrap());
    assert_eq!(tunnel.authority.to_string(), "10.0.0.1:8080");
    assert_eq!(accounts(&tunnel.accepted), ["web"]);
}

#[test]
fn a_workload_that_does_not_gets_plain_tcp() {
    let index = index_of(vec![pod("web", "10.0.0.1", |w| w.tunnel_protocol = TunnelProtocol::None)], vec![]);
    assert_eq!(hop(&index, "10.0.0.1:8080"), NextHop::Tcp { address: "10.0.0.1:8080".parse().unwrap() });
}

#[test]
fn a_service_leads_to_an_endpoint_and_its_target_port() {
    let web =
        service("web", "10.1.0.1", &[(80, 8080)], |s| s.subject_alt_names = vec!["spiffe://td/ns/x/sa/vouched".into()]);
    let index = index_of(vec![pod("web", "10.0.0.1", serves("web"))], vec![web]);
    let selection = select_from(&client(), &index, "10.1.0.1:80");
    let NextHop::Hbone(tunnel) = selection.next_hop else { panic!() };
    assert_eq!(tunnel.authority.to_string(), "10.0.0.1:8080");
    assert_eq!(accounts(&tunnel.accepted), ["web", "vouched"]);
    assert_eq!(selection.service.unwrap().name.as_ref(), "web");
    assert_eq!(selection.destination_workload.unwrap().name.as_ref(), "web");
    assert_eq!(selection.decision.version, 1);
}

#[test]
fn a_service_is_preferred_over_a_workload_of_the_same_address() {
    let web = service("web", "10.0.0.7", &[(80, 8080)], |_| ());
    let index = index_of(vec![pod("web", "10.0.0.1", serves("web")), pod("other", "10.0.0.7", |_| ())], vec![web]);
    let NextHop::Hbone(tunnel) = hop(&index, "10.0.0.7:80") else { panic!() };
    assert_eq!(tunnel.authority.to_string(), "10.0.0.1:8080");
}

#[test]
fn a_range_counts_as_a_service() {
    let web =
        service("web", "10.1.0.1", &[(80, 8080)], |s| s.cidr_vips = vec![("".into(), "192.0.2.0/24".parse().unwrap())]);
    let index = index_of(vec![pod("web", "10.0.0.1", serves("web"))], vec![web]);
    assert!(matches!(hop(&index, "192.0.2.9:80"), NextHop::Hbone(_)));
}

#[test]
fn a_service_without_healthy_endpoint_rejects_also_after_the_last_was_excluded() {
    let sick = |w: &mut Workload| {
        serves("web")(w);
        w.health = Health::Unhealthy;
    };
    let web = || service("web", "10.1.0.1", &[(80, 8080)], |_| ());
    let (reason, detail) = rejected(&index_of(vec![pod("web", "10.0.0.1", sick)], vec![web()]), "10.1.0.1:80");
    assert_eq!(reason, Reason::NoEndpoint);
    assert_eq!(detail, "no healthy upstream: 10.1.0.1:80 (web.demo.svc.cluster.local:80)");

    let index = index_of(vec![pod("web", "10.0.0.1", serves("web"))], vec![web()]);
    let source = client();
    let tried = ["Kubernetes//Pod/demo/web".into()];
    let request = Request {
        source: &source,
        source_ip: source.addresses[0],
        destination: "10.1.0.1:80".parse().unwrap(),
        exclude: &tried,
        outbound_policy: OutboundPolicy::AllowAny,
        lookups: &[],
    };
    let next_hop = select(&index, &request, &mut StdRng::seed_from_u64(1)).next_hop;
    assert!(matches!(next_hop, NextHop::Reject { reason: Reason::NoEndpoint, .. }));
}

#[test]
fn a_passthrough_service_is_passed_through() {
    let lb = LoadBalancing {
        routing_preference: vec![],
        mode: LoadBalancingMode::Passthrough,
        health_policy: HealthPolicy::AllowAll,
    };
    let index = index_of(vec![], vec![service("web", "10.1.0.1", &[(80, 80)], |s| s.load_balancing = Some(lb))]);
    assert!(matches!(hop(&index, "10.1.0.1:80"), NextHop::Passthrough { .. }));
}

#[test]
fn a_services_waypoint_gets_the_original_destination() {
    for reference in [waypoint_at("10.1.0.2"), waypoint_named("gate"), waypoint_at("10.0.0.2")] {
        let by_service = reference != waypoint_at("10.0.0.2");
        let selection = select_from(&client(), &with_waypoint(reference, |_| ()), "10.1.0.1:80");
        let NextHop::Waypoint(tunnel) = selection.next_hop else { panic!() };
        assert_eq!(tunnel.address, "10.0.0.2:15008".parse().unwrap());
        assert_eq!(tunnel.authority.to_string(), "10.1.0.1:80");
        assert_eq!(accounts(&tunnel.accepted), if by_service { vec!["gate", "vouched"] } else { vec!["gate"] });
        assert_eq!(selection.service.unwrap().name.as_ref(), "web");
    }
}

#[test]
fn weighted_waypoints_come_before_the_single_one_unless_all_weigh_nothing() {
    let weigh = |weight| move |s: &mut Service| s.weighted_waypoints = vec![(waypoint_named("nowhere"), weight)];
    assert_eq!(rejected(&with_waypoint(waypoint_named("gate"), weigh(1)), "10.1.0.1:80").0, Reason::NoRoute);
    assert!(matches!(hop(&with_waypoint(waypoint_named("gate"), weigh(0)), "10.1.0.1:80"), NextHop::Waypoint(_)));
}

#[test]
fn an_unresolvable_waypoint_rejects_and_is_never_bypassed() {
    let (reason, detail) = rejected(&with_waypoint(waypoint_named("nowhere"), |_| ()), "10.1.0.1:80");
    assert_eq!(reason, Reason::NoRoute);
    assert_eq!(
        detail,
        "unknown waypoint: demo/nowhere.demo.svc.cluster.local, port 15008, is not known or has no healthy endpoint"
    );
}

#[test]
fn a_workloads_waypoint_is_used_only_when_the_workload_itself_was_addressed() {
    let web = |w: &mut Workload| {
        serves("web")(w);
        w.waypoint = Some(waypoint_named("gate"));
    };
    let services =
        vec![service("web", "10.1.0.1", &[(80, 8080)], |_| ()), service("gate", "10.1.0.2", &[(15008, 15008)], |_| ())];
    let index = index_of(vec![pod("web", "10.0.0.1", web), pod("gate", "10.0.0.2", serves("gate"))], services);
    assert!(matches!(hop(&index, "10.0.0.1:8080"), NextHop::Waypoint(_)));
    assert!(matches!(hop(&index, "10.1.0.1:80"), NextHop::Hbone(_)));
}

#[test]
fn a_waypoints_own_traffic_does_not_return_to_it() {
    let gate = pod("gate", "10.0.0.2", serves("gate"));
    let index = with_waypoint(waypoint_named("gate"), |_| ());
    assert!(matches!(select_from(&gate, &index, "10.1.0.1:80").next_hop, NextHop::Hbone(_)));
    let impostor = pod("gate", "10.0.0.3", serves("gate"));
    assert!(matches!(select_from(&impostor, &index, "10.1.0.1:80").next_hop, NextHop::Waypoint(_)));
}

#[test]
fn a_waypoints_own_traffic_does_not_go_to_its_canary() {
    let gate = pod("gate", "10.0.0.2", serves("gate"));
    let weighted =
        |s: &mut Service| s.weighted_waypoints = vec![(waypoint_named("gate"), 0), (waypoint_named("new"), 1)];
    let index = with_waypoint(waypoint_named("gate"), weighted);
    assert!(matches!(select_from(&gate, &index, "10.1.0.1:80").next_hop, NextHop::Hbone(_)));
}

fn multi_network(remote: impl FnOnce(&mut Workload), sans: &[&str]) -> Index {
    let gateway = GatewayAddress {
        destination: GatewayDestination::Address(NetworkAddress::new("n2", "192.0.2.1".parse().unwrap())),
        hbone_mtls_port: 15008,
    };
    let web = pod("web", "10.9.0.1", |w| {
        serves("web")(w);
        w.network = "n2".into();
        w.network_gateway = Some(gateway);
        remote(w);
    });
    let gate = pod("gate", "192.0.2.1", |w| w.network = "n2".into());
    let sans = sans.iter().map(|&s| s.into()).collect();
    index_of(vec![web, gate], vec![service("web", "10.1.0.1", &[(80, 8080)], |s| s.subject_alt_names = sans)])
}

#[test]
fn a_foreign_network_is_reached_by_name_through_its_gateway() {
    let index = multi_network(|_| (), &["spiffe://cluster.local/ns/demo/sa/web"]);
    let NextHop::DoubleHbone { outer, inner } = hop(&index, "10.1.0.1:80") else { panic!() };
    assert_eq!(outer.address, "192.0.2.1:15008".parse().unwrap());
    assert_eq!(outer.authority.to_string(), "web.demo.svc.cluster.local:80");
    assert_eq!(accounts(&outer.accepted), ["gate"]);
    assert_eq!((inner.authority, accounts(&inner.accepted)), (outer.authority, vec!["web"]));
}

#[test]
fn a_foreign_network_without_a_way_in_rejects() {
    let no_sans = rejected(&multi_network(|_| (), &[]), "10.1.0.1:80");
    assert_eq!(no_sans.0, Reason::NoRoute);
    assert!(no_sans.1.contains("names no identity"), "{}", no_sans.1);
    // Without gateway and address the workload is not even eligible, with an address only its gateway is missing.
    let no_gateway = rejected(&multi_network(|w| w.network_gateway = None, &["spiffe://td/ns/x/sa/y"]), "10.1.0.1:80");
    assert!(no_gateway.1.contains("whose gateway is not known"), "{}", no_gateway.1);
}

#[test]
fn the_address_dialled_follows_the_applications_family_within_the_services() {
    let dual = |families| {
        let web = pod("web", "10.0.0.1", |w| {
            serves("web")(w);
            w.addresses.push("2001:db8::1".parse().unwrap());
        });
        let change = |s: &mut Service| {
            s.vips.push(NetworkAddress::new("", "2001:db8:1::1".parse().unwrap()));
            s.ip_families = families;
        };
        index_of(vec![web], vec![service("web", "10.1.0.1", &[(80, 80)], change)])
    };
    let table = [
        (IpFamilies::Automatic, "10.1.0.1:80", "10.0.0.1:15008"),
        (IpFamilies::Automatic, "[2001:db8:1::1]:80", "[2001:db8::1]:15008"),
        (IpFamilies::Ipv4Only, "[2001:db8:1::1]:80", "10.0.0.1:15008"),
        (IpFamilies::Ipv6Only, "10.1.0.1:80", "[2001:db8::1]:15008"),
        (IpFamilies::Dual, "10.1.0.1:80", "10.0.0.1:15008"),
    ];
    for (families, asked, dialled) in table {
        let NextHop::Hbone(tunnel) = hop(&dual(families), asked) else { panic!() };
        assert_eq!(tunnel.address.to_string(), dialled, "{families:?} {asked}");
    }
    let NextHop::Hbone(tunnel) = hop(&dual(IpFamilies::Automatic), "[2001:db8::1]:80") else { panic!() };
    assert_eq!(tunnel.address.to_string(), "[2001:db8::1]:15008");
}

#[test]
fn a_source_confined_to_the_registry_gets_nowhere_else() {
    let mut source = client();
    source.outbound_policy = Some(OutboundPolicy::RegistryOnly);
    let web = service("web", "10.1.0.1", &[(80, 8080)], |_| ());
    let index = index_of(vec![pod("web", "10.0.0.1", serves("web"))], vec![web]);
    for known in ["10.1.0.1:80", "10.0.0.1:8080"] {
        assert!(matches!(select_from(&source, &index, known).next_hop, NextHop::Hbone(_)), "{known}");
    }
    let NextHop::Reject { reason, detail } = select_from(&source, &index, "192.0.2.1:443").next_hop else { panic!() };
    assert_eq!(reason, Reason::NotInRegistry);
    assert_eq!(detail, "192.0.2.1:443 is not in the registry, and outboundTrafficPolicy is REGISTRY_ONLY");
    source.outbound_policy = Some(OutboundPolicy::AllowAny);
    assert!(matches!(select_from(&source, &index, "192.0.2.1:443").next_hop, NextHop::Passthrough { .. }));
}

#[test]
fn an_endpoint_known_by_name_is_looked_up_then_dialled() {
    let external = pod("external", "10.0.0.1", |w| {
        serves("ext")(w);
        w.addresses = Vec::new();
        w.hostname = "ext.example.com".into();
        w.tunnel_protocol = TunnelProtocol::None;
    });
    let index = index_of(vec![external], vec![service("ext", "10.1.0.1", &[(443, 443)], |_| ())]);
    assert_eq!(hop(&index, "10.1.0.1:443"), NextHop::Lookup { host: "ext.example.com".into() });
    let found = |addresses: &[&str]| {
        let addresses = addresses.iter().map(|a| a.parse().unwrap()).collect();
        let lookups = [Lookup { host: "ext.example.com".into(), addresses }];
        select_with(&client(), &index, "10.1.0.1:443", &lookups).next_hop
    };
    assert_eq!(found(&["2001:db8::1", "192.0.2.1"]), NextHop::Tcp { address: "192.0.2.1:443".parse().unwrap() });
    assert_eq!(found(&["2001:db8::1"]), NextHop::Tcp { address: "[2001:db8::1]:443".parse().unwrap() });
    assert!(matches!(found(&[]), NextHop::Reject { reason: Reason::Lookup, .. }));
}
