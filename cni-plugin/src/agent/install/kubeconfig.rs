//! How the plugin reaches the API server while the agent is away: a kubeconfig, in JSON, which is YAML too.

use std::{
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use serde_json::json;

use crate::base64::encode;

/// What the agent's container has been given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credentials {
    pub host: String,
    pub port: u16,
    /// Holds `token`, and `ca.crt` unless `ca` says otherwise.
    pub service_account: PathBuf,
    pub ca: Option<PathBuf>,
    pub skip_verify: bool,
}

impl Credentials {
    /// The file's text with what the tokens are now.
    pub fn read(&self) -> io::Result<String> {
        let read =
            |path: &Path| fs::read(path).map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())));
        let token = read(&self.service_account.join("token"))?;
        let ca = self.ca.clone().unwrap_or_else(|| self.service_account.join("ca.crt"));
        let ca = if self.skip_verify { None } else { Some(read(&ca)?) };
        Ok(render(&self.server(), String::from_utf8_lossy(&token).trim(), ca.as_deref()))
    }

    fn server(&self) -> String {
        match self.host.parse() {
            Ok(IpAddr::V6(host)) => format!("https://[{host}]:{}", self.port),
            _ => format!("https://{}:{}", self.host, self.port),
        }
    }
}

fn render(server: &str, token: &str, ca: Option<&[u8]>) -> String {
    let trust = match ca {
        Some(ca) => json!({"server": server, "certificate-authority-data": encode(ca)}),
        None => json!({"server": server, "insecure-skip-tls-verify": true}),
    };
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "local", "cluster": trust}],
        "users": [{"name": "fairway-cni", "user": {"token": token}}],
        "contexts": [{"name": "fairway-cni-context", "context": {"cluster": "local", "user": "fairway-cni"}}],
        "current-context": "fairway-cni-context",
    });
    format!("{config:#}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_says_where_by_whom_and_whom_to_trust() {
        let dir = tempfile::tempdir().expect("temporary directory");
        fs::write(dir.path().join("token"), "t0ken\n").expect("write");
        let mut given = Credentials {
            host: "fd00::1".into(),
            port: 6443,
            service_account: dir.path().into(),
            ca: None,
            skip_verify: false,
        };
        let missing = given.read().expect_err("no ca.crt").to_string();
        assert!(missing.contains("ca.crt"), "{missing}");
        let ca = rcgen::generate_simple_self_signed(Vec::new()).expect("certificate").cert.pem();
        fs::write(dir.path().join("ca.crt"), &ca).expect("write");
        let text = given.read().expect("complete");
        for wanted in ["https://[fd00::1]:6443", "\"t0ken\"", &encode(ca.as_bytes()), "current-context"] {
            assert!(text.contains(wanted), "{wanted} is missing in {text}");
        }
        kube::config::Kubeconfig::from_yaml(&text).expect("others read it too");
        crate::lookup::Kubeconfig::parse(text.as_bytes()).expect("and so does the plugin");
        (given.host, given.skip_verify) = ("10.96.0.1".into(), true);
        let text = given.read().expect("complete");
        assert!(text.contains("https://10.96.0.1:6443") && text.contains("insecure-skip-tls-verify\": true"), "{text}");
    }
}
