//! A certificate in use: chain, key, trust roots, validity.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_core::identity::Identity;
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, pem::PemObject};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::{
    tls::ConfigCache,
    trust::Trust,
    verify::{Anchors, peer_identity},
};

/// One generation of an identity's certificate. TLS configurations made of it live exactly as long as it does.
pub struct Svid {
    pub identity: Identity,
    /// Leaf, then intermediates; no root.
    pub chain: Vec<CertificateDer<'static>>,
    pub(crate) key: PrivatePkcs8KeyDer<'static>,
    /// The bundle that came with it; never empty.
    pub roots: Arc<Vec<CertificateDer<'static>>>,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
    /// Counts up within one manager.
    pub generation: u64,
    pub(crate) configs: ConfigCache,
}

impl std::fmt::Debug for Svid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Svid")
            .field("identity", &self.identity)
            .field("not_after", &self.not_after)
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}

/// Why an issued chain is not usable.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SvidError {
    #[error("the CA answered with no certificate")]
    Empty,
    #[error("no root certificate present: the last element must be the root bundle")]
    NoRoot,
    #[error("element {0} of the chain is not a PEM certificate")]
    Malformed(usize),
    #[error("asked for {wanted}, but the certificate speaks for {}", got.as_ref().map_or_else(|| "nobody".to_owned(), ToString::to_string))]
    WrongIdentity { wanted: Identity, got: Option<Identity> },
    #[error("the leaf's public key is not the one of the request, or cannot sign TLS 1.3")]
    WrongKey,
}

impl Svid {
    /// Checks what a CA answered: leaf, intermediates, and as the last element the root bundle, each PEM.
    ///
    /// # Errors
    /// When the chain is incomplete, malformed, or for another identity or key.
    pub fn new(
        identity: Identity,
        key: PrivatePkcs8KeyDer<'static>,
        answer: &[String],
        generation: u64,
    ) -> Result<Self, SvidError> {
        Self::trusting(identity, key, answer, generation, Arc::default())
    }

    /// [`Self::new`], to be used as `trust` says.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn trusting(
        identity: Identity,
        key: PrivatePkcs8KeyDer<'static>,
        answer: &[String],
        generation: u64,
        trust: Arc<Trust>,
    ) -> Result<Self, SvidError> {
        let (roots, chain) = answer.split_last().ok_or(SvidError::Empty)?;
        if chain.is_empty() {
            return Err(SvidError::NoRoot);
        }
        let chain = chain.iter().enumerate().map(|(i, pem)| one(i, pem)).collect::<Result<Vec<_>, _>>()?;
        let roots = bundle(chain.len(), roots)?;
        Self::from_parts(identity, key, chain, roots, generation, trust)
    }

    /// The same from parts: `chain` leaf first, without root.
    pub(crate) fn from_parts(
        identity: Identity,
        key: PrivatePkcs8KeyDer<'static>,
        chain: Vec<CertificateDer<'static>>,
        roots: Vec<CertificateDer<'static>>,
        generation: u64,
        trust: Arc<Trust>,
    ) -> Result<Self, SvidError> {
        let got = peer_identity(&chain);
        if got.as_ref() != Some(&identity) {
            return Err(SvidError::WrongIdentity { wanted: identity, got });
        }
        let (not_before, not_after) = chain.first().and_then(validity).ok_or(SvidError::Malformed(0))?;
        let configs = ConfigCache::new(&identity.trust_domain, &chain, &key, &roots, trust)?;
        Ok(Self { identity, chain, key, roots: Arc::new(roots), not_before, not_after, generation, configs })
    }

    pub fn is_valid_at(&self, now: SystemTime) -> bool {
        now < self.not_after
    }

    /// What peers of this workload are verified by.
    pub fn anchors(&self) -> &Arc<Anchors> {
        &self.configs.anchors
    }

    /// The private key, PKCS #8.
    pub fn key(&self) -> &PrivatePkcs8KeyDer<'static> {
        &self.key
    }
}

fn one(index: usize, pem: &str) -> Result<CertificateDer<'static>, SvidError> {
    CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|_| SvidError::Malformed(index))
}

fn bundle(index: usize, pem: &str) -> Result<Vec<CertificateDer<'static>>, SvidError> {
    let roots: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    match roots {
        Ok(roots) if roots.is_empty() => Err(SvidError::NoRoot),
        Ok(roots) => Ok(roots),
        Err(_) => Err(SvidError::Malformed(index)),
    }
}

/// First and last instant of a certificate's validity.
pub fn validity(certificate: &CertificateDer<'_>) -> Option<(SystemTime, SystemTime)> {
    let validity = X509Certificate::from_der(certificate).ok()?.1.validity().clone();
    Some((system_time(validity.not_before.timestamp())?, system_time(validity.not_after.timestamp())?))
}

fn system_time(seconds: i64) -> Option<SystemTime> {
    let seconds = u64::try_from(seconds).unwrap_or(0);
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{authority::SigningAuthority, csr::Csr};

    pub(crate) fn issue(authority: &SigningAuthority, identity: &Identity, ttl: Duration) -> Arc<Svid> {
        issue_trusting(authority, identity, ttl, Arc::default())
    }

    pub(crate) fn issue_trusting(
        authority: &SigningAuthority,
        identity: &Identity,
        ttl: Duration,
        trust: Arc<Trust>,
    ) -> Arc<Svid> {
        let csr = Csr::generate(identity).unwrap();
        let chain = authority.sign(&csr.pem, identity, ttl, SystemTime::now()).unwrap();
        Arc::new(Svid::trusting(identity.clone(), csr.key, &chain, 1, trust).unwrap())
    }

    #[test]
    fn refuses_answers_that_are_incomplete_or_for_someone_else() {
        let authority = SigningAuthority::generate("cluster.local").unwrap();
        let (client, server) =
            (Identity::new("cluster.local", "demo", "client"), Identity::new("cluster.local", "demo", "server"));
        let csr = Csr::generate(&client).unwrap();
        let chain = authority.sign(&csr.pem, &client, Duration::from_secs(60), SystemTime::now()).unwrap();
        let check = |identity: &Identity, key: &PrivatePkcs8KeyDer<'static>, answer: &[String]| {
            Svid::new(identity.clone(), key.clone_key(), answer, 1).err()
        };
        assert_eq!(check(&client, &csr.key, &chain), None);
        assert_eq!(check(&client, &csr.key, &[]), Some(SvidError::Empty));
        assert_eq!(check(&client, &csr.key, &chain[..1]), Some(SvidError::NoRoot));
        assert_eq!(check(&client, &csr.key, &["x".into(), chain[1].clone()]), Some(SvidError::Malformed(0)));
        let wrong = SvidError::WrongIdentity { wanted: server.clone(), got: Some(client.clone()) };
        assert_eq!(check(&server, &csr.key, &chain), Some(wrong));
        let other = Csr::generate(&client).unwrap();
        assert_eq!(check(&client, &other.key, &chain), Some(SvidError::WrongKey));
    }
}
