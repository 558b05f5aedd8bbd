//! What objects are yet to be told, and the leader's telling it.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::{StreamExt as _, stream};
use kube::{
    Api, Client,
    api::{DynamicObject, Patch, PatchParams},
};
use mesh_runtime::{drain::DrainWatcher, telemetry::error_chain};
use serde_json::{Value, json};
use tokio::{
    sync::{Notify, watch},
    time::timeout,
};

use crate::{
    app::TaskFailed,
    lease::whenever_leading,
    metrics::Metrics,
    objects::{Kind, ObjectKey},
    source::kubernetes::Watched,
};

/// Writes at once.
const AT_ONCE: usize = 8;
/// Of one object; then the next change of it is waited for.
const ATTEMPTS: u32 = 5;
const RETRY: Duration = Duration::from_secs(2);
/// For one answer of the API server.
const DEADLINE: Duration = Duration::from_secs(5);

/// One entry for each object at most: what it is to be told last.
#[derive(Debug, Default)]
pub(crate) struct Sink {
    pending: Mutex<BTreeMap<ObjectKey, Pending>>,
    changed: Notify,
}

#[derive(Clone, Debug)]
struct Pending {
    status: Arc<Value>,
    failed: u32,
}

impl Sink {
    /// What an object is to be told; `None` if there is nothing new.
    pub(crate) fn set(&self, key: ObjectKey, status: Option<Value>) {
        let mut pending = self.lock();
        match status {
            Some(status) if pending.get(&key).is_some_and(|known| *known.status == status) => {}
            Some(status) => {
                pending.insert(key, Pending { status: Arc::new(status), failed: 0 });
                self.changed.notify_one();
            }
            None => drop(pending.remove(&key)),
        }
    }

    /// Tells objects whenever this replica leads, until the drain.
    pub(crate) async fn write(
        self: Arc<Self>,
        client: Client,
        leads: watch::Receiver<bool>,
        metrics: Metrics,
        drain: DrainWatcher,
    ) -> Result<(), TaskFailed> {
        let work = || self.clone().lead(client.clone(), metrics.clone());
        let None = whenever_leading(leads, &drain, work).await;
        Ok(())
    }

    /// Never ends; dropped when the lead is lost, and with it what was about to be written.
    async fn lead(self: Arc<Self>, client: Client, metrics: Metrics) -> Infallible {
        // A predecessor's failures are not ours.
        self.lock().values_mut().for_each(|pending| pending.failed = 0);
        loop {
            let changed = self.changed.notified();
            let client = &client;
            let mut writes = stream::iter(self.due())
                .map(|(key, status)| async move {
                    let written = write(client, &key, &status).await;
                    (key, status, written)
                })
                .buffer_unordered(AT_ONCE);
            let mut failed = false;
            while let Some((key, status, written)) = writes.next().await {
                let outcome = if written.is_ok() { "written" } else { "failed" };
                metrics.writes.with_label_values(&["status", outcome]).inc();
                failed |= !self.settle(&key, &status, written);
            }
            tokio::select! {
                () = changed => {}
                () = tokio::time::sleep(RETRY), if failed => {}
            }
        }
    }

    fn due(&self) -> Vec<(ObjectKey, Arc<Value>)> {
        let pending = self.lock();
        let due = pending.iter().filter(|(_, pending)| pending.failed < ATTEMPTS);
        due.map(|(key, pending)| (key.clone(), pending.status.clone())).collect()
    }

    /// Whether nothing is left to do for the object; what was set meanwhile is not touched.
    fn settle(&self, key: &ObjectKey, status: &Arc<Value>, written: Result<(), String>) -> bool {
        let mut all = self.lock();
        let Some(pending) = all.get_mut(key).filter(|pending| Arc::ptr_eq(&pending.status, status)) else {
            return true;
        };
        let Err(why) = written else {
            all.remove(key);
            return true;
        };
        pending.failed += 1;
        if pending.failed >= ATTEMPTS {
            tracing::warn!(object = %key, why, "its status cannot be written; its next change is waited for");
        } else {
            tracing::debug!(object = %key, why, "its status cannot be written yet");
        }
        pending.failed >= ATTEMPTS
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ObjectKey, Pending>> {
        // Entries are changed one at a time.
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn write(client: &Client, key: &ObjectKey, status: &Value) -> Result<(), String> {
    let resource = Watched::of(key.kind).map(|watched| watched.resource());
    let resource = resource.ok_or_else(|| format!("{} is not watched", key.kind.name()))?;
    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), &key.namespace, &resource);
    let applied = json!({
        "apiVersion": resource.api_version,
        "kind": resource.kind,
        "metadata": {"name": *key.name, "namespace": *key.namespace},
        "status": status,
    });
    let params = PatchParams::apply(manager(key.kind)).force();
    match timeout(DEADLINE, api.patch_status(&key.name, &params, &Patch::Apply(applied))).await {
        Ok(Ok(_)) => Ok(()),
        // Gone meanwhile.
        Ok(Err(kube::Error::Api(status))) if status.code == 404 => Ok(()),
        Ok(Err(error)) => Err(error_chain(&error)),
        Err(_) => Err(format!("no answer within {DEADLINE:?}")),
    }
}

/// Upstream's names, so that either takes over from the other.
fn manager(kind: Kind) -> &'static str {
    match kind {
        Kind::AuthorizationPolicy | Kind::PeerAuthentication => "istio-ambient-ztunnel-policy",
        Kind::WorkloadEntry => "istio-ambient-workloadentry",
        _ => "istio-ambient-service",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> ObjectKey {
        ObjectKey::new(Kind::Service, &"demo".into(), &"web".into())
    }

    #[test]
    fn what_was_set_while_something_older_was_written_is_written_next() {
        let sink = Sink::default();
        sink.set(key(), Some(json!({"a": 1})));
        let (_, older) = sink.due().remove(0);
        sink.set(key(), Some(json!({"a": 2})));
        assert!(sink.settle(&key(), &older, Ok(())));
        let (_, newer) = sink.due().remove(0);
        assert_eq!(*newer, json!({"a": 2}));
        assert!(sink.settle(&key(), &newer, Ok(())));
        assert!(sink.due().is_empty());
    }

    #[test]
    fn attempts_are_bounded_until_there_is_something_else_to_tell() {
        let sink = Sink::default();
        sink.set(key(), Some(json!({"a": 1})));
        for attempt in 1..=ATTEMPTS {
            let (_, status) = sink.due().remove(0);
            assert_eq!(sink.settle(&key(), &status, Err("refused".into())), attempt == ATTEMPTS);
        }
        sink.set(key(), Some(json!({"a": 1})));
        assert!(sink.due().is_empty(), "the same is not tried again");
        sink.set(key(), Some(json!({"a": 2})));
        assert_eq!(sink.due().len(), 1);
        sink.set(key(), None);
        assert!(sink.due().is_empty());
    }
}
