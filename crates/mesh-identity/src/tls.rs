//! TLS configurations: version 1.3 only (RFC 8446), both sides certified, ALPN `h2`, no resumption (a resumed session would not
//! verify the peer again). Built once per certificate generation and shared by every connection.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr},
    sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError},
};

use mesh_core::identity::Identity;
use rustls::{
    ClientConfig, RootCertStore, ServerConfig, SignatureScheme,
    client::{ResolvesClientCert, Resumption},
    crypto::CryptoProvider,
    server::{ClientHello, NoServerSessionStorage, ResolvesServerCert},
    sign::CertifiedKey,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};

use crate::{
    svid::{Svid, SvidError},
    verify::{ClientVerifier, ServerVerifier},
};

/// Sets of accepted identities remembered per certificate; beyond it the cache starts over.
const MAX_CLIENT_CONFIGS: usize = 1024;

static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| Arc::new(build_provider()));

#[cfg(not(feature = "boring"))]
fn build_provider() -> CryptoProvider {
    use rustls::crypto::aws_lc_rs::{self, cipher_suite};
    let cipher_suites = vec![cipher_suite::TLS13_AES_256_GCM_SHA384, cipher_suite::TLS13_AES_128_GCM_SHA256];
    CryptoProvider { cipher_suites, ..aws_lc_rs::default_provider() }
}

#[cfg(feature = "boring")]
fn build_provider() -> CryptoProvider {
    use boring_rustls_provider::tls13;
    use rustls::SupportedCipherSuite::Tls13;
    boring_rustls_provider::provider_with_ciphers(vec![
        Tls13(&tls13::AES_256_GCM_SHA384),
        Tls13(&tls13::AES_128_GCM_SHA256),
    ])
}

/// The cryptography every configuration here uses.
pub fn provider() -> Arc<CryptoProvider> {
    PROVIDER.clone()
}

/// What a client names its server: nothing. Identities decide, no SNI is sent.
pub fn peer_name() -> ServerName<'static> {
    ServerName::IpAddress(IpAddr::V4(Ipv4Addr::UNSPECIFIED).into())
}

/// The configuration for accepting tunnels as `svid`: clients must be workloads of its trust domain.
pub fn server_config(svid: &Arc<Svid>) -> Arc<ServerConfig> {
    svid.configs.server.get_or_init(|| Arc::new(build_server(svid))).clone()
}

/// The configuration for opening tunnels as `svid` to a server that must be one of `accepted`.
pub fn client_config(svid: &Arc<Svid>, accepted: &Arc<[Identity]>) -> Arc<ClientConfig> {
    let mut clients = svid.configs.clients.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(config) = clients.get(accepted) {
        return config.clone();
    }
    if clients.len() >= MAX_CLIENT_CONFIGS {
        clients.clear();
    }
    let config = Arc::new(build_client(svid, accepted));
    clients.insert(accepted.clone(), config.clone());
    config
}

/// Configurations made of one certificate, and what they share.
pub(crate) struct ConfigCache {
    certified: Arc<CertifiedKey>,
    roots: Arc<RootCertStore>,
    client_verifier: Arc<ClientVerifier>,
    server: OnceLock<Arc<ServerConfig>>,
    clients: Mutex<HashMap<Arc<[Identity]>, Arc<ClientConfig>>>,
}

