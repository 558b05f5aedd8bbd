use mesh_core::policy::{Action, StringMatch};

use super::*;
use crate::admin::config_dump::static_config;

const EVERYTHING: &str = r#"
workloads:
- uid: cluster1//v1/Pod/default/local
  workloadIps: ["127.0.0.1", "::ffff:10.0.0.9"]
  name: local
  namespace: default
  protocol: HBONE
  networkMode: HostNetwork
  trustDomain: cluster.local
  serviceAccount: web
  network: n1
  workloadName: web
  workloadType: deployment
  canonicalName: web
  canonicalRevision: v1
  hostname: local.example
  node: local
  nativeTunnel: true
  applicationTunnel: {protocol: PROXY, port: 15088}
  authorizationPolicies: [default/shield]
  status: Unhealthy
  clusterId: Kubernetes
  locality: {region: r, zone: z, subzone: s}
  capacity: 3
  waypoint: {destination: default/waypoint.example.com, hboneMtlsPort: 15008}
  networkGateway: {destination: n1/10.9.9.9, hboneMtlsPort: 15009}
  services: {default/web.default.svc: {80: 8080, 443: 0}}
services:
- name: web
  namespace: default
  hostname: web.default.svc
  vips: [/10.10.0.1, n1/10.10.0.2]
  ports: {80: 8080}
  cidrVips: [{network: n1, cidr: 10.20.0.0/16}]
  endpoints: {x: {workloadUid: x, port: {80: 80}}}
  subjectAltNames: [spiffe://x]
  waypoint: {destination: /10.0.0.7, hboneMtlsPort: 15008}
  weightedWaypoints: [{destination: {destination: /10.0.0.8, hboneMtlsPort: 15008}, weight: 4}]
  loadBalancer: {routingPreferences: [Network, Region, Zone, Subzone, Node, Cluster], mode: Failover, healthPolicy: AllowAll}
  ipFamilies: IPv6
  canonical: true
  visibility: Namespace
policies:
- name: shield
  namespace: default
  scope: WorkloadSelector
  action: Deny
  dryRun: true
  rules:
  - - - principals: [{Exact: a}, {Prefix: b}, {Suffix: c}, {Presence: []}]
        notNamespaces: [{Exact: n}]
        sourceIps: [10.0.0.0/8]
        notDestinationPorts: [80]
        serviceAccounts: [{namespace: n, serviceAccount: s}]
"#;

#[test]
fn the_file_and_the_dump_are_inverses() {
    let resources = parse(EVERYTHING).unwrap();
    let dump = static_config(&resources);
    let again = serde_json::to_string_pretty(&dump).unwrap();
    assert_eq!(parse(&again).unwrap(), resources, "{again}");
    assert_eq!(static_config(&parse(&again).unwrap()), dump);
}

#[test]
fn what_is_left_out_is_empty_rather_than_discoverys_default() {
    let text = "workloads: [{workloadIps: [10.0.0.1], namespace: demo, name: a}]\n\
        services: [{name: s, namespace: demo, hostname: s.demo, vips: [], ports: {}}]";
    let resources = parse(text).unwrap();
    let (Resource::Workload(w), Resource::Service(s)) = (&resources[0], &resources[1]) else { panic!("{resources:?}") };
    assert_eq!((&*w.uid, &*w.trust_domain, &*w.service_account, w.capacity), ("//Pod/demo/a", "", "", 1));
    assert!(!s.canonical && s.load_balancing.is_none());
    assert!(parse("").unwrap().is_empty());
}

#[test]
fn what_is_wrong_is_refused_with_its_place_and_what_would_be_right() {
    for (text, wanted) in [
        ("workloads:\n- namespace: demo\n  nmae: x\n  workloadIps: []", ["line 3", "nmae", "expected"]),
        ("workloads:\n- namespace: demo\n  name: x\n  workloadIps: [10.0.0]", ["line 4", "10.0.0", "IP address"]),
        ("workloads:\n- workloadIps: []\n  namespace: x\n  name: x\n  protocol: UDP", ["line 5", "UDP", "HBONE"]),
        ("workloads:\n- workloadIps: []\n  name: x", ["line 3", "namespace", "missing"]),
        (
            "services:\n- name: a\n  namespace: a\n  hostname: a\n  ports: {}\n  vips: [10.0.0.1]",
            ["line 6", "10.0.0.1", "network/ip"],
        ),
        ("policies:\n- name: a\n  namespace: a\n  scope: Mesh", ["line 4", "Mesh", "Global"]),
        ("nonsense: 1", ["line 1", "nonsense", "workloads"]),
        (
            "workloads:\n- {name: a, namespace: a, workloadIps: []}\n- {name: a, namespace: a, workloadIps: []}",
            ["//Pod/a/a", "twice", "expected one"],
        ),
    ] {
        let problem = parse(text).unwrap_err();
        for wanted in wanted {
            assert!(problem.contains(wanted), "{wanted} missing from {problem}");
        }
    }
}

#[test]
fn a_bad_reload_keeps_the_last_good_one_and_a_good_one_replaces_it_whole() {
    let state = State::new("".into());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("local.yaml");
    let policy = |name: &str| {
        format!("policies: [{{name: {name}, namespace: n, scope: Namespace, action: Deny, dryRun: false, rules: []}}]")
    };
    std::fs::write(&path, policy("a")).unwrap();
    let config = StaticConfig::load(Source::File(path.clone()), &state).unwrap();
    let policies = || state.snapshot().policies().map(|p| p.key().to_string()).collect::<Vec<_>>();
    config.look(&Ok("policies: 1".to_owned()), &state);
    config.look(&Err("gone".to_owned()), &state);
    config.look(&Ok("\n".to_owned()), &state);
    assert_eq!(policies(), ["n/a"]);
    config.look(&Ok(policy("b")), &state);
    assert_eq!(policies(), ["n/b"]);
    let missing = StaticConfig::load(Source::File(dir.path().join("none")), &state).unwrap_err().to_string();
    assert!(missing.starts_with("LOCAL_XDS_PATH: ") && missing.contains("none: cannot be read"), "{missing}");
}

#[test]
fn matches_keep_their_meaning() {
    let Resource::Policy(policy) = parse(EVERYTHING).unwrap().pop().unwrap() else { panic!("a policy") };
    assert_eq!(policy.action, Action::Deny);
    let principals = &policy.rules[0].clauses[0].matches[0].principals;
    assert_eq!(principals.last(), Some(&StringMatch::Presence));
}
