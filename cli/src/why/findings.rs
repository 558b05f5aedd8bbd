//! What follows from the answers: one finding for each thing that decides, or that somebody who asks should know.

mod refusal;

use serde::Serialize;
use serde_json::Value;

pub(super) use self::refusal::STATIC_STRICT;
use super::facts::{End, Facts};
use crate::output::short_name;

const MODE: &str = "metadata.labels[istio.io/dataplane-mode]";

/// One thing that decides.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Finding {
    /// Whose side it is on: `source`, `way`, `destination` or `mesh`.
    pub(crate) end: &'static str,
    /// Whether this alone keeps the connection from being.
    pub(crate) blocks: bool,
    /// Of the closed list that logs and metrics share.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reason: Option<String>,
    pub(crate) says: String,
    /// `Namespace demo`, `AuthorizationPolicy demo/only-the-client`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) object: Option<String>,
    /// `file:line`, where the object came from a file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) place: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) field: Option<String>,
    pub(crate) remedy: String,
}

impl Finding {
    fn new(end: &'static str, says: impl Into<String>) -> Self {
        Self { end, says: says.into(), ..Self::default() }
    }

    fn blocking(end: &'static str, says: impl Into<String>) -> Self {
        Self { blocks: true, ..Self::new(end, says) }
    }

    fn in_field(mut self, object: impl Into<String>, field: impl Into<String>) -> Self {
        (self.object, self.field) = (Some(object.into()), Some(field.into()));
        self
    }

    fn reason(mut self, reason: &str) -> Self {
        self.reason = Some(reason.to_owned());
        self
    }

    fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = remedy.into();
        self
    }

    /// `Namespace demo (file.yaml:3, metadata.labels[…])`.
    pub(crate) fn decided_by(&self) -> Option<String> {
        let object = self.object.as_ref()?;
        let parts: Vec<&str> = [self.place.as_deref(), self.field.as_deref()].into_iter().flatten().collect();
        Some(if parts.is_empty() { object.clone() } else { format!("{object} ({})", parts.join(", ")) })
    }
}

/// In the order of a connection.
pub(crate) fn of(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    findings.extend(capture(&facts.source, "source"));
    findings.extend(names(facts));
    findings.extend(silent(facts));
    findings.extend(facts.mute.iter().map(|node| {
        let says = format!("the ztunnel on {node} does not explain itself; another one was asked about the same state");
        Finding::new("mesh", says)
    }));
    if facts.is_captured() {
        findings.extend(facts.outbound.as_ref().and_then(|answer| decided(facts, answer)));
        findings.extend(certificate(facts));
    } else {
        findings.extend(unserved(facts));
    }
    findings.extend(facts.outbound.as_ref().and_then(|answer| way(facts, answer)));
    findings.extend(outside(facts));
    // A waypoint may speak for itself instead of being captured.
    if let Some(target) = facts.target.as_ref().filter(|_| facts.waypoint().is_none()) {
        findings.extend(capture(target, "destination"));
    }
    findings.extend(facts.inbound.as_ref().and_then(|answer| refusal::admitted(facts, answer)));
    findings.extend(facts.inbound.as_ref().and_then(|answer| application(facts, answer)));
    findings.extend(problems(facts));
    findings
}

/// Why a pod is outside the mesh, or not in it yet.
fn capture(end: &End, side: &'static str) -> Option<Finding> {
    let report = end.report.as_ref()?;
    if end.is_captured() {
        return None;
    }
    let decided_by = &report["decidedBy"];
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let why = text(&report["reason"]).unwrap_or_else(|| "the node agent has not enrolled it".to_owned());
    let what = match side {
        "source" => "its connections leave in clear and prove no identity",
        _ => "it is reached in clear, and no policy protects it",
    };
    let value = text(&decided_by["value"]).map(|value| format!(" (it says `{value}`)")).unwrap_or_default();
    let finding = Finding::new(side, format!("{} is not in the mesh: {why}{value}; {what}", end.name));
    let field = text(&decided_by["field"]).unwrap_or_else(|| MODE.to_owned());
    let remedy = match (report["state"].as_str(), field.as_str()) {
        (Some("uncaptured" | "awaited"), _) => "see the node agent's log; it tries again",
        (_, MODE) => "set the label istio.io/dataplane-mode=ambient",
        _ => "such pods stay outside the mesh",
    };
    Some(
        finding
            .in_field(text(&decided_by["object"]).unwrap_or_else(|| format!("Pod {}", end.name)), field)
            .remedy(remedy),
    )
}

