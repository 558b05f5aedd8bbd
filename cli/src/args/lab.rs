//! The grammar of the lab.

use std::path::PathBuf;

use clap::Subcommand;

use super::Output;

#[derive(Debug, Subcommand)]
pub(crate) enum Lab {
    /// Start a lab; optionally with manifests applied.
    Up {
        #[arg(long, default_value = "default")]
        name: String,
        /// Number of nodes.
        #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=9))]
        nodes: u8,
        /// Manifest files to apply: your own pods running your own commands.
        #[arg(short, long = "file", value_name = "FILE")]
        files: Vec<PathBuf>,
        /// Another ztunnel binary on a node: `node2=/path/to/ztunnel`.
        #[arg(long, value_name = "NODE=PATH", value_parser = node_and_path)]
        ztunnel: Vec<(String, PathBuf)>,
        /// Lifetime of workload certificates.
        #[arg(long, default_value = "24h")]
        certificate_ttl: String,
        /// Log filter of the mesh's programs.
        #[arg(long, default_value = "info")]
        log: String,
    },
    /// Apply manifests.
    Apply {
        #[arg(long, default_value = "default")]
        name: String,
        #[arg(short, long = "file", value_name = "FILE", required = true)]
        files: Vec<PathBuf>,
    },
    /// Delete a pod (`namespace/name`), or with -f the policies of a file.
    Delete {
        #[arg(long, default_value = "default")]
        name: String,
        pod: Option<String>,
        #[arg(short, long, value_name = "FILE")]
        file: Option<PathBuf>,
    },
    /// Set or remove (`key-`) a label: `fairway lab label demo istio.io/dataplane-mode=ambient`.
    Label {
        #[arg(long, default_value = "default")]
        name: String,
        /// A namespace, or a pod as `namespace/name`.
        object: String,
        /// `key=value`, or `key-`.
        label: String,
    },
    /// Run a command in a pod (`demo/client`), on a node (`node/node1`) or beside the control plane (`control`).
    Exec {
        #[arg(long, default_value = "default")]
        name: String,
        target: String,
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// List pods.
    Pods {
        #[arg(long, default_value = "default")]
        name: String,
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Nodes, programs, services and addresses of everything.
    Status {
        #[arg(long, default_value = "default")]
        name: String,
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// HTTP load from a pod to a service, with latencies.
    Traffic {
        #[arg(long, default_value = "default")]
        name: String,
        /// The calling pod.
        source: String,
        /// `host:port` as the pod would say it.
        target: String,
        #[arg(long, default_value_t = 8)]
        connections: usize,
        #[arg(long, default_value_t = 3.0)]
        seconds: f64,
        /// A new connection for every request.
        #[arg(long)]
        new_connections: bool,
    },
    /// The last lines of a program (`ztunnel/node1`, `agent/node1`, `fairwayd`, `cni`) or pod.
    Logs {
        #[arg(long, default_value = "default")]
        name: String,
        program: String,
        #[arg(long, default_value_t = 50)]
        lines: usize,
    },
    /// Inject a fault.
    Fault {
        #[arg(long, default_value = "default")]
        name: String,
        #[command(subcommand)]
        fault: Fault,
    },
    /// End a lab; nothing is left behind.
    Down {
        #[arg(long, default_value = "default")]
        name: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Fault {
    /// Stop a program where it stands.
    Freeze { program: String },
    /// Let a frozen program go on.
    Thaw { program: String },
    /// SIGKILL a program.
    Kill {
        program: String,
        /// Start it again at once.
        #[arg(long)]
        restart: bool,
    },
    /// Start a killed program.
    Start { program: String },
    /// Pull a node's cable.
    Partition { node: String },
    /// Plug it in again.
    Heal { node: String },
    /// Make everything a node sends arrive later; 0 ends it.
    Delay { node: String, milliseconds: u32 },
    /// Drop connections to a port of a pod, as a NetworkPolicy would.
    Block { pod: String, port: u16 },
    /// Let them through again.
    Unblock { pod: String },
    /// Make a pod's readiness probe fail.
    Unready { pod: String },
    /// Make it succeed again.
    Ready { pod: String },
    /// Replace a node's ztunnel by a new process, surge first.
    Upgrade { node: String, binary: Option<String> },
}

/// As of `node2=/path/to/ztunnel`.
pub(super) fn node_and_path(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((node, path)) if !node.is_empty() && !path.is_empty() => {
            let path = std::path::absolute(path).map_err(|e| e.to_string())?;
            if path.is_file() {
                Ok((node.to_owned(), path))
            } else {
                Err(format!("there is no file {}", path.display()))
            }
        }
        _ => Err("expected NODE=PATH, for instance node2=/usr/local/bin/ztunnel".to_owned()),
    }
}
