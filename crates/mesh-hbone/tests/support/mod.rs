//! What the tests of whole tunnels share: certificates, transports with TLS on them, pools and the servers they reach.

#![allow(dead_code, reason = "each test binary uses a part")]

pub(crate) mod peer;
pub(crate) mod weather;

use std::{
    cell::{Cell, RefCell},
    future::Future,
    net::SocketAddr,
    rc::Rc,
    sync::{Arc, OnceLock},
    time::Duration,
};

use http::{HeaderMap, StatusCode};
use mesh_core::{headers::Authority, identity::Identity, reason::Reason};
use mesh_hbone::{
    Budget, ConnectRequest, Connector, Error, KeepAlive, LocalBoxFuture, Pool, PoolConfig, Secured, Settings,
    TunnelKey, TunnelStream,
    server::{self, Handler, Malformed, Request, Responder},
    tls::{self, Transport},
};
use mesh_runtime::drain::{self, DrainTrigger, DrainWatcher};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    crypto::{CryptoProvider, aws_lc_rs},
    server::{NoServerSessionStorage, ServerSessionMemoryCache, WebPkiClientVerifier},
    version::TLS13,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::{
    io::{DuplexStream, duplex},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::{LocalSet, spawn_local},
    time::timeout,
};

/// No test takes that long. On a paused clock it is over at once when nobody can go on.
const HANG: Duration = Duration::from_secs(7200);

/// Runs what spawns local tasks, and fails when nothing can go on any more.
pub(crate) async fn local<T>(test: impl Future<Output = T>) -> T {
    within(HANG, test).await
}

/// As [`local`] for real sockets, where the clock is real too.
pub(crate) async fn local_in_real_time<T>(test: impl Future<Output = T>) -> T {
    within(Duration::from_secs(120), test).await
}

async fn within<T>(limit: Duration, test: impl Future<Output = T>) -> T {
    let tasks = LocalSet::new();
    timeout(limit, tasks.run_until(test)).await.expect("everybody waits for somebody")
}

/// TLS configurations of both ends, under one authority. TLS 1.3 with AES, both ends verified, ALPN `h2`.
pub(crate) struct Tls {
    /// No resumption.
    pub(crate) client: Arc<ClientConfig>,
    /// As `client`, but remembers what it is given.
    pub(crate) client_resuming: Arc<ClientConfig>,
    /// No session tickets.
    pub(crate) server: Arc<ServerConfig>,
    pub(crate) server_with_tickets: Arc<ServerConfig>,
}

impl Tls {
    /// Of this process.
    pub(crate) fn get() -> &'static Self {
        static TLS: OnceLock<Tls> = OnceLock::new();
        TLS.get_or_init(Self::new)
    }

    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let leaf = |name: &str| {
            let key = KeyPair::generate().unwrap();
            let params = CertificateParams::new([name.to_owned()]).unwrap();
            let certificate: CertificateDer<'static> = params.signed_by(&key, &authority).unwrap().into();
            let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
            (vec![certificate], key)
        };
        let mut roots = RootCertStore::empty();
        roots.add(authority.der().clone()).unwrap();
        let roots = Arc::new(roots);

        let (chain, key) = leaf("client");
        let builder = ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13]).unwrap();
        let builder = builder.with_root_certificates(roots.clone());
        let mut client = builder.with_client_auth_cert(chain, key).unwrap();
        client.alpn_protocols = vec![b"h2".to_vec()];
        let client_resuming = Arc::new(client.clone());
        client.resumption = rustls::client::Resumption::disabled();

        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider()).build().unwrap();
        let (chain, key) = leaf("server");
        let builder = ServerConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13]).unwrap();
        let mut server = builder.with_client_cert_verifier(verifier).with_single_cert(chain, key).unwrap();
        server.alpn_protocols = vec![b"h2".to_vec()];
        let mut server_with_tickets = server.clone();
        server_with_tickets.session_storage = ServerSessionMemoryCache::new(16);
        server_with_tickets.send_tls13_tickets = 4;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;

        Self {
            client: Arc::new(client),
            client_resuming,
            server: Arc::new(server),
            server_with_tickets: Arc::new(server_with_tickets),
        }
    }
}

