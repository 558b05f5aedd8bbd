//! `fairway uninstall`: takes everything away again, in the order that cuts nobody off.
//!
//! The node agents go first: each sees that it is not replaced, and lets its pods leave the mesh before it ends. Then nobody needs ztunnel,
//! and nobody the control plane.

use std::{
    io::{IsTerminal as _, Write as _},
    process::ExitCode,
    time::Instant,
};

use anyhow::{Context as _, bail, ensure};
use cni_plugin::{agent::status::REDIRECTION, eligibility::MODE};
use serde_json::{Value, json};

use super::{
    INSTALL, MANAGED_BY,
    made::{self, Made},
    owned, ownership,
    ready::{AGAIN, Line},
};
use crate::{
    args::Uninstall,
    cluster::{self, Cluster, Kind, Object, escape},
    component::{AGENT, COMPONENTS, CONTROL_PLANE, Component, ZTUNNEL},
    output::{say, took},
};

pub(crate) fn run(options: &Uninstall) -> anyhow::Result<ExitCode> {
    cluster::block_on(async { with(&options.connection.open().await?, options).await })
}

pub(super) async fn with(cluster: &Cluster, options: &Uninstall) -> anyhow::Result<ExitCode> {
    Removal { cluster: cluster.clone(), options, deadline: Instant::now() + options.timeout }.run().await
}

pub(super) struct Removal<'a> {
    pub(super) cluster: Cluster,
    pub(super) options: &'a Uninstall,
    pub(super) deadline: Instant,
}

