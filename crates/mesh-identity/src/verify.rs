//! Verification of peers by SPIFFE identity: the chain by webpki, then exactly one URI SAN, then who it names. Host names and
//! addresses play no part.

use std::{fmt, sync::Arc};

use mesh_core::identity::Identity;
use rustls::{
    DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore, SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{CryptoProvider, verify_tls13_signature},
    server::{
        ParsedCertificate, VerifierBuilderError, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

/// Whom a peer's chain (leaf first) speaks for: the leaf's only URI SAN, if it is a workload identity. X.509-SVID §2: a leaf with
/// more than one URI SAN is not an SVID.
pub fn peer_identity(certs: &[CertificateDer<'_>]) -> Option<Identity> {
    uri_names(certs.first()?).as_deref().and_then(|names| match names {
        [one] => one.parse().ok(),
        _ => None,
    })
}

fn uri_names(leaf: &CertificateDer<'_>) -> Option<Vec<String>> {
    let leaf = webpki::EndEntityCert::try_from(leaf).ok()?;
    // Two are enough to know that there are too many.
    Some(leaf.valid_uri_names().take(2).map(str::to_owned).collect())
}

/// The peer's chain is good, but it is not whom we want.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IdentityMismatch {
    /// A server that none of the accepted identities names.
    San { want: Vec<Identity>, got: String },
    /// A client from elsewhere.
    TrustDomain { want: Arc<str>, got: String },
}

impl fmt::Display for IdentityMismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "identity verification error: peer did not present the expected ")?;
        match self {
            Self::San { want, got } => {
                let want: Vec<String> = want.iter().map(ToString::to_string).collect();
                write!(f, "SAN ({}), got {got}", want.join(", "))
            }
            Self::TrustDomain { want, got } => write!(f, "trustdomain ({want}), got {got}"),
        }
    }
}

impl std::error::Error for IdentityMismatch {}

impl From<IdentityMismatch> for Error {
    fn from(mismatch: IdentityMismatch) -> Self {
        // Not InvalidCertificate(Other): rustls would print that with Debug.
        Self::Other(OtherError(Arc::new(mismatch)))
    }
}

/// What the peer showed, for the error's text.
fn shown(leaf: &CertificateDer<'_>) -> String {
    match uri_names(leaf).unwrap_or_default().as_slice() {
        [] => "no URI SAN".to_owned(),
        [one] => one.clone(),
        [first, ..] => format!("several URI SANs, {first} first"),
    }
}

/// A client checking that a server is one of the accepted identities.
#[derive(Debug)]
pub(crate) struct ServerVerifier {
    pub(crate) roots: Arc<RootCertStore>,
    pub(crate) accepted: Arc<[Identity]>,
    pub(crate) provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let parsed = ParsedCertificate::try_from(leaf)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, algorithms)?;
        match peer_identity(std::slice::from_ref(leaf)) {
            Some(identity) if self.accepted.contains(&identity) => Ok(ServerCertVerified::assertion()),
            _ => Err(IdentityMismatch::San { want: self.accepted.to_vec(), got: shown(leaf) }.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// A server checking that a client is a workload of its own trust domain.
#[derive(Debug)]
pub(crate) struct ClientVerifier {
    chain: Arc<dyn ClientCertVerifier>,
    trust_domain: Arc<str>,
}

impl ClientVerifier {
    pub(crate) fn new(
        roots: Arc<RootCertStore>,
        trust_domain: Arc<str>,
        provider: Arc<CryptoProvider>,
    ) -> Result<Self, VerifierBuilderError> {
        // No hints: the roots' names tell a scanner more than they tell a client, which has one certificate anyway.
        let chain = WebPkiClientVerifier::builder_with_provider(roots, provider).clear_root_hint_subjects().build()?;
        Ok(Self { chain, trust_domain })
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.chain.verify_client_cert(leaf, intermediates, now)?;
        match peer_identity(std::slice::from_ref(leaf)) {
            Some(identity) if identity.trust_domain == self.trust_domain => Ok(verified),
            _ => Err(IdentityMismatch::TrustDomain { want: self.trust_domain.clone(), got: shown(leaf) }.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

fn tls12() -> Error {
    Error::General("TLS 1.2 is not offered".to_owned())
}
