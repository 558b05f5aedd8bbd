//! Discovery: how this process reaches its control plane, introduces itself, and puts what it learns into force.

use std::{future::Future, pin::Pin, sync::Arc};

use mesh_core::index::{Delta, Provenance, Resource, ResourceKey};
use mesh_identity::{ControlPlane, ControlPlaneError};
use mesh_runtime::readiness::Pending;
use mesh_xds::client::{BoxError, Client, Event, Handler, Transport, Update};
use prost_types::value::Kind;
use proto::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL, core::Node};
use tonic::{metadata::MetadataMap, transport::Channel};

use crate::{
    config::{Config, Upstream},
    local::Local,
    metrics::ControlMetrics,
    state::State,
};

/// In this order: a policy may name workloads, and readiness wants both.
const TYPES: [&str; 2] = [ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL];

/// A client that feeds `state`; `unsynced` is dropped when every type has arrived once.
///
/// # Errors
/// When the control plane's address cannot be used.
pub fn client(
    config: &Config,
    upstream: &Upstream,
    state: State,
    local: Arc<Local>,
    unsynced: Pending,
    metrics: ControlMetrics,
) -> Result<Client, ControlPlaneError> {
    let control_plane = upstream.control_plane(config.trust.control_tls());
    // Says at the start, rather than at each attempt, what can never work.
    drop(control_plane.channel()?);
    let handler = IntoState { state, local, waiting: TYPES.to_vec(), unsynced: Some(unsynced) };
    let observer = Box::new(move |event: Event<'_>| observe(&metrics, event));
    Ok(Client::new(Arc::new(Reach(control_plane)), node(config), &TYPES, Box::new(handler), observer))
}

/// The control plane behind [`Transport`]: roots and token are read anew for each attempt.
struct Reach(ControlPlane);

impl Transport for Reach {
    fn channel(&self) -> Pin<Box<dyn Future<Output = Result<Channel, BoxError>> + Send + '_>> {
        Box::pin(self.0.connect())
    }

    fn metadata(&self) -> Result<MetadataMap, BoxError> {
        Ok(self.0.metadata()?)
    }
}

/// Who is asking. The control plane takes what matters from the token, not from here.
fn node(config: &Config) -> Node {
    let Config { instance_ip, pod_name, pod_namespace, .. } = config;
    let own = [
        ("NAME", pod_name.clone()),
        ("NAMESPACE", pod_namespace.clone()),
        ("INSTANCE_IPS", instance_ip.to_string()),
        ("NODE_NAME", config.node.to_string()),
    ];
    let own = own.map(|(name, value)| (name.to_owned(), string(value)));
    let told = config.metadata.iter().map(|(name, json)| (name.clone(), value(json)));
    Node {
        id: format!("ztunnel~{instance_ip}~{pod_name}.{pod_namespace}~{pod_namespace}.svc.cluster.local"),
        metadata: Some(prost_types::Struct { fields: own.into_iter().chain(told).collect() }),
        ..Node::default()
    }
}

fn string(text: String) -> prost_types::Value {
    prost_types::Value { kind: Some(Kind::StringValue(text)) }
}

fn value(json: &serde_json::Value) -> prost_types::Value {
    use serde_json::Value;
    let kind = match json {
        Value::Null => Kind::NullValue(0),
        Value::Bool(b) => Kind::BoolValue(*b),
        Value::Number(n) => Kind::NumberValue(n.as_f64().unwrap_or_default()),
        Value::String(text) => Kind::StringValue(text.clone()),
        Value::Array(list) => Kind::ListValue(prost_types::ListValue { values: list.iter().map(value).collect() }),
        Value::Object(map) => {
            let fields = map.iter().map(|(name, json)| (name.clone(), value(json))).collect();
            Kind::StructValue(prost_types::Struct { fields })
        }
    };
    prost_types::Value { kind: Some(kind) }
}

/// Puts what arrives into force.
struct IntoState {
    state: State,
    local: Arc<Local>,
    /// Types that have not arrived yet.
    waiting: Vec<&'static str>,
    unsynced: Option<Pending>,
}

