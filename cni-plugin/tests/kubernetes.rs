//! The agent as Kubernetes sees it: a small API server around real pods.

use std::{
    collections::HashMap,
    fs,
    os::unix::fs::symlink,
    path::Path,
    process::{Command, ExitCode},
};

use cni_plugin::{
    agent::{Agent, Config},
    rules::{self, Options, host},
};
use mesh_net::{
    NetNs,
    isolate::test_main,
    link::Netlink,
    nft::{Batch, Chain, Family, Nft},
};
use serde_json::{Value, json};
use test_support::{ApiServer, apiserver::Mood};
use tokio::task::spawn_blocking;

mod support;

use support::{Ztunnel, cni, eventually, get, netns_path, run, sandbox};

fn main() -> ExitCode {
    test_main(&[
        ("a_new_pod_is_captured_and_annotated", || run(a_new_pod_is_captured_and_annotated())),
        ("a_label_on_the_pod_alone_is_enough", || run(a_label_on_the_pod_alone_is_enough())),
        ("running_pods_are_found_by_their_processes", || run(running_pods_are_found_by_their_processes())),
        ("a_pod_that_bears_anothers_name_in_cgroups_hides_nobody", || {
            run(a_pod_that_bears_anothers_name_in_cgroups_hides_nobody());
        }),
        ("with_a_frozen_api_server_a_known_pod_starts_and_is_annotated_later", || {
            run(with_a_frozen_api_server_a_known_pod_starts_and_is_annotated_later());
        }),
        ("an_api_server_that_fails_un_enrols_nobody", || run(an_api_server_that_fails_un_enrols_nobody())),
        ("nothing_is_decided_before_both_lists_are_complete", || {
            run(nothing_is_decided_before_both_lists_are_complete());
        }),
        ("the_plugin_is_installed_and_kept_and_readiness_waits_for_it", || {
            run(the_plugin_is_installed_and_kept_and_readiness_waits_for_it());
        }),
        ("stopping_is_an_upgrade_while_the_daemon_set_stands", || {
            run(stopping_is_an_upgrade_while_the_daemon_set_stands());
        }),
        ("the_end_of_the_daemon_set_leaves_nothing_behind", || {
            run(the_end_of_the_daemon_set_leaves_nothing_behind());
        }),
        ("an_agent_of_istios_that_came_meanwhile_keeps_sockets_and_routing", || {
            run(an_agent_of_istios_that_came_meanwhile_keeps_sockets_and_routing());
        }),
        ("a_pod_that_stays_uncaptured_gets_an_event_and_one_without_sandbox_does_not", || {
            run(a_pod_that_stays_uncaptured_gets_an_event_and_one_without_sandbox_does_not());
        }),
        ("the_taint_goes_when_the_agent_is_ready_and_not_before", || {
            run(the_taint_goes_when_the_agent_is_ready_and_not_before());
        }),
        ("a_node_that_lacks_something_is_refused_with_all_reasons", || {
            run(a_node_that_lacks_something_is_refused_with_all_reasons());
        }),
        ("a_node_without_an_agent_is_cleaned_by_hand", || run(a_node_without_an_agent_is_cleaned_by_hand())),
        ("an_account_that_is_gone_is_the_end_too", || run(an_account_that_is_gone_is_the_end_too())),
        ("without_an_answer_only_the_chain_is_freed", || run(without_an_answer_only_the_chain_is_freed())),
    ])
}

const PODS: &str = "api/v1/pods";
const NODES: &str = "api/v1/nodes";

/// A node whose API server is ours.
struct Node {
    api: ApiServer,
}

impl Node {
    async fn new() -> Self {
        Netlink::open().expect("netlink").set_up(1).expect("lo");
        fs::create_dir_all("/run/netns").expect("mkdir");
        let api = ApiServer::start().await;
        // The agent's role has pods/status only.
        api.refuse(|asked| {
            let is_pod = asked.path.contains("/pods/") && !asked.path.ends_with("/status");
            (asked.method == "PATCH" && is_pod).then_some(403)
        });
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
        self.start_with(&[("FAIRWAY_INSTALL", "false")]).await
    }

    /// With a container runtime whose chain is there to be joined.
    async fn start_installing(&self) -> Agent {
        for folder in ["image", "bin", "net.d"] {
            fs::create_dir_all(Path::new("/run").join(folder)).expect("mkdir");
        }
        fs::write("/run/image/fairway-cni", "program").expect("write");
        self.start_with(&INSTALL).await
    }

    async fn start_with(&self, more: &[(&str, &str)]) -> Agent {
        self.try_start(more).await.expect("start")
    }

