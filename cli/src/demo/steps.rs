//! The eleven steps.

use std::{
    collections::BTreeSet,
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, bail, ensure};
use lab::{
    apps::{load::Report, stream::Outcome},
    control::Lab,
    protocol::{Fault, Request, Wire},
};

use super::{Evidence, Printer, certificates, eventually, load, pod, progress};
use crate::{args, output, why};

const MANIFEST: &str = include_str!("manifest.yaml");
const POLICY: &str = include_str!("policy.yaml");
const STRICT: &str = include_str!("strict.yaml");
const AMBIENT: &str = "istio.io/dataplane-mode";

pub(super) fn run(lab: &Lab, report: &mut Printer, options: &args::Demo, started: Instant) {
    report.step(1, "Two nodes, pods and applications are up", || up(lab, started));
    report.step(2, "Before: what pods say is readable on the wire", || before(lab));
    report.step(3, "The namespace is labelled; nothing is restarted, nothing is cut", || switch_on(lab));
    report.step(4, "After: every byte on the wire is TLS, and both ends know each other", || after(lab, options));
    report.step(5, "Policy by identity, and STRICT", || policy(lab));
    report.step(6, "The CA refuses an identity that the asking node does not host", || foreign_identity(lab));
    report.step(7, "Certificates of 10 s rotate under a live flow", || rotation(lab));
    report.step(8, "The control plane is killed; traffic goes on", || without_control_plane(lab));
    report.step(9, "A ztunnel is killed with SIGKILL during a download", || kill_ztunnel(lab));
    // Measured while both ways exist; shown last.
    let figures = measure(lab);
    report.step(10, "The label is removed; the mesh leaves no trace", || switch_off(lab));
    report.step(11, "What it costs", || Ok(vec![figures?]));
}

fn up(lab: &Lab, started: Instant) -> Evidence {
    let mesh = started.elapsed();
    let pods_from = Instant::now();
    lab.ask(&Request::Apply { file: "demo.yaml".to_owned(), text: MANIFEST.to_owned() })?;
    let status = lab.status()?;
    eventually("the client's first ticks", || {
        ensure!(progress(lab)?.ticks > 3, "no ticks yet");
        Ok(())
    })?;
    Ok(vec![format!(
        "{} nodes with ztunnel, agent and control plane in {}; {} pods in {}",
        status.nodes.len(),
        output::took(mesh),
        status.pods.len(),
        output::took(pods_from.elapsed())
    )])
}

fn before(lab: &Lab) -> Evidence {
    lab.mark()?;
    let nonce = nonce();
    fetch(lab, "demo/client", "server", &nonce)?;
    let sight = eventually("the request on the wire", || {
        let sight = lab.look(Some(&nonce))?;
        ensure!(sight.found > 0, "the nonce was not seen on the wire: the capture does not work");
        Ok(sight)
    })?;
    Ok(vec![format!(
        "nonce {nonce} found {} times between the nodes: {}",
        sight.found,
        sight.excerpt.unwrap_or_default()
    )])
}