impl Handler for IntoState {
    fn apply(&mut self, Update { upserts, removals }: Update) {
        let before = self.state.snapshot();
        let replaced = upserts.iter().map(Resource::key).chain(removals.iter().cloned());
        let former = replaced.filter_map(|key| match key {
            ResourceKey::Address(uid) => before.workload(&uid).filter(|w| self.local.is_here(w)).map(|w| w.identity()),
            ResourceKey::Policy(_) => None,
        });
        let former = former.collect();
        let arrived: Vec<_> = upserts
            .iter()
            .filter_map(|resource| match resource {
                Resource::Workload(workload) if self.local.is_here(workload) => Some(workload.clone()),
                _ => None,
            })
            .collect();
        drop(before);
        self.state.update(|index| index.apply(Delta { provenance: Provenance::Xds, upserts, removals }));
        self.local.records_changed(&arrived, former);
    }

    fn synced(&mut self, type_url: &'static str) {
        if type_url == AUTHORIZATION_TYPE_URL {
            self.state.update(|index| index.set_policies_complete(true));
        }
        if type_url == ADDRESS_TYPE_URL {
            self.local.synced();
        }
        self.waiting.retain(|waiting| *waiting != type_url);
        if self.waiting.is_empty() && self.unsynced.take().is_some() {
            tracing::info!(version = self.state.snapshot().version(), "first sync with the control plane is complete");
        }
    }
}

fn observe(metrics: &ControlMetrics, event: Event<'_>) {
    match event {
        Event::Connected => tracing::info!("connected to the control plane"),
        Event::Terminated { reason } => metrics.xds_terminations.with_label_values(&[reason]).inc(),
        Event::Received { type_url, bytes, resources, removals } => {
            tracing::debug!(type_url, resources, removals, "discovery");
            metrics.xds_messages.with_label_values(&[type_url]).inc();
            metrics.xds_bytes.with_label_values(&[type_url]).inc_by(bytes.try_into().unwrap_or(u64::MAX));
        }
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::workload::Workload;
    use mesh_identity::{CaClient, CaError, ca::BoxFuture};
    use mesh_runtime::readiness::Readiness;

    use super::*;

    struct NoCa;

    impl CaClient for NoCa {
        fn sign(&self, _: &mesh_core::identity::Identity, _: String) -> BoxFuture<'_, Result<Vec<String>, CaError>> {
            Box::pin(std::future::pending())
        }
    }

    #[tokio::test]
    async fn policies_are_complete_and_readiness_given_when_every_type_has_arrived() {
        let (config, state, readiness) =
            (Arc::new(Config::default_for_tests()), State::new("".into()), Readiness::default());
        let (identities, task) = mesh_identity::Manager::new(mesh_identity::Config::default(), Arc::new(NoCa));
        let manager = tokio::spawn(task);
        let local = Arc::new(Local::new(config, state.clone(), identities));
        let unsynced = Some(readiness.pending("state manager"));
        let mut handler = IntoState { state: state.clone(), local, waiting: TYPES.to_vec(), unsynced };
        let workload = Arc::new(Workload::new("c//Pod/demo/a", "demo", "a"));
        handler.apply(Update { upserts: vec![Resource::Workload(workload)], removals: Vec::new() });
        handler.synced(ADDRESS_TYPE_URL);
        assert!(!state.snapshot().policies_complete() && !readiness.is_ready());
        handler.synced(AUTHORIZATION_TYPE_URL);
        assert!(state.snapshot().policies_complete() && readiness.is_ready());
        handler.apply(Update { upserts: Vec::new(), removals: vec![ResourceKey::Address("c//Pod/demo/a".into())] });
        assert_eq!(state.snapshot().workloads().count(), 0);
        manager.abort();
    }

    #[test]
    fn introduces_itself_as_upstream_does() {
        let metadata = [("CLUSTER_ID".to_owned(), serde_json::json!({"a": [1, null]}))].into();
        let config = Config {
            pod_name: "zt-1".into(),
            pod_namespace: "istio-system".into(),
            node: "n1".into(),
            metadata,
            ..Config::default_for_tests()
        };
        let node = node(&config);
        assert_eq!(node.id, "ztunnel~1.1.1.1~zt-1.istio-system~istio-system.svc.cluster.local");
        let fields = node.metadata.unwrap().fields;
        assert_eq!(fields["NODE_NAME"], string("n1".to_owned()));
        assert!(matches!(fields["CLUSTER_ID"].kind, Some(Kind::StructValue(_))));
    }
}
