use super::*;
use crate::{
    addr::NetworkAddress,
    index::{Delta, Provenance, Resource},
    service::{HealthPolicy, IpFamilies, LoadBalancing, LoadBalancingMode, Visibility},
    workload::{Health, Ports},
};

const DOMAIN: &str = "cluster.local";

fn service(namespace: &str, hostname: &str, vips: &[&str], change: impl FnOnce(&mut Service)) -> Resource {
    let name = hostname.split('.').next().unwrap();
    let mut service = Service::new(namespace, name, hostname);
    service.vips = vips.iter().map(|ip| NetworkAddress::new("", ip.parse().unwrap())).collect();
    service.canonical = hostname.ends_with(".svc.cluster.local");
    change(&mut service);
    Resource::Service(Arc::new(service))
}

fn pod(name: &str, of: &str, ips: &[&str], change: impl FnOnce(&mut Workload)) -> Resource {
    let mut workload = Workload::new(format!("Kubernetes//Pod/ns1/{name}"), "ns1", name);
    workload.addresses = ips.iter().map(|ip| ip.parse().unwrap()).collect();
    workload.services = [(of.into(), Ports::new())].into_iter().collect();
    change(&mut workload);
    Resource::Workload(Arc::new(workload))
}

/// The registry of every table below.
fn registry() -> Index {
    let db = "ns1/db.ns1.svc.cluster.local";
    let ready = "ns1/early.ns1.svc.cluster.local";
    let all = LoadBalancing {
        routing_preference: Vec::new(),
        mode: LoadBalancingMode::Standard,
        health_policy: HealthPolicy::AllowAll,
    };
    let other_network = |s: &mut Service| s.vips = vec![NetworkAddress::new("far", "10.9.9.9".parse().unwrap())];
    let upserts = vec![
        service("ns1", "web.ns1.svc.cluster.local", &["10.0.0.1", "fd00::1"], |_| ()),
        service("ns2", "web.ns2.svc.cluster.local", &["10.0.0.2"], |_| ()),
        service("ns2", "v4.ns2.svc.cluster.local", &["10.0.0.4", "fd00::4"], |s| s.ip_families = IpFamilies::Ipv4Only),
        service("ns2", "v6.ns2.svc.cluster.local", &["10.0.0.6", "fd00::6"], |s| s.ip_families = IpFamilies::Ipv6Only),
        service("ns2", "private.ns2.svc.cluster.local", &["10.0.0.7"], |s| s.visibility = Visibility::Namespace),
        service("ns2", "far.ns2.svc.cluster.local", &[], other_network),
        service("ns1", "db.ns1.svc.cluster.local", &[], |_| ()),
        service("ns1", "none.ns1.svc.cluster.local", &[], |_| ()),
        service("ns1", "early.ns1.svc.cluster.local", &[], |s| s.load_balancing = Some(all)),
        service("ns3", "www.example.com", &["240.0.0.1"], |_| ()),
        service("ns3", "single", &["240.0.0.2"], |_| ()),
        service("ns3", "*.wild.example.com", &["240.0.0.3"], |_| ()),
        service("ns3", "*.deep.wild.example.com", &["240.0.0.4"], |_| ()),
        service("ns3", "*.com", &["240.0.0.5"], |_| ()),
        service("ns3", "headless.example.org", &[], |_| ()),
        service("ns3", "range.example.org", &[], |s| s.cidr_vips = vec![("".into(), "10.2.0.0/16".parse().unwrap())]),
        service("ns3", "one.example.org", &[], |s| s.cidr_vips = vec![("".into(), "10.3.0.1/32".parse().unwrap())]),
        service("ns1", "twice.example.org", &["10.4.0.1"], |_| ()),
        service("ns2", "twice.example.org", &["10.4.0.2"], |s| s.canonical = true),
        service("ns3", "twice.example.org", &["10.4.0.3"], |_| ()),
        service("ns2", "liked.example.org", &["10.5.0.2"], |_| ()),
        service("ns3", "liked.example.org", &["10.5.0.3"], |_| ()),
        service("ns1", "*.pods.ns1.svc.cluster.local", &["10.6.0.1"], |_| ()),
        pod("db-0", db, &["10.1.0.1", "10.1.0.11", "fd00::10"], |_| ()),
        pod("db-1", db, &["10.1.0.2"], |_| ()),
        pod("db-2", db, &["10.1.0.3"], |w| w.health = Health::Unhealthy),
        pod("db-3", db, &["10.1.0.4"], |w| w.network = "far".into()),
        pod("web-0", "ns1/web.ns1.svc.cluster.local", &["10.1.0.5"], |_| ()),
        pod("early-0", ready, &["10.1.0.6"], |w| w.health = Health::Unhealthy),
    ];
    let mut index = Index::default();
    index.apply(Delta { provenance: Provenance::Xds, upserts, removals: Vec::new() });
    index
}

