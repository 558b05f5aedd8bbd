//! `fairway check --strict NS`: who still talks to a namespace without the mesh's TLS, and so would be refused under STRICT.
//!
//! Told by the ztunnels on the receiving side. Pods that are not captured have none that could tell: they are named. Connections that are
//! older than the capture are told by the node agents.

use std::{collections::BTreeMap, process::ExitCode, time::Duration};

use cni_plugin::agent::{
    enroll::Redirection,
    status::{REDIRECTION, redirection_named},
};
use futures_util::{StreamExt as _, stream};
use serde::Serialize;
use serde_json::{Value, json};

use super::{
    membership::{self, Membership},
    older,
};
use crate::{
    args::Check,
    cluster::{Cluster, rollout},
    component::{AGENT, Component, ZTUNNEL},
    counters,
    output::{self, bad, dim, good, say},
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

/// What one ztunnel has counted.
#[derive(Clone, Debug, Default, PartialEq)]
struct Look {
    clear: Counts,
    /// Mutual TLS.
    sealed: Counts,
}

/// Open connections into the namespace.
#[derive(Debug, Default)]
struct Open {
    /// By the caller's address and the pod's name.
    clear: BTreeMap<(String, String), usize>,
    sealed: usize,
}

/// Everything that was found out.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct Outcome {
    namespace: String,
    callers: Vec<Caller>,
    unseen: Vec<String>,
    older: older::Count,
    /// Connections by mutual TLS.
    sealed: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Ready,
    NotReady,
    /// No connection was seen: that says nothing.
    NothingSeen,
}

impl Outcome {
    fn verdict(&self) -> Verdict {
        if !(self.callers.is_empty() && self.unseen.is_empty() && self.older.workloads.is_empty()) {
            return Verdict::NotReady;
        }
        if self.sealed > 0.0 { Verdict::Ready } else { Verdict::NothingSeen }
    }
}

pub(super) async fn run(cluster: &Cluster, query: &Check, namespace: &str) -> anyhow::Result<ExitCode> {
    let all = cluster.list(&format!("/api/v1/namespaces/{namespace}/pods"), "").await?;
    // Who may see its pods may not be allowed to see it.
    if all.is_empty() && cluster.get(&format!("/api/v1/namespaces/{namespace}")).await?.is_none() {
        anyhow::bail!("there is no namespace {namespace} in {}; `kubectl get namespaces` lists them", cluster.server);
    }
    let ztunnels = ready(&ZTUNNEL, cluster, &query.namespace).await?;
    anyhow::ensure!(!ztunnels.is_empty(), "no ztunnel is ready in namespace {} of {}", query.namespace, cluster.server);
    let mut looks = look(cluster, &query.namespace, &ztunnels, namespace).await?;
    if let Some(watched) = query.watch {
        tokio::time::sleep(watched).await;
        let after = look(cluster, &query.namespace, &ztunnels, namespace).await?;
        looks = looks.iter().zip(&after).map(|(before, after)| before.until(after)).collect();
    }
    let (mut counts, mut sealed) = (Counts::new(), 0.0);
    for look in looks {
        sealed += look.sealed.values().sum::<f64>();
        for (pair, count) in look.clear {
            *counts.entry(pair).or_default() += count;
        }
    }
    let open = open(cluster, &query.namespace, &ztunnels, namespace).await?;
    sealed += open.sealed as f64;
    let outcome = Outcome {
        namespace: namespace.to_owned(),
        callers: join(counts, open.clear),
        unseen: uncaptured(&all, &Membership::read(cluster, &query.namespace).await?),
        older: older::count(&all, &reports(cluster, &query.namespace).await?),
        sealed,
    };
    let verdict = outcome.verdict();
    let mut document = json!(outcome);
    document["ready"] = (verdict == Verdict::Ready).into();
    say!("{}", query.output.render(&document, || text(&outcome, query.watch))?);
    Ok(match verdict {
        Verdict::Ready => ExitCode::SUCCESS,
        Verdict::NotReady => ExitCode::FAILURE,
        Verdict::NothingSeen => ExitCode::from(output::NOTHING_KNOWN),
    })
}

/// The names of a component's pods that can be asked.
async fn ready(component: &Component, cluster: &Cluster, system: &str) -> anyhow::Result<Vec<String>> {
    let pods = component.pods(cluster, system).await?;
    let ready = pods.iter().filter(|pod| rollout::is_ready(pod));
    Ok(ready.filter_map(|pod| pod["metadata"]["name"].as_str().map(str::to_owned)).collect())
}

/// Every agent's list of pods.
async fn reports(cluster: &Cluster, system: &str) -> anyhow::Result<Vec<Value>> {
    let mut reports = Vec::new();
    for body in ask(cluster, system, &ready(&AGENT, cluster, system).await?, 15014, "/debug/pods").await? {
        reports.append(&mut serde_json::from_str(&body)?);
    }
    Ok(reports)
}

