//! A new root without an outage, in three steps, each of which takes effect without a restart.
//!
//! | step | signs | clients trust | then wait until |
//! |---|---|---|---|
//! | `prepare` | old | old and new | every proxy has renewed its certificates, and with them what it trusts |
//! | `switch` | new | old and new | the same again: nobody has a certificate of the old one left |
//! | `finish` | new | new | |

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::{Api, api::PostParams};
use mesh_identity::authority::{AuthorityError, SigningAuthority};
use rustls_pki_types::{CertificateDer, pem::PemObject as _};
use x509_parser::prelude::{GeneralName, X509Certificate};

use super::{KeeperError, folder, secret, within};

/// The CA to come, until it signs.
const NEXT_CERTIFICATE: &str = "next-ca-cert.pem";
const NEXT_KEY: &str = "next-ca-key.pem";
/// The root that is on its way out.
const OLD_CERTIFICATE: &str = "old-ca-cert.pem";
const CERTIFICATE: &str = super::LAYOUTS[0][0];
const KEY: &str = super::LAYOUTS[0][1];
const ROOTS: &str = super::LAYOUTS[0][2];

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Step {
    /// Make a new CA, and have clients trust its root as well.
    Prepare,
    /// Have the new CA sign.
    Switch,
    /// Have clients trust the new root only.
    Finish,
}

/// Where a rotation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Steady,
    Prepared,
    Switched,
}

/// Why a step is not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RotateError {
    #[error("{step:?} does not come now: {stands}")]
    OutOfOrder { step: Step, stands: &'static str },
    #[error(
        "a CA is mounted at {folder} and comes before the Secret, which signs nothing: rotate what is mounted, in the same three steps (both roots in its root bundle; then the new key and certificates; then the new root alone)",
        folder = folder.display()
    )]
    Mounted { folder: PathBuf },
    #[error(
        "{CERTIFICATE} names no trust domain: expected a URI like spiffe://DOMAIN, or an organisation; replace the CA by hand in the same three steps, with a new one that has it"
    )]
    NoTrustDomain,
    #[error("Secret {namespace}/{name} does not exist; there is nothing to rotate", name = secret::NAME)]
    NoSecret { namespace: String },
    #[error("what the Secret holds, or would hold, is not usable")]
    Content(#[from] KeeperError),
    #[error("no new CA can be made")]
    Make(#[from] AuthorityError),
    #[error("the Secret cannot be read or written: {0}")]
    ApiServer(String),
}

type Data = BTreeMap<String, ByteString>;

impl Stage {
    fn of(data: &Data) -> Self {
        match () {
            () if data.contains_key(NEXT_KEY) => Self::Prepared,
            () if data.contains_key(OLD_CERTIFICATE) => Self::Switched,
            () => Self::Steady,
        }
    }

    fn stands(self) -> &'static str {
        match self {
            Self::Steady => "no rotation is under way; the next step is prepare",
            Self::Prepared => "a new CA is prepared and does not sign yet; the next step is switch",
            Self::Switched => "the new CA signs and the old root is still trusted; the next step is finish",
        }
    }
}

/// Takes a step on the Secret of `namespace`, unless a CA is mounted at `folder`; what to do then.
pub(crate) async fn rotate(
    api: &Api<Secret>,
    namespace: &str,
    step: Step,
    folder: &Path,
) -> Result<&'static str, RotateError> {
    if folder::is_mounted(folder) {
        return Err(RotateError::Mounted { folder: folder.to_owned() });
    }
    let found = within(api.get_opt(secret::NAME)).await.map_err(RotateError::ApiServer)?;
    let mut kept = found.ok_or_else(|| RotateError::NoSecret { namespace: namespace.to_owned() })?;
    kept.data = Some(advance(kept.data.unwrap_or_default(), step)?);
    secret::authority(&kept, std::time::SystemTime::now())?;
    // With the version that was read: of two who rotate at once, one fails.
    within(api.replace(secret::NAME, &PostParams::default(), &kept)).await.map_err(RotateError::ApiServer)?;
    Ok(match step {
        Step::Prepare => {
            "the new root is being published; once every proxy has renewed its certificates (half of --workload-cert-ttl), take step switch"
        }
        Step::Switch => {
            "the new CA signs; once no certificate of the old one is left (--workload-cert-ttl), take step finish"
        }
        Step::Finish => "the old root is gone; the rotation is complete",
    })
}

