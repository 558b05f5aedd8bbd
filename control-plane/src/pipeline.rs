//! Objects → index → discovery, step by step; what drives it is a [`folder`] or a [`cluster`].

pub(crate) mod cluster;
pub(crate) mod folder;

use std::{
    collections::{BTreeSet, HashSet},
    sync::Arc,
};

use mesh_core::index::Resource;
use mesh_runtime::readiness::{Pending, Readiness};
use mesh_xds::server::Cache;
use tokio::sync::watch;

use crate::{
    index::{self, ClusterIndex, ResourceChange},
    metrics::Metrics,
    placement::Placements,
    problem::Problem,
    publish,
    source::{ObjectChange, Version},
};

/// What the rest of the process may look at; replaced as a whole.
#[derive(Clone, Debug, Default)]
pub(crate) struct Snapshot {
    pub(crate) placements: Placements,
    pub(crate) problems: Arc<[Problem]>,
    /// The files that were read for it.
    pub(crate) versions: Arc<HashSet<Version>>,
}

/// Owns the index, and fills the cache from it.
pub(crate) struct Pipeline {
    index: ClusterIndex,
    placements: Placements,
    cache: Arc<Cache>,
    snapshot: watch::Sender<Snapshot>,
    reported: BTreeSet<Problem>,
    metrics: Metrics,
    readiness: Readiness,
    /// Dropped when the first full state has been published.
    starting: Option<Pending>,
}

impl Pipeline {
    pub(crate) fn new(settings: index::Settings, cache: Arc<Cache>, metrics: Metrics, readiness: Readiness) -> Self {
        let index = ClusterIndex::new(settings);
        let snapshot = watch::Sender::default();
        let starting = Some(readiness.pending("first full state"));
        let (placements, reported) = Default::default();
        Self { index, placements, cache, snapshot, reported, metrics, readiness, starting }
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Snapshot> {
        self.snapshot.subscribe()
    }

    /// Publishes what follows from changes. Computes for a while if there are many.
    fn apply(&mut self, changes: Vec<ObjectChange>) {
        if changes.is_empty() {
            return;
        }
        let objects = changes.len();
        self.placements.apply(&changes);
        let changes = self.index.apply(changes);
        self.count(&changes);
        let published = self.cache.publish(publish::cache_changes(&changes));
        tracing::debug!(objects, published, version = self.cache.version(), "objects changed");
    }

    fn count(&self, changes: &[ResourceChange]) {
        let gauge = |resource: &Resource| match resource {
            Resource::Workload(_) => &self.metrics.workloads,
            Resource::Service(_) => &self.metrics.services,
            Resource::Policy(_) => &self.metrics.policies,
        };
        for ResourceChange { before, after } in changes {
            before.iter().for_each(|resource| gauge(resource).dec());
            after.iter().for_each(|resource| gauge(resource).inc());
        }
    }

    /// Logs each problem once, and once more that it is gone; and shows the rest of the process how things are. `problems` are those of
    /// what the source says, `of_source` those of the source itself, which have metrics of their own.
    fn report(&mut self, problems: Vec<Problem>, of_source: Vec<Problem>, versions: HashSet<Version>) {
        let mut problems: BTreeSet<Problem> = problems.into_iter().chain(self.index.problems().cloned()).collect();
        self.metrics.problems.set(i64::try_from(problems.len()).unwrap_or(i64::MAX));
        problems.extend(of_source);
        for problem in problems.difference(&self.reported) {
            tracing::warn!(place = %problem.place, field = problem.field, remedy = problem.remedy, "{}", problem.message);
        }
        for problem in self.reported.difference(&problems) {
            tracing::info!(place = %problem.place, field = problem.field, "resolved: {}", problem.message);
        }
        self.snapshot.send_replace(Snapshot {
            placements: self.placements.clone(),
            problems: problems.iter().cloned().collect(),
            versions: Arc::new(versions),
        });
        self.reported = problems;
    }

    fn is_starting(&self) -> bool {
        self.starting.is_some()
    }

    /// Says what the start waits for.
    fn awaits(&mut self, what: String) {
        self.starting = Some(self.readiness.pending(what));
    }

    /// The first full state is published: nodes may connect.
    fn set_ready(&mut self, objects: usize) {
        self.cache.set_ready();
        self.starting = None;
        tracing::info!(objects, "first full state published");
    }
}
