//! The signing half of a certificate authority: a key, a certificate, and what they put on workload certificates.
//!
//! Of a request only its public key is believed; everything else on the certificate is decided by the caller. Whether the caller may
//! have the identity is not asked here.

use std::{
    fs,
    io::{self, Write},
    net::IpAddr,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use mesh_core::identity::Identity;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime, pem::PemObject};
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};

/// File names inside a state folder.
pub const CA_CERT_FILE: &str = "ca-cert.pem";
pub const CA_KEY_FILE: &str = "ca-key.pem";
/// What clients trust; holds the CA certificate itself, or the root above it.
pub const ROOT_CERT_FILE: &str = "root-cert.pem";

/// How far certificates are dated back, for peers whose clocks are behind.
const BACKDATE: Duration = Duration::from_secs(120);
const CA_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Why nothing was signed, or no authority opened.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error("cannot {verb} {}", path.display())]
    File { verb: &'static str, path: PathBuf, source: io::Error },
    #[error("in {}", path.display())]
    Folder { path: PathBuf, source: Box<AuthorityError> },
    #[error("{part} is not usable: expected {expected}")]
    Content { part: &'static str, expected: &'static str, source: rcgen::Error },
    #[error("{0} holds no certificate in PEM")]
    NoCertificate(&'static str),
    #[error(
        "what the CA signs would not be believed: see that key, certificates and roots belong together and are valid"
    )]
    Unbelievable(#[source] webpki::Error),
    #[error("the CA's certificate has expired")]
    Expired,
    #[error("the certificate request is not valid: expected PKCS #10 in PEM, signed by its own key")]
    Request(#[source] rcgen::Error),
    #[error("`{0}` cannot be written on a certificate: expected ASCII")]
    Name(String),
    #[error("signing failed")]
    Sign(#[source] rcgen::Error),
}

/// A CA as files or a Secret hold it; each part is PEM.
#[derive(Clone, Copy)]
pub struct Material<'a> {
    /// The CA's own first; further ones lead to its root.
    pub certificates: &'a str,
    /// PKCS #8, PKCS #1 or SEC 1.
    pub key: &'a str,
    /// What clients are to trust; several while roots are being replaced.
    pub roots: &'a str,
}

/// Names of [`Material`]'s parts, in the two layouts people keep them in.
const CERTIFICATES_PART: &str = "the CA's certificate (ca-cert.pem, tls.crt)";
const KEY_PART: &str = "the CA's key (ca-key.pem, tls.key)";
const ROOTS_PART: &str = "the root bundle (root-cert.pem, ca.crt)";

/// A key that signs, and the certificates that vouch for it.
pub struct SigningAuthority {
    issuer: Issuer<'static, KeyPair>,
    key_pem: String,
    certificate_pem: String,
    /// What leads from a leaf to a root, one certificate each; without the roots.
    intermediates: Vec<String>,
    root_pem: String,
    not_after: SystemTime,
}

impl std::fmt::Debug for SigningAuthority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SigningAuthority").finish_non_exhaustive()
    }
}

/// A server's chain, leaf first, and its key.
#[derive(Debug)]
pub struct ServerCertificate {
    pub chain: Vec<CertificateDer<'static>>,
    pub key: PrivateKeyDer<'static>,
}

