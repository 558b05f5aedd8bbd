use std::{collections::BTreeMap, fmt::Write as _};

use proptest::prelude::*;

use super::*;
use crate::{
    authorize::{Connection, authorize},
    origin::Origin,
    policy::Action,
    reason::Reason,
    service::Visibility,
    workload::Ports,
};

fn workload(name: &str, change: impl FnOnce(&mut Workload)) -> Arc<Workload> {
    let mut workload = Workload::new(format!("Kubernetes//Pod/demo/{name}"), "demo", name);
    change(&mut workload);
    Arc::new(workload)
}

fn service(namespace: &str, name: &str, change: impl FnOnce(&mut Service)) -> Arc<Service> {
    let mut service = Service::new(namespace, name, format!("{name}.demo.svc"));
    change(&mut service);
    Arc::new(service)
}

fn policy(namespace: &str, name: &str, scope: Scope) -> Arc<Policy> {
    let (name, namespace, origin) = (name.into(), namespace.into(), Origin::default());
    Arc::new(Policy { name, namespace, scope, action: Action::Deny, rules: Vec::new(), dry_run: false, origin })
}

fn delta(upserts: Vec<Resource>, removals: Vec<ResourceKey>) -> Delta {
    Delta { provenance: Provenance::Xds, upserts, removals }
}

fn index_of(upserts: Vec<Resource>) -> Index {
    let mut index = Index::default();
    index.apply(delta(upserts, Vec::new()));
    index
}

fn at(ip: &str) -> NetworkAddress {
    NetworkAddress::new("", ip.parse().unwrap())
}

#[test]
fn of_workloads_sharing_an_address_pods_win_then_hbone() {
    let shared = |uid: &str, hbone: bool| {
        let mut workload = Workload::new(uid, "demo", uid);
        workload.addresses = vec!["10.0.0.1".parse().unwrap()];
        workload.tunnel_protocol = if hbone { TunnelProtocol::Hbone } else { TunnelProtocol::None };
        Resource::Workload(Arc::new(workload))
    };
    let all = vec![shared("a/entry", true), shared("k//Pod/demo/plain", false), shared("k//Pod/demo/tunnel", true)];
    let mut index = index_of(all);
    let mut found = Vec::new();
    while let Some(best) = index.workload_by_address(&at("10.0.0.1")).map(|w| w.uid.clone()) {
        found.push(best.to_string());
        index.apply(delta(Vec::new(), vec![ResourceKey::Address(best)]));
    }
    assert_eq!(found, ["k//Pod/demo/tunnel", "k//Pod/demo/plain", "a/entry"]);
}

#[test]
fn host_network_workloads_are_not_found_by_address() {
    let index = index_of(vec![Resource::Workload(workload("a", |w| {
        w.addresses = vec!["10.0.0.1".parse().unwrap()];
        w.network_mode = NetworkMode::HostNetwork;
    }))]);
    assert!(index.workload_by_address(&at("10.0.0.1")).is_none());
    assert_eq!(index.local_workload("", "demo", "a", "default").unwrap().uid.as_ref(), "Kubernetes//Pod/demo/a");
    assert!(index.local_workload("other", "demo", "a", "default").is_none());
}

#[test]
fn a_vip_means_the_clients_own_service_then_the_canonical_then_the_smallest_key() {
    let vip = |canonical| {
        move |s: &mut Service| {
            s.vips = vec![at("10.1.0.1")];
            s.canonical = canonical;
        }
    };
    let services = [service("a", "x", vip(false)), service("b", "x", vip(true)), service("c", "x", vip(false))];
    let index = index_of(services.into_iter().map(Resource::Service).collect());
    let seen_from = |namespace| index.service_by_vip(&at("10.1.0.1"), namespace).unwrap().namespace.to_string();
    assert_eq!((seen_from("c"), seen_from("elsewhere")), ("c".into(), "b".into()));
}

#[test]
fn services_of_one_namespace_sharing_a_vip_survive_each_other() {
    let vip = |s: &mut Service| s.vips = vec![at("10.1.0.1")];
    let mut index =
        index_of(vec![Resource::Service(service("a", "x", vip)), Resource::Service(service("a", "y", vip))]);
    index.apply(delta(Vec::new(), vec![ResourceKey::Address("a/x.demo.svc".into())]));
    assert_eq!(index.service_by_vip(&at("10.1.0.1"), "a").unwrap().name.as_ref(), "y");
}

