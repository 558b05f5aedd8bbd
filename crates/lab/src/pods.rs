//! Pods as a kubelet and a container runtime see them.

use std::{
    collections::BTreeMap,
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use mesh_net::{
    NetNs,
    isolate::PodSandbox,
    nft::{Batch, Chain, ChainType, Family, Hook, Nft, Rule},
};
use mesh_runtime::whole_file;
use serde_json::{Value, json};
use tokio::{io::AsyncWriteExt, process::Child};

use crate::{
    components::{Paths, append},
    manifest::key,
    topology::{Member, host},
};

/// Holds what a fault blocks.
const BLOCK: &str = "lab-block";
const BEFORE_OTHERS: i32 = -300;

/// A pod on a node.
#[derive(Debug)]
pub struct Pod {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub node: String,
    pub addresses: Vec<IpAddr>,
    /// What the user wrote.
    pub manifest: Value,
    pub sandbox: Option<NetNs>,
    pub containers: Vec<Container>,
    /// What its readiness probe says.
    pub ready: bool,
    /// Why it does not run.
    pub problem: Option<String>,
}

#[derive(Debug)]
pub struct Container {
    pub name: String,
    pub child: Child,
}

impl Pod {
    pub fn new(manifest: Value, uid: String, node: String, addresses: Vec<IpAddr>) -> Self {
        let (namespace, name) = key(&manifest);
        let (sandbox, containers, problem) = (None, Vec::new(), None);
        Self { namespace, name, uid, node, addresses, manifest, sandbox, containers, ready: true, problem }
    }

    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    pub fn service_account(&self) -> &str {
        self.manifest["spec"]["serviceAccountName"].as_str().unwrap_or("default")
    }

    pub fn host_network(&self) -> bool {
        self.manifest["spec"]["hostNetwork"].as_bool().unwrap_or(false)
    }

    /// The object as the API server would show it: scheduled, and with its status once it runs.
    pub fn object(&self, running: bool) -> Value {
        let mut object = self.manifest.clone();
        object["apiVersion"] = json!("v1");
        object["kind"] = json!("Pod");
        object["metadata"]["uid"] = json!(self.uid);
        object["spec"]["nodeName"] = json!(self.node);
        object["spec"]["serviceAccountName"] = json!(self.service_account());
        object["status"] = if running {
            let ips: Vec<Value> = self.addresses.iter().map(|ip| json!({"ip": ip})).collect();
            json!({
                "phase": "Running",
                "podIP": self.addresses.first(),
                "podIPs": ips,
                "conditions": [{"type": "Ready", "status": if self.ready { "True" } else { "False" }}],
            })
        } else {
            json!({"phase": "Pending"})
        };
        object
    }

    /// Drops what opens TCP connections to `port`.
    ///
    /// # Errors
    /// When the pod has no sandbox, or the kernel refuses.
    pub fn block(&self, port: u16) -> anyhow::Result<()> {
        let mut batch = Batch::new(Family::Inet);
        batch.replace_table(BLOCK);
        batch.add_chain(BLOCK, &Chain::base("input", ChainType::Filter, Hook::Input, BEFORE_OTHERS));
        batch.add_rule(BLOCK, "input", &Rule::new("blocked").tcp().dport(port).syn().drop());
        Ok(Nft::in_ns(self.netns()?)?.apply(batch)?)
    }

    /// Ends [`Self::block`].
    ///
    /// # Errors
    /// As for [`Self::block`].
    pub fn unblock(&self) -> anyhow::Result<()> {
        let mut batch = Batch::new(Family::Inet);
        batch.remove_table(BLOCK);
        Ok(Nft::in_ns(self.netns()?)?.apply(batch)?)
    }

    fn netns(&self) -> anyhow::Result<&NetNs> {
        self.sandbox.as_ref().ok_or_else(|| anyhow::anyhow!("pod {} has no sandbox", self.key()))
    }

    pub fn manifest_file(&self, paths: &Paths) -> PathBuf {
        paths.manifests().join("pods").join(format!("{}_{}.yaml", self.namespace, self.name))
    }

    pub fn netns_file(&self, paths: &Paths) -> PathBuf {
        paths.netns().join(&self.uid)
    }

    /// The runtime's record of the sandbox, which the node agent reads.
    pub fn sandbox_file(&self, paths: &Paths) -> PathBuf {
        paths.sandboxes(&self.node).join(format!("{}.json", self.uid))
    }

    pub fn sandbox_record(&self, paths: &Paths) -> Value {
        json!({
            "uid": self.uid,
            "namespace": self.namespace,
            "name": self.name,
            "netns": self.netns_file(paths),
            "ips": self.addresses,
        })
    }

    /// A command confined to this pod.
    ///
    /// # Errors
    /// When the pod has no sandbox.
    pub fn command(&self, paths: &Paths, argv: &[String], env: &BTreeMap<String, String>) -> io::Result<Command> {
        let (program, arguments) = argv.split_first().ok_or_else(|| io::Error::other("no command given"))?;
        let netns =
            self.sandbox.clone().ok_or_else(|| io::Error::other(format!("pod {} has no sandbox", self.key())))?;
        let dir = paths.pod(&self.uid);
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env("HOSTNAME", &self.name)
            .env("POD_NAME", &self.name)
            .env("POD_NAMESPACE", &self.namespace)
            .env("NODE_NAME", &self.node)
            .env("PATH", path_with(&paths.bin()))
            .envs(env);
        let sandbox = PodSandbox {
            netns,
            hosts: Some(dir.join("hosts")),
            resolv_conf: Some(dir.join("resolv.conf")),
            die_with_parent: false,
        };
        sandbox.confine(&mut command)?;
        Ok(command)
    }

    /// Starts every container.
    ///
    /// # Errors
    /// The first one that cannot be started.
    pub fn start_containers(&mut self, paths: &Paths) -> io::Result<()> {
        let empty = Vec::new();
        let containers = self.manifest["spec"]["containers"].as_array().unwrap_or(&empty).clone();
        for container in containers {
            let name = container["name"].as_str().unwrap_or("app").to_owned();
            let argv = [strings(&container["command"]), strings(&container["args"])].concat();
            let mut command = self.command(paths, &argv, &env(&container["env"]))?;
            let log = append(&paths.pod(&self.uid).join(format!("{name}.log")))?;
            command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
            let child = tokio::process::Command::from(command)
                .spawn()
                .map_err(|e| io::Error::other(format!("container {name}: cannot run `{}`: {e}", argv.join(" "))))?;
            self.containers.push(Container { name, child });
        }
        Ok(())
    }
}

fn strings(list: &Value) -> Vec<String> {
    let text = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_owned);
    list.as_array().map(|l| l.iter().map(text).collect()).unwrap_or_default()
}

