//! Where the CA's key is kept on Kubernetes, and which authority signs now.
//!
//! A mounted folder comes first; without one, a Secret, which is made when there is none. Either may change while we run: what can be
//! used takes effect at once, on certificates for workloads as on the server's own; what cannot leaves the last good authority in force.

pub(crate) mod bundle;
pub(crate) mod folder;
pub(crate) mod roots;
pub(crate) mod rotate;
pub(crate) mod secret;
mod standing;

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_identity::authority::{AuthorityError, Material, SigningAuthority};
use mesh_runtime::telemetry::error_chain;
use tokio::sync::watch;

use crate::{
    apiserver::answer,
    metrics::Metrics,
    problem::{Place, Problem},
};

/// Names of the parts, in the order certificates, key, roots: Istio's, and those of cert-manager.
const LAYOUTS: [[&str; 3]; 2] = [["ca-cert.pem", "ca-key.pem", "root-cert.pem"], ["tls.crt", "tls.key", "ca.crt"]];
/// Istio's certificates above the CA's own.
const CHAIN: &str = "cert-chain.pem";
/// The field manager of what is written for others to trust.
const MANAGER: &str = "fairwayd";
/// After a write failed.
const RETRY: Duration = Duration::from_secs(5);
/// For one answer of the API server.
const DEADLINE: Duration = Duration::from_secs(10);

/// Why what is kept is not an authority.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    #[error(
        "`{0}` is missing or empty; expected ca-cert.pem, ca-key.pem and root-cert.pem, or tls.crt, tls.key and ca.crt"
    )]
    Missing(&'static str),
    #[error(transparent)]
    Authority(#[from] AuthorityError),
}

/// The authority that `part` holds by these names, if everything it signs `now` will be believed.
pub(crate) fn authority(
    part: impl Fn(&str) -> Option<String>,
    now: SystemTime,
) -> Result<SigningAuthority, KeeperError> {
    let part = |name: &str| part(name).filter(|text| !text.trim().is_empty());
    let layout = LAYOUTS.iter().find(|layout| part(layout[1]).is_some()).unwrap_or(&LAYOUTS[0]);
    let required = |name: &'static str| part(name).ok_or(KeeperError::Missing(name));
    let [certificates, key, roots] = *layout;
    let (own, key) = (required(certificates)?, required(key)?);
    // A self-signed CA of old may have left its root out: it is itself.
    let roots = part(roots).unwrap_or_else(|| own.clone());
    let chain = if layout == &LAYOUTS[0] { part(CHAIN).unwrap_or_default() } else { String::new() };
    let certificates = format!("{own}\n{chain}");
    let authority = SigningAuthority::from_pem(Material { certificates: &certificates, key: &key, roots: &roots })?;
    authority.check(now)?;
    Ok(authority)
}

/// Holds the authority in force, and replaces it.
pub(crate) struct Keeper {
    authority: watch::Sender<Arc<SigningAuthority>>,
    /// What is wrong with the newest version of it.
    problem: watch::Sender<Option<Problem>>,
    /// What it is kept in, as people call it.
    place: Arc<str>,
    metrics: Metrics,
}

impl Keeper {
    pub(crate) fn new(authority: SigningAuthority, place: Arc<str>, metrics: Metrics) -> Self {
        metrics.show_authority(&authority);
        let (authority, problem) = (watch::Sender::new(Arc::new(authority)), watch::Sender::new(None));
        Self { authority, problem, place, metrics }
    }

    pub(crate) fn authority(&self) -> watch::Receiver<Arc<SigningAuthority>> {
        self.authority.subscribe()
    }

    pub(crate) fn problem(&self) -> watch::Receiver<Option<Problem>> {
        self.problem.subscribe()
    }

    /// Takes what is kept now.
    fn offer(&self, kept: Result<SigningAuthority, KeeperError>) {
        let new = match kept {
            Ok(new) => new,
            Err(error) => return self.keep_last_good(error_chain(&error)),
        };
        self.problem.send_replace(None);
        let current = self.authority.borrow().clone();
        if new.is_same(&current) {
            return;
        }
        self.metrics.show_authority(&new);
        let (roots, signer) =
            (new.root_pem() != current.root_pem(), new.certificate_pem() != current.certificate_pem());
        tracing::info!(place = %self.place, roots, signer, "the CA changed");
        self.authority.send_replace(Arc::new(new));
    }

    fn keep_last_good(&self, why: String) {
        self.metrics.ca_rejected.inc();
        let remedy = "correct it; the last good CA stays in force".to_owned();
        let problem = Problem { place: Place::object(&self.place), field: String::new(), message: why, remedy };
        let known = self.problem.borrow().as_ref() == Some(&problem);
        if !known {
            tracing::error!(place = %self.place, why = problem.message, "the CA cannot be used as it is kept; the last good one stays in force");
            self.problem.send_replace(Some(problem));
        }
    }
}

/// An answer of the API server, or why there is none.
async fn within<T>(answer: impl Future<Output = kube::Result<T>>) -> Result<T, String> {
    answer::within(DEADLINE, answer).await.map_err(|error| error_chain(&error))
}

#[cfg(test)]
mod tests;
