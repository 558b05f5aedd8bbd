use std::collections::HashMap;

use mesh_identity::TokenSource;

use super::*;

fn parse(pairs: &[(&str, &str)]) -> Result<Config, Problems> {
    let vars: HashMap<String, String> = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    Config::from_env(&vars)
}

#[test]
fn an_empty_environment_is_a_shared_proxy_with_upstreams_defaults() {
    let config = parse(&[]).unwrap();
    assert!(config.is_shared() && config.reuse_port);
    assert_eq!(config.packet_mark, Some(1337));
    assert_eq!(config.xds.as_ref().unwrap().address, "https://localhost:15012");
    assert!(config.proxy && !config.xds_on_demand);
    assert_eq!(config.drain_deadline, Duration::from_secs(5));
    assert_eq!(config.wildcard(15020), "[::]:15020".parse().unwrap());
    assert!(config.is_own_port(15001) && !config.is_own_port(15080));
    assert_eq!(config.own_workload(), None);
}

#[test]
fn dedicated_mode_binds_one_address_without_mark_or_transparency() {
    let info = [("PROXY_MODE", "dedicated"), ("PROXY_WORKLOAD_INFO", "demo/web-1/web")];
    let config = parse(&[&info[..], &[("FAIRWAY_LOCAL_ADDRESS", "127.0.0.7")]].concat()).unwrap();
    assert_eq!(config.packet_mark, None);
    assert_eq!(config.transparent(), Transparent::Never);
    assert_eq!(config.wildcard(15008), "127.0.0.7:15008".parse().unwrap());
    assert_eq!(config.loopback(15000), "127.0.0.7:15000".parse().unwrap());
    assert_eq!(&*config.workload.unwrap().uid, "Kubernetes//Pod/demo/web-1");
}

#[test]
fn every_problem_is_reported_at_once() {
    let bad = [
        ("PROXY_MODE", "dedicated"),
        ("PROXY_WORKLOAD_INFO", "demo/web"),
        ("HTTP2_FRAME_SIZE", "1"),
        ("COMPLIANCE_POLICY", "rot13"),
        ("ISTIO_METAJSON_X", "{"),
        ("LOG_FORMAT", "xml"),
        ("ZTUNNEL_WORKER_THREADS", "many"),
    ];
    let text = parse(&bad).unwrap_err().to_string();
    for (name, _) in &bad[1..] {
        assert!(text.contains(name), "{name} missing from {text}");
    }
}

#[test]
fn xds_is_off_when_set_to_nothing_and_secrets_stay_out_of_dumps() {
    let vars = [("XDS_ADDRESS", ""), ("AUTH_TOKEN", "s3cret"), ("CA_HEADER_X-Key", "s3cret")];
    let config = parse(&vars).unwrap();
    assert!(config.xds.is_none());
    assert!(matches!(&config.ca.token, TokenSource::Literal(t) if t == "s3cret"));
    assert!(config.ca.headers.contains(&("x-key".to_owned(), "s3cret".to_owned())));
    assert!(config.ca.headers.contains(&("clusterid".to_owned(), "Kubernetes".to_owned())));
    let dump = serde_json::to_string(&config).unwrap();
    assert!(!dump.contains("s3cret") && !format!("{config:?}").contains("s3cret"));
}

#[test]
fn the_drain_ends_before_kubernetes_loses_patience() {
    for (grace, expected) in [("30", 25), ("10", 9), ("1", 1), ("0", 1)] {
        let config = parse(&[("TERMINATION_GRACE_PERIOD_SECONDS", grace)]).unwrap();
        assert_eq!(config.drain_deadline, Duration::from_secs(expected), "{grace}");
    }
}

fn with_mesh(mesh: &str, pairs: &[(&str, &str)]) -> Result<Config, Problems> {
    let vars: HashMap<String, String> = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    let reader = Reader::new(&vars);
    let config = Config::read(&reader, Some(mesh));
    reader.finish().map(|()| config)
}

