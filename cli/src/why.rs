//! `fairway why`: asks the live ztunnels on both ends what they would do with a connection, and says what decides.
//!
//! Nothing is re-implemented here: each end answers with the same functions, on the same state, that decide real connections.

use std::{net::IpAddr, process::ExitCode};

use anyhow::{Context as _, ensure};
use lab::{
    control::Lab,
    protocol::{PodStatus, Status},
};
use serde_json::{Value, json};

use crate::{
    args::{Output, Why},
    output,
};

/// Both ends' answers.
#[derive(Debug)]
pub(crate) struct Explanation {
    source: String,
    destination: String,
    outbound: Value,
    /// The receiving end's answer, when the connection would get that far.
    inbound: Option<Value>,
}

pub(crate) fn run(query: &Why) -> anyhow::Result<ExitCode> {
    let lab = Lab::find(&query.name)?;
    let explanation = explain(&lab, &query.source, &query.destination)?;
    match query.output {
        Output::Json => crate::output::say!("{}", serde_json::to_string_pretty(&explanation.json())?),
        Output::Text => crate::output::say!("{}", explanation.text()),
    }
    Ok(if explanation.allowed() { ExitCode::SUCCESS } else { ExitCode::from(3) })
}

/// Asks both ends.
///
/// # Errors
/// When a pod, service or port does not exist, or a ztunnel does not answer.
pub(crate) fn explain(lab: &Lab, source: &str, destination: &str) -> anyhow::Result<Explanation> {
    let status = lab.status()?;
    let from = find_pod(&status, source)?;
    let (name, port) = destination.rsplit_once(':').context("the destination needs a port: namespace/name:port")?;
    let port: u16 = port.parse().with_context(|| format!("`{port}` is not a port"))?;
    let address = address_of(&status, name, from)?;
    let target = socket(address, port);
    let outbound = if from.enrolment.is_empty() {
        let explanation = format!("{source} is not in the mesh: its connections are not captured");
        json!({"nextHop": {"type": "uncaptured"}, "decision": {"verdict": "allow", "explanation": explanation}})
    } else {
        ask(
            lab,
            &from.node,
            "outbound",
            &[("namespace", &from.namespace), ("pod", &from.name), ("destination", &target)],
        )?
    };
    let inbound = inbound(lab, &status, from, &outbound, &target)?;
    Ok(Explanation { source: source.to_owned(), destination: destination.to_owned(), outbound, inbound })
}

/// The receiving ztunnel's view: the pod that was chosen, the port the application listens on, and whom it sees calling.
fn inbound(
    lab: &Lab,
    status: &Status,
    from: &PodStatus,
    outbound: &Value,
    target: &str,
) -> anyhow::Result<Option<Value>> {
    let hop = &outbound["nextHop"];
    let tunnelled = hop["type"] == "hbone";
    let chosen = [&hop["tunnel"]["authority"], &hop["address"]].into_iter().find_map(Value::as_str).unwrap_or(target);
    let Some((address, _)) = chosen.rsplit_once(':') else { return Ok(None) };
    let ip: IpAddr =
        address.trim_matches(['[', ']']).parse().with_context(|| format!("`{chosen}` is not an address"))?;
    let is_at = |p: &&PodStatus| p.addresses.iter().any(|a| a.parse() == Ok(ip));
    let Some(to) = status.pods.iter().find(is_at).filter(|p| !p.enrolment.is_empty()) else { return Ok(None) };
    let source_ip = from.addresses.iter().find(|a| a.contains(':') == ip.is_ipv6()).cloned().unwrap_or_default();
    // Only a tunnel proves an identity.
    let identity = outbound["certificate"]["identity"].as_str().filter(|_| tunnelled).unwrap_or_default();
    let parameters = [
        ("namespace", to.namespace.as_str()),
        ("pod", &to.name),
        ("source_ip", &source_ip),
        ("source_identity", identity),
        ("destination", chosen),
    ];
    ask(lab, &to.node, "inbound", &parameters).map(Some)
}

fn ask(lab: &Lab, node: &str, end: &str, parameters: &[(&str, &str)]) -> anyhow::Result<Value> {
    let query: Vec<String> =
        parameters.iter().map(|(k, v)| format!("{k}={}", v.replace('%', "%25").replace('&', "%26"))).collect();
    let url = format!("http://127.0.0.1:15000/debug/why/{end}?{}", query.join("&"));
    let (status, body) = lab.get(&format!("ztunnel/{node}"), &url)?;
    ensure!(status == 200, "the ztunnel on {node} says: {}", body.trim());
    serde_json::from_str(&body).with_context(|| format!("the ztunnel on {node} says: {body}"))
}

fn find_pod<'a>(status: &'a Status, name: &str) -> anyhow::Result<&'a PodStatus> {
    let full = if name.contains('/') { name.to_owned() } else { format!("default/{name}") };
    let found = status.pods.iter().find(|p| format!("{}/{}", p.namespace, p.name) == full);
    found.with_context(|| format!("there is no pod `{full}`; `fairway lab pods` lists them"))
}

fn address_of(status: &Status, name: &str, from: &PodStatus) -> anyhow::Result<IpAddr> {
    if let Ok(ip) = name.trim_matches(['[', ']']).parse() {
        return Ok(ip);
    }
    let full = if name.contains('/') { name.to_owned() } else { format!("{}/{name}", from.namespace) };
    let addresses = match status.services.get(&full) {
        Some(addresses) => addresses,
        None => &find_pod(status, &full).with_context(|| format!("`{full}` is neither a service nor a pod"))?.addresses,
    };
    addresses.iter().find_map(|a| a.parse().ok()).with_context(|| format!("`{full}` has no address"))
}

fn socket(ip: IpAddr, port: u16) -> String {
    std::net::SocketAddr::new(ip, port).to_string()
}

impl Explanation {
    pub(crate) fn allowed(&self) -> bool {
        let denied = |v: &Value| v["decision"]["verdict"] == "deny" || v["nextHop"]["type"] == "reject";
        !denied(&self.outbound) && !self.inbound.as_ref().is_some_and(denied)
    }

    fn json(&self) -> Value {
        json!({
            "source": self.source,
            "destination": self.destination,
            "allowed": self.allowed(),
            "outbound": self.outbound,
            "inbound": self.inbound,
        })
    }

    /// The verdict first, then what decides, then how the connection travels.
    pub(crate) fn text(&self) -> String {
        let verdict = if self.allowed() { output::good("can reach") } else { output::bad("cannot reach") };
        let mut lines = vec![format!("{} {verdict} {}", self.source, self.destination)];
        let text = |v: &Value, field: &str| v[field].as_str().filter(|s| !s.is_empty()).map(str::to_owned);
        for (end, answer) in [("source", Some(&self.outbound)), ("destination", self.inbound.as_ref())] {
            let Some(answer) = answer.map(|a| &a["decision"]) else { continue };
            if let Some(explanation) = text(answer, "explanation") {
                lines.push(format!("{end}: {explanation}"));
            }
            if let Some(origin) = text(answer, "origin") {
                lines.push(format!("  decided by {origin}"));
            }
            if let Some(remedy) = text(answer, "remedy") {
                lines.push(format!("  remedy: {remedy}"));
            }
        }
        let hop = &self.outbound["nextHop"];
        if let Some(kind) = hop["type"].as_str() {
            let to = [&hop["tunnel"]["address"], &hop["address"], &hop["detail"]].into_iter().find_map(Value::as_str);
            lines.push(format!("way: {kind}{}", to.map(|a| format!(" {a}")).unwrap_or_default()));
        }
        lines.join("\n")
    }
}
