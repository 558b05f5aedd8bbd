use std::net::IpAddr;

use mesh_core::service::Visibility;

use super::*;

const API: &str = "demo/api.example.com";

fn api(spec: &str) -> String {
    entry("namespace: demo, name: api", &format!("{{hosts: [api.example.com], {spec}}}"))
}

#[test]
fn resolution_none_passes_through_to_ranges_and_addresses_alike() {
    let text = api(
        "addresses: [203.0.113.0/24, 198.51.100.7], ports: [{number: 443, name: tls}], resolution: NONE, location: MESH_EXTERNAL",
    );
    let world = World::of(&text);
    let service = world.model.service(API).unwrap();
    let lb = service.load_balancing.clone().unwrap();
    assert_eq!((lb.mode, lb.health_policy), (LoadBalancingMode::Passthrough, HealthPolicy::AllowAll));
    assert_eq!(service.vips[0].to_string(), "/198.51.100.7");
    assert_eq!(service.cidr_vips, [("".into(), "203.0.113.0/24".parse().unwrap())]);
    assert_eq!((world.model.workloads().count(), service.canonical), (0, true));
}

#[test]
fn static_endpoints_become_workloads_as_written() {
    let text = api(
        "addresses: [198.51.100.7], ports: [{number: 443, name: tls, protocol: TLS, targetPort: 8443}, {number: 53, name: dns, protocol: UDP}], resolution: STATIC, subjectAltNames: [spiffe://other/ns/x/sa/y], endpoints: [{address: 192.0.2.1, ports: {tls: 9443}, weight: 3, locality: r/z/s, serviceAccount: api, network: net}, {address: \"2001:db8::1\"}]",
    );
    let mut world = World::new();
    world.set("f.yaml", &text);
    let told: Vec<String> = world.catalogue.problems().iter().map(|p| p.field.clone()).collect();
    assert_eq!(told, ["spec.ports[1].protocol"], "UDP is left out");
    let of = |address: &str| {
        let uid = format!("Kubernetes/networking.istio.io/ServiceEntry/demo/api/{address}");
        world.model.workload(&uid).unwrap().clone()
    };
    let (first, second) = (of("192.0.2.1"), of("2001:db8::1"));
    assert_eq!(first.services.get(API).unwrap()[..], [PortMapping { service_port: 443, target_port: 9443 }]);
    assert_eq!(second.services.get(API).unwrap()[..], [PortMapping { service_port: 443, target_port: 8443 }]);
    assert_eq!((first.capacity, &*first.service_account, &*first.network), (3, "api", "net"));
    assert_eq!((&*first.locality.region, &*first.locality.zone, &*first.locality.subzone), ("r", "z", "s"));
    assert_eq!((second.capacity, second.addresses.len()), (1, 1));
    let service = world.model.service(API).unwrap();
    assert_eq!(service.subject_alt_names, ["spiffe://other/ns/x/sa/y".into()]);
    assert_eq!((service.ports.len(), service.vips.len()), (1, 1), "automatic addresses are left out as well");
}

#[test]
fn dns_names_become_workloads_with_a_host_name() {
    let implicit = World::of(&entry(
        "namespace: demo, name: api",
        "{hosts: [a.example.com, b.example.com], ports: [{number: 80, name: http}], resolution: DNS}",
    ));
    let mut hosts: Vec<(String, usize)> =
        implicit.model.workloads().map(|w| (w.hostname.to_string(), w.services.len())).collect();
    hosts.sort();
    assert_eq!(hosts, [("a.example.com".to_owned(), 1), ("b.example.com".to_owned(), 1)]);
    let explicit = World::of(&api(
        "ports: [{number: 80, name: http}], resolution: DNS_ROUND_ROBIN, endpoints: [{address: real.example.net}]",
    ));
    let uid = "Kubernetes/networking.istio.io/ServiceEntry/demo/api/real.example.net";
    let workload = explicit.model.workload(uid).unwrap();
    assert_eq!((&*workload.hostname, workload.addresses.len(), workload.services.len()), ("real.example.net", 0, 1));
}

#[test]
fn an_entry_selects_pods_and_workload_entries() {
    let selecting = api(
        "ports: [{number: 80, name: http}, {number: 81, name: admin, targetPort: 9000}], resolution: STATIC, workloadSelector: {labels: {app: web}}",
    );
    let vm = workload_entry("{address: 192.0.2.9, labels: {app: web}, ports: {admin: 9001}, weight: 2}");
    let world = World::of(&(selecting + &pod("web", "10.0.0.1", "") + &vm));
    let mapping = |service_port, target_port| PortMapping { service_port, target_port };
    assert_eq!(world.workload("web").services.get(API).unwrap()[..], [mapping(80, 8080), mapping(81, 9000)]);
    let vm = world.model.workload("Kubernetes/networking.istio.io/WorkloadEntry/demo/vm").unwrap();
    assert_eq!(vm.services.get(API).unwrap()[..], [mapping(80, 80), mapping(81, 9001)]);
    assert_eq!((vm.capacity, vm.health, vm.tunnel_protocol), (2, Health::Healthy, TunnelProtocol::None));
}

