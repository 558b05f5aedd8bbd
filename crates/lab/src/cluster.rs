//! The running lab: everything that happens to it happens here, one operation at a time.

use std::{
    collections::BTreeMap,
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::unix::fs::DirBuilderExt as _,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use mesh_net::{NetNs, SocketOptions, isolate::kill_group, link::Netlink};
use mesh_runtime::whole_file;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::Child,
};

use crate::{
    applied::{self, Applied},
    components::{self, Options, Paths},
    kubeproxy,
    manifest::{key, split},
    plugin,
    pods::{Pod, cni, write_whole},
    protocol::{Fault, NodeStatus, PodStatus, ProgramStatus, Status},
    topology::{self, CONTROL, Member, Topology},
    wire::Recorder,
};

/// How long a program may take to report ready.
const READY_WITHIN: Duration = Duration::from_secs(30);
/// How often a kubelet retries a sandbox whose CNI chain failed, and how many times before the lab calls it a problem.
const SANDBOX_TRIES: usize = 20;
const SANDBOX_PAUSE: Duration = Duration::from_millis(250);
const STOP_WITHIN: Duration = Duration::from_secs(2);
const DRAIN_WITHIN: Duration = Duration::from_secs(35);

type Result<T> = std::result::Result<T, anyhow::Error>;

/// A program of the mesh.
#[derive(Debug)]
pub struct Program {
    ns: NetNs,
    kind: Kind,
    child: Option<Child>,
    restarts: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    Agent(String),
    ControlPlane,
    Ztunnel(String),
}

pub struct Cluster {
    paths: Paths,
    options: Options,
    pub topology: Topology,
    programs: BTreeMap<String, Program>,
    pods: BTreeMap<String, Pod>,
    /// Objects by `namespace/name` (namespaces: by name), as last written.
    namespaces: BTreeMap<String, Value>,
    services: BTreeMap<String, Value>,
    pub recorder: Recorder,
    next_vip: u8,
    next_host: BTreeMap<String, u8>,
    pub urls: BTreeMap<String, String>,
    applied: Applied,
}

impl Cluster {
    /// Builds the network and starts the mesh: control plane first, then every node's agent and ztunnel.
    ///
    /// # Errors
    /// The step that failed; what was started dies with the caller.
    pub async fn start(options: Options) -> Result<Self> {
        let paths = Paths::standard();
        paths.create()?;
        link_programs(&paths)?;
        let topology = Topology::build(options.nodes)?;
        let recorder = Recorder::start(topology.wire(), "node1", topology::all_pods())?;
        let mut cluster = Self {
            paths,
            options,
            topology,
            programs: BTreeMap::new(),
            pods: BTreeMap::new(),
            namespaces: BTreeMap::new(),
            services: BTreeMap::new(),
            recorder,
            next_vip: 10,
            next_host: BTreeMap::new(),
            urls: BTreeMap::new(),
            applied: Applied::default(),
        };
        for name in ["default", "istio-system", "kube-system"] {
            cluster.put_namespace(json!({"metadata": {"name": name}}))?;
        }
        cluster.start_mesh().await?;
        Ok(cluster)
    }

    async fn start_mesh(&mut self) -> Result<()> {
        let control = self.topology.control.clone();
        self.add_program("fairwayd", &control, Kind::ControlPlane)?;
        self.wait_ready("fairwayd").await?;
        let nodes = self.topology.nodes.clone();
        for node in &nodes {
            fs::create_dir_all(self.paths.sandboxes(&node.name))?;
            for kept in ["state", "keys"] {
                fs::DirBuilder::new().mode(0o700).create(self.paths.node(&node.name).join(kept))?;
            }
            self.write_token(&node.name).await?;
            let name = node.name.clone();
            self.add_program(&format!("agent/{name}"), node, Kind::Agent(name.clone()))?;
            let ns = self.program_sandbox(node)?;
            self.add_program_in(&format!("ztunnel/{name}"), ns, Kind::Ztunnel(name))?;
        }
        for node in &nodes {
            self.wait_ready(&format!("agent/{}", node.name)).await?;
            self.wait_ready(&format!("ztunnel/{}", node.name)).await?;
        }
        Ok(())
    }