/// A host of the mesh has its address from the mesh's DNS only.
fn names(facts: &Facts) -> Option<Finding> {
    let host = facts.destination.rsplit_once(':').map_or("", |(host, _)| host);
    if !facts.by_name || (facts.source.has_dns() && !facts.foreign_name) {
        return None;
    }
    if facts.foreign_name {
        let says = format!("{host} is not a name of the mesh for this source: its own DNS decides where it goes");
        return Some(Finding::new("source", says).in_field(format!("a ServiceEntry for {host}"), "spec.hosts"));
    }
    let (object, field) = match facts.source.is_captured() {
        true => (format!("Pod {}", facts.source.name), "metadata.annotations[ambient.istio.io/dns-capture]"),
        false => (format!("Pod {}", facts.source.name), MODE),
    };
    let says =
        format!("the DNS of {} does not pass the mesh, which alone knows an address of {host}", facts.source.name);
    let remedy = "remove the annotation, and have the pod in the mesh";
    Some(Finding::blocking("source", says).reason("lookup").in_field(object, field).remedy(remedy))
}

fn silent(facts: &Facts) -> impl Iterator<Item = Finding> {
    let captured_source = facts.is_captured().then(|| format!("the ztunnel on {}", facts.source.node));
    let captured_target =
        facts.target.as_ref().filter(|t| t.is_captured()).map(|t| format!("the ztunnel on {}", t.node));
    facts.silent.iter().map(move |(who, said)| {
        let needed = [&captured_source, &captured_target].into_iter().flatten().any(|needed| needed == who);
        let says = format!("{who} does not answer: {said}");
        let finding = if needed { Finding::blocking("mesh", says) } else { Finding::new("mesh", says) };
        let remedy = match needed {
            true => "start it: what it captures goes nowhere meanwhile",
            false => "connections go on without it; changes wait for it",
        };
        Finding { object: Some(who.clone()), ..finding.remedy(remedy) }
    })
}

/// The source's ztunnel finds no next hop.
fn decided(facts: &Facts, answer: &Value) -> Option<Finding> {
    let decision = &answer["decision"];
    if decision["verdict"] != "deny" {
        return None;
    }
    let text = |field: &str| decision[field].as_str().unwrap_or_default();
    let finding = Finding::blocking("source", text("explanation")).reason(text("reason"));
    let service = answer["service"].as_str().map(short_name);
    let (object, field, remedy) = match (text("reason"), service) {
        ("no_endpoint", Some(service)) => return Some(no_endpoint(facts, answer, finding, &service)),
        ("no_route", service) => {
            let object = match service {
                Some(service) => format!("Service {service}"),
                None => format!("Pod {}", facts.destination.trim_end_matches(&format!(":{}", facts.port))),
            };
            let remedy = "deploy the waypoint that this label, or its namespace's, names, or remove the label";
            (object, "metadata.labels[istio.io/use-waypoint]", remedy)
        }
        ("not_in_registry", _) => {
            (format!("ConfigMap {}/istio", facts.system), "data.mesh.outboundTrafficPolicy.mode", text("remedy"))
        }
        ("lookup", Some(service)) => (format!("ServiceEntry {service}"), "spec.endpoints", text("remedy")),
        _ => return Some(finding.remedy(text("remedy"))),
    };
    Some(finding.in_field(object, field).remedy(remedy))
}

/// Which of the three: the port, the selector, or the pods.
fn no_endpoint(facts: &Facts, answer: &Value, finding: Finding, service: &str) -> Finding {
    let ports: Vec<u64> = answer["servicePorts"].as_array().into_iter().flatten().filter_map(Value::as_u64).collect();
    let endpoints = answer["endpoints"].as_array().map(Vec::as_slice).unwrap_or_default();
    if !ports.contains(&facts.port.into()) {
        let has: Vec<String> = ports.iter().map(ToString::to_string).collect();
        let says = format!("service {service} has no port {}; it has {}", facts.port, has.join(", "));
        return Finding { says, ..finding }
            .in_field(format!("Service {service}"), "spec.ports")
            .remedy("dial one of its ports, or add this one");
    }
    if endpoints.is_empty() {
        let says = format!("service {service} has no endpoint: its selector picks no running pod");
        return Finding { says, ..finding }
            .in_field(format!("Service {service}"), "spec.selector")
            .remedy("compare the selector with the pods' labels");
    }
    let why = |endpoint: &Value| {
        let name = format!("{}/{}", endpoint["namespace"].as_str()?, endpoint["name"].as_str()?);
        Some((name, endpoint["ineligible"].as_str()?.to_owned()))
    };
    let judged: Vec<(String, String)> = endpoints.iter().filter_map(why).collect();
    let list: Vec<String> = judged.iter().map(|(name, why)| format!("{name}: {why}")).collect();
    let says = format!("no endpoint of service {service} can be used: {}", list.join("; "));
    let pod = judged.first().map_or_else(|| service.to_owned(), |(name, _)| name.clone());
    let unready = endpoints.iter().all(|endpoint| endpoint["unhealthy"] == true);
    let field = if unready { "status.conditions[Ready]" } else { "spec" };
    Finding { says, ..finding }.in_field(format!("Pod {pod}"), field).remedy(if unready {
        "see the pod's readiness probe"
    } else {
        "see the service's ports and traffic policy"
    })
}