impl SigningAuthority {
    /// A new self-signed authority, valid for ten years.
    ///
    /// # Errors
    /// When the trust domain cannot be written on a certificate.
    pub fn generate(trust_domain: &str) -> Result<Self, AuthorityError> {
        let key = KeyPair::generate().map_err(AuthorityError::Sign)?;
        let now = SystemTime::now();
        let mut params = validity(CertificateParams::default(), CA_LIFETIME, now);
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, trust_domain);
        params.distinguished_name.push(DnType::CommonName, "Fairway root");
        params.subject_alt_names = vec![uri(&format!("spiffe://{trust_domain}"))?];
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate_pem = params.self_signed(&key).map_err(AuthorityError::Sign)?.pem();
        let key_pem = key.serialize_pem();
        let (issuer, root_pem) = (Issuer::new(params, key), certificate_pem.clone());
        let (intermediates, not_after) = (Vec::new(), now + CA_LIFETIME);
        Ok(Self { issuer, key_pem, certificate_pem, intermediates, root_pem, not_after })
    }

    /// The authority that the parts make. Whether they belong together shows [`Self::check`].
    ///
    /// # Errors
    /// Names the part that cannot be read.
    pub fn from_pem(material: Material<'_>) -> Result<Self, AuthorityError> {
        let key = KeyPair::from_pem(material.key).map_err(|source| AuthorityError::Content {
            part: KEY_PART,
            expected: "a private key in PEM (PKCS #8, PKCS #1 or SEC 1)",
            source,
        })?;
        let unusable =
            |source| AuthorityError::Content { part: CERTIFICATES_PART, expected: "a CA certificate in PEM", source };
        let certificates = certificates(material.certificates, CERTIFICATES_PART)?;
        let roots = self::certificates(material.roots, ROOTS_PART)?;
        let (own, own_pem) = &certificates[0];
        let issuer = Issuer::from_ca_cert_der(own, key).map_err(unusable)?;
        let not_after = not_after(own).ok_or_else(|| unusable(rcgen::Error::CouldNotParseCertificate))?;
        let mut intermediates: Vec<&(CertificateDer<'_>, String)> = Vec::new();
        for certificate in &certificates {
            if !roots.contains(certificate) && !intermediates.contains(&certificate) {
                intermediates.push(certificate);
            }
        }
        Ok(Self {
            issuer,
            key_pem: material.key.to_owned(),
            certificate_pem: own_pem.clone(),
            intermediates: intermediates.into_iter().map(|(_, pem)| pem.clone()).collect(),
            root_pem: roots.into_iter().map(|(_, pem)| pem).collect(),
            not_after,
        })
    }

    /// Whether what it signs is believed by who trusts its roots.
    ///
    /// # Errors
    /// When key and certificates do not belong together, lead to none of the roots, or are not valid `now`.
    pub fn check(&self, now: SystemTime) -> Result<(), AuthorityError> {
        let issued = self.server_certificate(&["check".to_owned()], BACKDATE, now)?;
        let (leaf, intermediates) = issued.chain.split_first().ok_or(AuthorityError::Expired)?;
        let unbelievable = AuthorityError::Unbelievable;
        let roots = certificates(&self.root_pem, ROOTS_PART)?;
        let anchors = roots.iter().map(|(root, _)| anchor_from_trusted_cert(root));
        let anchors = anchors.collect::<Result<Vec<_>, _>>().map_err(unbelievable)?;
        let algorithms = crate::tls::provider().signature_verification_algorithms.all;
        let at = UnixTime::since_unix_epoch(now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default());
        let leaf = EndEntityCert::try_from(leaf).map_err(unbelievable)?;
        let usage = KeyUsage::server_auth();
        leaf.verify_for_usage(algorithms, &anchors, intermediates, at, usage, None, None).map_err(unbelievable)?;
        Ok(())
    }

    /// Reads `ca-cert.pem`, `ca-key.pem` and `root-cert.pem` from `dir`.
    ///
    /// # Errors
    /// Names the file that is missing or unusable.
    pub fn load(dir: &Path) -> Result<Self, AuthorityError> {
        let (key, certificates) = (read(&dir.join(CA_KEY_FILE))?, read(&dir.join(CA_CERT_FILE))?);
        let roots = read(&dir.join(ROOT_CERT_FILE))?;
        let read = Self::from_pem(Material { certificates: &certificates, key: &key, roots: &roots });
        read.map_err(|error| AuthorityError::Folder { path: dir.to_owned(), source: Box::new(error) })
    }

    /// [`Self::load`], after making the files when `ca-key.pem` does not exist.
    ///
    /// # Errors
    /// As [`Self::load`], or when the files cannot be written.
    pub fn open(dir: &Path, trust_domain: &str) -> Result<Self, AuthorityError> {
        if !dir.join(CA_KEY_FILE).exists() {
            Self::generate(trust_domain)?.save(dir)?;
        }
        Self::load(dir)
    }

    /// Writes the three files, the key last, each readable by its owner only.
    ///
    /// # Errors
    /// When `dir` cannot be made or a file cannot be written.
    pub fn save(&self, dir: &Path) -> Result<(), AuthorityError> {
        fs::create_dir_all(dir).map_err(|source| AuthorityError::File {
            verb: "create",
            path: dir.to_owned(),
            source,
        })?;
        write(&dir.join(ROOT_CERT_FILE), &self.root_pem)?;
        write(&dir.join(CA_CERT_FILE), &self.certificate_pem)?;
        write(&dir.join(CA_KEY_FILE), &self.key_pem)
    }

    /// PEM of the root bundle that clients trust.
    pub fn root_pem(&self) -> &str {
        &self.root_pem
    }

    /// PEM of its own certificate.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// PEM of its key, as it was read.
    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// Whether it is made of the same parts.
    pub fn is_same(&self, other: &Self) -> bool {
        let parts = |of: &Self| (of.certificate_pem.clone(), of.intermediates.clone(), of.root_pem.clone());
        self.key_pem == other.key_pem && parts(self) == parts(other)
    }

    /// When the first of its roots expires.
    pub fn roots_not_after(&self) -> Option<SystemTime> {
        let roots = certificates(&self.root_pem, ROOTS_PART).unwrap_or_default();
        roots.iter().filter_map(|(root, _)| not_after(root)).min()
    }

    /// When its own certificate expires; nothing it signs is valid for longer.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Signs the public key of `csr_pem` for `identity`: leaf, intermediates (one each; none if this authority is a root), root bundle,
    /// each PEM. The certificate is valid from up to two minutes before `now` (a tenth of `ttl` if that is less, so that a renewal at
    /// half of its life is never due at once) until `now + ttl`.
    ///
    /// # Errors
    /// When the request or the identity is not usable.
    pub fn sign(
        &self,
        csr_pem: &str,
        identity: &Identity,
        ttl: Duration,
        now: SystemTime,
    ) -> Result<Vec<String>, AuthorityError> {
        let request = CertificateSigningRequestParams::from_pem(csr_pem).map_err(AuthorityError::Request)?;
        let leaf = self.leaf(&request.public_key, vec![uri(&identity.to_string())?], ttl, now)?;
        let mut chain = vec![leaf.pem()];
        chain.extend(self.intermediates.iter().cloned());
        chain.push(self.root_pem.clone());
        Ok(chain)
    }

    /// A fresh key and chain for a server known as `names` (host names or addresses).
    ///
    /// # Errors
    /// When a name cannot be written on a certificate.
    pub fn server_certificate(
        &self,
        names: &[String],
        ttl: Duration,
        now: SystemTime,
    ) -> Result<ServerCertificate, AuthorityError> {
        let key = KeyPair::generate().map_err(AuthorityError::Sign)?;
        let sans = names.iter().map(|name| host(name)).collect::<Result<_, _>>()?;
        let leaf = self.leaf(&key, sans, ttl, now)?;
        let mut chain = vec![leaf.der().clone()];
        chain.extend(self.intermediates.iter().filter_map(|pem| CertificateDer::from_pem_slice(pem.as_bytes()).ok()));
        Ok(ServerCertificate { chain, key: PrivatePkcs8KeyDer::from(key.serialize_der()).into() })
    }

    fn leaf(
        &self,
        key: &impl PublicKeyData,
        sans: Vec<SanType>,
        ttl: Duration,
        now: SystemTime,
    ) -> Result<rcgen::Certificate, AuthorityError> {
        let left = self.not_after.duration_since(now).map_err(|_| AuthorityError::Expired)?;
        let mut params = validity(CertificateParams::default(), ttl.min(left), now);
        // An empty subject makes the SAN critical (RFC 5280 §4.2.1.6), as X.509-SVID asks for.
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = sans;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.signed_by(key, &self.issuer).map_err(AuthorityError::Sign)
    }
}