#[test]
fn a_namespace_visible_service_is_hidden_from_other_namespaces() {
    let index = index_of(vec![Resource::Service(service("a", "x", |s| {
        s.vips = vec![at("10.1.0.1")];
        s.visibility = Visibility::Namespace;
    }))]);
    assert!(index.service_by_vip(&at("10.1.0.1"), "a").is_some());
    assert!(index.service_by_vip(&at("10.1.0.1"), "b").is_none());
    assert!(index.service_by_hostname("x.demo.svc", "b").is_none());
}

#[test]
fn ranges_rank_by_namespace_then_length_and_come_after_exact_addresses() {
    let range = |net: &str| {
        let net: IpNet = net.parse().unwrap();
        move |s: &mut Service| s.cidr_vips = vec![("".into(), net)]
    };
    let mut index = index_of(vec![
        Resource::Service(service("a", "wide", range("10.0.0.0/8"))),
        Resource::Service(service("b", "narrow", range("10.1.0.0/16"))),
        Resource::Service(service("b", "exact", |s| s.vips = vec![at("10.1.0.1")])),
    ]);
    let name = |index: &Index, ip, ns| index.service_by_vip(&at(ip), ns).map(|s| s.name.to_string());
    assert_eq!(name(&index, "10.1.2.3", "c").as_deref(), Some("narrow"));
    assert_eq!(name(&index, "10.1.2.3", "a").as_deref(), Some("wide"));
    assert_eq!(name(&index, "10.1.0.1", "a").as_deref(), Some("exact"));
    index.apply(delta(Vec::new(), vec![ResourceKey::Address("a/wide.demo.svc".into())]));
    assert_eq!(name(&index, "10.2.0.1", "c"), None);
}

#[test]
fn endpoints_wait_for_their_service_and_outlive_it() {
    let endpoint = workload("a", |w| w.services = [("demo/x.demo.svc".into(), Ports::new())].into_iter().collect());
    let mut index = index_of(vec![Resource::Workload(endpoint)]);
    assert_eq!(index.endpoints("demo/x.demo.svc").count(), 1);
    index.apply(delta(vec![Resource::Service(service("demo", "x", |_| ()))], Vec::new()));
    index.apply(delta(Vec::new(), vec![ResourceKey::Address("demo/x.demo.svc".into())]));
    assert_eq!(index.endpoints("demo/x.demo.svc").count(), 1);
    index.apply(delta(Vec::new(), vec![ResourceKey::Address("Kubernetes//Pod/demo/a".into())]));
    assert_eq!(index.endpoints("demo/x.demo.svc").count(), 0);
}

#[test]
fn identities_are_counted_per_node() {
    let on = |name: &str| Resource::Workload(workload(name, |w| w.node = "n1".into()));
    let mut index = index_of(vec![on("a"), on("b")]);
    let identity = workload("a", |_| ()).identity();
    assert_eq!((index.identity_count("n1", &identity), index.identity_count("n2", &identity)), (2, 0));
    index.apply(delta(Vec::new(), vec![ResourceKey::Address("Kubernetes//Pod/demo/a".into())]));
    assert_eq!(index.identity_count("n1", &identity), 1);
}

fn verdict(index: &Index, workload: &Workload) -> Option<Reason> {
    let (source_ip, destination) = ("10.0.0.9".parse().unwrap(), "10.0.0.1:80".parse().unwrap());
    authorize(&index.policies_for(workload), &Connection { source_ip, source_identity: None, destination }).reason
}

