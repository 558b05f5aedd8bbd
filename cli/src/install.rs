//! `fairway install`: the chart's manifests, applied in the order in which they need each other, and a wait until the mesh really serves.
//!
//! What is installed carries two labels and is written down in a ConfigMap, so that `upgrade` finds what a new version no longer has, and
//! `uninstall` everything.

mod leftovers;
mod made;
mod manifest;
mod ownership;
mod ready;
mod record;
mod settings;
#[cfg(test)]
mod tests;
mod uninstall;
mod upgrade;

use std::{collections::BTreeMap, process::ExitCode, time::Instant};

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use self::{manifest::Choice, ownership::Owner, ready::Waiter};
pub(crate) use self::{
    manifest::platforms,
    record::Record,
    settings::{known as settings_help, parse as setting},
    uninstall::run as uninstall,
    upgrade::run as upgrade,
};
use crate::{
    args::{Install, Selection},
    check::{self, Level},
    cluster::{self, Applied, Cluster, KINDS, Kind, Object, escape},
    component::{COMPONENTS, Component},
    output::{bad, good, say, took},
};

/// Which installation an object belongs to; the value is its namespace.
pub(crate) const INSTALL: &str = "fairway.dev/install";
pub(crate) const MANAGED_BY: &str = "app.kubernetes.io/managed-by";

pub(crate) fn run(options: &Install) -> anyhow::Result<ExitCode> {
    cluster::block_on(async {
        let cluster = options.connection.open().await?;
        let installation = Installation::prepare(cluster, &options.selection).await?;
        installation.may_go_on(&options.selection).await?;
        if options.dry_run {
            return installation.preview().await;
        }
        if installation.before.is_some() {
            say!("{} has an installation already: it is brought to what is asked for", options.selection.namespace);
            return installation.roll(!options.no_wait, options.selection.timeout).await;
        }
        installation.first(!options.no_wait, options.selection.timeout).await
    })
}

/// What shall be installed where.
struct Installation {
    cluster: Cluster,
    namespace: String,
    /// What is installed now.
    before: Option<Record>,
    after: Record,
    objects: Vec<Object>,
    started: Instant,
}

impl Installation {
    /// Options that are not given are those of the installation that is there.
    async fn prepare(cluster: Cluster, selection: &Selection) -> anyhow::Result<Self> {
        let namespace = selection.namespace.clone();
        let before = Record::read(&cluster, &namespace).await?;
        let kept = before.clone().unwrap_or_default();
        let platform = match (selection.platform.as_str(), kept.platform.as_str()) {
            ("auto", "") => {
                let nodes = cluster
                    .list("/api/v1/nodes", "")
                    .await
                    .context("the platform is told by the nodes; say --platform")?;
                manifest::detect(&nodes).to_owned()
            }
            ("auto", kept) => kept.to_owned(),
            (given, _) => given.to_owned(),
        };
        let mut settings = kept.settings;
        settings.extend(selection.settings.iter().cloned());
        let choice = Choice {
            namespace: namespace.clone(),
            platform: platform.clone(),
            hub: selection.hub.clone().or(Some(kept.hub)).filter(|hub| !hub.is_empty()),
            tag: selection.tag.clone().or(Some(kept.tag)).filter(|tag| !tag.is_empty()),
            settings: settings.clone(),
        };
        let mut objects = manifest::objects(&choice)?;
        let (hub, tag) = manifest::images(&objects);
        let after = Record { version: env!("CARGO_PKG_VERSION").to_owned(), platform, hub, tag, settings };
        objects.extend(Object::new(after.object(&namespace)));
        objects.sort_by_key(|object| object.kind.rank());
        let images = format!("images {}/…:{}", after.hub, after.tag);
        say!("{}: platform {}, namespace {namespace}, {images}", cluster.server, after.platform);
        Ok(Self { cluster, namespace, before, after, objects, started: Instant::now() })
    }

    /// # Errors
    /// When the cluster is not fit for the mesh, or somebody else's already.
    async fn may_go_on(&self, selection: &Selection) -> anyhow::Result<()> {
        self.fit(selection.skip_check).await?;
        self.unclaimed(selection.take_over).await
    }

