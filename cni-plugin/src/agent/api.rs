//! The API server, as a client of it.

use std::{path::PathBuf, time::Duration};

use anyhow::Context;
use kube::{
    Client,
    config::{KubeConfigOptions, Kubeconfig},
};
use mesh_runtime::env::Reader;

/// Where the API server is found, in the order of `kubectl`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ApiServer {
    /// By the variables and the service account every container has.
    InCluster,
    Kubeconfig(PathBuf),
}

const CONNECT_LIMIT: Duration = Duration::from_secs(5);

impl ApiServer {
    pub fn from_env(env: &Reader<'_>) -> Self {
        if env.optional("KUBERNETES_SERVICE_HOST").is_some() {
            return Self::InCluster;
        }
        let home = || PathBuf::from(env.string("HOME", "/root")).join(".kube/config");
        Self::Kubeconfig(env.optional("KUBECONFIG").map_or_else(home, PathBuf::from))
    }

    /// Makes a client; nothing is sent yet. Its token is read again whenever it is rotated.
    pub async fn client(&self) -> anyhow::Result<Client> {
        let mut config = match self {
            Self::InCluster => {
                kube::Config::incluster().context("the service account of this container is unusable")?
            }
            Self::Kubeconfig(path) => {
                let remedy = "set FAIRWAY_MANIFESTS for a folder of manifests, or KUBECONFIG for an API server";
                let kubeconfig =
                    Kubeconfig::read_from(path).with_context(|| format!("{}: {remedy}", path.display()))?;
                kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
                    .await
                    .with_context(|| format!("{}", path.display()))?
            }
        };
        // Watches have their own idle limit, single requests one of their caller.
        config.connect_timeout = Some(CONNECT_LIMIT);
        Client::try_from(config).context("cannot make a client of the API server")
    }
}