const MESH: &str = "accessLogFile: /dev/stdout\n\
    trustDomainAliases: [old.example]\n\
    outboundTrafficPolicy: {mode: REGISTRY_ONLY}\n\
    defaultConfig:\n  discoveryAddress: istiod-a:15012\n  proxyAdminPort: 15100\n  statsPort: 15120\n  concurrency: 3\n  \
      holdApplicationUntilProxyStarts: true\n  proxyMetadata: {ISTIO_META_A: x, B: 1, C: false}\n";

#[test]
fn the_meshs_file_gives_way_to_proxy_config_and_both_to_variables() {
    let config = with_mesh(MESH, &[]).unwrap();
    assert_eq!(config.xds.as_ref().unwrap().address, "https://istiod-a:15012");
    assert_eq!((config.ports.admin, config.ports.stats, config.workers), (15100, 15120, 3));
    assert_eq!(
        (&*config.trust_domain_aliases[0], config.outbound_policy),
        ("old.example", OutboundPolicy::RegistryOnly)
    );
    assert_eq!(serde_json::json!(config.metadata), serde_json::json!({"A": "x", "B": "1", "C": "false"}));

    let over = "{\"discoveryAddress\": \"b:1\", \"concurrency\": 0, \"proxyMetadata\": {\"B\": \"2\"}}";
    let vars = [("PROXY_CONFIG", over), ("ISTIO_META_A", "env"), ("CA_ADDRESS", "https://ca:2")];
    let config = with_mesh(MESH, &vars).unwrap();
    assert_eq!((config.xds.unwrap().address, config.ca.address), ("https://b:1".to_owned(), "https://ca:2".to_owned()));
    assert_eq!((config.ports.admin, config.workers), (15100, cpus()));
    assert_eq!(serde_json::json!(config.metadata), serde_json::json!({"A": "env", "B": "2", "C": "false"}));
    assert_eq!(with_mesh("", &[]).unwrap().outbound_policy, OutboundPolicy::AllowAny);
}

#[test]
fn every_field_that_is_istios_is_accepted_in_either_spelling() {
    let mesh = "rootNamespace: x\nmeshMTLS: {minProtocolVersion: TLSV1_2}\nextensionProviders: [{name: a, prometheus: {}}]\n\
        mixerCheckServer: x\ningress_class: x\noutbound_traffic_policy: {mode: REGISTRY_ONLY, tls: {mode: SIMPLE}}\n\
        default_config: {drain_duration: 1s, proxy_admin_port: 7}\n";
    let config = with_mesh(mesh, &[("PROXY_CONFIG", "{proxyHeaders: {}, stats_port: 8}")]).unwrap();
    assert_eq!((config.outbound_policy, config.ports.admin, config.ports.stats), (OutboundPolicy::RegistryOnly, 7, 8));
    for (mode, expected) in [
        ("{mode: ALLOW_ANY}", OutboundPolicy::AllowAny),
        ("{mode: ALLOW_ANY_DYNAMIC_DNS}", OutboundPolicy::AllowAny),
        ("{mode: REGISTRY_ONLY}", OutboundPolicy::RegistryOnly),
        ("{}", OutboundPolicy::AllowAny),
        ("null", OutboundPolicy::AllowAny),
    ] {
        let config = with_mesh(&format!("outboundTrafficPolicy: {mode}"), &[]).unwrap();
        assert_eq!(config.outbound_policy, expected, "{mode}");
    }
}