    async fn write_token(&self, node: &str) -> Result<()> {
        let mut command = tokio::process::Command::from(components::token(&self.paths, node));
        let output = command.kill_on_drop(true).output().await?;
        if !output.status.success() {
            anyhow::bail!("fairwayd token failed: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        let token = output.stdout.trim_ascii();
        Ok(whole_file::replace(&self.paths.node(node).join("token"), token, 0o600)?)
    }

    // --- programs

    fn add_program(&mut self, name: &str, member: &Member, kind: Kind) -> Result<()> {
        self.add_program_in(name, member.ns.clone(), kind)
    }

    /// A pod's namespace on a node for a program of the mesh, as a DaemonSet's pod would get.
    fn program_sandbox(&mut self, node: &Member) -> Result<NetNs> {
        let host = self.next_host(&node.name)?;
        let ns = NetNs::create()?;
        let mut netlink = Netlink::in_ns(&node.ns)?;
        let side = format!("mesh{}", host);
        plugin::attach(&mut netlink, &ns, &side, "eth0", &node.pod_addresses(host), &node.gateways())?;
        Ok(ns)
    }

    fn add_program_in(&mut self, name: &str, ns: NetNs, kind: Kind) -> Result<()> {
        let program = Program { ns, kind, child: None, restarts: 0 };
        self.programs.insert(name.to_owned(), program);
        self.start_program(name)
    }

    fn start_program(&mut self, name: &str) -> Result<()> {
        let mut command = self.command_of(name)?;
        let log = self.paths.logs().join(format!("{}.log", name.replace('/', "-")));
        let program = self.program(name)?;
        if program.child.as_mut().is_some_and(|c| matches!(c.try_wait(), Ok(None))) {
            anyhow::bail!("{name} runs already");
        }
        program.child = Some(components::start(&program.ns, &mut command, &log)?);
        Ok(())
    }

    fn command_of(&self, name: &str) -> Result<Command> {
        let kind = &self.programs.get(name).ok_or_else(|| self.no_program(name))?.kind;
        Ok(match kind {
            Kind::ControlPlane => components::control_plane(&self.paths, &self.topology.control, &self.options),
            Kind::Agent(node) => components::agent(&self.paths, node, &self.options),
            Kind::Ztunnel(node) => {
                let binary = self.options.ztunnels.iter().find(|(n, _)| n == node).map(|(_, p)| p.as_path());
                let member = self.topology.node(node).ok_or_else(|| anyhow::anyhow!("no node {node}"))?;
                components::ztunnel(&self.paths, member, &self.topology.control, binary, &self.options)
            }
        })
    }

    fn program(&mut self, name: &str) -> Result<&mut Program> {
        let error = self.no_program(name);
        self.programs.get_mut(name).ok_or(error)
    }

    fn no_program(&self, name: &str) -> anyhow::Error {
        let known: Vec<&str> = self.programs.keys().map(String::as_str).collect();
        anyhow::anyhow!("no program `{name}`; there are {}", known.join(", "))
    }

    /// Waits until a program says that it is ready.
    ///
    /// # Errors
    /// When it ends, or does not say so in time; with the end of its log.
    pub async fn wait_ready(&mut self, name: &str) -> Result<()> {
        let deadline = Instant::now() + READY_WITHIN;
        loop {
            let (ns, port, path) = self.readiness_of(name)?;
            let last = match http_get(&ns, SocketAddr::from((Ipv4Addr::LOCALHOST, port)), path).await {
                Ok((200, _)) => return Ok(()),
                Ok((status, body)) => format!("{status} {}", body.trim()),
                Err(error) => error.to_string(),
            };
            let ended = match self.program(name)?.child.as_mut().map(Child::try_wait) {
                Some(Ok(Some(status))) => Some(status.to_string()),
                _ => None,
            };
            if let Some(status) = ended {
                anyhow::bail!("{name} ended ({status}); its last words:\n{}", self.log_tail(name, 12));
            }
            if Instant::now() > deadline {
                anyhow::bail!("{name} is not ready after 30 s ({last}); its last words:\n{}", self.log_tail(name, 12));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn readiness_of(&mut self, name: &str) -> Result<(NetNs, u16, &'static str)> {
        let program = self.program(name)?;
        let (port, path) = match program.kind {
            Kind::Agent(_) => (components::AGENT_ADMIN_PORT, "/readyz"),
            Kind::ControlPlane => (components::CONTROL_ADMIN_PORT, "/healthz/ready"),
            Kind::Ztunnel(_) => (components::ZTUNNEL_READY_PORT, "/healthz/ready"),
        };
        Ok((program.ns.clone(), port, path))
    }

    /// The last lines of a program's or container's log (`ztunnel/node1`, `demo/client`, `cni`).
    pub fn log_tail(&self, name: &str, lines: usize) -> String {
        let text = self.log_file(name).and_then(|f| fs::read_to_string(f).ok()).unwrap_or_default();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    fn log_file(&self, name: &str) -> Option<PathBuf> {
        if let Some(pod) = self.pods.get(name) {
            let container = pod.containers.first().map_or("app", |c| c.name.as_str());
            return Some(self.paths.pod(&pod.uid).join(format!("{container}.log")));
        }
        let container = name.rsplit_once('/').and_then(|(pod, container)| {
            Some(self.paths.pod(&self.pods.get(pod)?.uid).join(format!("{container}.log")))
        });
        Some(container.unwrap_or_else(|| self.paths.logs().join(format!("{}.log", name.replace('/', "-")))))
    }

    // --- objects

    /// Applies a manifest file: all of it, or (when it is malformed) nothing.
    ///
    /// # Errors
    /// What is wrong, with file and line; or the pod that could not be started.
    pub async fn apply(&mut self, file: &str, text: &str) -> Result<String> {
        let parts = split(file, text)?;
        self.applied.take(file, &parts);
        let mut report = Vec::new();
        for namespace in parts.namespaces {
            self.put_namespace(namespace)?;
        }
        for object in parts.pods.iter().chain(&parts.services) {
            let (namespace, _) = key(object);
            if !self.namespaces.contains_key(&namespace) {
                self.put_namespace(json!({"metadata": {"name": namespace}}))?;
            }
        }
        if applied::has_documents(&parts.rest) {
            let path = applied::path_of(file);
            write_whole(&self.paths.manifests().join(&path), &parts.rest)?;
            report.push(format!("{} applied", path.file_name().unwrap_or_default().display()));
        }
        for service in parts.services {
            let (namespace, name) = key(&service);
            self.put_service(service)?;
            report.push(format!("service {namespace}/{name} applied"));
        }
        for pod in parts.pods {
            let (namespace, name) = key(&pod);
            report.push(self.put_pod(pod).await.map(|done| format!("pod {namespace}/{name} {done}"))?);
        }
        self.refresh_names()?;
        Ok(report.join("\n"))
    }

    /// What the control plane finds wrong with what files put there, at their lines. Files may need each other: none is judged before
    /// all have been read.
    ///
    /// # Errors
    /// When something of them is gone, or the control plane does not read it in time.
    pub async fn problems(&self, files: &[String]) -> Result<String> {
        let program = self.programs.get("fairwayd").ok_or_else(|| self.no_program("fairwayd"))?;
        let admin = SocketAddr::from((Ipv4Addr::LOCALHOST, components::CONTROL_ADMIN_PORT));
        let mut found = Vec::new();
        let manifests = self.paths.manifests();
        let versions: Vec<Vec<String>> =
            files.iter().map(|file| self.applied.versions(file, &manifests)).collect::<Result<_>>()?;
        for version in versions.into_iter().flatten() {
            let answer = http_get(&program.ns, admin, &format!("/debug/problems?version={version}")).await;
            let (status, body) = answer.context("the control plane does not answer")?;
            anyhow::ensure!(status == 200, "the control plane says: {}", body.trim());
            found = serde_json::from_str(&body).context("the control plane's problems cannot be read")?;
        }
        let told: Vec<String> = files.iter().flat_map(|file| self.applied.told(file, &found)).collect();
        Ok(told.join("\n"))
    }

    /// Takes back what `apply` of a file left in the manifests' folder: all but namespaces, pods and services.
    ///
    /// # Errors
    /// When no such file was applied.
    pub fn delete_file(&mut self, file: &str) -> Result<()> {
        let path = applied::path_of(file);
        fs::remove_file(self.paths.manifests().join(&path))
            .with_context(|| format!("{file} was not applied, or holds nothing but namespaces, pods and services"))?;
        self.applied.forget(&path);
        Ok(())
    }

    /// Sets or removes a label.
    ///
    /// # Errors
    /// When there is no such namespace or pod.
    pub fn label(&mut self, namespace: &str, pod: Option<&str>, label: &str, value: Option<&str>) -> Result<()> {
        let set = |object: &mut Value| {
            let labels = &mut object["metadata"]["labels"];
            match value {
                Some(value) => labels[label] = json!(value),
                None => drop(labels.as_object_mut().and_then(|l| l.remove(label))),
            }
        };
        if let Some(name) = pod {
            let pod = self
                .pods
                .get_mut(&format!("{namespace}/{name}"))
                .ok_or_else(|| anyhow::anyhow!("no pod {namespace}/{name}"))?;
            set(&mut pod.manifest);
            let running = pod.sandbox.is_some();
            return Ok(write_whole(&pod.manifest_file(&self.paths), &pod.object(running).to_string())?);
        }
        let object = self.namespaces.get_mut(namespace).ok_or_else(|| anyhow::anyhow!("no namespace {namespace}"))?;
        set(object);
        let text = object.to_string();
        Ok(write_whole(&self.paths.manifests().join("namespaces").join(format!("{namespace}.yaml")), &text)?)
    }

    fn put_namespace(&mut self, mut namespace: Value) -> Result<()> {
        namespace["apiVersion"] = json!("v1");
        namespace["kind"] = json!("Namespace");
        let (_, name) = key(&namespace);
        // A namespace that exists keeps the labels that were put on it by hand.
        if let Some(old) = self.namespaces.get(&name) {
            for (label, value) in old["metadata"]["labels"].as_object().into_iter().flatten() {
                if namespace["metadata"]["labels"][label].is_null() {
                    namespace["metadata"]["labels"][label] = value.clone();
                }
            }
        }
        let file = self.paths.manifests().join("namespaces").join(format!("{name}.yaml"));
        write_whole(&file, &namespace.to_string())?;
        self.namespaces.insert(name, namespace);
        Ok(())
    }

    fn put_service(&mut self, mut service: Value) -> Result<()> {
        let (namespace, name) = key(&service);
        let full = format!("{namespace}/{name}");
        if service["spec"]["clusterIP"].is_null() {
            let addresses = match self.services.get(&full) {
                Some(old) => old["spec"]["clusterIPs"].clone(),
                None => self.new_vips()?,
            };
            service["spec"]["clusterIP"] = addresses[0].clone();
            service["spec"]["clusterIPs"] = addresses;
            service["spec"]["ipFamilies"] = json!(["IPv4", "IPv6"]);
        }
        let file = self.paths.manifests().join("services").join(format!("{namespace}_{name}.yaml"));
        write_whole(&file, &service.to_string())?;
        self.services.insert(full, service);
        Ok(())
    }

    fn new_vips(&mut self) -> Result<Value> {
        let n = self.next_vip;
        self.next_vip = n.checked_add(1).ok_or_else(|| anyhow::anyhow!("the lab has no more service addresses"))?;
        Ok(json!([Ipv4Addr::new(10, 96, 0, n), Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, n.into())]))
    }

    // --- pods

    async fn put_pod(&mut self, manifest: Value) -> Result<&'static str> {
        let (namespace, name) = key(&manifest);
        let full = format!("{namespace}/{name}");
        if let Some(old) = self.pods.get(&full) {
            if old.manifest["spec"] == manifest["spec"] {
                return Ok("unchanged");
            }
            anyhow::bail!("pod {full} exists with another spec; delete it first (`fairway lab delete {full}`)");
        }
        let mut pod = self.schedule(manifest)?;
        self.run_pod(&mut pod).await?;
        let problem = pod.problem.clone();
        self.pods.insert(full, pod);
        match problem {
            None => Ok("started"),
            Some(problem) => Err(anyhow::anyhow!(problem)),
        }
    }

    fn schedule(&mut self, manifest: Value) -> Result<Pod> {
        let asked = manifest["spec"]["nodeName"].as_str().map(str::to_owned);
        let node = match asked {
            Some(name) => name,
            // The emptiest node, the first of several.
            None => {
                let load = |n: &&Member| self.pods.values().filter(|p| p.node == n.name).count();
                self.topology.nodes.iter().min_by_key(load).map(|n| n.name.clone()).unwrap_or_default()
            }
        };
        let Some(member) = self.topology.node(&node).cloned() else {
            let known: Vec<&str> = self.topology.nodes.iter().map(|n| n.name.as_str()).collect();
            anyhow::bail!("spec.nodeName `{node}` is not a node of this lab; there are {}", known.join(", "));
        };
        let host_network = manifest["spec"]["hostNetwork"].as_bool().unwrap_or(false);
        let addresses = if host_network {
            vec![IpAddr::from(member.v4), IpAddr::from(member.v6)]
        } else {
            member.pod_addresses(self.next_host(&node)?).to_vec()
        };
        Ok(Pod::new(manifest, new_uid(), node, addresses))
    }

    fn next_host(&mut self, node: &str) -> Result<u8> {
        let next = self.next_host.entry(node.to_owned()).or_insert(2);
        let host = *next;
        *next = host.checked_add(1).ok_or_else(|| anyhow::anyhow!("{node} has no more pod addresses"))?;
        Ok(host)
    }

    async fn run_pod(&mut self, pod: &mut Pod) -> Result<()> {
        let member = self.topology.node(&pod.node).cloned().ok_or_else(|| anyhow::anyhow!("no node {}", pod.node))?;
        fs::create_dir_all(self.paths.pod(&pod.uid))?;
        write_whole(&pod.manifest_file(&self.paths), &pod.object(false).to_string())?;
        self.write_names_of(pod)?;
        if pod.host_network() {
            pod.sandbox = Some(member.ns.clone());
        } else {
            self.make_sandbox(pod, &member).await?;
        }
        if pod.problem.is_none() {
            if let Err(error) = pod.start_containers(&self.paths) {
                pod.problem = Some(error.to_string());
            }
            write_whole(&pod.sandbox_file(&self.paths), &pod.sandbox_record(&self.paths).to_string())?;
            write_whole(&pod.manifest_file(&self.paths), &pod.object(true).to_string())?;
        }
        Ok(())
    }

    /// As a kubelet does: when the chain fails, tear down and try again with a fresh namespace.
    async fn make_sandbox(&self, pod: &mut Pod, member: &Member) -> Result<()> {
        let config = components::cni_config(&self.paths, member);
        for _ in 0..SANDBOX_TRIES {
            let ns = NetNs::create()?;
            ns.bind_mount(pod.netns_file(&self.paths))?;
            match cni(&self.paths, member, pod, &config, "ADD").await {
                Ok(_) => {
                    pod.sandbox = Some(ns);
                    pod.problem = None;
                    return Ok(());
                }
                Err(message) => pod.problem = Some(message),
            }
            self.drop_sandbox(pod, member).await;
            tokio::time::sleep(SANDBOX_PAUSE).await;
        }
        Ok(())
    }

    async fn drop_sandbox(&self, pod: &Pod, member: &Member) {
        let config = components::cni_config(&self.paths, member);
        if let Err(error) = cni(&self.paths, member, pod, &config, "DEL").await {
            tracing::warn!(error, pod = pod.key(), "CNI DEL failed");
        }
        let file = pod.netns_file(&self.paths);
        if nix::mount::umount2(&file, nix::mount::MntFlags::MNT_DETACH).is_ok() {
            fs::remove_file(file).unwrap_or_default();
        }
    }

    /// Stops a pod and removes it.
    ///
    /// # Errors
    /// When there is none.
    pub async fn delete_pod(&mut self, name: &str) -> Result<()> {
        let mut pod = self.pods.remove(name).ok_or_else(|| anyhow::anyhow!("no pod {name}"))?;
        let mut dying = pod.object(true);
        dying["metadata"]["deletionTimestamp"] = json!("2000-01-01T00:00:00Z");
        write_whole(&pod.manifest_file(&self.paths), &dying.to_string())?;
        stop_containers(&mut pod).await;
        if let (Some(ns), false) = (&pod.sandbox, pod.host_network()) {
            kill_inside(ns)?;
        }
        let member = self.topology.node(&pod.node).cloned();
        if let (Some(member), false) = (member, pod.host_network()) {
            self.drop_sandbox(&pod, &member).await;
        }
        for file in [pod.manifest_file(&self.paths), pod.sandbox_file(&self.paths)] {
            fs::remove_file(file).unwrap_or_default();
        }
        fs::remove_dir_all(self.paths.pod(&pod.uid)).unwrap_or_default();
        self.refresh_names()
    }

    // --- names and service addresses

    fn refresh_names(&self) -> Result<()> {
        for pod in self.pods.values() {
            self.write_names_of(pod)?;
        }
        let backends = kubeproxy::services(self.services.values(), &self.pods);
        for node in &self.topology.nodes {
            kubeproxy::program(&node.ns, &backends)?;
        }
        Ok(())
    }

    fn write_names_of(&self, pod: &Pod) -> Result<()> {
        let dir = self.paths.pod(&pod.uid);
        let mut hosts = "127.0.0.1 localhost\n::1 localhost\n".to_owned();
        for service in self.services.values() {
            let (namespace, name) = key(service);
            let addresses = service["spec"]["clusterIPs"].as_array().cloned().unwrap_or_default();
            for address in addresses.iter().filter_map(Value::as_str).filter(|a| *a != "None") {
                // One family per name, so that a test knows which one it exercises.
                let suffix = if address.contains(':') { "-v6" } else { "" };
                let short = if namespace == pod.namespace { format!(" {name}{suffix}") } else { String::new() };
                hosts.push_str(&format!(
                    "{address} {name}{suffix}.{namespace}.svc.cluster.local {name}{suffix}.{namespace}{short}\n"
                ));
            }
        }
        // Written in place: a bind mount follows the file, not its name.
        fs::write(dir.join("hosts"), hosts)?;
        // Services are in /etc/hosts. What is not is asked of the node, where nobody answers, and which refuses at once; in the mesh,
        // ztunnel hears it first.
        let nameserver = self.topology.node(&pod.node).map_or(Ipv4Addr::LOCALHOST, |node| node.v4);
        Ok(fs::write(dir.join("resolv.conf"), format!("nameserver {nameserver}\noptions timeout:2 attempts:3\n"))?)
    }

    // --- faults

    /// # Errors
    /// When the named thing does not exist or the kernel refuses.
    pub async fn fault(&mut self, fault: Fault) -> Result<String> {
        match fault {
            Fault::Freeze { program } => self.signal(&program, Signal::SIGSTOP).map(|()| format!("{program} frozen")),
            Fault::Thaw { program } => self.signal(&program, Signal::SIGCONT).map(|()| format!("{program} goes on")),
            Fault::Kill { program, restart } => self.kill(&program, restart).await,
            Fault::Start { program } => {
                self.start_program(&program)?;
                self.program(&program)?.restarts += 1;
                Ok(format!("{program} started"))
            }
            Fault::Partition { node } => self
                .topology
                .set_connected(&node, false)
                .map(|()| format!("{node} is off the wire"))
                .map_err(Into::into),
            Fault::Heal { node } => self
                .topology
                .set_connected(&node, true)
                .map(|()| format!("{node} is back on the wire"))
                .map_err(Into::into),
            Fault::Delay { node, milliseconds } => {
                self.topology.set_delay(&node, Duration::from_millis(milliseconds.into()))?;
                Ok(format!("{node} sends {milliseconds} ms late"))
            }
            Fault::Upgrade { node, binary } => self.upgrade(&node, binary).await,
            Fault::Block { pod, port } => {
                let text = format!("{pod} drops connections to port {port}");
                self.running(&pod)?.block(port).map(|()| text)
            }
            Fault::Unblock { pod } => self.running(&pod)?.unblock().map(|()| format!("{pod} drops nothing")),
            Fault::Unready { pod } => self.set_ready(&pod, false).map(|()| format!("{pod} is not ready")),
            Fault::Ready { pod } => self.set_ready(&pod, true).map(|()| format!("{pod} is ready")),
            Fault::CertificateTtl { ttl } => {
                self.options.certificate_ttl = ttl;
                self.kill("fairwayd", true).await?;
                self.wait_ready("fairwayd").await?;
                Ok("fairwayd restarted".to_owned())
            }
        }
    }

    fn running(&mut self, pod: &str) -> Result<&mut Pod> {
        let full = if pod.contains('/') { pod.to_owned() } else { format!("default/{pod}") };
        self.pods.get_mut(&full).ok_or_else(|| anyhow::anyhow!("no pod {full}"))
    }

    fn set_ready(&mut self, pod: &str, ready: bool) -> Result<()> {
        let paths = self.paths.clone();
        let pod = self.running(pod)?;
        pod.ready = ready;
        Ok(write_whole(&pod.manifest_file(&paths), &pod.object(pod.sandbox.is_some()).to_string())?)
    }

    fn signal(&mut self, program: &str, signal: Signal) -> Result<()> {
        let pid = self.program(program)?.child.as_ref().and_then(Child::id);
        let pid = pid.and_then(|p| i32::try_from(p).ok()).ok_or_else(|| anyhow::anyhow!("{program} does not run"))?;
        Ok(kill(Pid::from_raw(pid), signal)?)
    }

    async fn kill(&mut self, program: &str, restart: bool) -> Result<String> {
        self.signal(program, Signal::SIGKILL)?;
        if let Some(mut child) = self.program(program)?.child.take() {
            child.wait().await?;
        }
        if !restart {
            return Ok(format!("{program} killed"));
        }
        self.start_program(program)?;
        self.program(program)?.restarts += 1;
        Ok(format!("{program} killed and started again"))
    }

    /// A rolling update with surge 1: the new one becomes ready beside the old one, which is then asked to go.
    async fn upgrade(&mut self, node: &str, binary: Option<String>) -> Result<String> {
        let name = format!("ztunnel/{node}");
        let member = self.topology.node(node).cloned().ok_or_else(|| anyhow::anyhow!("no node `{node}`"))?;
        if let Some(binary) = binary {
            self.options.ztunnels.retain(|(n, _)| n != node);
            self.options.ztunnels.push((node.to_owned(), binary.into()));
        }
        let Some(mut old) = self.program(&name)?.child.take() else { anyhow::bail!("{name} does not run") };
        let sandbox = self.program_sandbox(&member)?;
        self.program(&name)?.ns = sandbox;
        self.start_program(&name)?;
        let ready = self.wait_ready(&name).await;
        if let Some(pid) = old.id().and_then(|p| i32::try_from(p).ok()) {
            kill(Pid::from_raw(pid), Signal::SIGTERM)?;
        }
        ready?;
        let left = tokio::time::timeout(DRAIN_WITHIN, old.wait()).await;
        Ok(format!("{name} replaced; the old one {}", if left.is_ok() { "has left" } else { "still drains" }))
    }

    // --- looking

    pub fn status(&mut self) -> Status {
        let programs = self.programs.iter_mut().map(|(name, program)| ProgramStatus {
            name: name.clone(),
            process: program.child.as_mut().and_then(running).unwrap_or(0),
            restarts: program.restarts,
        });
        let programs = programs.collect();
        let addresses = |m: &Member| vec![m.v4.to_string(), m.v6.to_string()];
        let vips = |s: &Value| {
            s["spec"]["clusterIPs"]
                .as_array()
                .map(|l| l.iter().filter_map(|v| v.as_str().map(str::to_owned)).collect())
                .unwrap_or_default()
        };
        Status {
            nodes: self
                .topology
                .nodes
                .iter()
                .map(|m| NodeStatus { name: m.name.clone(), addresses: addresses(m) })
                .collect(),
            pods: self.pods.values().map(|p| self.pod_status(p)).collect(),
            programs,
            urls: self.urls.clone(),
            services: self.services.iter().map(|(name, s)| (name.clone(), vips(s))).collect(),
        }
    }

    fn pod_status(&self, pod: &Pod) -> PodStatus {
        let file = self.paths.manifests().join("enrolment").join(format!("{}_{}.yaml", pod.namespace, pod.name));
        let enrolment: Value =
            fs::read_to_string(file).ok().and_then(|t| serde_saphyr::from_str(&t).ok()).unwrap_or_default();
        PodStatus {
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
            uid: pod.uid.clone(),
            node: pod.node.clone(),
            service_account: pod.service_account().to_owned(),
            addresses: pod.addresses.iter().map(ToString::to_string).collect(),
            enrolment: enrolment["spec"]["redirection"].as_str().unwrap_or_default().to_owned(),
            processes: pod.containers.iter().filter_map(|c| c.child.id()).collect(),
            problem: pod.problem.clone(),
        }
    }

    /// The namespace a target (`demo/client`, `node/node1`, `control`) names.
    ///
    /// # Errors
    /// When there is none such.
    pub fn namespace_of(&self, target: &str) -> Result<NetNs> {
        if target == CONTROL {
            return Ok(self.topology.control.ns.clone());
        }
        if let Some(node) = target.strip_prefix("node/") {
            return self.topology.node(node).map(|m| m.ns.clone()).ok_or_else(|| anyhow::anyhow!("no node `{node}`"));
        }
        if let Some(program) = self.programs.get(target) {
            return Ok(program.ns.clone());
        }
        let pod = self.pod(target)?;
        pod.sandbox.clone().ok_or_else(|| anyhow::anyhow!("pod {target} has no sandbox"))
    }

    /// A command that runs at a target, and the namespace to fork it in.
    ///
    /// # Errors
    /// When the target does not exist or no command was given.
    pub fn command_at(
        &self,
        target: &str,
        argv: &[String],
        env: &BTreeMap<String, String>,
    ) -> Result<(Option<NetNs>, Command)> {
        if target == CONTROL || target.starts_with("node/") || self.programs.contains_key(target) {
            let (program, arguments) = argv.split_first().ok_or_else(|| anyhow::anyhow!("no command given"))?;
            let mut command = Command::new(program);
            let path = std::env::var("PATH").unwrap_or_default();
            command.args(arguments).env("PATH", format!("{}:{path}", self.paths.bin().display())).envs(env);
            std::os::unix::process::CommandExt::process_group(&mut command, 0);
            return Ok((Some(self.namespace_of(target)?), command));
        }
        Ok((None, self.pod(target)?.command(&self.paths, argv, env)?))
    }

    fn pod(&self, target: &str) -> Result<&Pod> {
        let full = if target.contains('/') { target.to_owned() } else { format!("default/{target}") };
        let known: Vec<&str> = self.pods.keys().map(String::as_str).collect();
        let none = || {
            anyhow::anyhow!(
                "no pod `{full}`; there are {}",
                if known.is_empty() { "none".to_owned() } else { known.join(", ") }
            )
        };
        self.pods.get(&full).ok_or_else(none)
    }
}

/// Ends what else was started in a sandbox (`exec`), as a runtime does when it removes one.
fn kill_inside(ns: &NetNs) -> io::Result<()> {
    let wanted = ns.id()?;
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else { continue };
        // Processes come and go while one looks.
        if NetNs::open(entry.path().join("ns/net")).and_then(|found| found.id()).is_ok_and(|found| found == wanted) {
            kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap_or_default();
        }
    }
    Ok(())
}

/// The process id of a child that has not ended.
fn running(child: &mut Child) -> Option<u32> {
    matches!(child.try_wait(), Ok(None)).then(|| child.id()).flatten()
}

async fn stop_containers(pod: &mut Pod) {
    for container in &mut pod.containers {
        let Some(pid) = container.child.id() else { continue };
        kill_group(pid, Signal::SIGTERM as i32).unwrap_or_default();
        if tokio::time::timeout(STOP_WITHIN, container.child.wait()).await.is_err() {
            kill_group(pid, Signal::SIGKILL as i32).unwrap_or_default();
            drop(container.child.wait().await);
        }
    }
}

/// The multi-call binary under each program's name.
fn link_programs(paths: &Paths) -> io::Result<()> {
    let program = std::env::current_exe()?;
    for name in ["fairway", "fairwayd", "fairway-node", "fairway-cni", "ztunnel", "lab-ptp"] {
        std::os::unix::fs::symlink(&program, paths.bin().join(name))?;
    }
    Ok(())
}

fn new_uid() -> String {
    let bits: u128 = rand::random();
    let hex = format!("{bits:032x}");
    format!("{}-{}-4{}-a{}-{}", &hex[..8], &hex[8..12], &hex[13..16], &hex[17..20], &hex[20..])
}

/// A small HTTP GET from inside a namespace: status and body.
///
/// # Errors
/// Connection errors, or no complete answer within ten seconds: some pages try things out first.
pub async fn http_get(ns: &NetNs, address: SocketAddr, path: &str) -> io::Result<(u16, String)> {
    const WITHIN: Duration = Duration::from_secs(10);
    let socket = mesh_net::sockets::tcp_socket(Some(ns), None, address, &SocketOptions::default())?;
    let mut stream = mesh_net::sockets::connect(socket, address, WITHIN).await?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    let mut answer = Vec::new();
    tokio::time::timeout(WITHIN, async {
        stream.write_all(request.as_bytes()).await?;
        (&mut stream).take(64 * 1024 * 1024).read_to_end(&mut answer).await
    })
    .await
    .map_err(|_| io::ErrorKind::TimedOut)??;
    let text = String::from_utf8_lossy(&answer);
    let (head, body) = text.split_once("\r\n\r\n").ok_or(io::ErrorKind::InvalidData)?;
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).ok_or(io::ErrorKind::InvalidData)?;
    Ok((status, body.to_owned()))
}
