//! Node tokens: who a caller is. An ES256 JWT (RFC 7519) with the claims of a Kubernetes bound service-account token.

use std::{
    fs,
    io::{self, Write as _},
    net::IpAddr,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use mesh_runtime::telemetry::error_chain;
use mesh_xds::server::Caller;
use serde::{Deserialize, Serialize};

use crate::callers::{NotBelieved, Tokens};

pub(crate) const TOKEN_KEY_FILE: &str = "token-key.pem";
pub(crate) const AUDIENCE: &str = "istio-ca";
const ISSUER: &str = "fairwayd";

/// What a token says of its bearer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    pub node: String,
    pub namespace: String,
    pub service_account: String,
    pub pod: String,
    pub pod_uid: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Claims {
    aud: Vec<String>,
    iss: String,
    iat: u64,
    exp: u64,
    sub: String,
    #[serde(rename = "kubernetes.io")]
    bound: Bound,
}

#[derive(Debug, Serialize, Deserialize)]
struct Bound {
    namespace: String,
    serviceaccount: Named,
    pod: Named,
    node: Named,
}

#[derive(Debug, Serialize, Deserialize)]
struct Named {
    name: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    uid: String,
}

#[derive(Debug, thiserror::Error)]
pub enum TokenKeyError {
    #[error("cannot {verb} {path}", path = path.display())]
    File {
        verb: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path} is not usable: expected a P-256 private key in PKCS #8 PEM", path = path.display())]
    Content {
        path: PathBuf,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("the token cannot be signed")]
    Sign(#[source] jsonwebtoken::errors::Error),
}

/// Why a bearer is not believed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TokenError {
    #[error("the token does not verify")]
    Invalid(#[from] jsonwebtoken::errors::Error),
    #[error("the token is bound to no node")]
    NoNode,
    #[error("the token's subject `{0}` and its bound service account differ")]
    Subject(String),
}

/// Signs tokens and verifies them.
pub struct TokenKey {
    encoding: EncodingKey,
    decoding: DecodingKey,
}

impl std::fmt::Debug for TokenKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenKey").finish_non_exhaustive()
    }
}

impl TokenKey {
    /// Reads the key in `state`, after making one if there is none.
    ///
    /// # Errors
    /// Names the file and what is wrong with it.
    pub fn open(state: &Path) -> Result<Self, TokenKeyError> {
        let path = state.join(TOKEN_KEY_FILE);
        let pem = match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => create(state, &path)?,
            read => read.map_err(|source| TokenKeyError::File { verb: "read", path: path.clone(), source })?,
        };
        Self::from_pem(&pem).map_err(|source| TokenKeyError::Content { path, source })
    }

    fn from_pem(pem: &str) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        let public = rcgen::KeyPair::from_pem(pem)?.public_key_pem();
        Ok(Self {
            encoding: EncodingKey::from_ec_pem(pem.as_bytes())?,
            decoding: DecodingKey::from_ec_pem(public.as_bytes())?,
        })
    }

    /// # Errors
    /// When signing fails.
    pub fn issue(&self, subject: &Subject, ttl: Duration, now: SystemTime) -> Result<String, TokenKeyError> {
        let iat = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let Subject { node, namespace, service_account, pod, pod_uid } = subject.clone();
        let named = |name| Named { name, uid: String::new() };
        let claims = Claims {
            aud: vec![AUDIENCE.to_owned()],
            iss: ISSUER.to_owned(),
            iat: iat.as_secs(),
            exp: iat.saturating_add(ttl).as_secs(),
            sub: account_subject(&namespace, &service_account),
            bound: Bound {
                namespace,
                serviceaccount: named(service_account),
                pod: Named { name: pod, uid: pod_uid },
                node: named(node),
            },
        };
        jsonwebtoken::encode(&Header::new(Algorithm::ES256), &claims, &self.encoding).map_err(TokenKeyError::Sign)
    }

    /// Who the bearer is. Signature, audience, issuer and expiry must all be right (RFC 8725 §3.1, §3.8, §3.9).
    pub(crate) fn verify(&self, token: &str) -> Result<Caller, TokenError> {
        let mut validation = Validation::new(Algorithm::ES256);
        validation.set_audience(&[AUDIENCE]);
        validation.set_issuer(&[ISSUER]);
        validation.set_required_spec_claims(&["exp", "aud", "iss"]);
        let Claims { sub, bound, .. } = jsonwebtoken::decode::<Claims>(token, &self.decoding, &validation)?.claims;
        if bound.node.name.is_empty() {
            return Err(TokenError::NoNode);
        }
        if sub != account_subject(&bound.namespace, &bound.serviceaccount.name) {
            return Err(TokenError::Subject(sub));
        }
        let shared = |text: String| -> Arc<str> { text.into() };
        Ok(Caller {
            node: shared(bound.node.name),
            namespace: shared(bound.namespace),
            service_account: shared(bound.serviceaccount.name),
            pod: shared(bound.pod.name),
        })
    }
}

