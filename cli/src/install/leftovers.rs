//! What is still there after an uninstallation: what should not be, and what stays since nobody asked for its removal.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use cni_plugin::{agent::status::REDIRECTION, eligibility::MODE};
use serde_json::Value;

use super::{
    INSTALL,
    made::{self, CA, ROOTS},
    manifest, owned, ownership,
    ready::{AGAIN, Line},
    uninstall::{Removal, names, text},
};
use crate::{
    cluster::Kind,
    output::{good, say, took},
};

/// Annotations are the agents' last act, and another agent may be at work.
const ANNOTATIONS: Duration = Duration::from_secs(5);

/// Something that should be gone.
struct Left {
    what: String,
    /// Until then it may go by itself.
    patience: Option<Instant>,
}

impl Removal<'_> {
    /// Waits for what is on its way out, and tells the rest; the exit status says whether there is any.
    ///
    /// # Errors
    /// When something cannot be asked for.
    pub(super) async fn tell_leftovers(&self, started: Instant, roots_stay: bool) -> anyhow::Result<ExitCode> {
        let annotations = Instant::now() + ANNOTATIONS;
        let mut line = Line::new("the rest");
        let left = loop {
            let left = self.left(roots_stay, annotations).await?;
            let now = Instant::now();
            let passing = left.iter().filter(|left| left.patience.is_some_and(|until| until > now)).count();
            if passing == 0 {
                break left;
            }
            line.show(&format!("{passing} objects and annotations are on their way out"));
            tokio::time::sleep(AGAIN).await;
        };
        line.clear();
        let stays = self.stays().await?;
        let stays = if stays.is_empty() { String::new() } else { format!("\n  {}", stays.join("\n  ")) };
        if !left.is_empty() {
            let listed: Vec<&str> = left.iter().map(|left| left.what.as_str()).collect();
            say!("left behind:\n  {}", listed.join("\n  "));
            self.tell_of_annotations().await?;
            if !stays.is_empty() {
                say!("and what stays, since nobody asked for its removal:{stays}");
            }
            return Ok(ExitCode::FAILURE);
        }
        let took = took(started.elapsed());
        if stays.is_empty() {
            say!("{} after {took}: nothing of the mesh is left in the cluster", good("removed"));
        } else {
            say!("{} after {took}; what stays:{stays}", good("removed"));
        }
        Ok(ExitCode::SUCCESS)
    }

    async fn left(&self, roots_stay: bool, annotations: Instant) -> anyhow::Result<Vec<Left>> {
        let leaving = |metadata: &Value| (!metadata["deletionTimestamp"].is_null()).then_some(self.deadline);
        let of = |what: String, metadata: &Value| match leaving(metadata) {
            Some(until) => Left { what: format!("{what}, which is being deleted"), patience: Some(until) },
            None => Left { what, patience: None },
        };
        let owned = owned(&self.cluster, &self.options.namespace).await?;
        let mut left: Vec<Left> =
            owned.iter().map(|object| of(object.to_string(), &object.value["metadata"])).collect();
        let definitions = self.definitions().await?;
        let only_found =
            definitions.iter().filter(|definition| definition.value["metadata"]["labels"][INSTALL].is_null());
        left.extend(only_found.filter_map(|definition| {
            let left = of(definition.to_string(), &definition.value["metadata"]);
            left.patience.is_some().then_some(left)
        }));
        left.extend(
            self.captured().await?.into_iter().map(|pod| Left {
                what: format!("annotation {REDIRECTION} of pod {pod}"),
                patience: Some(annotations),
            }),
        );
        if !roots_stay && made::others(&self.cluster, &self.options.namespace).await?.is_empty() {
            let roots = made::roots(&self.cluster).await?;
            left.extend(roots.iter().map(|root| {
                let metadata = &root["metadata"];
                of(format!("ConfigMap {}/{ROOTS}", text(&metadata["namespace"])), metadata)
            }));
        }
        Ok(left)
    }

    async fn tell_of_annotations(&self) -> anyhow::Result<()> {
        if !self.captured().await?.is_empty() {
            say!(
                "an annotation alone does nothing: `kubectl -n NAMESPACE annotate pod NAME {REDIRECTION}-`. Where the agent could not clean \
                 its node up, the pod's rules are there as well, and without ztunnel they cut it off: restart it, or run \
                 `fairway-node cleanup` on its node"
            );
        }
        Ok(())
    }

    /// With another control plane there, labels and definitions are as well for that one.
    pub(super) async fn stays(&self) -> anyhow::Result<Vec<String>> {
        let namespace = &self.options.namespace;
        let mut stays = Vec::new();
        if !made::others(&self.cluster, namespace).await?.is_empty() {
            return Ok(stays);
        }
        for (kind, path) in [("namespaces", "/api/v1/namespaces"), ("pods", "/api/v1/pods")] {
            let labelled = names(&self.labelled(path).await?);
            if !labelled.is_empty() {
                stays.push(format!("label {MODE} of {kind} {} (--purge-labels removes it)", labelled.join(", ")));
            }
        }
        let mut definitions = self.definitions().await?;
        definitions.retain(|definition| definition.value["metadata"]["deletionTimestamp"].is_null());
        if !definitions.is_empty() {
            let names: Vec<&str> = definitions.iter().map(|definition| definition.name()).collect();
            stays.push(format!(
                "definitions {} (--purge-crds deletes them, and every object of them)",
                names.join(", ")
            ));
        }
        let kind = Kind::named("CustomResourceDefinition").context("a kind of this program's list")?;
        let mut kept = Vec::new();
        for name in manifest::definitions()? {
            let there = self.cluster.get_metadata(&format!("{}/{name}", kind.path(None))).await?;
            if there.is_some_and(|definition| ownership::release(&definition["metadata"]).is_some()) {
                kept.push(name);
            }
        }
        if !kept.is_empty() {
            stays.push(format!(
                "definitions that Helm has kept: `kubectl delete crd {}`, with every object of them",
                kept.join(" ")
            ));
        }
        let secret = self.cluster.get_metadata(&format!("/api/v1/namespaces/{namespace}/secrets/{CA}")).await?;
        if secret.is_some_and(|secret| secret["metadata"]["deletionTimestamp"].is_null()) {
            stays.push(format!("Secret {namespace}/{CA}, a CA's key"));
        }
        if self.is_namespace_ours().await? {
            stays.push(format!("namespace {namespace}, in which something else is"));
        }
        Ok(stays)
    }
}
