//! With a folder of manifests as the source.

use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddr,
    path::Path,
    time::{Duration, SystemTime},
};

use control_plane::{
    app::{self, Config, Running, Source},
    token::{Subject, TokenKey},
};
use mesh_core::{identity::Identity, index::Resource, workload::TunnelProtocol};
use mesh_identity::csr::Csr;
use proto::{
    ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL, core::Node,
    discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
};
use rustls_pki_types::{CertificateDer, pem::PemObject as _};
use tokio::{io::AsyncReadExt as _, net::TcpStream, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, transport::Channel};

use crate::support::{self, NodeProxy, PATIENCE, Received, admin, certificate, channel, types};

struct Mesh {
    folder: tempfile::TempDir,
    state: tempfile::TempDir,
    running: Running,
}

impl Mesh {
    async fn start(files: &[(&str, String)]) -> Self {
        let (folder, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for (name, text) in files {
            write(folder.path(), name, text);
        }
        let running = start(folder.path(), state.path()).await;
        Self { folder, state, running }
    }

    fn write(&self, name: &str, text: &str) {
        write(self.folder.path(), name, text);
    }

    fn token(&self, node: &str, account: &str) -> String {
        let subject = Subject {
            node: node.into(),
            namespace: "istio-system".into(),
            service_account: account.into(),
            pod: "ztunnel-x".into(),
            pod_uid: "u".into(),
        };
        TokenKey::open(self.state.path()).unwrap().issue(&subject, PATIENCE, SystemTime::now()).unwrap()
    }

    async fn channel(&self) -> Channel {
        channel(self.running.address, &fs::read(self.state.path().join("root-cert.pem")).unwrap()).await
    }

    async fn node(&self, name: &str) -> NodeProxy {
        NodeProxy::connect(self.channel().await, &self.token(name, "ztunnel"), types()).await
    }

    async fn admin(&self, path: &str) -> String {
        admin(self.running.admin_address, path).await
    }

    async fn certificate(
        &self,
        token: Option<&str>,
        identity: Option<&str>,
        csr: String,
    ) -> Result<Vec<String>, Status> {
        certificate(self.channel().await, token, identity, csr).await
    }
}

async fn start(folder: &Path, state: &Path) -> Running {
    let any_port: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let source = Source::Folder { manifests: folder.to_owned(), state: state.to_owned() };
    let trusted_accounts = vec![("istio-system".into(), "ztunnel".into())];
    let config = Config { trusted_accounts, ..Config::new(source, any_port, any_port) };
    app::start(config).await.unwrap()
}

/// As writers must: whole files, by rename.
fn write(folder: &Path, name: &str, text: &str) {
    fs::write(folder.join(".draft"), text).unwrap();
    fs::rename(folder.join(".draft"), folder.join(name)).unwrap();
}

async fn ready(mesh: &Mesh) {
    support::ready(mesh.running.admin_address).await;
}

fn names(expected: &[&str]) -> BTreeSet<String> {
    expected.iter().map(|&name| name.to_owned()).collect()
}

fn pod(name: &str, node: &str, ip: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{namespace: demo, name: {name}, uid: uid-{name}, labels: {{app: {name}}}}}\n\
         spec: {{nodeName: {node}, serviceAccountName: {name}}}\n\
         status: {{podIPs: [{{ip: {ip}}}], conditions: [{{type: Ready, status: \"True\"}}]}}\n"
    )
}

fn service(name: &str, app: &str, vip: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{namespace: demo, name: {name}}}\n\
         spec: {{clusterIP: {vip}, selector: {{app: {app}}}, ports: [{{port: 80, targetPort: 8080}}]}}\n"
    )
}

const POLICY: &str = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {namespace: demo, name: allow-client}
spec:
  selector: {matchLabels: {app: web}}
  rules:
  - from:
    - source: {serviceAccounts: [client]}
";

const CLIENT: &str = "Kubernetes//Pod/demo/client";
const WEB: &str = "Kubernetes//Pod/demo/web";

/// `web` is an endpoint of several services, so that the order of a map on the wire would show.
fn manifests() -> Vec<(&'static str, String)> {
    let services: String = (1..9).map(|i| service(&format!("web-{i}"), "web", &format!("10.1.0.{i}"))).collect();
    vec![
        ("client.yaml", pod("client", "n1", "10.0.0.1")),
        ("web.yaml", pod("web", "n2", "10.0.0.2") + &services),
        ("policy.yaml", POLICY.to_owned()),
    ]
}

#[tokio::test]
async fn a_node_sees_the_mesh_then_exactly_what_changes() {
    let mesh = Mesh::start(&manifests()).await;
    ready(&mesh).await;
    let mut node = mesh.node("n1").await;
    let initial = node.initial().await;
    assert_eq!(initial[ADDRESS_TYPE_URL].names.len(), 2 + 8);
    assert_eq!(initial[AUTHORIZATION_TYPE_URL].names, names(&["demo/allow-client"]));

    mesh.write("client.yaml", &pod("client", "n1", "10.0.0.7"));
    let (_, change, resources) = node.receive().await;
    assert_eq!(change, Received { names: names(&[CLIENT]), removed: names(&[]) });
    let Resource::Workload(client) = &resources[0] else { panic!("{resources:?}") };
    assert_eq!(client.addresses, ["10.0.0.7".parse::<std::net::IpAddr>().unwrap()]);

    fs::create_dir(mesh.folder.path().join("enrolment")).unwrap();
    let enrolment = "apiVersion: fairway.dev/v1alpha1\nkind: PodEnrolment\nmetadata: {namespace: demo, name: client}\nspec: {podUid: uid-client, redirection: enabled}\n";
    mesh.write("enrolment/demo_client.yaml", enrolment);
    let (_, _, resources) = node.receive().await;
    let Resource::Workload(client) = &resources[0] else { panic!("{resources:?}") };
    assert_eq!(client.tunnel_protocol, TunnelProtocol::Hbone);

    fs::remove_file(mesh.folder.path().join("client.yaml")).unwrap();
    let (_, change, _) = node.receive().await;
    assert_eq!(change, Received { names: names(&[]), removed: names(&[CLIENT]) });
    mesh.running.stop().await;
}

#[tokio::test]
async fn a_new_policy_arrives_before_the_workload_that_names_it_and_with_its_origin() {
    let mesh = Mesh::start(&manifests()[..2]).await;
    ready(&mesh).await;
    let mut node = mesh.node("n2").await;
    node.initial().await;
    mesh.write("policy.yaml", POLICY);
    let (first, _, policies) = node.receive().await;
    assert_eq!(first, AUTHORIZATION_TYPE_URL);
    let Resource::Policy(policy) = &policies[0] else { panic!("{policies:?}") };
    let origin = policy.rules[0].origin.to_string();
    assert_eq!(origin, "AuthorizationPolicy demo/allow-client (policy.yaml:7, spec.rules[0])");
    let (_, _, workloads) = node.receive().await;
    let Resource::Workload(web) = &workloads[0] else { panic!("{workloads:?}") };
    assert_eq!((&*web.uid, &*web.authorization_policies), (WEB, &["demo/allow-client".into()][..]));

    fs::remove_file(mesh.folder.path().join("policy.yaml")).unwrap();
    let order = [node.receive().await.0, node.receive().await.0];
    assert_eq!(order, [ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL], "a policy goes after the workload has dropped it");
    mesh.running.stop().await;
}

#[tokio::test]
async fn a_reconnecting_node_gets_only_what_it_lacks_even_from_a_restarted_server() {
    let mut mesh = Mesh::start(&manifests()).await;
    ready(&mesh).await;
    let mut node = mesh.node("n1").await;
    node.initial().await;
    let kept = node.types.clone();
    drop(node);

    mesh.running.stop().await;
    mesh.running = start(mesh.folder.path(), mesh.state.path()).await;
    ready(&mesh).await;
    let token = mesh.token("n1", "ztunnel");
    let mut node = NodeProxy::connect(mesh.channel().await, &token, kept.clone()).await;
    for (kind, received) in node.initial().await {
        assert_eq!(received, Received { names: names(&[]), removed: names(&[]) }, "{kind}");
    }
    drop(node);

    fs::remove_file(mesh.folder.path().join("client.yaml")).unwrap();
    let mut watcher = NodeProxy::connect(mesh.channel().await, &token, types()).await;
    while watcher.types[ADDRESS_TYPE_URL].initial(Node::default(), []).initial_resource_versions.contains_key(CLIENT)
        || !watcher.types[ADDRESS_TYPE_URL].is_synced()
    {
        watcher.receive().await;
    }
    let mut node = NodeProxy::connect(mesh.channel().await, &token, kept).await;
    let received = node.initial().await;
    assert_eq!(received[ADDRESS_TYPE_URL], Received { names: names(&[]), removed: names(&[CLIENT]) });
    mesh.running.stop().await;
}

#[tokio::test]
async fn a_node_gets_certificates_for_its_own_pods_only() {
    let mesh = Mesh::start(&manifests()).await;
    ready(&mesh).await;
    let client = Identity::new("cluster.local", "demo", "client");
    let (spiffe, web) = (client.to_string(), Identity::new("cluster.local", "demo", "web").to_string());
    let csr = Csr::generate(&client).unwrap().pem;
    let (n1, n2, other) = (mesh.token("n1", "ztunnel"), mesh.token("n2", "ztunnel"), mesh.token("n1", "other"));

    let chain = mesh.certificate(Some(&n1), Some(&spiffe), csr.clone()).await.unwrap();
    let leaf = CertificateDer::from_pem_slice(chain[0].as_bytes()).unwrap();
    assert_eq!(mesh_identity::peer_identity(&[leaf]), Some(client));
    assert_eq!(chain.last().unwrap(), &fs::read_to_string(mesh.state.path().join("root-cert.pem")).unwrap());

    for (case, token, identity) in [
        ("a pod of another node", Some(&n1), web.as_str()),
        ("from another node", Some(&n2), spiffe.as_str()),
        ("another trust domain", Some(&n1), "spiffe://elsewhere/ns/demo/sa/client"),
        ("not a node proxy", Some(&other), spiffe.as_str()),
        ("no token", None, spiffe.as_str()),
    ] {
        let refused = mesh.certificate(token.map(String::as_str), Some(identity), csr.clone()).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated, "{case}");
        assert!(!refused.message().contains("demo"), "{case}: {}", refused.message());
    }
    let garbage = mesh.certificate(Some(&n1), Some(&spiffe), "garbage".into()).await.unwrap_err();
    assert_eq!(garbage.code(), Code::InvalidArgument);
    let metrics = mesh.admin("/metrics").await;
    for line in [
        "citadel_server_success_cert_issuance_count 1",
        "citadel_server_csr_parsing_err_count 1",
        "fairwayd_ca_refusals_total{reason=\"not_on_node\"} 2",
    ] {
        assert!(metrics.contains(line), "{line}\n{metrics}");
    }
    mesh.running.stop().await;
}

#[tokio::test]
async fn discovery_is_refused_without_a_token() {
    let mesh = Mesh::start(&manifests()).await;
    ready(&mesh).await;
    let mut client = AggregatedDiscoveryServiceClient::new(mesh.channel().await);
    let (_requests, stream) = mpsc::channel(1);
    let refused = client.delta_aggregated_resources(ReceiverStream::new(stream)).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    mesh.running.stop().await;
}

#[tokio::test]
async fn problems_are_shown_and_harm_nothing_else() {
    let mesh = Mesh::start(&manifests()).await;
    ready(&mesh).await;
    mesh.write("bad.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {}\n");
    let patience = tokio::time::Instant::now() + PATIENCE;
    let problems = loop {
        let problems = mesh.admin("/debug/problems").await;
        if problems.contains("bad.yaml") {
            break problems;
        }
        assert!(tokio::time::Instant::now() < patience);
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let body: serde_json::Value = serde_json::from_str(problems.split_once("\r\n\r\n").unwrap().1).unwrap();
    let expected = serde_json::json!([{
        "file": "bad.yaml", "line": 3, "field": "metadata", "message": "`name` is missing", "remedy": "add `name:`",
    }]);
    assert_eq!(body, expected);
    assert!(mesh.admin("/debug/state").await.contains(WEB));
    assert_eq!(mesh.node("n1").await.initial().await[ADDRESS_TYPE_URL].names.len(), 10);
    mesh.running.stop().await;
}

#[tokio::test]
async fn a_missing_folder_is_not_taken_for_an_empty_mesh() {
    let mesh = Mesh::start(&[]).await;
    ready(&mesh).await;
    mesh.running.stop().await;
    let state = tempfile::tempdir().unwrap();
    let running = start(&state.path().join("missing"), state.path()).await;
    let folder = tempfile::tempdir().unwrap();
    let mesh = Mesh { folder, state, running };
    assert!(mesh.admin("/healthz/ready").await.contains("pending: first full state"));
    let patience = tokio::time::Instant::now() + PATIENCE;
    while !mesh.admin("/debug/problems").await.contains("cannot be read") {
        assert!(tokio::time::Instant::now() < patience);
        tokio::task::yield_now().await;
    }
    assert!(!mesh.admin("/healthz/ready").await.starts_with("HTTP/1.1 200"));
    mesh.running.stop().await;
}

#[tokio::test]
async fn peers_who_connect_and_say_nothing_keep_no_proxy_out() {
    let mesh = Mesh::start(&[]).await;
    ready(&mesh).await;
    // More than there are places for handshakes.
    let mut silent = Vec::new();
    for _ in 0..200 {
        silent.push(TcpStream::connect(mesh.running.address).await.unwrap());
    }
    // Sooner than those are given up on.
    let channel = tokio::time::timeout(Duration::from_secs(8), mesh.channel()).await.expect("a handshake");
    drop((channel, silent));
    mesh.running.stop().await;
}

#[tokio::test]
async fn an_address_has_few_connections_without_an_accepted_call_and_any_number_with_one() {
    let mesh = Mesh::start(&[("pod.yaml", pod("client", "n1", "10.0.0.1"))]).await;
    ready(&mesh).await;
    let mut nodes = Vec::new();
    for n in 0..70 {
        let mut node = mesh.node(&format!("n{n}")).await;
        node.initial().await;
        nodes.push(node);
    }
    let mut first = TcpStream::connect(mesh.running.address).await.unwrap();
    let mut others = Vec::new();
    for _ in 0..70 {
        others.push(TcpStream::connect(mesh.running.address).await.unwrap());
    }
    // Sooner than it would be given up on by itself.
    let ended = tokio::time::timeout(Duration::from_secs(8), first.read(&mut [0])).await.expect("its place is taken");
    assert!(ended.is_err() || ended.is_ok_and(|read| read == 0));
    mesh.write("other.yaml", &pod("web", "n1", "10.0.0.2"));
    for node in &mut nodes {
        assert_eq!(node.receive().await.1.names, names(&[WEB]), "its stream has not ended");
    }
    drop(others);
    mesh.running.stop().await;
}

#[tokio::test]
async fn a_request_to_the_ca_that_is_too_large_is_not_even_received() {
    let mesh = Mesh::start(&[]).await;
    let refused = mesh.certificate(None, None, "x".repeat(100_000)).await.unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange, "{refused}");
    mesh.running.stop().await;
}