fn provider() -> Arc<CryptoProvider> {
    use aws_lc_rs::cipher_suite::{TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384};
    let cipher_suites = vec![TLS13_AES_256_GCM_SHA384, TLS13_AES_128_GCM_SHA256];
    Arc::new(CryptoProvider { cipher_suites, ..aws_lc_rs::default_provider() })
}

/// For tests on a paused clock: returns once every task waits for something, as only then does time move. No wall time passes.
pub(crate) async fn settle() {
    tokio::time::sleep(Duration::from_millis(10)).await;
}

pub(crate) fn server_name() -> ServerName<'static> {
    ServerName::try_from("server").unwrap()
}

pub(crate) async fn connect(io: impl Transport + 'static) -> Secured {
    tls::connect(io, &Tls::get().client, server_name()).await.unwrap()
}

pub(crate) async fn accept(io: impl Transport + 'static) -> Secured {
    tls::accept(io, &Tls::get().server).await.unwrap()
}

/// Both ends of a transport, secured: client, server.
pub(crate) async fn secure(near: impl Transport + 'static, far: impl Transport + 'static) -> (Secured, Secured) {
    tokio::join!(connect(near), accept(far))
}

/// As [`secure`], in memory.
pub(crate) async fn secured_pair() -> (Secured, Secured) {
    let (near, far) = duplex(1 << 20);
    secure(near, far).await
}

pub(crate) async fn socket_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (a, b) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    let (a, (b, _)) = (a.unwrap(), b.unwrap());
    a.set_nodelay(true).unwrap();
    b.set_nodelay(true).unwrap();
    (a, b)
}

/// Keep-alive that never comes: where a wake-up is lost, nothing else shall wake.
pub(crate) fn quiet() -> Settings {
    let never = Duration::from_secs(1_000_000);
    Settings { keepalive: KeepAlive { interval: never, timeout: never }, ..Settings::default() }
}

/// A pool with [`quiet`] tunnels.
pub(crate) fn quiet_pool() -> PoolConfig {
    PoolConfig { settings: quiet(), ..PoolConfig::default() }
}

pub(crate) fn key(name: &str) -> TunnelKey {
    TunnelKey {
        source_uid: name.into(),
        source_ip: [10, 0, 0, 1].into(),
        source_identity: Identity::new("cluster.local", "demo", name),
        generation: 1,
        destination: "10.0.0.2:15008".parse().unwrap(),
        accepted: vec![Identity::new("cluster.local", "demo", "server")].into(),
        network: "".into(),
    }
}

pub(crate) fn request() -> ConnectRequest {
    let address: SocketAddr = "10.0.0.2:8080".parse().unwrap();
    ConnectRequest { authority: Authority::Address(address), headers: Vec::new() }
}

/// `length` bytes that tell where they belong; no two seeds give the same.
pub(crate) fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length + 8);
    let mut word = seed.rotate_left(32);
    while bytes.len() < length {
        word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&word.rotate_left(29).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Accepts everything (or answers `status`) and hands the streams to the test.
pub(crate) struct Accepting {
    pub(crate) status: Cell<StatusCode>,
    /// Of a 200.
    pub(crate) headers: RefCell<HeaderMap>,
    pub(crate) streams: mpsc::Sender<TunnelStream>,
    /// The headers of the requests, in order.
    pub(crate) requests: RefCell<Vec<HeaderMap>>,
    pub(crate) malformed: RefCell<Vec<Malformed>>,
}

impl Accepting {
    pub(crate) fn new() -> (Rc<Self>, mpsc::Receiver<TunnelStream>) {
        let (streams, accepted) = mpsc::channel(256);
        let accepting = Self {
            status: Cell::new(StatusCode::OK),
            headers: RefCell::default(),
            streams,
            requests: RefCell::default(),
            malformed: RefCell::default(),
        };
        (Rc::new(accepting), accepted)
    }
}

impl Handler for Accepting {
    fn connect(self: Rc<Self>, request: Request, responder: Responder) -> LocalBoxFuture<'static, ()> {
        Box::pin(async move {
            self.requests.borrow_mut().push(request.headers);
            match self.status.get() {
                StatusCode::OK => {
                    let headers = self.headers.borrow().clone();
                    // Who has given up meanwhile is no concern of the test's.
                    let Ok(stream) = responder.accept(&headers) else { return };
                    drop(self.streams.send(stream).await);
                }
                status => responder.reject(status),
            }
        })
    }

    fn malformed(&self, malformed: &Malformed) {
        self.malformed.borrow_mut().push(malformed.clone());
    }
}

