//! `fairway check --strict NS`: who still talks to a namespace without the mesh's TLS, and so would be refused under STRICT.
//!
//! Told by the ztunnels on the receiving side. Pods that are not captured have none that could tell: they are named.

use std::{collections::BTreeMap, process::ExitCode, time::Duration};

use cni_plugin::agent::{
    enroll::Redirection,
    status::{REDIRECTION, redirection_named},
};
use futures_util::{StreamExt as _, stream};
use serde::Serialize;
use serde_json::{Value, json};

use super::membership::{self, Membership};
use crate::{
    args::Check,
    cluster::{Cluster, rollout},
    component::ZTUNNEL,
    counters,
    output::{self, bad, good, say},
};

const OPENED: &str = "istio_tcp_connections_opened_total";
/// Pods asked at a time.
const ASKED: usize = 8;

/// Who calls whom in clear, and how often.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Caller {
    source: String,
    destination: String,
    /// Since the ztunnel started, or within the time that was watched.
    connections: f64,
    open: usize,
}

/// By source and destination.
type Counts = BTreeMap<(String, String), f64>;

pub(super) async fn run(cluster: &Cluster, query: &Check, namespace: &str) -> anyhow::Result<ExitCode> {
    let ztunnels = ZTUNNEL.pods(cluster, &query.namespace).await?;
    let names: Vec<String> = ztunnels
        .iter()
        .filter(|pod| rollout::is_ready(pod))
        .filter_map(|pod| pod["metadata"]["name"].as_str().map(str::to_owned))
        .collect();
    anyhow::ensure!(!names.is_empty(), "no ztunnel is ready in namespace {} of {}", query.namespace, cluster.server);
    let mut looks = look(cluster, &query.namespace, &names, namespace).await?;
    if let Some(watched) = query.watch {
        tokio::time::sleep(watched).await;
        let after = look(cluster, &query.namespace, &names, namespace).await?;
        looks = looks.iter().zip(&after).map(|(before, after)| gained(before, after)).collect();
    }
    let mut counts = Counts::new();
    for (pair, count) in looks.into_iter().flatten() {
        *counts.entry(pair).or_default() += count;
    }
    let all = cluster.list(&format!("/api/v1/namespaces/{namespace}/pods"), "").await?;
    let open = open(cluster, &query.namespace, &names, namespace).await?;
    let callers = join(counts, open);
    let unseen = uncaptured(&all, &Membership::read(cluster, &query.namespace).await?);
    let document = json!({ "namespace": namespace, "callers": callers, "unseen": unseen });
    say!("{}", query.output.render(&document, || text(namespace, query.watch, &callers, &unseen))?);
    Ok(if callers.is_empty() && unseen.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What each ztunnel has counted, in their order.
async fn look(cluster: &Cluster, system: &str, ztunnels: &[String], namespace: &str) -> anyhow::Result<Vec<Counts>> {
    let bodies = ask(cluster, system, ztunnels, 15020, "/metrics").await?;
    Ok(bodies.iter().map(|body| plaintext(body, namespace)).collect())
}

/// One that does not answer could be the one that knows: it is an error.
async fn ask(
    cluster: &Cluster,
    system: &str,
    ztunnels: &[String],
    port: u16,
    path: &str,
) -> anyhow::Result<Vec<String>> {
    let asked = ztunnels.iter().map(|name| async move {
        let (status, body) = cluster.page(system, name, port, path).await?;
        anyhow::ensure!(status == 200, "{name} says {status} at {path}");
        Ok(body)
    });
    let answers: Vec<anyhow::Result<String>> = stream::iter(asked).buffered(ASKED).collect().await;
    answers.into_iter().collect()
}

fn plaintext(metrics: &str, namespace: &str) -> Counts {
    let mut counts = Counts::new();
    for sample in counters::parse(metrics).filter(|sample| sample.name == OPENED && sample.value > 0.0) {
        let into = sample.label("destination_workload_namespace") == namespace;
        let clear = sample.label("connection_security_policy") != "mutual_tls";
        if into && clear && sample.label("reporter") == "destination" {
            let party = |side: &str| match (
                sample.label(&format!("{side}_workload_namespace")),
                sample.label(&format!("{side}_workload")),
            ) {
                ("unknown" | "", _) => "(unknown)".to_owned(),
                (namespace, workload) => format!("{namespace}/{workload}"),
            };
            *counts.entry((party("source"), party("destination"))).or_default() += sample.value;
        }
    }
    counts
}

/// What happened between two looks. A counter that fell belongs to a new process: all it says is new.
fn gained(before: &Counts, after: &Counts) -> Counts {
    let gain = |(pair, now): (&(String, String), &f64)| {
        let old = before.get(pair).copied().unwrap_or_default();
        (pair.clone(), if *now >= old { now - old } else { *now })
    };
    after.iter().map(gain).filter(|(_, count)| *count > 0.0).collect()
}

/// Open plaintext connections into the namespace, by the pods' names.
async fn open(
    cluster: &Cluster,
    system: &str,
    ztunnels: &[String],
    namespace: &str,
) -> anyhow::Result<BTreeMap<(String, String), usize>> {
    let mut found = BTreeMap::new();
    for body in ask(cluster, system, ztunnels, 15000, "/config_dump?part=workloadState").await? {
        let dump: Value = serde_json::from_str(&body)?;
        for pod in dump["workloadState"].as_object().into_iter().flat_map(|pods| pods.values()) {
            if pod["info"]["namespace"] != namespace {
                continue;
            }
            let destination = format!("{namespace}/{}", pod["info"]["name"].as_str().unwrap_or_default());
            let inbound = pod["connections"]["inbound"].as_array().into_iter().flatten();
            for connection in inbound.filter(|connection| connection["protocol"] == "TCP") {
                let source = connection["src"].as_str().unwrap_or_default();
                let source = source.rsplit_once(':').map_or(source, |(address, _)| address).to_owned();
                *found.entry((source, destination.clone())).or_default() += 1;
            }
        }
    }
    Ok(found)
}

/// Counters know workloads, open connections know addresses and pods: each is a line of its own.
fn join(counts: Counts, open: BTreeMap<(String, String), usize>) -> Vec<Caller> {
    let counted = counts.into_iter().map(|((source, destination), connections)| Caller {
        source,
        destination,
        connections,
        open: 0,
    });
    let open =
        open.into_iter().map(|((source, destination), open)| Caller { source, destination, connections: 0.0, open });
    counted.chain(open).collect()
}

/// Pods of the namespace that run outside the mesh though they could be in it: STRICT is not for those that opted out, or never are.
fn uncaptured(pods: &[Value], membership: &Membership) -> Vec<String> {
    let running = pods.iter().filter(|pod| pod["status"]["phase"] == "Running").filter_map(membership::pod);
    let captured = |text: &String| redirection_named(text) == Some(Redirection::Enabled);
    let outside =
        running.filter(|pod| membership.could_belong(pod) && !pod.annotations.get(REDIRECTION).is_some_and(captured));
    outside.map(|pod| pod.name).collect()
}

fn text(namespace: &str, watched: Option<Duration>, callers: &[Caller], unseen: &[String]) -> String {
    let mut lines = Vec::new();
    if !callers.is_empty() {
        let count = |caller: &Caller| {
            if caller.connections > 0.0 { format!("{:.0}", caller.connections) } else { String::new() }
        };
        let open = |caller: &Caller| if caller.open > 0 { caller.open.to_string() } else { String::new() };
        let rows = callers
            .iter()
            .map(|caller| vec![caller.source.clone(), caller.destination.clone(), count(caller), open(caller)]);
        let heading = watched
            .map_or_else(|| "SINCE START".to_owned(), |watched| format!("IN {}", humantime::format_duration(watched)));
        lines.push(output::table(&["SOURCE", "DESTINATION", &heading, "OPEN NOW"], rows).to_string());
    }
    if !unseen.is_empty() {
        lines.push(format!("not captured, so nobody sees who calls them: {}", super::some(unseen)));
    }
    lines.push(match callers.is_empty() && unseen.is_empty() {
        true => format!("{}: every connection into {namespace} that was seen is mutual TLS", good("ready for STRICT")),
        false => format!("{}: under STRICT these would be refused, or are not protected", bad("not ready for STRICT")),
    });
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use cni_plugin::eligibility::MODE;

    use super::*;

    fn line(reporter: &str, source: &str, into: &str, security: &str, value: u32) -> String {
        format!(
            "{OPENED}{{reporter=\"{reporter}\",source_workload=\"{source}\",source_workload_namespace=\"{}\",destination_workload=\"b\",\
             destination_workload_namespace=\"{into}\",connection_security_policy=\"{security}\"}} {value}\n",
            if source == "unknown" { "unknown" } else { "t" }
        )
    }

    #[test]
    fn only_plaintext_into_the_namespace_counts_and_only_by_its_receiver() {
        let text = line("destination", "a", "d", "unknown", 3)
            + &line("destination", "a", "d", "mutual_tls", 9)
            + &line("source", "a", "d", "unknown", 9)
            + &line("destination", "a", "other", "unknown", 9)
            + &line("destination", "unknown", "d", "unknown", 2);
        let counts = plaintext(&text, "d");
        let pair = |source: &str| (source.to_owned(), "d/b".to_owned());
        assert_eq!(counts, [(pair("(unknown)"), 2.0), (pair("t/a"), 3.0)].into());
        assert_eq!(
            gained(&counts, &[(pair("t/a"), 5.0), (pair("(unknown)"), 2.0)].into()),
            [(pair("t/a"), 2.0)].into()
        );
        assert_eq!(gained(&counts, &[(pair("t/a"), 1.0)].into()), [(pair("t/a"), 1.0)].into());
    }

    #[test]
    fn running_pods_that_could_be_in_the_mesh_and_are_not_are_unseen() {
        let pod = |name: &str, phase: &str, changed: Value| {
            let mut pod = json!({"metadata": {"name": name, "uid": name, "namespace": "d"}, "spec": {"nodeName": "n"}, "status": {"phase": phase}});
            for (part, value) in changed.as_object().unwrap() {
                pod["metadata"][part] = value.clone();
            }
            pod
        };
        let enrolled = |value: &str| json!({"annotations": {REDIRECTION: value}});
        let mut host = pod("host", "Running", json!({}));
        host["spec"]["hostNetwork"] = true.into();
        let pods = [
            pod("in", "Running", enrolled("enabled")),
            pod("out", "Running", enrolled("pending")),
            pod("unlabelled", "Running", json!({})),
            pod("done", "Succeeded", json!({})),
            pod("opted-out", "Running", json!({"labels": {MODE: "none"}})),
            pod("sidecar", "Running", json!({"annotations": {"sidecar.istio.io/status": "{}"}})),
            pod("excluded", "Running", json!({"namespace": "kube-system"})),
            host,
        ];
        assert_eq!(uncaptured(&pods, &Membership::default()), ["out", "unlabelled"]);
    }
}