/// A source outside the mesh meets services as kube-proxy has them.
fn unserved(facts: &Facts) -> Option<Finding> {
    let answer = facts.outbound.as_ref()?;
    let service = short_name(answer["service"].as_str()?);
    let usable = answer["endpoints"].as_array().into_iter().flatten().any(|endpoint| endpoint["port"].is_number());
    let finding = Finding::blocking("source", "").reason("no_endpoint");
    (!usable).then(|| no_endpoint(facts, answer, finding, &service))
}

fn certificate(facts: &Facts) -> Option<Finding> {
    let answer = facts.outbound.as_ref()?;
    if answer["probe"]["open"] == true {
        // It failed before, and has been had meanwhile.
        return None;
    }
    let certificate = &answer["certificate"];
    let (identity, state) = (certificate["identity"].as_str()?, certificate["state"].as_str()?);
    let needed = facts.hop().is_some_and(|hop| hop["tunnel"].is_object() || hop["outer"].is_object());
    let error = state.strip_prefix("unavailable: ")?;
    let expired = certificate["expiresUnixSeconds"].is_number();
    let what = if expired { "has expired and cannot be renewed" } else { "could not be had" };
    let says = format!("the certificate of {identity} {what}: {error}");
    let finding = if needed { Finding::blocking("source", says) } else { Finding::new("source", says) };
    let remedy = "see that the CA is reachable and lets this node have the identity; compare the clocks";
    Some(finding.reason("identity").in_field(format!("certificate of {identity}"), "notAfter").remedy(remedy))
}

/// Nothing of the mesh decides, and nobody has tried.
fn outside(facts: &Facts) -> Option<Finding> {
    facts.is_outside().then(|| {
        let says = format!("{} is outside of what the mesh knows, and was not tried from here", facts.destination);
        Finding::new("way", says).remedy("try it from the source; a ServiceEntry makes it known to the mesh")
    })
}

/// The way was tried, and is not open.
fn way(facts: &Facts, answer: &Value) -> Option<Finding> {
    let probe = &answer["probe"];
    if probe["open"] != false {
        return None;
    }
    let text = |field: &str| probe[field].as_str().unwrap_or_default();
    let hop = facts.hop()?;
    let address = [&hop["tunnel"]["address"], &hop["outer"]["address"], &hop["address"]];
    let address = address.into_iter().find_map(Value::as_str).unwrap_or_default();
    let behind = facts.target.as_ref().map_or_else(|| address.to_owned(), |target| format!("Pod {}", target.name));
    let (object, field) = match text("reason") {
        // Told already, with more: the probe needs the certificate too.
        "identity" => return None,
        "network_policy" | "connect_timeout" => {
            (format!("NetworkPolicy or firewall before {behind}"), port_of(address))
        }
        "tls" => (behind, "the identity it proves".to_owned()),
        _ => (behind, port_of(address)),
    };
    let finding = Finding::blocking("way", text("detail")).reason(text("reason"));
    if let Some((says, remedy)) = unserved_pod(facts, text("reason"), text("detail")) {
        return Some(Finding { says, ..finding }.in_field(object, field).remedy(remedy));
    }
    Some(finding.in_field(object, field).remedy(text("remedy")))
}

/// A captured pod's port for tunnels is its ztunnel's, not the application's: where nobody answers there, none serves the pod.
fn unserved_pod(facts: &Facts, reason: &str, detail: &str) -> Option<(String, String)> {
    let address = facts.hop()?["tunnel"]["address"].as_str()?;
    let target = facts.target.as_ref().filter(|target| target.is_captured() && facts.waypoint().is_none())?;
    let ztunnel = format!("the ztunnel on {}", target.node);
    let is_silent = facts.silent.iter().any(|(who, _)| *who == ztunnel);
    let is_timeout = matches!(reason, "network_policy" | "connect_timeout");
    // Refused is an answer of the pod's own namespace; nothing at all may be a firewall's too, unless the ztunnel is known to be away.
    (reason == "connect" || (is_timeout && is_silent)).then(|| {
        let says = format!(
            "nothing answers on {} at node {}, so no ztunnel serves pod {} there: {detail}",
            port_of(address),
            target.node,
            target.name
        );
        (says, format!("see in `fairway status` whether {ztunnel} is ready; the application has no part in it"))
    })
}