    fn vars(&self, more: &[(&str, &str)]) -> HashMap<String, String> {
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
            ("FAIRWAY_UNCAPTURED_AFTER", "300ms"),
            ("FAIRWAY_TAINT", "cni.istio.io/not-ready"),
        ];
        vars.iter().chain(more).map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    async fn try_start(&self, more: &[(&str, &str)]) -> anyhow::Result<Agent> {
        Agent::start(Config::from_env(&self.vars(more)).expect("configuration")).await
    }

    /// `fairway-node cleanup` as somebody runs it; what it printed.
    async fn cleanup(&self) -> String {
        let vars = self.vars(&INSTALL);
        let run = || Command::new(env!("CARGO_BIN_EXE_fairway-node")).arg("cleanup").env_clear().envs(vars).output();
        let output = spawn_blocking(run).await.expect("ran").expect("started");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    }

    fn namespace(&self, mode: &str) {
        let labels = json!({"istio.io/dataplane-mode": mode});
        let metadata = json!({"name": "demo", "labels": labels});
        self.api.put("api/v1/namespaces", json!({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}));
    }

    fn pod(&self, name: &str, uid: &str, ip: &str, labels: Value) {
        let ips = if ip.is_empty() { json!([]) } else { json!([{"ip": ip}]) };
        self.api.put(
            PODS,
            json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": name, "namespace": "demo", "uid": uid, "labels": labels},
                "spec": {"nodeName": "n1", "serviceAccountName": "sa", "containers": [{"name": "c", "image": "i"}]},
                "status": {"phase": "Running", "podIPs": ips},
            }),
        );
    }

    fn annotate(&self, resource: &str, namespace: &str, name: &str, annotations: Value) {
        let mut object = self.api.get(resource, namespace, name).expect("there");
        object["metadata"]["annotations"] = annotations;
        self.api.put(resource, object);
    }

    fn daemon_set(&self) {
        let spec = json!({
            "selector": {"matchLabels": {"k8s-app": "fairway-node"}},
            "template": {"metadata": {}, "spec": {"containers": []}},
        });
        let metadata = json!({"name": "fairway-node", "namespace": "istio-system"});
        self.api.put(
            "apis/apps/v1/daemonsets",
            json!({"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": metadata, "spec": spec}),
        );
    }

    fn annotation(&self, name: &str) -> Option<String> {
        let pod = self.api.get(PODS, "demo", name)?;
        Some(pod["metadata"]["annotations"]["ambient.istio.io/redirection"].as_str()?.to_owned())
    }

    async fn annotated(&self, name: &str, value: Option<&str>) {
        eventually("the annotation", async || self.annotation(name).as_deref() == value).await;
    }
}

const INSTALL: [(&str, &str); 3] = [
    ("FAIRWAY_CNI_BINARY", "/run/image/fairway-cni"),
    ("MOUNTED_CNI_BIN_DIR", "/run/bin"),
    ("MOUNTED_CNI_NET_DIR", "/run/net.d"),
];

/// What the annotation says is asked of the API server, not here.
fn nowhere() -> bool {
    false
}