/// Of the certificate that is being replaced: ours names it as SPIFFE does, Istio's as its organisation.
fn trust_domain(data: &Data) -> Result<String, RotateError> {
    let pem = data.get(CERTIFICATE).ok_or(KeeperError::Missing(CERTIFICATE))?;
    let der = CertificateDer::from_pem_slice(&pem.0).map_err(|_| RotateError::NoTrustDomain)?;
    let (_, certificate) = x509_parser::parse_x509_certificate(&der).map_err(|_| RotateError::NoTrustDomain)?;
    let named =
        spiffe(&certificate).or_else(|| certificate.subject().iter_organization().find_map(|o| o.as_str().ok()));
    named.filter(|domain| !domain.is_empty()).map(str::to_owned).ok_or(RotateError::NoTrustDomain)
}

fn spiffe<'a>(certificate: &'a X509Certificate<'_>) -> Option<&'a str> {
    let names = &certificate.subject_alternative_name().ok()??.value.general_names;
    let uris = names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => uri.strip_prefix("spiffe://"),
        _ => None,
    });
    uris.filter_map(|rest| rest.split('/').next()).next()
}

/// The Secret after a step.
fn advance(mut data: Data, step: Step) -> Result<Data, RotateError> {
    let stage = Stage::of(&data);
    let bytes = |pem: &str| ByteString(pem.as_bytes().to_vec());
    match (stage, step) {
        (Stage::Steady, Step::Prepare) => {
            let made = SigningAuthority::generate(&trust_domain(&data)?)?;
            let roots = data.get(ROOTS).filter(|roots| !roots.0.is_empty()).or_else(|| data.get(CERTIFICATE));
            let roots = roots.map(|roots| String::from_utf8_lossy(&roots.0).into_owned()).unwrap_or_default();
            data.insert(ROOTS.to_owned(), bytes(&format!("{}\n{}", roots.trim_end(), made.root_pem())));
            data.insert(NEXT_CERTIFICATE.to_owned(), bytes(made.certificate_pem()));
            data.insert(NEXT_KEY.to_owned(), bytes(made.key_pem()));
        }
        (Stage::Prepared, Step::Switch) => {
            for (next, now) in [(NEXT_CERTIFICATE, CERTIFICATE), (NEXT_KEY, KEY)] {
                let part = data.remove(next).ok_or(KeeperError::Missing(next))?;
                let before = data.insert(now.to_owned(), part);
                if now == CERTIFICATE {
                    data.extend(before.map(|before| (OLD_CERTIFICATE.to_owned(), before)));
                }
            }
            // It led to the old root.
            data.insert(super::CHAIN.to_owned(), ByteString::default());
        }
        (Stage::Switched, Step::Finish) => {
            data.remove(OLD_CERTIFICATE);
            let own = data.get(CERTIFICATE).cloned().ok_or(KeeperError::Missing(CERTIFICATE))?;
            data.insert(ROOTS.to_owned(), own);
        }
        _ => return Err(RotateError::OutOfOrder { step, stands: stage.stands() }),
    }
    Ok(data)
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use mesh_identity::csr::Csr;

    use super::*;

    fn roots(data: &Data) -> usize {
        String::from_utf8_lossy(&data[ROOTS].0).matches("BEGIN CERTIFICATE").count()
    }

    /// The CA that signs.
    fn signer(kept: &Secret) -> SigningAuthority {
        secret::authority(kept, SystemTime::now()).unwrap()
    }

    #[test]
    fn each_step_comes_after_the_one_before_and_leaves_a_usable_ca() {
        let old = SigningAuthority::generate("a").unwrap();
        let mut kept = secret::secret("istio-system", &old);
        let steps = [(Step::Prepare, true, 2), (Step::Switch, false, 2), (Step::Finish, false, 1)];
        for (i, (step, old_signs, trusted)) in steps.into_iter().enumerate() {
            let data = kept.data.clone().unwrap();
            for (other, ..) in steps.iter().filter(|(other, ..)| *other != step) {
                let error = advance(data.clone(), *other).unwrap_err().to_string();
                assert!(
                    error.contains("the next step is") && error.contains(&format!("{step:?}").to_lowercase()),
                    "{error}"
                );
            }
            let data = advance(data, step).unwrap();
            assert_eq!(roots(&data), trusted, "step {i}");
            assert_eq!(trust_domain(&data).unwrap(), "a", "step {i}");
            kept.data = Some(data);
            let authority = signer(&kept);
            let is_old = authority.certificate_pem().trim() == old.certificate_pem().trim();
            assert_eq!(is_old, old_signs, "step {i}");
            let identity = mesh_core::identity::Identity::new("a", "demo", "web");
            let csr = Csr::generate(&identity).unwrap().pem;
            let ttl = std::time::Duration::from_secs(60);
            assert_eq!(authority.sign(&csr, &identity, ttl, SystemTime::now()).unwrap().len(), 2, "step {i}");
        }
        let first = [CERTIFICATE, KEY, ROOTS, super::super::CHAIN, "key.pem"];
        let names: Vec<&str> = kept.data.as_ref().unwrap().keys().map(String::as_str).collect();
        assert!(names.iter().all(|name| first.contains(name)), "nothing is left behind: {names:?}");
    }

    #[test]
    fn the_new_root_is_of_the_trust_domain_that_the_old_one_names() {
        use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, SanType};

        let data = |organisation: Option<&str>, uri: Option<&str>| {
            let mut params = CertificateParams::default();
            params.distinguished_name = DistinguishedName::new();
            if let Some(organisation) = organisation {
                params.distinguished_name.push(DnType::OrganizationName, organisation);
            }
            params.subject_alt_names = uri.map(|uri| SanType::URI(uri.try_into().unwrap())).into_iter().collect();
            let pem = params.self_signed(&KeyPair::generate().unwrap()).unwrap().pem();
            Data::from([(CERTIFICATE.to_owned(), ByteString(pem.into_bytes()))])
        };
        let table = [
            (Some("old.example"), None, Some("old.example")),
            (None, Some("spiffe://td.example"), Some("td.example")),
            (Some("Example Ltd"), Some("spiffe://td.example/ns/x"), Some("td.example")),
            (Some("old.example"), Some("https://td.example"), Some("old.example")),
            (None, None, None),
            (Some(""), None, None),
        ];
        for (organisation, uri, expected) in table {
            let named = trust_domain(&data(organisation, uri)).ok();
            assert_eq!(named.as_deref(), expected, "{organisation:?} {uri:?}");
        }
        for unreadable in [Data::new(), Data::from([(CERTIFICATE.to_owned(), ByteString(b"nonsense".to_vec()))])] {
            assert!(trust_domain(&unreadable).is_err());
        }
    }

    #[tokio::test]
    async fn nothing_is_rotated_where_a_mounted_ca_comes_before_the_secret() {
        let mount = tempfile::tempdir().unwrap();
        std::fs::write(mount.path().join("tls.key"), "").unwrap();
        let nobody = tower::service_fn(|_: http::Request<kube::client::Body>| async {
            Err::<http::Response<kube::client::Body>, _>(std::io::Error::other("nothing is to be asked"))
        });
        let api = Api::namespaced(kube::Client::new(nobody, "istio-system"), "istio-system");
        let told = rotate(&api, "istio-system", Step::Prepare, mount.path()).await.unwrap_err().to_string();
        assert!(told.contains("comes before the Secret") && told.contains("rotate what is mounted"), "{told}");
        let told = rotate(&api, "istio-system", Step::Prepare, &mount.path().join("nowhere")).await.unwrap_err();
        assert!(told.to_string().contains("nothing is to be asked"), "{told}");
    }
}
