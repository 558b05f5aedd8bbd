//! TLS configurations: version 1.3 only (RFC 8446), both sides certified, ALPN `h2`, no resumption (a resumed session would not
//! verify the peer again). Built once per certificate generation and shared by every connection.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr},
    sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError},
};

use mesh_core::identity::Identity;
use rustls::{
    ClientConfig, NamedGroup, RootCertStore, ServerConfig, SignatureScheme, SupportedCipherSuite,
    SupportedProtocolVersion,
    client::{ResolvesClientCert, Resumption},
    crypto::CryptoProvider,
    server::{ClientHello, NoServerSessionStorage, ResolvesServerCert},
    sign::CertifiedKey,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};

use crate::{
    svid::{Svid, SvidError},
    trust::Trust,
    verify::{Anchors, ClientVerifier, ServerVerifier},
};

/// Sets of accepted identities remembered per certificate; beyond it the cache starts over.
const MAX_CLIENT_CONFIGS: usize = 1024;

static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| Arc::new(build_provider()));
static PQC_PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    let mut provider = build_provider();
    provider.kx_groups.retain(|group| group.name() == NamedGroup::X25519MLKEM768);
    Arc::new(provider)
});

/// Which key exchanges are allowed, `COMPLIANCE_POLICY` upstream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compliance {
    #[default]
    None,
    /// X25519MLKEM768 only: a recording made now stays secret from a quantum computer later.
    Pqc,
}

/// How control plane and CA are spoken to; tunnels are TLS 1.3 whatever this says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ControlTls {
    pub compliance: Compliance,
    /// TLS 1.2 too, for servers that have no other. Of no effect unless [`HAS_TLS12`].
    pub tls12: bool,
}

/// Whether this build can speak TLS 1.2 at all.
pub const HAS_TLS12: bool = cfg!(not(feature = "boring"));

/// A client towards the control plane, to be completed with a verifier.
pub(crate) fn control_client(tls: ControlTls) -> (Arc<CryptoProvider>, &'static [&'static SupportedProtocolVersion]) {
    use rustls::version::{TLS12, TLS13};
    static EITHER: [&SupportedProtocolVersion; 2] = [&TLS13, &TLS12];
    static STRICT: [&SupportedProtocolVersion; 1] = [&TLS13];
    if tls.tls12 && HAS_TLS12 {
        let mut provider = CryptoProvider::clone(&provider_of(tls.compliance));
        provider.cipher_suites.extend(tls12_suites());
        return (Arc::new(provider), &EITHER);
    }
    (provider_of(tls.compliance), &STRICT)
}

#[cfg(not(feature = "boring"))]
fn tls12_suites() -> Vec<SupportedCipherSuite> {
    use rustls::crypto::aws_lc_rs::cipher_suite::{
        TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
        TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
    };
    vec![
        TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
        TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
        TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
        TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
    ]
}

#[cfg(feature = "boring")]
fn tls12_suites() -> Vec<SupportedCipherSuite> {
    Vec::new()
}

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

/// The cryptography of every configuration, unless compliance asks for less.
pub fn provider() -> Arc<CryptoProvider> {
    PROVIDER.clone()
}

pub(crate) fn provider_of(compliance: Compliance) -> Arc<CryptoProvider> {
    match compliance {
        Compliance::None => PROVIDER.clone(),
        Compliance::Pqc => PQC_PROVIDER.clone(),
    }
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
    pub(crate) anchors: Arc<Anchors>,
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
        trust: Arc<Trust>,
    ) -> Result<Self, SvidError> {
        let key = PrivateKeyDer::from(key.clone_key());
        let certified =
            CertifiedKey::from_der(chain.to_vec(), key, &trust.provider).map_err(|_| SvidError::WrongKey)?;
        let mut store = RootCertStore::empty();
        store.add_parsable_certificates(roots.iter().cloned());
        if store.is_empty() {
            return Err(SvidError::NoRoot);
        }
        Ok(Self {
            certified: Arc::new(certified),
            anchors: Arc::new(Anchors { roots: store, trust, trust_domain: trust_domain.clone() }),
            server: OnceLock::new(),
            clients: Mutex::default(),
        })
    }
}

