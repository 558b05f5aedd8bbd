use mesh_core::{
    index::{Delta, Provenance},
    workload::Ports,
};

use super::*;

#[test]
fn empty_optionals_are_left_out_and_required_keys_are_not() {
    let mut w = Workload::new("c//Pod/demo/web", "demo", "web");
    w.addresses = vec!["10.0.0.1".parse().unwrap()];
    let ports = Ports::from_slice(&[PortMapping { service_port: 80, target_port: 8080 }]);
    w.services = [("demo/web.demo.svc".into(), ports)].into_iter().collect();
    let shown = workload(&w);
    for key in ["protocol", "networkMode", "name", "status", "clusterId", "capacity", "workloadIps", "namespace"] {
        assert!(shown.get(key).is_some(), "{key}");
    }
    for key in ["waypoint", "network", "locality", "nativeTunnel", "authorizationPolicies"] {
        assert!(shown.get(key).is_none(), "{key}");
    }
    assert_eq!(shown["services"], json!(["demo/web.demo.svc"]));
}

#[test]
fn policies_keep_the_shape_istioctl_reads() {
    let m = Match {
        principals: vec![StringMatch::Exact("td/ns/demo/sa/a".into()), StringMatch::Presence],
        not_destination_ports: vec![80],
        ..Match::default()
    };
    let clause = mesh_core::policy::Clause { matches: vec![m] };
    let rule = mesh_core::policy::Rule { clauses: vec![clause], ..Default::default() };
    let shown = policy(&Policy {
        name: "p".into(),
        namespace: "demo".into(),
        scope: PolicyScope::WorkloadSelector,
        action: Action::Deny,
        rules: vec![rule],
        dry_run: false,
        origin: Default::default(),
    });
    assert_eq!(
        shown["rules"],
        json!([[[{"principals": [{"Exact": "td/ns/demo/sa/a"}, {"Presence": []}], "notDestinationPorts": [80]}]]])
    );
    assert_eq!((&shown["scope"], &shown["action"]), (&json!("WorkloadSelector"), &json!("Deny")));
}

/// A mesh that uses every key; `demo/unknown.demo.svc` has an endpoint and no record.
const MESH: &str = r#"
workloads:
- {uid: c//Pod/demo/plain, name: plain, namespace: demo, workloadIps: [10.0.0.1]}
- uid: c//Pod/demo/full
  name: full
  namespace: demo
  workloadIps: [10.0.0.2, "fd00::2"]
  waypoint: {destination: demo/gate.demo.svc, hboneMtlsPort: 15008}
  networkGateway: {destination: n1/10.9.9.9, hboneMtlsPort: 15009}
  protocol: HBONE
  networkMode: HostNetwork
  trustDomain: td
  serviceAccount: sa
  network: n1
  workloadName: web
  workloadType: cronjob
  canonicalName: web
  canonicalRevision: v1
  hostname: full.example
  node: node-1
  nativeTunnel: true
  applicationTunnel: {protocol: PROXY, port: 15088}
  authorizationPolicies: [demo/shield]
  status: Unhealthy
  clusterId: c
  locality: {region: r, zone: z, subzone: s}
  capacity: 3
  services: {demo/web.demo.svc: {80: 8080}, demo/unknown.demo.svc: {443: 8443}}
services:
- name: web
  namespace: demo
  hostname: web.demo.svc
  vips: [/10.96.0.1]
  ports: {80: 0}
  cidrVips: [{network: n1, cidr: 10.20.0.0/16}]
  subjectAltNames: [spiffe://td/ns/demo/sa/sa]
  waypoint: {destination: /10.0.0.7, hboneMtlsPort: 15008}
  weightedWaypoints: [{destination: {destination: /10.0.0.8, hboneMtlsPort: 15008}, weight: 4}]
  loadBalancer: {routingPreferences: [Network, Region], mode: Failover, healthPolicy: AllowAll}
  ipFamilies: IPv4
  visibility: Namespace
- {name: api, namespace: demo, hostname: api.demo.svc, vips: [], ports: {}}
policies:
- name: shield
  namespace: demo
  scope: WorkloadSelector
  action: Deny
  dryRun: false
  rules:
  - - - principals: [{Exact: td/ns/demo/sa/a}, {Presence: []}]
        notSourceIps: [10.0.0.0/8]
        destinationPorts: [80]
"#;

#[test]
fn the_dump_of_a_mesh_is_the_one_that_tools_were_written_for() {
    let upserts = crate::static_config::parse(MESH).unwrap();
    let mut index = Index::default();
    index.apply(Delta { provenance: Provenance::Xds, upserts, removals: Vec::new() });
    let expected: Value = serde_json::from_str(include_str!("mesh.json")).unwrap();
    let shown = Value::Object(known(&index));
    for (key, expected) in expected.as_object().unwrap() {
        assert_eq!(&shown[key], expected, "{key}: {:#}", shown[key]);
    }
    assert_eq!(shown, expected);
}

#[test]
fn the_configuration_is_shown_in_upstreams_form() {
    let vars: std::collections::HashMap<String, String> = [("SECRET_TTL", "1h"), ("AUTH_TOKEN", "s3cret")]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into();
    let shown = effective(&Config::from_env(&vars).unwrap()).unwrap();
    assert_eq!(shown["secretTtl"], json!({"secs": 3600, "nanos": 0}));
    assert_eq!(shown["adminAddr"], json!({"Localhost": [true, 15000]}));
    assert_eq!(shown["statsAddr"], json!({"SocketAddr": "[::]:15020"}));
    assert_eq!(shown["readinessAddr"], json!({"SocketAddr": "[::]:15021"}));
    assert!(shown.get("staticConfig").is_none() && !shown.to_string().contains("s3cret"));
}
