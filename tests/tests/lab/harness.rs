//! Labs for tests, and the questions they ask.

use std::{
    path::Path,
    process::{Command, Output},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use lab::{
    apps::{steady::Progress, stream::Outcome},
    components::Options,
    control::{Lab, OwnedLab},
    protocol::Request,
};
use serde_json::Value;

/// The multi-call binary of this very build.
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_fairway-under-test");
/// How long a test waits for something to become true before it fails.
const PATIENCE: Duration = Duration::from_secs(30);

/// Pods a, a2 (same service account as a, same node) and outsider on node1; b with every server on node2.
pub(crate) const PODS: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: t}
---
apiVersion: v1
kind: Pod
metadata: {name: a, namespace: t}
spec:
  nodeName: node1
  serviceAccountName: a
  containers: [{name: steady, command: [fairway, app, steady, "b:9000"]}]
---
apiVersion: v1
kind: Pod
metadata: {name: a2, namespace: t}
spec:
  nodeName: node1
  serviceAccountName: a
  containers: [{name: idle, command: [fairway, app, idle]}]
---
apiVersion: v1
kind: Pod
metadata: {name: b, namespace: t, labels: {app: b}}
spec:
  nodeName: node2
  serviceAccountName: b
  containers:
  - {name: http, command: [fairway, app, http]}
  - {name: echo, command: [fairway, app, echo]}
  - {name: stream, command: [fairway, app, stream]}
  - {name: greet, command: [fairway, app, greet]}
---
apiVersion: v1
kind: Service
metadata: {name: b, namespace: t}
spec:
  selector: {app: b}
  ports:
  - {name: http, port: 80, targetPort: 8080}
  - {name: tcp-echo, port: 9000}
  - {name: tcp-stream, port: 9001}
  - {name: tcp-greet, port: 9002}
---
apiVersion: v1
kind: Pod
metadata: {name: outsider, namespace: elsewhere}
spec:
  nodeName: node1
  containers: [{name: idle, command: [fairway, app, idle]}]
"#;

/// Runs a test in a lab of its own, or says in one line why this machine cannot. With `FAIRWAY_CI=1` that is a failure.
pub(crate) fn in_lab(test: impl FnOnce(&OwnedLab) -> anyhow::Result<()>) {
    in_lab_of(&Options::default(), test);
}