#[test]
fn a_bad_mesh_configuration_is_refused_with_its_place() {
    for (mesh, proxy, wanted) in [
        ("a: 1", "", ["etc/istio/config/mesh", "line 1", "a: unknown field", ""]),
        (
            "trustDomain: x\noutboundTrafficPolcy: {mode: REGISTRY_ONLY}",
            "",
            ["etc/istio/config/mesh", "line 2", "outboundTrafficPolcy", "did you mean `outboundTrafficPolicy`?"],
        ),
        (
            "trustDomain: x\noutboundTrafficPolicy:\n  modus: REGISTRY_ONLY",
            "",
            ["etc/istio/config/mesh", "line 3", "modus", "did you mean `mode`?"],
        ),
        (
            "defaultConfig:\n  proxyMetdata: {}",
            "",
            ["etc/istio/config/mesh", "line 2", "proxyMetdata", "did you mean `proxyMetadata`?"],
        ),
        ("", "{proxyMetdata: {}}", ["PROXY_CONFIG", "line 1", "proxyMetdata", "did you mean `proxyMetadata`?"]),
        ("outboundTrafficPolicy: REGISTRY_ONLY", "", ["etc/istio/config/mesh", "line 1", "REGISTRY_ONLY", "mapping"]),
        ("- a", "", ["etc/istio/config/mesh", "line 1", "", ""]),
        ("outboundTrafficPolicy: {mode: DENY}", "", ["etc/istio/config/mesh", "line 1", "DENY", "REGISTRY_ONLY"]),
        ("defaultConfig:\n  statsPort: many", "", ["etc/istio/config/mesh", "line 2", "many", "u16"]),
        ("defaultConfig: {concurrency: 2000}", "", ["defaultConfig", "concurrency", "2000", "1024"]),
        ("", "concurrency: -1", ["PROXY_CONFIG", "line 1", "-1", "u16"]),
    ] {
        let text = with_mesh(mesh, &[("PROXY_CONFIG", proxy)]).unwrap_err().to_string();
        for wanted in wanted {
            assert!(text.contains(wanted), "{wanted} missing from {text}");
        }
    }
}

#[test]
fn asking_on_demand_excludes_the_dns_proxy_and_facts_are_in_one_place() {
    let text = parse(&[("XDS_ON_DEMAND", "true")]).unwrap_err().to_string();
    assert!(text.contains("ISTIO_META_DNS_CAPTURE=false"), "{text}");
    assert!(parse(&[("XDS_ON_DEMAND", "true"), ("ISTIO_META_DNS_CAPTURE", "false")]).unwrap().xds_on_demand);
    assert!(with_mesh("defaultConfig: {proxyMetadata: {DNS_CAPTURE: false}}", &[("XDS_ON_DEMAND", "true")]).is_ok());
    assert_eq!(parse(&[("LOCAL_XDS", "a"), ("LOCAL_XDS_PATH", "b")]).unwrap_err().0.len(), 1);
}

/// Each variable with a value that is not its default.
const VARIABLES: &[(&str, &str)] = &[
    ("ALT_CA_HOSTNAME", "x"),
    ("ALT_XDS_HOSTNAME", "x"),
    ("AUTHZ_POLICY_INFO_LOGGING", "true"),
    ("AUTH_TOKEN", "x"),
    ("CA_ADDRESS", "x:1"),
    ("CA_HEADER_x", "x"),
    ("CA_ROOT_CA", "SYSTEM"),
    ("CLUSTER_DOMAIN", "x"),
    ("CLUSTER_ID", "x"),
    ("COMPLIANCE_POLICY", "pqc"),
    ("CONNECTION_TERMINATION_DEADLINE", "1s"),
    ("CRL_PATH", "/x"),
    ("ENABLE_ORIG_SRC", "true"),
    ("ENABLE_PROXY", "false"),
    ("ENABLE_RESPONSE_BAGGAGE", "false"),
    ("FAIRWAY_KEYS_DIR", "/x"),
    ("FAIRWAY_LOCAL_ADDRESS", "127.0.0.1"),
    ("FAIRWAY_STATE_DIR", "/nonexistent"),
    ("FAKE_CA", "true"),
    ("HTTP2_CONNECTION_WINDOW_SIZE", "100000"),
    ("HTTP2_FRAME_SIZE", "20000"),
    ("HTTP2_STREAM_WINDOW_SIZE", "100000"),
    ("INPOD_PORT_REUSE", "false"),
    ("INPOD_UDS", "/x"),
    ("INSTANCE_IP", "10.0.0.1"),
    ("IPV6_ENABLED", "false"),
    ("ISTIO_METAJSON_X", "{}"),
    ("ISTIO_META_CLUSTER_ID", "x"),
    ("ISTIO_META_DNS_CAPTURE", "false"),
    ("ISTIO_META_DNS_PROXY_ADDR", "127.0.0.2:53"),
    ("ISTIO_META_ISTIO_VERSION", "x"),
    ("ISTIO_META_X", "x"),
    ("KEEPALIVE_ENABLED", "false"),
    ("KEEPALIVE_INTERVAL", "1s"),
    ("KEEPALIVE_RETRIES", "1"),
    ("KEEPALIVE_TIME", "1s"),
    ("KUBERNETES_SERVICE_HOST", "10.0.0.1"),
    ("LOCALHOST_APP_TUNNEL", "false"),
    ("LOCAL_XDS", "x"),
    ("LOCAL_XDS_PATH", "x"),
    ("LOG_FORMAT", "json"),
    ("NETWORK", "x"),
    ("NODE_NAME", "x"),
    ("PACKET_MARK", "1"),
    ("POD_NAME", "x"),
    ("POD_NAMESPACE", "x"),
    ("POOL_MAX_STREAMS_PER_CONNECTION", "7"),
    ("POOL_UNUSED_RELEASE_TIMEOUT", "1s"),
    ("PREFERED_SERVICE_NAMESPACE", "x"),
    ("PROXY_CONFIG", "{statsPort: 1}"),
    ("PROXY_MODE", "dedicated"),
    ("RUST_LOG", "debug"),
    ("SECRET_TTL", "1h"),
    ("SERVICE_ACCOUNT", "x"),
    ("TERMINATION_GRACE_PERIOD_SECONDS", "30"),
    ("TLS12_ENABLED", "true"),
    ("TRUST_DOMAIN", "x"),
    ("UNSTABLE_ENABLE_SOCKS5", "true"),
    ("USER_TIMEOUT_ENABLED", "true"),
    ("XDS_ADDRESS", ""),
    ("XDS_HEADER_x", "x"),
    ("XDS_ON_DEMAND", "true"),
    ("XDS_ROOT_CA", "SYSTEM"),
    ("ZTUNNEL_CPU_LIMIT", "400"),
    ("ZTUNNEL_RESOURCE_CPU_LIMIT", "401"),
    ("ZTUNNEL_RESOURCE_CPU_REQUEST", "402"),
    ("ZTUNNEL_WORKER_THREADS", "403"),
];

