//! The command line's grammar.

use std::{path::PathBuf, time::Duration};

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use lab::apps::relay::Instead;

mod cluster;

use self::cluster::namespace;
pub(crate) use self::cluster::{Check, ClusterStatus, Install, Place, SYSTEM, Selection, Uninstall, Upgrade};

/// An ambient service mesh: identity and mutual TLS for pods by a namespace label, nothing restarted.
#[derive(Debug, Parser)]
#[command(name = "fairway", version, arg_required_else_help = true)]
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

#[derive(Debug, Subcommand)]
pub(crate) enum App {
    /// Answer HTTP requests.
    Http {
        #[arg(long, default_value = "[::]:8080")]
        listen: String,
        #[arg(long, env = "HOSTNAME", default_value = "server")]
        name: String,
        /// Seconds to go on for when told to terminate.
        #[arg(long, default_value_t = 0)]
        drain: u64,
    },
    /// Echo lines.
    Echo {
        #[arg(long, default_value = "[::]:9000")]
        listen: String,
    },
    /// Serve checksummed streams, half-closes and resets.
    Stream {
        #[arg(long, default_value = "[::]:9001")]
        listen: String,
    },
    /// Greet whoever connects, before he says anything.
    Greet {
        #[arg(long, default_value = "[::]:9002")]
        listen: String,
    },
    /// Keep one connection open and use it.
    Steady {
        target: String,
        #[arg(long, default_value_t = 20)]
        interval_ms: u64,
        /// Reconnect when told so on this address.
        #[arg(long, default_value = "127.0.0.1:9099")]
        control: String,
    },
    /// Tell a steady client to open a new connection.
    Reconnect {
        #[arg(long, default_value = "127.0.0.1:9099")]
        control: String,
    },
    /// GET a URL once and print the answer.
    Get {
        url: String,
        #[arg(long, default_value_t = 5)]
        timeout: u64,
    },
    /// Transfer bytes and check them, or exercise one of TCP's awkward shapes.
    Transfer {
        #[arg(value_enum)]
        mode: TransferMode,
        target: String,
        #[arg(long, default_value_t = 1 << 20)]
        bytes: u64,
        #[arg(long, default_value_t = 1)]
        connections: usize,
    },
    /// Answer every DNS query with one address.
    Nameserver {
        #[arg(long, default_value = "[::]:53")]
        listen: String,
    },
    /// Ask a nameserver for the IPv4 addresses of a name.
    Ask {
        server: String,
        name: String,
        #[arg(long)]
        tcp: bool,
        #[arg(long, default_value_t = 10)]
        timeout: u64,
    },
    /// Be a waypoint for bytes: carry what a PROXY header announces to where it says, and print who is behind it.
    Relay {
        #[arg(long, default_value = "[::]:15088")]
        listen: String,
        /// Dial `OTHER` for connections to `HOST`, port for port.
        #[arg(long, value_name = "HOST=OTHER", value_parser = instead)]
        instead: Vec<Instead>,
    },
    /// Greet every connection with one byte and keep it.
    Hold {
        #[arg(long, default_value = "[::]:9003")]
        listen: String,
    },
    /// Open many connections to `hold`, print how many, and keep them open for a while.
    Idlers {
        target: String,
        #[arg(long, default_value_t = 1000)]
        connections: usize,
        #[arg(long, default_value_t = 3.0)]
        seconds: f64,
    },
    /// Closed-loop HTTP load.
    Load {
        target: String,
        /// What to ask for; `/bytes/N` has a body of N bytes.
        #[arg(long, default_value = "/load")]
        path: String,
        #[arg(long, default_value_t = 8)]
        connections: usize,
        #[arg(long, default_value_t = 3.0)]
        seconds: f64,
        #[arg(long)]
        new_connections: bool,
    },
    /// Do nothing, for ever.
    Idle,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum TransferMode {
    Bulk,
    CloseFirst,
    Download,
    Greeting,
    Many,
    Reset,
    SendReset,
    Slow,
    Upload,
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

fn instead(text: &str) -> Result<Instead, String> {
    match text.split_once('=') {
        Some((host, other)) if !host.is_empty() && !other.is_empty() => {
            Ok(Instead { host: host.to_owned(), other: other.to_owned() })
        }
        _ => Err("expected HOST=OTHER, for instance web=web-endpoints".to_owned()),
    }
}

fn node_and_path(text: &str) -> Result<(String, PathBuf), String> {
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