/// What each ztunnel has counted, in their order.
async fn look(cluster: &Cluster, system: &str, ztunnels: &[String], namespace: &str) -> anyhow::Result<Vec<Look>> {
    let bodies = ask(cluster, system, ztunnels, 15020, "/metrics").await?;
    Ok(bodies.iter().map(|body| Look::of(body, namespace)).collect())
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

impl Look {
    fn of(metrics: &str, namespace: &str) -> Self {
        let mut look = Self::default();
        for sample in counters::parse(metrics).filter(|sample| sample.name == OPENED && sample.value > 0.0) {
            let into = sample.label("destination_workload_namespace") == namespace;
            if into && sample.label("reporter") == "destination" {
                let party = |side: &str| match (
                    sample.label(&format!("{side}_workload_namespace")),
                    sample.label(&format!("{side}_workload")),
                ) {
                    ("unknown" | "", _) => "(unknown)".to_owned(),
                    (namespace, workload) => format!("{namespace}/{workload}"),
                };
                let is_sealed = sample.label("connection_security_policy") == "mutual_tls";
                let counts = if is_sealed { &mut look.sealed } else { &mut look.clear };
                *counts.entry((party("source"), party("destination"))).or_default() += sample.value;
            }
        }
        look
    }

    /// What happened until a later look.
    fn until(&self, later: &Self) -> Self {
        Self { clear: gained(&self.clear, &later.clear), sealed: gained(&self.sealed, &later.sealed) }
    }
}

/// What happened between two looks. A counter that fell belongs to a new process: all it says is new.
fn gained(before: &Counts, after: &Counts) -> Counts {
    let gain = |(pair, now): (&(String, String), &f64)| {
        let old = before.get(pair).copied().unwrap_or_default();
        (pair.clone(), if *now >= old { now - old } else { *now })
    };
    after.iter().map(gain).filter(|(_, count)| *count > 0.0).collect()
}

async fn open(cluster: &Cluster, system: &str, ztunnels: &[String], namespace: &str) -> anyhow::Result<Open> {
    let mut found = Open::default();
    for body in ask(cluster, system, ztunnels, 15000, "/config_dump?part=workloadState").await? {
        let dump: Value = serde_json::from_str(&body)?;
        for pod in dump["workloadState"].as_object().into_iter().flat_map(|pods| pods.values()) {
            if pod["info"]["namespace"] != namespace {
                continue;
            }
            let destination = format!("{namespace}/{}", pod["info"]["name"].as_str().unwrap_or_default());
            for connection in pod["connections"]["inbound"].as_array().into_iter().flatten() {
                if connection["protocol"] != "TCP" {
                    found.sealed += 1;
                    continue;
                }
                let source = connection["src"].as_str().unwrap_or_default();
                let source = source.rsplit_once(':').map_or(source, |(address, _)| address).to_owned();
                *found.clear.entry((source, destination.clone())).or_default() += 1;
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

fn text(outcome: &Outcome, watched: Option<Duration>) -> String {
    let Outcome { namespace, callers, unseen, older, .. } = outcome;
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
    for (workload, older) in &older.workloads {
        let (s, were) = if older.connections == 1 { ("", "was") } else { ("s", "were") };
        lines.push(format!(
            "{workload}: {} connection{s} {were} older than the capture; what is still open of them is in clear, and STRICT does not end \
             it: {}",
            older.connections, older.remedy
        ));
    }
    if !unseen.is_empty() {
        lines.push(format!("not captured, so nobody sees who calls them: {}", super::some(unseen)));
    }
    if !older.unknown.is_empty() {
        lines.push(format!(
            "captured before their node agent was started, so nobody knows of connections that are older still: {}",
            super::some(&older.unknown)
        ));
    }
    let within = watched.map_or_else(
        || "since the ztunnels started".to_owned(),
        |watched| format!("within {}", humantime::format_duration(watched)),
    );
    lines.push(match outcome.verdict() {
        Verdict::Ready => {
            format!("{}: every connection into {namespace} that was seen is mutual TLS", good("ready for STRICT"))
        }
        Verdict::NotReady => {
            format!("{}: under STRICT these would be refused, or are not protected", bad("not ready for STRICT"))
        }
        Verdict::NothingSeen => format!(
            "{}: no connection into {namespace} was seen {within}; ask again when there was traffic, or with --for",
            dim("nothing is known")
        ),
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
        let look = Look::of(&text, "d");
        let counts = look.clear;
        let pair = |source: &str| (source.to_owned(), "d/b".to_owned());
        assert_eq!(counts, [(pair("(unknown)"), 2.0), (pair("t/a"), 3.0)].into());
        assert_eq!(
            gained(&counts, &[(pair("t/a"), 5.0), (pair("(unknown)"), 2.0)].into()),
            [(pair("t/a"), 2.0)].into()
        );
        assert_eq!(gained(&counts, &[(pair("t/a"), 1.0)].into()), [(pair("t/a"), 1.0)].into());
        assert_eq!(look.sealed, [(pair("t/a"), 9.0)].into());
    }

    #[test]
    fn only_what_was_seen_is_ready_and_connections_older_than_the_capture_are_not() {
        let nothing = Outcome::default();
        assert_eq!(nothing.verdict(), Verdict::NothingSeen);
        assert!(!text(&nothing, None).contains("ready"), "{}", text(&nothing, None));
        let sealed = Outcome { sealed: 1.0, ..Outcome::default() };
        assert_eq!(sealed.verdict(), Verdict::Ready);
        let older = older::Older { connections: 2, remedy: "restart it".to_owned(), ..older::Older::default() };
        let older = older::Count { workloads: [("deployment/a".to_owned(), older)].into(), ..older::Count::default() };
        let kept = Outcome { older, ..sealed };
        assert_eq!(kept.verdict(), Verdict::NotReady);
        assert!(text(&kept, None).contains("deployment/a: 2 connections were older"), "{}", text(&kept, None));
    }

    #[tokio::test]
    async fn a_namespace_that_is_not_there_is_an_error() {
        let api = crate::cluster::fake::FakeApi::start().await;
        let query = Check {
            strict: Some("shopp".to_owned()),
            watch: None,
            namespace: "m".to_owned(),
            output: crate::args::Output::Text,
            connection: crate::cluster::Connection::default(),
        };
        let error = run(&api.cluster(), &query, "shopp").await.unwrap_err();
        assert!(error.to_string().contains("no namespace shopp"), "{error:#}");
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
