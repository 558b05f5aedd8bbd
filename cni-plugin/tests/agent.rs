//! Agent, plugin and a scripted ztunnel around real pods: what a node does when pods come, change and go.

use std::{collections::HashMap, fs, path::Path, process::ExitCode};

use cni_plugin::{
    agent::{Agent, Config},
    rules::{self, Options, model},
};
use mesh_net::{
    isolate::test_main,
    link::Netlink,
    nft::{Batch, Nft},
};

mod support;
use support::{Ztunnel, cni, eventually, get, netns_path, run, sandbox};

fn main() -> ExitCode {
    test_main(&[
        ("a_new_pod_is_captured_before_its_add_returns", || run(a_new_pod_is_captured_before_its_add_returns())),
        ("without_a_ztunnel_the_add_fails_and_the_pod_is_pending", || {
            run(without_a_ztunnel_the_add_fails_and_the_pod_is_pending());
        }),
        ("pods_outside_the_mesh_pass", || run(pods_outside_the_mesh_pass())),
        ("a_running_pod_is_enrolled_and_released_by_its_label", || {
            run(a_running_pod_is_enrolled_and_released_by_its_label());
        }),
        ("a_restarted_agent_heals_and_announces_again", || run(a_restarted_agent_heals_and_announces_again())),
        ("a_deleted_pod_is_withdrawn", || run(a_deleted_pod_is_withdrawn())),
    ])
}

/// Folders of a node, on the private /run of the test.
struct Node;

impl Node {
    fn new() -> Self {
        for folder in ["manifests", "sandboxes", "netns"] {
            fs::create_dir_all(Path::new("/run").join(folder)).expect("mkdir");
        }
        Self
    }

    async fn start(&self) -> Agent {
        let vars = [
            ("NODE_NAME", "n1"),
            ("ZTUNNEL_UDS_ADDRESS", "/run/ztunnel/ztunnel.sock"),
            ("CNI_AGENT_RUN_DIR", "/run/cni"),
            ("FAIRWAY_MANIFESTS", "/run/manifests"),
            ("FAIRWAY_SANDBOXES", "/run/sandboxes"),
            ("FAIRWAY_ADMIN_ADDR", "127.0.0.1:0"),
            ("FAIRWAY_UNENROL_GRACE", "100ms"),
        ];
        let vars: HashMap<String, String> = vars.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Netlink::open().expect("netlink").set_up(1).expect("lo");
        Agent::start(Config::from_env(&vars).expect("configuration")).await.expect("start")
    }

    fn write(&self, file: &str, text: &str) {
        let fresh = Path::new("/run/manifests").join(format!(".{file}.tmp"));
        fs::write(&fresh, text).expect("write");
        fs::rename(fresh, Path::new("/run/manifests").join(file)).expect("rename");
    }

    fn namespace(&self, mode: &str) {
        let labels = format!("{{istio.io/dataplane-mode: {mode}}}");
        self.write("ns.yaml", &format!("kind: Namespace\nmetadata: {{name: demo, labels: {labels}}}\n"));
    }

    /// A pod as the API server shows it; without address while its sandbox is being made.
    fn pod(&self, name: &str, ip: &str) {
        let ips = if ip.is_empty() { String::new() } else { format!("podIPs: [{{ip: {ip}}}]") };
        let meta = format!("{{name: {name}, namespace: demo, uid: uid-{name}}}");
        let text = format!("kind: Pod\nmetadata: {meta}\nspec: {{nodeName: n1}}\nstatus: {{{ips}}}\n");
        self.write(&format!("{name}.yaml"), &text);
    }

    fn record(&self, name: &str, ip: &str) {
        let netns = netns_path(name);
        let record = serde_json::json!({ "uid": format!("uid-{name}"), "namespace": "demo", "name": name, "netns": netns, "ips": [ip] });
        fs::write(format!("/run/sandboxes/uid-{name}.json"), record.to_string()).expect("write");
    }
}

fn enrolment(name: &str) -> String {
    fs::read_to_string(format!("/run/manifests/enrolment/demo_{name}.yaml")).unwrap_or_default()
}

fn enrolled() -> bool {
    enrolment("app").contains("enabled")
}

