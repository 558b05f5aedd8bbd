//! The agent as Kubernetes sees it: a small API server around real pods.

use std::{collections::HashMap, fs, os::unix::fs::symlink, path::Path, process::ExitCode};

use cni_plugin::{
    agent::{Agent, Config},
    rules::{self, Options},
};
use mesh_net::{isolate::test_main, link::Netlink};
use serde_json::{Value, json};

#[path = "support/api.rs"]
mod api;
mod support;

use api::{Api, Mood};
use support::{Ztunnel, cni, eventually, get, netns_path, run, sandbox};

fn main() -> ExitCode {
    test_main(&[
        ("a_new_pod_is_captured_and_annotated", || run(a_new_pod_is_captured_and_annotated())),
        ("a_label_on_the_pod_alone_is_enough", || run(a_label_on_the_pod_alone_is_enough())),
        ("running_pods_are_found_by_their_processes", || run(running_pods_are_found_by_their_processes())),
        ("with_a_frozen_api_server_a_known_pod_starts_and_is_annotated_later", || {
            run(with_a_frozen_api_server_a_known_pod_starts_and_is_annotated_later());
        }),
        ("an_api_server_that_fails_un_enrols_nobody", || run(an_api_server_that_fails_un_enrols_nobody())),
        ("nothing_is_decided_before_both_lists_are_complete", || {
            run(nothing_is_decided_before_both_lists_are_complete());
        }),
    ])
}

/// A node whose API server is ours.
struct Node {
    api: Api,
}

impl Node {
    async fn new() -> Self {
        Netlink::open().expect("netlink").set_up(1).expect("lo");
        fs::create_dir_all("/run/netns").expect("mkdir");
        let api = Api::start().await;
        fs::write("/run/kubeconfig", api.kubeconfig()).expect("write");
        let node = Self { api };
        node.process(1, "0::/init.scope", Path::new("/proc/self/ns/net"));
        node
    }

    /// A process as the node's `/proc` shows it.
    fn process(&self, pid: u32, cgroup: &str, netns: &Path) {
        let folder = Path::new("/run/proc").join(pid.to_string());
        fs::create_dir_all(folder.join("ns")).expect("mkdir");
        fs::write(folder.join("cgroup"), cgroup).expect("write");
        let numbers = (1..=18).map(|n| n.to_string()).collect::<Vec<_>>().join(" ");
        fs::write(folder.join("stat"), format!("{pid} (pause) S {numbers} {pid} 0")).expect("write");
        symlink(netns, folder.join("ns/net")).expect("link");
    }

    async fn start(&self) -> Agent {
        let vars = [
            ("NODE_NAME", "n1"),
            ("ZTUNNEL_UDS_ADDRESS", "/run/ztunnel/ztunnel.sock"),
            ("CNI_AGENT_RUN_DIR", "/run/cni"),
            ("KUBECONFIG", "/run/kubeconfig"),
            ("FAIRWAY_HOST_ROOT", "/"),
            ("HOST_PROC", "/run/proc"),
            ("FAIRWAY_ADMIN_ADDR", "127.0.0.1:0"),
            ("FAIRWAY_HEALTH_ADDR", "127.0.0.1:0"),
            ("FAIRWAY_UNENROL_GRACE", "100ms"),
        ];
        let vars: HashMap<String, String> = vars.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Agent::start(Config::from_env(&vars).expect("configuration")).await.expect("start")
    }

    fn namespace(&self, mode: &str) {
        let labels = json!({"istio.io/dataplane-mode": mode});
        let metadata = json!({"name": "demo", "labels": labels});
        self.api.put("namespaces", json!({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}));
    }

    fn pod(&self, name: &str, uid: &str, ip: &str, labels: Value) {
        let ips = if ip.is_empty() { json!([]) } else { json!([{"ip": ip}]) };
        self.api.put(
            "pods",
            json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": name, "namespace": "demo", "uid": uid, "labels": labels},
                "spec": {"nodeName": "n1", "serviceAccountName": "sa", "containers": [{"name": "c", "image": "i"}]},
                "status": {"phase": "Running", "podIPs": ips},
            }),
        );
    }

    fn annotation(&self, name: &str) -> Option<String> {
        let pod = self.api.object("pods", &format!("demo/{name}"))?;
        Some(pod["metadata"]["annotations"]["ambient.istio.io/redirection"].as_str()?.to_owned())
    }

    async fn annotated(&self, name: &str, value: Option<&str>) {
        eventually("the annotation", async || self.annotation(name).as_deref() == value).await;
    }
}

/// What the annotation says is asked of the API server, not here.
fn nowhere() -> bool {
    false
}

async fn ready(agent: &Agent) {
    eventually("the agent is ready", async || get(agent, "/readyz").await.contains("200 OK")).await;
}

async fn a_new_pod_is_captured_and_annotated() {
    let node = Node::new().await;
    node.namespace("ambient");
    let agent = node.start().await;
    let mut ztunnel = Ztunnel::connect(nowhere).await;
    assert_eq!(ztunnel.next().await, "snapshot");
    let ns = sandbox("app", "10.0.0.7");
    let (outcome, ()) = tokio::join!(cni("ADD", "app"), async { node.pod("app", "uid-app", "", json!({})) });
    assert!(!outcome.failed, "{}", outcome.stdout);
    assert!(ztunnel.next().await.starts_with("add uid-app"));
    rules::verify(&ns, &Options::default()).expect("captured");
    node.annotated("app", Some("enabled")).await;
    // The namespace leaves the mesh, and with it the pod.
    node.namespace("none");
    assert_eq!(ztunnel.next().await, "del uid-app");
    node.annotated("app", None).await;
    assert!(!rules::verify_installed(&ns).expect("readable"));
    agent.stop().await;
}

