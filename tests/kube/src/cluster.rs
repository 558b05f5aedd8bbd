//! The cluster under test: who is where, and what can be asked of pods and nodes.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use anyhow::{Context as _, ensure};
use lab::{
    apps::{load::Report, steady::Progress},
    protocol::Sight,
};
use serde_json::Value;

use crate::{kubectl, mesh::Mesh};

/// The namespace that joins the mesh.
pub(crate) const INSIDE: &str = "fairway-e2e";
/// The one that does not.
pub(crate) const OUTSIDE: &str = "fairway-e2e-outside";
pub(crate) const SYSTEM: &str = "istio-system";
pub(crate) const MODE: &str = "istio.io/dataplane-mode";
pub(crate) const REDIRECTION: &str = "ambient.istio.io/redirection";

#[derive(Debug)]
pub(crate) struct Cluster {
    pub(crate) mesh: Mesh,
    pub(crate) fairway: PathBuf,
    pub(crate) hub: String,
    pub(crate) tag: String,
    /// Of the test's own programs.
    pub(crate) image: String,
    pub(crate) pods: String,
    pub(crate) interface: String,
}

/// A pod as the API server has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pod {
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) node: String,
    pub(crate) address: String,
    pub(crate) redirection: Option<String>,
    /// Container id, when it started, how often it was restarted.
    pub(crate) containers: Vec<(String, String, u64)>,
    pub(crate) host_network: bool,
    pub(crate) phase: String,
    pub(crate) ready: bool,
    pub(crate) leaving: bool,
}

impl Cluster {
    /// Runs `fairway`, which prints its progress.
    pub(crate) fn fairway(&self, args: &[&str]) -> anyhow::Result<String> {
        let output = std::process::Command::new(&self.fairway).args(args).output().context("cannot run fairway")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "fairway {}: {text}{errors}", args.join(" "));
        Ok(text)
    }

    /// What `fairway` answers as JSON, whatever its exit status says of it.
    pub(crate) fn answer(&self, args: &[&str]) -> anyhow::Result<Value> {
        let output = std::process::Command::new(&self.fairway).args(args).output().context("cannot run fairway")?;
        let said = || format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).with_context(|| format!("fairway {}: {}", args.join(" "), said()))
    }

    /// Pods with a label `app`, those that are going away left out.
    pub(crate) fn pods(&self, namespace: &str, app: &str) -> anyhow::Result<Vec<Pod>> {
        let mut pods = all_pods(namespace)?;
        pods.retain(|(labels, pod)| labels.get("app").is_some_and(|value| value == app) && !pod.leaving);
        Ok(pods.into_iter().map(|(_, pod)| pod).collect())
    }

    pub(crate) fn pod(&self, namespace: &str, app: &str) -> anyhow::Result<Pod> {
        let pods = self.pods(namespace, app)?;
        let running = pods.into_iter().find(|pod| pod.phase == "Running");
        running.with_context(|| format!("no pod of {app} runs in {namespace}"))
    }

    /// `fairway app get URL` in a pod.
    pub(crate) fn get(&self, namespace: &str, pod: &str, url: &str) -> anyhow::Result<String> {
        kubectl::exec(namespace, pod, &["fairway", "app", "get", "--timeout", "3", url])
    }

    /// Whether the same fails because the connection is cut or refused.
    pub(crate) fn refused(&self, namespace: &str, pod: &str, url: &str) -> anyhow::Result<String> {
        match self.get(namespace, pod, url) {
            Ok(answer) => anyhow::bail!("it was answered: {}", answer.trim()),
            Err(error) => {
                let text = format!("{error:#}");
                let cut = ["reset", "refused", "unexpected end", "UnexpectedEof", "early eof", "broken pipe"];
                let line = text.lines().find(|l| cut.iter().any(|c| l.to_lowercase().contains(c)));
                line.map(|l| l.trim().to_owned()).with_context(|| format!("it failed otherwise: {text}"))
            }
        }
    }

    /// Starts the load generator in a pod.
    pub(crate) fn start_load(
        &self,
        pod: &str,
        target: &str,
        seconds: u32,
        new: bool,
    ) -> anyhow::Result<kubectl::Running> {
        let seconds = seconds.to_string();
        // A connection each: slowly enough for the client's ports to last, of which a closed connection keeps one for a minute.
        let connections = if new { "2" } else { "8" };
        let mut command = vec!["fairway", "app", "load", target, "--connections", connections, "--seconds", &seconds];
        if new {
            command.push("--new-connections");
        }
        kubectl::start_exec(INSIDE, pod, &command)
    }

    /// How far the steady client of a pod has got.
    pub(crate) fn progress(&self, pod: &str) -> anyhow::Result<Progress> {
        let text = kubectl::run(&["-n", INSIDE, "logs", pod, "--tail=1"])?;
        serde_json::from_str(&text).with_context(|| format!("the steady client says: {text}"))
    }

    /// Runs a command on a node, in its own namespaces.
    pub(crate) fn on_node(&self, node: &str, command: &[&str]) -> anyhow::Result<String> {
        let inspector = self.inspector(node)?;
        let enter = ["nsenter", "-t", "1", "-m", "-n", "-u", "-i", "-p", "--"];
        kubectl::exec(OUTSIDE, &inspector, &[&enter, command].concat())
    }

    fn inspector(&self, node: &str) -> anyhow::Result<String> {
        let pods = self.pods(OUTSIDE, "inspector")?;
        let there = pods.into_iter().find(|pod| pod.node == node);
        there.map(|pod| pod.name).with_context(|| format!("no inspector on {node}"))
    }

    /// Follows what pods send each other across a node's interface for a while.
    pub(crate) fn start_capture(&self, node: &str, nonce: &str, seconds: u32) -> anyhow::Result<kubectl::Running> {
        let seconds = seconds.to_string();
        let inspector = self.inspector(node)?;
        let options = ["--interface", &self.interface, "--pods", &self.pods, "--nonce", nonce, "--seconds", &seconds];
        kubectl::start_exec(OUTSIDE, &inspector, &[&["fairway", "debug", "wire"][..], &options].concat())
    }

    pub(crate) fn nodes(&self) -> anyhow::Result<Vec<String>> {
        let nodes = kubectl::list(&["nodes"])?;
        Ok(nodes.iter().map(|node| text(&node["metadata"]["name"])).collect())
    }

    /// Waits until every pod of the namespace that can be captured is.
    pub(crate) fn all_enrolled(&self, patience: Duration) -> anyhow::Result<usize> {
        kubectl::eventually("every pod to be captured", patience, || {
            let pods = all_pods(INSIDE)?;
            let relevant = pods.iter().filter(|(_, p)| !p.host_network && p.phase == "Running" && !p.leaving);
            let (inside, outside): (Vec<_>, Vec<_>) =
                relevant.partition(|(_, pod)| pod.redirection.as_deref() == Some("enabled"));
            let names: Vec<&str> = outside.iter().map(|(_, pod)| pod.name.as_str()).collect();
            ensure!(names.is_empty(), "not captured: {}", names.join(", "));
            ensure!(!inside.is_empty(), "there is no pod");
            Ok(inside.len())
        })
    }
}

