//! Waypoints on the way: traffic to what is bound to one goes through its pod, or nowhere.
//!
//! The waypoint is a relay without any mesh knowledge behind a Gateway with an inbound binding: its node's ztunnel ends the tunnels
//! and tells it who calls whom.

use std::collections::BTreeSet;

use anyhow::{Context as _, ensure};
use lab::{
    apps::relay::Told,
    control::Lab,
    protocol::{Fault, Request},
};

use super::harness::{apply, eventually, get, in_lab, transfer, why};

/// On each node a client and a server; what is labelled goes through the waypoint on node2.
const PODS: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: t, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Pod
metadata: {name: near, namespace: t}
spec: {nodeName: node2, serviceAccountName: client, containers: [{name: idle, command: [fairway, app, idle]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: far, namespace: t}
spec: {nodeName: node1, serviceAccountName: client, containers: [{name: idle, command: [fairway, app, idle]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: s1, namespace: t, labels: {app: web}}
spec:
  nodeName: node1
  serviceAccountName: server
  containers: [{name: http, command: [fairway, app, http]}, {name: stream, command: [fairway, app, stream]}]
---
apiVersion: v1
kind: Pod
metadata: {name: s2, namespace: t, labels: {app: web}}
spec:
  nodeName: node2
  serviceAccountName: server
  containers: [{name: http, command: [fairway, app, http]}, {name: stream, command: [fairway, app, stream]}]
---
apiVersion: v1
kind: Pod
metadata: {name: bound, namespace: t, labels: {app: web, istio.io/use-waypoint: wp}}
spec: {nodeName: node1, serviceAccountName: server, containers: [{name: http, command: [fairway, app, http]}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: t, labels: {istio.io/use-waypoint: wp}}
spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}, {name: stream, port: 9001}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: waypoint-only, namespace: t}
spec:
  selector: {matchLabels: {app: web}}
  rules: [{from: [{source: {principals: [cluster.local/ns/t/sa/waypoint]}}]}]
"#;

/// A Gateway, its Service and its one pod.
fn waypoint(name: &str, node: &str) -> String {
    format!(
        r#"
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata:
  name: {name}
  namespace: t
  labels: {{istio.io/waypoint-for: all}}
  annotations: {{ambient.istio.io/waypoint-inbound-binding: PROXY/15088}}
spec: {{gatewayClassName: istio-waypoint, listeners: [{{name: mesh, port: 15008, protocol: HBONE}}]}}
---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: t}}
spec: {{selector: {{gateway.networking.k8s.io/gateway-name: {name}}}, ports: [{{name: hbone, port: 15008}}]}}
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: t, labels: {{gateway.networking.k8s.io/gateway-name: {name}}}}}
spec:
  nodeName: {node}
  serviceAccountName: waypoint
  containers: [{{name: relay, command: [fairway, app, relay]}}]
"#
    )
}

fn in_waypoint_mesh(test: impl FnOnce(&Lab) -> anyhow::Result<()>) {
    in_lab(|owned| {
        let lab = &owned.lab;
        apply(lab, "waypoint.yaml", &waypoint("wp", "node2"))?;
        apply(lab, "pods.yaml", PODS)?;
        for client in ["t/near", "t/far"] {
            eventually("the way through the waypoint", || get(lab, client, "http://web/ready"))?;
        }
        test(lab)
    });
}

fn address(lab: &Lab, pod: &str) -> anyhow::Result<String> {
    let pods = lab.status()?.pods;
    let pod = pods.into_iter().find(|p| p.name == pod).with_context(|| format!("no pod {pod}"))?;
    pod.addresses.into_iter().find(|address| !address.contains(':')).context("no IPv4 address")
}

/// What the relay was told last.
fn told(lab: &Lab) -> anyhow::Result<Told> {
    let text = lab.ask(&Request::Logs { name: "t/wp".to_owned(), lines: 1 })?.text;
    serde_json::from_str(&text).with_context(|| format!("the relay says {text:?}"))
}

#[test]
fn bound_services_and_pods_are_reached_through_the_waypoint_which_knows_the_client() {
    in_waypoint_mesh(|lab| {
        let (relay, bound) = (address(lab, "wp")?, address(lab, "bound")?);
        for (client, pod) in [("t/near", "near"), ("t/far", "far")] {
            // The servers admit the waypoint only, so whoever is answered has passed it.
            for (url, port) in
                [("http://web/x", 80), ("http://web-v6/x", 80), (&*format!("http://{bound}:8080/x"), 8080)]
            {
                let answer = get(lab, client, url)?;
                ensure!(url.contains("-v6") || answer.contains(&format!("saw {relay} ask")), "{url}: {answer}");
                let told = told(lab)?;
                ensure!(told.identity.as_deref() == Some("spiffe://cluster.local/ns/t/sa/client"), "{told:?}");
                ensure!(told.destination.port() == port, "{told:?}");
                ensure!(told.source.is_ipv6() || told.source.ip().to_string() == address(lab, pod)?, "{told:?}");
            }
            transfer(lab, client, &["bulk", "web:9001", "--bytes", "3000000", "--connections", "2"])?;
            let around = format!("http://{}:8080/around", address(lab, "s1")?);
            ensure!(get(lab, client, &around).is_err(), "{client} goes around the waypoint");
        }
        Ok(())
    });
}