#[test]
fn policies_in_force_are_the_global_the_namespaces_and_the_listed() {
    let workload = workload("a", |w| w.authorization_policies = vec!["demo/listed".into(), "demo/unknown".into()]);
    let index = index_of(vec![
        Resource::Policy(policy("istio-system", "global", Scope::Global)),
        Resource::Policy(policy("demo", "own", Scope::Namespace)),
        Resource::Policy(policy("other", "foreign", Scope::Namespace)),
        Resource::Policy(policy("demo", "listed", Scope::WorkloadSelector)),
        Resource::Policy(policy("demo", "unlisted", Scope::WorkloadSelector)),
    ]);
    let set = index.policies_for(&workload);
    let names: Vec<&str> = set.policies.iter().map(|p| &*p.name).collect();
    assert_eq!(names, ["global", "own", "listed"]);
    assert_eq!(set.missing.iter().map(|k| &**k).collect::<Vec<_>>(), ["demo/unknown"]);
}

#[test]
fn inbound_is_denied_until_the_policies_are_complete_and_for_workloads_known_only_locally() {
    let local = workload("local", |_| ());
    let mut index = index_of(vec![Resource::Workload(workload("known", |_| ()))]);
    index.apply(Delta {
        provenance: Provenance::Local,
        upserts: vec![Resource::Workload(local.clone())],
        removals: vec![],
    });
    assert_eq!(verdict(&index, &workload("known", |_| ())), Some(Reason::PolicyUnknown));
    let before = index.version();
    index.set_policies_complete(true);
    assert_eq!(index.version(), before + 1);
    assert_eq!(verdict(&index, &workload("known", |_| ())), None);
    assert_eq!(verdict(&index, &local), Some(Reason::PolicyUnknown));
    index.apply(delta(vec![Resource::Workload(local.clone())], vec![]));
    assert_eq!(verdict(&index, &local), None);
}

#[test]
fn discovery_replaces_what_the_operator_wrote_but_does_not_remove_it() {
    let from = |provenance, upserts, removals| Delta { provenance, upserts, removals };
    let written = workload("a", |w| w.node = "written".into());
    let key = ResourceKey::Address(written.uid.clone());
    let mut index = Index::default();
    index.apply(from(Provenance::Static, vec![Resource::Workload(written.clone())], Vec::new()));
    index.apply(from(Provenance::Local, vec![Resource::Workload(workload("a", |_| {}))], Vec::new()));
    index.apply(from(Provenance::Disk, Vec::new(), vec![key.clone()]));
    index.apply(from(Provenance::Xds, Vec::new(), vec![key.clone()]));
    assert_eq!(index.workload(&written.uid), Some(&written));
    index.apply(from(
        Provenance::Xds,
        vec![Resource::Workload(workload("a", |w| w.node = "found".into()))],
        Vec::new(),
    ));
    index.apply(from(Provenance::Static, Vec::new(), vec![key.clone()]));
    assert_eq!(&*index.workload(&written.uid).unwrap().node, "found");
    index.apply(from(Provenance::Xds, Vec::new(), vec![key]));
    assert!(index.workload(&written.uid).is_none());
}

#[test]
fn lesser_facts_neither_replace_nor_remove_better_ones() {
    let named = |node: &str| Resource::Workload(workload("a", |w| w.node = node.into()));
    let mut index = index_of(vec![named("xds")]);
    let uid: Arc<str> = "Kubernetes//Pod/demo/a".into();
    let removals = vec![ResourceKey::Address(uid.clone())];
    index.apply(Delta { provenance: Provenance::Local, upserts: vec![named("local")], removals });
    assert_eq!(index.workload(&uid).unwrap().node.as_ref(), "xds");
}

