//! Requests for certificates: a fresh P-256 key, an empty subject, one URI SAN.

use mesh_core::identity::Identity;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use rustls_pki_types::PrivatePkcs8KeyDer;

/// A request and the key it is for.
pub struct Csr {
    /// PKCS #10, PEM.
    pub pem: String,
    pub key: PrivatePkcs8KeyDer<'static>,
}

impl std::fmt::Debug for Csr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Csr").field("pem", &self.pem).finish_non_exhaustive()
    }
}

/// Key generation failed, or the identity cannot be written on a certificate.
#[derive(Debug, thiserror::Error)]
#[error("cannot make a certificate request for {identity}")]
pub struct CsrError {
    pub identity: Identity,
    pub source: rcgen::Error,
}

impl Csr {
    /// # Errors
    /// When the identity is not ASCII, or the system has no randomness.
    pub fn generate(identity: &Identity) -> Result<Self, CsrError> {
        Self::build(identity).map_err(|source| CsrError { identity: identity.clone(), source })
    }

    fn build(identity: &Identity) -> Result<Self, rcgen::Error> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
        let pem = params.serialize_request(&key)?.pem()?;
        Ok(Self { pem, key: key.serialize_der().into() })
    }
}
