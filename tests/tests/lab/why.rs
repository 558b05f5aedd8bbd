//! `fairway why` against the mesh as it is: each fault is seeded, the command has to name it, and its verdict is compared with what a
//! connection then meets.

use anyhow::{Context as _, ensure};
use lab::{
    components::Options,
    control::Lab,
    protocol::{Fault, Request},
};
use serde_json::Value;

use super::harness::{apply, eventually, in_mesh, in_mesh_of, label, why};

/// A question, and what the answer has to say.
struct Case<'a> {
    /// For the failing test's text.
    fault: &'a str,
    source: &'a str,
    destination: &'a str,
    allowed: bool,
    /// Parts of one and the same finding: object, place, field, and something of its words.
    object: &'a str,
    place: &'a str,
    field: &'a str,
    says: &'a str,
}

/// The usual question: of a pod to its neighbour, which ought to fail.
const REFUSED: Case<'static> = Case {
    fault: "",
    source: "t/a2",
    destination: "t/b:80",
    allowed: false,
    object: "",
    place: "",
    field: "",
    says: "",
};

impl Case<'_> {
    /// Asks until the answer is right: a change takes a moment to reach both ends. Then tries what was asked about.
    fn check(&self, lab: &Lab) -> anyhow::Result<()> {
        eventually(self.fault, || {
            let answer = why(lab, self.source, self.destination)?;
            let findings = answer["findings"].as_array().context("findings")?;
            let named = findings.iter().any(|finding| self.is_named_by(finding));
            ensure!(named, "{}: not named in {answer:#}", self.fault);
            ensure!(answer["allowed"] == self.allowed, "{}: {answer:#}", self.fault);
            Ok(())
        })?;
        let reached = reaches(lab, self.source, self.destination)?;
        ensure!(
            reached == self.allowed,
            "{}: the verdict is {}, the connection says {reached}",
            self.fault,
            self.allowed
        );
        Ok(())
    }

    fn is_named_by(&self, finding: &Value) -> bool {
        let has = |field: &str, part: &str| finding[field].as_str().unwrap_or_default().contains(part);
        has("object", self.object)
            && has("place", self.place)
            && has("field", self.field)
            && has("says", self.says)
            && (self.allowed || finding["blocks"] == true)
    }
}

/// Whether a request of the source is answered, by address: names are another matter.
fn reaches(lab: &Lab, source: &str, destination: &str) -> anyhow::Result<bool> {
    let status = lab.status()?;
    let (name, port) = destination.rsplit_once(':').context("a port")?;
    let pod = || status.pods.iter().find(|p| format!("{}/{}", p.namespace, p.name) == name).map(|p| &p.addresses);
    let addresses = status.services.get(name).or_else(pod);
    let address = addresses.and_then(|a| a.first()).map_or(name, String::as_str);
    let url = format!("http://{address}:{port}/why");
    let (code, _) = lab.run(source, &["fairway", "app", "get", &url, "--timeout", "4"])?;
    Ok(code == 0)
}

fn delete(lab: &Lab, file: &str) -> anyhow::Result<()> {
    lab.ask(&Request::Delete { pod: None, file: Some(file.to_owned()) })?;
    eventually("the connection to be allowed again", || {
        ensure!(why(lab, "t/a2", "t/b:80")?["allowed"] == true, "still denied");
        Ok(())
    })
}

fn fault(lab: &Lab, fault: Fault) -> anyhow::Result<()> {
    lab.ask(&Request::Fault(fault))?;
    Ok(())
}

fn pod(name: &str, namespace: &str, extra: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}{extra}}}\nspec:\n  nodeName: node1\n  \
         containers: [{{name: c, command: [fairway, app, idle]}}]\n"
    )
}

fn policy(spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: t}}\nspec:\n{spec}"
    )
}