/// Everything the index answers, in a comparable form.
fn answers(index: &Index) -> String {
    let mut text = String::new();
    let mut sorted = |label: &str, mut items: Vec<String>| {
        items.sort();
        writeln!(text, "{label}: {items:?}").unwrap();
    };
    sorted("workloads", index.workloads.iter().map(|(k, v)| format!("{k} {v:?}")).collect());
    sorted("addresses", index.workloads_by_address.iter().map(|(k, v)| format!("{k} {v:?}")).collect());
    sorted("names", index.workloads_by_name.iter().map(|(k, v)| format!("{k} {v:?}")).collect());
    sorted("hosts", index.workloads_by_hostname.iter().map(|(k, v)| format!("{k} {v:?}")).collect());
    sorted("identities", index.identities.iter().map(|(k, v)| format!("{k:?} {v}")).collect());
    sorted(
        "endpoints",
        index.endpoints.iter().map(|(k, v)| format!("{k} {:?}", v.values().collect::<Vec<_>>())).collect(),
    );
    sorted("services", index.services.iter().map(|(k, v)| format!("{k} {v:?}")).collect());
    sorted("vips", index.services_by_vip.iter().map(|(k, v)| format!("{k} {v:?}")).collect());
    sorted("service hosts", index.services_by_hostname.iter().map(|(k, v)| format!("{k} {v:?}")).collect());
    sorted("cidr services", index.cidr_services.iter().map(|(k, v)| format!("{k} {v:?}")).collect());
    let ranges =
        |trie: &CidrTrie| trie.iter().map(|(range, services)| format!("{range} {services:?}")).collect::<Vec<_>>();
    sorted("cidrs", index.cidrs.iter().map(|(k, v)| format!("{k} {:?}", ranges(v))).collect());
    sorted("policies", index.policies.iter().map(|(k, v)| format!("{k} {v:?}")).collect());
    sorted(
        "scopes",
        index.policies_by_scope.iter().map(|(k, v)| format!("{k} {:?}", v.values().collect::<Vec<_>>())).collect(),
    );
    text
}

fn any_resource() -> impl Strategy<Value = Resource> {
    let ip = || (0u8..4).prop_map(|n| std::net::IpAddr::from([10, 0, 0, n]));
    let name = || proptest::sample::select(vec!["a", "b", "c"]);
    let workloads =
        (name(), prop::collection::vec(ip(), 0..3), any::<[bool; 3]>(), name(), prop::collection::vec(name(), 0..3));
    let workloads = workloads.prop_map(|(n, ips, [host, hbone, named], node, members)| {
        Resource::Workload(workload(n, |w| {
            w.addresses = ips;
            w.node = node.into();
            w.network_mode = if host { NetworkMode::HostNetwork } else { NetworkMode::Standard };
            w.tunnel_protocol = if hbone { TunnelProtocol::Hbone } else { TunnelProtocol::None };
            w.hostname = if named { "h".into() } else { "".into() };
            w.services = members.iter().map(|s| (Arc::from(format!("demo/{s}.demo.svc")), Ports::new())).collect();
        }))
    });
    let services = (
        name(),
        name(),
        prop::collection::vec(ip(), 0..3),
        prop::collection::vec((ip(), 8u8..33), 0..3),
        any::<bool>(),
    );
    let services = services.prop_map(|(ns, n, vips, ranges, canonical)| {
        Resource::Service(service(ns, n, |s| {
            s.vips = vips.into_iter().map(|ip| NetworkAddress::new("", ip)).collect();
            s.cidr_vips = ranges.into_iter().map(|(ip, len)| ("".into(), IpNet::new(ip, len).unwrap())).collect();
            s.canonical = canonical;
        }))
    });
    let scope = proptest::sample::select(vec![Scope::Global, Scope::Namespace, Scope::WorkloadSelector]);
    let policies = (name(), name(), scope).prop_map(|(ns, n, scope)| Resource::Policy(policy(ns, n, scope)));
    prop_oneof![workloads, services, policies]
}

proptest! {
    #[test]
    fn equals_a_rebuild_from_what_survives(
        steps in prop::collection::vec((prop::collection::vec(any_resource(), 0..4), prop::collection::vec(any_resource(), 0..3)), 0..12)
    ) {
        let mut index = Index::default();
        let mut surviving = BTreeMap::new();
        for (upserts, removals) in steps {
            let removals: Vec<ResourceKey> = removals.iter().map(Resource::key).collect();
            for key in &removals {
                surviving.remove(key);
            }
            surviving.extend(upserts.iter().map(|r| (r.key(), r.clone())));
            index.apply(delta(upserts, removals));
        }
        prop_assert_eq!(answers(&index), answers(&index_of(surviving.into_values().collect())));
    }

    #[test]
    fn a_clone_is_not_changed_by_later_deltas(before in prop::collection::vec(any_resource(), 0..6), after in prop::collection::vec(any_resource(), 0..6)) {
        let mut index = index_of(before);
        let clone = index.clone();
        let answered = answers(&clone);
        index.apply(delta(after, Vec::new()));
        prop_assert_eq!(answers(&clone), answered);
    }
}
