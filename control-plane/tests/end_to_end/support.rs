//! A node proxy's side of the control plane.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use hyper_util::rt::TokioIo;
use mesh_core::index::Resource;
use mesh_xds::{convert, delta::ClientType};
use proto::{
    ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL,
    ca::{IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient},
    core::Node,
    discovery::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse,
        aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
    },
};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject as _};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Status, Streaming,
    metadata::MetadataValue,
    transport::{Channel, Endpoint},
};

/// Far more than anything here takes; only keeps a failure from hanging.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) async fn admin(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

pub(crate) async fn ready(address: SocketAddr) {
    eventually("readiness", async || admin(address, "/healthz/ready").await.starts_with("HTTP/1.1 200")).await;
}

/// Asks until it is so.
pub(crate) async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let patience = tokio::time::Instant::now() + PATIENCE;
    while !is_so().await {
        assert!(tokio::time::Instant::now() < patience, "{what}: never");
        tokio::task::yield_now().await;
    }
}

pub(crate) async fn certificate(
    channel: Channel,
    token: Option<&str>,
    identity: Option<&str>,
    csr: String,
) -> Result<Vec<String>, Status> {
    let text = |s: &str| prost_types::Value { kind: Some(prost_types::value::Kind::StringValue(s.into())) };
    let metadata =
        identity.map(|id| prost_types::Struct { fields: BTreeMap::from([("ImpersonatedIdentity".into(), text(id))]) });
    let request = IstioCertificateRequest { csr, validity_duration: 3600, metadata };
    let request = with_token(Request::new(request), token);
    let mut client = IstioCertificateServiceClient::new(channel);
    client.create_certificate(request).await.map(|answer| answer.into_inner().cert_chain)
}

/// To the server that these roots vouch for.
pub(crate) async fn channel(address: SocketAddr, roots_pem: &[u8]) -> Channel {
    try_channel(address, roots_pem).await.unwrap()
}

pub(crate) async fn try_channel(address: SocketAddr, roots_pem: &[u8]) -> Result<Channel, tonic::transport::Error> {
    let mut roots = rustls::RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(roots_pem) {
        roots.add(root.unwrap()).unwrap();
    }
    let mut tls = rustls::ClientConfig::builder_with_provider(mesh_identity::tls::provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![b"h2".to_vec()];
    let tls = tokio_rustls::TlsConnector::from(Arc::new(tls));
    let connect = tower::service_fn(move |_| {
        let tls = tls.clone();
        async move {
            let name = ServerName::try_from("istiod.istio-system.svc").unwrap();
            let stream = tls.connect(name, TcpStream::connect(address).await?).await?;
            Ok::<_, std::io::Error>(TokioIo::new(stream))
        }
    });
    Endpoint::from_static("https://istiod.istio-system.svc:15012").connect_with_connector(connect).await
}

pub(crate) fn with_token<T>(mut request: Request<T>, token: Option<&str>) -> Request<T> {
    if let Some(token) = token {
        let value = MetadataValue::try_from(format!("Bearer {token}")).unwrap();
        request.metadata_mut().insert("authorization", value);
    }
    request
}

pub(crate) fn types() -> BTreeMap<&'static str, ClientType> {
    [ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL].map(|url| (url, ClientType::new(url))).into()
}

/// A node proxy's side of discovery.
pub(crate) struct NodeProxy {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
    pub(crate) types: BTreeMap<&'static str, ClientType>,
}

/// One response, understood.
#[derive(Debug, PartialEq)]
pub(crate) struct Received {
    pub(crate) names: BTreeSet<String>,
    pub(crate) removed: BTreeSet<String>,
}

impl NodeProxy {
    pub(crate) async fn connect(channel: Channel, token: &str, types: BTreeMap<&'static str, ClientType>) -> Self {
        let (requests, stream) = mpsc::channel(16);
        for kind in types.values() {
            let node = Node {
                id: "ztunnel~127.0.0.1~z.istio-system~istio-system.svc.cluster.local".into(),
                ..Node::default()
            };
            requests.send(kind.initial(node, [])).await.unwrap();
        }
        let mut client = AggregatedDiscoveryServiceClient::new(channel);
        let responses =
            client.delta_aggregated_resources(with_token(Request::new(ReceiverStream::new(stream)), Some(token)));
        let responses = responses.await.unwrap().into_inner();
        Self { requests, responses, types }
    }

    /// The next response, acknowledged.
    pub(crate) async fn receive(&mut self) -> (String, Received, Vec<Resource>) {
        let response = tokio::time::timeout(PATIENCE, self.responses.message()).await.unwrap().unwrap().unwrap();
        let kind = self.types.get_mut(response.type_url.as_str()).unwrap();
        kind.accepted(
            response.resources.iter().map(|r| (r.name.as_str(), r.version.as_str())),
            &response.removed_resources,
        );
        self.requests.send(kind.answer(&response, &[])).await.unwrap();
        let body = |r: &proto::discovery::Resource| r.resource.as_ref().unwrap().value.to_vec();
        let resources =
            response.resources.iter().map(|r| convert::resource_from_wire(&response.type_url, &body(r)).unwrap());
        let resources = resources.collect();
        let names = response.resources.iter().map(|r| r.name.clone()).collect();
        let removed = response.removed_resources.iter().cloned().collect();
        (response.type_url, Received { names, removed }, resources)
    }

    /// Both types' first answers.
    pub(crate) async fn initial(&mut self) -> BTreeMap<String, Received> {
        let (first, a, _) = self.receive().await;
        let (second, b, _) = self.receive().await;
        [(first, a), (second, b)].into()
    }
}
