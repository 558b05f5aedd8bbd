//! The parts of the mesh that run in a cluster, by the names that the chart gives them.

use serde_json::Value;

use crate::cluster::{Cluster, Kind, escape};

#[derive(Debug)]
pub(crate) struct Component {
    pub(crate) kind: &'static str,
    pub(crate) name: &'static str,
    /// Label of its pods.
    pub(crate) selector: &'static str,
    /// Port and path that say whether it serves.
    pub(crate) ready: (u16, &'static str),
}

pub(crate) const CONTROL_PLANE: Component =
    Component { kind: "Deployment", name: "fairwayd", selector: "app=fairwayd", ready: (15014, "/healthz/ready") };
pub(crate) const AGENT: Component =
    Component { kind: "DaemonSet", name: "fairway-node", selector: "k8s-app=fairway-node", ready: (8000, "/readyz") };
pub(crate) const ZTUNNEL: Component =
    Component { kind: "DaemonSet", name: "ztunnel", selector: "app=ztunnel", ready: (15021, "/healthz/ready") };

/// In the order in which they are started and upgraded.
pub(crate) const COMPONENTS: [Component; 3] = [CONTROL_PLANE, AGENT, ZTUNNEL];

impl Component {
    /// Whether there is an object that pods of it are made from.
    pub(crate) async fn is_wanted(&self, cluster: &Cluster, namespace: &str) -> anyhow::Result<bool> {
        let Some(kind) = Kind::named(self.kind) else { return Ok(false) };
        Ok(cluster.get_metadata(&format!("{}/{}", kind.path(Some(namespace)), self.name)).await?.is_some())
    }

    /// Its pods in the namespace of an installation.
    pub(crate) async fn pods(&self, cluster: &Cluster, namespace: &str) -> anyhow::Result<Vec<Value>> {
        let path = format!("/api/v1/namespaces/{namespace}/pods");
        cluster.list(&path, &format!("labelSelector={}", escape(self.selector))).await
    }
}