/// The answer for a client of a namespace: `-` is not ours; otherwise the addresses, after `alias => ` if there is one.
fn ask(index: &Index, namespace: &str, name: &str, family: Family) -> String {
    let search = kubernetes_search(namespace, DOMAIN);
    let client =
        Client { namespace, network: "", cluster_domain: DOMAIN, search: &search, preferred_namespace: Some("ns3") };
    match resolve(index, &client, name, family) {
        None => "-".into(),
        Some(Answer { alias_of, addresses, .. }) => {
            let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
            format!("{}{}", alias_of.map(|name| format!("{name} => ")).unwrap_or_default(), addresses.join(" "))
        }
    }
}

#[test]
fn names_mean_what_a_kubernetes_resolver_makes_of_them() {
    let index = registry();
    for (namespace, name, expected) in [
        // as they are
        ("ns1", "web.ns1.svc.cluster.local", "10.0.0.1"),
        ("ns9", "web.ns1.svc.cluster.local", "10.0.0.1"),
        ("ns1", "www.example.com", "240.0.0.1"),
        ("ns1", "single", "240.0.0.2"),
        // short
        ("ns1", "web", "10.0.0.1"),
        ("ns2", "web", "10.0.0.2"),
        ("ns9", "web", "-"),
        ("ns1", "web.ns2", "10.0.0.2"),
        ("ns1", "web.ns2.svc", "10.0.0.2"),
        ("ns1", "web.ns2.svc.cluster", "-"),
        ("ns1", "web.svc.cluster.local", "web => 10.0.0.1"),
        // with a search domain
        ("ns1", "web.ns1.svc.cluster.local.ns1.svc.cluster.local", "web.ns1.svc.cluster.local => 10.0.0.1"),
        ("ns1", "web.ns2.svc.cluster.local.svc.cluster.local", "web.ns2.svc.cluster.local => 10.0.0.2"),
        ("ns1", "web.ns2.svc.cluster.local.cluster.local", "web.ns2.svc.cluster.local => 10.0.0.2"),
        ("ns1", "web.ns2.ns1.svc.cluster.local", "web.ns2 => 10.0.0.2"),
        ("ns1", "web.ns2.cluster.local", "web.ns2 => 10.0.0.2"),
        ("ns1", "www.example.com.ns1.svc.cluster.local", "www.example.com => 240.0.0.1"),
        ("ns1", "single.ns1.svc.cluster.local", "single => 240.0.0.2"),
        ("ns1", "www.example.com.ns2.svc.cluster.local", "-"),
        ("ns1", "ns1.svc.cluster.local", "-"),
        ("ns1", "xcluster.local", "-"),
        // wildcards
        ("ns1", "a.wild.example.com", "240.0.0.3"),
        ("ns1", "b.a.wild.example.com", "240.0.0.3"),
        ("ns1", "a.deep.wild.example.com", "240.0.0.4"),
        ("ns1", "wild.example.com", "240.0.0.5"),
        ("ns1", "com", "-"),
        ("ns1", "a.wild.example.com.ns1.svc.cluster.local", "240.0.0.3"),
        // what nobody owns
        ("ns1", "example.net", "-"),
        ("ns1", "a", "-"),
        ("ns1", "", "-"),
        (".", "..", "-"),
    ] {
        assert_eq!(ask(&index, namespace, name, Family::Ipv4), expected, "{name} from {namespace}");
    }
}

