//! What the mesh is known to hold: a snapshot that readers take without a lock, replaced whole by the control side.

use std::{
    fmt,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwap;
use mesh_core::{
    index::{Index, Resource},
    workload::Workload,
};
use mesh_xds::client::Demand;
use tokio::sync::watch;

use crate::{
    inpod::WorkloadInfo,
    static_config::{Source, StaticConfig, Unusable},
};

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
    /// Set once, at the start.
    static_config: OnceLock<StaticConfig>,
    /// Set once, where the control plane is asked on demand.
    demand: OnceLock<Demand>,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State").field("version", &self.0.index.load().version()).finish_non_exhaustive()
    }
}

impl State {
    pub fn new(node: Arc<str>) -> Self {
        let index = ArcSwap::from_pointee(Index::default());
        let versions = watch::Sender::new(0);
        let (static_config, demand) = (OnceLock::new(), OnceLock::new());
        Self(Arc::new(Inner { node, index, writer: Mutex::default(), versions, static_config, demand }))
    }

    pub fn node(&self) -> &Arc<str> {
        &self.0.node
    }

    /// Puts what the operator wrote down into force. Once per process.
    ///
    /// # Errors
    /// As [`StaticConfig::load`].
    pub fn load_static(&self, source: Source) -> Result<StaticConfig, Unusable> {
        let config = StaticConfig::load(source, self)?;
        Ok(self.0.static_config.get_or_init(|| config).clone())
    }

    /// What the operator wrote down, for the configuration dump.
    pub fn static_resources(&self) -> Arc<Vec<Resource>> {
        self.0.static_config.get().map(StaticConfig::resources).unwrap_or_default()
    }

    /// From now on what is missing here can be asked for. Once per process.
    pub(crate) fn set_demand(&self, demand: Demand) {
        self.0.demand.get_or_init(|| demand);
    }

    pub(crate) fn demand(&self) -> Option<&Demand> {
        self.0.demand.get()
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
        self.wait_for(within, || self.find(info)).await
    }

    /// As [`Self::local_workload`], and waits on while it is not known which policies protect the pod: before the first sync, and for a
    /// pod that discovery has not described yet. What is known at the deadline is returned all the same, to be denied by.
    pub async fn settled_workload(&self, info: &WorkloadInfo, within: Duration) -> Option<Arc<Workload>> {
        let settled = || self.find(info).filter(|workload| self.snapshot().policies_for(workload).complete);
        match self.wait_for(within, settled).await {
            Some(workload) => Some(workload),
            None => self.find(info),
        }
    }

    async fn wait_for<T>(&self, within: Duration, look: impl Fn() -> Option<T>) -> Option<T> {
        let mut versions = self.versions();
        let found = async {
            loop {
                versions.borrow_and_update();
                if let Some(found) = look() {
                    return Some(found);
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
    async fn inbound_waits_for_the_policies_too_and_gets_the_record_anyway_at_the_deadline() {
        let state = State::new("n1".into());
        arrive(&state);
        let before = tokio::time::Instant::now();
        assert!(state.settled_workload(&info(), Duration::from_secs(5)).await.is_some());
        assert_eq!(before.elapsed(), Duration::from_secs(5), "on the paused clock");
        let waiting = tokio::spawn({
            let state = state.clone();
            async move { state.settled_workload(&info(), Duration::from_secs(5)).await }
        });
        tokio::task::yield_now().await;
        state.update(|index| index.set_policies_complete(true));
        assert!(waiting.await.unwrap().is_some());
        assert_eq!(before.elapsed(), Duration::from_secs(5));
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_ends_at_the_deadline_and_other_nodes_do_not_count() {
        let state = State::new("n2".into());
        arrive(&state);
        assert!(state.local_workload(&info(), Duration::from_secs(5)).await.is_none());
    }
}
