//! What this node knows by itself: the pods its agent announced, the identities they need certificates for, and a provisional record of
//! those that the control plane has not described yet.
//!
//! A provisional record lets a new pod call *out* at once, also while the control plane is frozen; inbound is denied until the real
//! record says which policies apply ([`Provenance::Local`]). None is made before the first sync: without the destinations' records,
//! everything would look as if it were outside the mesh and leave in clear text.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use mesh_core::{
    identity::Identity,
    index::{Delta, Index, Provenance, Resource, ResourceKey},
    workload::{TunnelProtocol, Workload},
};
use mesh_identity::Manager;

use crate::{config::Config, inpod::WorkloadInfo, state::State};

/// Shared between the pods' manager and discovery.
pub struct Local {
    config: Arc<Config>,
    state: State,
    identities: Manager,
    pods: Mutex<Pods>,
}

#[derive(Default)]
struct Pods {
    by_uid: HashMap<Arc<str>, Pod>,
    synced: bool,
}

struct Pod {
    info: WorkloadInfo,
    identity: Identity,
}

impl fmt::Debug for Local {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Local").field("pods", &self.lock().by_uid.len()).finish_non_exhaustive()
    }
}

impl Local {
    pub fn new(config: Arc<Config>, state: State, identities: Manager) -> Self {
        Self { config, state, identities, pods: Mutex::default() }
    }

    /// The agent announced a pod: its certificate is fetched ahead of need.
    pub fn pod_arrived(&self, info: &WorkloadInfo) {
        let identity = self.record(info).map_or_else(|| self.guess(info), |workload| workload.identity());
        self.identities.warm(identity.clone());
        let mut pods = self.lock();
        pods.by_uid.insert(info.uid.clone(), Pod { info: info.clone(), identity });
        if pods.synced {
            self.describe([info]);
        }
    }

    /// The agent said that a pod is gone.
    pub fn pod_left(&self, uid: &str) {
        let Some(pod) = self.lock().by_uid.remove(uid) else { return };
        self.undescribe(&[&pod.info]);
        self.release([pod.identity]);
    }

    /// Discovery has said all it knows once: pods that it does not know get a provisional record.
    pub fn synced(&self) {
        let mut pods = self.lock();
        pods.synced = true;
        self.describe(pods.by_uid.values().map(|pod| &pod.info));
    }

    /// Discovery described or changed workloads, already in force in the state. `former` are identities of records replaced or removed.
    pub fn records_changed(&self, arrived: &[Arc<Workload>], former: Vec<Identity>) {
        let mut guesses = Vec::new();
        let mut misnamed = Vec::new();
        for workload in arrived.iter().filter(|w| self.is_here(w)) {
            if workload.tunnel_protocol == TunnelProtocol::Hbone || workload.native_tunnel {
                self.identities.warm(workload.identity());
            }
            for pod in self.lock().by_uid.values_mut().filter(|pod| is_record_of(workload, &pod.info)) {
                let identity = workload.identity();
                if pod.identity != identity {
                    guesses.push(std::mem::replace(&mut pod.identity, identity));
                }
                if workload.uid != self.uid(&pod.info) {
                    misnamed.push(pod.info.clone());
                }
            }
        }
        self.undescribe(&misnamed.iter().collect::<Vec<_>>());
        self.release(former.into_iter().chain(guesses));
    }

    /// Whether a record is of a pod that this process serves.
    pub fn is_here(&self, workload: &Workload) -> bool {
        match &self.config.workload {
            Some(info) => is_record_of(workload, info),
            None => !self.state.node().is_empty() && workload.node == *self.state.node(),
        }
    }

    /// Gives up certificates that neither a record nor a pod needs any more.
    fn release(&self, identities: impl IntoIterator<Item = Identity>) {
        if !self.config.is_shared() {
            return;
        }
        let index = self.state.snapshot();
        for identity in identities {
            let announced = self.lock().by_uid.values().any(|pod| pod.identity == identity);
            if !announced && index.identity_count(self.state.node(), &identity) == 0 {
                self.identities.forget(&identity);
            }
        }
    }

