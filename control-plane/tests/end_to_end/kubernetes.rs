//! With an API server as the source.

mod admission;
mod kept;

use std::{collections::BTreeSet, net::SocketAddr, path::Path, time::Duration};

use control_plane::app::{self, Config, Running, Source};
use mesh_core::{
    identity::Identity,
    index::Resource,
    workload::{Health, TunnelProtocol},
};
use mesh_identity::csr::Csr;
use proto::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL};
use serde_json::{Value, json};
use test_support::{
    ApiServer,
    apiserver::{Mood, Options},
};
use tonic::{Code, Status, transport::Channel};

use crate::support::{self, NodeProxy, Received, admin, certificate, channel, eventually, types};

const PODS: &str = "api/v1/pods";
const SERVICES: &str = "api/v1/services";
const SECRETS: &str = "api/v1/secrets";
const ENTRIES: &str = "apis/networking.istio.io/v1/serviceentries";
const POLICIES: &str = "apis/security.istio.io/v1/authorizationpolicies";

/// Whose lists come in small pages, however large a page is asked for.
async fn api_server() -> ApiServer {
    ApiServer::with(Options { page: 2, bookmarks: true }).await
}

struct Cluster {
    api: ApiServer,
    running: Running,
}

impl Cluster {
    /// One with a node proxy on `n1` and the pods `client` and `web`.
    async fn start() -> Self {
        let api = api_server().await;
        api.put(PODS, ztunnel("n1"));
        api.review(&token("n1"), review("n1", "ztunnel"));
        api.put(PODS, pod("client", "10.0.0.1", "n1"));
        api.put(PODS, pod("web", "10.0.0.2", "n2"));
        let running = run(&api).await;
        support::ready(running.admin_address).await;
        Self { api, running }
    }

    async fn channel(&self) -> Channel {
        channel(self.running.address, &roots(&self.api)).await
    }

    /// How many tokens the API server was asked about.
    fn reviews(&self) -> usize {
        self.api.asked().iter().filter(|asked| asked.path.contains("tokenreviews")).count()
    }

    async fn node(&self) -> NodeProxy {
        NodeProxy::connect(self.channel().await, &token("n1"), types()).await
    }

    async fn certificate(&self, token: &str, account: &str) -> Result<Vec<String>, Status> {
        let identity = Identity::new("cluster.local", "demo", account);
        let csr = Csr::generate(&identity).unwrap().pem;
        certificate(self.channel().await, Some(token), Some(&identity.to_string()), csr).await
    }
}

async fn run(api: &ApiServer) -> Running {
    run_as(api, "a").await
}

async fn run_as(api: &ApiServer, identity: &str) -> Running {
    run_with(api, identity, Path::new("/nowhere")).await
}

fn source(api: &ApiServer, identity: &str, ca_folder: &Path) -> Source {
    let mut config = kube::Config::new(api.url().parse().unwrap());
    config.default_retry = false;
    let (api_server, identity) = (Box::new(config), identity.to_owned());
    Source::Kubernetes { api_server, ca_folder: ca_folder.to_owned(), identity }
}

async fn run_with(api: &ApiServer, identity: &str, ca_folder: &Path) -> Running {
    let source = source(api, identity, ca_folder);
    let any_port: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let trusted_accounts = vec![("istio-system".into(), "ztunnel".into())];
    app::start(Config { trusted_accounts, ..Config::new(source, any_port, any_port) }).await.unwrap()
}

fn roots(api: &ApiServer) -> Vec<u8> {
    let secret = api.get(SECRETS, "istio-system", "istio-ca-secret").unwrap();
    let bytes: k8s_openapi::ByteString = serde_json::from_value(secret["data"]["root-cert.pem"].clone()).unwrap();
    bytes.0
}

fn pod(name: &str, ip: &str, node: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": "demo", "name": name, "uid": format!("uid-{name}"), "labels": {"app": name}},
        "spec": {"nodeName": node, "serviceAccountName": name, "containers": [{"name": "c", "env": [{"name": "A", "value": "b"}]}]},
        "status": {"phase": "Running", "podIPs": [{"ip": ip}], "conditions": [{"type": "Ready", "status": "True"}]},
    })
}

