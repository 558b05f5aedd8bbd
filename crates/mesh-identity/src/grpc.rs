//! The certificate service of a control plane: `istio.v1.auth.IstioCertificateService` over TLS.

use std::{
    io,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use mesh_core::identity::Identity;
use proto::ca::{IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient};
use rustls::{
    ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::{
    Request, Status,
    metadata::{AsciiMetadataKey, AsciiMetadataValue, MetadataMap},
    transport::{Channel, Endpoint, Uri},
};

use crate::{
    ca::{BoxFuture, CaClient, CaError},
    tls::{ControlTls, control_client},
};

/// For one request, connecting included.
const DEADLINE: Duration = Duration::from_secs(15);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Where distributions keep the machine's trust roots.
const SYSTEM_ROOTS: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// The roots that the CA's serving certificate must lead to.
#[derive(Clone, Debug)]
pub enum RootSource {
    /// Read again at each connect, so that a rotated file needs no restart.
    File(PathBuf),
    Pem(String),
    System,
}

/// The token that says who we are.
#[derive(Clone, Debug)]
pub enum TokenSource {
    /// Read again for each request: kubelet rotates it.
    File(PathBuf),
    Literal(String),
    None,
}

/// A control plane's address and how to trust it and be trusted; CA and discovery are reached alike.
#[derive(Clone, Debug)]
pub struct ControlPlane {
    /// `host:port`, with or without `https://`.
    pub address: String,
    pub roots: RootSource,
    pub token: TokenSource,
    /// Further request metadata.
    pub headers: Vec<(String, String)>,
    /// Accepted when the serving certificate does not name the address's host.
    pub alternative_name: Option<String>,
    pub tls: ControlTls,
}

/// An address, header or name in the configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{what} `{value}` is not usable: expected {expected}")]
pub struct ControlPlaneError {
    pub what: &'static str,
    pub value: String,
    pub expected: &'static str,
}

impl ControlPlane {
    /// A channel that connects at first need, and again after a loss. Must be called within a runtime.
    ///
    /// # Errors
    /// Names what in the configuration cannot be used.
    pub fn channel(&self) -> Result<Channel, ControlPlaneError> {
        let (endpoint, dialer) = self.endpoint()?;
        Ok(endpoint.connect_with_connector_lazy(tower::service_fn(move |uri: Uri| dialer.clone().connect(uri))))
    }

    /// A channel whose first connection has been made, for a stream that would rather know why there is none.
    ///
    /// # Errors
    /// What in the configuration cannot be used, or why the connection failed, as the error's cause.
    pub async fn connect(&self) -> Result<Channel, Box<dyn std::error::Error + Send + Sync>> {
        let (endpoint, dialer) = self.endpoint()?;
        let connector = tower::service_fn(move |uri: Uri| dialer.clone().connect(uri));
        Ok(endpoint.connect_with_connector(connector).await?)
    }

    fn endpoint(&self) -> Result<(Endpoint, Dialer), ControlPlaneError> {
        let invalid = |what, value: &str, expected| ControlPlaneError { what, value: value.to_owned(), expected };
        let address = || invalid("control plane address", &self.address, "host:port");
        let bare = self.address.strip_prefix("https://").unwrap_or(&self.address).trim_end_matches('/');
        // TLS is the connector's business; tonic, built without TLS, wants the plain scheme.
        let uri: Uri = format!("http://{bare}").parse().map_err(|_| address())?;
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
        let name = ServerName::try_from(host).map_err(|_| address())?;
        let alternative = self.alternative_name.as_ref().map(|name| {
            ServerName::try_from(name.clone()).map_err(|_| invalid("alternative server name", name, "a host name"))
        });
        for (key, value) in &self.headers {
            header(key, value).ok_or_else(|| invalid("header", key, "an ASCII name and value"))?;
        }
        let endpoint = Endpoint::from(uri)
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(Duration::from_secs(30))
            .keep_alive_timeout(Duration::from_secs(10))
            .keep_alive_while_idle(true);
        let alternative = alternative.transpose()?;
        Ok((endpoint, Dialer { roots: self.roots.clone(), name, alternative, tls: self.tls }))
    }

    /// What goes with each request: the headers, and the token as it is now.
    ///
    /// # Errors
    /// When the token cannot be read or sent.
    pub fn metadata(&self) -> Result<MetadataMap, CaError> {
        let mut metadata = MetadataMap::new();
        for (key, value) in self.headers.iter().filter_map(|(key, value)| header(key, value)) {
            metadata.insert(key, value);
        }
        if let Some(token) = self.token()? {
            let value = format!("Bearer {token}").parse().map_err(|_| CaError::MalformedToken)?;
            metadata.insert("authorization", value);
        }
        Ok(metadata)
    }

    fn token(&self) -> Result<Option<String>, CaError> {
        let path = match &self.token {
            TokenSource::None => return Ok(None),
            TokenSource::Literal(token) => return Ok(Some(token.clone())),
            TokenSource::File(path) => path,
        };
        let name = || path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|source| CaError::Token { path: name(), source })?;
        match text.trim() {
            "" => Err(CaError::EmptyToken(name())),
            token => Ok(Some(token.to_owned())),
        }
    }
}

#[derive(Clone, Debug)]
pub struct GrpcCaConfig {
    pub server: ControlPlane,
    /// Requested life of certificates.
    pub ttl: Duration,
    /// Name the identity in the request's metadata (a node proxy asks on behalf of pods); otherwise the token decides.
    pub impersonate: bool,
}

/// A [`CaClient`] over gRPC.
#[derive(Clone, Debug)]
pub struct GrpcCa {
    config: Arc<GrpcCaConfig>,
    connection: Arc<Mutex<Connection>>,
}

#[derive(Debug)]
struct Connection {
    channel: Channel,
    /// The file of roots when the channel was made; unknown before the first request.
    roots: Option<Vec<u8>>,
}

impl GrpcCa {
    /// Does not connect yet; must be called within a runtime.
    ///
    /// # Errors
    /// Names what in the configuration cannot be used.
    pub fn new(config: GrpcCaConfig) -> Result<Self, ControlPlaneError> {
        let channel = config.server.channel()?;
        Ok(Self { config: Arc::new(config), connection: Arc::new(Mutex::new(Connection { channel, roots: None })) })
    }

    /// The channel, or a new one when the file of roots is another since: what was dialled under the old ones is not trusted on their
    /// word. A file that cannot be read, or holds no root, changes nothing yet.
    async fn channel(&self) -> Channel {
        let roots = match &self.config.server.roots {
            RootSource::Pem(_) => None,
            source => source.pem().await.ok().filter(|pem| !certificates(pem).is_empty()),
        };
        let connection = &mut *self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        let replaced = roots.is_some() && connection.roots.is_some() && roots != connection.roots;
        if replaced && let Ok(channel) = self.config.server.channel() {
            tracing::info!(address = self.config.server.address, "the CA's trust roots have changed; connecting anew");
            connection.channel = channel;
        }
        let before = connection.roots.take();
        connection.roots = roots.or(before);
        connection.channel.clone()
    }

    async fn request(&self, identity: Identity, csr: String) -> Result<Vec<String>, CaError> {
        let body = IstioCertificateRequest {
            csr,
            validity_duration: i64::try_from(self.config.ttl.as_secs()).unwrap_or(i64::MAX),
            metadata: self.config.impersonate.then(|| impersonated(&identity)),
        };
        let mut request = Request::new(body);
        *request.metadata_mut() = self.config.server.metadata()?;
        let mut client = IstioCertificateServiceClient::new(self.channel().await);
        match tokio::time::timeout(DEADLINE, client.create_certificate(request)).await {
            Ok(Ok(answer)) => Ok(answer.into_inner().cert_chain),
            Ok(Err(status)) => Err(self.explain(&status)),
            Err(_) => Err(CaError::Timeout(DEADLINE)),
        }
    }

    fn explain(&self, status: &Status) -> CaError {
        // A status with a source was made on this side, by the transport.
        let Some(mut cause) = std::error::Error::source(status) else {
            return CaError::Refused(format!("{:?}: {}", status.code(), status.message()));
        };
        while let Some(deeper) = cause.source() {
            cause = deeper;
        }
        CaError::Unreachable { address: self.config.server.address.clone(), cause: cause.to_string() }
    }
}

impl CaClient for GrpcCa {
    fn sign(&self, identity: &Identity, csr_pem: String) -> BoxFuture<'_, Result<Vec<String>, CaError>> {
        Box::pin(self.request(identity.clone(), csr_pem))
    }
}

