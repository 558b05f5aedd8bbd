//! Where the CA's key is kept on Kubernetes, and which authority signs now.
//!
//! A mounted folder comes first; without one, a Secret, which is made when there is none. Either may change while we run.

pub(crate) mod secret;

use std::time::SystemTime;

use mesh_identity::authority::{AuthorityError, Material, SigningAuthority};

/// Names of the parts, in the order certificates, key, roots: Istio's, and those of cert-manager.
const LAYOUTS: [[&str; 3]; 2] = [["ca-cert.pem", "ca-key.pem", "root-cert.pem"], ["tls.crt", "tls.key", "ca.crt"]];
/// Istio's certificates above the CA's own.
const CHAIN: &str = "cert-chain.pem";

/// Why what is kept is not an authority.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    #[error(
        "`{0}` is missing or empty; expected ca-cert.pem, ca-key.pem and root-cert.pem, or tls.crt, tls.key and ca.crt"
    )]
    Missing(&'static str),
    #[error(transparent)]
    Authority(#[from] AuthorityError),
}

/// The authority that `part` holds by these names, if everything it signs `now` will be believed.
pub(crate) fn authority(
    part: impl Fn(&str) -> Option<String>,
    now: SystemTime,
) -> Result<SigningAuthority, KeeperError> {
    let part = |name: &str| part(name).filter(|text| !text.trim().is_empty());
    let layout = LAYOUTS.iter().find(|layout| part(layout[1]).is_some()).unwrap_or(&LAYOUTS[0]);
    let required = |name: &'static str| part(name).ok_or(KeeperError::Missing(name));
    let [certificates, key, roots] = *layout;
    let (own, key) = (required(certificates)?, required(key)?);
    // A self-signed CA of old may have left its root out: it is itself.
    let roots = part(roots).unwrap_or_else(|| own.clone());
    let chain = if layout == &LAYOUTS[0] { part(CHAIN).unwrap_or_default() } else { String::new() };
    let certificates = format!("{own}\n{chain}");
    let authority = SigningAuthority::from_pem(Material { certificates: &certificates, key: &key, roots: &roots })?;
    authority.check(now)?;
    Ok(authority)
}
