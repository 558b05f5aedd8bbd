//! The certificate service: who may have which identity, and the answer to the wire.

use mesh_runtime::telemetry::error_chain;
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_core::identity::{Identity, InvalidIdentity};
use mesh_identity::authority::{AuthorityError, SigningAuthority};
use mesh_xds::server::Caller;
use proto::ca::{
    IstioCertificateRequest, IstioCertificateResponse, istio_certificate_service_server::IstioCertificateService,
};
use tokio::sync::watch;
use tonic::{Request, Response, Status};

use crate::{
    callers::{Bearers, TrustedAccounts},
    metrics::Metrics,
    pipeline::Snapshot,
    placement::Placements,
};

/// Longer requests are no certificate requests.
const MAX_CSR_BYTES: usize = 16 * 1024;
/// Of a whole request, which is held before its sender is known.
pub(crate) const MAX_REQUEST: usize = 64 * 1024;

/// What the CA will sign.
#[derive(Clone, Debug)]
pub(crate) struct IssuePolicy {
    pub(crate) trust_domain: Arc<str>,
    pub(crate) trusted_accounts: TrustedAccounts,
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
    placements: &Placements,
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
    if !policy.trusted_accounts.contains(caller) {
        return Err(Refusal::NotTrusted(caller.clone()));
    }
    let identity: Identity = requested.parse().map_err(Refusal::Malformed)?;
    if identity.trust_domain != policy.trust_domain {
        return Err(Refusal::TrustDomain(identity));
    }
    match placements.runs(&caller.node, &identity.namespace, &identity.service_account) {
        false => Err(Refusal::NotOnNode { node: caller.node.clone(), identity }),
        true => Ok(identity),
    }
}

/// What was asked for, but never more than the maximum.
fn clamp_ttl(requested_seconds: i64, maximum: Duration) -> Duration {
    match u64::try_from(requested_seconds) {
        Ok(0) | Err(_) => maximum,
        Ok(seconds) => Duration::from_secs(seconds).min(maximum),
    }
}

/// `CreateCertificate`.
#[derive(Clone)]
pub(crate) struct CertificateService {
    pub(crate) authority: watch::Receiver<Arc<SigningAuthority>>,
    pub(crate) bearers: Bearers,
    pub(crate) policy: Arc<IssuePolicy>,
    pub(crate) state: watch::Receiver<Snapshot>,
    pub(crate) metrics: Metrics,
}

impl CertificateService {
    fn sign(&self, caller: &Caller, request: &IstioCertificateRequest) -> Result<Vec<String>, Status> {
        let placements = self.state.borrow().placements.clone();
        let identity = decide(&self.policy, &placements, caller, impersonated(request)).map_err(|refusal| {
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
        let authority = self.authority.borrow().clone();
        let chain = authority.sign(&request.csr, &identity, ttl, SystemTime::now()).map_err(|error| {
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
        let caller = self.bearers.caller(request.metadata(), request.extensions()).await?;
        let cert_chain = self.sign(&caller, request.get_ref())?;
        Ok(Response::new(IstioCertificateResponse { cert_chain }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{objects::Settings, source::Catalogue};

    fn policy() -> IssuePolicy {
        IssuePolicy {
            trust_domain: "cluster.local".into(),
            trusted_accounts: TrustedAccounts::new([("istio-system".into(), "ztunnel".into())]),
            ttl: Duration::from_secs(86_400),
        }
    }

    fn caller(node: &str, account: &str) -> Caller {
        Caller { node: node.into(), namespace: "istio-system".into(), service_account: account.into(), pod: "z".into() }
    }

    fn placements() -> Placements {
        let settings = Settings { root_namespace: "istio-system".into(), revision: "default".into() };
        let (mut catalogue, mut placements) = (Catalogue::new(settings), Placements::default());
        let pod = "apiVersion: v1\nkind: Pod\nmetadata: {namespace: demo, name: client}\n\
                   spec: {nodeName: n1, serviceAccountName: client}\n";
        catalogue.set_file(&"f.yaml".into(), pod);
        placements.apply(&catalogue.changes());
        placements
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
            let decided = decide(&policy(), &placements(), &caller, requested);
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
