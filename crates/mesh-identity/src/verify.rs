//! Verification of peers by SPIFFE identity: the chain by webpki, then the revocation lists, then exactly one URI SAN, then who it
//! names. Host names and addresses play no part.

use std::{fmt, sync::Arc, time::SystemTime};

use mesh_core::identity::Identity;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::verify_tls13_signature,
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use webpki::{EndEntityCert, KeyUsage};

use crate::{crl::Path, trust::Trust};

/// Whom a peer's chain (leaf first) speaks for: the leaf's only URI SAN, if it is a workload identity. X.509-SVID §2: a leaf with
/// more than one URI SAN is not an SVID.
pub fn peer_identity(certs: &[CertificateDer<'_>]) -> Option<Identity> {
    uri_names(certs.first()?).as_deref().and_then(|names| match names {
        [one] => one.parse().ok(),
        _ => None,
    })
}

fn uri_names(leaf: &CertificateDer<'_>) -> Option<Vec<String>> {
    let leaf = EndEntityCert::try_from(leaf).ok()?;
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

/// Which end of a connection a peer is: its certificate must be made for that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerRole {
    Client,
    Server,
}

impl PeerRole {
    fn usage(self) -> KeyUsage {
        match self {
            Self::Client => KeyUsage::client_auth(),
            Self::Server => KeyUsage::server_auth(),
        }
    }
}

/// What a workload believes: the roots that came with its certificate, and the process's policy.
#[derive(Debug)]
pub struct Anchors {
    pub(crate) roots: RootCertStore,
    pub(crate) trust: Arc<Trust>,
    /// The workload's own.
    pub(crate) trust_domain: Arc<str>,
}

impl Anchors {
    pub fn has_same_roots(&self, other: &Self) -> bool {
        self.roots.roots == other.roots.roots
    }

    fn verify_chain(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        role: PeerRole,
        at: UnixTime,
    ) -> Result<(), Error> {
        let provider = &self.trust.provider;
        let leaf = EndEntityCert::try_from(leaf).map_err(chain_error)?;
        let anchors = &self.roots.roots;
        let algorithms = provider.signature_verification_algorithms.all;
        let verified = leaf.verify_for_usage(algorithms, anchors, intermediates, at, role.usage(), None, None);
        let verified = verified.map_err(chain_error)?;
        let path = Path { leaf: &leaf, intermediates, anchors, at, provider, verified };
        match self.trust.crls().revokes(&path, role.usage()) {
            true => Err(CertificateError::Revoked.into()),
            false => Ok(()),
        }
    }

    fn verify_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.trust.provider.signature_verification_algorithms)
    }

    fn supported_schemes(&self) -> Vec<SignatureScheme> {
        self.trust.provider.signature_verification_algorithms.supported_schemes()
    }

    fn is_accepted(&self, accepted: &[Identity], got: &Identity) -> bool {
        accepted.iter().any(|want| {
            want.namespace == got.namespace
                && want.service_account == got.service_account
                && self.trust.same_domain(&want.trust_domain, &got.trust_domain)
        })
    }
}

/// Why the peer of a live tunnel is not believed any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Distrust {
    /// A revocation list names a certificate of its chain.
    Revoked,
    /// Its chain leads to no root of ours, and did before; an empty one leads nowhere.
    RootGone,
}

/// Whether `anchors` and the lists in force still vouch for a peer whose chain (leaf first) was good `at` some moment. As of that
/// moment: a certificate that has expired since says nothing against what was opened with it.
pub fn distrust(anchors: &Anchors, chain: &[CertificateDer<'_>], role: PeerRole, at: SystemTime) -> Option<Distrust> {
    let Some((leaf, intermediates)) = chain.split_first() else { return Some(Distrust::RootGone) };
    let at = UnixTime::since_unix_epoch(at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default());
    match anchors.verify_chain(leaf, intermediates, role, at) {
        Ok(()) => None,
        Err(error) if is_revocation(&error) => Some(Distrust::Revoked),
        // The handshake's moment was not exactly this one.
        Err(Error::InvalidCertificate(
            CertificateError::NotValidYetContext { .. } | CertificateError::ExpiredContext { .. },
        )) => None,
        Err(_) => Some(Distrust::RootGone),
    }
}

/// Whether this, or a cause of it, is our refusal of a revoked certificate.
pub fn is_revocation(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if matches!(error.downcast_ref(), Some(Error::InvalidCertificate(CertificateError::Revoked))) {
            return true;
        }
        next = match error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref) {
            // Its `source` skips what it holds.
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    false
}

/// In rustls' words, from which it takes the alert that the peer is told.
fn chain_error(error: webpki::Error) -> Error {
    use webpki::Error as E;
    Error::InvalidCertificate(match error {
        E::BadDer | E::BadDerTime | E::TrailingData(_) => CertificateError::BadEncoding,
        E::CertNotValidYet { time, not_before } => CertificateError::NotValidYetContext { time, not_before },
        E::CertExpired { time, not_after } => CertificateError::ExpiredContext { time, not_after },
        E::InvalidCertValidity => CertificateError::Expired,
        E::UnknownIssuer => CertificateError::UnknownIssuer,
        E::InvalidSignatureForPublicKey => CertificateError::BadSignature,
        other => CertificateError::Other(OtherError(Arc::new(other))),
    })
}

/// A client checking that a server is one of the accepted identities.
#[derive(Debug)]
pub(crate) struct ServerVerifier {
    pub(crate) anchors: Arc<Anchors>,
    pub(crate) accepted: Arc<[Identity]>,
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
        self.anchors.verify_chain(leaf, intermediates, PeerRole::Server, now)?;
        match peer_identity(std::slice::from_ref(leaf)) {
            Some(identity) if self.anchors.is_accepted(&self.accepted, &identity) => {
                Ok(ServerCertVerified::assertion())
            }
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
        self.anchors.verify_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.anchors.supported_schemes()
    }
}

/// A server checking that a client is a workload of its own trust domain, whatever that is called.
#[derive(Debug)]
pub(crate) struct ClientVerifier(pub(crate) Arc<Anchors>);

impl ClientCertVerifier for ClientVerifier {
    /// None: the roots' names tell a scanner more than they tell a client, which has one certificate anyway.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let anchors = &self.0;
        anchors.verify_chain(leaf, intermediates, PeerRole::Client, now)?;
        let own = &anchors.trust_domain;
        match peer_identity(std::slice::from_ref(leaf)) {
            Some(identity) if anchors.trust.same_domain(own, &identity.trust_domain) => {
                Ok(ClientCertVerified::assertion())
            }
            _ => Err(IdentityMismatch::TrustDomain { want: own.clone(), got: shown(leaf) }.into()),
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
        self.0.verify_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}

fn tls12() -> Error {
    Error::General("TLS 1.2 is not offered".to_owned())
}