/// The pods that the node's probes are marked for.
fn probed() -> Vec<String> {
    let node = NetNs::current().expect("namespace");
    host::members(&node, &Options::default()).expect("readable").iter().map(ToString::to_string).collect()
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
    assert_eq!(probed(), ["10.0.0.7"], "before the kubelet has anything to probe");
    node.annotated("app", Some("enabled")).await;
    // The namespace leaves the mesh, and with it the pod.
    node.namespace("none");
    assert_eq!(ztunnel.next().await, "del uid-app");
    node.annotated("app", None).await;
    assert!(!rules::verify_installed(&ns).expect("readable"));
    eventually("its probes are as any other's", async || probed().is_empty()).await;
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

async fn a_pod_that_bears_anothers_name_in_cgroups_hides_nobody() {
    let node = Node::new().await;
    node.namespace("ambient");
    let uid = |n: u32| format!("2a4f6c8e-0b1d-4f3a-9c5e-7d9b1f3a5c{n:02x}");
    let pods = [(1, "a", "10.0.0.7"), (2, "b", "10.0.0.8"), (3, "c", "10.0.0.9")];
    let namespaces = pods.map(|(n, name, ip)| {
        node.pod(name, &uid(n), ip, json!({}));
        // Between two who say that they are it, whoever is looked for first.
        if name != "b" {
            node.annotate(PODS, "demo", name, json!({"kubernetes.io/config.hash": uid(2)}));
        }
        let ns = sandbox(name, ip);
        node.process(100 + n, &format!("0::/kubepods/besteffort/pod{}/c", uid(n)), &netns_path(name));
        ns
    });
    let agent = node.start().await;
    ready(&agent).await;
    for ns in &namespaces {
        eventually("captured", async || rules::verify(ns, &Options::default()).is_ok()).await;
    }
    agent.stop().await;
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
    node.api.delete(PODS, "demo", "app");
    node.api.set(Mood::Working);
    assert_eq!(ztunnel.next().await, "del uid-app");
    let patched_after = node.api.asked().iter().filter(|asked| asked.body.contains("null")).count();
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

const PRIMARY: &str = r#"{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"bridge"}]}"#;

fn chain() -> String {
    fs::read_to_string("/run/net.d/10-net.conflist").unwrap_or_default()
}

async fn the_plugin_is_installed_and_kept_and_readiness_waits_for_it() {
    let node = Node::new().await;
    node.daemon_set();
    let agent = node.start_installing().await;
    eventually("the binary is there", async || fs::exists("/run/bin/fairway-cni").expect("stat")).await;
    eventually("only the chain is missing", async || {
        let answer = get(&agent, "/readyz").await;
        answer.contains("installation of the CNI plugin") && !answer.contains("first pass")
    })
    .await;
    fs::write("/run/net.d/10-net.conflist", PRIMARY).expect("write");
    ready(&agent).await;
    assert!(chain().contains("fairway-cni"));
    fs::write("/run/net.d/10-net.conflist", PRIMARY).expect("overwritten by its owner");
    eventually("healed", async || chain().contains("fairway-cni")).await;
    let metrics = get(&agent, "/metrics").await;
    assert!(metrics.contains("istio_cni_installs_total{result=\"SUCCESS\"}"), "{metrics}");
    agent.stop().await;
    assert!(chain().contains("fairway-cni"));
}

/// An agent with one captured pod.
async fn with_a_captured_pod(node: &Node) -> (Agent, NetNs, Ztunnel) {
    node.namespace("ambient");
    node.pod("app", "uid-app", "", json!({}));
    let agent = node.start_installing().await;
    fs::write("/run/net.d/10-net.conflist", PRIMARY).expect("write");
    ready(&agent).await;
    let mut ztunnel = Ztunnel::connect(nowhere).await;
    assert_eq!(ztunnel.next().await, "snapshot");
    let ns = sandbox("app", "10.0.0.7");
    assert!(!cni("ADD", "app").await.failed);
    assert!(ztunnel.next().await.starts_with("add uid-app"));
    node.annotated("app", Some("enabled")).await;
    node.process(100, "0::/", &netns_path("app"));
    (agent, ns, ztunnel)
}

async fn stopping_is_an_upgrade_while_the_daemon_set_stands() {
    let node = Node::new().await;
    node.daemon_set();
    let (agent, ns, _ztunnel) = with_a_captured_pod(&node).await;
    agent.leave().await;
    assert!(chain().contains("fairway-cni") && fs::exists("/run/bin/fairway-cni").expect("stat"));
    rules::verify(&ns, &Options::default()).expect("still captured");
    assert_eq!(node.annotation("app").as_deref(), Some("enabled"));
}

async fn the_end_of_the_daemon_set_leaves_nothing_behind() {
    let node = Node::new().await;
    let (agent, ns, mut ztunnel) = with_a_captured_pod(&node).await;
    for kept in ["state", "keys"] {
        let folder = Path::new("/run/ztunnel").join(kept);
        fs::create_dir(&folder).and_then(|()| fs::write(folder.join("of-ztunnel"), "")).expect("write");
    }
    agent.leave().await;
    assert!(!chain().contains("fairway-cni") && chain().contains("bridge"), "{}", chain());
    assert!(!rules::verify_installed(&ns).expect("readable"));
    assert_eq!(node.annotation("app"), None);
    assert_eq!(ztunnel.next().await, "del uid-app");
    let left =
        |folder: &str| fs::read_dir(folder).expect("list").map(|e| e.expect("entry").file_name()).collect::<Vec<_>>();
    assert!(!host::remove(&NetNs::current().expect("namespace")).expect("readable"), "the node's table is gone");
    for folder in ["/run/bin", "/run/cni", "/run/ztunnel"] {
        assert!(left(folder).is_empty(), "{folder}: {:?}", left(folder));
    }
}

async fn an_agent_of_istios_that_came_meanwhile_keeps_sockets_and_routing() {
    let node = Node::new().await;
    let (agent, ns, _ztunnel) = with_a_captured_pod(&node).await;
    let sockets = ["/run/cni/pluginevent.sock", "/run/ztunnel/ztunnel.sock"];
    let successors = sockets.map(|path| {
        fs::remove_file(path).expect("our socket");
        std::os::unix::net::UnixListener::bind(path).expect("bind")
    });
    let mut batch = Batch::new(Family::Ip);
    batch.add_table("mangle");
    batch.add_chain("mangle", &Chain::regular("ISTIO_PRERT"));
    Nft::in_ns(&ns).expect("netlink").apply(batch).expect("apply");
    agent.leave().await;
    assert!(sockets.iter().all(|path| fs::exists(path).expect("stat")));
    assert!(!rules::verify_installed(&ns).expect("readable"), "our rules are gone");
    let routes = Netlink::in_ns(&ns).expect("netlink").routes(rules::model::ROUTE_TABLE).expect("routes");
    assert!(!routes.is_empty(), "both agents use the same routing");
    drop(successors);
}

async fn a_node_without_an_agent_is_cleaned_by_hand() {
    let node = Node::new().await;
    let (agent, ns, _ztunnel) = with_a_captured_pod(&node).await;
    agent.stop().await;
    rules::verify(&ns, &Options::default()).expect("captured");
    let printed = node.cleanup().await;
    for wanted in
        ["our entry in /run/net.d/10-net.conflist", "rules in /var/run/netns/app", "annotations", "fairway-host"]
    {
        assert!(printed.contains(wanted), "{wanted} is missing in {printed}");
    }
    assert!(!chain().contains("fairway-cni") && !rules::verify_installed(&ns).expect("readable"));
    assert_eq!(node.annotation("app"), None);
    assert_eq!(node.cleanup().await, "0 removed, 0 failed\n", "and again");
}

async fn an_account_that_is_gone_is_the_end_too() {
    let node = Node::new().await;
    node.daemon_set();
    let (agent, ns, _ztunnel) = with_a_captured_pod(&node).await;
    node.api.set(Mood::Refusing(401));
    agent.leave().await;
    assert!(!chain().contains("fairway-cni") && !fs::exists("/run/bin/fairway-cni").expect("stat"));
    assert!(!rules::verify_installed(&ns).expect("readable"), "whoever may not annotate may still clean up");
}

async fn without_an_answer_only_the_chain_is_freed() {
    let node = Node::new().await;
    let (agent, ns, _ztunnel) = with_a_captured_pod(&node).await;
    node.api.set(Mood::Refusing(500));
    agent.leave().await;
    assert!(!chain().contains("fairway-cni"), "a plugin without an agent would let no pod start");
    rules::verify(&ns, &Options::default()).expect("still captured");
}

async fn a_pod_that_stays_uncaptured_gets_an_event_and_one_without_sandbox_does_not() {
    let node = Node::new().await;
    node.namespace("ambient");
    node.pod("lost", "uid-lost", "10.0.0.8", json!({}));
    node.pod("pulling", "uid-pulling", "", json!({}));
    let agent = node.start().await;
    let events = || {
        let asked = node.api.asked().into_iter().filter(|asked| asked.path.contains("/events"));
        asked.map(|asked| asked.to_string()).collect::<Vec<_>>()
    };
    eventually("an event", async || !events().is_empty()).await;
    let shown = get(&agent, "/debug/pods").await;
    assert!(shown.contains(r#""state": "uncaptured""#) && shown.contains(r#""state": "awaited""#), "{shown}");
    agent.stop().await;
    let events = events();
    assert_eq!(events.len(), 1, "{events:?}");
    for wanted in ["POST", "FairwayNotCaptured", "uid-lost", "no process of the pod"] {
        assert!(events[0].contains(wanted), "{wanted} is missing in {events:?}");
    }
}

async fn the_taint_goes_when_the_agent_is_ready_and_not_before() {
    let node = Node::new().await;
    let taints =
        json!([{"key": "a", "effect": "NoSchedule"}, {"key": "cni.istio.io/not-ready", "effect": "NoSchedule"}]);
    let metadata = json!({"name": "n1"});
    node.api.put(NODES, json!({"apiVersion": "v1", "kind": "Node", "metadata": metadata, "spec": {"taints": taints}}));
    let agent = node.start_installing().await;
    eventually("only the chain is missing", async || {
        let answer = get(&agent, "/readyz").await;
        answer.contains("installation of the CNI plugin") && !answer.contains("first pass")
    })
    .await;
    let keys = || {
        let found = node.api.get(NODES, "", "n1").expect("node")["spec"]["taints"].clone();
        found.as_array().expect("a list").iter().map(|t| t["key"].as_str().expect("key").to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(keys(), ["a", "cni.istio.io/not-ready"]);
    fs::write("/run/net.d/10-net.conflist", PRIMARY).expect("write");
    eventually("the taint is gone", async || keys() == ["a"]).await;
    ready(&agent).await;
    agent.stop().await;
}

async fn a_node_that_lacks_something_is_refused_with_all_reasons() {
    let node = Node::new().await;
    fs::remove_file("/run/proc/1/ns/net").expect("remove");
    let error = node.try_start(&INSTALL).await.err().expect("refused");
    let text = format!("{error:#}");
    for wanted in ["HOST_PROC", "MOUNTED_CNI_BIN_DIR", "MOUNTED_CNI_NET_DIR", "FAIRWAY_CNI_BINARY"] {
        assert!(text.contains(wanted), "{wanted} is missing in {text}");
    }
}
