//! The wait until a component really serves: rolled out as the API server says, and ready as each of its pods says itself.

use std::{
    io::{IsTerminal as _, Write as _},
    time::{Duration, Instant},
};

use anyhow::bail;
use futures_util::{StreamExt as _, stream};
use serde_json::Value;

use crate::{
    cluster::{
        Cluster,
        rollout::{self, Rollout},
    },
    component::Component,
    output::{say, took},
};

/// Between two looks.
pub(super) const AGAIN: Duration = Duration::from_millis(500);
pub(super) const DEFINITIONS: Duration = Duration::from_secs(30);
/// Pods asked at a time.
const ASKED: usize = 16;
/// Of what a kubelet says while it is waited for.
const LINE: usize = 120;

pub(super) struct Waiter<'a> {
    cluster: &'a Cluster,
    namespace: &'a str,
    deadline: Instant,
    patience: Duration,
}

impl<'a> Waiter<'a> {
    /// `patience`: for all components together.
    pub(super) fn new(cluster: &'a Cluster, namespace: &'a str, patience: Duration) -> Self {
        Self { cluster, namespace, deadline: Instant::now() + patience, patience }
    }

    pub(super) async fn wait(&self, component: &Component) -> anyhow::Result<()> {
        let (started, mut line) = (Instant::now(), Line::new(component.name));
        loop {
            match self.look(component).await {
                Ok(Rollout::Done) => {
                    line.end(&format!("ready after {}", took(started.elapsed())));
                    return Ok(());
                }
                Ok(Rollout::Under(state)) => line.show(&state),
                // An API server that is away for a moment says nothing about the mesh.
                Err(error) => line.show(&format!("{error:#}")),
            }
            if Instant::now() > self.deadline {
                line.end("not ready");
                return self.give_up(component, &line.shown).await;
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    async fn look(&self, component: &Component) -> anyhow::Result<Rollout> {
        let there = super::one(self.cluster, component.kind, Some(self.namespace), component.name).await?;
        let Some(mut workload) = there else { bail!("{} {} is not there", component.kind, component.name) };
        workload["kind"] = component.kind.into();
        let pods = component.pods(self.cluster, self.namespace).await?;
        match rollout::of(&workload) {
            Rollout::Done => Ok(self.ask(component, &pods).await),
            Rollout::Under(state) => {
                let trouble = rollout::trouble(&pods).into_iter().next();
                let trouble = trouble.map(|trouble| trouble.chars().take(LINE).collect::<String>());
                Ok(Rollout::Under(match trouble {
                    Some(trouble) => format!("{state}; {trouble}"),
                    None => state,
                }))
            }
        }
    }

    /// Every pod speaks for itself.
    async fn ask(&self, component: &Component, pods: &[Value]) -> Rollout {
        let (port, path) = component.ready;
        let names: Vec<&str> =
            pods.iter().filter(|p| rollout::is_ready(p)).filter_map(|p| p["metadata"]["name"].as_str()).collect();
        let asked = names.into_iter().map(|name| async move {
            match self.cluster.page(self.namespace, name, port, path).await {
                Ok((200, _)) => None,
                Ok((status, said)) => Some(format!("{name} says {status} at {path}: {}", said.trim())),
                Err(error) => Some(format!("{error:#}")),
            }
        });
        let answers: Vec<Option<String>> = stream::iter(asked).buffer_unordered(ASKED).collect().await;
        answers.into_iter().flatten().next().map_or(Rollout::Done, Rollout::Under)
    }

    async fn give_up(&self, component: &Component, state: &str) -> anyhow::Result<()> {
        let pods = component.pods(self.cluster, self.namespace).await.unwrap_or_default();
        let mut told = rollout::trouble(&pods);
        for warning in self.warnings(&pods).await.unwrap_or_default() {
            let (_, message) = warning.split_once(": ").unwrap_or_default();
            if !told.iter().any(|line| line.contains(message)) {
                told.push(warning);
            }
        }
        if told.is_empty() {
            told.push(state.to_owned());
        }
        told.truncate(6);
        let images = rollout::unpulled(&pods).join(", ");
        if !images.is_empty() {
            told.push(format!(
                "nodes cannot pull {images}: is it there, and may they? --hub and --tag say where images come from; `fairway install` again \
                 goes on from here"
            ));
        }
        let told = told.iter().map(|line| format!("\n  {line}")).collect::<String>();
        let logs = format!("kubectl -n {} logs -l {} --tail=20", self.namespace, component.selector);
        bail!("{} is not ready within {}:{told}\n  see `{logs}`", component.name, took(self.patience))
    }
}

impl Waiter<'_> {
    /// What the kubelet or the scheduler has lately said about pods that are not ready.
    async fn warnings(&self, pods: &[Value]) -> anyhow::Result<Vec<String>> {
        let path = format!("/api/v1/namespaces/{}/events", self.namespace);
        let mut events = self.cluster.list(&path, "fieldSelector=type%3DWarning").await?;
        let of = |pod: &Value, event: &Value| event["involvedObject"]["uid"] == pod["metadata"]["uid"];
        events.retain(|event| pods.iter().any(|pod| !rollout::is_ready(pod) && of(pod, event)));
        let mut told: Vec<String> = events
            .iter()
            .filter_map(|event| Some(format!("{}: {}", event["reason"].as_str()?, event["message"].as_str()?)))
            .collect();
        told.sort();
        told.dedup();
        Ok(told)
    }
}

/// What is waited for: on a terminal one line that changes, else a line for every change.
pub(super) struct Line {
    what: String,
    moving: bool,
    shown: String,
}

impl Line {
    pub(super) fn new(what: &str) -> Self {
        Self { what: what.to_owned(), moving: std::io::stdout().is_terminal(), shown: String::new() }
    }

    pub(super) fn show(&mut self, state: &str) {
        if self.shown == state {
            return;
        }
        state.clone_into(&mut self.shown);
        if self.moving {
            let line: String = format!("{}: {state}", self.what).chars().take(110).collect();
            let mut out = std::io::stdout();
            drop(write!(out, "\r\x1b[K{line}").and_then(|()| out.flush()));
        } else {
            say!("{}: {state}", self.what);
        }
    }

    /// When there is nothing to be told of it.
    pub(super) fn clear(&self) {
        if self.moving && !self.shown.is_empty() {
            let mut out = std::io::stdout();
            drop(write!(out, "\r\x1b[K").and_then(|()| out.flush()));
        }
    }

    pub(super) fn end(&self, state: &str) {
        let start = if self.moving { "\r\x1b[K" } else { "" };
        say!("{start}{}: {state}", self.what);
    }
}
