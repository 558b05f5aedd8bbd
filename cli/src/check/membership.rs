//! Who belongs to the mesh: pods are read and judged as the node agents do it, and by what these are told.

use cni_plugin::{
    agent::config::excluded_namespaces,
    eligibility::{self, Labels, MODE, Pod},
    object,
};
use serde::Deserialize;
use serde_json::Value;

use crate::cluster::Cluster;

#[derive(Clone, Debug)]
pub(super) struct Membership {
    excluded: Vec<String>,
}

impl Default for Membership {
    /// Of agents that nobody has told anything.
    fn default() -> Self {
        Self { excluded: excluded_namespaces(None) }
    }
}

impl Membership {
    /// As the agents of the mesh in namespace `system` have it; without agents, as new ones would.
    pub(super) async fn read(cluster: &Cluster, system: &str) -> anyhow::Result<Self> {
        let settings = cluster.get(&format!("/api/v1/namespaces/{system}/configmaps/fairway-node")).await?;
        let told = settings.as_ref().and_then(|settings| settings["data"]["EXCLUDE_NAMESPACES"].as_str());
        Ok(Self { excluded: excluded_namespaces(told) })
    }

    /// Whether it is captured, or will be as soon as it starts.
    pub(super) fn belongs(&self, pod: &Pod, namespace: &Labels) -> bool {
        eligibility::decide(pod, namespace, &self.excluded).is_ok()
    }

    /// Whether pods there stay outside whatever the labels say.
    pub(super) fn is_excluded(&self, namespace: &str) -> bool {
        self.excluded.iter().any(|excluded| excluded == namespace)
    }

    /// Whether it would be captured if its namespace were in the mesh.
    pub(super) fn could_belong(&self, pod: &Pod) -> bool {
        self.belongs(pod, &Labels::from([(MODE.to_owned(), "ambient".to_owned())]))
    }
}

/// Nothing of one that runs nowhere yet.
pub(super) fn pod(object: &Value) -> Option<Pod> {
    let metadata = object::Metadata::deserialize(&object["metadata"]).ok()?;
    let spec = Option::<object::Spec>::deserialize(&object["spec"]).ok()?;
    object::pod(metadata, spec, Option::deserialize(&object["status"]).ok()?)
}

pub(super) fn labels(object: &Value) -> Labels {
    Option::<Labels>::deserialize(&object["metadata"]["labels"]).ok().flatten().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::cluster::fake::FakeApi;

    #[tokio::test]
    async fn the_agents_own_settings_say_which_namespaces_are_excluded() {
        let api = FakeApi::start().await;
        let could = async |namespace: &str| {
            let membership = Membership::read(&api.cluster(), "m").await.unwrap();
            membership.could_belong(&Pod { namespace: namespace.to_owned(), ..Pod::default() })
        };
        assert_eq!((could("kube-system").await, could("shop").await), (false, true));
        api.put(
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "fairway-node", "namespace": "m"},
            "data": {"EXCLUDE_NAMESPACES": "shop"}}),
        );
        assert_eq!((could("kube-system").await, could("shop").await), (true, false));
    }
}
