//! The roots, where every namespace finds them: ConfigMap `istio-ca-root-cert`, as pods mount it. Written by the leader, and put back
//! when it is edited or deleted.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use futures_util::{StreamExt as _, stream};
use k8s_openapi::{
    api::core::v1::{ConfigMap, Namespace},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{Patch, PatchParams},
    core::PartialObjectMeta,
};
use mesh_identity::authority::SigningAuthority;
use mesh_runtime::drain::DrainWatcher;
use serde::{Deserialize, Deserializer};
use tokio::sync::{mpsc, watch};

use super::{MANAGER, RETRY, standing::Standing, within};
use crate::{
    apiserver::{
        listed::Listed,
        watch::{self as apiwatch, Event},
    },
    app::TaskFailed,
    lease::whenever_leading,
    metrics::Metrics,
};

const NAME: &str = "istio-ca-root-cert";
const KEY: &str = "root-cert.pem";
/// In the metrics: other watches of the same kinds have standings of their own.
const WATCHES: [&str; 2] = ["Namespace of roots", "ConfigMap of roots"];
const LABEL: &str = "istio.io/config";
/// Namespaces in which nothing runs that needs them.
const WITHOUT: [&str; 3] = ["kube-node-lease", "kube-public", "local-path-storage"];
/// ConfigMaps written at once.
const AT_ONCE: usize = 8;

/// What namespaces there are, and what they hold.
#[derive(Debug, Default)]
struct Held {
    /// Whether each is going.
    namespaces: Listed<bool>,
    /// What the ConfigMap says; `None` where its label is missing.
    roots: Listed<Option<String>>,
    /// Namespaces whose ConfigMap could not be written the last time.
    unwritten: BTreeSet<String>,
}

enum Seen {
    Namespace(Event<(String, bool)>),
    Roots(Event<(String, Option<String>)>),
}

impl Held {
    fn on(&mut self, seen: Seen) {
        match seen {
            Seen::Namespace(event) => self.namespaces.on(event),
            Seen::Roots(event) => self.roots.on(event),
        }
    }

    /// Namespaces whose ConfigMap is not as it must be; none before everything is known.
    fn wanting(&self, roots: &str) -> Vec<String> {
        if !self.namespaces.complete || !self.roots.complete {
            return Vec::new();
        }
        // In a namespace that is going nothing can be created.
        let staying = self.namespaces.objects.iter().filter(|(_, going)| !**going).map(|(name, _)| name);
        let named = staying.filter(|name| !WITHOUT.contains(&name.as_str()));
        let is_right = |name: &String| self.roots.objects.get(name).is_some_and(|held| held.as_deref() == Some(roots));
        named.filter(|name| !is_right(name)).cloned().collect()
    }
}

/// Keeps every namespace's ConfigMap as it must be whenever this replica leads, until the drain.
pub(crate) async fn publish(
    client: Client,
    authority: watch::Receiver<Arc<SigningAuthority>>,
    leads: watch::Receiver<bool>,
    metrics: Metrics,
    drain: DrainWatcher,
) -> Result<(), TaskFailed> {
    match whenever_leading(leads, &drain, || lead(client.clone(), authority.clone(), metrics.clone())).await {
        Some(()) => Err(TaskFailed::of("publishing the roots")("its watches ended without being told to")),
        None => Ok(()),
    }
}

