//! What the programs say about a connection.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, ensure};
use lab::protocol::PodStatus;
use serde_json::Value;

use super::{findings::STATIC_STRICT, names};
use crate::{
    cluster::escape,
    mesh::{Mesh, Page, Program},
};

/// How many ztunnels are asked in the place of one that does not explain itself.
const OTHERS: usize = 3;

/// Everything that was asked and answered.
#[derive(Debug, Default)]
pub(crate) struct Facts {
    /// Where the mesh is installed.
    pub(crate) system: String,
    pub(crate) source: End,
    /// As the user named it.
    pub(crate) destination: String,
    pub(crate) port: u16,
    /// By a host name that only DNS can turn into an address.
    pub(crate) by_name: bool,
    /// The mesh does not know that name.
    pub(crate) foreign_name: bool,
    /// What the source's ztunnel would do. Of a source outside the mesh, what one would do for it: only its endpoints count.
    pub(crate) outbound: Option<Value>,
    /// The pod that the connection would end in, when it gets that far.
    pub(crate) target: Option<End>,
    /// What the ztunnel there would do.
    pub(crate) inbound: Option<Value>,
    /// Nodes whose ztunnel has no such page: another implementation. Others were asked in their place.
    pub(crate) mute: Vec<String>,
    /// Programs that did not answer, with what was said instead.
    pub(crate) silent: Vec<(String, String)>,
    /// Where a control plane of another kind says only that something is STRICT: the PeerAuthentications that say so.
    pub(crate) strict: Vec<String>,
    /// What the control plane could not accept.
    pub(crate) problems: Vec<Value>,
}

/// One end of the connection.
#[derive(Clone, Debug, Default)]
pub(crate) struct End {
    pub(crate) name: String,
    pub(crate) node: String,
    /// Empty for a node.
    pub(crate) pod: String,
    pub(crate) namespace: String,
    pub(crate) addresses: Vec<String>,
    /// What is on record of its enrolment.
    pub(crate) enrolment: String,
    /// The node agent's report of the pod.
    pub(crate) report: Option<Value>,
}

impl End {
    pub(super) fn of_pod(pod: &PodStatus) -> Self {
        Self {
            name: format!("{}/{}", pod.namespace, pod.name),
            node: pod.node.clone(),
            pod: pod.name.clone(),
            namespace: pod.namespace.clone(),
            addresses: pod.addresses.clone(),
            enrolment: pod.enrolment.clone(),
            report: None,
        }
    }

    /// Its DNS does, too.
    pub(crate) fn has_dns(&self) -> bool {
        self.is_captured() && self.report.as_ref().is_some_and(|report| report["dns"] != false)
    }

    /// Its traffic passes a ztunnel. Where the agent is silent, the enrolment on record counts: capture outlives the agent.
    pub(crate) fn is_captured(&self) -> bool {
        self.report.as_ref().is_some_and(|report| report["rules"] == true && report["announced"] == true)
    }

    fn address(&self, ipv6: bool) -> Option<&str> {
        self.addresses.iter().find(|address| address.contains(':') == ipv6).map(String::as_str)
    }
}

impl Facts {
    /// In the mesh, and so carried by its own node's ztunnel.
    pub(crate) fn is_captured(&self) -> bool {
        self.source.is_captured()
    }

    pub(crate) fn hop(&self) -> Option<&Value> {
        self.outbound.as_ref().map(|answer| &answer["nextHop"]).filter(|_| self.is_captured())
    }

    /// The address of a waypoint, where the connection goes to one.
    pub(crate) fn waypoint(&self) -> Option<SocketAddr> {
        let hop = self.hop().filter(|hop| hop["type"] == "waypoint")?;
        hop["tunnel"]["address"].as_str()?.parse().ok()
    }

    fn is_tunnelled(&self) -> bool {
        self.hop().is_some_and(|hop| hop["tunnel"].is_object())
    }

    /// How the connection travels, in a line.
    pub(crate) fn way(&self) -> String {
        let Some(hop) = self.hop() else {
            let way = if self.is_captured() { "unknown" } else { "uncaptured, in clear" };
            return way.to_owned();
        };
        let kind = hop["type"].as_str().unwrap_or("unknown");
        let to = [&hop["tunnel"]["address"], &hop["outer"]["address"], &hop["address"], &hop["detail"]];
        let to = to.into_iter().find_map(Value::as_str).unwrap_or_default();
        let identity = self.outbound.as_ref().and_then(|answer| answer["certificate"]["identity"].as_str());
        match identity.filter(|_| hop["tunnel"].is_object() || hop["outer"].is_object()) {
            Some(identity) if kind == "waypoint" => {
                format!("{kind} {to} as {identity}; what follows is its own decision")
            }
            Some(identity) => format!("{kind} {to} as {identity}"),
            None => format!("{kind} {to}"),
        }
    }
}

