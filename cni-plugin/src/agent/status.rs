//! Where it is written down that a pod is captured. The control plane, and we after a restart, believe that alone.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use futures_util::future::BoxFuture;
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use mesh_runtime::{telemetry::error_chain, whole_file};
use serde_json::json;
use tokio::{task::spawn_blocking, time::timeout};

use super::{
    enroll::Redirection,
    source::{NODE_LABEL, kubernetes::WatchedPod},
};
use crate::eligibility::Pod;

/// The annotation that tells the control plane, and after a restart us, that a pod is captured.
pub const REDIRECTION: &str = "ambient.istio.io/redirection";

/// The name a redirection is written down under.
pub fn redirection_name(redirection: Redirection) -> &'static str {
    match redirection {
        Redirection::Enabled => "enabled",
        Redirection::Pending => "pending",
    }
}

/// The reverse of [`redirection_name`].
pub fn redirection_named(name: &str) -> Option<Redirection> {
    [Redirection::Enabled, Redirection::Pending].into_iter().find(|r| redirection_name(*r) == name)
}

/// Writes a pod's redirection, or with `None` removes what was written. Repeating it is harmless.
pub trait StatusWriter: Send + Sync {
    fn write<'a>(&'a self, pod: &'a Pod, redirection: Option<Redirection>) -> BoxFuture<'a, Result<(), String>>;

    /// Whether what was written outlives its pod and has to be removed after it.
    fn outlives_pods(&self) -> bool;
}

/// A file of its own for each pod, in the folder of manifests.
#[derive(Debug)]
pub struct FolderStatus {
    pub manifests: PathBuf,
    pub node: String,
}

impl StatusWriter for FolderStatus {
    fn write<'a>(&'a self, pod: &'a Pod, redirection: Option<Redirection>) -> BoxFuture<'a, Result<(), String>> {
        let (folder, name) = (self.manifests.join("enrolment"), format!("{}_{}.yaml", pod.namespace, pod.name));
        let yaml = redirection.map(|redirection| enrolment_yaml(&self.node, pod, redirection_name(redirection)));
        Box::pin(async move {
            let written = spawn_blocking(move || replace(&folder, &name, yaml)).await.unwrap_or_else(|e| Err(e.into()));
            written.map_err(|e| format!("cannot write the enrolment down: {e}"))
        })
    }

    fn outlives_pods(&self) -> bool {
        true
    }
}

/// In one step, so that readers see the old or the new.
fn replace(folder: &Path, name: &str, content: Option<String>) -> io::Result<()> {
    let path = folder.join(name);
    let Some(content) = content else { return whole_file::remove(&path).map(drop) };
    fs::create_dir_all(folder)?;
    whole_file::replace(&path, content.as_bytes(), 0o644)
}

/// Strings are written as JSON, which YAML reads, so that no name can break out of its place.
fn enrolment_yaml(node: &str, pod: &Pod, redirection: &str) -> String {
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    format!(
        "apiVersion: fairway.dev/v1alpha1\nkind: PodEnrolment\nmetadata: {{namespace: {}, name: {}, labels: {{{NODE_LABEL}: {}}}}}\nspec: {{podUid: {}, redirection: {redirection}}}\n",
        quoted(&pod.namespace),
        quoted(&pod.name),
        quoted(node),
        quoted(&pod.uid),
    )
}

/// An annotation of the pod, patched through `pods/status`, which asks for less than `pods`.
#[derive(Clone)]
pub struct AnnotationStatus(pub Client);

/// Of one write. Shorter than a plugin waits: a pod has one step at a time.
const WRITE_LIMIT: Duration = Duration::from_secs(2);

impl StatusWriter for AnnotationStatus {
    fn write<'a>(&'a self, pod: &'a Pod, redirection: Option<Redirection>) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(async move {
            let pods: Api<WatchedPod> = Api::namespaced(self.0.clone(), &pod.namespace);
            let (params, patch) = (PatchParams::default(), Patch::Merge(patch(pod, redirection)));
            match timeout(WRITE_LIMIT, pods.patch_status(&pod.name, &params, &patch)).await {
                Ok(Ok(_)) => Ok(()),
                Ok(Err(error)) => refused(&error, redirection),
                Err(_) => Err(format!("cannot annotate the pod: the API server did not answer within {WRITE_LIMIT:?}")),
            }
        })
    }

    fn outlives_pods(&self) -> bool {
        false
    }
}

/// The uid makes the API server refuse it for a successor of the same name.
fn patch(pod: &Pod, redirection: Option<Redirection>) -> serde_json::Value {
    json!({"metadata": {"uid": pod.uid, "annotations": {REDIRECTION: redirection.map(redirection_name)}}})
}

fn refused(error: &kube::Error, redirection: Option<Redirection>) -> Result<(), String> {
    let gone = matches!(error, kube::Error::Api(status) if matches!(status.code, 404 | 409 | 422));
    match redirection {
        // Nothing is left to be removed from.
        None if gone => Ok(()),
        _ => Err(format!("cannot annotate the pod: {}", error_chain(error))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::source::{FolderSource, Object, parse_manifest};

    fn pod() -> Pod {
        Pod { namespace: "demo".into(), name: "a".into(), uid: "u1".into(), node: "n\"1".into(), ..Pod::default() }
    }

    #[tokio::test]
    async fn an_enrolment_reads_back_and_goes_without_trace() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let status = FolderStatus { manifests: dir.path().into(), node: "n\"1".into() };
        for redirection in [Redirection::Pending, Redirection::Enabled] {
            status.write(&pod(), Some(redirection)).await.expect("write");
            let view = FolderSource::new(dir.path().into(), "n\"1".into()).read().expect("read");
            assert_eq!(view.enrolments["u1"].redirection, redirection);
        }
        status.write(&pod(), None).await.expect("remove");
        status.write(&pod(), None).await.expect("a second time is no error");
        assert_eq!(fs::read_dir(dir.path().join("enrolment")).expect("list").count(), 0);
        let yaml = enrolment_yaml("n", &pod(), "enabled");
        assert!(matches!(parse_manifest(&yaml).expect("valid")[..], [Object::Enrolment { .. }]), "{yaml}");
    }

    #[test]
    fn the_patch_is_for_this_very_pod_and_null_removes() {
        let enabled = patch(&pod(), Some(Redirection::Enabled)).to_string();
        assert_eq!(enabled, r#"{"metadata":{"annotations":{"ambient.istio.io/redirection":"enabled"},"uid":"u1"}}"#);
        assert!(patch(&pod(), None).to_string().contains(r#""ambient.istio.io/redirection":null"#));
    }

    #[test]
    fn a_pod_that_is_gone_has_nothing_to_remove_and_cannot_be_enabled() {
        for (code, gone) in [(404, true), (409, true), (422, true), (403, false), (500, false)] {
            let status = kube::core::Status { code, ..kube::core::Status::default() };
            let error = kube::Error::Api(Box::new(status));
            assert_eq!(refused(&error, None).is_ok(), gone, "{code}");
            refused(&error, Some(Redirection::Enabled)).expect_err("not written");
        }
    }
}