/// Admitted, but nobody listens.
fn application(facts: &Facts, answer: &Value) -> Option<Finding> {
    let probe = &answer["probe"];
    if probe["open"] != false {
        return None;
    }
    let text = |field: &str| probe[field].as_str().unwrap_or_default();
    let target = facts.target.as_ref()?;
    let destination = answer["destination"].as_str().unwrap_or_default();
    let service = facts.outbound.as_ref().and_then(|answer| answer["service"].as_str()).map(short_name);
    let (object, field) = match service {
        _ if facts.waypoint().is_some() => (format!("Pod {}", target.name), port_of(destination)),
        Some(service) => (format!("Service {service}"), format!("spec.ports[{}].targetPort", facts.port)),
        None => (format!("Pod {}", target.name), format!("spec.containers[].ports[{}]", facts.port)),
    };
    let says = format!("nothing in pod {} answers on {destination}: {}", target.name, text("detail"));
    let remedy = "see that the application listens there, and that the target port is the right one";
    Some(Finding::blocking("destination", says).reason(text("reason")).in_field(object, field).remedy(remedy))
}

/// Manifests the control plane could not accept: what they asked for is not in force. One of them may be why; a long list only hides it.
fn problems(facts: &Facts) -> Vec<Finding> {
    const SHOWN: usize = 3;
    match facts.problems.len() {
        0..=SHOWN => facts.problems.iter().map(problem_of).collect(),
        many => {
            let says =
                format!("{many} parts of manifests are not in force; `fairway dump fairwayd problems` lists them");
            vec![Finding::new("mesh", says)]
        }
    }
}

fn problem_of(problem: &Value) -> Finding {
    let text = |field: &str| problem[field].as_str().unwrap_or_default();
    let mut finding = Finding::new("mesh", format!("a manifest was not accepted: {}", text("message")));
    match problem["object"].as_str() {
        Some(object) => finding.object = Some(object.to_owned()),
        None => {
            finding.object = Some(format!("a document of {}", text("file")));
            finding.place = Some(format!("{}:{}", text("file"), problem["line"]));
        }
    }
    finding.field = Some(text("field").to_owned()).filter(|field| !field.is_empty());
    finding.remedy(text("remedy"))
}