fn in_lab_of(options: &Options, test: impl FnOnce(&OwnedLab) -> anyhow::Result<()>) {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    if let Err(refusal) = mesh_net::isolate::probe(Path::new(PROGRAM), &["lab-probe"]) {
        assert!(std::env::var("FAIRWAY_CI").is_err(), "this tier must run here, but {refusal}");
        println!("skipped: {refusal}");
        return;
    }
    let name = format!("test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let outcome =
        Lab::start_owned_with(Path::new(PROGRAM), &name, options).map_err(anyhow::Error::from).and_then(|lab| {
            let outcome = test(&lab);
            if outcome.is_err() {
                print_logs(&lab.lab);
            }
            outcome
        });
    if let Err(error) = outcome {
        panic!("{error:#}");
    }
}

fn print_logs(lab: &Lab) {
    for program in ["fairwayd", "agent/node1", "agent/node2", "ztunnel/node1", "ztunnel/node2", "cni"] {
        let request = Request::Logs { name: program.to_owned(), lines: 25 };
        println!("--- {program}\n{}", lab.ask(&request).map(|r| r.text).unwrap_or_default());
    }
}

/// [`in_lab`] with [`PODS`] applied and namespace `t` in the mesh.
pub(crate) fn in_mesh(test: impl FnOnce(&Lab) -> anyhow::Result<()>) {
    in_mesh_of(&Options::default(), test);
}

/// [`in_mesh`] in a lab with these options.
pub(crate) fn in_mesh_of(options: &Options, test: impl FnOnce(&Lab) -> anyhow::Result<()>) {
    in_lab_of(options, |owned| {
        let lab = &owned.lab;
        apply_pods(lab)?;
        enrol(lab)?;
        test(lab)
    });
}

pub(crate) fn apply(lab: &Lab, file: &str, text: &str) -> anyhow::Result<()> {
    lab.ask(&Request::Apply { file: file.to_owned(), text: text.to_owned() })?;
    Ok(())
}

/// Applies [`PODS`] and waits until the steady client is under way.
pub(crate) fn apply_pods(lab: &Lab) -> anyhow::Result<()> {
    apply(lab, "pods.yaml", PODS)?;
    eventually("the steady client's first ticks", || {
        ensure!(progress(lab)?.ticks > 2, "none yet");
        Ok(())
    })
}

pub(crate) fn label(lab: &Lab, value: Option<&str>) -> anyhow::Result<()> {
    let (key, value) = ("istio.io/dataplane-mode".to_owned(), value.map(str::to_owned));
    lab.ask(&Request::Label { namespace: "t".to_owned(), pod: None, key, value })?;
    Ok(())
}

/// Puts namespace `t` into the mesh and waits until its traffic is encrypted.
pub(crate) fn enrol(lab: &Lab) -> anyhow::Result<()> {
    label(lab, Some("ambient"))?;
    wait_enrolment(lab, "enabled")?;
    eventually("traffic to be encrypted", || {
        lab.mark()?;
        ensure!(get(lab, "t/a2", "http://b/x")?.contains("/x"), "wrong answer");
        let sight = lab.look(Some("GET /x"))?;
        ensure!(sight.found == 0 && sight.tls_bytes > 0, "still in clear");
        Ok(())
    })?;
    reconnect(lab)
}

pub(crate) fn wait_enrolment(lab: &Lab, wanted: &str) -> anyhow::Result<()> {
    eventually("enrolment", || {
        let pods = lab.status()?.pods;
        let other: Vec<_> = pods.iter().filter(|p| p.namespace == "t" && p.enrolment != wanted).collect();
        ensure!(other.is_empty(), "{} is `{}`, not `{wanted}`", other[0].name, other[0].enrolment);
        Ok(())
    })
}

/// Makes the steady client open a new connection.
pub(crate) fn reconnect(lab: &Lab) -> anyhow::Result<()> {
    let before = progress(lab)?.connections;
    lab.run("t/a", &["fairway", "app", "reconnect"])?;
    eventually("a new connection", || {
        let now = progress(lab)?;
        ensure!(now.connections > before && now.on_this_connection > 2, "not yet");
        Ok(())
    })
}

pub(crate) fn progress(lab: &Lab) -> anyhow::Result<Progress> {
    let text = lab.ask(&Request::Logs { name: "t/a".to_owned(), lines: 1 })?.text;
    serde_json::from_str(&text).with_context(|| format!("the steady client says {text:?}"))
}

/// The steady client's present connection lives and is used.
pub(crate) fn assert_still_used(lab: &Lab, since: &Progress) -> anyhow::Result<()> {
    eventually("the steady connection to be used", || {
        let now = progress(lab)?;
        ensure!(now.connections == since.connections, "it was cut: {:?}", now.last_error);
        ensure!(now.ticks > since.ticks + 3, "it is stuck");
        Ok(())
    })
}

/// One GET; an error carries what the client printed.
pub(crate) fn get(lab: &Lab, from: &str, url: &str) -> anyhow::Result<String> {
    let (code, text) = lab.run(from, &["fairway", "app", "get", url, "--timeout", "5"])?;
    ensure!(code == 0, "{}", text.trim());
    Ok(text)
}

pub(crate) fn transfer(lab: &Lab, from: &str, arguments: &[&str]) -> anyhow::Result<Outcome> {
    let command = [&["fairway", "app", "transfer"], arguments].concat();
    let (_, text) = lab.run(from, &command)?;
    let outcome: Outcome = serde_json::from_str(&text).with_context(|| format!("the client says {text:?}"))?;
    match &outcome.error {
        None => Ok(outcome),
        Some(error) => Err(anyhow::anyhow!("{}: {error}", arguments.join(" "))),
    }
}

/// Asks until the answer is good. The pause only spares the machine; nothing depends on its length.
pub(crate) fn eventually<T>(what: &str, mut ask: impl FnMut() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match ask() {
            Ok(answer) => return Ok(answer),
            Err(error) if Instant::now() > deadline => return Err(error.context(format!("waited in vain for {what}"))),
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// The answer of `fairway why`.
pub(crate) fn why(lab: &Lab, source: &str, destination: &str) -> anyhow::Result<Value> {
    let output = fairway(&["why", "--name", lab.name(), "-o", "json", source, destination]);
    serde_json::from_slice(&output.stdout).with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())
}

pub(crate) fn fairway(arguments: &[&str]) -> Output {
    Command::new(PROGRAM).args(arguments).output().expect("the program was built with this test")
}