fn build_server(svid: &Svid) -> ServerConfig {
    let anchors = &svid.configs.anchors;
    let mut config = ServerConfig::builder_with_provider(anchors.trust.provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider has TLS 1.3 suites")
        .with_client_cert_verifier(Arc::new(ClientVerifier(anchors.clone())))
        .with_cert_resolver(Arc::new(Own(svid.configs.certified.clone())));
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config
}

fn build_client(svid: &Svid, accepted: &Arc<[Identity]>) -> ClientConfig {
    let anchors = &svid.configs.anchors;
    let verifier = ServerVerifier { anchors: anchors.clone(), accepted: accepted.clone() };
    let mut config = ClientConfig::builder_with_provider(anchors.trust.provider.clone())
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
    use crate::{
        Trust,
        authority::{SigningAuthority, tests::revocation_list},
        crl::Crls,
        svid::tests::{issue, issue_trusting},
    };

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
        handshake_with(client_config(client, &accepted.to_vec().into()), server).await
    }

    async fn handshake_with(
        config: Arc<ClientConfig>,
        server: &Arc<Svid>,
    ) -> (Option<String>, Result<Identity, String>) {
        let (near, far) = tokio::io::duplex(1 << 16);
        let connector = TlsConnector::from(config);
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
            assert!(connection.alpn_protocol().is_none_or(|chosen| chosen == b"h2"));
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

    #[tokio::test]
    async fn lists_that_come_after_the_configurations_count_on_both_sides() {
        let authority = SigningAuthority::generate("cluster.local").unwrap();
        let trusts = [Arc::new(Trust::default()), Arc::new(Trust::default())];
        let [client, server] = ["client", "server"].map(identity);
        let client = issue_trusting(&authority, &client, HOUR, trusts[0].clone());
        let server = issue_trusting(&authority, &server, HOUR, trusts[1].clone());
        let accepted = [identity("server")];
        assert_eq!(handshake(&client, &accepted, &server).await.0, None);
        for (trust, revoked) in trusts.iter().zip([&server, &client]) {
            let list = revocation_list(&authority, &revoked.chain[..1], std::time::SystemTime::now());
            trust.set_crls(Crls::parse(list.as_bytes()).unwrap());
            let (error, seen) = handshake(&client, &accepted, &server).await;
            assert!(error.is_some() && seen.is_err());
            trust.set_crls(Crls::default());
        }
        assert_eq!(handshake(&client, &accepted, &server).await.0, None);
    }

    #[tokio::test]
    async fn an_alias_of_our_trust_domain_is_as_good_as_its_name_and_no_other_domain_is() {
        let authority = SigningAuthority::generate("new.test").unwrap();
        let trust = Arc::new(Trust::new(vec!["new.test".into(), "old.test".into()], Compliance::None));
        let named = |domain, name| Identity::new(domain, "demo", name);
        let issue = |identity: Identity| issue_trusting(&authority, &identity, HOUR, trust.clone());
        let (old, new) = (issue(named("old.test", "a")), issue(named("new.test", "b")));
        for (client, server) in [(&old, &new), (&new, &old)] {
            let wanted = Identity::new("new.test", "demo", &*server.identity.service_account);
            assert_eq!(handshake(client, &[wanted], server).await, (None, Ok(client.identity.clone())));
        }
        let foreign = issue(named("foreign.test", "a"));
        assert!(handshake(&foreign, &[named("new.test", "b")], &new).await.1.is_err());
        assert!(handshake(&new, &[named("new.test", "a")], &foreign).await.0.is_some());
        assert!(handshake(&new, &[named("old.test", "b")], &old).await.0.is_some(), "another account");
    }

    #[tokio::test]
    async fn a_client_that_offers_no_alpn_is_welcome() {
        let authority = SigningAuthority::generate("cluster.local").unwrap();
        let (client, server) =
            (issue(&authority, &identity("client"), HOUR), issue(&authority, &identity("server"), HOUR));
        let mut silent = ClientConfig::clone(&client_config(&client, &vec![identity("server")].into()));
        silent.alpn_protocols.clear();
        assert_eq!(handshake_with(Arc::new(silent), &server).await, (None, Ok(identity("client"))));
    }

    #[tokio::test]
    async fn pqc_exchanges_keys_by_x25519mlkem768_and_nothing_else() {
        let authority = SigningAuthority::generate("cluster.local").unwrap();
        let pqc = Arc::new(Trust::new(Vec::new(), Compliance::Pqc));
        let strict = |name| issue_trusting(&authority, &identity(name), HOUR, pqc.clone());
        let (client, server) = (strict("client"), strict("server"));
        assert_eq!(handshake(&client, &[identity("server")], &server).await.0, None);
        let groups: Vec<_> = server_config(&server).crypto_provider().kx_groups.iter().map(|g| g.name()).collect();
        assert_eq!(groups, [NamedGroup::X25519MLKEM768]);
        let mut classic = build_provider();
        classic.kx_groups.retain(|group| group.name() != NamedGroup::X25519MLKEM768);
        let builder = ClientConfig::builder_with_provider(Arc::new(classic));
        let classic = builder
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        let refused = handshake_with(Arc::new(classic), &server).await.1.unwrap_err();
        assert!(refused.contains("NoKxGroupsInCommon"), "{refused}");
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
