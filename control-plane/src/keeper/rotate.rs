//! A new root without an outage, in three steps, each of which takes effect without a restart.
//!
//! | step | signs | clients trust | then wait until |
//! |---|---|---|---|
//! | `prepare` | old | old and new | every proxy has renewed its certificates, and with them what it trusts |
//! | `switch` | new | old and new | the same again: nobody has a certificate of the old one left |
//! | `finish` | new | new | |

use std::collections::BTreeMap;

use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::{Api, api::PostParams};
use mesh_identity::authority::{AuthorityError, SigningAuthority};

use super::{KeeperError, secret, within};

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

/// Takes a step on the Secret of `namespace`; what to do then.
pub(crate) async fn rotate(
    api: &Api<Secret>,
    namespace: &str,
    step: Step,
    trust_domain: &str,
) -> Result<&'static str, RotateError> {
    let found = within(api.get_opt(secret::NAME)).await.map_err(RotateError::ApiServer)?;
    let mut kept = found.ok_or_else(|| RotateError::NoSecret { namespace: namespace.to_owned() })?;
    let made = SigningAuthority::generate(trust_domain)?;
    kept.data = Some(advance(kept.data.unwrap_or_default(), step, &made)?);
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

/// The Secret after a step; `made` is the CA that a preparation introduces.
fn advance(mut data: Data, step: Step, made: &SigningAuthority) -> Result<Data, RotateError> {
    let stage = Stage::of(&data);
    let bytes = |pem: &str| ByteString(pem.as_bytes().to_vec());
    match (stage, step) {
        (Stage::Steady, Step::Prepare) => {
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

    #[test]
    fn each_step_comes_after_the_one_before_and_leaves_a_usable_ca() {
        let (old, new) = (SigningAuthority::generate("a").unwrap(), SigningAuthority::generate("a").unwrap());
        let mut kept = secret::secret("istio-system", &old);
        let steps = [(Step::Prepare, &old, 2), (Step::Switch, &new, 2), (Step::Finish, &new, 1)];
        for (i, (step, signs, trusted)) in steps.into_iter().enumerate() {
            let data = kept.data.clone().unwrap();
            for (other, ..) in steps.iter().filter(|(other, ..)| *other != step) {
                let error = advance(data.clone(), *other, &new).unwrap_err().to_string();
                assert!(
                    error.contains("the next step is") && error.contains(&format!("{step:?}").to_lowercase()),
                    "{error}"
                );
            }
            let data = advance(data, step, &new).unwrap();
            assert_eq!(roots(&data), trusted, "step {i}");
            kept.data = Some(data);
            let authority = secret::authority(&kept, SystemTime::now()).unwrap();
            assert_eq!(authority.certificate_pem().trim(), signs.certificate_pem().trim(), "step {i}");
            let identity = mesh_core::identity::Identity::new("a", "demo", "web");
            let csr = Csr::generate(&identity).unwrap().pem;
            let ttl = std::time::Duration::from_secs(60);
            assert_eq!(authority.sign(&csr, &identity, ttl, SystemTime::now()).unwrap().len(), 2, "step {i}");
        }
        let first = [CERTIFICATE, KEY, ROOTS, super::super::CHAIN, "key.pem"];
        let names: Vec<&str> = kept.data.as_ref().unwrap().keys().map(String::as_str).collect();
        assert!(names.iter().all(|name| first.contains(name)), "nothing is left behind: {names:?}");
    }
}
