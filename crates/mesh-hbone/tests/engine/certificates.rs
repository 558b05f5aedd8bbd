//! Two parties that trust each other, and nothing else.

use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig, crypto::aws_lc_rs, server::WebPkiClientVerifier, version::TLS13,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};

pub(crate) struct Parties {
    pub(crate) client: Arc<ClientConfig>,
    pub(crate) server: Arc<ServerConfig>,
}

pub(crate) fn name() -> ServerName<'static> {
    ServerName::try_from("server.test").expect("a name")
}

impl Parties {
    /// Mutual TLS 1.3 with `h2`, AES only, no tickets.
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = CertifiedIssuer::self_signed(params, key).expect("a CA");
        let mut roots = RootCertStore::empty();
        roots.add(ca.der().clone()).expect("a root");
        let roots = Arc::new(roots);
        let leaf = |name: &str| -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
            let key = KeyPair::generate().expect("a key");
            let params = CertificateParams::new(vec![name.to_owned()]).expect("a name");
            let certificate = params.signed_by(&key, &ca).expect("a certificate");
            (vec![certificate.der().clone()], PrivateKeyDer::try_from(key.serialize_der()).expect("PKCS 8"))
        };

        let mut provider = aws_lc_rs::default_provider();
        provider.cipher_suites.retain(|suite| {
            [rustls::CipherSuite::TLS13_AES_128_GCM_SHA256, rustls::CipherSuite::TLS13_AES_256_GCM_SHA384]
                .contains(&suite.suite())
        });
        let provider = Arc::new(provider);

        let (chain, key) = leaf("client.test");
        let client = ClientConfig::builder_with_provider(provider.clone()).with_protocol_versions(&[&TLS13]);
        let client = client.expect("TLS 1.3").with_root_certificates(roots.clone());
        let mut client = client.with_client_auth_cert(chain, key).expect("a certificate and its key");
        client.alpn_protocols = vec![b"h2".to_vec()];

        let (chain, key) = leaf("server.test");
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone()).build().expect("a root");
        let server = ServerConfig::builder_with_provider(provider).with_protocol_versions(&[&TLS13]);
        let server = server.expect("TLS 1.3").with_client_cert_verifier(verifier);
        let mut server = server.with_single_cert(chain, key).expect("a certificate and its key");
        server.alpn_protocols = vec![b"h2".to_vec()];
        server.send_tls13_tickets = 0;
        Self { client: Arc::new(client), server: Arc::new(server) }
    }
}
