//! The metric families of a running proxy, as a contract: dashboards and alerts of others stand on them.
//!
//! What Istio's ztunnel dashboard asks of the proxy (its other panels ask the kubelet; `pod` is a label of the scrape):
//! - `sum(istio_build{component="ztunnel"}) by (tag)`
//! - `sum(rate(istio_tcp_connections_opened_total[…])) by (pod)`, and the same of `…_closed_total`
//! - `sum(rate(istio_tcp_sent_bytes_total[…])) by (pod)`, and the same of `istio_tcp_received_bytes_total`
//! - `sum(irate(istio_xds_message_total[…])) by (url)`
//! - `sum(rate(istio_xds_connection_terminations_total[…])) by (pod)`
//! - `sum(workload_manager_active_proxy_count) by (pod)`, and the same of `workload_manager_pending_proxy_count`
//!
//! And its mesh dashboards, of the TCP families: `reporter`, `source_workload`, `source_workload_namespace`, `destination_service`,
//! `destination_workload`, `destination_workload_namespace`, `connection_security_policy`.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
};

use mesh_core::workload::TunnelProtocol;

use super::*;
use crate::config::Ports;

/// Where the two ends expect each other's tunnels.
const HBONE: u16 = 15008;
const SOCKS: u16 = 15080;
/// Generous: it only ends a test that would fail anyway.
const PATIENCE: Duration = Duration::from_secs(60);

/// Type, HELP, and the label names in their order.
#[derive(Debug, Default)]
struct Family {
    kind: String,
    help: String,
    labels: Vec<String>,
}

/// A proxy of its own address for the workload `demo/<name>`.
async fn proxy(name: &str, ca: &Arc<TestCa>) -> (App, IpAddr) {
    loop {
        let address = [127, rand::random_range(1..255), rand::random_range(0..=255), rand::random_range(1..255)];
        let ip: IpAddr = Ipv4Addr::from(address).into();
        let mut config = Config::default_for_tests();
        config.ports = Ports { inbound: HBONE, socks5: SOCKS, ..config.ports };
        (config.local_address, config.socks5) = (Some(ip), true);
        if let Some(info) = &mut config.workload {
            (info.name, info.service_account) = (name.into(), name.into());
            info.uid = format!("Kubernetes//Pod/demo/{name}").as_str().into();
        }
        match App::start_with_ca(config, ca.clone()).await {
            Ok(app) => return (app, ip),
            // Somebody else's, by chance.
            Err(error) if format!("{error:#}").contains("in use") => {}
            Err(error) => panic!("{error:#}"),
        }
    }
}

fn know(app: &App, pods: &[(&str, IpAddr)]) {
    let pods = pods.iter().map(|(name, ip)| {
        let mut workload = Workload::new(format!("Kubernetes//Pod/demo/{name}"), "demo", *name);
        workload.service_account = (*name).into();
        workload.addresses = vec![*ip];
        workload.tunnel_protocol = TunnelProtocol::Hbone;
        Resource::Workload(Arc::new(workload))
    });
    let upserts = pods.collect();
    app.shared.state.update(|index| {
        index.apply(Delta { provenance: Provenance::Xds, upserts, removals: Vec::new() });
        index.set_policies_complete(true);
    });
}

/// Through the mesh: a few bytes to a server that echoes them, and an orderly end.
async fn converse(client: IpAddr, server: IpAddr) {
    let listener = tokio::net::TcpListener::bind((server, 0)).await.unwrap();
    let IpAddr::V4(to) = server else { panic!("IPv4 only") };
    let port = listener.local_addr().unwrap().port().to_be_bytes();
    let mut near = TcpStream::connect((client, SOCKS)).await.unwrap();
    near.write_all(&[5, 1, 0]).await.unwrap();
    near.read_exact(&mut [0; 2]).await.unwrap();
    near.write_all(&[&[5, 1, 0, 1][..], &to.octets()[..], &port[..]].concat()).await.unwrap();
    near.read_exact(&mut [0; 10]).await.unwrap();
    let mut far = listener.accept().await.unwrap().0;
    near.write_all(b"ping").await.unwrap();
    far.read_exact(&mut [0; 4]).await.unwrap();
    far.write_all(b"pong").await.unwrap();
    far.shutdown().await.unwrap();
    near.shutdown().await.unwrap();
    near.read_to_end(&mut Vec::new()).await.unwrap();
    far.read_to_end(&mut Vec::new()).await.unwrap();
}