fn impersonated(identity: &Identity) -> prost_types::Struct {
    let value = prost_types::Value { kind: Some(prost_types::value::Kind::StringValue(identity.to_string())) };
    prost_types::Struct { fields: [("ImpersonatedIdentity".to_owned(), value)].into() }
}

fn header(key: &str, value: &str) -> Option<(AsciiMetadataKey, AsciiMetadataValue)> {
    Some((key.to_ascii_lowercase().parse().ok()?, value.parse().ok()?))
}

/// Dials TCP and TLS, with the roots as they are now.
#[derive(Clone, Debug)]
struct Dialer {
    roots: RootSource,
    name: ServerName<'static>,
    alternative: Option<ServerName<'static>>,
    tls: ControlTls,
}

impl Dialer {
    async fn connect(self, uri: Uri) -> io::Result<TokioIo<TlsStream<TcpStream>>> {
        self.dial(&uri).await.map(TokioIo::new)
    }

    async fn dial(&self, uri: &Uri) -> io::Result<TlsStream<TcpStream>> {
        let config = self.tls().await?;
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
        let dial = async {
            let tcp = TcpStream::connect((host, uri.port_u16().unwrap_or(443))).await?;
            tcp.set_nodelay(true)?;
            TlsConnector::from(config).connect(self.name.clone(), tcp).await
        };
        tokio::time::timeout(CONNECT_TIMEOUT, dial).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
    }