#[test]
fn only_names_with_an_address_or_of_the_cluster_are_ours() {
    let index = registry();
    for (name, v4, v6) in [
        ("web.ns1.svc.cluster.local", "10.0.0.1", "fd00::1"),
        ("web.ns2.svc.cluster.local", "10.0.0.2", ""),
        ("v4.ns2.svc.cluster.local", "10.0.0.4", ""),
        ("v6.ns2.svc.cluster.local", "", "fd00::6"),
        ("far.ns2.svc.cluster.local", "", ""),
        ("headless.example.org", "-", "-"),
        ("range.example.org", "-", "-"),
        ("one.example.org", "10.3.0.1", ""),
        ("db.ns1.svc.cluster.local", "10.1.0.1 10.1.0.2", "fd00::10"),
        ("none.ns1.svc.cluster.local", "", ""),
        ("early.ns1.svc.cluster.local", "10.1.0.6", ""),
    ] {
        assert_eq!(ask(&index, "ns1", name, Family::Ipv4), v4, "A {name}");
        assert_eq!(ask(&index, "ns1", name, Family::Ipv6), v6, "AAAA {name}");
    }
}

#[test]
fn pods_of_headless_services_have_names_and_others_are_left_to_the_cluster() {
    let index = registry();
    for (namespace, name, expected) in [
        ("ns1", "db-0.db.ns1.svc.cluster.local", "10.1.0.1"),
        ("ns2", "db-1.db.ns1.svc.cluster.local", "10.1.0.2"),
        ("ns1", "db-1.db", "10.1.0.2"),
        ("ns2", "db-1.db.ns1", "10.1.0.2"),
        ("ns2", "db-1.db.ns1.svc", "10.1.0.2"),
        ("ns1", "db-1.db.ns1.svc.cluster.local.ns1.svc.cluster.local", "db-1.db.ns1.svc.cluster.local => 10.1.0.2"),
        ("ns1", "early-0.early", "10.1.0.6"),
        ("ns1", "db-2.db.ns1.svc.cluster.local", "-"),
        ("ns1", "db-3.db.ns1.svc.cluster.local", "-"),
        ("ns1", "db-9.db.ns1.svc.cluster.local", "-"),
        ("ns1", "web-0.web.ns1.svc.cluster.local", "-"),
        ("ns1", "x.pods.ns1.svc.cluster.local", "10.6.0.1"),
    ] {
        assert_eq!(ask(&index, namespace, name, Family::Ipv4), expected, "{name} from {namespace}");
    }
    assert_eq!(ask(&index, "ns1", "db-1.db", Family::Ipv6), "", "it exists, and has none");
}

#[test]
fn of_several_services_the_clients_own_then_the_canonical_then_the_preferred_namespaces_answers() {
    let index = registry();
    for (namespace, name, expected) in [
        ("ns1", "twice.example.org", "10.4.0.1"),
        ("ns3", "twice.example.org", "10.4.0.3"),
        ("ns9", "twice.example.org", "10.4.0.2"),
        ("ns2", "liked.example.org", "10.5.0.2"),
        ("ns9", "liked.example.org", "10.5.0.3"),
        ("ns2", "private.ns2.svc.cluster.local", "10.0.0.7"),
        ("ns1", "private.ns2.svc.cluster.local", "-"),
    ] {
        assert_eq!(ask(&index, namespace, name, Family::Ipv4), expected, "{name} from {namespace}");
    }
}