#[test]
fn without_its_waypoint_nothing_is_reached_and_the_label_is_named() {
    in_waypoint_mesh(|lab| {
        lab.ask(&Request::Fault(Fault::Unready { pod: "t/wp".to_owned() }))?;
        for (destination, object) in [("t/web:80", "Service t/web"), ("t/bound:8080", "Pod t/bound")] {
            let finding = eventually("the waypoint to be missed", || {
                let answer = why(lab, "t/far", destination)?;
                ensure!(answer["allowed"] == false, "{answer:#}");
                Ok(answer["findings"][0].clone())
            })?;
            ensure!(finding["object"] == object && finding["reason"] == "no_route", "{finding:#}");
            ensure!(finding["field"] == "metadata.labels[istio.io/use-waypoint]", "{finding:#}");
        }
        for client in ["t/near", "t/far"] {
            eventually("refusal", || {
                ensure!(get(lab, client, "http://web/x").is_err(), "it is bypassed");
                Ok(())
            })?;
        }
        lab.ask(&Request::Fault(Fault::Ready { pod: "t/wp".to_owned() }))?;
        eventually("the waypoint again", || get(lab, "t/far", "http://web/x"))?;
        Ok(())
    });
}

#[test]
fn a_policy_on_the_waypoint_decides_who_gets_through_and_is_named() {
    in_waypoint_mesh(|lab| {
        let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: closed, namespace: t}\nspec:\n  \
             selector: {matchLabels: {gateway.networking.k8s.io/gateway-name: wp}}\n  action: DENY\n  \
             rules: [{from: [{source: {principals: [cluster.local/ns/t/sa/client]}}]}]\n";
        apply(lab, "closed.yaml", policy)?;
        eventually("the policy", || {
            let answer = why(lab, "t/far", "t/web:80")?;
            let named = |f: &serde_json::Value| f["object"] == "AuthorizationPolicy t/closed" && f["blocks"] == true;
            ensure!(answer["findings"].as_array().context("findings")?.iter().any(named), "{answer:#}");
            Ok(())
        })?;
        for client in ["t/near", "t/far"] {
            ensure!(get(lab, client, "http://web/x").is_err(), "{client} gets through");
        }
        lab.ask(&Request::Delete { pod: None, file: Some("closed.yaml".to_owned()) })?;
        eventually("the way to be open again", || get(lab, "t/far", "http://web/x"))?;
        Ok(())
    });
}

#[test]
fn a_waypoint_that_ends_tunnels_itself_need_not_be_in_the_mesh() {
    in_waypoint_mesh(|lab| {
        let own = waypoint("own", "node1")
            .replace("  annotations: {ambient.istio.io/waypoint-inbound-binding: PROXY/15088}\n", "")
            .replace("gateway-name: own}}", "gateway-name: own, istio.io/dataplane-mode: none}}")
            .replace("[fairway, app, relay]", "[fairway, app, echo, --listen, \"[::]:15009\"]");
        apply(lab, "own.yaml", &own)?;
        let service = "apiVersion: v1\nkind: Service\nmetadata: {name: s, namespace: t, labels: {istio.io/use-waypoint: own}}\n\
             spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}\n";
        apply(lab, "s.yaml", service)?;
        // Nobody listens for tunnels: that is what is wrong, and all of it.
        eventually("the waypoint to be asked for", || {
            let answer = why(lab, "t/far", "t/s:80")?;
            let findings = answer["findings"].as_array().context("findings")?;
            ensure!(answer["outbound"]["nextHop"]["type"] == "waypoint", "{answer:#}");
            ensure!(findings.len() == 1 && findings[0]["field"] == "port 15008", "{answer:#}");
            ensure!(findings[0]["object"] == "Pod t/own", "{answer:#}");
            Ok(())
        })
    });
}

/// The waypoints dial the address by which they were reached: neither hands its connections to the other.
#[test]
fn a_canary_takes_its_share_and_waypoints_do_not_pass_connections_around() {
    in_waypoint_mesh(|lab| {
        apply(lab, "canary.yaml", &waypoint("new", "node1"))?;
        let service = r#"
apiVersion: v1
kind: Service
metadata:
  name: split
  namespace: t
  labels: {istio.io/use-waypoint: wp, istio.io/use-waypoint-canary: new}
  annotations: {istio.io/use-waypoint-canary-weight: "50"}
spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]}
"#;
        apply(lab, "split.yaml", service)?;
        let through: BTreeSet<String> = eventually("both waypoints", || {
            let answers = (0..8).map(|_| get(lab, "t/far", "http://split/x")).collect::<Result<Vec<_>, _>>()?;
            let seen = |answer: &String| answer.split(' ').nth(2).unwrap_or_default().to_owned();
            let through: BTreeSet<String> = answers.iter().map(seen).collect();
            ensure!(through.len() == 2, "only {through:?}");
            Ok(through)
        })?;
        ensure!(through == BTreeSet::from([address(lab, "wp")?, address(lab, "new")?]), "{through:?}");
        let told_by = |name: &str| {
            let text = lab.ask(&Request::Logs { name: format!("t/{name}"), lines: 100 })?.text;
            let told = text.lines().map(serde_json::from_str::<Told>).collect::<Result<Vec<_>, _>>()?;
            anyhow::Ok(told.into_iter().filter_map(|told| told.identity).collect::<BTreeSet<_>>())
        };
        let client = BTreeSet::from(["spiffe://cluster.local/ns/t/sa/client".to_owned()]);
        for name in ["wp", "new"] {
            let callers = told_by(name)?;
            ensure!(callers == client, "{name} was called by {callers:?}");
        }
        Ok(())
    });
}