/// As the leader; dropped when that is lost, with what it was about to write.
async fn lead(client: Client, mut authority: watch::Receiver<Arc<SigningAuthority>>, metrics: Metrics) {
    let (sender, mut events) = mpsc::channel(256);
    let namespaces: Api<PartialObjectMeta<Namespace>> = Api::all(client.clone());
    let configmaps: Api<Published> = Api::all(client.clone());
    let fields = format!("metadata.name={NAME}");
    let watching = async {
        tokio::join!(
            apiwatch::watch(namespaces, "", None, sender.clone(), |event| {
                Seen::Namespace(
                    event.map(|namespace| (namespace.name_any(), namespace.metadata.deletion_timestamp.is_some())),
                )
            }),
            apiwatch::watch(configmaps, &fields, None, sender.clone(), |event| Seen::Roots(
                event.map(|map| { (map.namespace().unwrap_or_default(), content(&map)) })
            )),
        )
    };
    let writing = async {
        let mut held = Held::default();
        let standings = WATCHES.map(|kind| Standing::new(kind, &metrics));
        let see = |held: &mut Held, seen: Seen| {
            match &seen {
                Seen::Namespace(event) => standings[0].note(event),
                Seen::Roots(event) => standings[1].note(event),
            }
            held.on(seen);
        };
        loop {
            let roots = authority.borrow_and_update().root_pem().to_owned();
            let failed = write(&client, &mut held, &roots, &metrics).await;
            let retry = async {
                match failed {
                    true => tokio::time::sleep(RETRY).await,
                    false => std::future::pending().await,
                }
            };
            tokio::select! {
                seen = events.recv() => match seen {
                    Some(seen) => see(&mut held, seen),
                    None => return,
                },
                changed = authority.changed() => if changed.is_err() { return },
                () = retry => {}
            }
            while let Ok(seen) = events.try_recv() {
                see(&mut held, seen);
            }
        }
    };
    tokio::select! {
        _ = watching => {}
        () = writing => {}
    }
}

/// Whether something could not be written.
async fn write(client: &Client, held: &mut Held, roots: &str, metrics: &Metrics) -> bool {
    let wanting = held.wanting(roots);
    held.unwritten.retain(|namespace| wanting.contains(namespace));
    let writes = wanting.into_iter().map(|namespace| async move {
        let api: Api<Published> = Api::namespaced(client.clone(), &namespace);
        let params = PatchParams::apply(MANAGER).force();
        let written = within(api.patch(NAME, &params, &Patch::Apply(configmap(&namespace, roots)))).await;
        (namespace, written)
    });
    let mut writes = stream::iter(writes).buffer_unordered(AT_ONCE);
    while let Some((namespace, written)) = writes.next().await {
        match written {
            Ok(map) => {
                metrics.writes.with_label_values(&["roots", "written"]).inc();
                held.unwritten.remove(&namespace);
                held.roots.objects.insert(namespace, content(&map));
            }
            Err(why) => {
                metrics.writes.with_label_values(&["roots", "failed"]).inc();
                match held.unwritten.contains(&namespace) {
                    false => tracing::warn!(namespace, why, "the roots cannot be written; tried again"),
                    true => tracing::debug!(namespace, why, "the roots cannot be written yet"),
                }
                held.unwritten.insert(namespace);
            }
        }
    }
    !held.unwritten.is_empty()
}

/// The ConfigMap as it is read: without `managedFields`, which whoever may write it in his namespace may nest deeper than JSON is read,
/// and the list of all namespaces would be lost.
#[derive(Clone, Debug, Default, Deserialize)]
struct Published {
    #[serde(default, deserialize_with = "kept")]
    metadata: ObjectMeta,
    data: Option<BTreeMap<String, String>>,
}

fn kept<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ObjectMeta, D::Error> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Kept {
        name: Option<String>,
        namespace: Option<String>,
        resource_version: Option<String>,
        labels: Option<BTreeMap<String, String>>,
    }
    let Kept { name, namespace, resource_version, labels } = Kept::deserialize(deserializer)?;
    Ok(ObjectMeta { name, namespace, resource_version, labels, ..ObjectMeta::default() })
}

impl k8s_openapi::Resource for Published {
    const API_VERSION: &'static str = ConfigMap::API_VERSION;
    const GROUP: &'static str = ConfigMap::GROUP;
    const KIND: &'static str = ConfigMap::KIND;
    const VERSION: &'static str = ConfigMap::VERSION;
    const URL_PATH_SEGMENT: &'static str = ConfigMap::URL_PATH_SEGMENT;
    type Scope = <ConfigMap as k8s_openapi::Resource>::Scope;
}

impl k8s_openapi::Metadata for Published {
    type Ty = ObjectMeta;

