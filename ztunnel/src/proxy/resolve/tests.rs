use mesh_core::{
    index::{Delta, Provenance, Resource},
    service::{AppProtocol, ServicePort},
    workload::{ApplicationTunnel, PortMapping, Ports},
};

use super::*;

const WEB: &str = "web.demo.svc.cluster.local";

fn workload(name: &str, ip: &str) -> Workload {
    let mut workload = Workload::new(format!("Kubernetes//Pod/demo/{name}"), "demo", name);
    workload.addresses = vec![ip.parse().unwrap()];
    workload
}

/// An endpoint of [`WEB`] that maps the service's named port 443 itself.
fn web() -> Workload {
    let ports = Ports::from_slice(&[PortMapping { service_port: 443, target_port: 8443 }]);
    Workload { services: [(format!("demo/{WEB}").into(), ports)].into_iter().collect(), ..workload("web", "10.0.0.1") }
}

fn service() -> Service {
    let port = |service_port, target_port| ServicePort {
        mapping: PortMapping { service_port, target_port },
        app_protocol: AppProtocol::Unknown,
    };
    Service {
        vips: vec![NetworkAddress::new("", [10, 96, 0, 1].into())],
        ports: vec![port(80, 8080), port(443, 0)],
        ..Service::new("demo", "web", WEB)
    }
}

fn index(workloads: &[&Workload], services: &[Service]) -> Index {
    let workloads = workloads.iter().map(|w| Resource::Workload(Arc::new((*w).clone())));
    let upserts = workloads.chain(services.iter().map(|s| Resource::Service(Arc::new(s.clone())))).collect();
    let mut index = Index::default();
    index.apply(Delta { provenance: Provenance::Xds, upserts, removals: Vec::new() });
    index
}

fn target(index: &Index, local: &Workload, authority: &str) -> Result<String, String> {
    let authority = authority.parse().unwrap();
    let own = |port| port == 15008;
    inbound_target(own, index, local, [10, 0, 0, 1].into(), &authority)
        .map(|target| target.to_string())
        .map_err(|error| error.to_string())
}

#[test]
fn an_authority_must_name_the_address_that_was_dialled() {
    let (web, index) = (web(), index(&[&web()], &[service()]));
    assert_eq!(target(&index, &web, "10.0.0.1:80").unwrap(), "10.0.0.1:80");
    assert_eq!(target(&index, &web, "10.0.0.2:80").unwrap_err(), "ip mismatch: 10.0.0.1 != 10.0.0.2");
    assert_eq!(target(&index, &web, "10.0.0.1:15008").unwrap_err(), "attempted recursive call to ourselves");
}

#[test]
fn a_host_name_is_translated_by_the_endpoints_ports_then_the_services() {
    let (web, index) = (web(), index(&[&web()], &[service()]));
    assert_eq!(target(&index, &web, &format!("{WEB}:443")).unwrap(), "10.0.0.1:8443");
    assert_eq!(target(&index, &web, &format!("{WEB}:80")).unwrap(), "10.0.0.1:8080");
    assert_eq!(target(&index, &web, &format!("{WEB}:81")).unwrap_err(), format!("unknown host or port: {WEB}:81"));
    assert!(target(&index, &workload("other", "10.0.0.1"), &format!("{WEB}:443")).is_err(), "a named port of others");
}

#[test]
fn a_waypoint_takes_what_has_it_for_a_waypoint() {
    let waypoint = workload("waypoint", "10.0.0.1");
    let gateway = |ip: [u8; 4]| GatewayAddress {
        destination: GatewayDestination::Address(NetworkAddress::new("", ip.into())),
        hbone_mtls_port: 15008,
    };
    let bound = Workload { waypoint: Some(gateway([10, 0, 0, 1])), ..workload("bound", "10.0.0.2") };
    let canary = Service { weighted_waypoints: vec![(gateway([10, 0, 0, 1]), 1)], ..service() };
    let index = index(&[&waypoint, &bound], &[canary]);
    for authority in ["10.0.0.2:80", "10.96.0.1:80"] {
        assert_eq!(target(&index, &waypoint, authority).unwrap(), "10.0.0.1:80", "{authority}");
    }
    assert!(target(&index, &waypoint, "10.0.0.3:80").is_err());
}

#[test]
fn an_application_tunnel_takes_everything_on_its_port() {
    let tunnel = ApplicationTunnel { proxy_protocol: false, port: Some(15088) };
    let proxy = Workload { application_tunnel: Some(tunnel), ..workload("proxy", "10.0.0.1") };
    assert_eq!(target(&index(&[&proxy], &[]), &proxy, "10.9.9.9:80").unwrap(), "10.0.0.1:15088");
}

#[test]
fn the_service_of_an_inbound_flow_is_the_named_one_or_the_first_with_its_port() {
    let api = Service { hostname: "api.demo.svc".into(), name: "api".into(), ..service() };
    let mut both = web();
    both.services.insert(api.key(), Ports::new());
    let known = index(&[&both], &[service(), api]);
    let name = |named| inbound_service(&known, &both, named, 8080).map(|service| service.name.to_string());
    assert_eq!((name(None).as_deref(), name(Some(WEB)).as_deref()), (Some("api"), Some("web")));

    let (web, index) = (web(), index(&[&web()], &[service()]));
    let found = |named, port| inbound_service(&index, &web, named, port).map(|service| service.hostname.to_string());
    assert_eq!(found(Some(WEB), 1), Some(WEB.to_owned()));
    assert_eq!(found(Some("not-ours"), 8443), Some(WEB.to_owned()));
    assert_eq!(found(None, 8080), Some(WEB.to_owned()));
    assert_eq!(found(None, 1), None);
}

#[test]
fn what_peers_tell_is_read_leniently() {
    let config = Config::default_for_tests();
    assert!(told(&config, &HeaderMap::new()).baggage.is_none());
    let mut headers = HeaderMap::new();
    headers.append("baggage", HeaderValue::from_static("k8s.namespace.name=demo"));
    headers.append("baggage", HeaderValue::from_static("service.name=web,,=,x"));
    headers.append("forwarded", HeaderValue::from_static("for=\"10.0.0.9:1\";host=web.demo.svc"));
    headers.append("x-forwarded-network", HeaderValue::from_static("elsewhere"));
    let told = told(&config, &headers);
    let baggage = told.baggage.unwrap();
    assert_eq!((baggage.namespace.as_deref(), baggage.canonical_name.as_deref()), (Some("demo"), Some("web")));
    assert_eq!(told.host.as_deref(), Some("web.demo.svc"));
    assert!(told.remote);
    let there = Config { network: "Elsewhere".into(), ..Config::default_for_tests() };
    assert!(!super::told(&there, &headers).remote, "case does not count");
}

#[test]
fn a_peer_waits_for_an_answer_longer_than_we_may_take() {
    let ours = WORKLOAD_WAIT + crate::proxy::upstream::CONNECT_TIMEOUT;
    assert!(mesh_hbone::Settings::default().answer_timeout > ours);
}
