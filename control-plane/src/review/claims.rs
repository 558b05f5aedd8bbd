//! What a token says of itself: nobody vouches for it, but what cannot be right need not be asked about.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use serde::Deserialize;

use super::Bearer;
use crate::token::{AUDIENCE, account_subject};

/// Longer ones are no tokens.
pub(super) const MAX_TOKEN: usize = 16 * 1024;

/// Claims of a Kubernetes bound token, from whatever issuer: an API server may believe several.
#[derive(Deserialize)]
struct Claims {
    aud: Audience,
    exp: u64,
    sub: String,
    #[serde(rename = "kubernetes.io")]
    bound: Bound,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Audience {
    One(String),
    Many(Vec<String>),
}

#[derive(Deserialize)]
struct Bound {
    namespace: Arc<str>,
    serviceaccount: Account,
    pod: Option<Pod>,
}

#[derive(Deserialize)]
struct Account {
    name: Arc<str>,
}

#[derive(Deserialize)]
struct Pod {
    name: Arc<str>,
    uid: Arc<str>,
}

/// Who bears the token, and when it ends, by its own word.
#[derive(Debug)]
pub(super) struct Claimed {
    pub(super) bearer: Bearer,
    pub(super) ends: SystemTime,
}

/// # Errors
/// Says why no API server would let it in here.
pub(super) fn read(token: &str) -> Result<Claimed, String> {
    if token.len() > MAX_TOKEN {
        return Err(format!("the token is longer than {MAX_TOKEN} bytes"));
    }
    let claims = jsonwebtoken::dangerous::insecure_decode::<Claims>(token);
    let Claims { aud, exp, sub, bound } =
        claims.map_err(|error| format!("the token is none of a service account: {error}"))?.claims;
    let is_ours = match &aud {
        Audience::One(audience) => audience == AUDIENCE,
        Audience::Many(audiences) => audiences.iter().any(|audience| audience == AUDIENCE),
    };
    if !is_ours {
        return Err(format!("the token is not meant for {AUDIENCE}"));
    }
    let Bound { namespace, serviceaccount: Account { name: service_account }, pod } = bound;
    if sub != account_subject(&namespace, &service_account) {
        return Err(format!("the token's subject is not {namespace}/{service_account}, which it is bound to"));
    }
    let Some(Pod { name: pod, uid: pod_uid }) = pod else {
        return Err(format!("the token of {sub} is bound to no pod"));
    };
    let ends = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(exp));
    let ends = ends.ok_or_else(|| "the token never ends".to_owned())?;
    Ok(Claimed { bearer: Bearer { namespace, service_account, pod, pod_uid }, ends })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn token(claims: &Value) -> String {
        let key = jsonwebtoken::EncodingKey::from_secret(b"x");
        jsonwebtoken::encode(&jsonwebtoken::Header::default(), claims, &key).unwrap()
    }

    fn claims() -> Value {
        json!({
            "aud": ["istio-ca", "other"], "exp": 4_102_444_800_u64, "iat": 1, "iss": "https://issuer",
            "sub": "system:serviceaccount:istio-system:ztunnel",
            "kubernetes.io": {
                "namespace": "istio-system", "node": {"name": "n1", "uid": "n"},
                "pod": {"name": "z-1", "uid": "u-1"}, "serviceaccount": {"name": "ztunnel", "uid": "s"},
            },
        })
    }

    #[test]
    fn a_bound_token_says_whose_it_is() {
        let Claimed { bearer, ends } = read(&token(&claims())).unwrap();
        assert_eq!((&*bearer.namespace, &*bearer.service_account), ("istio-system", "ztunnel"));
        assert_eq!((&*bearer.pod, &*bearer.pod_uid), ("z-1", "u-1"));
        assert_eq!(ends, SystemTime::UNIX_EPOCH + Duration::from_secs(4_102_444_800));
        let mut one = claims();
        one["aud"] = json!("istio-ca");
        assert!(read(&token(&one)).is_ok());
    }

    #[test]
    fn what_no_api_server_would_let_in_is_refused_by_its_own_word() {
        let table = [
            ("/aud", json!(["https://kubernetes.default.svc"]), "not meant for istio-ca"),
            ("/aud", json!([]), "not meant for istio-ca"),
            ("/aud", json!(null), "none of a service account"),
            ("/exp", json!(null), "none of a service account"),
            ("/exp", json!(u64::MAX), "never ends"),
            ("/sub", json!("system:node:n1"), "subject is not istio-system/ztunnel"),
            ("/sub", json!("system:serviceaccount:istio-system:other"), "subject is not istio-system/ztunnel"),
            ("/kubernetes.io", json!(null), "none of a service account"),
            ("/kubernetes.io/pod", json!(null), "bound to no pod"),
        ];
        for (at, value, told) in table {
            let mut claims = claims();
            *claims.pointer_mut(at).unwrap() = value;
            let error = read(&token(&claims)).unwrap_err();
            assert!(error.contains(told), "{at}: {error}");
        }
        for nonsense in ["", "a.b.c", "eyJhbGciOiJub25lIn0.e30.", &"x".repeat(MAX_TOKEN + 1)] {
            assert!(read(nonsense).is_err(), "{nonsense:.40}");
        }
    }
}
