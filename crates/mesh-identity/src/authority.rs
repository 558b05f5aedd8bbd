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
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject};

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
    #[error("{} is not usable: expected {expected}", path.display())]
    Content { path: PathBuf, expected: &'static str, source: rcgen::Error },
    #[error("{} holds no PEM certificate", .0.display())]
    NoCertificate(PathBuf),
    #[error("the certificate request is not valid: expected PKCS #10 in PEM, signed by its own key")]
    Request(#[source] rcgen::Error),
    #[error("`{0}` cannot be written on a certificate: expected ASCII")]
    Name(String),
    #[error("signing failed")]
    Sign(#[source] rcgen::Error),
}

/// A key that signs, and the certificates that vouch for it.
pub struct SigningAuthority {
    issuer: Issuer<'static, KeyPair>,
    key_pem: String,
    certificate_pem: String,
    root_pem: String,
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
        let mut params = validity(CertificateParams::default(), CA_LIFETIME, SystemTime::now());
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, trust_domain);
        params.distinguished_name.push(DnType::CommonName, "Fairway root");
        params.subject_alt_names = vec![uri(&format!("spiffe://{trust_domain}"))?];
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate_pem = params.self_signed(&key).map_err(AuthorityError::Sign)?.pem();
        let key_pem = key.serialize_pem();
        Ok(Self { issuer: Issuer::new(params, key), key_pem, root_pem: certificate_pem.clone(), certificate_pem })
    }

    /// Reads `ca-cert.pem`, `ca-key.pem` (PKCS #8) and `root-cert.pem` from `dir`.
    ///
    /// # Errors
    /// Names the file that is missing or unusable.
    pub fn load(dir: &Path) -> Result<Self, AuthorityError> {
        let (key_path, certificate_path) = (dir.join(CA_KEY_FILE), dir.join(CA_CERT_FILE));
        let (key_pem, certificate_pem) = (read(&key_path)?, read(&certificate_path)?);
        let root_path = dir.join(ROOT_CERT_FILE);
        let root_pem = read(&root_path)?;
        if CertificateDer::from_pem_slice(root_pem.as_bytes()).is_err() {
            return Err(AuthorityError::NoCertificate(root_path));
        }
        let key = KeyPair::from_pem(&key_pem).map_err(|source| AuthorityError::Content {
            path: key_path,
            expected: "a private key in PKCS #8 PEM",
            source,
        })?;
        let issuer = Issuer::from_ca_cert_pem(&certificate_pem, key).map_err(|source| AuthorityError::Content {
            path: certificate_path,
            expected: "a CA certificate in PEM",
            source,
        })?;
        Ok(Self { issuer, key_pem, certificate_pem, root_pem })
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

    /// Signs the public key of `csr_pem` for `identity`: leaf, intermediates (if this authority is not its own root), root bundle,
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
        chain.extend(self.intermediate().map(str::to_owned));
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
        let above = self.intermediate().and_then(|pem| CertificateDer::from_pem_slice(pem.as_bytes()).ok());
        chain.extend(above);
        Ok(ServerCertificate { chain, key: PrivatePkcs8KeyDer::from(key.serialize_der()).into() })
    }

    fn leaf(
        &self,
        key: &impl PublicKeyData,
        sans: Vec<SanType>,
        ttl: Duration,
        now: SystemTime,
    ) -> Result<rcgen::Certificate, AuthorityError> {
        let mut params = validity(CertificateParams::default(), ttl, now);
        // An empty subject makes the SAN critical (RFC 5280 §4.2.1.6), as X.509-SVID asks for.
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = sans;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.signed_by(key, &self.issuer).map_err(AuthorityError::Sign)
    }

    fn intermediate(&self) -> Option<&str> {
        (!self.root_pem.contains(self.certificate_pem.trim())).then_some(&self.certificate_pem)
    }
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
pub(crate) mod tests {
    use rcgen::{CertificateRevocationListParams, KeyIdMethod, RevocationReason, RevokedCertParams};
    use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

    use super::*;
    use crate::csr::Csr;

    /// PEM of a list that revokes `certificates`, issued `now` and to be replaced an hour later.
    pub(crate) fn revocation_list(
        authority: &SigningAuthority,
        certificates: &[CertificateDer<'_>],
        now: SystemTime,
    ) -> String {
        let at = rcgen::date_time_ymd(1970, 1, 1) + now.duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let revoked = certificates.iter().map(|certificate| RevokedCertParams {
            serial_number: SerialNumber::from_slice(X509Certificate::from_der(certificate).unwrap().1.raw_serial()),
            revocation_time: at,
            reason_code: Some(RevocationReason::KeyCompromise),
            invalidity_date: None,
        });
        let params = CertificateRevocationListParams {
            this_update: at,
            next_update: at + Duration::from_secs(3600),
            crl_number: SerialNumber::from(1_u64),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&authority.issuer).unwrap().pem().unwrap()
    }

    fn identity() -> Identity {
        Identity::new("cluster.local", "demo", "client")
    }

    #[test]
    fn believes_only_the_public_key_of_a_request() {
        let authority = SigningAuthority::generate("cluster.local").unwrap();
        let csr = Csr::generate(&Identity::new("cluster.local", "kube-system", "root")).unwrap();
        let now = SystemTime::now();
        let chain = authority.sign(&csr.pem, &identity(), Duration::from_secs(3600), now).unwrap();
        assert_eq!(chain.len(), 2, "leaf and root; a self-signed authority has no intermediate");
        let leaf = CertificateDer::from_pem_slice(chain[0].as_bytes()).unwrap();
        let (_, leaf) = X509Certificate::from_der(&leaf).unwrap();
        let san = leaf.subject_alternative_name().unwrap().unwrap();
        assert!(san.critical);
        assert_eq!(san.value.general_names, [GeneralName::URI("spiffe://cluster.local/ns/demo/sa/client")]);
        assert!(leaf.key_usage().unwrap().unwrap().value.digital_signature());
        let extended = leaf.extended_key_usage().unwrap().unwrap().value;
        assert!(extended.client_auth && extended.server_auth && !leaf.is_ca());
        assert_eq!(leaf.subject().iter().count(), 0);
    }

    #[test]
    fn ten_second_certificates_are_mostly_in_the_future() {
        let authority = SigningAuthority::generate("cluster.local").unwrap();
        let csr = Csr::generate(&identity()).unwrap();
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        for (ttl, backdate) in [(10, 1), (86_400, 120)] {
            let chain = authority.sign(&csr.pem, &identity(), Duration::from_secs(ttl), now).unwrap();
            let leaf = CertificateDer::from_pem_slice(chain[0].as_bytes()).unwrap();
            let validity = X509Certificate::from_der(&leaf).unwrap().1.validity().clone();
            assert_eq!(validity.not_before.timestamp(), 1_800_000_000 - backdate);
            assert_eq!(validity.not_after.timestamp(), 1_800_000_000 + i64::try_from(ttl).unwrap());
        }
    }

    #[test]
    fn a_reopened_folder_keeps_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let first = SigningAuthority::open(dir.path(), "cluster.local").unwrap();
        let second = SigningAuthority::open(dir.path(), "cluster.local").unwrap();
        assert_eq!(first.root_pem(), second.root_pem());
        let csr = Csr::generate(&identity()).unwrap();
        second.sign(&csr.pem, &identity(), Duration::from_secs(60), SystemTime::now()).unwrap();
        fs::write(dir.path().join(CA_CERT_FILE), "nonsense").unwrap();
        let text = SigningAuthority::open(dir.path(), "cluster.local").unwrap_err().to_string();
        assert!(text.contains("ca-cert.pem is not usable: expected a CA certificate in PEM"), "{text}");
    }

    #[test]
    fn refuses_nonsense_requests() {
        let authority = SigningAuthority::generate("cluster.local").unwrap();
        for bad in ["", "nonsense", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"] {
            let result = authority.sign(bad, &identity(), Duration::from_secs(60), SystemTime::now());
            assert!(matches!(result, Err(AuthorityError::Request(_))), "{bad}");
        }
    }
}
