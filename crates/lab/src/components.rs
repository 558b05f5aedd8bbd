//! The mesh's programs as the lab runs them: which binary, where, with which environment, and how one knows that it is up.

use std::{
    fs::{File, OpenOptions},
    io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use mesh_net::NetNs;

use crate::topology::Member;

/// Everything of a lab, on its private tmpfs.
#[derive(Clone, Debug)]
pub struct Paths {
    pub base: PathBuf,
}

impl Paths {
    /// The mount is private to the lab, so the path is the same in every lab.
    pub fn standard() -> Self {
        Self { base: PathBuf::from("/run/fairway") }
    }

    pub fn create(&self) -> io::Result<()> {
        let dirs = ["applied", "namespaces", "pods", "services", "enrolment"];
        for dir in dirs {
            std::fs::create_dir_all(self.manifests().join(dir))?;
        }
        for dir in [self.bin(), self.logs(), self.netns(), self.state(), self.base.join("pods")] {
            std::fs::create_dir_all(dir)?;
        }
        Ok(())
    }

    pub fn bin(&self) -> PathBuf {
        self.base.join("bin")
    }

    pub fn manifests(&self) -> PathBuf {
        self.base.join("manifests")
    }

    pub fn logs(&self) -> PathBuf {
        self.base.join("logs")
    }

    pub fn netns(&self) -> PathBuf {
        self.base.join("netns")
    }

    /// The control plane's own files.
    pub fn state(&self) -> PathBuf {
        self.base.join("state")
    }

    pub fn node(&self, node: &str) -> PathBuf {
        self.base.join("nodes").join(node)
    }

    pub fn sandboxes(&self, node: &str) -> PathBuf {
        self.node(node).join("sandboxes")
    }

    pub fn pod(&self, uid: &str) -> PathBuf {
        self.base.join("pods").join(uid)
    }
}

/// How the lab was asked to run.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Options {
    pub nodes: u8,
    /// Requested lifetime of workload certificates (`10s`, `24h`).
    pub certificate_ttl: String,
    /// Another binary for a node's ztunnel: (node, path).
    pub ztunnels: Vec<(String, PathBuf)>,
    /// Filter for the programs' logs.
    pub log: String,
}

impl Default for Options {
    fn default() -> Self {
        Self { nodes: 2, certificate_ttl: "24h".to_owned(), ztunnels: Vec::new(), log: "info".to_owned() }
    }
}

/// Where programs find each other.
pub const XDS_PORT: u16 = 15012;
pub const CONTROL_ADMIN_PORT: u16 = 15014;
pub const AGENT_ADMIN_PORT: u16 = 15014;
pub const ZTUNNEL_ADMIN_PORT: u16 = 15000;
pub const ZTUNNEL_STATS_PORT: u16 = 15020;
pub const ZTUNNEL_READY_PORT: u16 = 15021;

/// The command that runs the control plane.
pub fn control_plane(paths: &Paths, control: &Member, options: &Options) -> Command {
    let mut command = Command::new(paths.bin().join("fairwayd"));
    command
        .arg("run")
        .arg("--manifests")
        .arg(paths.manifests())
        .arg("--state")
        .arg(paths.state())
        .args(["--listen", &format!("{}:{XDS_PORT}", control.v4)])
        .args(["--admin", &format!("127.0.0.1:{CONTROL_ADMIN_PORT}")])
        .args(["--workload-cert-ttl", &options.certificate_ttl])
        .env("RUST_LOG", &options.log);
    command
}

/// The command that prints a node's token.
pub fn token(paths: &Paths, node: &str) -> Command {
    let mut command = Command::new(paths.bin().join("fairwayd"));
    let pod = format!("ztunnel-{node}");
    command
        .arg("token")
        .arg("--state")
        .arg(paths.state())
        .args(["--node", node, "--namespace", "istio-system", "--service-account", "ztunnel"])
        .args(["--pod", &pod, "--pod-uid", &pod]);
    command
}

/// The command that runs a node's agent.
pub fn agent(paths: &Paths, node: &str, options: &Options) -> Command {
    let mut command = Command::new(paths.bin().join("fairway-node"));
    let dir = paths.node(node);
    command
        .env("NODE_NAME", node)
        .env("ZTUNNEL_UDS_ADDRESS", dir.join("ztunnel.sock"))
        .env("CNI_AGENT_RUN_DIR", dir.join("cni"))
        .env("FAIRWAY_MANIFESTS", paths.manifests())
        .env("FAIRWAY_SANDBOXES", paths.sandboxes(node))
        .env("FAIRWAY_ADMIN_ADDR", format!("127.0.0.1:{AGENT_ADMIN_PORT}"))
        .env("AMBIENT_DNS_CAPTURE", "true")
        .env("RUST_LOG", &options.log);
    command
}

/// The command that runs a node's ztunnel. Standard variables, so that any ztunnel understands them; and where ours keeps what it knows
/// across a restart, which others ignore.
pub fn ztunnel(paths: &Paths, node: &Member, control: &Member, binary: Option<&Path>, options: &Options) -> Command {
    let own = paths.bin().join("ztunnel");
    let mut command = Command::new(binary.unwrap_or(&own));
    let dir = paths.node(&node.name);
    let address = format!("https://{}:{XDS_PORT}", control.v4);
    let root = paths.state().join("root-cert.pem");
    command
        .args(["proxy", "ztunnel"])
        .env("NODE_NAME", &node.name)
        .env("POD_NAME", format!("ztunnel-{}", node.name))
        .env("POD_NAMESPACE", "istio-system")
        .env("SERVICE_ACCOUNT", "ztunnel")
        .env("INSTANCE_IP", node.v4.to_string())
        .env("XDS_ADDRESS", &address)
        .env("CA_ADDRESS", &address)
        .env("XDS_ROOT_CA", &root)
        .env("CA_ROOT_CA", &root)
        .env("AUTH_TOKEN", dir.join("token"))
        .env("INPOD_UDS", dir.join("ztunnel.sock"))
        .env("ISTIO_META_DNS_CAPTURE", "true")
        .env("FAIRWAY_STATE_DIR", dir.join("state"))
        .env("FAIRWAY_KEYS_DIR", dir.join("keys"))
        .env("TERMINATION_GRACE_PERIOD_SECONDS", "30")
        .env("ZTUNNEL_WORKER_THREADS", "2")
        .env("RUST_LOG", &options.log);
    command
}

/// The container runtime's configuration of a node: the lab's link, then the mesh.
pub fn cni_config(paths: &Paths, node: &Member) -> serde_json::Value {
    serde_json::json!({
        "cniVersion": "1.1.0",
        "name": "lab",
        "plugins": [
            {"type": "lab-ptp", "gateways": node.gateways(), "capabilities": {"ips": true}},
            {
                "type": "fairway-cni",
                "cni_agent_run_dir": paths.node(&node.name).join("cni"),
                "ambient_enabled": true,
                "exclude_namespaces": ["kube-system"],
                "pod_namespace": "istio-system",
            },
        ],
    })
}

/// Starts `command` in a namespace, its output appended to `log`.
///
/// # Errors
/// When the log cannot be opened or the program not be started.
pub fn start(ns: &NetNs, command: &mut Command, log: &Path) -> io::Result<tokio::process::Child> {
    let file = append(log)?;
    command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
    // The child gets the namespace of the thread that forks it.
    ns.run(|| tokio::process::Command::from(std::mem::replace(command, Command::new("true"))).spawn())?
}

pub(crate) fn append(log: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(log)
}
