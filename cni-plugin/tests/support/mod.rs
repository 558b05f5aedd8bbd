//! What tests of the agent share: pods made of namespaces, a scripted ztunnel, calls of the plugin.

use std::{
    collections::HashMap,
    fs,
    future::Future,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use cni_plugin::{
    agent::Agent,
    plugin::{self, Outcome},
    rules,
};
use mesh_net::{NetNs, SeqStream, link::Netlink};
use prost::Message;
use proto::istio::workload::zds::{self, workload_request::Payload};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::{JoinHandle, spawn_blocking},
    time::sleep,
};

/// Runs a test on a runtime of its own.
pub(crate) fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(test);
}

/// Waits for something that another task or process brings about; the harness's own deadline ends a hopeless wait.
pub(crate) async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    for _ in 0..1000 {
        if holds().await {
            return;
        }
        sleep(Duration::from_millis(10)).await;
    }
    panic!("never came true: {what}");
}

/// A namespace with an address, under a name as a runtime gives it.
pub(crate) fn sandbox(name: &str, ip: &str) -> NetNs {
    let ns = NetNs::create().expect("namespace");
    let mut netlink = Netlink::in_ns(&ns).expect("netlink");
    netlink.add_bridge("eth0").expect("interface");
    let index = netlink.index("eth0").expect("index");
    netlink.add_address(index, format!("{ip}/24").parse().expect("net")).expect("address");
    ns.bind_mount(netns_path(name)).expect("mount");
    ns
}

/// Where a runtime names a pod's namespace.
pub(crate) fn netns_path(name: &str) -> PathBuf {
    Path::new("/run/netns").join(name)
}

/// One call of the plugin.
pub(crate) async fn cni(command: &'static str, name: &'static str) -> Outcome {
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

/// A ztunnel that acknowledges everything and remembers it.
pub(crate) struct Ztunnel {
    heard: tokio::sync::mpsc::UnboundedReceiver<String>,
    task: JoinHandle<()>,
}

impl Ztunnel {
    /// `written` says whether the pod is written down as enrolled, at the moment of an Add.
    pub(crate) async fn connect(written: fn() -> bool) -> Self {
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
                        let written = written();
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

    pub(crate) async fn next(&mut self) -> String {
        self.heard.recv().await.expect("the session goes on")
    }
}

impl Drop for Ztunnel {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Asks the agent's admin port.
pub(crate) async fn get(agent: &Agent, path: &str) -> String {
    let mut stream = TcpStream::connect(agent.admin).await.expect("connect");
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("ask");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("answer");
    answer
}