#[test]
fn a_workload_entry_is_an_endpoint_of_services_and_subject_to_policies() {
    let vm = workload_entry("{address: vm.example.com, labels: {app: vm}, ports: {http: 8080}, serviceAccount: vm}");
    let text = vm
        + &service(
            "{selector: {app: vm}, ports: [{port: 80, targetPort: http}, {port: 81, targetPort: none}, {port: 82, targetPort: 9}]}",
        )
        + &authz("demo", "p", "{selector: {matchLabels: {app: vm}}}");
    let world = World::of(&text);
    let vm = world.model.workload("Kubernetes/networking.istio.io/WorkloadEntry/demo/vm").unwrap();
    let ports: Vec<(u16, u16)> =
        vm.services.get(WEB).unwrap().iter().map(|p| (p.service_port, p.target_port)).collect();
    assert_eq!(ports, [(80, 8080), (82, 9)]);
    assert_eq!((&*vm.hostname, vm.addresses.len(), &*vm.service_account), ("vm.example.com", 0, "vm"));
    assert_eq!(vm.authorization_policies, ["demo/p".into()]);
}

fn addresses(world: &World, key: &str) -> Vec<IpAddr> {
    world.model.service(key).unwrap().vips.iter().map(|vip| vip.ip).collect()
}

#[test]
fn hosts_without_addresses_get_lasting_ones_unless_they_cannot_be_used() {
    let named = |name: &str| {
        entry(
            &format!("namespace: demo, name: {name}"),
            &format!("{{hosts: [{name}.example.com], ports: [], resolution: DNS}}"),
        )
    };
    let mut world = World::of(&named("a"));
    let before = addresses(&world, "demo/a.example.com");
    let [IpAddr::V4(v4), IpAddr::V6(v6)] = before[..] else { panic!("{before:?}") };
    assert_eq!((&v4.octets()[..2], &v6.segments()[..3]), (&[240, 240][..], &[0x2001, 2, 0][..]));
    world.set("more.yaml", &named("b"));
    assert_eq!(addresses(&world, "demo/a.example.com"), before);
    assert_ne!(addresses(&world, "demo/b.example.com"), before);
    assert_eq!(addresses(&World::of(&(named("b") + &named("a"))), "demo/a.example.com"), before);

    let none = |text: &str, key: &str| assert_eq!(addresses(&World::of(text), key), Vec::<IpAddr>::new(), "{key}");
    none(&api("ports: [], resolution: NONE"), API);
    let opted_out = "namespace: demo, name: api, labels: {networking.istio.io/enable-autoallocate-ip: \"false\"}";
    none(&entry(opted_out, "{hosts: [api.example.com], resolution: DNS}"), API);
    let wildcard = "{hosts: [\"*.example.com\"], resolution: STATIC, endpoints: [{address: 192.0.2.1}]}";
    none(&entry("namespace: demo, name: api", wildcard), "demo/*.example.com");
}

#[test]
fn export_to_becomes_visibility() {
    let visibility = |to: &str| {
        let world = World::of(&api(&format!("resolution: NONE, exportTo: [{to}]")));
        world.model.service(API).map(|s| s.visibility)
    };
    assert_eq!(visibility("\"*\""), Some(Visibility::Public));
    assert_eq!(visibility("."), Some(Visibility::Namespace));
    assert_eq!(visibility("demo"), Some(Visibility::Namespace));
    assert_eq!(visibility("\"~\""), None);
}

#[test]
fn one_claimant_of_a_host_wins_per_namespace_and_one_of_those_is_canonical() {
    let claim = |namespace: &str, name: &str, created: &str, more: &str| {
        entry(
            &format!("namespace: {namespace}, name: {name}, creationTimestamp: {created}"),
            &format!("{{hosts: [api.example.com], resolution: STATIC, endpoints: [{{address: 192.0.2.1}}]{more}}}"),
        )
    };
    let mut world = World::of(
        &(claim("demo", "young", "2026-02-01T00:00:00Z", "")
            + &claim("demo", "old", "2026-01-01T00:00:00Z", "")
            + &claim("other", "x", "2025-01-01T00:00:00Z", ", exportTo: [.]")),
    );
    let service = |world: &World, key: &str| world.model.service(key).map(|s| (s.name.to_string(), s.canonical));
    assert_eq!(service(&world, API), Some(("old".into(), true)));
    assert_eq!(service(&world, "other/api.example.com"), Some(("x".into(), false)), "a private one is not canonical");
    assert_eq!(world.model.workloads().count(), 2, "the loser has no endpoints");
    // A Service beats an entry of the same host, and gives it back.
    let shadowing = entry(
        "namespace: demo, name: shadow",
        "{hosts: [web.demo.svc.cluster.local], resolution: STATIC, endpoints: [{address: 192.0.2.2}]}",
    );
    world.set("shadow.yaml", &shadowing);
    assert_eq!(service(&world, WEB), Some(("shadow".into(), true)));
    world.set("web.yaml", &super::service("{ports: [{port: 80}]}"));
    assert_eq!(service(&world, WEB), Some(("web".into(), true)));
    world.set("web.yaml", "");
    assert_eq!(service(&world, WEB), Some(("shadow".into(), true)));
}

