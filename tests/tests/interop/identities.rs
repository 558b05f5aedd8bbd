//! One authority, and the certificates of both ends.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_core::identity::Identity;
use mesh_identity::{Svid, authority::SigningAuthority, csr::Csr};

const LIFETIME: Duration = Duration::from_secs(3600);

pub(crate) struct Identities(SigningAuthority);

impl Identities {
    pub(crate) fn generate() -> Self {
        Self(SigningAuthority::generate("cluster.local").unwrap())
    }

    /// For an end of ours.
    pub(crate) fn issue(&self, name: &str) -> Arc<Svid> {
        let (csr, chain) = self.sign(name);
        Arc::new(Svid::new(identity(name), csr.key, &chain, 1).unwrap())
    }

    /// For another program: `certificate.pem`, `key.pem` and `roots.pem` in `dir`.
    pub(crate) fn write(&self, name: &str, dir: &Path) {
        let (csr, chain) = self.sign(name);
        let key = rcgen::KeyPair::try_from(csr.key.secret_pkcs8_der()).unwrap();
        std::fs::write(dir.join("certificate.pem"), &chain[0]).unwrap();
        std::fs::write(dir.join("key.pem"), key.serialize_pem()).unwrap();
        std::fs::write(dir.join("roots.pem"), self.0.root_pem()).unwrap();
    }

    fn sign(&self, name: &str) -> (Csr, Vec<String>) {
        let csr = Csr::generate(&identity(name)).unwrap();
        let chain = self.0.sign(&csr.pem, &identity(name), LIFETIME, SystemTime::now()).unwrap();
        (csr, chain)
    }
}

pub(crate) fn identity(name: &str) -> Identity {
    Identity::new("cluster.local", "interop", name)
}