/// Everything in a configuration, what dumps leave out included.
fn whole(config: &Config) -> String {
    let upstream = |u: &Upstream| format!("{:?} {:?} {:?}", u.token, u.headers, u);
    format!("{config:?} {:?} {}", config.xds.as_ref().map(upstream), upstream(&config.ca))
}

#[test]
fn every_documented_variable_is_read() {
    let default = whole(&parse(&[]).unwrap());
    for &(name, value) in VARIABLES {
        let same = parse(&[(name, value)]).is_ok_and(|config| whole(&config) == default);
        assert!(!same, "{name}={value} changes nothing");
    }
    let dedicated = [("PROXY_MODE", "dedicated"), ("PROXY_WORKLOAD_INFO", "n/w/s")];
    assert!(parse(&dedicated).unwrap().workload.is_some());
}

#[test]
fn malformed_values_are_refused_with_what_would_be_right() {
    for (name, value, right) in [
        ("PROXY_MODE", "both", "shared or dedicated"),
        ("INSTANCE_IP", "x", "IP address"),
        ("IPV6_ENABLED", "yes", "true or false"),
        ("ENABLE_PROXY", "on", "true or false"),
        ("XDS_ON_DEMAND", "maybe", "true or false"),
        ("SECRET_TTL", "1 day", "a duration"),
        ("CONNECTION_TERMINATION_DEADLINE", "5", "a duration"),
        ("PACKET_MARK", "-1", "a packet mark"),
        ("POOL_MAX_STREAMS_PER_CONNECTION", "0", "from 1"),
        ("TERMINATION_GRACE_PERIOD_SECONDS", "x", "seconds"),
        ("LOG_FORMAT", "text", "plain or json"),
        ("ZTUNNEL_CPU_LIMIT", "x", "CPU quantity"),
        ("FAIRWAY_LOCAL_ADDRESS", "127.0.0.1", "unset unless PROXY_MODE=dedicated"),
    ] {
        let text = parse(&[(name, value)]).unwrap_err().to_string();
        assert!(text.contains(&format!("{name}=`{value}`: expected ")) && text.contains(right), "{text}");
    }
}
