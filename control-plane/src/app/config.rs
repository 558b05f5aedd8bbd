//! What the control plane is told to be.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use crate::{ca::IssuePolicy, callers::TrustedAccounts, index, objects};

/// The namespace the control plane runs in unless told otherwise.
pub const NAMESPACE: &str = "istio-system";

/// What `fairwayd run` is told.
#[derive(Clone, Debug)]
pub struct Config {
    pub source: Source,
    /// Where this runs; also the root namespace, whose policies apply to the whole mesh.
    pub namespace: String,
    pub cluster_id: String,
    /// The `cluster.local` of `web.demo.svc.cluster.local`.
    pub cluster_domain: String,
    /// Configuration labelled with another `istio.io/rev` is ignored.
    pub revision: String,
    /// Where discovery and the CA are served; port 0 picks one.
    pub listen: SocketAddr,
    pub admin: SocketAddr,
    /// Where the API server may ask what it shall admit; of a cluster only.
    pub webhook: Option<SocketAddr>,
    pub trust_domain: String,
    /// Default and maximum life of workload certificates.
    pub workload_cert_ttl: Duration,
    /// Further names the server is reached by.
    pub server_names: Vec<String>,
    /// Service accounts, `(namespace, name)`, of the node proxies.
    pub trusted_accounts: Vec<(String, String)>,
    /// Whether who uses a waypoint accepts connections from it only (Istio's `PILOT_AUTO_ALLOW_WAYPOINT_POLICY`).
    pub default_allow_from_waypoint: bool,
}

/// Where objects come from, and where keys are kept.
#[derive(Clone, Debug)]
pub enum Source {
    Folder {
        /// Of manifests.
        manifests: PathBuf,
        /// Of keys and certificates; made when missing.
        state: PathBuf,
    },
    Kubernetes {
        /// How the API server is reached.
        api_server: Box<kube::Config>,
        /// Where a CA may be mounted; without one it is kept in a Secret.
        ca_folder: PathBuf,
        /// This replica, among those that stand for election.
        identity: String,
    },
}

impl Config {
    /// Everything else as it is by default.
    pub fn new(source: Source, listen: SocketAddr, admin: SocketAddr) -> Self {
        Self {
            source,
            namespace: NAMESPACE.to_owned(),
            cluster_id: "Kubernetes".to_owned(),
            cluster_domain: "cluster.local".to_owned(),
            revision: "default".to_owned(),
            listen,
            admin,
            webhook: None,
            trust_domain: mesh_core::identity::DEFAULT_TRUST_DOMAIN.to_owned(),
            workload_cert_ttl: Duration::from_secs(24 * 3600),
            server_names: Vec::new(),
            trusted_accounts: Vec::new(),
            default_allow_from_waypoint: false,
        }
    }

    /// How objects are read: shared by `run` and `check`.
    pub(crate) fn object_settings(&self) -> objects::Settings {
        objects::Settings { root_namespace: self.namespace.as_str().into(), revision: self.revision.as_str().into() }
    }

    /// What they are turned into: shared by `run` and `check`.
    pub(crate) fn index_settings(&self) -> index::Settings {
        index::Settings {
            root_namespace: self.namespace.as_str().into(),
            trust_domain: self.trust_domain.as_str().into(),
            cluster_id: self.cluster_id.as_str().into(),
            cluster_domain: self.cluster_domain.as_str().into(),
            allow_from_waypoint: self.default_allow_from_waypoint,
        }
    }

    pub(super) fn issue_policy(&self) -> IssuePolicy {
        let shared = |(namespace, name): &(String, String)| (namespace.as_str().into(), name.as_str().into());
        IssuePolicy {
            trust_domain: self.trust_domain.as_str().into(),
            trusted_accounts: TrustedAccounts::new(self.trusted_accounts.iter().map(shared)),
            ttl: self.workload_cert_ttl,
        }
    }

    /// What the server's certificate is for.
    pub(super) fn server_names(&self) -> Vec<String> {
        let Self { namespace, cluster_domain, .. } = self;
        let service = |name| [format!("{name}.{namespace}.svc"), format!("{name}.{namespace}.svc.{cluster_domain}")];
        let mut names: Vec<String> = ["fairwayd", "istiod"].into_iter().flat_map(service).collect();
        names.push("localhost".to_owned());
        if !self.listen.ip().is_unspecified() {
            names.push(self.listen.ip().to_string());
        }
        names.extend(self.server_names.iter().cloned());
        names
    }
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Folder { manifests, .. } => write!(f, "{}", manifests.display()),
            Self::Kubernetes { api_server, .. } => write!(f, "{}", api_server.cluster_url),
        }
    }
}
