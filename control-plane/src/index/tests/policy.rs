use mesh_core::policy::{Match, Policy, ServiceAccountMatch, StringMatch};

use super::*;

fn translated(spec: &str) -> Policy {
    let mut world = World::new();
    world.set("f.yaml", &(pod("web", "10.0.0.1", "") + &authz("demo", "p", spec)));
    world.model.policy("demo/p").unwrap().as_ref().clone()
}

#[test]
fn every_field_of_a_rule_becomes_its_match() {
    let exact = |s: &str| StringMatch::Exact(s.into());
    let nets = |net: &str| vec![net.parse().unwrap()];
    let account =
        |namespace: &str| vec![ServiceAccountMatch { namespace: namespace.into(), service_account: "web".into() }];
    let none = Match::default;
    let table: Vec<(&str, Match)> = vec![
        ("to: [{operation: {ports: [\"80\", 443]}}]", Match { destination_ports: vec![80, 443], ..none() }),
        ("to: [{operation: {notPorts: [\"80\"]}}]", Match { not_destination_ports: vec![80], ..none() }),
        ("from: [{source: {ipBlocks: [10.1.2.3]}}]", Match { source_ips: nets("10.1.2.3/32"), ..none() }),
        ("from: [{source: {ipBlocks: [\"2001:db8::1\"]}}]", Match { source_ips: nets("2001:db8::1/128"), ..none() }),
        ("from: [{source: {notIpBlocks: [10.1.2.3/8]}}]", Match { not_source_ips: nets("10.0.0.0/8"), ..none() }),
        ("from: [{source: {namespaces: [a]}}]", Match { namespaces: vec![exact("a")], ..none() }),
        (
            "from: [{source: {notNamespaces: [a*]}}]",
            Match { not_namespaces: vec![StringMatch::Prefix("a".into())], ..none() },
        ),
        ("from: [{source: {principals: [\"*\"]}}]", Match { principals: vec![StringMatch::Presence], ..none() }),
        (
            "from: [{source: {notPrincipals: [\"*/sa/x\"]}}]",
            Match { not_principals: vec![StringMatch::Suffix("/sa/x".into())], ..none() },
        ),
        (
            "from: [{source: {trustDomains: [td.example, \"td*\"]}}]",
            Match {
                principals: vec![StringMatch::Prefix("td.example/".into()), StringMatch::Prefix("td".into())],
                ..none()
            },
        ),
        (
            "from: [{source: {notPrincipals: [a], notTrustDomains: [td]}}]",
            Match { not_principals: vec![exact("a"), StringMatch::Prefix("td/".into())], ..none() },
        ),
        ("from: [{source: {serviceAccounts: [web]}}]", Match { service_accounts: account("demo"), ..none() }),
        ("from: [{source: {serviceAccounts: [x/web]}}]", Match { service_accounts: account("x"), ..none() }),
        ("from: [{source: {notServiceAccounts: [web]}}]", Match { not_service_accounts: account("demo"), ..none() }),
        ("when: [{key: source.ip, values: [10.0.0.0/8]}]", Match { source_ips: nets("10.0.0.0/8"), ..none() }),
        ("when: [{key: source.namespace, notValues: [a]}]", Match { not_namespaces: vec![exact("a")], ..none() }),
        ("when: [{key: source.principal, values: [a]}]", Match { principals: vec![exact("a")], ..none() }),
        ("when: [{key: destination.ip, values: [10.0.0.1]}]", Match { destination_ips: nets("10.0.0.1/32"), ..none() }),
        ("when: [{key: destination.port, notValues: [\"80\"]}]", Match { not_destination_ports: vec![80], ..none() }),
    ];
    for (rule, expected) in table {
        let policy = translated(&format!("{{rules: [{{{rule}}}]}}"));
        let found: Vec<&Match> = policy.rules[0].clauses.iter().flat_map(|c| &c.matches).collect();
        assert_eq!(found, [&expected], "{rule}");
    }
}