fn ztunnel(node: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": "istio-system", "name": format!("ztunnel-{node}"), "uid": format!("uid-{node}")},
        "spec": {"nodeName": node, "serviceAccountName": "ztunnel"},
        "status": {"phase": "Running"},
    })
}

/// Of the node proxy of a node, by its own word; whether that is so is for the API server to know.
fn token(node: &str) -> String {
    token_of(node, "ztunnel", 0)
}

/// One of many that say the same.
fn token_of(node: &str, account: &str, number: u32) -> String {
    let key = jsonwebtoken::EncodingKey::from_secret(b"not ours");
    let claims = json!({
        "aud": ["istio-ca"], "exp": 4_102_444_800_u64, "jti": number,
        "sub": format!("system:serviceaccount:istio-system:{account}"),
        "kubernetes.io": {
            "namespace": "istio-system", "serviceaccount": {"name": account},
            "pod": {"name": format!("ztunnel-{node}"), "uid": format!("uid-{node}")},
        },
    });
    jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key).unwrap()
}

fn review(node: &str, account: &str) -> Value {
    json!({
        "authenticated": true,
        "audiences": ["istio-ca"],
        "user": {
            "username": format!("system:serviceaccount:istio-system:{account}"),
            "extra": {
                "authentication.kubernetes.io/pod-name": [format!("ztunnel-{node}")],
                "authentication.kubernetes.io/pod-uid": [format!("uid-{node}")],
            },
        },
    })
}

fn policy(name: &str, rules: Value) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"namespace": "demo", "name": name}, "spec": {"rules": rules},
    })
}

fn names(expected: &[&str]) -> BTreeSet<String> {
    expected.iter().map(|&name| name.to_owned()).collect()
}

const CLIENT: &str = "Kubernetes//Pod/demo/client";