fn env(list: &Value) -> BTreeMap<String, String> {
    let pair = |v: &Value| Some((v["name"].as_str()?.to_owned(), v["value"].as_str().unwrap_or_default().to_owned()));
    list.as_array().map(|l| l.iter().filter_map(pair).collect()).unwrap_or_default()
}

fn path_with(bin: &Path) -> String {
    let path = std::env::var("PATH").unwrap_or_else(|_| "/usr/bin:/bin".to_owned());
    format!("{}:{path}", bin.display())
}

/// Runs the node's CNI chain for a pod, as a container runtime does: ADD in order, each plugin given the result before it; DEL in
/// reverse order.
///
/// # Errors
/// The failing plugin's own message.
pub async fn cni(paths: &Paths, node: &Member, pod: &Pod, config: &Value, command: &str) -> Result<Value, String> {
    let empty = Vec::new();
    let mut plugins: Vec<&Value> = config["plugins"].as_array().unwrap_or(&empty).iter().collect();
    if command == "DEL" {
        plugins.reverse();
    }
    let mut previous: Option<Value> = None;
    for plugin in plugins {
        let name = plugin["type"].as_str().unwrap_or_default();
        let mut input = plugin.clone();
        input["cniVersion"] = config["cniVersion"].clone();
        input["name"] = config["name"].clone();
        if plugin["capabilities"]["ips"] == json!(true) {
            let ips: Vec<String> = pod.addresses.iter().map(|ip| host(*ip).to_string()).collect();
            input["runtimeConfig"] = json!({"ips": ips});
        }
        if let Some(result) = &previous {
            input["prevResult"] = result.clone();
        }
        let output = exec_plugin(paths, node, pod, name, command, &input).await?;
        if command == "ADD" {
            previous = Some(output);
        }
    }
    Ok(previous.unwrap_or_default())
}

async fn exec_plugin(
    paths: &Paths,
    node: &Member,
    pod: &Pod,
    name: &str,
    command: &str,
    input: &Value,
) -> Result<Value, String> {
    let container = pod.uid.replace('-', "");
    let arguments = format!(
        "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={container};K8S_POD_UID={}",
        pod.namespace, pod.name, pod.uid
    );
    let mut process = tokio::process::Command::new(paths.bin().join(name));
    process
        .env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", &container)
        .env("CNI_NETNS", pod.netns_file(paths))
        .env("CNI_IFNAME", "eth0")
        .env("CNI_ARGS", arguments)
        .env("CNI_PATH", paths.bin())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(append(&paths.logs().join("cni.log")).map_err(|e| e.to_string())?)
        .kill_on_drop(true);
    let fail = |e: io::Error| format!("plugin {name}: {e}");
    let mut child = node.ns.run(|| process.spawn()).map_err(fail)?.map_err(fail)?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.to_string().as_bytes()).await.map_err(fail)?;
    }
    let output = child.wait_with_output().await.map_err(fail)?;
    let text = String::from_utf8_lossy(&output.stdout);
    let value: Value = serde_json::from_str(&text).unwrap_or_default();
    if output.status.success() {
        return Ok(value);
    }
    let message = value["msg"].as_str().unwrap_or("no message");
    let details = value["details"].as_str().map(|d| format!(": {d}")).unwrap_or_default();
    Err(format!("plugin {name} refused {command} of {}: {message}{details}", pod.key()))
}

/// Replaces a file in one step, so that a watcher never sees half of it.
///
/// # Errors
/// Whatever the file system says.
pub fn write_whole(path: &Path, text: &str) -> io::Result<()> {
    whole_file::replace(path, text.as_bytes(), 0o644)
}