    fn describe<'a>(&self, pods: impl IntoIterator<Item = &'a WorkloadInfo>) {
        let unknown: Vec<Resource> = pods
            .into_iter()
            .filter(|info| self.record(info).is_none())
            .map(|info| Resource::Workload(Arc::new(self.provisional(info))))
            .collect();
        if !unknown.is_empty() {
            self.apply(Delta { provenance: Provenance::Local, upserts: unknown, removals: Vec::new() });
        }
    }

    fn undescribe(&self, pods: &[&WorkloadInfo]) {
        let keys: Vec<ResourceKey> = pods.iter().map(|info| ResourceKey::Address(self.uid(info))).collect();
        let index = self.state.snapshot();
        let held = |key: &ResourceKey| matches!(key, ResourceKey::Address(uid) if index.workload(uid).is_some());
        // Does nothing to records of discovery: they outrank ours.
        if keys.iter().any(held) {
            self.apply(Delta { provenance: Provenance::Local, upserts: Vec::new(), removals: keys });
        }
    }

    fn apply(&self, delta: Delta) {
        self.state.update(|index: &mut Index| index.apply(delta));
    }

    fn provisional(&self, info: &WorkloadInfo) -> Workload {
        Workload {
            service_account: info.service_account.clone(),
            trust_domain: self.config.trust_domain.as_str().into(),
            network: self.config.network.clone(),
            cluster_id: self.config.cluster_id.clone(),
            node: self.state.node().clone(),
            tunnel_protocol: TunnelProtocol::Hbone,
            ..Workload::new(self.uid(info), info.namespace.clone(), info.name.clone())
        }
    }

    fn record(&self, info: &WorkloadInfo) -> Option<Arc<Workload>> {
        let index = self.state.snapshot();
        index.local_workload(self.state.node(), &info.namespace, &info.name, &info.service_account).cloned()
    }

    fn guess(&self, info: &WorkloadInfo) -> Identity {
        let trust_domain = self.config.trust_domain.as_str();
        Identity::new(trust_domain, info.namespace.clone(), info.service_account.clone())
    }

    /// As control planes name the pods of a cluster.
    fn uid(&self, info: &WorkloadInfo) -> Arc<str> {
        format!("{}//Pod/{}/{}", self.config.cluster_id, info.namespace, info.name).into()
    }

    fn lock(&self) -> MutexGuard<'_, Pods> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_record_of(workload: &Workload, info: &WorkloadInfo) -> bool {
    workload.name == info.name
        && workload.namespace == info.namespace
        && workload.service_account == info.service_account
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use mesh_core::authorize::{Connection, authorize};
    use mesh_identity::{CaClient, CaError, ca::BoxFuture};

    use super::*;
    use crate::config::ProxyMode;

    struct NoCa;

    impl CaClient for NoCa {
        fn sign(&self, _: &Identity, _: String) -> BoxFuture<'_, Result<Vec<String>, CaError>> {
            Box::pin(std::future::pending())
        }
    }

    fn info() -> WorkloadInfo {
        WorkloadInfo { uid: "1".into(), name: "a".into(), namespace: "demo".into(), service_account: "sa".into() }
    }

    fn start() -> (Local, State, tokio::task::JoinHandle<()>) {
        let config =
            Config { mode: ProxyMode::Shared, workload: None, node: "n".into(), ..Config::default_for_tests() };
        let state = State::new("n".into());
        let (identities, task) = Manager::new(mesh_identity::Config::default(), Arc::new(NoCa));
        (Local::new(Arc::new(config), state.clone(), identities), state, tokio::spawn(task))
    }

    fn from_discovery(state: &State, uid: &str, trust_domain: &str) -> Arc<Workload> {
        let mut workload = Workload::new(uid, "demo", "a");
        (workload.service_account, workload.node) = ("sa".into(), "n".into());
        workload.trust_domain = trust_domain.into();
        let workload = Arc::new(workload);
        let upserts = vec![Resource::Workload(workload.clone())];
        state.update(|index| index.apply(Delta { provenance: Provenance::Xds, upserts, removals: Vec::new() }));
        workload
    }

    #[tokio::test]
    async fn an_announced_pod_has_a_record_after_the_first_sync_only() {
        let (local, state, _task) = start();
        local.pod_arrived(&info());
        assert_eq!(state.snapshot().workloads().count(), 0);
        local.synced();
        let index = state.snapshot();
        let workload = index.workload("Kubernetes//Pod/demo/a").expect("a provisional record");
        assert_eq!(workload.identity().to_string(), "spiffe://cluster.local/ns/demo/sa/sa");
        local.pod_left("1");
        assert_eq!(state.snapshot().workloads().count(), 0);
    }

    #[tokio::test]
    async fn a_provisional_record_admits_nobody() {
        let (local, state, _task) = start();
        local.synced();
        state.update(|index| index.set_policies_complete(true));
        local.pod_arrived(&info());
        let index = state.snapshot();
        let policies = index.policies_for(index.workload("Kubernetes//Pod/demo/a").unwrap());
        let connection = Connection {
            source_ip: [10, 0, 0, 1].into(),
            source_identity: None,
            destination: ([10, 0, 0, 2], 80).into(),
        };
        assert!(!authorize(&policies, &connection).is_allowed());
    }

    /// The record does not say of which pod it is: only its name does.
    #[tokio::test(start_paused = true)]
    async fn a_pod_made_anew_is_judged_by_the_record_of_its_name_and_without_one_nobody_gets_in() {
        let (local, state, _task) = start();
        state.update(|index| index.set_policies_complete(true));
        let describe = |policy: &str| {
            let mut workload = Workload::clone(&from_discovery(&state, "c//Pod/demo/a", "td"));
            workload.authorization_policies = vec![policy.into()];
            let upserts = vec![Resource::Workload(Arc::new(workload))];
            state.update(|index| index.apply(Delta { provenance: Provenance::Xds, upserts, removals: Vec::new() }));
        };
        let successor = WorkloadInfo { uid: "2".into(), ..info() };
        let judged_by = async || {
            let found = state.settled_workload(&successor, Duration::from_secs(5)).await;
            found.map(|workload| state.snapshot().policies_for(&workload).missing)
        };
        local.synced();
        local.pod_arrived(&info());
        describe("demo/of-the-first");
        local.pod_left("1");
        local.pod_arrived(&successor);
        assert_eq!(judged_by().await, Some(vec!["demo/of-the-first".into()]));
        describe("demo/of-the-second");
        assert_eq!(judged_by().await, Some(vec!["demo/of-the-second".into()]));
        let removals = vec![ResourceKey::Address("c//Pod/demo/a".into())];
        state.update(|index| {
            index.apply(Delta { provenance: Provenance::Xds, upserts: Vec::new(), removals });
        });
        assert_eq!(judged_by().await, None, "nobody gets in");
    }

    #[tokio::test]
    async fn discovery_replaces_the_record_whatever_it_calls_it() {
        for uid in ["Kubernetes//Pod/demo/a", "other//Pod/demo/a"] {
            let (local, state, _task) = start();
            local.synced();
            local.pod_arrived(&info());
            let workload = from_discovery(&state, uid, "td2");
            local.records_changed(&[workload], Vec::new());
            let index = state.snapshot();
            let records: Vec<&str> = index.workloads().map(|w| &*w.uid).collect();
            assert_eq!(records, [uid]);
            assert_eq!(&*local.lock().by_uid["1"].identity.trust_domain, "td2");
        }
    }
}
