//! The API server: the pods of this node and the labels of all namespaces, watched.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fmt,
    pin::{Pin, pin},
    sync::Arc,
};

use futures_util::StreamExt;
use k8s_openapi::{NamespaceResourceScope, api::core::v1::Namespace, apimachinery::pkg::apis::meta::v1::Time};
use kube::{
    Api, Client, Resource,
    api::ObjectMeta,
    core::PartialObjectMeta,
    runtime::{
        WatchStreamExt,
        watcher::{self, Event},
    },
};
use mesh_runtime::{drain::DrainWatcher, telemetry::error_chain};
use prometheus::IntCounterVec;
use serde::{Deserialize, Deserializer, de::IgnoredAny};
use tokio::sync::watch;

use super::{Enrolment, PodSource, View, publish};
use crate::{
    agent::{
        enroll::Uid,
        status::{REDIRECTION, redirection_named},
    },
    eligibility::{Labels, Pod},
    object::{Metadata, Spec, Status, pod},
};

/// Watches until the drain. While the API server is away the last view stays, and the watch is tried again with jittered back-off.
pub struct KubernetesSource {
    client: Client,
    node: String,
    failures: IntCounterVec,
}

/// The part of a Pod that is kept for as long as it takes to read it; everything else is skipped while it arrives.
#[derive(Clone, Default, Deserialize)]
#[serde(default)]
pub struct WatchedPod {
    #[serde(deserialize_with = "kept")]
    metadata: ObjectMeta,
    spec: Option<Spec>,
    status: Option<Status>,
}

/// Without `managedFields`: anybody may nest those in a pod of theirs deeper than JSON is read, and the list of the node would be lost.
fn kept<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ObjectMeta, D::Error> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Kept {
        name: Option<String>,
        namespace: Option<String>,
        uid: Option<String>,
        resource_version: Option<String>,
        labels: Option<Labels>,
        annotations: Option<Labels>,
        deletion_timestamp: Option<Time>,
    }
    let Kept { name, namespace, uid, resource_version, labels, annotations, deletion_timestamp } =
        Kept::deserialize(deserializer)?;
    let rest = ObjectMeta::default();
    Ok(ObjectMeta { name, namespace, uid, resource_version, labels, annotations, deletion_timestamp, ..rest })
}

impl fmt::Debug for WatchedPod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("WatchedPod").field(&self.metadata.name).finish()
    }
}

impl Resource for WatchedPod {
    type DynamicType = ();
    type Scope = NamespaceResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        "Pod".into()
    }

    fn group((): &()) -> Cow<'_, str> {
        "".into()
    }

    fn version((): &()) -> Cow<'_, str> {
        "v1".into()
    }

    fn plural((): &()) -> Cow<'_, str> {
        "pods".into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

impl WatchedPod {
    pub fn into_pod(self) -> Option<Pod> {
        let ObjectMeta { name, namespace, uid, labels, annotations, deletion_timestamp, .. } = self.metadata;
        let metadata = Metadata {
            name: name?,
            namespace,
            uid,
            labels,
            annotations,
            deletion_timestamp: deletion_timestamp.map(|_| IgnoredAny),
        };
        pod(metadata, self.spec, self.status)
    }
}

impl KubernetesSource {
    /// `failures` counts by what was watched (`pods`, `namespaces`).
    pub fn new(client: Client, node: String, failures: IntCounterVec) -> Self {
        Self { client, node, failures }
    }

    fn failed(&self, watched: &str, error: &watcher::Error) {
        self.failures.with_label_values(&[watched]).inc();
        tracing::warn!(watched, error = error_chain(error), "the API server cannot be watched; what is known stays");
    }
}

impl PodSource for KubernetesSource {
    fn run(
        self: Box<Self>,
        views: watch::Sender<Option<Arc<View>>>,
        drain: DrainWatcher,
    ) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(async move {
            let of_node = watcher::Config::default().fields(&format!("spec.nodeName={}", self.node));
            let pods = watcher::watcher(Api::<WatchedPod>::all(self.client.clone()), of_node);
            let namespaces = Api::<PartialObjectMeta<Namespace>>::all(self.client.clone());
            let namespaces = watcher::watcher(namespaces, watcher::Config::default());
            let (mut pods, mut namespaces) = (pin!(pods.default_backoff()), pin!(namespaces.default_backoff()));
            let mut known = Known::default();
            loop {
                tokio::select! {
                    _ = drain.signalled() => return,
                    Some(event) = pods.next() => match event {
                        Ok(event) => known.pods.take(event, |pod| Some((pod.metadata.uid.as_deref()?.into(), pod.clone().into_pod()?.into()))),
                        Err(error) => self.failed("pods", &error),
                    },
                    Some(event) = namespaces.next() => match event {
                        Ok(event) => known.namespaces.take(event, |ns| {
                            Some((ns.metadata.name.clone()?, ns.metadata.labels.clone().unwrap_or_default()))
                        }),
                        Err(error) => self.failed("namespaces", &error),
                    },
                }
                if let Some(view) = known.view() {
                    publish(&views, view);
                }
            }
        })
    }
}