/// Each certificate of a bundle, with its own PEM; at least one.
fn certificates(pem: &str, part: &'static str) -> Result<Vec<(CertificateDer<'static>, String)>, AuthorityError> {
    const END: &str = "-----END CERTIFICATE-----";
    let mut all = Vec::new();
    for piece in pem.split_inclusive(END) {
        let Some(begin) = piece.find("-----BEGIN CERTIFICATE-----") else { continue };
        let piece = &piece[begin..];
        match CertificateDer::from_pem_slice(piece.as_bytes()) {
            Ok(certificate) => all.push((certificate, format!("{piece}\n"))),
            Err(_) => return Err(AuthorityError::NoCertificate(part)),
        }
    }
    if all.is_empty() { Err(AuthorityError::NoCertificate(part)) } else { Ok(all) }
}

fn not_after(certificate: &CertificateDer<'_>) -> Option<SystemTime> {
    let (_, certificate) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let seconds = u64::try_from(certificate.validity().not_after.timestamp()).ok()?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

fn validity(mut params: CertificateParams, ttl: Duration, now: SystemTime) -> CertificateParams {
    let since_epoch = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + since_epoch.saturating_sub(BACKDATE.min(ttl / 10));
    params.not_after = epoch + since_epoch.saturating_add(ttl);
    // RFC 5280 §4.1.2.2: positive, at most 20 octets, unique per issuer.
    let mut serial: [u8; 16] = rand::random();
    serial[0] = serial[0] & 0x7f | 0x40;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params
}

fn uri(text: &str) -> Result<SanType, AuthorityError> {
    text.try_into().map(SanType::URI).map_err(|_| AuthorityError::Name(text.to_owned()))
}

fn host(name: &str) -> Result<SanType, AuthorityError> {
    match name.parse::<IpAddr>() {
        Ok(ip) => Ok(SanType::IpAddress(ip)),
        Err(_) => name.try_into().map(SanType::DnsName).map_err(|_| AuthorityError::Name(name.to_owned())),
    }
}

fn read(path: &Path) -> Result<String, AuthorityError> {
    fs::read_to_string(path).map_err(|source| AuthorityError::File { verb: "read", path: path.to_owned(), source })
}

fn write(path: &Path, text: &str) -> Result<(), AuthorityError> {
    let open = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
    open.and_then(|mut file| file.write_all(text.as_bytes())).map_err(|source| AuthorityError::File {
        verb: "write",
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
pub(crate) mod tests;
