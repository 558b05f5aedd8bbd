//! What the mesh is known to hold: a snapshot that readers take without a lock, replaced whole by the control side.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwap;
use mesh_core::{index::Index, workload::Workload};
use tokio::sync::watch;

use crate::inpod::WorkloadInfo;

/// Cheap to clone; clones share the state.
#[derive(Clone)]
pub struct State(Arc<Inner>);

struct Inner {
    /// The workloads of this node are found by it; empty stands for any node.
    node: Arc<str>,
    index: ArcSwap<Index>,
    /// Serialises writers; readers never take it.
    writer: Mutex<()>,
    versions: watch::Sender<u64>,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State").field("version", &self.0.index.load().version()).finish_non_exhaustive()
    }
}

impl State {
    pub fn new(node: Arc<str>) -> Self {
        let index = ArcSwap::from_pointee(Index::default());
        Self(Arc::new(Inner { node, index, writer: Mutex::default(), versions: watch::Sender::new(0) }))
    }

    pub fn node(&self) -> &Arc<str> {
        &self.0.node
    }

    /// The state now. Hold it for one decision, not for a flow: old snapshots would pile up.
    pub fn snapshot(&self) -> Arc<Index> {
        self.0.index.load_full()
    }

    /// Announces the version of each snapshot after it is in force.
    pub fn versions(&self) -> watch::Receiver<u64> {
        self.0.versions.subscribe()
    }

    /// Changes a copy, publishes it, and announces its version. For the control side.
    pub fn update(&self, change: impl FnOnce(&mut Index)) {
        // A panic in `change` leaves the published snapshot whole.
        let writer = self.0.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next = Index::clone(&self.0.index.load());
        change(&mut next);
        let version = next.version();
        self.0.index.store(Arc::new(next));
        self.0.versions.send_replace(version);
        drop(writer);
    }

    /// The record of a pod of this node, waited for at most `within`: it may be on its way. Cancel safe.
    pub async fn local_workload(&self, info: &WorkloadInfo, within: Duration) -> Option<Arc<Workload>> {
        let mut versions = self.versions();
        let found = async {
            loop {
                versions.borrow_and_update();
                if let Some(workload) = self.find(info) {
                    return Some(workload);
                }
                versions.changed().await.ok()?;
            }
        };
        tokio::time::timeout(within, found).await.ok().flatten()
    }

    fn find(&self, info: &WorkloadInfo) -> Option<Arc<Workload>> {
        let index = self.0.index.load();
        index.local_workload(&self.0.node, &info.namespace, &info.name, &info.service_account).cloned()
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::index::{Delta, Provenance, Resource};

    use super::*;

    fn info() -> WorkloadInfo {
        WorkloadInfo { uid: "1".into(), name: "web-1".into(), namespace: "demo".into(), service_account: "web".into() }
    }

    fn arrive(state: &State) {
        let mut workload = Workload::new("c//Pod/demo/web-1", "demo", "web-1");
        workload.service_account = "web".into();
        workload.node = "n1".into();
        let upserts = vec![Resource::Workload(Arc::new(workload))];
        state.update(|index| index.apply(Delta { provenance: Provenance::Xds, upserts, removals: Vec::new() }));
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_ahead_of_its_record_waits_for_it() {
        let state = State::new("n1".into());
        let before = state.snapshot();
        let waiting = tokio::spawn({
            let state = state.clone();
            async move { state.local_workload(&info(), Duration::from_secs(5)).await }
        });
        tokio::task::yield_now().await;
        arrive(&state);
        assert_eq!(&*waiting.await.unwrap().expect("the record").name, "web-1");
        assert_eq!((before.version(), *state.versions().borrow()), (0, 1), "old snapshots do not change");
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_ends_at_the_deadline_and_other_nodes_do_not_count() {
        let state = State::new("n2".into());
        arrive(&state);
        assert!(state.local_workload(&info(), Duration::from_secs(5)).await.is_none());
    }
}