/// What the proxy shows once it has counted the end of a flow.
async fn scrape(app: &App) -> String {
    let counted = async {
        loop {
            let (_, text) = ask(app.stats, "GET /stats/prometheus").await;
            if text.contains("\nistio_tcp_connections_closed_total{") {
                return text;
            }
        }
    };
    tokio::time::timeout(PATIENCE, counted).await.expect("the flow is counted")
}

fn families(text: &str, into: &mut BTreeMap<String, Family>) {
    for line in text.lines() {
        let words: Vec<&str> = line.splitn(4, ' ').collect();
        match words[..] {
            ["#", "HELP", name, help] => help.clone_into(&mut into.entry(name.to_owned()).or_default().help),
            ["#", "TYPE", name, kind] => kind.clone_into(&mut into.entry(name.to_owned()).or_default().kind),
            _ => sample(line, into),
        }
    }
}

fn sample(line: &str, into: &mut BTreeMap<String, Family>) {
    let Some((name, labels)) = line.split_once('{') else { return };
    let suffixes = ["", "_total", "_bucket", "_sum", "_count"];
    let family = suffixes.iter().filter_map(|suffix| name.strip_suffix(suffix)).find(|name| into.contains_key(*name));
    let family = into.get_mut(family.expect("samples follow their family")).unwrap();
    let names = labels.split("\",").filter_map(|pair| pair.trim_start_matches('}').split_once("=\""));
    family.labels = names.map(|(name, _)| name.to_owned()).filter(|name| name != "le").collect();
}

#[tokio::test]
async fn a_flow_in_and_a_flow_out_yield_the_families_written_down() {
    let ca = Arc::new(TestCa(SigningAuthority::generate("cluster.local").unwrap()));
    let ((client, near), (server, far)) = (proxy("client", &ca).await, proxy("server", &ca).await);
    for app in [&client, &server] {
        know(app, &[("client", near), ("server", far)]);
    }
    converse(near, far).await;
    let mut found = BTreeMap::new();
    for app in [client, server] {
        families(&scrape(&app).await, &mut found);
        app.stop().await;
    }
    let lines = found.iter().map(|(name, family)| format!("{name} {} {}", family.kind, family.labels.join(",")));
    let got: String = lines.map(|line| format!("{}\n", line.trim_end())).collect();
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/metrics.txt");
    if std::env::var_os("FAIRWAY_BLESS").is_some() {
        std::fs::write(golden, &got).unwrap();
    }
    assert_eq!(got, std::fs::read_to_string(golden).unwrap(), "run with FAIRWAY_BLESS=1 if this is intended");
    only_the_core_is_stable(&found);
    what_dashboards_ask_for_is_there(found);
}

fn only_the_core_is_stable(found: &BTreeMap<String, Family>) {
    let core =
        ["connections_opened", "connections_closed", "sent_bytes", "received_bytes"].map(|n| format!("istio_tcp_{n}"));
    for (name, family) in found {
        let core =
            core.contains(name) || name == "istio_build" || name.starts_with("process_") || name.starts_with("tokio_");
        assert_eq!(family.help.contains("(unstable)"), !core, "{name}: {}", family.help);
    }
}

fn what_dashboards_ask_for_is_there(mut found: BTreeMap<String, Family>) {
    // There is no control plane in this test to fill these.
    let registry = Registry::new();
    let control = ControlMetrics::new(&registry, "test");
    control.xds_messages.with_label_values(&["type"]).inc();
    control.xds_bytes.with_label_values(&["type"]).inc();
    control.xds_terminations.with_label_values(&["Complete"]).inc();
    families(&registry.encode(), &mut found);
    let traffic = [
        "reporter",
        "source_workload",
        "source_workload_namespace",
        "destination_service",
        "destination_workload",
        "destination_workload_namespace",
        "connection_security_policy",
    ];
    let wanted: [(&str, &[&str]); 10] = [
        ("istio_build", &["component", "tag"]),
        ("istio_tcp_connections_opened", &traffic),
        ("istio_tcp_connections_closed", &traffic),
        ("istio_tcp_sent_bytes", &traffic),
        ("istio_tcp_received_bytes", &traffic),
        ("istio_xds_message", &["url"]),
        ("istio_xds_message_bytes", &["url"]),
        ("istio_xds_connection_terminations", &["reason"]),
        ("workload_manager_active_proxy_count", &[]),
        ("workload_manager_pending_proxy_count", &[]),
    ];
    for (name, labels) in wanted {
        let has: BTreeSet<&str> = found[name].labels.iter().map(String::as_str).collect();
        assert!(labels.iter().all(|label| has.contains(label)), "{name} has {has:?}");
    }
}