#[test]
fn policies_are_named_with_file_line_and_field_and_the_mesh_does_what_was_said() {
    in_mesh(|lab| {
        let address = lab.status()?.pods.iter().find(|p| p.name == "a2").context("a2")?.addresses[0].clone();
        let by_address = format!("  action: DENY\n  rules:\n  - from: [{{source: {{ipBlocks: [{address}]}}}}]\n");
        let seeded = [
            (
                "a DENY by identity",
                "  action: DENY\n  rules:\n  - from: [{source: {principals: [cluster.local/ns/t/sa/a]}}]\n",
                "spec.rules[0]",
                "p.yaml:7",
                "explicitly denied",
            ),
            (
                "an ALLOW for somebody else",
                "  action: ALLOW\n  rules:\n  - from: [{source: {principals: [cluster.local/ns/t/sa/x]}}]\n",
                "spec.rules",
                "p.yaml:7",
                "none allowed",
            ),
            ("an ALLOW of nothing", "  action: ALLOW\n", "", "p.yaml", "none allowed"),
            (
                "a DENY by port",
                "  action: DENY\n  rules:\n  - to: [{operation: {ports: [\"8080\"]}}]\n",
                "spec.rules[0]",
                "p.yaml:7",
                "explicitly denied",
            ),
            (
                "a DENY by namespace",
                "  action: DENY\n  rules:\n  - from: [{source: {namespaces: [t]}}]\n",
                "spec.rules[0]",
                "p.yaml:7",
                "explicitly denied",
            ),
            ("a DENY by address", by_address.as_str(), "spec.rules[0]", "p.yaml:7", "explicitly denied"),
            (
                "a field misspelt",
                "  action: ALLOW\n  rules:\n  - from: [{source: {principal: [cluster.local/ns/t/sa/a]}}]\n",
                "principal",
                "p.yaml:7",
                "explicitly denied",
            ),
        ];
        for (fault, spec, field, place, says) in seeded {
            apply(lab, "p.yaml", &policy(spec))?;
            let object = "AuthorizationPolicy t/p";
            Case { fault, object, place, field, says, ..REFUSED }.check(lab)?;
            delete(lab, "p.yaml")?;
        }
        apply(lab, "p.yaml", &policy("  action: ALLOW\n  rules:\n  - to: [{operation: {paths: [/public]}}]\n"))?;
        Case {
            fault: "a field that needs a waypoint",
            object: "spec.rules[0].to[0].operation.paths needs a waypoint",
            place: "p.yaml",
            says: "none allowed",
            ..REFUSED
        }
        .check(lab)
    });
}

#[test]
fn strict_peer_authentication_is_named_where_plain_text_meets_it() {
    in_mesh(|lab| {
        let strict = |spec: &str| {
            format!(
                "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: s, namespace: t}}\nspec:\n{spec}"
            )
        };
        let seeded = [
            ("STRICT for a namespace", "  mtls: {mode: STRICT}\n", "outsider", "elsewhere/outsider"),
            (
                "STRICT for a port",
                "  selector: {matchLabels: {app: b}}\n  portLevelMtls: {8080: {mode: STRICT}}\n",
                "outsider",
                "elsewhere/outsider",
            ),
            ("STRICT, and a probe from the node", "  mtls: {mode: STRICT}\n", "node", "node/node1"),
        ];
        for (fault, spec, _, source) in seeded {
            apply(lab, "s.yaml", &strict(spec))?;
            let case = Case {
                fault,
                source,
                object: "PeerAuthentication t/s",
                place: "s.yaml:",
                field: "tls",
                says: "denied",
                ..REFUSED
            };
            case.check(lab)?;
            let inside = Case { source: "t/a2", allowed: true, object: "", place: "", field: "", says: "", ..case };
            ensure!(
                why(lab, inside.source, inside.destination)?["allowed"] == true,
                "{fault}: the mesh's own are kept out"
            );
            ensure!(reaches(lab, inside.source, inside.destination)?, "{fault}: the mesh's own are kept out");
            delete(lab, "s.yaml")?;
        }
        Ok(())
    });
}

#[test]
fn what_keeps_a_pod_out_of_the_mesh_is_named() {
    const MODE: &str = "metadata.labels[istio.io/dataplane-mode]";
    in_mesh(|lab| {
        apply(
            lab,
            "out.yaml",
            &[
                pod("labelled-out", "t", ", labels: {istio.io/dataplane-mode: none}"),
                pod("sidecar", "t", ", annotations: {sidecar.istio.io/status: \"{}\"}"),
                pod("typo", "elsewhere", ", labels: {istio.io/dataplane-mode: ambiant}"),
                pod("host", "t", "").replace("spec:\n", "spec:\n  hostNetwork: true\n"),
            ]
            .join("---\n"),
        )?;
        let cases = [
            (
                "its namespace has no label",
                "elsewhere/outsider",
                "Namespace elsewhere",
                MODE,
                "neither it nor its namespace",
            ),
            ("its label says none", "t/labelled-out", "Pod t/labelled-out", MODE, "`none`"),
            ("its label is misspelt", "elsewhere/typo", "Pod elsewhere/typo", MODE, "`ambiant`"),
            (
                "it has a sidecar",
                "t/sidecar",
                "Pod t/sidecar",
                "metadata.annotations[sidecar.istio.io/status]",
                "sidecar",
            ),
            ("it uses the host's network", "t/host", "Pod t/host", "spec.hostNetwork", "host's network"),
        ];
        for (fault, source, object, field, says) in cases {
            Case { fault, source, allowed: true, object, field, says, ..REFUSED }.check(lab)?;
        }
        let outside = Case {
            fault: "the destination is outside",
            destination: "elsewhere/outsider:80",
            object: "Pod elsewhere/outsider",
            field: "port 80",
            says: "failed",
            ..REFUSED
        };
        outside.check(lab)?;
        let answer = why(lab, "t/a2", "elsewhere/outsider:80")?;
        let note = Case {
            allowed: true,
            object: "Namespace elsewhere",
            field: MODE,
            says: "no policy protects it",
            ..outside
        };
        ensure!(answer["findings"].as_array().context("findings")?.iter().any(|f| note.is_named_by(f)), "{answer:#}");
        Ok(())
    });
}

