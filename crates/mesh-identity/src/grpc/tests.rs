use std::time::SystemTime;

use proto::ca::{
    IstioCertificateResponse,
    istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer},
};
use rustls::{ServerConfig, SupportedProtocolVersion};
use rustls_pki_types::PrivateKeyDer;
use tokio_rustls::TlsAcceptor;
use tonic::Response;

use super::*;
use crate::{Config, Manager, Priority, authority::SigningAuthority};

/// Signs whom the metadata names, if the token is right.
struct Ca(Arc<SigningAuthority>);

#[tonic::async_trait]
impl IstioCertificateService for Ca {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        if request.metadata().get("authorization").is_none_or(|v| v != "Bearer secret") {
            return Err(Status::unauthenticated("who are you?"));
        }
        let body = request.into_inner();
        let fields = body.metadata.unwrap_or_default().fields;
        let Some(prost_types::value::Kind::StringValue(identity)) =
            fields.get("ImpersonatedIdentity").and_then(|v| v.kind.clone())
        else {
            return Err(Status::invalid_argument("no identity"));
        };
        let ttl = Duration::from_secs(body.validity_duration.unsigned_abs());
        let cert_chain = self.0.sign(&body.csr, &identity.parse().unwrap(), ttl, SystemTime::now()).unwrap();
        Ok(Response::new(IstioCertificateResponse { cert_chain }))
    }
}

async fn serve(authority: Arc<SigningAuthority>) -> std::net::SocketAddr {
    serve_by(authority, ControlTls::default(), &rustls::version::TLS13).await
}

async fn serve_by(
    authority: Arc<SigningAuthority>,
    tls: ControlTls,
    version: &'static SupportedProtocolVersion,
) -> std::net::SocketAddr {
    let server =
        authority.server_certificate(&["istiod.test".to_owned()], Duration::from_secs(600), SystemTime::now()).unwrap();
    let config = ServerConfig::builder_with_provider(control_client(tls).0)
        .with_protocol_versions(&[version])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(server.chain, PrivateKeyDer::clone_key(&server.key))
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let incoming = async_incoming(listener, acceptor);
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(IstioCertificateServiceServer::new(Ca(authority)))
            .serve_with_incoming(incoming),
    );
    address
}

fn async_incoming(
    listener: tokio::net::TcpListener,
    acceptor: TlsAcceptor,
) -> impl tokio_stream::Stream<Item = io::Result<tokio::io::DuplexStream>> {
    futures_util::stream::unfold((listener, acceptor), |(listener, acceptor)| async move {
        let (tcp, _) = listener.accept().await.ok()?;
        // tonic knows no TLS streams of others, but it knows duplex ones.
        let (near, mut far) = tokio::io::duplex(1 << 16);
        let accepting = acceptor.accept(tcp);
        tokio::spawn(async move {
            let mut tls = accepting.await?;
            tokio::io::copy_bidirectional(&mut tls, &mut far).await
        });
        Some((Ok(near), (listener, acceptor)))
    })
}

fn config(address: std::net::SocketAddr, authority: &SigningAuthority, token: TokenSource) -> GrpcCaConfig {
    GrpcCaConfig {
        server: ControlPlane {
            address: format!("https://{address}"),
            roots: RootSource::Pem(authority.root_pem().to_owned()),
            token,
            headers: vec![("ClusterID".to_owned(), "Kubernetes".to_owned())],
            alternative_name: Some("istiod.test".to_owned()),
            tls: ControlTls::default(),
        },
        ttl: Duration::from_secs(600),
        impersonate: true,
    }
}

#[tokio::test]
async fn fetches_a_certificate_and_reads_the_token_anew_each_time() {
    let authority = Arc::new(SigningAuthority::generate("cluster.local").unwrap());
    let address = serve(authority.clone()).await;
    let dir = tempfile::tempdir().unwrap();
    let token = dir.path().join("token");
    std::fs::write(&token, "wrong\n").unwrap();
    let ca = GrpcCa::new(config(address, &authority, TokenSource::File(token.clone()))).unwrap();
    let identity = Identity::new("cluster.local", "demo", "client");
    let csr = crate::csr::Csr::generate(&identity).unwrap().pem;
    let refused = ca.sign(&identity, csr).await.unwrap_err();
    assert!(refused.to_string().contains("who are you?"), "{refused}");

    std::fs::write(&token, "secret\n").unwrap();
    let (manager, task) = Manager::new(Config::default(), Arc::new(ca));
    let task = tokio::spawn(task);
    let svid = manager.certificate(&identity, Priority::RealTime).await.unwrap();
    assert_eq!(svid.identity, identity);
    drop(manager);
    task.await.unwrap();
}

#[tokio::test]
async fn a_changed_file_of_roots_decides_about_the_next_request() {
    let authority = Arc::new(SigningAuthority::generate("cluster.local").unwrap());
    let stranger = SigningAuthority::generate("cluster.local").unwrap();
    let address = serve(authority.clone()).await;
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root-cert.pem");
    let mut config = config(address, &authority, TokenSource::Literal("secret".to_owned()));
    config.server.roots = RootSource::File(root.clone());
    let ca = GrpcCa::new(config).unwrap();
    let identity = Identity::new("cluster.local", "demo", "client");
    let sign = async || ca.sign(&identity, crate::csr::Csr::generate(&identity).unwrap().pem).await;
    for (pem, trusted) in
        [(authority.root_pem(), true), (stranger.root_pem(), false), (authority.root_pem(), true), ("", true)]
    {
        std::fs::write(&root, pem).unwrap();
        assert_eq!(sign().await.is_ok(), trusted, "{pem}");
    }
}

#[tokio::test]
async fn a_ca_with_tls_12_only_is_reached_when_that_is_allowed() {
    let authority = Arc::new(SigningAuthority::generate("cluster.local").unwrap());
    let allowed = ControlTls { tls12: true, ..ControlTls::default() };
    let address = serve_by(authority.clone(), allowed, &rustls::version::TLS12).await;
    let identity = Identity::new("cluster.local", "demo", "client");
    for tls in [allowed, ControlTls::default()] {
        let mut config = config(address, &authority, TokenSource::Literal("secret".to_owned()));
        config.server.tls = tls;
        let ca = GrpcCa::new(config).unwrap();
        let signed = ca.sign(&identity, crate::csr::Csr::generate(&identity).unwrap().pem).await;
        assert_eq!(signed.is_ok(), tls == allowed && crate::tls::HAS_TLS12);
    }
}

#[tokio::test]
async fn says_which_root_or_name_did_not_fit() {
    let authority = Arc::new(SigningAuthority::generate("cluster.local").unwrap());
    let stranger = SigningAuthority::generate("cluster.local").unwrap();
    let address = serve(authority.clone()).await;
    let identity = Identity::new("cluster.local", "demo", "client");
    let ca = GrpcCa::new(config(address, &stranger, TokenSource::None)).unwrap();
    let error = ca.sign(&identity, String::new()).await.unwrap_err().to_string();
    assert!(error.contains("cannot reach the CA at https://127.0.0.1") && error.contains("certificate"), "{error}");
    let mut bad = config(address, &authority, TokenSource::None);
    bad.server.address = "not an address".to_owned();
    assert!(GrpcCa::new(bad).unwrap_err().to_string().contains("address `not an address` is not usable"));
}