#[test]
fn entries_are_alternatives_and_lists_are_all_needed() {
    let policy = translated(
        "{rules: [{when: [{key: source.namespace, values: [a]}, {key: destination.port, values: [\"1\"]}], from: [{source: {namespaces: [b]}}, {source: {namespaces: [c]}}], to: [{operation: {ports: [\"2\"]}}]}, {}]}",
    );
    let shape = |rule: usize| policy.rules[rule].clauses.iter().map(|c| c.matches.len()).collect::<Vec<_>>();
    assert_eq!((shape(0), shape(1)), (vec![1, 2, 1, 1], vec![]));
    assert_eq!(policy.rules[0].clauses[0].matches[0].destination_ports, [2], "operations come first");
}

fn denial(spec: &str) -> String {
    let mut world = World::new();
    world.set("f.yaml", &(pod("web", "10.0.0.1", "") + &authz("demo", "p", spec)));
    let destination = "10.0.0.1:80".parse().unwrap();
    let connection = Connection { source_ip: "10.0.0.9".parse().unwrap(), source_identity: None, destination };
    let decision = authorize(&world.model.policies_for(world.workload("web")), &connection);
    assert!(!decision.is_allowed());
    decision.origin.unwrap().to_string()
}

#[test]
fn a_denial_for_want_of_a_waypoint_says_which_field_needs_it() {
    assert_eq!(
        denial("{rules: [{to: [{operation: {paths: [/api]}}]}]}"),
        "AuthorizationPolicy demo/p (spec.rules[0].to[0].operation.paths needs a waypoint: left out, so it allows nothing) (f.yaml:8)"
    );
    let some = denial(
        "{rules: [{to: [{operation: {ports: [\"81\"]}}]}, {from: [{source: {requestPrincipals: [a], remoteIpBlocks: [10.0.0.1]}}], when: [{key: \"request.headers[x]\", values: [y]}, {key: connection.sni, values: [z]}]}]}",
    );
    let told = "spec.rules[1].from[0].source.remoteIpBlocks, spec.rules[1].from[0].source.requestPrincipals, spec.rules[1].when[0].key request.headers[x], … need a waypoint";
    assert!(some.contains(told) && some.ends_with("(f.yaml:11, spec.rules)"), "{some}");
    let broader = denial("{action: DENY, rules: [{to: [{operation: {methods: [GET], ports: [\"80\"]}}]}]}");
    assert!(
        broader.contains(
            "(spec.rules[0].to[0].operation.methods needs a waypoint: left out, so the rule denies more than written)"
        ) && broader.ends_with("(f.yaml:11, spec.rules[0])"),
        "{broader}"
    );
}

#[test]
fn headless_services_are_known_by_name_only_and_external_names_not_at_all() {
    let headless =
        "{clusterIP: None, selector: {app: web}, ports: [{port: 80, targetPort: http}, {port: 53, protocol: UDP}]}";
    let world = World::of(&(pod("web", "10.0.0.1", "") + &service(headless)));
    let found = world.model.service(WEB).unwrap();
    assert_eq!((found.vips.len(), found.ports.len(), found.canonical), (0, 1, true));
    assert_eq!(
        world.workload("web").services.get(WEB).unwrap()[..],
        [PortMapping { service_port: 80, target_port: 8080 }]
    );
    let external = "{type: ExternalName, externalName: example.com, selector: {app: web}, ports: [{port: 80}]}";
    let world = World::of(&(pod("web", "10.0.0.1", "") + &service(external)));
    assert!(world.model.service(WEB).is_none() && world.workload("web").services.is_empty());
}

#[test]
fn traffic_distribution_is_the_services_before_its_namespaces() {
    let namespace = "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: demo, annotations: {networking.istio.io/traffic-distribution: PreferClose}}\n";
    let scopes = |text: &str| {
        let world = World::of(&(namespace.to_owned() + text));
        let lb = world.model.service(WEB).unwrap().load_balancing.clone();
        lb.map_or(0, |lb| lb.routing_preference.len())
    };
    assert_eq!(scopes(&service("{}")), 3);
    assert_eq!(scopes(&service("{trafficDistribution: PreferSameNode}")), 5);
    assert_eq!(scopes(&service("{trafficDistribution: Any}")), 0);
    let annotated = service("{}")
        .replace("name: web}", "name: web, annotations: {networking.istio.io/traffic-distribution: PreferSameNode}}");
    assert_eq!(scopes(&annotated), 5);
    let of_entry = entry("namespace: demo, name: x", "{hosts: [web.demo.svc.cluster.local], resolution: DNS}");
    assert_eq!(scopes(&of_entry), 3);
}
