//! Discovery: how this process reaches its control plane, introduces itself, and puts what it learns into force.

use std::{
    collections::BTreeSet,
    future::Future,
    pin::Pin,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use mesh_core::index::{Delta, Provenance, Resource, ResourceKey};
use mesh_identity::{ControlPlane, ControlPlaneError};
use mesh_runtime::{drain::DrainWatcher, readiness::Pending};
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

mod disk;
pub(crate) mod on_demand;

pub use disk::decode_any as decode_saved;

/// In this order: a policy may name workloads, and readiness wants both.
const TYPES: [&str; 2] = [ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL];

/// The client and what writes down what it hears.
pub struct Discovery {
    client: Client,
    writer: Option<disk::Writer>,
}

impl std::fmt::Debug for Discovery {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Discovery").field("writer", &self.writer).finish_non_exhaustive()
    }
}

impl Discovery {
    /// Feeds `state`; `unsynced` is dropped when every type has arrived once, or was there already when this process started.
    ///
    /// # Errors
    /// When the control plane's address cannot be used.
    pub fn new(
        config: &Config,
        upstream: &Upstream,
        state: State,
        local: Arc<Local>,
        unsynced: Pending,
        metrics: ControlMetrics,
    ) -> Result<Self, ControlPlaneError> {
        let control_plane = upstream.control_plane(config.trust.control_tls());
        // Says at the start, rather than at each attempt, what can never work.
        drop(control_plane.channel()?);
        let observer = Box::new(move |event: Event<'_>| observe(&metrics, event));
        Ok(Self::over(Arc::new(Reach(control_plane)), observer, config, &upstream.address, state, local, unsynced))
    }

    fn over(
        transport: Arc<dyn Transport>,
        observer: Box<dyn Fn(Event<'_>) + Send>,
        config: &Config,
        address: &str,
        state: State,
        local: Arc<Local>,
        unsynced: Pending,
    ) -> Self {
        let on_demand = config.xds_on_demand;
        let waiting = TYPES.into_iter().filter(|kind| !(on_demand && *kind == ADDRESS_TYPE_URL)).collect();
        let handler = IntoState { state: state.clone(), local, on_demand, waiting, unsynced: Some(unsynced) };
        let mut client = Client::new(transport, node(config), &TYPES, Box::new(handler), observer);
        let directory = config.state_dir.as_deref();
        let store = directory.map(|dir| disk::Store::new(dir, address, &config.cluster_id, &config.node));
        if let Some(store) = &store {
            client.resume(&store.load());
        }
        if on_demand {
            state.set_demand(client.on_demand());
        }
        let writer = store.map(|store| {
            let (journal, writer) = disk::journal(store);
            client.journal(journal);
            writer
        });
        Self { client, writer }
    }

    /// Keeps the stream up, and the disk, until the drain starts.
    pub async fn run(self, drain: DrainWatcher) {
        let write = async {
            if let Some(writer) = self.writer {
                writer.run(drain.clone()).await;
            }
        };
        tokio::join!(self.client.run(drain.clone()), write);
    }
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
    /// Addresses come when asked for, so nothing waits for all of them.
    on_demand: bool,
    /// Types that have not arrived yet.
    waiting: Vec<&'static str>,
    unsynced: Option<Pending>,
}

impl IntoState {
    fn put(&self, provenance: Provenance, Update { upserts, removals }: Update) {
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
        self.state.update(|index| index.apply(Delta { provenance, upserts, removals }));
        self.local.records_changed(&arrived, former);
    }

    /// On demand, a pod's record is asked for rather than made up ([`on_demand::own_record`]).
    fn arrived(&mut self, type_url: &'static str) {
        if type_url == AUTHORIZATION_TYPE_URL {
            self.state.update(|index| index.set_policies_complete(true));
        }
        if type_url == ADDRESS_TYPE_URL && !self.on_demand {
            self.local.synced();
        }
        self.waiting.retain(|waiting| *waiting != type_url);
    }
}

impl Handler for IntoState {
    fn apply(&mut self, update: Update) {
        self.put(Provenance::Xds, update);
    }

    fn synced(&mut self, type_url: &'static str) {
        self.arrived(type_url);
        if self.waiting.is_empty() && self.unsynced.take().is_some() {
            tracing::info!(version = self.state.snapshot().version(), "first sync with the control plane is complete");
        }
    }

    /// A whole saved state makes this process ready: what it knew before is what it would go on with, had it not been restarted.
    fn restore(&mut self, saved: Vec<(&'static str, Update)>) {
        let types: BTreeSet<&'static str> = saved.iter().map(|(type_url, _)| *type_url).collect();
        for (_, update) in saved {
            self.put(Provenance::Disk, update);
        }
        if TYPES.iter().all(|kind| types.contains(kind)) {
            TYPES.into_iter().for_each(|kind| self.arrived(kind));
            self.unsynced = None;
            tracing::info!(state = ?self.state.snapshot(), "serving by the saved state until the control plane answers");
        } else if !types.is_empty() {
            tracing::warn!("the saved state is not whole; waiting for the control plane");
        }
    }
}

fn observe(metrics: &ControlMetrics, event: Event<'_>) {
    match event {
        Event::Connected => {
            metrics.xds_connected.set(1);
            tracing::info!("connected to the control plane");
        }
        Event::Terminated { reason } => {
            metrics.xds_connected.set(0);
            metrics.xds_terminations.with_label_values(&[reason]).inc();
        }
        Event::Received { type_url, bytes, resources, removals } => {
            tracing::debug!(type_url, resources, removals, "discovery");
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            metrics.xds_last_message.set(now.as_secs_f64());
            metrics.xds_messages.with_label_values(&[type_url]).inc();
            metrics.xds_bytes.with_label_values(&[type_url]).inc_by(bytes.try_into().unwrap_or(u64::MAX));
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