fn workload(resources: &[Resource]) -> &mesh_core::workload::Workload {
    match resources {
        [Resource::Workload(workload)] => workload,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_node_sees_the_cluster_then_exactly_what_changes() {
    let cluster = Cluster::start().await;
    let mut node = cluster.node().await;
    let initial = node.initial().await;
    assert_eq!(initial[ADDRESS_TYPE_URL].names, names(&[CLIENT, "Kubernetes//Pod/demo/web"]), "pages of a list add up");

    let mut changed = pod("client", "10.0.0.1", "n1");
    changed["metadata"]["annotations"] = json!({"ambient.istio.io/redirection": "enabled"});
    cluster.api.put(PODS, changed.clone());
    let (_, _, resources) = node.receive().await;
    assert_eq!(workload(&resources).tunnel_protocol, TunnelProtocol::Hbone);

    changed["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    cluster.api.put(PODS, changed);
    let (_, _, resources) = node.receive().await;
    assert_eq!(workload(&resources).health, Health::Unhealthy, "a pod that terminates takes nothing new");

    cluster.api.delete(PODS, "demo", "client");
    let (_, change, _) = node.receive().await;
    assert_eq!(change, Received { names: names(&[]), removed: names(&[CLIENT]) });
    cluster.running.stop().await;
}

#[tokio::test]
async fn a_history_that_was_lost_costs_nothing_but_a_new_list() {
    let cluster = Cluster::start().await;
    let mut node = cluster.node().await;
    node.initial().await;
    // While nobody watches, one pod goes and one comes.
    cluster.api.set(Mood::Frozen);
    cluster.api.cut();
    cluster.api.delete(PODS, "demo", "client");
    cluster.api.put(PODS, pod("new", "10.0.0.3", "n2"));
    cluster.api.forget();
    cluster.api.set(Mood::Working);
    let mut seen = Received { names: names(&[]), removed: names(&[]) };
    while seen.names.is_empty() || seen.removed.is_empty() {
        let (_, change, _) = node.receive().await;
        seen.names.extend(change.names);
        seen.removed.extend(change.removed);
    }
    assert_eq!(seen, Received { names: names(&["Kubernetes//Pod/demo/new"]), removed: names(&[CLIENT]) });
    cluster.running.stop().await;
}

#[tokio::test]
async fn a_kind_is_empty_until_it_is_installed_and_nobody_connects_before_all_is_known() {
    let api = api_server().await;
    api.know(ENTRIES, false);
    api.put(SERVICES, json!({"metadata": {"namespace": "demo", "name": "web"}, "spec": {"clusterIP": "10.2.0.1", "ports": [{"port": 80}]}}));
    let running = run(&api).await;
    support::ready(running.admin_address).await;
    let counts = async |what: &str| admin(running.admin_address, "/metrics").await.contains(what);
    assert!(counts("pilot_services 1").await);
    api.put(
        ENTRIES,
        json!({
            "metadata": {"namespace": "demo", "name": "e"},
            "spec": {"hosts": ["a.example"], "resolution": "DNS", "ports": [{"number": 443, "name": "tls"}]},
        }),
    );
    api.know(ENTRIES, true);
    eventually("the kind is found", async || counts("pilot_services 2").await).await;
    running.stop().await;
}

#[tokio::test]
async fn what_is_wrong_is_told_of_the_object_and_denied() {
    let cluster = Cluster::start().await;
    let mut node = cluster.node().await;
    node.initial().await;
    cluster.api.put(POLICIES, policy("p", json!([{"form": []}])));
    let (type_url, change, resources) = node.receive().await;
    assert_eq!((type_url.as_str(), &change.names), (AUTHORIZATION_TYPE_URL, &names(&["demo/p"])));
    let Resource::Policy(policy) = &resources[0] else { panic!() };
    assert_eq!(policy.action, mesh_core::policy::Action::Deny);
    let told = r#""field":"spec.rules[0].form","message":"unknown field","object":"AuthorizationPolicy demo/p""#;
    eventually("the problem is shown", async || {
        admin(cluster.running.admin_address, "/debug/problems").await.contains(told)
    })
    .await;
    cluster.running.stop().await;
}

#[tokio::test]
async fn an_object_nested_too_deep_to_be_read_is_denied_and_harms_no_other() {
    let api = ApiServer::start().await;
    let mut deep = policy("deep", json!([{}]));
    deep["spec"]["x"] = (0..300).fold(json!({}), |within, _| json!({ "y": within }));
    // Definitions keep it as it is written.
    deep["status"] = deep["spec"]["x"].clone();
    api.put(POLICIES, deep);
    api.put(POLICIES, policy("good", json!([{}])));
    let running = run(&api).await;
    support::ready(running.admin_address).await;
    let metrics = async || admin(running.admin_address, "/metrics").await;
    assert!(metrics().await.contains("fairwayd_policies 2"), "{}", metrics().await);
    let told = r#""field":"spec.x","message":"unknown field","object":"AuthorizationPolicy demo/deep""#;
    assert!(admin(running.admin_address, "/debug/problems").await.contains(told));
    running.stop().await;
}

#[tokio::test]
async fn a_certificate_is_for_an_account_on_the_node_of_the_callers_pod() {
    let cluster = Cluster::start().await;
    let [other_account, unbound, stranger] = [1, 2, 3].map(|number| token_of("n1", "ztunnel", number));
    cluster.api.review(&other_account, review("n1", "web"));
    cluster.api.review(&token("n3"), review("n3", "ztunnel"));
    cluster.api.review(&unbound, {
        let mut unbound = review("n1", "ztunnel");
        unbound["user"]["extra"] = json!({});
        unbound
    });
    assert_eq!(cluster.certificate(&token("n1"), "client").await.unwrap().len(), 2);
    let table = [
        (token("n1"), "web", Code::Unauthenticated, "it runs elsewhere"),
        (token("n1"), "nobody", Code::Unauthenticated, "it runs nowhere"),
        (other_account, "client", Code::Unauthenticated, "the pod runs as another account"),
        (token("n3"), "client", Code::Unavailable, "the pod has not been seen"),
        (unbound, "client", Code::Unauthenticated, "the token is bound to no pod"),
        (stranger, "client", Code::Unauthenticated, "the API server does not know the token"),
    ];
    for (token, account, code, why) in table {
        let refused = cluster.certificate(&token, account).await.unwrap_err();
        assert_eq!(refused.code(), code, "asks for {account}: {why}");
    }
    // A pod has its account from the moment it is scheduled: it is certified before it has an address.
    let mut pending = pod("late", "", "n1");
    pending["status"] = json!({"phase": "Pending"});
    cluster.api.put(PODS, pending);
    eventually("the pod is seen", async || cluster.certificate(&token("n1"), "late").await.is_ok()).await;
    cluster.running.stop().await;
}

#[tokio::test]
async fn one_review_does_for_all_who_bring_the_same_token() {
    let cluster = Cluster::start().await;
    let token = token("n1");
    let calls = (0..8).map(|_| cluster.certificate(&token, "client"));
    let answers = futures_util::future::join_all(calls).await;
    assert!(answers.iter().all(Result::is_ok));
    assert_eq!(cluster.reviews(), 1);
    cluster.running.stop().await;
}

#[tokio::test]
async fn tokens_that_cannot_be_right_cost_no_review_and_those_that_might_few() {
    let cluster = Cluster::start().await;
    cluster.api.put(PODS, ztunnel("n2"));
    cluster.api.review(&token("n2"), review("n2", "ztunnel"));
    assert!(cluster.certificate(&token("n1"), "client").await.is_ok());
    assert_eq!(cluster.reviews(), 1);
    let channel = cluster.channel().await;
    let flood = async |tokens: Vec<String>| {
        let calls = tokens.iter().map(|token| certificate(channel.clone(), Some(token), None, String::new()));
        let answers = futures_util::future::join_all(calls).await;
        let codes: BTreeSet<String> =
            answers.into_iter().map(|answer| answer.unwrap_err().code().to_string()).collect();
        codes
    };
    let nowhere = (0..200).map(|number| token_of(&format!("n{}", 100 + number), "ztunnel", number)).collect();
    assert_eq!(flood(nowhere).await, names(&[&Code::Unavailable.to_string()]));
    let other_account = (0..200).map(|number| token_of("n1", "other", number)).collect();
    assert_eq!(flood(other_account).await, names(&[&Code::Unauthenticated.to_string()]));
    assert_eq!(cluster.reviews(), 1, "nothing was asked");

    // As the pod itself could make them, or who knows its uid.
    let forged: Vec<String> = (1..300).map(|number| token_of("n1", "ztunnel", number)).collect();
    let kept = token("n1");
    let (codes, known, ()) = tokio::join!(
        flood(forged),
        cluster.certificate(&kept, "client"),
        eventually("a new caller gets in", async || cluster.certificate(&token("n2"), "web").await.is_ok()),
    );
    assert!(known.is_ok(), "an answer that is kept needs no review: {known:?}");
    assert_eq!(codes, names(&[&Code::Unavailable.to_string(), &Code::Unauthenticated.to_string()]));
    assert_eq!(cluster.reviews(), 1 + 8 + 1);
    cluster.running.stop().await;
}

#[tokio::test]
async fn while_the_api_server_answers_nothing_discovery_and_the_ca_go_on() {
    let cluster = Cluster::start().await;
    assert!(cluster.certificate(&token("n1"), "client").await.is_ok());
    let roots = roots(&cluster.api);
    cluster.api.set(Mood::Frozen);
    cluster.api.cut();
    let served = async {
        let channel = channel(cluster.running.address, &roots).await;
        let mut node = NodeProxy::connect(channel.clone(), &token("n1"), types()).await;
        assert_eq!(node.initial().await[ADDRESS_TYPE_URL].names.len(), 2);
        let identity = Identity::new("cluster.local", "demo", "client");
        let csr = Csr::generate(&identity).unwrap().pem;
        certificate(channel, Some(&token("n1")), Some(&identity.to_string()), csr).await.unwrap();
    };
    tokio::time::timeout(Duration::from_secs(30), served).await.expect("served without the API server");
    cluster.running.stop().await;
}

#[tokio::test]
async fn replicas_that_start_together_share_one_ca() {
    let api = api_server().await;
    let (a, b) = tokio::join!(run(&api), run(&api));
    let roots = roots(&api);
    for running in [&a, &b] {
        channel(running.address, &roots).await;
    }
    let secret = api.get(SECRETS, "istio-system", "istio-ca-secret").unwrap();
    assert_eq!(secret["type"], "istio.io/ca-root");
    a.stop().await;
    b.stop().await;
}
