//! The command line's grammar.

use std::{path::PathBuf, time::Duration};

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};

mod app;
mod cluster;
mod early;
mod lab;

pub(crate) use self::early::flags_last;
pub(crate) use self::{
    app::{App, TransferMode},
    cluster::{Check, ClusterStatus, Install, Place, SYSTEM, Selection, Uninstall, Upgrade},
    lab::{Fault, Lab},
};
use self::{cluster::namespace, lab::node_and_path};

/// An ambient service mesh: identity and mutual TLS for pods by a namespace label, nothing restarted.
#[derive(Debug, Parser)]
#[command(
    name = "fairway",
    version,
    arg_required_else_help = true,
    after_help = "--context, --kubeconfig and --namespace may also stand before the command, as for kubectl."
)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Whether a cluster can run the mesh, before anything is changed; and whether the mesh there is well.
    Check(Check),
    /// A guided run on this machine: two nodes, pods, the mesh switched on under them, and the evidence.
    Demo(Demo),
    /// Virtual nodes and pods on this machine, with the real mesh on them.
    #[command(subcommand)]
    Lab(Lab),
    /// Everything a program of the mesh knows, as JSON.
    Dump(Dump),
    /// Install the mesh into a cluster, and wait until it serves.
    Install(Install),
    /// Every program of the mesh in a cluster: version, discovery, certificates, captured pods.
    Status(ClusterStatus),
    /// Live traffic by workload: connections, bytes, failures.
    Top(Top),
    /// Take the mesh out of a cluster again; pods go on without it.
    Uninstall(Uninstall),
    /// Bring an installation to this version, one component after the other.
    Upgrade(Upgrade),
    /// The version of this program.
    Version,
    /// Say why a pod can or cannot reach a service or pod: the policy, file, line and field at fault.
    Why(Why),
    /// The small programs that the demo's pods run.
    #[command(subcommand, hide = true)]
    App(App),
    /// Questions for developers.
    #[command(subcommand, hide = true)]
    Debug(Debug),
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Demo {
    /// Leave the lab up afterwards and print how to play with it.
    #[arg(long)]
    pub(crate) keep: bool,
    /// Write what crossed the wire in step 4 to this file, for Wireshark.
    #[arg(long, value_name = "FILE")]
    pub(crate) pcap: Option<PathBuf>,
    /// One JSON object per step instead of text.
    #[arg(long)]
    pub(crate) json: bool,
    /// Another ztunnel binary on a node, as for `lab up`: `node2=/path/to/ztunnel`.
    #[arg(long, value_name = "NODE=PATH", value_parser = node_and_path, conflicts_with = "loopback")]
    pub(crate) ztunnel: Vec<(String, PathBuf)>,
    /// Run on loopback with SOCKS5 capture, as on kernels that refuse namespaces.
    #[arg(long)]
    pub(crate) loopback: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    Json,
    #[default]
    Text,
    Yaml,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Why {
    /// The calling pod: `namespace/name`.
    pub(crate) source: String,
    /// A service or pod `namespace/name`, with a port: `demo/server:80`.
    pub(crate) destination: String,
    /// Of a caller without one; else the context's, and in a lab `default`.
    #[arg(short, long, value_parser = namespace)]
    pub(crate) namespace: Option<String>,
    #[arg(short, long, value_enum, default_value_t)]
    pub(crate) output: Output,
    #[command(flatten)]
    pub(crate) place: Place,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Top {
    /// Between two looks.
    #[arg(long, default_value = "2s", value_parser = interval)]
    pub(crate) interval: Duration,
    /// Look for one interval, and end.
    #[arg(long)]
    pub(crate) once: bool,
    #[arg(short, long, value_enum, default_value_t)]
    pub(crate) output: Output,
    #[command(flatten)]
    pub(crate) place: Place,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Dump {
    /// `ztunnel/node1`, `agent/node1` or `fairwayd`.
    pub(crate) program: String,
    /// One part only, such as `workloads`, `services`, `policies`, `certificates` or `workloadState` of a ztunnel.
    pub(crate) part: Option<String>,
    #[command(flatten)]
    pub(crate) place: Place,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Debug {
    /// Ask the CA for a certificate as a node's ztunnel would.
    RequestCertificate {
        /// `https://host:port`.
        #[arg(long)]
        address: String,
        #[arg(long)]
        root: PathBuf,
        #[arg(long)]
        token: PathBuf,
        /// `spiffe://…`.
        identity: String,
    },
    /// Follow what pods send each other across an interface of this network namespace, and say at the end what of it was TLS.
    Wire {
        #[arg(long, default_value = "eth0")]
        interface: String,
        /// Ranges that pods' addresses are from.
        #[arg(long, required = true, value_delimiter = ',')]
        pods: Vec<ipnet::IpNet>,
        /// Text to look for in what was sent in the clear.
        #[arg(long)]
        nonce: Option<String>,
        #[arg(long, default_value_t = 3.0)]
        seconds: f64,
    },
}

fn interval(text: &str) -> Result<Duration, String> {
    let interval: Duration = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    let allowed = Duration::from_millis(100)..=Duration::from_secs(3600);
    if allowed.contains(&interval) { Ok(interval) } else { Err("expected 100ms to 1h".to_owned()) }
}
