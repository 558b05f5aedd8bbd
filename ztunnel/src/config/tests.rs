use std::collections::HashMap;

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
