//! The certificate service: who may have which identity, and the answer to the wire.

use mesh_runtime::telemetry::error_chain;
use std::{
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_core::{
    identity::{Identity, InvalidIdentity},
    index::Index,
};
use mesh_identity::authority::{AuthorityError, SigningAuthority};
use mesh_xds::server::{Authenticate, Caller};
use proto::ca::{
    IstioCertificateRequest, IstioCertificateResponse, istio_certificate_service_server::IstioCertificateService,
};
use tokio::sync::watch;
use tonic::{Request, Response, Status, metadata::MetadataMap};

use crate::{app::Snapshot, metrics::Metrics, token::TokenKey};

/// Longer requests are no certificate requests.
const MAX_CSR_BYTES: usize = 16 * 1024;

/// What the CA will sign.
#[derive(Clone, Debug)]
pub(crate) struct IssuePolicy {
    pub(crate) trust_domain: Arc<str>,
    /// `(namespace, service account)` of node proxies, which may ask on behalf of pods.
    pub(crate) trusted_accounts: Vec<(Arc<str>, Arc<str>)>,
    /// Default and maximum.
    pub(crate) ttl: Duration,
}

/// Why a caller does not get a certificate. For the log; the caller learns nothing of it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("{namespace}/{service_account} may not ask on behalf of others", namespace = .0.namespace, service_account = .0.service_account)]
    NotTrusted(Caller),
    #[error("the identity asked for is malformed")]
    Malformed(#[source] InvalidIdentity),
    #[error("{0} is of another trust domain")]
    TrustDomain(Identity),
    #[error("no pod on node {node} runs as {identity}")]
    NotOnNode { node: Arc<str>, identity: Identity },
}

impl Refusal {
    /// The metric's label.
    fn label(&self) -> &'static str {
        match self {
            Self::Malformed(_) => "malformed_identity",
            Self::NotOnNode { .. } => "not_on_node",
            Self::NotTrusted(_) => "not_trusted",
            Self::TrustDomain(_) => "trust_domain",
        }
    }
}

/// The identity to certify: the caller's own, or `requested` for a node proxy on whose node a pod has it.
pub(crate) fn decide(
    policy: &IssuePolicy,
    index: &Index,
    caller: &Caller,
    requested: Option<&str>,
) -> Result<Identity, Refusal> {
    let Some(requested) = requested else {
        return Ok(Identity::new(
            policy.trust_domain.clone(),
            caller.namespace.clone(),
            caller.service_account.clone(),
        ));
    };
    let is_caller = |(namespace, account): &(Arc<str>, Arc<str>)| {
        *namespace == caller.namespace && *account == caller.service_account
    };
    if !policy.trusted_accounts.iter().any(is_caller) {
        return Err(Refusal::NotTrusted(caller.clone()));
    }
    let identity: Identity = requested.parse().map_err(Refusal::Malformed)?;
    if identity.trust_domain != policy.trust_domain {
        return Err(Refusal::TrustDomain(identity));
    }
    match index.identity_count(&caller.node, &identity) {
        0 => Err(Refusal::NotOnNode { node: caller.node.clone(), identity }),
        _ => Ok(identity),
    }
}

/// What was asked for, but never more than the maximum.
fn clamp_ttl(requested_seconds: i64, maximum: Duration) -> Duration {
    match u64::try_from(requested_seconds) {
        Ok(0) | Err(_) => maximum,
        Ok(seconds) => Duration::from_secs(seconds).min(maximum),
    }
}

/// Believes bearers of our own node tokens; for the CA and discovery alike.
#[derive(Debug)]
pub(crate) struct TokenAuthenticator {
    pub(crate) key: TokenKey,
    pub(crate) metrics: Metrics,
}

impl TokenAuthenticator {
    fn caller(&self, metadata: &MetadataMap) -> Result<Caller, Status> {
        let refuse = |why: &str| {
            self.metrics.authentication_failures.inc();
            tracing::warn!(why, "caller not authenticated");
            Status::unauthenticated("authentication failure")
        };
        let header = metadata.get("authorization").ok_or_else(|| refuse("no authorization metadata"))?;
        let token = header.to_str().ok().and_then(|text| text.strip_prefix("Bearer "));
        let token = token.ok_or_else(|| refuse("the authorization metadata is not `Bearer <token>`"))?;
        self.key.verify(token).map_err(|error| refuse(&error_chain(&error)))
    }
}

impl Authenticate for TokenAuthenticator {
    fn authenticate<'a>(
        &'a self,
        metadata: &'a MetadataMap,
    ) -> Pin<Box<dyn Future<Output = Result<Caller, Status>> + Send + 'a>> {
        Box::pin(std::future::ready(self.caller(metadata)))
    }
}

/// `CreateCertificate`.
#[derive(Clone, Debug)]
pub(crate) struct CertificateService {
    pub(crate) authority: Arc<SigningAuthority>,
    pub(crate) authenticator: Arc<TokenAuthenticator>,
    pub(crate) policy: Arc<IssuePolicy>,
    pub(crate) state: watch::Receiver<Snapshot>,
    pub(crate) metrics: Metrics,
}

