//! Labs to measure in: a pair of pods outside the mesh and a pair inside, clients on node1 and servers on node2.

use std::{
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use lab::{
    components::{Options, ZTUNNEL_STATS_PORT},
    control::{Lab, OwnedLab},
    protocol::Request,
};
use mesh_runtime::metrics::cpu_seconds;

/// The multi-call binary of this very build.
const PROGRAM: &str = env!("CARGO_BIN_EXE_fairway-benched");
const NODES: [&str; 2] = ["node1", "node2"];
const PATIENCE: Duration = Duration::from_secs(30);

/// Where load comes from, and whether a mesh is in its way.
pub(crate) struct Arm<'a> {
    pub(crate) name: &'static str,
    pub(crate) lab: &'a Lab,
    /// `namespace/name` of the client; its server is called `server`.
    pub(crate) client: &'static str,
    pub(crate) meshed: bool,
}

impl<'a> Arm<'a> {
    pub(crate) fn plain(lab: &'a Lab) -> Self {
        Self { name: "plain", lab, client: "plain/client", meshed: false }
    }

    pub(crate) fn meshed(name: &'static str, lab: &'a Lab) -> Self {
        Self { name, lab, client: "meshed/client", meshed: true }
    }

    /// What the client printed; an error when it failed.
    pub(crate) fn run(&self, command: &[&str]) -> anyhow::Result<String> {
        let (code, text) = self.lab.run(self.client, command)?;
        ensure!(code == 0, "{} in {}: {}", command.join(" "), self.client, text.trim());
        Ok(text)
    }

    /// CPU time that the ztunnels of both nodes have used; 0 outside the mesh.
    pub(crate) fn cpu(&self) -> anyhow::Result<f64> {
        if self.meshed { Ok(self.usage()?.iter().map(|usage| usage.cpu_seconds).sum()) } else { Ok(0.0) }
    }

    /// Of the ztunnel of each node.
    pub(crate) fn usage(&self) -> anyhow::Result<[Usage; 2]> {
        let [first, second] = NODES.map(|node| usage(self.lab, node));
        Ok([first?, second?])
    }
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
        _ => usage_by_proc(lab, node, &program),
    }
}

fn usage_by_proc(lab: &Lab, node: &str, program: &str) -> anyhow::Result<Usage> {
    let programs = lab.status()?.programs;
    let process = programs.iter().find(|p| p.name == program).context("the ztunnel is gone")?.process;
    let read = |file: &str| lab.run(&format!("node/{node}"), &["cat", &format!("/proc/{process}/{file}")]);
    let cpu_seconds = cpu_seconds(&read("stat")?.1).with_context(|| format!("no CPU time of {program}"))?;
    let status = read("status")?.1;
    let resident =
        status.lines().find_map(|l| l.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse::<f64>().ok());
    Ok(Usage { cpu_seconds, resident_bytes: resident.with_context(|| format!("no size of {program}"))? * 1024.0 })
}

/// Whether this machine can run a lab.
pub(crate) fn probe() -> anyhow::Result<()> {
    mesh_net::isolate::probe(Path::new(PROGRAM), &["lab-probe"]).map_err(|refusal| anyhow::anyhow!("{refusal}"))
}

/// A lab with both pairs, the one traffic proved to be clear and the other to be encrypted.
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
            .with_context(|| format!("in the lab {name}, {} never became ready", arm.client))?;
        reuse_ports(&arm);
    }
    spare_the_recorder(lab);
    Ok(owned)
}

fn namespace(name: &str, labels: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Namespace
metadata: {{name: {name}{labels}}}
---
apiVersion: v1
kind: Pod
metadata: {{name: client, namespace: {name}}}
spec:
  nodeName: node1
  serviceAccountName: client
  containers: [{{name: idle, command: [fairway, app, idle]}}]
---
apiVersion: v1
kind: Pod
metadata: {{name: server, namespace: {name}, labels: {{app: server}}}}
spec:
  nodeName: node2
  serviceAccountName: server
  containers:
  - {{name: http, command: [fairway, app, http]}}
  - {{name: stream, command: [fairway, app, stream]}}
  - {{name: hold, command: [fairway, app, hold]}}
---
apiVersion: v1
kind: Service
metadata: {{name: server, namespace: {name}}}
spec:
  selector: {{app: server}}
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

/// Loads that open a connection per request would run out of ports within a minute of TIME_WAIT. On both sides: the mesh connects to
/// the server from the client's address, inside the server's pod.
fn reuse_ports(arm: &Arm<'_>) {
    const SETTINGS: &str =
        "echo 1 > /proc/sys/net/ipv4/tcp_tw_reuse; echo 1024 65535 > /proc/sys/net/ipv4/ip_local_port_range";
    for pod in [arm.client.to_owned(), arm.client.replace("client", "server")] {
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