impl Tokens for TokenKey {
    fn bearer<'a>(
        &'a self,
        token: &'a str,
        _: IpAddr,
    ) -> Pin<Box<dyn Future<Output = Result<Caller, NotBelieved>> + Send + 'a>> {
        let believed = self.verify(token).map_err(|error| NotBelieved::Refused(error_chain(&error)));
        Box::pin(std::future::ready(believed))
    }
}

pub(crate) fn account_subject(namespace: &str, service_account: &str) -> String {
    format!("system:serviceaccount:{namespace}:{service_account}")
}

/// Makes a key appear at `path` whole or not at all, so that `run` and `token` may start at the same time. Not by `whole_file`, which
/// replaces: here the first who comes wins.
fn create(state: &Path, path: &Path) -> Result<String, TokenKeyError> {
    let failed = |verb: &'static str, path: &Path| {
        let path = path.to_owned();
        move |source| TokenKeyError::File { verb, path, source }
    };
    let key = rcgen::KeyPair::generate()
        .map_err(|source| TokenKeyError::Content { path: path.to_owned(), source: source.into() })?;
    fs::create_dir_all(state).map_err(failed("create", state))?;
    let draft = state.join(format!(".{TOKEN_KEY_FILE}.{}", rand::random::<u64>()));
    let open = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft);
    open.and_then(|mut file| file.write_all(key.serialize_pem().as_bytes())).map_err(failed("write", &draft))?;
    let linked = fs::hard_link(&draft, path);
    fs::remove_file(&draft).map_err(failed("remove", &draft))?;
    match linked {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed("create", path)(error)),
        _ => {}
    }
    fs::read_to_string(path).map_err(failed("read", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject() -> Subject {
        let own = str::to_owned;
        Subject {
            node: own("n1"),
            namespace: own("istio-system"),
            service_account: own("ztunnel"),
            pod: own("z-1"),
            pod_uid: own("u1"),
        }
    }

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn a_token_says_who_bears_it_and_outlives_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let token = TokenKey::open(dir.path()).unwrap().issue(&subject(), HOUR, SystemTime::now()).unwrap();
        let caller = TokenKey::open(dir.path()).unwrap().verify(&token).unwrap();
        assert_eq!((&*caller.node, &*caller.service_account, &*caller.pod), ("n1", "ztunnel", "z-1"));
    }

    #[test]
    fn forged_foreign_and_expired_tokens_are_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let key = TokenKey::open(dir.path()).unwrap();
        let other = tempfile::tempdir().unwrap();
        let foreign = TokenKey::open(other.path()).unwrap().issue(&subject(), HOUR, SystemTime::now()).unwrap();
        let expired = key.issue(&subject(), HOUR, SystemTime::now() - 3 * HOUR).unwrap();
        let no_node = key.issue(&Subject { node: String::new(), ..subject() }, HOUR, SystemTime::now()).unwrap();
        let good = key.issue(&subject(), HOUR, SystemTime::now()).unwrap();
        let unsigned = good.rsplit_once('.').unwrap().0.to_owned() + ".";
        for (case, token) in [
            ("foreign", foreign),
            ("expired", expired),
            ("no node", no_node),
            ("unsigned", unsigned),
            ("garbage", "a.b.c".into()),
        ] {
            assert!(key.verify(&token).is_err(), "{case}");
        }
    }

    #[test]
    fn the_key_is_for_its_owner_only() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        TokenKey::open(dir.path()).unwrap();
        let mode = fs::metadata(dir.path().join(TOKEN_KEY_FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn an_unusable_key_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(TOKEN_KEY_FILE), "nonsense").unwrap();
        let error = TokenKey::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("token-key.pem is not usable: expected a P-256 private key"), "{error}");
    }
}