fn switch_on(lab: &Lab) -> Evidence {
    let (pids, flow) = (processes(lab)?, progress(lab)?);
    let started = Instant::now();
    label(lab, Some("ambient"))?;
    eventually("every pod of the namespace to be enrolled", || {
        let pods = lab.status()?.pods;
        let waiting: Vec<_> = pods.iter().filter(|p| p.namespace == "demo" && p.enrolment != "enabled").collect();
        ensure!(waiting.is_empty(), "{} is `{}`", waiting[0].name, waiting[0].enrolment);
        Ok(())
    })?;
    let enrolled = started.elapsed();
    let first = eventually("the first encrypted request", || {
        lab.mark()?;
        let nonce = nonce();
        fetch(lab, "demo/client", "server", &nonce)?;
        let sight = lab.look(Some(&nonce))?;
        ensure!(sight.found == 0 && sight.tls_bytes > 0, "requests still cross in clear");
        Ok(started.elapsed())
    })?;
    let old = eventually("the old connection to be used", || {
        let now = progress(lab)?;
        ensure!(now.connections == flow.connections, "the connection opened before was cut: {:?}", now.last_error);
        ensure!(now.ticks > flow.ticks + 5, "the connection opened before is stuck at tick {}", now.ticks);
        Ok(now)
    })?;
    ensure!(processes(lab)? == pids, "process ids changed");
    // From here on everything is to be new, as connection pools make it in time.
    reconnect(lab)?;
    Ok(vec![
        format!(
            "{} pods enrolled in {}, requests encrypted after {}",
            pids.len() - 2,
            output::took(enrolled),
            output::took(first)
        ),
        format!(
            "process ids unchanged; the connection opened before ({}) carried ticks {}…{}",
            old.local.map(|a| a.to_string()).unwrap_or_default(),
            flow.ticks,
            old.ticks
        ),
    ])
}

fn after(lab: &Lab, options: &args::Demo) -> Evidence {
    lab.mark()?;
    let nonce = nonce();
    let tick = progress(lab)?.ticks;
    fetch(lab, "demo/client", "server", &nonce)?;
    eventually("ticks through the tunnel", || {
        ensure!(progress(lab)?.ticks > tick + 5, "the steady client is stuck");
        Ok(())
    })?;
    let sight = lab.look(Some(&nonce))?;
    ensure!(sight.lost == 0, "the capture lost {} frames, so absence proves nothing", sight.lost);
    ensure!(sight.found == 0, "the nonce was found {} times: {}", sight.found, sight.excerpt.unwrap_or_default());
    ensure!(
        sight.clear_bytes == 0,
        "{} bytes in clear, for instance {}",
        sight.clear_bytes,
        sight.clear_example.unwrap_or_default()
    );
    ensure!(sight.tls_bytes > 0, "nothing crossed the wire");
    if let Some(file) = &options.pcap {
        let file = std::path::absolute(file)?.display().to_string();
        lab.ask(&Request::Wire(Wire::Pcap { file }))?;
    }
    let line = eventually("the far ztunnel's access log", || {
        let log = lab.ask(&Request::Logs { name: "ztunnel/node2".to_owned(), lines: 200 })?.text;
        let wanted = |l: &&str| {
            l.contains("connection complete")
                && l.contains("inbound")
                && l.contains("sa/client")
                && l.contains("sa/server")
        };
        log.lines().rev().find(wanted).map(str::to_owned).context("no access log line with both identities yet")
    })?;
    let field = |name: &str| {
        line.split(&format!("{name}=")).nth(1).and_then(|r| r.split_whitespace().next()).unwrap_or("?").to_owned()
    };
    Ok(vec![
        format!("nonce {nonce} found 0 times; {} payload bytes, all in TLS records to port 15008", sight.tls_bytes),
        format!(
            "ztunnel on node2: who called {}, who answered {}, {} bytes back in {}",
            field("src.identity"),
            field("dst.identity"),
            field("bytes_sent"),
            field("duration")
        ),
    ])
}

