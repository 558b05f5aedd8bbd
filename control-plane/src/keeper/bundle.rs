//! The roots, where the API server finds them for its calls to the admission webhook: `caBundle` in our ValidatingWebhookConfiguration.
//! Written by the leader, and put back when an upgrade or somebody else takes it away. Whether there is such a configuration at all is the
//! installation's to say: where there is none, nothing is made.

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::{ByteString, api::admissionregistration::v1::ValidatingWebhookConfiguration};
use kube::{
    Api, Client, ResourceExt as _,
    api::{Patch, PatchParams},
};
use mesh_identity::authority::SigningAuthority;
use mesh_runtime::drain::DrainWatcher;
use serde_json::{Value, json};
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

const KIND: &str = "ValidatingWebhookConfiguration";

/// Of each webhook, by name, what is believed of who answers.
type Bundles = BTreeMap<String, Option<ByteString>>;

/// The configuration of the installation in a namespace.
pub(crate) fn name(namespace: &str) -> String {
    format!("fairway-{namespace}")
}

/// Keeps the configuration as it must be whenever this replica leads, until the drain.
pub(crate) async fn publish(
    client: Client,
    name: String,
    authority: watch::Receiver<Arc<SigningAuthority>>,
    leads: watch::Receiver<bool>,
    metrics: Metrics,
    drain: DrainWatcher,
) -> Result<(), TaskFailed> {
    let api: Api<ValidatingWebhookConfiguration> = Api::all(client);
    let work = || lead(api.clone(), &name, authority.clone(), metrics.clone());
    match whenever_leading(leads, &drain, work).await {
        Some(()) => Err(TaskFailed::of("publishing the webhook's roots")("its watch ended without being told to")),
        None => Ok(()),
    }
}

/// As the leader; dropped when that is lost, with what it was about to write.
async fn lead(
    api: Api<ValidatingWebhookConfiguration>,
    name: &str,
    mut authority: watch::Receiver<Arc<SigningAuthority>>,
    metrics: Metrics,
) {
    let (sender, mut events) = mpsc::channel(16);
    let fields = format!("metadata.name={name}");
    let tell = |event: Event<ValidatingWebhookConfiguration>| event.map(|of| (of.name_any(), bundles(&of)));
    let watching = apiwatch::watch(api.clone(), &fields, None, sender, tell);
    let writing = async {
        let (mut held, standing) = (Listed::<Bundles>::default(), Standing::new(KIND, &metrics));
        let mut failed = false;
        loop {
            let roots = authority.borrow_and_update().root_pem().to_owned();
            let patch = held.objects.get(name).and_then(|held| wanting(name, held, &roots));
            failed = match patch {
                Some(patch) => !write(&api, name, patch, &mut held, failed, &metrics).await,
                None => false,
            };
            tokio::select! {
                seen = events.recv() => match seen {
                    Some(seen) => {
                        standing.note(&seen);
                        held.on(seen);
                    }
                    None => return,
                },
                changed = authority.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(RETRY), if failed => {}
            }
        }
    };
    tokio::select! {
        () = watching => {}
        () = writing => {}
    }
}

/// Whether it is written; `again` if it was not the last time.
async fn write(
    api: &Api<ValidatingWebhookConfiguration>,
    name: &str,
    patch: Value,
    held: &mut Listed<Bundles>,
    again: bool,
    metrics: &Metrics,
) -> bool {
    let params = PatchParams::apply(MANAGER).force();
    let written = within(api.patch(name, &params, &Patch::Apply(patch))).await;
    let outcome = if written.is_ok() { "written" } else { "failed" };
    metrics.writes.with_label_values(&["webhook", outcome]).inc();
    match written {
        Ok(configuration) => {
            held.objects.insert(name.to_owned(), bundles(&configuration));
            true
        }
        Err(why) => {
            match again {
                false => tracing::warn!(name, why, "the webhook configuration cannot be written; tried again"),
                true => tracing::debug!(name, why, "the webhook configuration cannot be written yet"),
            }
            false
        }
    }
}

fn bundles(configuration: &ValidatingWebhookConfiguration) -> Bundles {
    let webhooks = configuration.webhooks.iter().flatten();
    webhooks.map(|webhook| (webhook.name.clone(), webhook.client_config.ca_bundle.clone())).collect()
}

/// What is applied, if anything differs: of each webhook the bundle, and nothing else.
fn wanting(name: &str, held: &Bundles, roots: &str) -> Option<Value> {
    let roots = ByteString(roots.as_bytes().to_vec());
    if held.values().all(|bundle| bundle.as_ref() == Some(&roots)) {
        return None;
    }
    let webhook = |name| json!({"name": name, "clientConfig": {"caBundle": roots}});
    Some(json!({
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": KIND,
        "metadata": {"name": name},
        "webhooks": held.keys().map(webhook).collect::<Vec<_>>(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bundle_of_each_webhook_is_applied_when_one_differs_and_nothing_else_is() {
        let held = |bundles: [Option<&str>; 2]| -> Bundles {
            let bundle = |text: &str| ByteString(text.as_bytes().to_vec());
            ["a.example.org", "b.example.org"]
                .map(str::to_owned)
                .into_iter()
                .zip(bundles.map(|b| b.map(bundle)))
                .collect()
        };
        for right in [held([Some("new"); 2]), Bundles::new()] {
            assert_eq!(wanting("fairway-x", &right, "new"), None);
        }
        for wrong in [[None, None], [Some("new"), None], [Some("new"), Some("old")], [Some(""), Some("new")]] {
            let patch = wanting("fairway-x", &held(wrong), "new").unwrap();
            let webhook = |name: &str| json!({"name": name, "clientConfig": {"caBundle": "bmV3"}});
            assert_eq!(patch["webhooks"], json!([webhook("a.example.org"), webhook("b.example.org")]));
            assert_eq!(patch["metadata"], json!({"name": "fairway-x"}));
        }
    }
}
