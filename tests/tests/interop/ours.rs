//! Our two ends of tunnels: a pool that dials one address, and a server that carries CONNECTs to the address they name.

use std::{
    cell::{Cell, RefCell},
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use http::{HeaderMap, StatusCode};
use mesh_core::{headers::Authority, reason::Reason};
use mesh_hbone::{
    Budget, ConnectRequest, Connector, Error, KeepAlive, LocalBoxFuture, Pool, PoolConfig, Secured, Settings,
    TunnelKey, relay,
    server::{self, Handler, Malformed, Request, Responder},
    tls,
};
use mesh_identity::{Svid, client_config, peer_identity, peer_name, server_config};
use mesh_net::{CopyOutcome, End};
use mesh_runtime::drain::{self, DrainTrigger, DrainWatcher, Drained};
use rustls::ClientConfig;
use tokio::{
    net::{TcpListener, TcpStream},
    task::{JoinHandle, spawn_local},
};

use crate::identities::{Identities, identity};

/// Longer than any test: what waits for it hangs.
const DRAIN: Duration = Duration::from_secs(600);

/// A pool and the one place it dials.
#[derive(Clone)]
pub(crate) struct Client {
    pub(crate) pool: Pool,
    pub(crate) dialer: Rc<Dialer>,
    key: TunnelKey,
}

impl Client {
    /// Dials `server`, which must be the identity `server`.
    pub(crate) fn new(identities: &Identities, server: SocketAddr, config: PoolConfig) -> Self {
        let accepted: Arc<[_]> = vec![identity("server")].into();
        let tls = client_config(&identities.issue("client"), &accepted);
        let dialer = Rc::new(Dialer { tls, dials: Cell::default(), failed: RefCell::default() });
        let key = TunnelKey {
            source_uid: "client".into(),
            source_ip: [127, 0, 0, 1].into(),
            source_identity: identity("client"),
            generation: 1,
            destination: server,
            accepted,
            network: "".into(),
        };
        Self { pool: Pool::new(config, Budget::default(), dialer.clone()), dialer, key }
    }

    /// An application's socket whose bytes go to `target`, and how the flow ends.
    pub(crate) async fn app(&self, target: SocketAddr) -> Result<Flow, Error> {
        let request = ConnectRequest { authority: Authority::Address(target), headers: Vec::new() };
        let (stream, _) = self.pool.open(&self.key, &request).await?;
        let (socket, inner) = socket_pair().await;
        let end = spawn_local(async move { relay(Rc::new(inner), stream, Rc::default()).await });
        Ok(Flow { socket, end })
    }

    /// As [`Self::app`], for those who only want the socket.
    pub(crate) async fn socket(&self, target: SocketAddr) -> TcpStream {
        self.app(target).await.unwrap().socket
    }
}

pub(crate) struct Flow {
    pub(crate) socket: TcpStream,
    pub(crate) end: JoinHandle<CopyOutcome>,
}

pub(crate) struct Dialer {
    pub(crate) tls: Arc<ClientConfig>,
    pub(crate) dials: Cell<usize>,
    /// Tunnels that ended otherwise than in order.
    pub(crate) failed: RefCell<Vec<Error>>,
}

impl Connector for Dialer {
    fn connect(&self, key: &TunnelKey) -> LocalBoxFuture<'_, Result<Secured, Error>> {
        let destination = key.destination;
        Box::pin(async move {
            self.dials.set(self.dials.get() + 1);
            let tcp = TcpStream::connect(destination).await.unwrap();
            tcp.set_nodelay(true).unwrap();
            let secured = tls::connect(tcp, &self.tls, peer_name()).await;
            secured.map_err(|error| Error::dial(Reason::Tls, "TLS failed", Some(Arc::new(error))))
        })
    }

    fn failed(&self, _key: &TunnelKey, error: &Error) {
        self.failed.borrow_mut().push(error.clone());
    }
}

/// A server of tunnels.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    shared: Rc<Shared>,
}

struct Shared {
    scope: RefCell<(DrainTrigger, DrainWatcher)>,
    seen: Seen,
}

/// What a server has seen.
#[derive(Default)]
pub(crate) struct Seen {
    /// Connections whose client proved to be the identity `client`.
    pub(crate) connections: Cell<usize>,
    /// Tunnels that ended otherwise than in order.
    pub(crate) failed: RefCell<Vec<Error>>,
    /// CONNECTs answered with 503.
    pub(crate) refused: Cell<usize>,
    /// How flows ended.
    pub(crate) ends: RefCell<Vec<End>>,
}

impl Server {
    pub(crate) async fn start(svid: Arc<Svid>, settings: Settings) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Rc::new(Shared { scope: RefCell::new(drain::channel()), seen: Seen::default() });
        let accepting = shared.clone();
        spawn_local(async move {
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                tcp.set_nodelay(true).unwrap();
                spawn_local(serve(tcp, svid.clone(), settings.clone(), accepting.clone()));
            }
        });
        Self { address, shared }
    }

    pub(crate) fn seen(&self) -> &Seen {
        &self.shared.seen
    }

    /// Sends the present tunnels' clients elsewhere; later connections are served as before. Resolves when those tunnels are over.
    pub(crate) fn drain(&self) -> JoinHandle<Drained> {
        let (trigger, _) = self.shared.scope.replace(drain::channel());
        spawn_local(trigger.drain(DRAIN))
    }
}

async fn serve(tcp: TcpStream, svid: Arc<Svid>, settings: Settings, shared: Rc<Shared>) {
    let drain = shared.scope.borrow().1.clone();
    let Ok(secured) = tls::accept(tcp, &server_config(&svid)).await else { return };
    assert_eq!(peer_identity(secured.peer_certificates()), Some(identity("client")));
    shared.seen.connections.set(shared.seen.connections.get() + 1);
    let handler = Rc::new(ToTarget(shared.clone()));
    if let Err(error) = server::serve(secured, &settings, Budget::default(), drain, handler).await {
        shared.seen.failed.borrow_mut().push(error);
    }
}

/// Connects to what a CONNECT names, then relays.
struct ToTarget(Rc<Shared>);

impl Handler for ToTarget {
    fn connect(self: Rc<Self>, request: Request, responder: Responder) -> LocalBoxFuture<'static, ()> {
        Box::pin(async move {
            let Authority::Address(target) = request.authority else {
                return responder.reject(StatusCode::BAD_REQUEST);
            };
            let Ok(tcp) = TcpStream::connect(target).await else {
                self.0.seen.refused.set(self.0.seen.refused.get() + 1);
                return responder.reject(StatusCode::SERVICE_UNAVAILABLE);
            };
            tcp.set_nodelay(true).unwrap();
            let Ok(stream) = responder.accept(&HeaderMap::new()) else { return };
            let outcome = relay(Rc::new(tcp), stream, Rc::default()).await;
            self.0.seen.ends.borrow_mut().push(outcome.end);
        })
    }

    /// Answered already.
    fn malformed(&self, _malformed: &Malformed) {}
}

/// Asks often, and gives up soon.
pub(crate) fn brisk() -> Settings {
    let keepalive = KeepAlive { interval: Duration::from_millis(200), timeout: Duration::from_secs(2) };
    Settings { keepalive, ..Settings::default() }
}

async fn socket_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (a, b) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    let (a, (b, _)) = (a.unwrap(), b.unwrap());
    a.set_nodelay(true).unwrap();
    b.set_nodelay(true).unwrap();
    (a, b)
}
