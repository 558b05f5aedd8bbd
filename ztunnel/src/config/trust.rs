//! Whom to believe, by which cryptography, and where keys may stay.

use std::{path::PathBuf, sync::Arc};

use mesh_identity::{Compliance, ControlTls, tls::HAS_TLS12};
use mesh_runtime::env::Reader;
use serde::Serialize;

use super::{Config, debug};

#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Trust {
    /// Revocation lists, followed.
    pub crl_path: Option<PathBuf>,
    #[serde(serialize_with = "debug")]
    pub compliance: Compliance,
    /// TLS 1.2 towards control plane and CA; tunnels stay with 1.3.
    pub control_tls12: bool,
    /// Where certificates and keys outlive a restart; nowhere when unset.
    pub keys_dir: Option<PathBuf>,
}

impl Config {
    /// Our trust domain under all its names.
    pub fn trust_domains(&self) -> Vec<Arc<str>> {
        std::iter::once(self.trust_domain.as_str().into()).chain(self.trust_domain_aliases.iter().cloned()).collect()
    }
}

impl Trust {
    /// How control plane and CA are spoken to.
    pub fn control_tls(&self) -> ControlTls {
        ControlTls { compliance: self.compliance, tls12: self.control_tls12 }
    }

    pub(super) fn read(r: &Reader<'_>) -> Self {
        if r.bool("FAKE_CA", false) {
            r.problem(
                "FAKE_CA",
                "true",
                "unset or false: certificates that anyone can make prove nothing; see CA_ADDRESS",
            );
        }
        let compliance = compliance(r);
        let control_tls12 = r.bool("TLS12_ENABLED", false);
        if control_tls12 && compliance == Compliance::Pqc {
            r.problem("TLS12_ENABLED", "true", "unset with COMPLIANCE_POLICY=pqc: X25519MLKEM768 needs TLS 1.3");
        }
        if control_tls12 && !HAS_TLS12 {
            r.problem("TLS12_ENABLED", "true", "unset: this build's cryptography has TLS 1.3 only");
        }
        Self {
            crl_path: r.optional("CRL_PATH").map(PathBuf::from),
            compliance,
            control_tls12,
            keys_dir: r.optional("FAIRWAY_KEYS_DIR").map(PathBuf::from),
        }
    }
}

fn compliance(r: &Reader<'_>) -> Compliance {
    match r.string("COMPLIANCE_POLICY", "").as_str() {
        "" => Compliance::None,
        "pqc" => Compliance::Pqc,
        other => {
            r.problem("COMPLIANCE_POLICY", other, "empty or pqc");
            Compliance::None
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn read(vars: &[(&str, &str)]) -> Result<Trust, String> {
        let base = [("PROXY_MODE", "dedicated"), ("PROXY_WORKLOAD_INFO", "demo/test/test")];
        let vars = base.iter().chain(vars).map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        let vars: HashMap<String, String> = vars.collect();
        Config::from_env(&vars).map(|config| config.trust).map_err(|problems| problems.to_string())
    }

    #[test]
    fn what_cannot_be_kept_is_refused_with_what_would_be_right() {
        let text = read(&[("FAKE_CA", "true"), ("COMPLIANCE_POLICY", "fips-140-2")]).unwrap_err();
        for part in ["FAKE_CA", "unset or false", "COMPLIANCE_POLICY", "fips-140-2", "empty or pqc"] {
            assert!(text.contains(part), "{part} missing from {text}");
        }
        let text = read(&[("COMPLIANCE_POLICY", "pqc"), ("TLS12_ENABLED", "true")]).unwrap_err();
        assert!(text.contains("needs TLS 1.3"), "{text}");
    }

    #[test]
    fn the_rest_is_taken() {
        let trust = read(&[("FAKE_CA", "false"), ("COMPLIANCE_POLICY", "pqc"), ("CRL_PATH", "/crl/ca-crl.pem")]);
        let trust = trust.unwrap();
        assert_eq!(trust.compliance, Compliance::Pqc);
        assert_eq!(trust.crl_path.as_deref(), Some(std::path::Path::new("/crl/ca-crl.pem")));
        assert!(read(&[("TLS12_ENABLED", "true")]).unwrap().control_tls12);
    }
}
