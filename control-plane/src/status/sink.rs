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
    time::Instant,
};

use super::pace::{Pace, is_same};
use crate::{
    apiserver::answer::{NoAnswer, within},
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

#[derive(Debug, Default)]
pub(crate) struct Sink {
    objects: Mutex<Objects>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Objects {
    /// One entry for each object at most: what it is to be told last.
    pending: BTreeMap<ObjectKey, Pending>,
    pace: Pace,
}

/// What is to be written, and when there will be more.
#[derive(Debug)]
struct Due {
    now: Vec<(ObjectKey, Arc<Value>)>,
    next: Option<Instant>,
}

#[derive(Clone, Debug)]
struct Pending {
    status: Arc<Value>,
    failed: u32,
}

impl Sink {
    /// What an object is to be told; `None` if there is nothing new.
    pub(crate) fn set(&self, key: ObjectKey, status: Option<Value>) {
        let pending = &mut self.lock().pending;
        match status {
            Some(status) => {
                // The same may be wanted again: what is being written now can have been changed back already.
                let failed = pending.get(&key).filter(|known| is_same(&known.status, &status)).map_or(0, |k| k.failed);
                pending.insert(key, Pending { status: Arc::new(status), failed });
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
        self.begin();
        loop {
            let changed = self.changed.notified();
            let client = &client;
            let due = self.due(Instant::now());
            let mut writes = stream::iter(due.now)
                .map(|(key, status)| async move {
                    let written = write(client, &key, &status).await;
                    (key, status, written)
                })
                .buffer_unordered(AT_ONCE);
            let mut failed = false;
            while let Some((key, status, written)) = writes.next().await {
                let outcome = if written.is_ok() { "written" } else { "failed" };
                metrics.writes.with_label_values(&["status", outcome]).inc();
                failed |= !self.settle(&key, &status, written, Instant::now());
            }
            tokio::select! {
                () = changed => {}
                () = tokio::time::sleep(RETRY), if failed => {}
                () = async {
                    match due.next {
                        Some(next) => tokio::time::sleep_until(next).await,
                        None => std::future::pending().await,
                    }
                } => {}
            }
        }
    }

    /// A predecessor's failures are not ours, and what he wrote is not known.
    fn begin(&self) {
        let mut objects = self.lock();
        objects.pending.values_mut().for_each(|pending| pending.failed = 0);
        objects.pace.forget_all();
    }

    fn due(&self, now: Instant) -> Due {
        let mut objects = self.lock();
        objects.pace.forget(now);
        let mut due = Due { now: Vec::new(), next: None };
        for (key, pending) in objects.pending.iter().filter(|(_, pending)| pending.failed < ATTEMPTS) {
            match objects.pace.earliest(key, &pending.status).filter(|earliest| *earliest > now) {
                None => due.now.push((key.clone(), pending.status.clone())),
                Some(earliest) => due.next = Some(due.next.map_or(earliest, |next| next.min(earliest))),
            }
        }
        due
    }

    /// Whether nothing is left to do for the object; what was set meanwhile is not touched.
    fn settle(&self, key: &ObjectKey, status: &Arc<Value>, written: Result<(), String>, now: Instant) -> bool {
        let Objects { pending: all, pace } = &mut *self.lock();
        let Err(why) = written else {
            if all.get(key).is_some_and(|pending| Arc::ptr_eq(&pending.status, status)) {
                all.remove(key);
            }
            pace.told(key.clone(), status.clone(), now);
            return true;
        };
        let Some(pending) = all.get_mut(key).filter(|pending| is_same(&pending.status, status)) else {
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

    fn lock(&self) -> MutexGuard<'_, Objects> {
        // Entries are changed one at a time.
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
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
    match within(DEADLINE, api.patch_status(&key.name, &params, &Patch::Apply(applied))).await {
        Ok(_) => Ok(()),
        // Gone meanwhile.
        Err(NoAnswer::Failed(kube::Error::Api(status))) if status.code == 404 => Ok(()),
        Err(error) => Err(error_chain(&error)),
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

    fn only(due: Due) -> Arc<Value> {
        let [(_, status)] = &due.now[..] else { panic!("{due:?}") };
        status.clone()
    }

    #[test]
    fn what_was_set_while_something_older_was_written_is_written_next() {
        let (sink, now) = (Sink::default(), Instant::now());
        sink.set(key(), Some(json!({"a": 1})));
        let older = only(sink.due(now));
        sink.set(key(), Some(json!({"a": 2})));
        assert!(sink.settle(&key(), &older, Ok(()), now));
        let due = sink.due(now);
        assert!(due.now.is_empty(), "not at once");
        let next = due.next.unwrap();
        let newer = only(sink.due(next));
        assert_eq!(*newer, json!({"a": 2}));
        assert!(sink.settle(&key(), &newer, Ok(()), next));
        let due = sink.due(next);
        assert!(due.now.is_empty() && due.next.is_none());
    }

    #[test]
    fn what_was_changed_back_while_it_was_written_is_written_again() {
        let (sink, now) = (Sink::default(), Instant::now());
        sink.set(key(), Some(json!({"a": 1})));
        let under_way = only(sink.due(now));
        sink.set(key(), Some(json!({"a": 1})));
        assert!(sink.settle(&key(), &under_way, Ok(()), now));
        let next = sink.due(now).next.unwrap();
        assert_eq!(only(sink.due(next)), under_way);
        // Unless the write comes back first, and nothing is left to tell.
        sink.set(key(), None);
        assert!(sink.due(next).now.is_empty());
    }

    #[test]
    fn attempts_are_bounded_until_there_is_something_else_to_tell() {
        let (sink, now) = (Sink::default(), Instant::now());
        let status = |reason: &str, time: &str| Some(json!({"reason": reason, "lastTransitionTime": time}));
        sink.set(key(), status("a", "1"));
        for attempt in 1..=ATTEMPTS {
            let status = only(sink.due(now));
            assert_eq!(sink.settle(&key(), &status, Err("refused".into()), now), attempt == ATTEMPTS);
        }
        sink.set(key(), status("a", "2"));
        assert!(sink.due(now).now.is_empty(), "the same is not tried again, at whatever time");
        sink.set(key(), status("b", "2"));
        assert_eq!(sink.due(now).now.len(), 1);
        sink.set(key(), None);
        assert!(sink.due(now).now.is_empty());
    }

    #[test]
    fn a_rival_who_keeps_changing_a_status_back_is_answered_less_and_less_often_until_he_lets_it_be() {
        let (sink, begun) = (Sink::default(), Instant::now());
        let status = |reason: &str, at: Instant| {
            let time = format!("{:?}", at - begun);
            Some(json!({"conditions": [{"reason": reason, "lastTransitionTime": time}]}))
        };
        // Seconds before our answer to a change at `now`, and when that was.
        let answered = |reason: &str, now: Instant| {
            sink.set(key(), status(reason, now));
            let due = sink.due(now);
            let at = due.next.unwrap_or(now);
            let written = only(sink.due(at));
            assert!(sink.settle(&key(), &written, Ok(()), at));
            ((at - now).as_secs(), at)
        };
        let mut now = begun;
        let mut pauses = Vec::new();
        for _ in 0..8 {
            let (pause, at) = answered("a", now);
            pauses.push(pause);
            now = at;
        }
        assert_eq!(pauses, [0, 2, 4, 8, 16, 32, 60, 60]);
        let (pause, now) = answered("b", now);
        assert_eq!(pause, 2, "something else to tell does not wait for the rival");
        let (pause, now) = answered("b", now + Duration::from_secs(120));
        assert_eq!(pause, 0, "he let it be");
        assert_eq!(answered("b", now).0, 2);
    }
}