fn port_of(address: &str) -> String {
    format!("port {}", address.rsplit(':').next().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_mesh_configuration_is_named_where_the_mesh_is_installed() {
        let deny = json!({"decision": {"verdict": "deny", "reason": "not_in_registry"}});
        let facts = Facts { system: "m".to_owned(), ..facts(deny.clone()) };
        let finding = decided(&facts, &deny).unwrap();
        assert_eq!(finding.object.as_deref(), Some("ConfigMap m/istio"));
    }

    /// A captured source and what its ztunnel says.
    pub(super) fn facts(outbound: Value) -> Facts {
        let report = json!({"state": "enrolled", "rules": true, "announced": true, "dns": true});
        let end = |name: &str| End {
            name: name.to_owned(),
            node: "n1".to_owned(),
            pod: "p".to_owned(),
            report: Some(report.clone()),
            ..End::default()
        };
        Facts {
            source: end("t/a"),
            target: Some(end("t/b")),
            destination: "t/b:80".to_owned(),
            port: 80,
            outbound: Some(outbound),
            ..Facts::default()
        }
    }

    fn hbone(probe: Value) -> Value {
        let hop = json!({"type": "hbone", "tunnel": {"address": "10.0.0.2:15008", "authority": "10.0.0.2:8080"}});
        json!({"decision": {"verdict": "allow"}, "nextHop": hop, "probe": probe,
            "certificate": {"identity": "spiffe://td/ns/t/sa/a", "state": "unavailable: the CA is away"}})
    }

    fn blocking(facts: &Facts) -> Vec<(String, String)> {
        let blocking = of(facts).into_iter().filter(|finding| finding.blocks);
        blocking.map(|finding| (finding.object.unwrap_or_default(), finding.field.unwrap_or_default())).collect()
    }

    #[test]
    fn a_way_that_is_open_has_nothing_in_it() {
        assert_eq!(blocking(&facts(hbone(json!({"open": true})))), []);
    }

    #[test]
    fn each_kind_of_closed_way_names_who_closed_it() {
        let closed = |reason| blocking(&facts(hbone(json!({"open": false, "reason": reason, "detail": "d"}))));
        let certificate = ("certificate of spiffe://td/ns/t/sa/a".to_owned(), "notAfter".to_owned());
        assert_eq!(closed("identity"), std::slice::from_ref(&certificate));
        let firewall = ("NetworkPolicy or firewall before Pod t/b".to_owned(), "port 15008".to_owned());
        assert_eq!(closed("network_policy"), [certificate.clone(), firewall]);
        // Another trust domain, another account: the peer is not who is expected.
        assert_eq!(closed("tls"), [certificate, ("Pod t/b".to_owned(), "the identity it proves".to_owned())]);
    }

    #[test]
    fn a_pod_that_no_ztunnel_serves_is_not_its_applications_fault() {
        let found = |reason: &str, silent: bool| {
            let mut facts = facts(hbone(json!({"open": false, "reason": reason, "detail": "refused", "remedy": "r"})));
            facts.silent =
                silent.then(|| ("the ztunnel on n1".to_owned(), "no such pod".to_owned())).into_iter().collect();
            way(&facts, facts.outbound.as_ref().unwrap()).unwrap()
        };
        for (reason, silent, blamed) in [
            ("connect", false, true),
            ("connect", true, true),
            ("network_policy", true, true),
            ("network_policy", false, false),
        ] {
            let finding = found(reason, silent);
            let says = finding.says.contains("nothing answers on port 15008 at node n1");
            assert_eq!((says, finding.remedy.contains("`fairway status`")), (blamed, blamed), "{reason} {silent}");
        }
    }

    #[test]
    fn of_what_is_outside_and_was_not_tried_nothing_is_known() {
        let through =
            |probe: Value| json!({"nextHop": {"type": "passthrough", "address": "1.2.3.4:443"}, "probe": probe});
        let nothing = |outbound: Value| Facts { target: None, ..facts(outbound) }.is_outside();
        assert!(nothing(through(Value::Null)));
        assert!(!nothing(through(json!({"open": true}))) && !nothing(through(json!({"open": false}))));
        let mut of_mesh = through(Value::Null);
        of_mesh["service"] = "t/b.t.svc.cluster.local".into();
        assert!(!nothing(of_mesh));
    }

    #[test]
    fn a_service_without_endpoint_is_its_ports_its_selectors_or_its_pods_fault() {
        let rejected = |ports: &[u16], endpoints: Value| {
            let decision = json!({"verdict": "deny", "reason": "no_endpoint", "explanation": "no healthy upstream"});
            let answer = json!({"decision": decision, "service": "t/b.t.svc.cluster.local", "servicePorts": ports,
                "endpoints": endpoints, "nextHop": {"type": "reject", "detail": "d"}});
            blocking(&facts(answer)).remove(0)
        };
        let named = |object: &str, field: &str| (object.to_owned(), field.to_owned());
        assert_eq!(rejected(&[81], json!([])), named("Service t/b", "spec.ports"));
        assert_eq!(rejected(&[80], json!([])), named("Service t/b", "spec.selector"));
        let sick = json!([{"namespace": "t", "name": "b", "ineligible": "it is not ready", "unhealthy": true}]);
        assert_eq!(rejected(&[80], sick), named("Pod t/b", "status.conditions[Ready]"));
    }

    #[test]
    fn a_silent_ztunnel_blocks_only_where_traffic_passes_it() {
        let mut facts = facts(hbone(json!({"open": true})));
        facts.silent =
            vec![("the ztunnel on n1".to_owned(), "refused".to_owned()), ("fairwayd".to_owned(), "refused".to_owned())];
        assert_eq!(blocking(&facts), [("the ztunnel on n1".to_owned(), String::new())]);
    }

    #[test]
    fn many_faulty_manifests_are_counted_and_a_few_are_named() {
        let problem = json!({"file": "p.yaml", "line": 3, "field": "spec", "message": "m", "remedy": "r"});
        let mut facts = facts(hbone(json!({"open": true})));
        facts.problems = vec![problem.clone(); 2];
        assert_eq!(of(&facts).len(), 2);
        let of_cluster =
            json!({"object": "AuthorizationPolicy demo/x", "field": "spec", "message": "m", "remedy": "r"});
        let found = problem_of(&of_cluster);
        assert_eq!((found.object.as_deref(), found.place), (Some("AuthorizationPolicy demo/x"), None));
        facts.problems = vec![problem; 20];
        assert!(of(&facts)[0].says.starts_with("20 parts"));
    }
}