    async fn tls(&self) -> io::Result<Arc<ClientConfig>> {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(self.roots().await?);
        let (provider, versions) = control_client(self.tls);
        let strict = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build();
        let strict = strict.map_err(|_| io::Error::other(format!("no usable root in {:?}", self.roots)))?;
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .expect("the provider has suites of each version")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(EitherName { strict, alternative: self.alternative.clone() }))
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }

    async fn roots(&self) -> io::Result<Vec<CertificateDer<'static>>> {
        Ok(certificates(&self.roots.pem().await?))
    }
}

impl RootSource {
    async fn pem(&self) -> io::Result<Vec<u8>> {
        match self {
            Self::Pem(pem) => Ok(pem.clone().into_bytes()),
            Self::File(path) => tokio::fs::read(path)
                .await
                .map_err(|e| io::Error::new(e.kind(), format!("cannot read trust roots {}: {e}", path.display()))),
            Self::System => system_roots().await,
        }
    }
}

fn certificates(pem: &[u8]) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_slice_iter(pem).filter_map(Result::ok).collect()
}

async fn system_roots() -> io::Result<Vec<u8>> {
    for path in SYSTEM_ROOTS {
        if let Ok(pem) = tokio::fs::read(path).await {
            return Ok(pem);
        }
    }
    Err(io::Error::new(io::ErrorKind::NotFound, format!("no system trust roots at {}", SYSTEM_ROOTS.join(", "))))
}

/// Accepts the dialled name, or the alternative one.
#[derive(Debug)]
struct EitherName {
    strict: Arc<WebPkiServerVerifier>,
    alternative: Option<ServerName<'static>>,
}

impl ServerCertVerifier for EitherName {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let first = self.strict.verify_server_cert(leaf, intermediates, name, ocsp, now);
        match (&first, &self.alternative) {
            (Err(_), Some(other)) => self.strict.verify_server_cert(leaf, intermediates, other, ocsp, now).or(first),
            _ => first,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.strict.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.strict.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.strict.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests;