impl CertificateService {
    fn sign(&self, caller: &Caller, request: &IstioCertificateRequest) -> Result<Vec<String>, Status> {
        let index = self.state.borrow().index.clone();
        let identity = decide(&self.policy, &index, caller, impersonated(request)).map_err(|refusal| {
            self.metrics.refusals.with_label_values(&[refusal.label()]).inc();
            let why = error_chain(&refusal);
            tracing::warn!(node = %caller.node, pod = %caller.pod, why, "certificate refused");
            Status::unauthenticated("request impersonation authentication failure")
        })?;
        if request.csr.len() > MAX_CSR_BYTES {
            self.metrics.csr_parsing_errors.inc();
            return Err(Status::invalid_argument("the certificate request is too long"));
        }
        let ttl = clamp_ttl(request.validity_duration, self.policy.ttl);
        let chain = self.authority.sign(&request.csr, &identity, ttl, SystemTime::now()).map_err(|error| {
            tracing::warn!(node = %caller.node, %identity, error = error_chain(&error), "certificate not signed");
            self.sign_failed(&error)
        })?;
        self.metrics.issued.inc();
        tracing::info!(node = %caller.node, %identity, ttl_seconds = ttl.as_secs(), "certificate issued");
        Ok(chain)
    }

    fn sign_failed(&self, error: &AuthorityError) -> Status {
        match error {
            AuthorityError::Request(_) => {
                self.metrics.csr_parsing_errors.inc();
                Status::invalid_argument("the certificate request is not valid")
            }
            _ => {
                self.metrics.csr_sign_errors.inc();
                Status::internal("the certificate cannot be signed")
            }
        }
    }
}

fn impersonated(request: &IstioCertificateRequest) -> Option<&str> {
    match request.metadata.as_ref()?.fields.get("ImpersonatedIdentity")?.kind.as_ref()? {
        prost_types::value::Kind::StringValue(identity) => Some(identity),
        // Present but no text: refused as malformed rather than taken for the caller's own.
        _ => Some(""),
    }
}

#[tonic::async_trait]
impl IstioCertificateService for CertificateService {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        self.metrics.csr_count.inc();
        let caller = self.authenticator.caller(request.metadata())?;
        let cert_chain = self.sign(&caller, request.get_ref())?;
        Ok(Response::new(IstioCertificateResponse { cert_chain }))
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::{
        index::{Delta, Provenance, Resource},
        workload::Workload,
    };

    use super::*;

    fn policy() -> IssuePolicy {
        IssuePolicy {
            trust_domain: "cluster.local".into(),
            trusted_accounts: vec![("istio-system".into(), "ztunnel".into())],
            ttl: Duration::from_secs(86_400),
        }
    }

    fn caller(node: &str, account: &str) -> Caller {
        Caller { node: node.into(), namespace: "istio-system".into(), service_account: account.into(), pod: "z".into() }
    }

    fn index() -> Index {
        let mut workload = Workload::new("Kubernetes//Pod/demo/client", "demo", "client");
        workload.service_account = "client".into();
        workload.node = "n1".into();
        let mut index = Index::default();
        let upserts = vec![Resource::Workload(Arc::new(workload))];
        index.apply(Delta { provenance: Provenance::Xds, upserts, removals: Vec::new() });
        index
    }

    #[test]
    fn only_a_node_proxy_gets_identities_and_only_those_of_pods_on_its_node() {
        let client = "spiffe://cluster.local/ns/demo/sa/client";
        let table = [
            (caller("n1", "ztunnel"), Some(client), Ok(client)),
            (caller("n2", "ztunnel"), Some(client), Err("not_on_node")),
            (caller("n1", "ztunnel"), Some("spiffe://cluster.local/ns/demo/sa/other"), Err("not_on_node")),
            (caller("n1", "ztunnel"), Some("spiffe://elsewhere/ns/demo/sa/client"), Err("trust_domain")),
            (caller("n1", "ztunnel"), Some("client"), Err("malformed_identity")),
            (caller("n1", "ztunnel"), Some(""), Err("malformed_identity")),
            (caller("n1", "waypoint"), Some(client), Err("not_trusted")),
            (caller("n1", "waypoint"), None, Ok("spiffe://cluster.local/ns/istio-system/sa/waypoint")),
        ];
        for (caller, requested, expected) in table {
            let decided = decide(&policy(), &index(), &caller, requested);
            let decided = decided.map(|identity| identity.to_string()).map_err(|refusal| refusal.label());
            assert_eq!(decided, expected.map(str::to_owned), "{caller:?} {requested:?}");
        }
    }

    #[test]
    fn a_certificates_life_is_what_was_asked_but_never_longer_than_allowed() {
        let day = Duration::from_secs(86_400);
        for (asked, given) in [(0, 86_400), (-5, 86_400), (10, 10), (1_000_000, 86_400)] {
            assert_eq!(clamp_ttl(asked, day), Duration::from_secs(given), "{asked}");
        }
    }
}
