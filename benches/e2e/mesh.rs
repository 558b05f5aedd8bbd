//! Labs to measure in: clients on node1 and servers on node2, of one pair of pods outside the mesh, one inside, and two outside it with
//! a bare proxy between them.

use std::{
    net::Ipv4Addr,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use benches::pair::Engine;
use lab::{
    components::{Options, ZTUNNEL_STATS_PORT},
    control::{Lab, OwnedLab},
    protocol::{PodStatus, Request},
};
use mesh_runtime::metrics::cpu_seconds;

/// The multi-call binary of this very build.
const PROGRAM: &str = env!("CARGO_BIN_EXE_fairway-benched");
const NODES: [&str; 2] = ["node1", "node2"];
const PATIENCE: Duration = Duration::from_secs(30);
/// Where tunnels end.
const TUNNEL_PORT: u16 = 15008;
/// Of the servers: HTTP, streams, held connections.
const SERVER_PORTS: &str = "8080,9001,9003";

/// Where load comes from, and what is in its way.
pub(crate) struct Arm<'a> {
    pub(crate) name: &'static str,
    pub(crate) lab: &'a Lab,
    /// Of the client, who is called `client`; what it talks to is called `server`.
    namespace: &'static str,
    between: Between,
    /// Of a pair.
    certificates: String,
}

/// What connections go through, on node1 and on node2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Between {
    Nothing,
    Ztunnels,
    /// The containers of the pods `near` and `far`.
    Pair,
}

impl<'a> Arm<'a> {
    pub(crate) fn plain(lab: &'a Lab) -> Self {
        Self { name: "plain", lab, namespace: "plain", between: Between::Nothing, certificates: String::new() }
    }

    pub(crate) fn meshed(name: &'static str, lab: &'a Lab) -> Self {
        Self { name, lab, namespace: "meshed", between: Between::Ztunnels, certificates: String::new() }
    }

    /// Whether there are proxies to look at.
    pub(crate) fn is_proxied(&self) -> bool {
        self.between != Between::Nothing
    }

    fn pod(&self, name: &str) -> String {
        format!("{}/{name}", self.namespace)
    }

    /// What the client printed; an error when it failed.
    pub(crate) fn run(&self, command: &[&str]) -> anyhow::Result<String> {
        self.run_in("client", command)
    }

    /// In a pod beside the client, which has had no connection yet and so no tunnel.
    pub(crate) fn run_in_reader(&self, command: &[&str]) -> anyhow::Result<String> {
        self.run_in("reader", command)
    }

    fn run_in(&self, pod: &str, command: &[&str]) -> anyhow::Result<String> {
        let pod = self.pod(pod);
        let (code, text) = self.lab.run(&pod, command)?;
        ensure!(code == 0, "{} in {pod}: {}", command.join(" "), text.trim());
        Ok(text)
    }

    /// Starts afresh, without the tunnels and the memory of what was. Only bare proxies can.
    pub(crate) fn renew(&self) -> anyhow::Result<()> {
        if self.between != Between::Pair {
            return Ok(());
        }
        for half in ["near", "far"] {
            self.lab.ask(&Request::Delete { pod: Some(self.pod(half)), file: None })?;
        }
        start_pair(self)
    }

    /// CPU time that the proxies of both nodes have used; 0 without any.
    pub(crate) fn cpu(&self) -> anyhow::Result<f64> {
        if self.is_proxied() { Ok(self.usage()?.iter().map(|usage| usage.cpu_seconds).sum()) } else { Ok(0.0) }
    }

    /// Of the proxy of each node.
    pub(crate) fn usage(&self) -> anyhow::Result<[Usage; 2]> {
        let [first, second] = match self.between {
            Between::Nothing => bail!("{} has no proxies", self.name),
            Between::Ztunnels => NODES.map(|node| usage(self.lab, node)),
            Between::Pair => ["near", "far"].map(|half| {
                let process = *pod(self.lab, &self.pod(half))?.processes.first().context("it does not run")?;
                usage_by_proc(self.lab, &self.pod(half), process)
            }),
        };
        Ok([first?, second?])
    }

    /// Tunnels that carry what the reader pod asks for, as the kernel of node2 counts them.
    pub(crate) fn tunnels_of_reader(&self) -> anyhow::Result<usize> {
        // The mesh gives each pod its own tunnels, from the pod's address.
        let (from, to) = if self.between == Between::Pair { ("near", "far") } else { ("reader", "server") };
        let from = pod_address(self.lab, &self.pod(from))?;
        let (_, tables) = self.lab.run(&self.pod(to), &["cat", "/proc/net/tcp", "/proc/net/tcp6"])?;
        let (local, remote) = (format!(":{TUNNEL_PORT:04X}"), format!("{:08X}:", u32::from_ne_bytes(from.octets())));
        let is_tunnel = |line: &&str| {
            // Number, local and remote address, state; 01 is ESTABLISHED. IPv4 within IPv6 has the same last digits.
            let words: Vec<&str> = line.split_whitespace().collect();
            matches!(words[..], [_, at, by, "01", ..] if at.ends_with(&local) && by.contains(&remote))
        };
        Ok(tables.lines().filter(is_tunnel).count())
    }
}