    async fn fit(&self, skip: bool) -> anyhow::Result<()> {
        if skip {
            return Ok(());
        }
        let items = check::preflight(&self.cluster, &self.namespace).await?;
        let faults = items.iter().filter(|item| item.level == Level::Fault).count();
        for item in items.iter().filter(|item| item.level >= Level::Warning) {
            let mark = if item.level == Level::Fault { bad("fault") } else { "warning".to_owned() };
            say!("{mark}: {}: {} ({})", item.what, item.finding, item.remedy);
        }
        anyhow::ensure!(
            faults == 0,
            "the cluster is not fit for the mesh ({faults} faults); nothing was changed. Mend them, or go on with --skip-check"
        );
        Ok(())
    }

    async fn unclaimed(&self, take_over: bool) -> anyhow::Result<()> {
        let mut foreign = BTreeMap::new();
        for object in self.objects.iter().filter(|object| object.kind.name != "CustomResourceDefinition") {
            let there = self.cluster.get(&object.path()).await?;
            match ownership::of(there.as_ref(), &self.namespace) {
                Owner::Nobody | Owner::Us => {}
                Owner::Other(who) => {
                    foreign.entry(who).or_insert_with(Vec::new).push(object.to_string());
                }
            }
        }
        if foreign.is_empty() || take_over {
            return Ok(());
        }
        let told: Vec<String> = foreign.iter().map(|(who, what)| format!("{who}: {}", what.join(", "))).collect();
        bail!(
            "these objects are there already and belong to somebody else:\n  {}\nremove them with the tool that made them (`helm uninstall`, \
             `istioctl uninstall`), choose another --namespace, or make them ours with --take-over; nothing was changed",
            told.join("\n  ")
        )
    }

    /// What [`Self::first`] or [`Self::roll`] would do.
    async fn preview(&self) -> anyhow::Result<ExitCode> {
        self.apply(|_| true, true).await?;
        for object in self.superseded().await? {
            say!("{object} deleted: it is no longer part of the mesh");
        }
        say!("nothing was changed");
        Ok(ExitCode::SUCCESS)
    }

    /// Everything at once: nobody uses it yet.
    async fn first(&self, wait: bool, patience: std::time::Duration) -> anyhow::Result<ExitCode> {
        self.apply(|_| true, false).await?;
        if wait {
            let waiter = Waiter::new(&self.cluster, &self.namespace, patience);
            for component in &COMPONENTS {
                waiter.wait(component).await?;
            }
        }
        self.tell_end(wait);
        Ok(ExitCode::SUCCESS)
    }

    /// One component after the other, each when the one before is ready.
    async fn roll(&self, wait: bool, patience: std::time::Duration) -> anyhow::Result<ExitCode> {
        let waiter = Waiter::new(&self.cluster, &self.namespace, patience);
        let is_record = |object: &Object| object.is("ConfigMap", record::NAME);
        let is_component = |object: &Object| COMPONENTS.iter().any(|c| object.is(c.kind, c.name));
        self.apply(|object| !is_component(object) && !is_record(object), false).await?;
        for component in &COMPONENTS {
            self.apply(|object| object.is(component.kind, component.name), false).await?;
            if wait && let Err(error) = waiter.wait(component).await {
                return Err(error.context(self.way_back(component)));
            }
        }
        self.prune().await?;
        self.apply(is_record, false).await?;
        self.tell_end(wait);
        Ok(ExitCode::SUCCESS)
    }

    fn way_back(&self, stopped_at: &Component) -> String {
        let later: Vec<&str> =
            COMPONENTS.iter().skip_while(|c| c.name != stopped_at.name).skip(1).map(|c| c.name).collect();
        let later =
            if later.is_empty() { String::new() } else { format!("; {} were not touched", later.join(" and ")) };
        let before = self.before.clone().unwrap_or_default();
        format!(
            "stopped at {}{later}. Go back with `fairway upgrade --namespace {} --hub {} --tag {}` of version {}, or mend it and repeat",
            stopped_at.name, self.namespace, before.hub, before.tag, before.version
        )
    }