#[test]
fn what_is_wrong_with_a_service_is_named() {
    in_mesh(|lab| {
        let service =
            |spec: &str| format!("apiVersion: v1\nkind: Service\nmetadata: {{name: s, namespace: t}}\nspec: {spec}\n");
        let case =
            |fault, destination, object, field, says| Case { fault, destination, object, field, says, ..REFUSED };
        case("a port that the service has not", "t/b:81", "Service t/b", "spec.ports", "it has 80").check(lab)?;
        apply(lab, "s.yaml", &service("{selector: {app: nobody}, ports: [{port: 80, targetPort: 8080}]}"))?;
        case("a selector that picks nobody", "t/s:80", "Service t/s", "spec.selector", "picks no running pod")
            .check(lab)?;
        apply(lab, "s.yaml", &service("{selector: {app: b}, ports: [{port: 80, targetPort: 8081}]}"))?;
        case("a wrong target port", "t/s:80", "Service t/s", "spec.ports[80].targetPort", "nothing in pod t/b answers")
            .check(lab)?;
        fault(lab, Fault::Unready { pod: "t/b".to_owned() })?;
        case("no endpoint is ready", "t/b:80", "Pod t/b", "status.conditions[Ready]", "not ready").check(lab)?;
        fault(lab, Fault::Ready { pod: "t/b".to_owned() })?;
        eventually("the endpoint", || {
            ensure!(why(lab, "t/a2", "t/b:80")?["allowed"] == true, "not yet");
            Ok(())
        })
    });
}

#[test]
fn what_blocks_the_way_is_named() {
    in_mesh(|lab| {
        let case = |fault, object, field, says| Case { fault, object, field, says, ..REFUSED };
        fault(lab, Fault::Block { pod: "t/b".to_owned(), port: 8080 })?;
        case("the application's port is dropped", "Service t/b", "targetPort", "nothing in pod t/b answers")
            .check(lab)?;
        fault(lab, Fault::Unblock { pod: "t/b".to_owned() })?;
        fault(lab, Fault::Block { pod: "t/b".to_owned(), port: 15008 })?;
        // Only a new tunnel meets the rule.
        fault(lab, Fault::Kill { program: "ztunnel/node1".to_owned(), restart: true })?;
        case("a NetworkPolicy drops 15008", "NetworkPolicy", "port 15008", "NetworkPolicy").check(lab)?;
        fault(lab, Fault::Unblock { pod: "t/b".to_owned() })?;
        fault(lab, Fault::Kill { program: "agent/node1".to_owned(), restart: false })?;
        let agent = Case {
            allowed: true,
            object: "the node agent on node1",
            field: "",
            says: "does not answer",
            ..case("no agent", "", "", "")
        };
        agent.check(lab)?;
        fault(lab, Fault::Kill { program: "ztunnel/node1".to_owned(), restart: false })?;
        case("no ztunnel", "the ztunnel on node1", "", "does not answer").check(lab)
    });
}

#[test]
fn a_certificate_that_ran_out_is_named() {
    let options = Options { certificate_ttl: "5s".to_owned(), ..Options::default() };
    in_mesh_of(&options, |lab| {
        fault(lab, Fault::Freeze { program: "fairwayd".to_owned() })?;
        let (object, field) = ("certificate of spiffe://cluster.local/ns/t/sa/a", "notAfter");
        Case { fault: "an expired certificate", object, field, says: "certificate", ..REFUSED }.check(lab)?;
        fault(lab, Fault::Thaw { program: "fairwayd".to_owned() })
    });
}