fn pod(lab: &Lab, name: &str) -> anyhow::Result<PodStatus> {
    let found = lab.status()?.pods.into_iter().find(|pod| format!("{}/{}", pod.namespace, pod.name) == name);
    let found = found.with_context(|| format!("there is no pod {name}"))?;
    match &found.problem {
        Some(problem) => bail!("pod {name} does not run: {problem}"),
        None => Ok(found),
    }
}

fn pod_address(lab: &Lab, name: &str) -> anyhow::Result<Ipv4Addr> {
    let addresses = pod(lab, name)?.addresses;
    let parsed = addresses.iter().find_map(|address| address.parse().ok());
    parsed.with_context(|| format!("pod {name} has no IPv4 address: {addresses:?}"))
}

/// What a process has used so far.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    pub(crate) cpu_seconds: f64,
    pub(crate) resident_bytes: f64,
}

/// From the metrics where they tell, else from the kernel: not every ztunnel shows its process.
fn usage(lab: &Lab, node: &str) -> anyhow::Result<Usage> {
    let program = format!("ztunnel/{node}");
    let (_, metrics) = lab.get(&program, &format!("http://127.0.0.1:{ZTUNNEL_STATS_PORT}/metrics"))?;
    let shown = |name: &str| metrics.lines().find_map(|l| l.strip_prefix(name)?.trim().parse::<f64>().ok());
    match (shown("process_cpu_seconds_total "), shown("process_resident_memory_bytes ")) {
        (Some(cpu_seconds), Some(resident_bytes)) => Ok(Usage { cpu_seconds, resident_bytes }),
        _ => {
            let programs = lab.status()?.programs;
            let process = programs.iter().find(|p| p.name == program).context("the ztunnel is gone")?.process;
            usage_by_proc(lab, &format!("node/{node}"), process)
        }
    }
}

/// Of a process, looked at from `place`.
fn usage_by_proc(lab: &Lab, place: &str, process: u32) -> anyhow::Result<Usage> {
    let read = |file: &str| lab.run(place, &["cat", &format!("/proc/{process}/{file}")]);
    let cpu_seconds = cpu_seconds(&read("stat")?.1).with_context(|| format!("no CPU time of {place}'s proxy"))?;
    let status = read("status")?.1;
    let resident =
        status.lines().find_map(|l| l.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse::<f64>().ok());
    let resident = resident.with_context(|| format!("no size of {place}'s proxy"))?;
    Ok(Usage { cpu_seconds, resident_bytes: resident * 1024.0 })
}

/// Whether this machine can run a lab.
pub(crate) fn probe() -> anyhow::Result<()> {
    mesh_net::isolate::probe(Path::new(PROGRAM), &["lab-probe"]).map_err(|refusal| anyhow::anyhow!("{refusal}"))
}

/// A lab with a pair of pods outside the mesh and one inside, the one's traffic proved to be clear and the other's to be encrypted.
pub(crate) fn start(name: &str, ztunnel: Option<&Path>) -> anyhow::Result<OwnedLab> {
    let ztunnel = ztunnel.map(|path| path.canonicalize().with_context(|| format!("no ztunnel at {}", path.display())));
    let ztunnel = ztunnel.transpose()?;
    let ztunnels = ztunnel.iter().flat_map(|path| NODES.map(|node| (node.to_owned(), path.clone()))).collect();
    let options = Options { ztunnels, certificate_ttl: "24h".to_owned(), ..Options::default() };
    let owned = Lab::start_owned_with(Path::new(PROGRAM), &format!("bench-{}-{name}", std::process::id()), &options)?;
    let lab = &owned.lab;
    let text = [namespace("plain", ""), namespace("meshed", ", labels: {istio.io/dataplane-mode: ambient}")].concat();
    lab.ask(&Request::Apply { file: "bench.yaml".to_owned(), text })?;
    for (arm, encrypted) in [(Arm::plain(lab), false), (Arm::meshed("mesh", lab), true)] {
        eventually(|| expect_on_the_wire(&arm, encrypted))
            .with_context(|| format!("in the lab {name}, {} never became ready", arm.pod("client")))?;
        reuse_ports(&arm, &["client", "server"]);
    }
    spare_the_recorder(lab);
    Ok(owned)
}

/// Adds pods outside the mesh with a bare proxy between them, which finds its certificates in that folder.
pub(crate) fn add_pair<'a>(lab: &'a Lab, engine: Engine, certificates: &Path) -> anyhow::Result<Arm<'a>> {
    let certificates = certificates.to_str().context("the certificates' folder has a strange name")?.to_owned();
    let arm = Arm { name: engine.name(), lab, namespace: engine.name(), between: Between::Pair, certificates };
    let namespace = format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {}}}\n---\n", arm.namespace);
    let ends = [namespace, idle_pods(arm.namespace), server_pod(arm.namespace)].concat();
    lab.ask(&Request::Apply { file: format!("{}-ends.yaml", arm.name), text: ends })?;
    start_pair(&arm)?;
    Ok(arm)
}

