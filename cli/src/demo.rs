//! `fairway demo`: the mesh switched on under running pods, as numbered steps with a line of evidence each. A step that is not as
//! promised makes the exit status non-zero.

mod steps;

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use lab::{
    apps::{load::Report, steady::Progress},
    components::Options,
    control::Lab,
    protocol::{PodStatus, Request},
};
use mesh_net::isolate::{Refusal, probe};
use serde_json::{Value, json};

use crate::{args, loopback, output};

/// How long the demo waits for a change to take effect before it calls the promise broken.
pub(crate) const PATIENCE: Duration = Duration::from_secs(15);

pub(crate) fn run(options: &args::Demo) -> anyhow::Result<ExitCode> {
    let refusal = if options.loopback { None } else { refusal() };
    let mut report = Printer { json: options.json, failed: 0, started: Instant::now() };
    if options.loopback || refusal.is_some() {
        if let Some(refusal) = refusal {
            report.note(&format!("no namespaces here: {refusal}"));
        }
        report
            .note("running on loopback with SOCKS5 capture instead: identity and policy, without transparent capture");
        loopback::run(&mut report)?;
        return Ok(report.finish());
    }
    let name = if options.keep { "default".to_owned() } else { format!("demo-{}", std::process::id()) };
    let ztunnels = options.ztunnel.clone();
    let lab_options = Options { certificate_ttl: "10s".to_owned(), ztunnels, ..Options::default() };
    let started = Instant::now();
    if options.keep {
        let lab = Lab::start(&name, &lab_options)?;
        steps::run(&lab, &mut report, options, started);
        report.note("the lab stays up:");
        for line in KEPT {
            report.note(&format!("  {line}"));
        }
        for (page, url) in lab.status()?.urls {
            report.note(&format!("  {page}: {url}{}", if page.ends_with("metrics") { "/metrics" } else { "" }));
        }
    } else {
        let owned = Lab::start_owned(&name, &lab_options)?;
        steps::run(&owned.lab, &mut report, options, started);
        owned.lab.down()?;
    }
    Ok(report.finish())
}

const KEPT: [&str; 5] = [
    "cargo lab pods",
    "cargo lab label demo istio.io/dataplane-mode=ambient",
    "cargo lab exec demo/client -- fairway app get http://server/hello",
    "cargo fairway why demo/visitor demo/server:80",
    "cargo lab down",
];

/// Why this kernel cannot run a lab, if it cannot.
pub(crate) fn refusal() -> Option<Refusal> {
    let program = std::env::current_exe().ok()?;
    probe(&program, &["lab-probe"]).err()
}

/// What one step showed.
pub(crate) type Evidence = anyhow::Result<Vec<String>>;

/// Prints steps, counts the broken ones.
pub(crate) struct Printer {
    json: bool,
    failed: usize,
    started: Instant,
}

impl Printer {
    /// Runs one step and reports it; a failed one does not stop the demo.
    pub(crate) fn step(&mut self, number: usize, title: &str, run: impl FnOnce() -> Evidence) {
        let started = Instant::now();
        let outcome = run();
        let took = started.elapsed();
        self.failed += usize::from(outcome.is_err());
        if self.json {
            let (ok, evidence) = match &outcome {
                Ok(lines) => (true, json!(lines)),
                Err(error) => (false, json!([format!("{error:#}")])),
            };
            let seconds = took.as_secs_f64();
            crate::output::say!(
                "{}",
                json!({"step": number, "title": title, "ok": ok, "seconds": seconds, "evidence": evidence})
            );
            return;
        }
        let mark = if outcome.is_ok() { output::good("ok") } else { output::bad("NOT AS PROMISED") };
        crate::output::say!("{number:>3}. {title}  {mark} {}", output::dim(&format!("({})", output::took(took))));
        let lines = outcome.unwrap_or_else(|error| vec![format!("{error:#}")]);
        lines.iter().flat_map(|l| l.lines()).for_each(|line| crate::output::say!("       {line}"));
    }

    pub(crate) fn note(&self, text: &str) {
        if self.json {
            crate::output::say!("{}", json!({"note": text}));
        } else {
            crate::output::say!("     {text}");
        }
    }

    fn finish(&self) -> ExitCode {
        let total = output::took(self.started.elapsed());
        if self.failed == 0 {
            self.note(&format!("every step as promised ({total})"));
            return ExitCode::SUCCESS;
        }
        self.note(&format!("{} step(s) not as promised ({total})", self.failed));
        ExitCode::FAILURE
    }
}

/// Runs the load generator in a pod.
pub(crate) fn load(
    lab: &Lab,
    source: &str,
    target: &str,
    connections: usize,
    seconds: f64,
    new_connections: bool,
) -> anyhow::Result<Report> {
    let (connections, seconds) = (connections.to_string(), seconds.to_string());
    let mut command = vec!["fairway", "app", "load", target, "--connections", &connections, "--seconds", &seconds];
    if new_connections {
        command.push("--new-connections");
    }
    let (_, text) = lab.run(source, &command)?;
    serde_json::from_str(&text).map_err(|_| anyhow::anyhow!("the load generator says: {}", text.trim()))
}

/// Where the steady client has got to.
pub(crate) fn progress(lab: &Lab) -> anyhow::Result<Progress> {
    let text = lab.ask(&Request::Logs { name: "demo/client".to_owned(), lines: 1 })?.text;
    serde_json::from_str(&text).map_err(|_| anyhow::anyhow!("the steady client says: {text}"))
}

pub(crate) fn pod<'a>(pods: &'a [PodStatus], namespace: &str, name: &str) -> anyhow::Result<&'a PodStatus> {
    let found = pods.iter().find(|p| p.namespace == namespace && p.name == name);
    found.ok_or_else(|| anyhow::anyhow!("pod {namespace}/{name} is not there"))
}

/// Asks until the answer is good; the last bad one is the error.
pub(crate) fn eventually<T>(what: &str, mut ask: impl FnMut() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match ask() {
            Ok(answer) => return Ok(answer),
            Err(error) if Instant::now() > deadline => {
                return Err(error.context(format!("waited {} for {what}", output::took(PATIENCE))));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// The certificates of a node's ztunnel: identity to (serial, expiry as written).
pub(crate) fn certificates(lab: &Lab, node: &str) -> anyhow::Result<Vec<(String, String, String)>> {
    let (_, body) = lab.get(&format!("ztunnel/{node}"), "http://127.0.0.1:15000/config_dump")?;
    let dump: Value = serde_json::from_str(&body)?;
    let text = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_owned);
    let one = |c: &Value| {
        let leaf = c["certChain"].get(0)?;
        Some((text(&c["identity"]), text(&leaf["serialNumber"]), text(&leaf["expirationTime"])))
    };
    Ok(dump["certificates"].as_array().map(|l| l.iter().filter_map(one).collect()).unwrap_or_default())
}
