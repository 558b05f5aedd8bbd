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
    let error = SigningAuthority::open(dir.path(), "cluster.local").unwrap_err();
    let text = mesh_runtime::telemetry::error_chain(&error);
    assert!(text.contains("the CA's certificate (ca-cert.pem, tls.crt) holds no certificate in PEM"), "{text}");
}

/// A root and what it vouches for: `depth` intermediates above the signing certificate, which comes first.
pub(crate) fn hierarchy(depth: usize, key: &KeyPair) -> (String, String) {
    let now = SystemTime::now();
    let params = |name: &str| {
        let mut params = validity(CertificateParams::default(), CA_LIFETIME, now);
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params
    };
    let (root, root_key) = (params("root"), KeyPair::generate().unwrap());
    let root_pem = root.self_signed(&root_key).unwrap().pem();
    let mut issuer = Issuer::new(root, root_key);
    let mut chain = Vec::new();
    for i in 0..depth {
        let (next, next_key) = (params(&format!("intermediate {i}")), KeyPair::generate().unwrap());
        chain.insert(0, next.signed_by(&next_key, &issuer).unwrap().pem());
        issuer = Issuer::new(next, next_key);
    }
    chain.insert(0, params("signing").signed_by(key, &issuer).unwrap().pem());
    (chain.concat(), root_pem)
}

#[test]
fn each_intermediate_is_an_element_of_the_chain_and_the_roots_are_the_last() {
    let key = KeyPair::generate().unwrap();
    let (certificates, root) = hierarchy(2, &key);
    let other = SigningAuthority::generate("other").unwrap();
    let roots = format!("# a comment\n{root}{}", other.root_pem());
    // Upstream's cert-chain.pem repeats the CA's own certificate, and may end with the root.
    let certificates = format!("{certificates}{certificates}{root}");
    let key = key.serialize_pem();
    let authority = SigningAuthority::from_pem(Material { certificates: &certificates, key: &key, roots: &roots });
    let authority = authority.unwrap();
    authority.check(SystemTime::now()).unwrap();
    let csr = Csr::generate(&identity()).unwrap();
    let chain = authority.sign(&csr.pem, &identity(), Duration::from_secs(60), SystemTime::now()).unwrap();
    let counts: Vec<usize> = chain.iter().map(|pem| pem.matches("BEGIN").count()).collect();
    assert_eq!(counts, [1, 1, 1, 1, 2], "leaf, signing, two intermediates, two roots");
    assert!(chain.iter().all(|pem| pem.ends_with("-----\n")));
}

/// As OpenSSL and Istio's self-signed CA write them.
#[test]
fn keys_of_every_form_are_read() {
    let rsa = include_str!("../../testdata/rsa-cert.pem");
    let ec = include_str!("../../testdata/ec-cert.pem");
    let table = [
        ("RSA, PKCS #1", include_str!("../../testdata/rsa-pkcs1-key.pem"), rsa),
        ("RSA, PKCS #8", include_str!("../../testdata/rsa-pkcs8-key.pem"), rsa),
        ("EC, SEC 1", include_str!("../../testdata/ec-sec1-key.pem"), ec),
    ];
    for (form, key, certificate) in table {
        let material = Material { certificates: certificate, key, roots: certificate };
        let authority = SigningAuthority::from_pem(material).unwrap_or_else(|error| panic!("{form}: {error}"));
        // The certificates of the test are valid from the day they were made.
        authority.check(authority.not_after() - Duration::from_secs(24 * 3600)).expect(form);
    }
}

#[test]
fn what_does_not_belong_together_is_found_out() {
    let (own, other) = (SigningAuthority::generate("a").unwrap(), SigningAuthority::generate("a").unwrap());
    let material = |key: &SigningAuthority, roots: &SigningAuthority| {
        let parts = Material { certificates: own.certificate_pem(), key: key.key_pem(), roots: roots.root_pem() };
        SigningAuthority::from_pem(parts).unwrap().check(SystemTime::now())
    };
    material(&own, &own).unwrap();
    assert!(matches!(material(&other, &own), Err(AuthorityError::Unbelievable(_))), "another key");
    assert!(matches!(material(&own, &other), Err(AuthorityError::Unbelievable(_))), "another root");
    let later = SystemTime::now() + CA_LIFETIME + BACKDATE;
    assert!(matches!(own.check(later), Err(AuthorityError::Expired)));
}

#[test]
fn nothing_signed_outlives_the_authority() {
    let authority = SigningAuthority::generate("a").unwrap();
    let csr = Csr::generate(&identity()).unwrap();
    let now = authority.not_after() - Duration::from_secs(100);
    let chain = authority.sign(&csr.pem, &identity(), Duration::from_secs(3600), now).unwrap();
    let leaf = CertificateDer::from_pem_slice(chain[0].as_bytes()).unwrap();
    assert!(not_after(&leaf).unwrap() <= authority.not_after());
}

#[test]
fn refuses_nonsense_requests() {
    let authority = SigningAuthority::generate("cluster.local").unwrap();
    for bad in ["", "nonsense", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"] {
        let result = authority.sign(bad, &identity(), Duration::from_secs(60), SystemTime::now());
        assert!(matches!(result, Err(AuthorityError::Request(_))), "{bad}");
    }
}