#[derive(Default)]
struct Known {
    pods: Listing<Uid, Arc<Pod>>,
    namespaces: Listing<String, Labels>,
}

impl Known {
    /// `None` until both have been listed completely.
    fn view(&self) -> Option<View> {
        let (pods, namespaces) = (self.pods.listed.as_ref()?, self.namespaces.listed.as_ref()?);
        let enrolments = pods.iter().filter_map(|(uid, pod)| Some((uid.clone(), enrolment(pod)?))).collect();
        Some(View { pods: (**pods).clone(), namespaces: namespaces.clone(), enrolments })
    }
}

fn enrolment(pod: &Pod) -> Option<Enrolment> {
    let redirection = redirection_named(pod.annotations.get(REDIRECTION)?)?;
    Some(Enrolment { namespace: pod.namespace.clone(), name: pod.name.clone(), redirection })
}

/// What a watch has told. While a new list is under way, the former counts.
struct Listing<K, V> {
    listed: Option<Arc<BTreeMap<K, V>>>,
    coming: BTreeMap<K, V>,
}

impl<K, V> Default for Listing<K, V> {
    fn default() -> Self {
        Self { listed: None, coming: BTreeMap::new() }
    }
}

impl<K: Ord + Clone, V: Clone> Listing<K, V> {
    fn take<O>(&mut self, event: Event<O>, read: impl Fn(&O) -> Option<(K, V)>) {
        match event {
            Event::Init => self.coming.clear(),
            Event::InitApply(object) => self.coming.extend(read(&object)),
            Event::InitDone => self.listed = Some(Arc::new(std::mem::take(&mut self.coming))),
            Event::Apply(object) => {
                if let (Some(listed), Some((key, value))) = (&mut self.listed, read(&object)) {
                    Arc::make_mut(listed).insert(key, value);
                }
            }
            Event::Delete(object) => {
                if let (Some(listed), Some((key, _))) = (&mut self.listed, read(&object)) {
                    Arc::make_mut(listed).remove(&key);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(text: &str) -> WatchedPod {
        serde_json::from_str(text).expect("a pod")
    }

    const FULL: &str = r#"{
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "a", "namespace": "demo", "uid": "u1", "resourceVersion": "7", "deletionTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"l": "1"}, "annotations": {"ambient.istio.io/redirection": "pending"}, "managedFields": [{"manager": "kubelet"}]},
        "spec": {"nodeName": "n1", "serviceAccountName": "sa", "containers": [{"name": "c", "image": "i"}]},
        "status": {"phase": "Running", "podIP": "10.0.0.7", "podIPs": [{"ip": "10.0.0.7"}, {"ip": "fd00::7"}], "conditions": []}}"#;

    #[test]
    fn a_pod_of_the_api_becomes_ours_with_what_was_written_on_it() {
        let ours = pod(FULL).into_pod().expect("runs somewhere");
        assert_eq!((ours.name.as_str(), ours.uid.as_str(), ours.node.as_str()), ("a", "u1", "n1"));
        assert_eq!((ours.service_account.as_str(), ours.ips.len(), ours.terminating), ("sa", 2, true));
        assert_eq!(enrolment(&ours).map(|e| e.redirection), Some(crate::agent::enroll::Redirection::Pending));
        assert_eq!(pod(r#"{"metadata": {"name": "a", "uid": "u"}, "spec": {}}"#).into_pod(), None, "not bound yet");
    }

    #[test]
    fn a_pod_with_managed_fields_of_any_depth_is_read() {
        let nested = format!("{}{}", r#"{"f:a":"#.repeat(2000), "{}".to_owned() + &"}".repeat(2000));
        let text = FULL.replace(r#"{"manager": "kubelet"}"#, &format!(r#"{{"manager": "m", "fieldsV1": {nested}}}"#));
        assert!(text.len() > FULL.len() + 10_000);
        assert!(pod(&text).into_pod().is_some());
    }

    fn names(listing: &Listing<String, u32>) -> Option<Vec<&str>> {
        listing.listed.as_ref().map(|listed| listed.keys().map(String::as_str).collect())
    }

    #[test]
    fn a_list_counts_when_it_is_complete_and_the_former_until_then() {
        let mut listing = Listing::default();
        let mut take = |event: Event<&'static str>| {
            listing.take(event, |name| Some(((*name).to_owned(), 0)));
            names(&listing).map(|names| names.join(","))
        };
        let seen = |text: &str| Some(text.to_owned());
        assert_eq!(take(Event::Init), None);
        assert_eq!(take(Event::InitApply("a")), None);
        assert_eq!(take(Event::InitDone), seen("a"));
        assert_eq!(take(Event::Apply("b")), seen("a,b"));
        assert_eq!(take(Event::Delete("a")), seen("b"));
        assert_eq!(take(Event::Init), seen("b"), "a watch that starts again");
        assert_eq!(take(Event::InitApply("c")), seen("b"));
        assert_eq!(take(Event::Init), seen("b"), "and again");
        assert_eq!(take(Event::InitDone), seen(""));
    }
}