    async fn apply(&self, which: impl Fn(&Object) -> bool, dry_run: bool) -> anyhow::Result<()> {
        self.namespace(dry_run).await?;
        let (mut changed, mut unchanged) = (0, 0);
        let mut definitions = Vec::new();
        for object in self.objects.iter().filter(|object| which(object)) {
            if object.kind.name == "CustomResourceDefinition" {
                let there = self.cluster.get(&object.path()).await?;
                if let Owner::Other(who) = ownership::of(there.as_ref(), &self.namespace) {
                    say!("{object} is left as it is: it is there already, by {who}");
                    continue;
                }
                definitions.push(object.path());
            } else if !definitions.is_empty() && !dry_run {
                self.established(&std::mem::take(&mut definitions)).await?;
            }
            match self.cluster.apply(object, dry_run).await {
                Ok(Applied::Unchanged) => unchanged += 1,
                Ok(done) => {
                    changed += 1;
                    say!("{object} {}", if done == Applied::Created { "created" } else { "changed" });
                }
                // Without its namespace the server cannot try it.
                Err(_) if dry_run && self.cluster.get(&object.path()).await.is_ok_and(|there| there.is_none()) => {
                    changed += 1;
                    say!("{object} created");
                }
                Err(error) => return Err(error),
            }
        }
        if unchanged > 0 && changed == 0 {
            say!("{unchanged} unchanged");
        }
        Ok(())
    }

    /// A namespace that is there stays whose it is.
    async fn namespace(&self, dry_run: bool) -> anyhow::Result<()> {
        let labels = json!({
            MANAGED_BY: cluster::MANAGER, INSTALL: self.namespace, "app.kubernetes.io/part-of": "fairway",
            // The node programs need host paths and capabilities.
            "pod-security.kubernetes.io/enforce": "privileged",
        });
        let namespace = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": self.namespace, "labels": labels } });
        let namespace = Object::new(namespace).context("a namespace")?;
        if self.cluster.get(&namespace.path()).await?.is_none() {
            if !dry_run {
                self.cluster.apply(&namespace, false).await?;
            }
            say!("{namespace} created");
        }
        Ok(())
    }

    /// Objects of a kind can be made when its definition is established.
    async fn established(&self, definitions: &[String]) -> anyhow::Result<()> {
        let limit = tokio::time::Instant::now() + ready::DEFINITIONS;
        for path in definitions {
            loop {
                let definition = self.cluster.get(path).await?.unwrap_or_default();
                let conditions = definition["status"]["conditions"].as_array().cloned().unwrap_or_default();
                if conditions.iter().any(|c| c["type"] == "Established" && c["status"] == "True") {
                    break;
                }
                let name = path.rsplit('/').next().unwrap_or(path);
                anyhow::ensure!(
                    tokio::time::Instant::now() < limit,
                    "definition {name} is not established: {conditions:?}"
                );
                tokio::time::sleep(ready::AGAIN).await;
            }
        }
        Ok(())
    }

    async fn prune(&self) -> anyhow::Result<()> {
        for object in self.superseded().await? {
            self.cluster.delete(&object.path()).await?;
            say!("{object} deleted: it is no longer part of the mesh");
        }
        Ok(())
    }

    /// What the version before had and this one has not.
    async fn superseded(&self) -> anyhow::Result<Vec<Object>> {
        // A first installation deletes nothing.
        if self.before.is_none() {
            return Ok(Vec::new());
        }
        let mut there = owned(&self.cluster, &self.namespace).await?;
        there.retain(|object| {
            let lasting = ["Namespace", "CustomResourceDefinition"].contains(&object.kind.name);
            !lasting && !self.objects.iter().any(|wanted| wanted.path() == object.path())
        });
        Ok(there)
    }

    fn tell_end(&self, waited: bool) {
        let took = took(self.started.elapsed());
        if waited {
            say!(
                "{} after {took}: `kubectl label namespace NAME istio.io/dataplane-mode=ambient` puts a namespace into the mesh",
                good("ready")
            );
        } else {
            say!("applied after {took}; `fairway check` says whether it became ready");
        }
    }
}

/// Everything with the label of the installation in a namespace.
pub(crate) async fn owned(cluster: &Cluster, namespace: &str) -> anyhow::Result<Vec<Object>> {
    let selector = format!("labelSelector={}", escape(&format!("{INSTALL}={namespace}")));
    let mut objects = Vec::new();
    for kind in &KINDS {
        let items: Vec<Value> = cluster.list_metadata(&kind.path(None), &selector).await?;
        objects.extend(items.into_iter().filter_map(|item| Object::listed(kind, item)));
    }
    Ok(objects)
}

/// One object by kind and name.
pub(crate) async fn one(
    cluster: &Cluster,
    kind: &str,
    namespace: Option<&str>,
    name: &str,
) -> anyhow::Result<Option<Value>> {
    let kind = Kind::named(kind).context("a kind of this program's list")?;
    cluster.get(&format!("{}/{name}", kind.path(namespace))).await
}
