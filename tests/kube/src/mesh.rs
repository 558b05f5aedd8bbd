//! The mesh under test, by the names that its parts have on the cluster: ours, another one, or parts of both.

use clap::Args;

/// Namespace, labels, annotation and the node proxy's `DaemonSet` are the same for all.
#[derive(Args, Debug)]
pub(crate) struct Mesh {
    /// The mesh is there already, whoever's it is, and stays. Steps about what `fairway` alone promises are left out.
    #[arg(long)]
    pub(crate) installed: bool,
    /// The control plane's Deployment, and the label `app` of its pods; Istio's is `istiod`.
    #[arg(long, value_name = "NAME", default_value = "fairwayd")]
    pub(crate) control_plane: String,
    /// The node agent's `DaemonSet`, and the label `k8s-app` of its pods; Istio's is `istio-cni-node`.
    #[arg(long, value_name = "NAME", default_value = "fairway-node")]
    pub(crate) agent: String,
    /// The type of the agent's entry in the CNI configuration; Istio's is `istio-cni`.
    #[arg(long, value_name = "TYPE", default_value = "fairway-cni")]
    pub(crate) plugin: String,
}
