//! Keys, certificates and TLS configurations of the two halves; the same for both engines.

use std::{fs, path::Path, sync::Arc};

use anyhow::Context as _;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, KeyPair,
};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::Resumption,
    crypto::{CryptoProvider, aws_lc_rs},
    server::{NoServerSessionStorage, WebPkiClientVerifier},
    version::TLS13,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};

const NAME: &str = "pair.test";
const FILES: [&str; 3] = ["root.der", "leaf.der", "key.der"];

/// One authority, and one certificate for both halves.
#[derive(Debug)]
pub struct Certificates {
    root: Vec<u8>,
    leaf: Vec<u8>,
    /// PKCS #8.
    key: Vec<u8>,
}

/// What the leaf is called.
pub fn server_name() -> ServerName<'static> {
    ServerName::try_from(NAME).expect("it is a DNS name")
}

impl Certificates {
    /// New ones.
    ///
    /// # Errors
    /// When the system has no randomness.
    pub fn generate() -> anyhow::Result<Self> {
        let mut authority = CertificateParams::default();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.distinguished_name = DistinguishedName::new();
        let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;
        let mut leaf = CertificateParams::new([NAME.to_owned()])?;
        leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let key = KeyPair::generate()?;
        let leaf = leaf.signed_by(&key, &authority)?;
        Ok(Self { root: authority.der().to_vec(), leaf: leaf.der().to_vec(), key: key.serialize_der() })
    }

    /// # Errors
    /// Those of the file system.
    pub fn write(&self, folder: &Path) -> anyhow::Result<()> {
        for (file, bytes) in FILES.iter().zip([&self.root, &self.leaf, &self.key]) {
            fs::write(folder.join(file), bytes)?;
        }
        Ok(())
    }

    /// # Errors
    /// Those of the file system.
    pub fn read(folder: &Path) -> anyhow::Result<Self> {
        let read = |file: &str| fs::read(folder.join(file)).with_context(|| format!("no {file}"));
        let [root, leaf, key] = FILES.map(read);
        Ok(Self { root: root?, leaf: leaf?, key: key? })
    }

    /// # Errors
    /// When the certificates cannot be used.
    pub fn client_config(&self) -> anyhow::Result<Arc<ClientConfig>> {
        let (chain, key) = self.own();
        let builder = ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13])?;
        let mut config = builder.with_root_certificates(self.roots()?).with_client_auth_cert(chain, key)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.resumption = Resumption::disabled();
        Ok(Arc::new(config))
    }

    /// # Errors
    /// When the certificates cannot be used.
    pub fn server_config(&self) -> anyhow::Result<Arc<ServerConfig>> {
        let (chain, key) = self.own();
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(self.roots()?), provider()).build()?;
        let builder = ServerConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13])?;
        let mut config = builder.with_client_cert_verifier(verifier).with_single_cert(chain, key)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(Arc::new(config))
    }

    fn own(&self) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        (vec![self.leaf.clone().into()], PrivatePkcs8KeyDer::from(self.key.clone()).into())
    }

    fn roots(&self) -> anyhow::Result<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots.add(self.root.clone().into())?;
        Ok(roots)
    }
}

fn provider() -> Arc<CryptoProvider> {
    let suites = vec![aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384];
    Arc::new(CryptoProvider { cipher_suites: suites, ..aws_lc_rs::default_provider() })
}