impl Removal<'_> {
    async fn run(&self) -> anyhow::Result<ExitCode> {
        let started = Instant::now();
        let namespace = &self.options.namespace;
        let objects = owned(&self.cluster, namespace).await?;
        if !COMPONENTS.iter().any(|component| objects.iter().any(|object| object.is(component.kind, component.name))) {
            self.not_of_helm().await?;
        }
        if objects.is_empty() {
            say!("{}: nothing was installed by `fairway` in namespace {namespace}", self.cluster.server);
            self.remove_remains().await?;
            return self.tell_leftovers(started, false).await;
        }
        say!("{}: {} objects of the installation in namespace {namespace}", self.cluster.server, objects.len());
        self.tell_enrolled().await?;
        let made = Made::find(&self.cluster, namespace, self.options.keep_ca).await?;
        self.confirm(&made.question(&self.cluster.server))?;
        if self.options.purge_labels {
            self.purge_labels().await?;
        }
        // Agents first, and the control plane last.
        for component in [&AGENT, &ZTUNNEL, &CONTROL_PLANE] {
            self.end(component, &objects).await?;
        }
        self.remove_objects(&objects).await?;
        made.remove(&self.cluster).await?;
        self.remove_definitions(&self.definitions().await?).await?;
        if objects.iter().any(|object| object.is("Namespace", namespace)) {
            self.remove_namespace().await?;
        }
        self.tell_leftovers(started, made.is_shared()).await
    }

    /// # Errors
    /// When the mesh there is a Helm release, which Helm alone can remove: it would go on to believe that it is there.
    async fn not_of_helm(&self) -> anyhow::Result<()> {
        let namespace = &self.options.namespace;
        for component in &COMPONENTS {
            let there =
                super::one(&self.cluster, component.kind, Some(namespace), component.name).await?.unwrap_or_default();
            let metadata = &there["metadata"];
            // Others have a ztunnel as well.
            if metadata["labels"]["app.kubernetes.io/part-of"] == "fairway"
                && let Some((release, within)) = ownership::release(metadata)
            {
                bail!(
                    "this is the Helm release {release}: `helm uninstall {release} -n {}`; nothing was changed",
                    within.unwrap_or(namespace)
                );
            }
        }
        Ok(())
    }

    /// What an uninstallation has left that was not asked to remove it, or could not.
    async fn remove_remains(&self) -> anyhow::Result<()> {
        let definitions = self.definitions().await?;
        let own_namespace = self.is_namespace_ours().await?;
        let mut labelled = self.labelled("/api/v1/namespaces").await?;
        labelled.extend(self.labelled("/api/v1/pods").await?);
        let purge_labels = self.options.purge_labels && !labelled.is_empty();
        if definitions.is_empty() && !own_namespace && !purge_labels {
            return Ok(());
        }
        let with = if self.options.purge_crds { ", with every object of its definitions," } else { "" };
        self.confirm(&format!("remove what is left of an installation{with} from {}? [y/N] ", self.cluster.server))?;
        if purge_labels {
            self.purge_labels().await?;
        }
        self.remove_definitions(&definitions).await?;
        if own_namespace {
            self.remove_namespace().await?;
        }
        Ok(())
    }

    async fn tell_enrolled(&self) -> anyhow::Result<()> {
        let namespaces = names(&self.labelled("/api/v1/namespaces").await?);
        let pods = names(&self.labelled("/api/v1/pods").await?);
        let captured = self.captured().await?.len();
        if captured > 0 {
            say!("{captured} pods are in the mesh; they leave it first, with their connections");
        }
        let is_labelled = !namespaces.is_empty() || !pods.is_empty();
        if is_labelled && !self.options.purge_labels {
            let listed: Vec<String> = namespaces
                .iter()
                .map(|name| format!("namespace {name}"))
                .chain(pods.iter().map(|name| format!("pod {name}")))
                .take(10)
                .collect();
            say!("the label {MODE} stays (--purge-labels removes it): {}", listed.join(", "));
        }
        Ok(())
    }

    fn confirm(&self, question: &str) -> anyhow::Result<()> {
        if self.options.yes {
            return Ok(());
        }
        ensure!(std::io::stdin().is_terminal(), "nobody is there to be asked: say --yes");
        let mut out = std::io::stdout();
        write!(out, "{question}").and_then(|()| out.flush())?;
        let mut answer = String::new();
        std::io::stdin().read_line(&mut answer)?;
        ensure!(["y", "yes"].contains(&answer.trim()), "nothing was changed");
        Ok(())
    }

    async fn purge_labels(&self) -> anyhow::Result<()> {
        let patch = json!({ "metadata": { "labels": { MODE: null } } });
        for name in names(&self.labelled("/api/v1/namespaces").await?) {
            self.cluster.merge(&format!("/api/v1/namespaces/{name}"), patch.clone()).await?;
            say!("label {MODE} removed from namespace {name}");
        }
        for pod in self.labelled("/api/v1/pods").await? {
            let (namespace, name) = (text(&pod["metadata"]["namespace"]), text(&pod["metadata"]["name"]));
            self.cluster.merge(&format!("/api/v1/namespaces/{namespace}/pods/{name}"), patch.clone()).await?;
            say!("label {MODE} removed from pod {namespace}/{name}");
        }
        Ok(())
    }

    /// Deletes a component and waits until its last pod has gone.
    async fn end(&self, component: &Component, objects: &[Object]) -> anyhow::Result<()> {
        let Some(object) = objects.iter().find(|object| object.is(component.kind, component.name)) else {
            return Ok(());
        };
        let (started, mut line) = (Instant::now(), Line::new(component.name));
        self.cluster.delete(&object.path()).await?;
        loop {
            let left = component.pods(&self.cluster, &self.options.namespace).await?.len();
            if left == 0 && self.cluster.get(&object.path()).await?.is_none() {
                line.end(&format!("gone after {}", took(started.elapsed())));
                return Ok(());
            }
            line.show(&format!("{left} pods left"));
            if Instant::now() > self.deadline {
                line.end("not gone");
                bail!(
                    "{left} pods of {} do not end; nothing else was removed: see `kubectl -n {} get pods`, and repeat",
                    component.name,
                    self.options.namespace
                );
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    async fn remove_objects(&self, objects: &[Object]) -> anyhow::Result<()> {
        let mut removed = 0;
        for object in objects.iter().rev().filter(|o| !["Namespace", "CustomResourceDefinition"].contains(&o.kind.name))
        {
            removed += usize::from(self.cluster.delete(&object.path()).await?);
        }
        say!("{removed} objects deleted");
        Ok(())
    }

    /// Of this installation, or left behind by one; the latter another installation may have found there, and use.
    pub(super) async fn definitions(&self) -> anyhow::Result<Vec<Object>> {
        let namespace = &self.options.namespace;
        let shared = !made::others(&self.cluster, namespace).await?.is_empty();
        let kind = Kind::named("CustomResourceDefinition").context("a kind of this program's list")?;
        let mut found = self.cluster.list_metadata(&kind.path(None), "").await?;
        found.retain(|definition| {
            let labels = &definition["metadata"]["labels"];
            match labels[INSTALL].as_str() {
                Some(installation) => installation == namespace,
                None => labels[MANAGED_BY] == cluster::MANAGER && !shared,
            }
        });
        Ok(found.into_iter().filter_map(|definition| Object::listed(kind, definition)).collect())
    }

    /// To delete a definition is to delete all objects of the kind.
    async fn remove_definitions(&self, definitions: &[Object]) -> anyhow::Result<()> {
        for definition in definitions {
            let whole = self.cluster.get(&definition.path()).await?.unwrap_or_default();
            let versions = whole["spec"]["versions"].as_array().map(Vec::as_slice).unwrap_or_default();
            let served =
                versions.iter().find(|version| version["served"] == true).and_then(|version| version["name"].as_str());
            let (group, plural) = (text(&whole["spec"]["group"]), text(&whole["spec"]["names"]["plural"]));
            let used = match served {
                Some(version) => {
                    self.cluster.list_metadata(&format!("/apis/{group}/{version}/{plural}"), "").await?.len()
                }
                None => 0,
            };
            if used > 0 && !self.options.purge_crds {
                let patch = json!({ "metadata": { "labels": { INSTALL: null } } });
                self.cluster.merge(&definition.path(), patch).await?;
                say!("{definition} stays: there are {used} objects of it (--purge-crds deletes them with it)");
            } else {
                self.cluster.delete(&definition.path()).await?;
            }
        }
        Ok(())
    }

    /// Whether `fairway install` made it, of this installation or one before.
    pub(super) async fn is_namespace_ours(&self) -> anyhow::Result<bool> {
        let there = self.cluster.get_metadata(&format!("/api/v1/namespaces/{}", self.options.namespace)).await?;
        Ok(there.is_some_and(|namespace| namespace["metadata"]["labels"][MANAGED_BY] == cluster::MANAGER))
    }

    async fn remove_namespace(&self) -> anyhow::Result<()> {
        let namespace = &self.options.namespace;
        let left = self.inhabitants().await?;
        if !left.is_empty() {
            say!("namespace {namespace} stays: it still has {}", left.join(", "));
            return self
                .cluster
                .merge(
                    &format!("/api/v1/namespaces/{namespace}"),
                    json!({ "metadata": { "labels": { INSTALL: null } } }),
                )
                .await;
        }
        let path = format!("/api/v1/namespaces/{namespace}");
        self.cluster.delete(&path).await?;
        let mut line = Line::new(&format!("namespace {namespace}"));
        while self.cluster.get(&path).await?.is_some() {
            ensure!(
                Instant::now() < self.deadline,
                "namespace {namespace} does not end: see `kubectl get namespace {namespace} -o yaml`"
            );
            line.show("ending");
            tokio::time::sleep(AGAIN).await;
        }
        line.end("gone");
        Ok(())
    }

    /// What somebody else has put into the namespace; what every namespace has does not count.
    async fn inhabitants(&self) -> anyhow::Result<Vec<String>> {
        let namespace = &self.options.namespace;
        let kinds = [
            ("/api/v1", "pods"),
            ("/api/v1", "services"),
            ("/api/v1", "configmaps"),
            ("/api/v1", "secrets"),
            ("/api/v1", "serviceaccounts"),
            ("/api/v1", "persistentvolumeclaims"),
            ("/apis/apps/v1", "deployments"),
            ("/apis/apps/v1", "daemonsets"),
            ("/apis/apps/v1", "statefulsets"),
            ("/apis/batch/v1", "jobs"),
            ("/apis/batch/v1", "cronjobs"),
        ];
        let mut left = Vec::new();
        for (root, plural) in kinds {
            for item in self.cluster.list_metadata(&format!("{root}/namespaces/{namespace}/{plural}"), "").await? {
                let metadata = &item["metadata"];
                let ending = !metadata["deletionTimestamp"].is_null();
                if !ending && !["default", "kube-root-ca.crt"].contains(&&*text(&metadata["name"])) {
                    left.push(format!("{plural}/{}", text(&metadata["name"])));
                }
            }
        }
        Ok(left)
    }

    pub(super) async fn labelled(&self, path: &str) -> anyhow::Result<Vec<Value>> {
        self.cluster.list_metadata(path, &format!("labelSelector={}", escape(&format!("{MODE}=ambient")))).await
    }

    pub(super) async fn captured(&self) -> anyhow::Result<Vec<String>> {
        let mut pods = self.cluster.list_metadata("/api/v1/pods", "").await?;
        pods.retain(|pod| pod["metadata"]["annotations"][REDIRECTION] == "enabled");
        Ok(names(&pods))
    }
}

/// `name`, or `namespace/name`.
pub(super) fn names(objects: &[Value]) -> Vec<String> {
    let name = |object: &Value| {
        let metadata = &object["metadata"];
        match metadata["namespace"].as_str() {
            Some(namespace) => format!("{namespace}/{}", text(&metadata["name"])),
            None => text(&metadata["name"]),
        }
    };
    objects.iter().map(name).collect()
}

pub(super) fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
