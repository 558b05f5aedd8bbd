//! Where the API server is and how to speak to it.

use std::path::{Path, PathBuf};

use rustls_pki_types::{CertificateDer, pem::PemObject};
use serde::Deserialize;

use crate::base64;

/// What the plugin needs of the kubeconfig that the agent has written. In JSON: a reader of YAML would double the plugin.
#[derive(Debug, PartialEq, Eq)]
pub struct Kubeconfig {
    pub(super) server: Server,
    /// None: whoever answers is trusted, as SKIP_TLS_VERIFY asks for.
    pub(super) ca: Option<Vec<CertificateDer<'static>>>,
    pub(super) token: Option<String>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Server {
    pub(super) tls: bool,
    pub(super) host: String,
    pub(super) port: u16,
}

impl Kubeconfig {
    /// The file's place in the agent's run directory.
    pub fn path(run_dir: &Path) -> PathBuf {
        run_dir.join("fairway-cni-kubeconfig")
    }

    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let file: File = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        let [NamedCluster { cluster }] = file.clusters;
        let token = file.users.into_iter().next().and_then(|named| named.user.token);
        if token.as_ref().is_some_and(|token| token.bytes().any(|b| !b.is_ascii_graphic())) {
            return Err("the token is none".into());
        }
        let server =
            parse_server(&cluster.server).ok_or_else(|| format!("server `{}` is no address", cluster.server))?;
        let ca = match &cluster.certificate_authority_data {
            _ if cluster.insecure_skip_tls_verify => None,
            Some(data) => Some(certificates(data).ok_or("certificate-authority-data holds no certificate")?),
            None if server.tls => return Err("certificate-authority-data is missing".into()),
            None => None,
        };
        Ok(Self { server, ca, token })
    }
}

fn certificates(data: &str) -> Option<Vec<CertificateDer<'static>>> {
    let pem = base64::decode(data)?;
    let found: Vec<_> = CertificateDer::pem_slice_iter(&pem).collect::<Result<_, _>>().ok()?;
    (!found.is_empty()).then_some(found)
}

/// `https://HOST[:PORT]`, an IPv6 host in brackets.
fn parse_server(url: &str) -> Option<Server> {
    let (scheme, rest) = url.split_once("://")?;
    let (tls, usual) = match scheme {
        "https" => (true, 443),
        "http" => (false, 80),
        _ => return None,
    };
    let authority = rest.trim_end_matches('/');
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => rest.split_once(']').map(|(host, rest)| (host, rest.strip_prefix(':')))?,
        None => authority.split_once(':').map_or((authority, None), |(host, port)| (host, Some(port))),
    };
    let is_host = !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || b".-:".contains(&b));
    let port = port.map_or(Some(usual), |port| port.parse().ok())?;
    is_host.then(|| Server { tls, host: host.to_owned(), port })
}

#[derive(Deserialize)]
struct File {
    clusters: [NamedCluster; 1],
    #[serde(default)]
    users: Vec<NamedUser>,
}

#[derive(Deserialize)]
struct NamedCluster {
    cluster: Cluster,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Cluster {
    server: String,
    certificate_authority_data: Option<String>,
    #[serde(default)]
    insecure_skip_tls_verify: bool,
}

#[derive(Deserialize)]
struct NamedUser {
    user: User,
}

#[derive(Deserialize)]
struct User {
    token: Option<String>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    proptest! {
        #[test]
        fn no_file_makes_the_parser_panic(url in "(https?://)?[\\[\\]a-z0-9.:/-]{0,30}", token in "\\PC{0,8}") {
            let file = json!({"clusters": [{"cluster": {"server": url}}], "users": [{"user": {"token": token}}]});
            drop(Kubeconfig::parse(file.to_string().as_bytes()));
        }
    }

    #[test]
    fn servers_are_read_as_urls() {
        let server = |tls, host: &str, port| Some(Server { tls, host: host.into(), port });
        for (url, expected) in [
            ("https://10.96.0.1:443", server(true, "10.96.0.1", 443)),
            ("https://[fd00::1]:6443/", server(true, "fd00::1", 6443)),
            ("https://[fd00::1]", server(true, "fd00::1", 443)),
            ("http://kubernetes.default.svc", server(false, "kubernetes.default.svc", 80)),
            ("10.96.0.1:443", None),
            ("https://", None),
            ("https://a:b", None),
            ("https://a\r\nx: y", None),
        ] {
            assert_eq!(parse_server(url), expected, "{url}");
        }
    }
}
