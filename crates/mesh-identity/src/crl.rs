//! Certificate revocation lists (RFC 5280 §5): read whole or not at all, and asked about every certificate of a verified chain.
//!
//! Semantics are upstream's: a certificate that no list speaks of is good, and a list past its `nextUpdate` still counts, since a stale
//! "revoked" is better than none. Only a list that the chain's own issuer signed has a say; one that bears the issuer's name and cannot be
//! shown to be its own is logged, once.

use std::{sync::Once, time::SystemTime};

use rustls::crypto::CryptoProvider;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, TrustAnchor, UnixTime, pem::PemObject};
use webpki::{
    CertRevocationList, EndEntityCert, ExpirationPolicy, KeyUsage, OwnedCertRevocationList, RevocationCheckDepth,
    RevocationOptionsBuilder, UnknownStatusPolicy, VerifiedPath,
};
use x509_parser::{prelude::FromDer as _, revocation_list::CertificateRevocationList};

/// Longest file that is read. A revoked certificate takes some 40 bytes of a list.
pub const MAX_FILE: usize = 64 << 20;
const PEM_START: &[u8] = b"-----BEGIN ";

/// Why a file is no list.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CrlError {
    #[error("it is {0} bytes long; expected at most {MAX_FILE}")]
    TooLong(usize),
    #[error("its PEM is damaged: {0}")]
    Pem(String),
    #[error("list {index} in it is not usable: {why}; expected version 2 (RFC 5280 §5.1)")]
    List { index: usize, why: String },
}

/// Lists that came together.
#[derive(Debug, Default)]
pub struct Crls(Vec<Crl>);

#[derive(Debug)]
struct Crl {
    list: CertRevocationList<'static>,
    /// By which the issuer promised the next one.
    next_update: Option<SystemTime>,
    issuer: String,
    /// It was said that it cannot be verified.
    told: Once,
}

impl Crls {
    /// Concatenated PEM, whose other blocks are skipped, or one list in DER. A file without a list revokes nothing.
    ///
    /// # Errors
    /// When one list cannot be used: half a set would look like a whole one.
    pub fn parse(file: &[u8]) -> Result<Self, CrlError> {
        if file.len() > MAX_FILE {
            return Err(CrlError::TooLong(file.len()));
        }
        let ders: Vec<CertificateRevocationListDer<'_>> = match file.trim_ascii() {
            [] => Vec::new(),
            _ if file.windows(PEM_START.len()).any(|window| window == PEM_START) => {
                let blocks = CertificateRevocationListDer::pem_slice_iter(file);
                blocks.collect::<Result<_, _>>().map_err(|error| CrlError::Pem(error.to_string()))?
            }
            _ => vec![file.into()],
        };
        ders.iter().enumerate().map(|(index, der)| Crl::parse(index, der)).collect::<Result<_, _>>().map(Self)
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Issuers whose next list is overdue.
    pub fn overdue(&self, now: SystemTime) -> impl Iterator<Item = &str> {
        self.0.iter().filter(move |crl| crl.next_update.is_some_and(|at| at < now)).map(|crl| &*crl.issuer)
    }

    /// Whether a list revokes a certificate of this verified path. Every list by itself: two of one issuer's name, as there are while
    /// its key is replaced, must not hide each other.
    pub(crate) fn revokes(&self, path: &Path<'_>, usage: KeyUsage) -> bool {
        let issuers: Vec<&[u8]> = path.issuers();
        self.0.iter().filter(|crl| issuers.contains(&crl.list.issuer())).any(|crl| {
            let lists = [&crl.list];
            let Ok(options) = RevocationOptionsBuilder::new(&lists) else { return false };
            let options = options
                .with_depth(RevocationCheckDepth::Chain)
                .with_status_policy(UnknownStatusPolicy::Allow)
                .with_expiration_policy(ExpirationPolicy::Ignore)
                .build();
            let algorithms = path.provider.signature_verification_algorithms.all;
            let checked = path.leaf.verify_for_usage(
                algorithms,
                path.anchors,
                path.intermediates,
                path.at,
                usage,
                Some(options),
                None,
            );
            match checked {
                Ok(_) => false,
                Err(webpki::Error::CertRevoked) => true,
                // Signed by another key of that name, or in a way that we do not know, or by an issuer that may not sign lists.
                Err(error) => {
                    crl.has_no_say(&error);
                    false
                }
            }
        })
    }
}

/// What was verified, and how to do it again.
pub(crate) struct Path<'a> {
    pub(crate) leaf: &'a EndEntityCert<'a>,
    pub(crate) intermediates: &'a [CertificateDer<'a>],
    pub(crate) anchors: &'a [TrustAnchor<'static>],
    pub(crate) at: UnixTime,
    pub(crate) provider: &'a CryptoProvider,
    pub(crate) verified: VerifiedPath<'a>,
}

impl Path<'_> {
    fn issuers(&self) -> Vec<&[u8]> {
        let above = self.verified.intermediate_certificates().map(|certificate| certificate.issuer());
        std::iter::once(self.leaf.issuer()).chain(above).collect()
    }
}