fn policy(lab: &Lab) -> Evidence {
    lab.ask(&Request::Apply { file: "policy.yaml".to_owned(), text: POLICY.to_owned() })?;
    eventually("the policy to refuse the visitor", || {
        ensure!(fetch(lab, "demo/visitor", "server", "x").is_err(), "the visitor still gets through");
        Ok(())
    })?;
    fetch(lab, "demo/client", "server", "x").context("the client, which the policy allows, was refused")?;
    let verdict = why::explain(lab, "demo/visitor", "demo/server:80")?;
    let text = verdict.text();
    for wanted in ["only-the-client", "policy.yaml:", "spec.rules"] {
        ensure!(text.contains(wanted), "`fairway why` does not name {wanted}: {text}");
    }
    fetch(lab, "outside/outsider", "corner.demo", "x").context("PERMISSIVE: a pod outside the mesh was refused")?;
    lab.ask(&Request::Apply { file: "strict.yaml".to_owned(), text: STRICT.to_owned() })?;
    eventually("STRICT to refuse a pod outside the mesh", || {
        ensure!(fetch(lab, "outside/outsider", "corner.demo", "x").is_err(), "clear text is still accepted");
        Ok(())
    })?;
    fetch(lab, "demo/late", "corner", "x").context("STRICT: a pod inside the mesh was refused")?;
    Ok(vec![
        "client allowed, visitor refused".to_owned(),
        format!("fairway why demo/visitor demo/server:80\n  {}", text.replace('\n', "\n  ")),
        "STRICT: outside/outsider was heard by demo/corner before, and is refused now".to_owned(),
    ])
}

fn foreign_identity(lab: &Lab) -> Evidence {
    let ask = |account: &str| {
        let identity = format!("spiffe://cluster.local/ns/demo/sa/{account}");
        let base = ["fairway", "debug", "request-certificate", "--address", "https://172.18.0.2:15012"];
        let files =
            ["--root", "/run/fairway/state/root-cert.pem", "--token", "/run/fairway/nodes/node1/token", &identity];
        lab.run("node/node1", &[&base[..], &files[..]].concat())
    };
    let (code, own) = ask("client")?;
    ensure!(code == 0, "node1 was refused the identity of a pod that it does host: {}", own.trim());
    let (code, foreign) = ask("server")?;
    ensure!(code != 0, "node1 got a certificate for an identity of node2");
    Ok(vec![format!(
        "node1 asks for sa/client, which it hosts: issued; for sa/server, which node2 hosts: {}",
        foreign.trim()
    )])
}

fn rotation(lab: &Lab) -> Evidence {
    let flow = progress(lab)?;
    let (started, mut serials) = (Instant::now(), BTreeSet::new());
    while serials.len() < 4 {
        let all = certificates(lab, "node1")?;
        serials.extend(
            all.into_iter().filter(|(identity, ..)| identity.ends_with("/sa/client")).map(|(_, serial, _)| serial),
        );
        ensure!(started.elapsed() < Duration::from_secs(45), "only {} certificates in 45 s", serials.len());
        thread::sleep(Duration::from_millis(100));
    }
    let now = progress(lab)?;
    ensure!(now.connections == flow.connections, "the live flow was cut: {:?}", now.last_error);
    // The next steps take the control plane away; a mesh that is not a demo has certificates of a day.
    lab.ask(&Request::Fault(Fault::CertificateTtl { ttl: "1h".to_owned() }))?;
    eventually("certificates of an hour", || {
        let soon = SystemTime::now() + Duration::from_secs(600);
        for node in ["node1", "node2"] {
            for (identity, _, expiry) in certificates(lab, node)? {
                let expiry = humantime::parse_rfc3339_weak(&expiry)?;
                ensure!(expiry > soon, "{identity} on {node} still has a short one");
            }
        }
        Ok(())
    })?;
    Ok(vec![format!(
        "{} certificates of sa/client in {}; one connection throughout, {} ticks on it",
        serials.len(),
        output::took(started.elapsed()),
        now.on_this_connection
    )])
}