/// Starts the halves. The near one is what clients know as `server`.
fn start_pair(arm: &Arm<'_>) -> anyhow::Result<()> {
    let Arm { name, lab, namespace, certificates, .. } = arm;
    let apply = |half: &str, text: String| lab.ask(&Request::Apply { file: format!("{name}-{half}.yaml"), text });
    let command = format!("far, --engine, {name}, --listen, \"{TUNNEL_PORT}\", --certificates, \"{certificates}\"");
    apply("far", proxy_pod(namespace, "far", NODES[1], &command))?;
    let (target, far) = (pod_address(lab, &arm.pod("server"))?, pod_address(lab, &arm.pod("far"))?);
    let command = format!(
        "near, --engine, {name}, --listen, \"{SERVER_PORTS}\", --far, \"{far}:{TUNNEL_PORT}\", --target, \"{target}\", \
         --certificates, \"{certificates}\""
    );
    apply("near", proxy_pod(namespace, "near", NODES[0], &command) + &service(namespace, "near"))?;
    eventually(|| expect_on_the_wire(arm, true)).with_context(|| format!("the pair {name} never became ready"))?;
    reuse_ports(arm, &["client", "near", "far", "server"]);
    Ok(())
}

fn namespace(name: &str, labels: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Namespace
metadata: {{name: {name}{labels}}}
---
{}{}{}",
        idle_pods(name),
        server_pod(name),
        service(name, "server")
    )
}

/// Which run what they are told to.
fn idle_pods(namespace: &str) -> String {
    let pod = |name: &str| {
        format!(
            "
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}}}
spec:
  nodeName: node1
  serviceAccountName: client
  containers: [{{name: idle, command: [fairway, app, idle]}}]
---
"
        )
    };
    ["client", "reader"].map(pod).concat()
}

fn server_pod(namespace: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: server, namespace: {namespace}, labels: {{app: server}}}}
spec:
  nodeName: node2
  serviceAccountName: server
  containers:
  - {{name: http, command: [fairway, app, http]}}
  - {{name: stream, command: [fairway, app, stream]}}
  - {{name: hold, command: [fairway, app, hold]}}
---
"
    )
}

/// `command` in YAML's words.
fn proxy_pod(namespace: &str, name: &str, node: &str, command: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}
spec:
  nodeName: {node}
  serviceAccountName: {name}
  containers: [{{name: proxy, command: [fairway, pair, {command}]}}]
---
"
    )
}

/// Called `server`, whoever answers.
fn service(namespace: &str, app: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Service
metadata: {{name: server, namespace: {namespace}}}
spec:
  selector: {{app: {app}}}
  ports:
  - {{name: http, port: 80, targetPort: 8080}}
  - {{name: tcp-stream, port: 9001}}
  - {{name: tcp-hold, port: 9003}}
---
"
    )
}

fn expect_on_the_wire(arm: &Arm<'_>, encrypted: bool) -> anyhow::Result<()> {
    arm.lab.mark()?;
    arm.run(&["fairway", "app", "get", "http://server/wire-check", "--timeout", "2"])?;
    let sight = arm.lab.look(Some("GET /wire-check"))?;
    ensure!((sight.found == 0) == encrypted, "the request was found {} times in clear", sight.found);
    ensure!(!encrypted || sight.tls_bytes > 0, "nothing was encrypted");
    Ok(())
}

fn eventually(mut ask: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match ask() {
            Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(50)),
            outcome => return outcome,
        }
    }
}

/// Loads that open a connection per request would run out of ports within a minute of TIME_WAIT. On all sides: the mesh connects to
/// the server from the client's address, inside the server's pod.
fn reuse_ports(arm: &Arm<'_>, pods: &[&str]) {
    const SETTINGS: &str =
        "echo 1 > /proc/sys/net/ipv4/tcp_tw_reuse; echo 1024 65535 > /proc/sys/net/ipv4/ip_local_port_range";
    for pod in pods.iter().map(|name| arm.pod(name)) {
        let set = arm.lab.run(&pod, &["sh", "-c", SETTINGS]);
        if !set.is_ok_and(|(code, _)| code == 0) {
            eprintln!("{pod}: ports are not reused soon; many new connections may fail");
        }
    }
}

/// The lab records every frame between the nodes, which competes with what is measured. At idle priority it takes only what is left,
/// and the kernel drops the frames it does not get to.
fn spare_the_recorder(lab: &Lab) {
    const DEMOTE: &str = r#"for task in /proc/[0-9]*/task/[0-9]*; do
        if [ "$(cat $task/comm)" = wire ]; then chrt --idle --pid 0 ${task##*/} && done=yes; fi
    done; test "$done""#;
    let demoted = lab.run("node/node1", &["sh", "-c", DEMOTE]);
    if !demoted.is_ok_and(|(code, _)| code == 0) {
        eprintln!("{}: the wire's recorder could not be slowed down; it takes part of every figure", lab.name());
    }
}
