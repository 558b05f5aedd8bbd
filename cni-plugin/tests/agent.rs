//! Agent, plugin and a scripted ztunnel around real pods: what a node does when pods come, change and go.

use std::{
    collections::HashMap,
    fs,
    future::Future,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, SystemTime},
};

use cni_plugin::{
    agent::{Agent, Config},
    plugin::{self, Outcome},
    rules::{self, Options, model},
};
use mesh_net::{
    NetNs, SeqStream,
    isolate::test_main,
    link::Netlink,
    nft::{Batch, Nft},
};
use prost::Message;
use proto::istio::workload::zds::{self, workload_request::Payload};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::{JoinHandle, spawn_blocking},
    time::sleep,
};

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

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(test);
}

/// Waits for something that another task or process brings about; the harness's own deadline ends a hopeless wait.
async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    for _ in 0..1000 {
        if holds().await {
            return;
        }
        sleep(Duration::from_millis(10)).await;
    }
    panic!("never came true: {what}");
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

    fn start(&self) -> Agent {
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
        Agent::start(Config::from_env(&vars).expect("configuration")).expect("start")
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

    /// A namespace with an address, under a name as a runtime gives it.
    fn sandbox(&self, name: &str, ip: &str) -> NetNs {
        let ns = NetNs::create().expect("namespace");
        let mut netlink = Netlink::in_ns(&ns).expect("netlink");
        netlink.add_bridge("eth0").expect("interface");
        let index = netlink.index("eth0").expect("index");
        netlink.add_address(index, format!("{ip}/24").parse().expect("net")).expect("address");
        ns.bind_mount(netns_path(name)).expect("mount");
        ns
    }

    fn record(&self, name: &str, ip: &str) {
        let netns = netns_path(name);
        let record = serde_json::json!({ "uid": format!("uid-{name}"), "namespace": "demo", "name": name, "netns": netns, "ips": [ip] });
        fs::write(format!("/run/sandboxes/uid-{name}.json"), record.to_string()).expect("write");
    }
}

fn netns_path(name: &str) -> PathBuf {
    Path::new("/run/netns").join(name)
}

async fn cni(command: &'static str, name: &'static str) -> Outcome {
    let call = move || {
        let args = format!("K8S_POD_NAMESPACE=demo;K8S_POD_NAME={name};K8S_POD_UID=uid-{name}");
        let netns = netns_path(name);
        let vars = [
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", "c"),
            ("CNI_NETNS", netns.to_str().expect("path")),
            ("CNI_IFNAME", "eth0"),
            ("CNI_ARGS", &args),
        ];
        let vars: HashMap<String, String> = vars.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let conf = br#"{"cniVersion":"1.1.0","cni_agent_run_dir":"/run/cni","prevResult":{"cniVersion":"1.1.0","ips":[{"address":"10.0.0.7/24"}]}}"#;
        plugin::run(&vars, conf, SystemTime::now())
    };
    spawn_blocking(call).await.expect("plugin")
}

fn enrolment(name: &str) -> String {
    fs::read_to_string(format!("/run/manifests/enrolment/demo_{name}.yaml")).unwrap_or_default()
}

/// A ztunnel that acknowledges everything and remembers it.
struct Ztunnel {
    heard: tokio::sync::mpsc::UnboundedReceiver<String>,
    task: JoinHandle<()>,
}

