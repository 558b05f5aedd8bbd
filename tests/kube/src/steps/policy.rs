use std::time::Duration;

use anyhow::ensure;

use crate::{
    cluster::{Cluster, INSIDE, OUTSIDE, text},
    kubectl,
    report::Evidence,
};

const PATIENCE: Duration = Duration::from_secs(20);

const ONLY_THE_CLIENT: &str = r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: only-the-client, namespace: fairway-e2e}
spec:
  selector: {matchLabels: {app: server}}
  action: ALLOW
  rules: [{from: [{source: {principals: [cluster.local/ns/fairway-e2e/sa/client]}}]}]
"#;

const NEEDS_A_WAYPOINT: &str = r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: needs-a-waypoint, namespace: fairway-e2e}
spec:
  selector: {matchLabels: {app: nobody}}
  action: ALLOW
  rules: [{to: [{operation: {paths: [/private]}}]}]
"#;

/// Well-formed, as far as its definition can say.
const WITH_A_SCHEME: &str = r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: with-a-scheme, namespace: fairway-e2e}
spec:
  selector: {matchLabels: {app: nobody}}
  rules: [{from: [{source: {principals: ["spiffe://cluster.local/ns/fairway-e2e/sa/client"]}}]}]
"#;

const STRICT: &str = r#"
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: strict, namespace: fairway-e2e}
spec: {mtls: {mode: STRICT}}
"#;

pub(super) fn identities(cluster: &Cluster) -> Evidence {
    let (client, visitor) = (cluster.pod(INSIDE, "client")?.name, cluster.pod(INSIDE, "visitor")?.name);
    cluster.get(INSIDE, &visitor, "http://server/")?;
    kubectl::apply(ONLY_THE_CLIENT, "")?;
    let cut = kubectl::eventually("the visitor to be refused", PATIENCE, || {
        cluster.refused(INSIDE, &visitor, "http://server/")
    })?;
    let allowed = cluster.get(INSIDE, &client, "http://server/")?;
    let accepted = condition("only-the-client")?;
    ensure!(accepted.0 == "True", "the policy's status: {accepted:?}");
    kubectl::apply(NEEDS_A_WAYPOINT, "")?;
    let unsupported = kubectl::eventually("the other policy's status", PATIENCE, || {
        let (_, reason, message) = condition("needs-a-waypoint")?;
        ensure!(reason == "UnsupportedValue", "reason {reason}: {message}");
        Ok(message)
    })?;
    let denied = kubectl::eventually("a wrong policy to be denied", PATIENCE, || {
        // Whatever comes of it, nothing is kept.
        match kubectl::run_with_input(&["apply", "--dry-run=server", "-f", "-"], WITH_A_SCHEME) {
            Ok(taken) => anyhow::bail!("it was taken: {taken}"),
            Err(error) => Ok(error.to_string()),
        }
    })?;
    ensure!(denied.contains("spec.rules[0].from[0].source.principals[0]"), "why the policy is denied: {denied}");
    kubectl::run(&["-n", INSIDE, "delete", "authorizationpolicies.security.istio.io", "--all"])?;
    kubectl::eventually("the visitor to be let in again", PATIENCE, || {
        cluster.get(INSIDE, &visitor, "http://server/")
    })?;
    Ok(vec![
        format!("the visitor is refused: {cut}"),
        format!("the client is not: {}", allowed.trim()),
        "ZtunnelAccepted is True".to_owned(),
        format!("a policy that needs L7 says so: {unsupported}"),
        format!("a wrong one is denied: {denied}"),
    ])
}

fn condition(policy: &str) -> anyhow::Result<(String, String, String)> {
    kubectl::eventually("a condition ZtunnelAccepted", PATIENCE, || {
        let object = kubectl::get(&["-n", INSIDE, "authorizationpolicies.security.istio.io", policy])?;
        let conditions = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let found = conditions.iter().find(|c| c["type"] == "ZtunnelAccepted");
        let found = found.ok_or_else(|| anyhow::anyhow!("it has conditions {conditions:?}"))?;
        Ok((text(&found["status"]), text(&found["reason"]), text(&found["message"])))
    })
}

/// `fairway check --strict` names the stranger that calls in clear text, and nobody once he has stopped.
pub(super) fn before_strict(cluster: &Cluster) -> Evidence {
    let (client, stranger) = (cluster.pod(INSIDE, "client")?.name, cluster.pod(OUTSIDE, "stranger")?.name);
    let url = format!("http://server.{INSIDE}/");
    cluster.get(OUTSIDE, &stranger, &url)?;
    cluster.get(INSIDE, &client, &url)?;
    let named = callers(cluster, &[])?;
    ensure!(named.iter().any(|caller| caller.starts_with(&format!("{OUTSIDE}/stranger "))), "it names {named:?}");
    let later = callers(cluster, &["--for", "5s"])?;
    ensure!(later.is_empty(), "nobody called meanwhile, and it names {later:?}");
    Ok(vec![format!("named: {}", named.join("; ")), "and nobody in the five seconds after".to_owned()])
}

fn callers(cluster: &Cluster, options: &[&str]) -> anyhow::Result<Vec<String>> {
    let said = cluster.answer(&[&["check", "--strict", INSIDE, "-o", "json"], options].concat())?;
    let callers = said["callers"].as_array().cloned().unwrap_or_default();
    Ok(callers.iter().map(|c| format!("{} to {}", text(&c["source"]), text(&c["destination"]))).collect())
}

pub(super) fn strict(cluster: &Cluster) -> Evidence {
    let (client, stranger) = (cluster.pod(INSIDE, "client")?.name, cluster.pod(OUTSIDE, "stranger")?.name);
    let url = format!("http://server.{INSIDE}/");
    cluster.get(OUTSIDE, &stranger, &url)?;
    let before = restarts(cluster)?;
    kubectl::apply(STRICT, "")?;
    let cut =
        kubectl::eventually("the stranger to be refused", PATIENCE, || cluster.refused(OUTSIDE, &stranger, &url))?;
    cluster.get(INSIDE, &client, &url)?;
    // Probes come every second and three failures end a container: in ten seconds three would have.
    std::thread::sleep(Duration::from_secs(10));
    let servers = cluster.pods(INSIDE, "server")?;
    ensure!(servers.iter().all(|pod| pod.ready), "servers are not ready: {servers:?}");
    ensure!(restarts(cluster)? == before, "containers were restarted");
    kubectl::run(&["-n", INSIDE, "delete", "peerauthentication", "strict"])?;
    kubectl::eventually("the stranger to be let in again", PATIENCE, || cluster.get(OUTSIDE, &stranger, &url))?;
    Ok(vec![
        format!("the stranger is refused: {cut}"),
        format!("{} servers, probed over HTTP every second, stay ready and are not restarted", servers.len()),
    ])
}

fn restarts(cluster: &Cluster) -> anyhow::Result<Vec<(String, u64)>> {
    let servers = cluster.pods(INSIDE, "server")?;
    Ok(servers.into_iter().map(|pod| (pod.name, pod.containers.iter().map(|c| c.2).sum())).collect())
}