#[test]
fn a_wrong_entry_is_told_by_file_line_field_and_remedy() {
    let table = [
        ("resolution: DYNAMIC_DNS", "spec.resolution: DYNAMIC_DNS needs a waypoint"),
        ("resolution: STATICC", "spec.resolution: `STATICC` is not valid here; expected one of NONE, STATIC, DNS"),
        ("resolutoin: DNS", "spec.resolutoin: unknown field; did you mean `resolution`?"),
        ("resolution: NONE, endpoints: [{address: 192.0.2.1}]", "spec.endpoints: resolution NONE goes where"),
        ("resolution: STATIC, endpoints: [{address: a.b}]", "spec.endpoints[0].address: a host name is not static"),
        ("resolution: STATIC, endpoints: [{}]", "spec.endpoints[0]: `address` is missing"),
        ("resolution: STATIC", "spec: the entry has no endpoints"),
        ("resolution: DNS, addresses: [10.0.0.0/8]", "spec.addresses[0]: a range cannot stand for"),
        ("addresses: [10.0.0]", "spec.addresses[0]: `10.0.0` is not an address or range"),
        ("ports: [{number: 0, name: a}]", "spec.ports[0].number: port 0 cannot be connected to"),
        ("ports: [{number: 70000, name: a}]", "spec.ports[0].number: `70000` is not valid here"),
        ("ports: [{number: 1}]", "spec.ports[0]: `name` is missing"),
        ("exportTo: [other]", "spec.exportTo[0]: `other` cannot be told"),
        ("workloadSelector: {}", "spec.workloadSelector: the selector has no labels"),
        ("location: MESH", "spec.location: `MESH` is not valid here; expected one of MESH_EXTERNAL"),
    ];
    for (spec, expected) in table {
        let mut world = World::new();
        world.set("f.yaml", &api(spec));
        let found: Vec<String> = world.catalogue.problems().iter().map(ToString::to_string).collect();
        let place_and = |p: &String| p.starts_with("f.yaml:") && p.contains(&format!(": {expected}"));
        assert!(found.iter().any(place_and), "{spec}: {found:#?}");
    }
    let mut world = World::new();
    world.set("f.yaml", &entry("namespace: demo, name: api", "{hosts: [http://a.b, a.b, a.b, 10.0.0.1]}"));
    let found: Vec<String> = world.catalogue.problems().iter().map(|p| p.field.clone()).collect();
    assert_eq!(found, ["spec.hosts[0]", "spec.hosts[2]", "spec.hosts[3]"]);
}

#[test]
fn an_entry_with_the_address_of_anothers_service_is_not_what_third_namespaces_mean() {
    let taker = |created: &str| {
        let metadata = format!("namespace: aaa, name: taker, creationTimestamp: {created:?}");
        let spec = "{hosts: [taker.example], addresses: [10.96.0.7], ports: [{number: 80, name: http}], resolution: STATIC, endpoints: [{address: 192.0.2.1}]}";
        entry(&metadata, spec)
    };
    let service = "apiVersion: v1\nkind: Service\nmetadata: {namespace: demo, name: web}\nspec: {clusterIP: 10.96.0.7, ports: [{port: 80}]}\n";
    let older = entry(
        "namespace: demo, name: older, creationTimestamp: \"2020-01-01T00:00:00Z\"",
        "{hosts: [older.example], addresses: [10.96.0.7], ports: [{number: 80, name: http}], resolution: STATIC, endpoints: [{address: 192.0.2.2}]}",
    );
    let meant = |world: &World, client: &str| {
        let address = mesh_core::addr::NetworkAddress::new("", "10.96.0.7".parse().unwrap());
        world.model.service_by_vip(&address, client).map(|service| service.hostname.to_string())
    };
    let mut world = World::new();
    world.set("taker.yaml", &taker("2021-01-01T00:00:00Z"));
    let own = Some("taker.example".to_owned());
    assert_eq!(meant(&world, "other"), own);
    for (others, expected) in [(service, "web.demo.svc.cluster.local"), (&*older, "older.example")] {
        world.set("others.yaml", others);
        assert_eq!(meant(&world, "other").as_deref(), Some(expected));
        assert_eq!(meant(&world, "aaa"), own, "for itself a namespace may");
        world.set("others.yaml", "");
        assert_eq!(meant(&world, "other"), own);
    }
}