/// Asks in the order of a connection.
pub(crate) fn gather(mesh: &dyn Mesh, source: &str, destination: &str) -> anyhow::Result<Facts> {
    let source = names::source(mesh, source)?;
    let (target, port) = names::destination(mesh, destination, &source)?;
    let mut facts = Facts {
        system: mesh.system().to_owned(),
        destination: destination.to_owned(),
        port,
        source,
        ..Facts::default()
    };
    facts.source.report = facts.ask_agent(mesh, &facts.source.clone());
    let target = target.map(|address| SocketAddr::new(address, port));
    let asked = target.map_or_else(|| destination.to_owned(), |target| target.to_string());
    facts.by_name = target.is_none();
    facts.ask_source(mesh, &asked)?;
    let said = facts.outbound.as_ref().and_then(|answer| answer["destination"].as_str()?.parse().ok());
    if let Some(target) = target.or(said) {
        facts.ask_target(mesh, target)?;
    }
    facts.name_strict(mesh);
    match mesh.fetch(&Program::ControlPlane, "/debug/problems") {
        Ok(Value::Array(problems)) => facts.problems = problems,
        Ok(_) => {}
        Err(error) => facts.silent.push(("fairwayd".to_owned(), format!("{error:#}"))),
    }
    Ok(facts)
}

impl Facts {
    /// The agent's report of a pod; what is on record, when the agent does not answer.
    fn ask_agent(&mut self, mesh: &dyn Mesh, end: &End) -> Option<Value> {
        if end.pod.is_empty() {
            return None;
        }
        match mesh.fetch(&Program::Agent(end.node.clone()), "/debug/pods") {
            Ok(pods) => {
                let is_it = |pod: &&Value| pod["namespace"] == end.namespace && pod["name"] == end.pod;
                pods.as_array()?.iter().find(is_it).cloned()
            }
            Err(error) => {
                self.silent.push((format!("the node agent on {}", end.node), format!("{error:#}")));
                let enrolled = end.enrolment == "enabled";
                let state = if enrolled { "enrolled" } else { "outside" };
                Some(serde_json::json!({ "state": state, "rules": enrolled, "announced": enrolled }))
            }
        }
    }

    /// `target`: an address or a host, and a port.
    fn ask_source(&mut self, mesh: &dyn Mesh, target: &str) -> anyhow::Result<()> {
        let captured = self.is_captured();
        // Which endpoints a service has, any ztunnel can say for any pod; a node is not one.
        let asker = match self.source.pod.is_empty() {
            false => self.source.clone(),
            true => End::of_pod(&mesh.any_pod()?.context("no pod runs")?),
        };
        let probe = if captured { "true" } else { "false" };
        let parameters =
            [("namespace", asker.namespace.as_str()), ("pod", &asker.pod), ("destination", target), ("probe", probe)];
        match ask(mesh, &asker.node, "outbound", &parameters) {
            Ok(Some(answer)) => self.outbound = Some(answer),
            Ok(None) => {
                // Another one knows the same state, but cannot try the source's way.
                self.mute.push(asker.node.clone());
                let parameters = &parameters[..3];
                let others = mesh.nodes()?.into_iter().filter(|node| node.name != asker.node).take(OTHERS);
                self.outbound =
                    others.into_iter().find_map(|node| ask(mesh, &node.name, "outbound", parameters).ok()?);
            }
            Err(error) if error.downcast_ref::<ForeignName>().is_some() => self.foreign_name = true,
            Err(error) => self.silent.push((format!("the ztunnel on {}", asker.node), format!("{error:#}"))),
        }
        Ok(())
    }