impl Crl {
    fn parse(index: usize, der: &[u8]) -> Result<Self, CrlError> {
        let unusable = |why: String| CrlError::List { index, why };
        let list = OwnedCertRevocationList::from_der(der).map_err(|error| unusable(error.to_string()))?;
        let (_, parsed) = CertificateRevocationList::from_der(der).map_err(|error| unusable(error.to_string()))?;
        let seconds = parsed.next_update().and_then(|at| u64::try_from(at.timestamp()).ok());
        let next_update =
            seconds.and_then(|seconds| SystemTime::UNIX_EPOCH.checked_add(std::time::Duration::from_secs(seconds)));
        Ok(Self { list: list.into(), next_update, issuer: parsed.issuer().to_string(), told: Once::new() })
    }

    fn has_no_say(&self, error: &webpki::Error) {
        self.told.call_once(|| {
            tracing::warn!(
                issuer = self.issuer,
                %error,
                "a revocation list is not verifiably signed by a CA of its issuer's name and revokes nothing of that CA; unless it is another \
                 CA's of the same name, have it signed anew by a CA certificate with the key usage cRLSign"
            );
        });
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use mesh_core::identity::Identity;

    use super::*;
    use crate::{
        Distrust, PeerRole, Svid,
        authority::{SigningAuthority, tests::revocation_list},
        distrust,
        svid::tests::issue,
    };

    const HOUR: Duration = Duration::from_secs(3600);

    fn identity(name: &str) -> Identity {
        Identity::new("cluster.local", "demo", name)
    }

    fn list(authority: &SigningAuthority, revoked: &[&Svid], now: SystemTime) -> String {
        let leaves: Vec<_> = revoked.iter().map(|svid| svid.chain[0].clone()).collect();
        revocation_list(authority, &leaves, now)
    }

    fn verdict(by: &Svid, about: &Svid) -> Option<Distrust> {
        distrust(by.anchors(), &about.chain, PeerRole::Client, SystemTime::now())
    }

    #[test]
    fn only_the_serials_of_the_issuer_that_signed_the_list_are_revoked() {
        let (ours, theirs) = (SigningAuthority::generate("a").unwrap(), SigningAuthority::generate("a").unwrap());
        let (good, bad) = (issue(&ours, &identity("good"), HOUR), issue(&ours, &identity("bad"), HOUR));
        let trust = &good.configs.anchors.trust;
        assert_eq!(verdict(&good, &bad), None, "unknown is good");
        // Of the same name as ours, and ahead in the file: the other key's list must neither count nor hide ours.
        let both = list(&theirs, &[&good], SystemTime::now()) + &list(&ours, &[&bad], SystemTime::now());
        trust.set_crls(Crls::parse(both.as_bytes()).unwrap());
        assert_eq!((verdict(&good, &bad), verdict(&good, &good)), (Some(Distrust::Revoked), None));
        let told: Vec<bool> = trust.crls().0.iter().map(|crl| crl.told.is_completed()).collect();
        assert_eq!(told, [true, false], "of the one that has no say, that is logged");
    }

    #[test]
    fn a_peer_without_certificates_is_not_believed() {
        let ours = SigningAuthority::generate("cluster.local").unwrap();
        let by = issue(&ours, &identity("a"), HOUR);
        let verdict = distrust(by.anchors(), &[], PeerRole::Client, SystemTime::now());
        assert_eq!(verdict, Some(Distrust::RootGone));
    }

    #[test]
    fn a_list_past_its_next_update_still_counts_and_is_known_to_be_overdue() {
        let ours = SigningAuthority::generate("cluster.local").unwrap();
        let bad = issue(&ours, &identity("bad"), HOUR);
        let crls = Crls::parse(list(&ours, &[&bad], SystemTime::now() - 2 * HOUR).as_bytes()).unwrap();
        assert_eq!(crls.overdue(SystemTime::now()).count(), 1);
        bad.configs.anchors.trust.set_crls(crls);
        assert_eq!(verdict(&bad, &bad), Some(Distrust::Revoked));
    }

    #[test]
    fn files_are_pem_with_other_blocks_or_one_der_and_read_whole_or_not_at_all() {
        let ours = SigningAuthority::generate("cluster.local").unwrap();
        let pem = list(&ours, &[], SystemTime::now());
        let mixed = format!("{}{pem}{pem}", ours.root_pem());
        assert_eq!(Crls::parse(mixed.as_bytes()).unwrap().len(), 2);
        let der = CertificateRevocationListDer::from_pem_slice(pem.as_bytes()).unwrap();
        assert_eq!(Crls::parse(&der).unwrap().len(), 1);
        assert!(Crls::parse(b" \n").unwrap().is_empty());
        assert!(Crls::parse(b"nonsense").is_err());
        let half = format!("{pem}{}", pem.replace("MI", "AA"));
        assert!(matches!(Crls::parse(half.as_bytes()), Err(CrlError::List { index: 1, .. })));
        assert!(Crls::parse(&pem.as_bytes()[..pem.len() / 2]).is_err());
    }
}