impl ConfigCache {
    /// # Errors
    /// When the key is not usable or not the leaf's, or no root is.
    pub(crate) fn new(
        trust_domain: &Arc<str>,
        chain: &[CertificateDer<'static>],
        key: &PrivatePkcs8KeyDer<'static>,
        roots: &[CertificateDer<'static>],
    ) -> Result<Self, SvidError> {
        let key = PrivateKeyDer::from(key.clone_key());
        let certified = CertifiedKey::from_der(chain.to_vec(), key, &PROVIDER).map_err(|_| SvidError::WrongKey)?;
        let mut store = RootCertStore::empty();
        store.add_parsable_certificates(roots.iter().cloned());
        let roots = Arc::new(store);
        let verifier = ClientVerifier::new(roots.clone(), trust_domain.clone(), provider());
        Ok(Self {
            certified: Arc::new(certified),
            roots,
            client_verifier: Arc::new(verifier.map_err(|_| SvidError::NoRoot)?),
            server: OnceLock::new(),
            clients: Mutex::default(),
        })
    }
}

fn build_server(svid: &Svid) -> ServerConfig {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider has TLS 1.3 suites")
        .with_client_cert_verifier(svid.configs.client_verifier.clone())
        .with_cert_resolver(Arc::new(Own(svid.configs.certified.clone())));
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config
}

fn build_client(svid: &Svid, accepted: &Arc<[Identity]>) -> ClientConfig {
    let verifier =
        ServerVerifier { roots: svid.configs.roots.clone(), accepted: accepted.clone(), provider: provider() };
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider has TLS 1.3 suites")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(Own(svid.configs.certified.clone())));
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    config
}

/// Our one certificate, whatever the peer asks for.
#[derive(Debug)]
struct Own(Arc<CertifiedKey>);

impl ResolvesServerCert for Own {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
}

impl ResolvesClientCert for Own {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio_rustls::{TlsAcceptor, TlsConnector};

    use super::*;
    use crate::{authority::SigningAuthority, svid::tests::issue};

    const HOUR: Duration = Duration::from_secs(3600);

    fn identity(name: &str) -> Identity {
        Identity::new("cluster.local", "demo", name)
    }

    /// Both sides' results: the client's error text, and the server's view of who came.
    async fn handshake(
        client: &Arc<Svid>,
        accepted: &[Identity],
        server: &Arc<Svid>,
    ) -> (Option<String>, Result<Identity, String>) {
        let (near, far) = tokio::io::duplex(1 << 16);
        let connector = TlsConnector::from(client_config(client, &accepted.to_vec().into()));
        let acceptor = TlsAcceptor::from(server_config(server));
        let dialling = async {
            let mut stream = connector.connect(peer_name(), near).await?;
            stream.write_all(b"x").await?;
            // Only now is the server's verdict on us in.
            stream.read(&mut [0]).await
        };
        let accepting = async {
            let mut stream = acceptor.accept(far).await.map_err(|e| e.to_string())?;
            stream.read(&mut [0]).await.map_err(|e| e.to_string())?;
            stream.write_all(b"y").await.map_err(|e| e.to_string())?;
            let (_, connection) = stream.get_ref();
            assert_eq!(connection.alpn_protocol(), Some(&b"h2"[..]));
            crate::peer_identity(connection.peer_certificates().unwrap()).ok_or_else(|| "nobody".to_owned())
        };
        let (client, server) = tokio::join!(dialling, accepting);
        (client.err().map(|e| e.to_string()), server)
    }

    #[tokio::test]
    async fn each_side_learns_whom_the_other_speaks_for() {
        let authority = SigningAuthority::generate("cluster.local").unwrap();
        let (client, server) =
            (issue(&authority, &identity("client"), HOUR), issue(&authority, &identity("server"), HOUR));
        let spawned =
            tokio::spawn(async move { handshake(&client, &[identity("other"), identity("server")], &server).await });
        assert_eq!(spawned.await.unwrap(), (None, Ok(identity("client"))));
    }

    #[tokio::test]
    async fn a_server_that_is_not_accepted_is_named_in_the_error() {
        let authority = SigningAuthority::generate("cluster.local").unwrap();
        let (client, server) =
            (issue(&authority, &identity("client"), HOUR), issue(&authority, &identity("server"), HOUR));
        let (error, seen) = handshake(&client, &[identity("other")], &server).await;
        let text = error.unwrap();
        let wanted = "identity verification error: peer did not present the expected SAN \
                      (spiffe://cluster.local/ns/demo/sa/other), got spiffe://cluster.local/ns/demo/sa/server";
        assert!(text.contains(wanted), "{text}");
        assert!(seen.is_err());
    }

    #[tokio::test]
    async fn clients_from_another_trust_domain_or_root_are_refused() {
        let authority = SigningAuthority::generate("cluster.local").unwrap();
        let stranger = SigningAuthority::generate("cluster.local").unwrap();
        let server = issue(&authority, &identity("server"), HOUR);
        let foreign = issue(&authority, &Identity::new("elsewhere", "demo", "client"), HOUR);
        let (_, seen) = handshake(&foreign, &[identity("server")], &server).await;
        let text = seen.unwrap_err();
        assert!(
            text.contains("expected trustdomain (cluster.local), got spiffe://elsewhere/ns/demo/sa/client"),
            "{text}"
        );
        let unknown = issue(&stranger, &identity("client"), HOUR);
        assert!(handshake(&unknown, &[identity("server")], &server).await.1.is_err());
    }

    #[test]
    fn configurations_are_built_once_per_certificate() {
        let authority = SigningAuthority::generate("cluster.local").unwrap();
        let svid = issue(&authority, &identity("client"), HOUR);
        assert!(Arc::ptr_eq(&server_config(&svid), &server_config(&svid)));
        let accepted: Arc<[Identity]> = vec![identity("a")].into();
        let again: Arc<[Identity]> = vec![identity("a")].into();
        assert!(Arc::ptr_eq(&client_config(&svid, &accepted), &client_config(&svid, &again)));
    }
}