impl Ztunnel {
    async fn connect() -> Self {
        let path = "/run/ztunnel/ztunnel.sock";
        eventually("the agent listens", async || fs::exists(path).expect("stat")).await;
        let stream = SeqStream::connect(path).expect("connect");
        let (tell, heard) = tokio::sync::mpsc::unbounded_channel();
        let task = tokio::spawn(async move {
            let hello = zds::ZdsHello { version: zds::Version::V1 as i32 };
            stream.send(&hello.encode_to_vec(), None).await.expect("hello");
            let mut buffer = [0; 1024];
            loop {
                let (length, fds) = stream.recv(&mut buffer).await.expect("receive");
                if length == 0 {
                    return;
                }
                let request = zds::WorkloadRequest::decode(&buffer[..length]).expect("request");
                let text = match request.payload.expect("content") {
                    Payload::Add(add) => {
                        let fd = fds.into_iter().next().expect("a namespace with every Add");
                        // What ztunnel would find at this moment.
                        let captured = rules::verify_installed(&NetNs::from_fd(fd).expect("namespace")).expect("rules");
                        let written = enrolment("app").contains("enabled");
                        format!("add {} rules={captured} enabled={written}", add.uid)
                    }
                    Payload::Keep(keep) => format!("keep {}", keep.uid),
                    Payload::Del(del) => format!("del {}", del.uid),
                    Payload::SnapshotSent(_) => "snapshot".to_owned(),
                };
                drop(tell.send(text));
                let ack = zds::Ack { error: String::new() };
                let response = zds::WorkloadResponse { payload: Some(zds::workload_response::Payload::Ack(ack)) };
                stream.send(&response.encode_to_vec(), None).await.expect("acknowledge");
            }
        });
        Self { heard, task }
    }

    async fn next(&mut self) -> String {
        self.heard.recv().await.expect("the session goes on")
    }
}

impl Drop for Ztunnel {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn get(agent: &Agent, path: &str) -> String {
    let mut stream = TcpStream::connect(agent.admin).await.expect("connect");
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("ask");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("answer");
    answer
}

async fn a_new_pod_is_captured_before_its_add_returns() {
    let node = Node::new();
    node.namespace("ambient");
    let agent = node.start();
    let mut ztunnel = Ztunnel::connect().await;
    assert_eq!(ztunnel.next().await, "snapshot");
    eventually("the agent is ready", async || get(&agent, "/readyz").await.contains("200 OK")).await;
    let ns = node.sandbox("app", "10.0.0.7");
    // The API shows the pod a moment after the runtime starts on it, and without an address.
    let (outcome, ()) = tokio::join!(cni("ADD", "app"), async { node.pod("app", "") });
    assert_eq!(outcome.stdout, r#"{"cniVersion":"1.1.0","ips":[{"address":"10.0.0.7/24"}]}"#);
    assert!(!outcome.failed);
    assert_eq!(ztunnel.next().await, "add uid-app rules=false enabled=false");
    assert!(enrolment("app").contains("redirection: enabled"), "{}", enrolment("app"));
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
    let agent = node.start();
    let _ns = node.sandbox("app", "10.0.0.7");
    let outcome = cni("ADD", "app").await;
    assert!(outcome.failed && outcome.stdout.contains("no ztunnel is connected"), "{}", outcome.stdout);
    eventually("pending is written down", async || enrolment("app").contains("pending")).await;
    let shown = get(&agent, "/debug/pods").await;
    assert!(shown.contains(r#""state": "uncaptured""#) && shown.contains("no ztunnel"), "{shown}");
    let mut ztunnel = Ztunnel::connect().await;
    assert!(ztunnel.next().await.starts_with("add uid-app"));
    eventually("enabled is written down", async || enrolment("app").contains("enabled")).await;
    agent.stop().await;
}

async fn pods_outside_the_mesh_pass() {
    let node = Node::new();
    node.namespace("none");
    node.pod("app", "");
    let ns = node.sandbox("app", "10.0.0.7");
    let agent = node.start();
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
    let ns = node.sandbox("app", "10.0.0.7");
    node.record("app", "10.0.0.7");
    let agent = node.start();
    let mut ztunnel = Ztunnel::connect().await;
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
    let ns = node.sandbox("app", "10.0.0.7");
    node.record("app", "10.0.0.7");
    let agent = node.start();
    let mut ztunnel = Ztunnel::connect().await;
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
    let agent = node.start();
    let mut ztunnel = Ztunnel::connect().await;
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
    let agent = node.start();
    let mut ztunnel = Ztunnel::connect().await;
    assert_eq!(ztunnel.next().await, "snapshot");
    let _ns = node.sandbox("app", "10.0.0.7");
    assert!(!cni("ADD", "app").await.failed);
    assert!(ztunnel.next().await.starts_with("add uid-app"));
    fs::remove_file("/run/manifests/app.yaml").expect("remove");
    assert_eq!(ztunnel.next().await, "del uid-app");
    eventually("nothing remains written down", async || enrolment("app").is_empty()).await;
    agent.stop().await;
}