/// What a finished capture saw.
pub(crate) fn sight(capture: kubectl::Running) -> anyhow::Result<Sight> {
    let text = capture.finish()?;
    let last = text.lines().last().unwrap_or_default();
    serde_json::from_str(last).with_context(|| format!("the capture says: {text}"))
}

/// What a finished load counted.
pub(crate) fn counted(load: kubectl::Running) -> anyhow::Result<Report> {
    let text = load.finish()?;
    serde_json::from_str(text.trim()).with_context(|| format!("the load generator says: {text}"))
}

/// `12,345 requests, 0 failed (0 of them connects)`.
pub(crate) fn told(report: &Report) -> String {
    let first = report.first_error.as_ref().map(|error| format!(", first: {error}")).unwrap_or_default();
    let Report { requests, errors, connect_errors, .. } = report;
    format!("{requests} requests answered, {errors} failed ({connect_errors} of them at connecting{first})")
}

type Labels = BTreeMap<String, String>;

pub(crate) fn all_pods(namespace: &str) -> anyhow::Result<Vec<(Labels, Pod)>> {
    Ok(kubectl::list(&["-n", namespace, "pods"])?.iter().map(|object| (labels(object), pod(object))).collect())
}

fn labels(object: &Value) -> Labels {
    let labels = object["metadata"]["labels"].as_object();
    labels.into_iter().flatten().map(|(name, value)| (name.clone(), text(value))).collect()
}

fn pod(object: &Value) -> Pod {
    let status = &object["status"];
    let container = |c: &Value| {
        let started = text(&c["state"]["running"]["startedAt"]);
        (text(&c["containerID"]), started, c["restartCount"].as_u64().unwrap_or(0))
    };
    let conditions = status["conditions"].as_array().cloned().unwrap_or_default();
    Pod {
        name: text(&object["metadata"]["name"]),
        uid: text(&object["metadata"]["uid"]),
        node: text(&object["spec"]["nodeName"]),
        address: text(&status["podIP"]),
        redirection: object["metadata"]["annotations"][REDIRECTION].as_str().map(str::to_owned),
        containers: status["containerStatuses"].as_array().into_iter().flatten().map(container).collect(),
        host_network: object["spec"]["hostNetwork"].as_bool().unwrap_or(false),
        phase: text(&status["phase"]),
        ready: conditions.iter().any(|c| c["type"] == "Ready" && c["status"] == "True"),
        leaving: !object["metadata"]["deletionTimestamp"].is_null(),
    }
}

pub(crate) fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