#[test]
fn leaving_the_mesh_changes_the_answer() {
    in_mesh(|lab| {
        ensure!(why(lab, "t/a2", "t/b:80")?["outbound"]["nextHop"]["type"] == "hbone", "enrolled");
        label(lab, None)?;
        let (object, field) = ("Namespace t", "metadata.labels[istio.io/dataplane-mode]");
        Case { fault: "the label is gone", allowed: true, object, field, says: "not in the mesh", ..REFUSED }.check(lab)
    });
}

/// A host, and where it leads: to pod b, whose address is filled in, under an identity that it has, or not.
fn entry(lab: &Lab, host: &str, account: &str) -> anyhow::Result<String> {
    let pods = lab.status()?.pods;
    let address = &pods.iter().find(|p| p.name == "b").context("b")?.addresses[0];
    Ok(format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: e, namespace: t, labels: {{networking.istio.io/tunnel: http}}}}\nspec:\n  hosts: [{host}]\n  \
         location: MESH_INTERNAL\n  resolution: STATIC\n  ports: [{{number: 80, name: http, protocol: TCP, targetPort: 8080}}]\n  \
         endpoints: [{{address: {address}, serviceAccount: {account}}}]\n"
    ))
}

#[test]
fn names_that_only_the_mesh_knows_need_the_meshs_dns() {
    in_mesh(|lab| {
        apply(lab, "e.yaml", &entry(lab, "shop.example.com", "b")?)?;
        apply(lab, "deaf.yaml", &pod("deaf", "t", ", annotations: {ambient.istio.io/dns-capture: \"false\"}"))?;
        let destination = "shop.example.com:80";
        let heard = Case { fault: "nothing", destination, allowed: true, ..REFUSED };
        eventually("the host", || {
            ensure!(why(lab, heard.source, destination)?["allowed"] == true, "not yet");
            Ok(())
        })?;
        ensure!(reaches(lab, heard.source, destination)?, "the mesh knows the name");
        let (object, field) = ("Pod t/deaf", "metadata.annotations[ambient.istio.io/dns-capture]");
        Case {
            fault: "DNS is not captured",
            source: "t/deaf",
            allowed: false,
            object,
            field,
            says: "does not pass the mesh",
            ..heard
        }
        .check(lab)
    });
}

#[test]
fn whoever_answers_as_somebody_else_is_named() {
    in_mesh(|lab| {
        apply(lab, "e.yaml", &entry(lab, "shop.example.com", "impostor")?)?;
        Case {
            fault: "another identity",
            destination: "shop.example.com:80",
            object: "Pod t/b",
            field: "identity",
            says: "peer did not present the expected SAN",
            ..REFUSED
        }
        .check(lab)
    });
}

#[test]
fn what_the_mesh_config_forbids_is_named() {
    in_mesh(|lab| {
        let config = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\ndata:\n  mesh: |\n    outboundTrafficPolicy:\n      mode: REGISTRY_ONLY\n";
        apply(lab, "mesh.yaml", config)?;
        let (object, field) = ("ConfigMap istio-system/istio", "outboundTrafficPolicy");
        Case {
            fault: "a destination outside the registry",
            destination: "172.18.0.12:80",
            object,
            field,
            says: "REGISTRY_ONLY",
            ..REFUSED
        }
        .check(lab)?;
        ensure!(reaches(lab, "t/a2", "t/b:80")?, "the registry is not forbidden");
        Ok(())
    });
}

#[test]
fn a_waypoint_that_is_not_there_is_named() {
    in_mesh(|lab| {
        let manifests = "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: gate, namespace: t}\nspec:\n  gatewayClassName: istio-waypoint\n  \
             listeners: [{name: mesh, port: 15008, protocol: HBONE}]\n---\napiVersion: v1\nkind: Service\nmetadata: {name: gate, namespace: t}\nspec: {selector: {app: gate}, ports: [{port: 15008}]}\n\
             ---\napiVersion: v1\nkind: Service\nmetadata: {name: s, namespace: t, labels: {istio.io/use-waypoint: gate}}\n\
             spec: {selector: {app: b}, ports: [{port: 80, targetPort: 8080}]}\n";
        apply(lab, "w.yaml", manifests)?;
        let (object, field) = ("Service t/s", "metadata.labels[istio.io/use-waypoint]");
        Case {
            fault: "a waypoint without pods",
            destination: "t/s:80",
            object,
            field,
            says: "unknown waypoint",
            ..REFUSED
        }
        .check(lab)
    });
}