    /// The receiving ztunnel's view: the pod that was chosen, the port the application listens on, and whom it sees calling.
    fn ask_target(&mut self, mesh: &dyn Mesh, target: SocketAddr) -> anyhow::Result<()> {
        let Some(chosen) = self.chosen(target) else { return Ok(()) };
        let met = self.waypoint().unwrap_or(chosen).ip();
        let Some(pod) = mesh.pod_at(met)? else { return Ok(()) };
        let mut end = End::of_pod(&pod);
        end.report = self.ask_agent(mesh, &end);
        let captured = end.is_captured();
        self.target = Some(end.clone());
        if !captured {
            return Ok(());
        }
        let source_ip = self.source.address(met.is_ipv6()).unwrap_or_default().to_owned();
        let identity = self.outbound.as_ref().and_then(|answer| answer["certificate"]["identity"].as_str());
        // Only a tunnel proves an identity.
        let identity = identity.filter(|_| self.is_tunnelled()).unwrap_or_default().to_owned();
        let (chosen, met) = (chosen.to_string(), met.to_string());
        let mut parameters = vec![
            ("namespace", end.namespace.as_str()),
            ("pod", &end.pod),
            ("source_ip", &source_ip),
            ("source_identity", &identity),
            ("destination", &chosen),
            ("probe", "true"),
        ];
        if self.waypoint().is_some() {
            parameters.push(("dialled", &met));
        }
        match ask(mesh, &end.node, "inbound", &parameters) {
            Ok(Some(answer)) => self.inbound = Some(answer),
            Ok(None) => {
                self.mute.push(end.node.clone());
                // What the source's thinks of the policies there: the same state reaches both.
                let far = self.outbound.as_ref().map(|answer| answer["farSide"].clone()).filter(Value::is_object);
                self.inbound = far.map(|decision| serde_json::json!({ "decision": decision, "destination": chosen }));
            }
            Err(error) => self.silent.push((format!("the ztunnel on {}", end.node), format!("{error:#}"))),
        }
        Ok(())
    }

    /// The namespace's own go before the mesh's; what cannot be listed is not named.
    fn name_strict(&mut self, mesh: &dyn Mesh) {
        let policy = self.inbound.as_ref().and_then(|answer| answer["decision"]["policy"].as_str());
        if !policy.is_some_and(|policy| policy.ends_with(&format!("/{STATIC_STRICT}"))) {
            return;
        }
        let namespace = self.target.as_ref().map_or("", |target| &target.namespace);
        let of = |namespace: &str| mesh.strict_authentications(namespace).unwrap_or_default();
        self.strict = of(namespace);
        if self.strict.is_empty() {
            self.strict = of(&self.system);
        }
    }

    /// Whether the connection goes where no object of the mesh is, and nobody tried: nothing of what is known decides about it.
    pub(crate) fn is_outside(&self) -> bool {
        if self.foreign_name {
            return true;
        }
        let Some(answer) = &self.outbound else { return false };
        let known = !answer["service"].is_null() || !answer["destinationWorkload"].is_null() || self.target.is_some();
        !known && self.hop().is_none_or(|hop| hop["type"] == "passthrough") && answer["probe"]["open"].is_null()
    }

    /// Where the connection ends: what the tunnel names, what is dialled, or for a source outside the mesh an endpoint.
    fn chosen(&self, target: SocketAddr) -> Option<SocketAddr> {
        if let Some(hop) = self.hop() {
            let said = [&hop["tunnel"]["authority"], &hop["address"]].into_iter().find_map(Value::as_str)?;
            return said.parse().ok();
        }
        let endpoints = self.outbound.as_ref().and_then(|answer| answer["endpoints"].as_array());
        let Some(endpoints) = endpoints else { return Some(target) };
        endpoints.iter().find_map(|endpoint| {
            let port = endpoint["port"].as_u64().and_then(|port| u16::try_from(port).ok())?;
            let addresses = endpoint["addresses"].as_array()?.iter().filter_map(Value::as_str);
            let ip = addresses.filter_map(|a| a.parse::<IpAddr>().ok()).find(|ip| ip.is_ipv4() == target.is_ipv4())?;
            Some(SocketAddr::new(ip, port))
        })
    }
}

/// The name asked about is not one of the mesh.
#[derive(Debug)]
struct ForeignName;

impl std::fmt::Display for ForeignName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("not a name of the mesh")
    }
}

impl std::error::Error for ForeignName {}

/// `None`: this ztunnel has no such page.
fn ask(mesh: &dyn Mesh, node: &str, end: &str, parameters: &[(&str, &str)]) -> anyhow::Result<Option<Value>> {
    let query: Vec<String> = parameters.iter().map(|(k, v)| format!("{k}={}", escape(v))).collect();
    let path = format!("/debug/why/{end}?{}", query.join("&"));
    let (status, body) = mesh.ask(&Program::Ztunnel(node.to_owned()), Page::Admin(&path))?;
    // Ours begins with a reason of the list; who does not know the page says nothing of the kind.
    match body.split(':').next() {
        Some("lookup") if status == 404 => return Err(ForeignName.into()),
        Some(reason) if status == 404 && reason != "unknown_workload" => return Ok(None),
        _ => {}
    }
    ensure!(status == 200, "{}", body.trim());
    serde_json::from_str(&body).map(Some).with_context(|| format!("not JSON: {body}"))
}
