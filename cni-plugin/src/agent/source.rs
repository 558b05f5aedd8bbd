//! Where pods and namespaces come from: the API server, or a folder of manifests.

use std::{collections::BTreeMap, pin::Pin, sync::Arc};

use mesh_runtime::drain::DrainWatcher;
use tokio::sync::watch;

use super::enroll::{Redirection, Uid};
use crate::eligibility::{Labels, Pod};

pub mod folder;
pub mod kubernetes;

pub use folder::{FolderSource, NODE_LABEL, Object, parse_manifest};
pub use kubernetes::KubernetesSource;

/// Everything the source says at one moment. Complete, or it would not be published: pods that are not in it are gone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Of this node.
    pub pods: BTreeMap<Uid, Arc<Pod>>,
    /// Shared between views: there may be thousands, and they change rarely.
    pub namespaces: Arc<BTreeMap<String, Labels>>,
    /// What was written down about pods of this node, by uid.
    pub enrolments: BTreeMap<Uid, Enrolment>,
}

impl View {
    /// The pod of that name, whatever its uid.
    pub fn find(&self, namespace: &str, name: &str) -> Option<(&Uid, &Arc<Pod>)> {
        self.pods.iter().find(|(_, pod)| pod.namespace == namespace && pod.name == name)
    }
}

/// A pod's redirection as the control plane sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Enrolment {
    pub namespace: String,
    pub name: String,
    pub redirection: Redirection,
}

/// Publishes views until the drain starts; `None` until the first is complete.
pub trait PodSource: Send {
    fn run(
        self: Box<Self>,
        views: watch::Sender<Option<Arc<View>>>,
        drain: DrainWatcher,
    ) -> Pin<Box<dyn Future<Output = ()> + Send>>;
}

fn publish(views: &watch::Sender<Option<Arc<View>>>, view: View) {
    views.send_if_modified(|current| {
        let differs = current.as_deref() != Some(&view);
        if differs {
            *current = Some(Arc::new(view));
        }
        differs
    });
}