fn without_control_plane(lab: &Lab) -> Evidence {
    let flow = progress(lab)?;
    lab.ask(&Request::Fault(Fault::Kill { program: "fairwayd".to_owned(), restart: false }))?;
    fetch(lab, "demo/client", "server", "x").context("a new connection of a known pair failed")?;
    fetch(lab, "demo/visitor", "corner", "x").context("a pair that never spoke before failed")?;
    let now = eventually("the open connection to go on", || {
        let now = progress(lab)?;
        ensure!(now.ticks > flow.ticks + 5, "the steady client is stuck");
        Ok(now)
    })?;
    ensure!(now.connections == flow.connections, "the open connection was cut: {:?}", now.last_error);
    lab.ask(&Request::Fault(Fault::Start { program: "fairwayd".to_owned() }))?;
    lab.ask(&Request::Ready { program: "fairwayd".to_owned() })?;
    let resent = eventually("both ztunnels to come back", || {
        let (_, metrics) = lab.get("control", "http://127.0.0.1:15014/metrics")?;
        let value = |outcome: &str| -> f64 {
            let line = format!("fairwayd_xds_initial_resources_total{{outcome=\"{outcome}\"}}");
            metrics.lines().find_map(|l| l.strip_prefix(&line)?.trim().parse().ok()).unwrap_or(0.0)
        };
        let (sent, unchanged) = (value("sent"), value("unchanged"));
        ensure!(unchanged > 0.0, "no ztunnel has resynchronised yet");
        Ok((sent, unchanged))
    })?;
    ensure!(resent.0 == 0.0, "the resync sent {} resources that the ztunnels had", resent.0);
    Ok(vec![
        "without it: the open connection, new connections, and demo/visitor → demo/corner, which never spoke before"
            .to_owned(),
        format!("it returned: 0 of {} resources were sent again", resent.1),
    ])
}

fn kill_ztunnel(lab: &Lab) -> Evidence {
    lab.mark()?;
    let download = {
        let lab = lab.clone();
        thread::spawn(move || {
            lab.run("demo/client", &["fairway", "app", "transfer", "download", "server:9001", "--bytes", "3000000000"])
        })
    };
    eventually("the download to be under way", || {
        ensure!(lab.look(None)?.tls_bytes > 2_000_000, "no bytes yet");
        Ok(())
    })?;
    let killed = Instant::now();
    lab.ask(&Request::Fault(Fault::Kill { program: "ztunnel/node2".to_owned(), restart: true }))?;
    eventually("requests to succeed again", || fetch(lab, "demo/client", "server", "x"))?;
    let recovered = killed.elapsed();
    let (_, text) = download.join().map_err(|_| anyhow::anyhow!("the download's thread panicked"))??;
    let outcome: Outcome = serde_json::from_str(&text).with_context(|| text.clone())?;
    let broke = outcome.error.context("the download survived the death of its proxy, which cannot be")?;
    eventually("the steady client to be back", || {
        ensure!(progress(lab)?.on_this_connection > 3, "the steady client has not reconnected");
        Ok(())
    })?;
    let sight = lab.look(None)?;
    ensure!(
        sight.clear_bytes == 0,
        "{} bytes in clear, for instance {}",
        sight.clear_bytes,
        sight.clear_example.unwrap_or_default()
    );
    Ok(vec![
        format!("the download broke ({broke}); new requests succeed {} after the kill", output::took(recovered)),
        "nothing crossed the wire in clear meanwhile".to_owned(),
    ])
}

fn measure(lab: &Lab) -> anyhow::Result<String> {
    let mut rows = Vec::new();
    for (what, connections, new) in
        [("keep-alive × 1", 1, false), ("keep-alive × 16", 16, false), ("new connection each", 8, true)]
    {
        let direct = load(lab, "outside/outsider", "bystander:80", connections, 1.0, new)?;
        let mesh = load(lab, "demo/client", "server:80", connections, 1.0, new)?;
        for (way, r) in [("direct", direct), ("mesh", mesh)] {
            ensure!(
                r.requests > 0 && r.errors == 0,
                "{what}, {way}: {} requests, {} errors {:?}",
                r.requests,
                r.errors,
                r.first_error
            );
            rows.push(figures(what, way, &r));
        }
    }
    Ok(output::table(&["LOAD", "WAY", "REQUESTS/S", "P50", "P99"], rows).to_string())
}