    fn metadata(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn metadata_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

fn content(map: &Published) -> Option<String> {
    let labelled = map.labels().get(LABEL).is_some_and(|value| value == "true");
    map.data.as_ref().filter(|_| labelled).and_then(|data| data.get(KEY)).cloned()
}

fn configmap(namespace: &str, roots: &str) -> ConfigMap {
    ConfigMap {
        metadata: ObjectMeta {
            name: Some(NAME.to_owned()),
            namespace: Some(namespace.to_owned()),
            labels: Some(BTreeMap::from([(LABEL.to_owned(), "true".to_owned())])),
            ..ObjectMeta::default()
        },
        data: Some(BTreeMap::from([(KEY.to_owned(), roots.to_owned())])),
        ..ConfigMap::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set<T>(name: &str, object: T) -> Event<(String, T)> {
        Event::Set((name.to_owned(), object))
    }

    #[test]
    fn a_configmap_with_managed_fields_of_any_depth_is_read() {
        let nested = r#"{"f:a":"#.repeat(2000) + "{}" + &"}".repeat(2000);
        let text = format!(
            r#"{{"metadata": {{"name": "{NAME}", "namespace": "demo", "labels": {{"{LABEL}": "true"}},
                "managedFields": [{{"manager": "m", "fieldsV1": {nested}}}]}}, "data": {{"{KEY}": "roots"}}}}"#
        );
        assert_eq!(content(&serde_json::from_str(&text).unwrap()).as_deref(), Some("roots"));
    }

    #[test]
    fn nothing_is_wanting_before_all_is_known_then_what_is_missing_or_different() {
        let mut held = Held::default();
        for name in ["demo", "edited", "good", "kube-public", "unlabelled"] {
            held.on(Seen::Namespace(set(name, false)));
        }
        held.on(Seen::Namespace(Event::Listed));
        assert_eq!(held.wanting("new"), Vec::<String>::new());
        let roots = [("edited", Some("x")), ("good", Some("new")), ("unlabelled", None)];
        for (name, content) in roots {
            held.on(Seen::Roots(set(name, content.map(str::to_owned))));
        }
        held.on(Seen::Roots(Event::Listed));
        assert_eq!(held.wanting("new"), ["demo", "edited", "unlabelled"]);
        assert_eq!(held.wanting("newer"), ["demo", "edited", "good", "unlabelled"]);
        held.on(Seen::Roots(Event::Gone(("good".to_owned(), None))));
        held.on(Seen::Namespace(set("demo", true)));
        assert_eq!(held.wanting("new"), ["edited", "good", "unlabelled"]);
        // A list that does not name it any more.
        held.on(Seen::Namespace(Event::Listing));
        held.on(Seen::Namespace(set("good", false)));
        held.on(Seen::Namespace(Event::Listed));
        assert_eq!(held.wanting("new"), ["good"]);
    }

    #[tokio::test]
    async fn what_could_not_be_written_is_known_until_it_is_or_need_not_be() {
        use std::sync::atomic::{AtomicBool, Ordering};

        let refuses = Arc::new(AtomicBool::new(true));
        let answers = refuses.clone();
        let service = tower::service_fn(move |request: http::Request<kube::client::Body>| {
            let namespace = request.uri().path().split('/').nth(4).unwrap_or_default().to_owned();
            let (code, body) = match answers.load(Ordering::Relaxed) {
                true => (403, r#"{"kind":"Status","apiVersion":"v1","status":"Failure","code":403}"#.to_owned()),
                false => (200, serde_json::to_string(&configmap(&namespace, "new")).unwrap()),
            };
            let body = kube::client::Body::from(body.into_bytes());
            async move { Ok::<_, std::convert::Infallible>(http::Response::builder().status(code).body(body).unwrap()) }
        });
        let client = Client::new(service, "default");
        let metrics = Metrics::register(&mesh_runtime::metrics::Registry::new());
        let mut held = Held::default();
        for name in ["demo", "going"] {
            held.on(Seen::Namespace(set(name, false)));
        }
        held.on(Seen::Namespace(Event::Listed));
        held.on(Seen::Roots(Event::Listed));
        assert!(write(&client, &mut held, "new", &metrics).await);
        assert_eq!(held.unwritten, BTreeSet::from(["demo".to_owned(), "going".to_owned()]));
        held.on(Seen::Namespace(set("going", true)));
        assert!(write(&client, &mut held, "new", &metrics).await);
        assert_eq!(held.unwritten, BTreeSet::from(["demo".to_owned()]));
        refuses.store(false, Ordering::Relaxed);
        assert!(!write(&client, &mut held, "new", &metrics).await);
        assert_eq!(held.unwritten, BTreeSet::new());
    }
}