async fn a_label_on_the_pod_alone_is_enough() {
    let node = Node::new().await;
    node.namespace("none");
    let agent = node.start().await;
    let mut ztunnel = Ztunnel::connect(nowhere).await;
    assert_eq!(ztunnel.next().await, "snapshot");
    let ns = sandbox("app", "10.0.0.7");
    node.pod("app", "uid-app", "", json!({"istio.io/dataplane-mode": "ambient"}));
    assert!(!cni("ADD", "app").await.failed);
    rules::verify(&ns, &Options::default()).expect("captured");
    node.annotated("app", Some("enabled")).await;
    agent.stop().await;
}

async fn running_pods_are_found_by_their_processes() {
    let node = Node::new().await;
    node.namespace("ambient");
    let uid = |n: u32| format!("2a4f6c8e-0b1d-4f3a-9c5e-7d9b1f3a5c{n:02x}");
    let pods = ["a", "b"].map(|name| sandbox(name, "10.0.0.7"));
    let nested = sandbox("nested", "172.17.0.2");
    for (n, name) in ["a", "b"].into_iter().enumerate() {
        let n = u32::try_from(n).expect("small");
        node.pod(name, &uid(n), "10.0.0.7", json!({}));
        let slice = format!("kubepods-besteffort-pod{}.slice", uid(n).replace('-', "_"));
        let cgroup = format!("0::/kubepods.slice/kubepods-besteffort.slice/{slice}/cri-containerd-c.scope");
        node.process(100 + n, &cgroup, &netns_path(name));
        // A container in the pod has a network of its own; it was there first, by its number.
        node.process(50 + n, &cgroup, &netns_path("nested"));
    }
    let agent = node.start().await;
    ready(&agent).await;
    for ns in &pods {
        eventually("captured, ztunnel or not", async || rules::verify(ns, &Options::default()).is_ok()).await;
    }
    assert!(!rules::verify_installed(&nested).expect("readable"));
    let mut ztunnel = Ztunnel::connect(nowhere).await;
    for n in 0..2 {
        assert_eq!(ztunnel.next().await, format!("add {} rules=true enabled=false", uid(n)));
    }
    assert_eq!(ztunnel.next().await, "snapshot");
    for name in ["a", "b"] {
        node.annotated(name, Some("enabled")).await;
    }
    agent.stop().await;
    assert_eq!(node.annotation("a").as_deref(), Some("enabled"), "an agent that stops leaves all as it is");
}

async fn with_a_frozen_api_server_a_known_pod_starts_and_is_annotated_later() {
    let node = Node::new().await;
    node.namespace("ambient");
    node.pod("app", "uid-app", "", json!({}));
    let agent = node.start().await;
    let mut ztunnel = Ztunnel::connect(nowhere).await;
    assert_eq!(ztunnel.next().await, "snapshot");
    node.api.set(Mood::Frozen);
    let ns = sandbox("app", "10.0.0.7");
    let outcome = cni("ADD", "app").await;
    assert!(!outcome.failed, "{}", outcome.stdout);
    rules::verify(&ns, &Options::default()).expect("captured");
    assert_eq!(node.annotation("app"), None, "owed");
    eventually("the debt is shown", async || get(&agent, "/debug/pods").await.contains("cannot annotate the pod"))
        .await;
    let shown = get(&agent, "/debug/pods").await;
    assert!(shown.contains(r#""state": "enrolled""#), "{shown}");
    node.api.set(Mood::Working);
    node.annotated("app", Some("enabled")).await;
    agent.stop().await;
}

async fn an_api_server_that_fails_un_enrols_nobody() {
    let node = Node::new().await;
    node.namespace("ambient");
    node.pod("app", "uid-app", "", json!({}));
    let agent = node.start().await;
    let mut ztunnel = Ztunnel::connect(nowhere).await;
    assert_eq!(ztunnel.next().await, "snapshot");
    let ns = sandbox("app", "10.0.0.7");
    assert!(!cni("ADD", "app").await.failed);
    assert!(ztunnel.next().await.starts_with("add uid-app"));
    node.annotated("app", Some("enabled")).await;
    node.api.set(Mood::Refusing(500));
    eventually("failures are counted", async || {
        get(&agent, "/metrics").await.contains("fairway_node_watch_failures_total{watched=\"pods\"}")
    })
    .await;
    rules::verify(&ns, &Options::default()).expect("still captured");
    // What happened meanwhile is caught up with.
    node.api.delete("pods", "demo/app");
    node.api.set(Mood::Working);
    assert_eq!(ztunnel.next().await, "del uid-app");
    let patched_after = node.api.asked().iter().filter(|asked| asked.contains("null")).count();
    assert_eq!(patched_after, 0, "an annotation goes with its pod");
    agent.stop().await;
}

async fn nothing_is_decided_before_both_lists_are_complete() {
    let node = Node::new().await;
    node.namespace("ambient");
    node.api.set(Mood::Refusing(403));
    let agent = node.start().await;
    eventually("the failure is counted", async || {
        get(&agent, "/metrics").await.contains("fairway_node_watch_failures_total{watched=\"namespaces\"}")
    })
    .await;
    assert!(get(&agent, "/readyz").await.contains("first pass"));
    assert!(!fs::exists("/run/cni/decisions.json").expect("stat"), "the plugin is told nothing either");
    node.api.set(Mood::Working);
    ready(&agent).await;
    agent.stop().await;
}