fn figures(what: &str, way: &str, r: &Report) -> Vec<String> {
    vec![
        what.to_owned(),
        way.to_owned(),
        format!("{:.0}", r.per_second()),
        output::microseconds(r.p50_us),
        output::microseconds(r.p99_us),
    ]
}

fn switch_off(lab: &Lab) -> Evidence {
    let (pids, flow) = (processes(lab)?, progress(lab)?);
    label(lab, None)?;
    eventually("every pod to leave the mesh", || {
        let pods = lab.status()?.pods;
        let left: Vec<_> = pods.iter().filter(|p| !p.enrolment.is_empty()).collect();
        ensure!(left.is_empty(), "{} is still `{}`", left[0].name, left[0].enrolment);
        Ok(())
    })?;
    let now = progress(lab)?;
    ensure!(now.connections == flow.connections, "a captured connection was cut: {:?}", now.last_error);
    eventually("requests in clear again", || {
        lab.mark()?;
        let nonce = nonce();
        fetch(lab, "demo/client", "server", &nonce)?;
        ensure!(lab.look(Some(&nonce))?.found > 0, "requests are still captured");
        Ok(())
    })?;
    reconnect(lab)?;
    let mut left = Vec::new();
    eventually("the rules to be gone", || {
        left.clear();
        for name in ["client", "server", "visitor", "late", "corner"] {
            let traces = lab.ask(&Request::Inventory { target: format!("demo/{name}") })?.text;
            left.extend(
                traces
                    .lines()
                    .filter(|l| l.contains("istio") || l.contains("table 100"))
                    .map(|l| format!("{name}: {l}")),
            );
        }
        if left.is_empty() {
            return Ok(());
        }
        // What a pod that leaves waits for.
        let (_, sockets) = lab.run("demo/client", &["cat", "/proc/net/tcp", "/proc/net/tcp6"])?;
        bail!("left behind: {}\nThe client's sockets:\n{sockets}", left.join("; "));
    })?;
    ensure!(processes(lab)? == pids, "process ids changed");
    Ok(vec![
        format!("capture gone, no rule and no route left in any pod; process ids unchanged ({} processes)", pids.len()),
        "the captured connection went on until the application closed it; requests are readable on the wire again"
            .to_owned(),
    ])
}

// --- little helpers

fn nonce() -> String {
    let bytes = std::collections::hash_map::RandomState::new();
    let n = std::hash::BuildHasher::hash_one(&bytes, SystemTime::now());
    format!("nonce-{n:016x}")
}

/// One request on a connection of its own.
fn fetch(lab: &Lab, from: &str, host: &str, path: &str) -> anyhow::Result<()> {
    let url = format!("http://{host}/{path}");
    let (code, text) = lab.run(from, &["fairway", "app", "get", &url, "--timeout", "3"])?;
    ensure!(code == 0, "{}", text.trim());
    ensure!(text.contains(path), "the answer is not to the question: {text}");
    Ok(())
}

fn processes(lab: &Lab) -> anyhow::Result<Vec<(String, Vec<u32>)>> {
    let pods = lab.status()?.pods;
    pod(&pods, "demo", "client")?;
    Ok(pods.into_iter().map(|p| (format!("{}/{}", p.namespace, p.name), p.processes)).collect())
}

fn label(lab: &Lab, value: Option<&str>) -> anyhow::Result<()> {
    let value = value.map(str::to_owned);
    lab.ask(&Request::Label { namespace: "demo".to_owned(), pod: None, key: AMBIENT.to_owned(), value })?;
    Ok(())
}

/// Makes the steady client open a new connection, and waits until it uses it.
fn reconnect(lab: &Lab) -> anyhow::Result<()> {
    let before = progress(lab)?.connections;
    lab.run("demo/client", &["fairway", "app", "reconnect"])?;
    eventually("the steady client's new connection", || {
        let now = progress(lab)?;
        ensure!(now.connections > before && now.on_this_connection > 3, "still on connection {}", now.connections);
        Ok(())
    })
}
