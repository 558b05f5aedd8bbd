//! The Kubernetes API server: how it is found, and how it is listened to.

pub(crate) mod answer;
pub(crate) mod listed;
mod served;
pub(crate) mod watch;

use kube::config::{InClusterError, KubeConfigOptions, KubeconfigError};

/// Neither way to the API server is open.
#[derive(Debug, thiserror::Error)]
#[error(
    "no API server is known: no service account is mounted ({in_cluster}), and no kubeconfig is usable; set KUBECONFIG"
)]
pub(crate) struct NoApiServer {
    in_cluster: InClusterError,
    #[source]
    kubeconfig: KubeconfigError,
}

/// The API server of the cluster this runs in, else that of the kubeconfig.
///
/// # Errors
/// When there is neither.
pub(crate) async fn configuration() -> Result<kube::Config, NoApiServer> {
    match kube::Config::incluster() {
        Ok(config) => Ok(config),
        Err(in_cluster) => kube::Config::from_kubeconfig(&KubeConfigOptions::default())
            .await
            .map_err(|kubeconfig| NoApiServer { in_cluster, kubeconfig }),
    }
}