async fn a_new_pod_is_captured_before_its_add_returns() {
    let node = Node::new();
    node.namespace("ambient");
    let agent = node.start().await;
    let mut ztunnel = Ztunnel::connect(enrolled).await;
    assert_eq!(ztunnel.next().await, "snapshot");
    eventually("the agent is ready", async || get(&agent, "/readyz").await.contains("200 OK")).await;
    let ns = sandbox("app", "10.0.0.7");
    // The API shows the pod a moment after the runtime starts on it, and without an address.
    let (outcome, ()) = tokio::join!(cni("ADD", "app"), async { node.pod("app", "") });
    assert_eq!(outcome.stdout, r#"{"cniVersion":"1.1.0","ips":[{"address":"10.0.0.7/24"}]}"#);
    assert!(!outcome.failed);
    assert_eq!(ztunnel.next().await, "add uid-app rules=false enabled=false");
    eventually("enabled is written down", async || enrolment("app").contains("redirection: enabled")).await;
    rules::verify(&ns, &Options::default()).expect("captured");
    assert!(!cni("CHECK", "app").await.failed);
    let shown = get(&agent, "/debug/pods").await;
    assert!(shown.contains(r#""state": "enrolled""#), "{shown}");
    let metrics = get(&agent, "/metrics").await;
    for wanted in [
        "ztunnel_connected 1",
        "fairway_node_enrolled_pods 1",
        "istio_cni_plugin_requests_total{response_code=\"200\"} 1",
    ] {
        assert!(metrics.contains(wanted), "{wanted} is missing in {metrics}");
    }
    // The runtime repeats a call whose answer it lost.
    assert!(!cni("ADD", "app").await.failed);
    agent.stop().await;
    rules::verify(&ns, &Options::default()).expect("still captured without an agent");
}

async fn without_a_ztunnel_the_add_fails_and_the_pod_is_pending() {
    let node = Node::new();
    node.namespace("ambient");
    node.pod("app", "");
    let agent = node.start().await;
    let _ns = sandbox("app", "10.0.0.7");
    let outcome = cni("ADD", "app").await;
    assert!(outcome.failed && outcome.stdout.contains("no ztunnel is connected"), "{}", outcome.stdout);
    eventually("pending is written down", async || enrolment("app").contains("pending")).await;
    let shown = get(&agent, "/debug/pods").await;
    assert!(shown.contains(r#""state": "uncaptured""#) && shown.contains("no ztunnel"), "{shown}");
    let mut ztunnel = Ztunnel::connect(enrolled).await;
    assert!(ztunnel.next().await.starts_with("add uid-app"));
    eventually("enabled is written down", async || enrolment("app").contains("enabled")).await;
    agent.stop().await;
}

async fn pods_outside_the_mesh_pass() {
    let node = Node::new();
    node.namespace("none");
    node.pod("app", "");
    let ns = sandbox("app", "10.0.0.7");
    let agent = node.start().await;
    eventually("the agent is ready", async || get(&agent, "/readyz").await.contains("200 OK")).await;
    assert!(!cni("ADD", "app").await.failed);
    assert!(!rules::verify_installed(&ns).expect("readable"));
    agent.stop().await;
    assert!(!cni("ADD", "app").await.failed, "the decision file is enough");
    let unheard = cni("ADD", "other").await;
    assert!(unheard.failed && unheard.stdout.contains(r#""code":11"#), "{}", unheard.stdout);
}

async fn a_running_pod_is_enrolled_and_released_by_its_label() {
    let node = Node::new();
    node.namespace("none");
    node.pod("app", "10.0.0.7");
    let ns = sandbox("app", "10.0.0.7");
    node.record("app", "10.0.0.7");
    let agent = node.start().await;
    let mut ztunnel = Ztunnel::connect(enrolled).await;
    assert_eq!(ztunnel.next().await, "snapshot");
    node.namespace("ambient");
    assert_eq!(ztunnel.next().await, "add uid-app rules=false enabled=false");
    eventually("enabled is written down", async || enrolment("app").contains("enabled")).await;
    node.namespace("none");
    assert_eq!(ztunnel.next().await, "del uid-app");
    assert_eq!(enrolment("app"), "");
    assert_eq!(Nft::in_ns(&ns).expect("netlink").tables(model::FAMILY).expect("tables"), Vec::<String>::new());
    assert_eq!(Netlink::in_ns(&ns).expect("netlink").rules().expect("rules"), []);
    node.namespace("ambient");
    assert_eq!(ztunnel.next().await, "add uid-app rules=false enabled=false", "and again");
    agent.stop().await;
}

async fn a_restarted_agent_heals_and_announces_again() {
    let node = Node::new();
    node.namespace("ambient");
    for name in ["app", "lost"] {
        node.pod(name, "10.0.0.7");
    }
    let ns = sandbox("app", "10.0.0.7");
    node.record("app", "10.0.0.7");
    let agent = node.start().await;
    let mut ztunnel = Ztunnel::connect(enrolled).await;
    while !ztunnel.next().await.starts_with("add uid-app") {}
    eventually("enabled is written down", async || enrolment("app").contains("enabled")).await;
    agent.stop().await;
    drop(ztunnel);

    let mut nft = Nft::in_ns(&ns).expect("netlink");
    let mut by_hand = Batch::new(model::FAMILY);
    by_hand.flush_chain(model::NAT, model::OUTPUT);
    nft.apply(by_hand).expect("flush");
    // A pod that was enrolled, and whose sandbox record is not back yet.
    let lost = enrolment("app").replace("uid-app", "uid-lost").replace("\"app\"", "\"lost\"");
    fs::write("/run/manifests/enrolment/demo_lost.yaml", lost).expect("write");
    let agent = node.start().await;
    let mut ztunnel = Ztunnel::connect(enrolled).await;
    assert_eq!(ztunnel.next().await, "add uid-app rules=true enabled=true");
    assert_eq!(ztunnel.next().await, "keep uid-lost");
    assert_eq!(ztunnel.next().await, "snapshot");
    rules::verify(&ns, &Options::default()).expect("repaired");
    agent.stop().await;
}

async fn a_deleted_pod_is_withdrawn() {
    let node = Node::new();
    node.namespace("ambient");
    node.pod("app", "");
    let agent = node.start().await;
    let mut ztunnel = Ztunnel::connect(enrolled).await;
    assert_eq!(ztunnel.next().await, "snapshot");
    let _ns = sandbox("app", "10.0.0.7");
    assert!(!cni("ADD", "app").await.failed);
    assert!(ztunnel.next().await.starts_with("add uid-app"));
    fs::remove_file("/run/manifests/app.yaml").expect("remove");
    assert_eq!(ztunnel.next().await, "del uid-app");
    eventually("nothing remains written down", async || enrolment("app").is_empty()).await;
    agent.stop().await;
}