/// Dials in-memory pipes; the far ends go to the test, or to nobody.
pub(crate) struct Pipes {
    pub(crate) dialed: mpsc::Sender<DuplexStream>,
    pub(crate) fail: Cell<bool>,
    pub(crate) count: Cell<usize>,
    /// Tunnels that ended otherwise than in order.
    pub(crate) failed: RefCell<Vec<Error>>,
}

impl Connector for Pipes {
    fn connect(&self, _key: &TunnelKey) -> LocalBoxFuture<'_, Result<Secured, Error>> {
        Box::pin(async move {
            self.count.set(self.count.get() + 1);
            tokio::task::yield_now().await;
            if self.fail.get() {
                return Err(Error::dial(Reason::Connect, "connection refused", None));
            }
            let (near, far) = duplex(1 << 20);
            self.dialed.send(far).await.unwrap();
            Ok(connect(near).await)
        })
    }

    fn failed(&self, _key: &TunnelKey, error: &Error) {
        self.failed.borrow_mut().push(error.clone());
    }
}

pub(crate) struct Mesh {
    pub(crate) pool: Pool,
    pub(crate) pipes: Rc<Pipes>,
    pub(crate) handler: Rc<Accepting>,
    pub(crate) accepted: mpsc::Receiver<TunnelStream>,
    pub(crate) drain: DrainTrigger,
}

/// A pool whose every tunnel ends in a server of ours.
pub(crate) fn mesh(config: PoolConfig) -> Mesh {
    mesh_with(config, quiet())
}

/// As [`mesh`], with settings for the server.
pub(crate) fn mesh_with(config: PoolConfig, settings: Settings) -> Mesh {
    let (mesh, dialed, watcher) = unserved(config);
    spawn_local(serve_all(dialed, settings, mesh.handler.clone(), watcher));
    mesh
}

/// A pool whose tunnels' far ends nobody serves yet.
pub(crate) fn unserved(config: PoolConfig) -> (Mesh, mpsc::Receiver<DuplexStream>, DrainWatcher) {
    let (dials, dialed) = mpsc::channel(64);
    let (drain, watcher) = drain::channel();
    let pipes =
        Rc::new(Pipes { dialed: dials, fail: Cell::new(false), count: Cell::new(0), failed: RefCell::default() });
    let (handler, accepted) = Accepting::new();
    let pool = Pool::new(config, Budget::default(), pipes.clone());
    (Mesh { pool, pipes, handler, accepted, drain }, dialed, watcher)
}

pub(crate) async fn serve_all(
    mut dialed: mpsc::Receiver<DuplexStream>,
    settings: Settings,
    handler: Rc<impl Handler + 'static>,
    drain: DrainWatcher,
) {
    while let Some(pipe) = dialed.recv().await {
        let (handler, drain, settings) = (handler.clone(), drain.clone(), settings.clone());
        spawn_local(async move {
            let secured = accept(pipe).await;
            server::serve(secured, &settings, Budget::default(), drain, handler).await
        });
    }
}

impl Mesh {
    /// A stream, and its far end.
    pub(crate) async fn open(&mut self) -> (TunnelStream, TunnelStream) {
        let (near, _) = self.pool.open(&key("client"), &request()).await.unwrap();
        (near, self.accepted.recv().await.unwrap())
    }
}
