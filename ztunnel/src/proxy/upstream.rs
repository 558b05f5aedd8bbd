//! What a flow is carried on: a TCP connection from inside the pod's namespace, or a tunnel on one.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_core::reason::Reason;
use mesh_hbone::{BoxedTlsStream, Connector, Error, LocalBoxFuture, TunnelKey, TunnelStream};
use mesh_identity::{Manager, Priority, client_config, peer_name};
use mesh_net::{
    NetNs, SocketOptions,
    sockets::{connect, tcp_socket},
};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::TlsConnector;

use crate::{
    config::Config,
    error::{ProxyError, connect_reason, shared_cause},
    outcome::{Direction, Outcomes},
    pods::PodContext,
    proxy::forward::FlowSocket,
};

pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
pub(crate) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// The far side of a flow.
pub(crate) enum Upstream {
    Tcp(FlowSocket),
    Tunnel(TunnelStream),
}

impl PodContext {
    /// Connects from the pod as itself.
    pub(crate) async fn connect(&self, to: SocketAddr) -> Result<FlowSocket, ProxyError> {
        let own = self.shared.config.local_address;
        let connected = open(self.netns.as_ref(), own, &self.sockets, to).await;
        connected.map(FlowSocket::new).map_err(|source| ProxyError::Connect { to, source })
    }

    /// Connects to an application of the pod, which sees `client` as its peer where the kernel lets us.
    pub(crate) async fn connect_as(&self, client: IpAddr, to: SocketAddr) -> Result<FlowSocket, ProxyError> {
        if !self.transparent || client.is_ipv4() != to.is_ipv4() {
            return self.connect(to).await;
        }
        match tcp_socket(self.netns.as_ref(), Some(client), to, &self.sockets) {
            Ok(socket) => {
                let connected = connect(socket, to, CONNECT_TIMEOUT).await;
                connected.map(FlowSocket::new).map_err(|source| ProxyError::Connect { to, source })
            }
            Err(error) => {
                tracing::debug!(%error, %client, "cannot keep the client's address");
                self.connect(to).await
            }
        }
    }
}

/// `own`: the address that stands for the pod where it has no namespace.
async fn open(
    netns: Option<&NetNs>,
    own: Option<IpAddr>,
    options: &SocketOptions,
    to: SocketAddr,
) -> io::Result<TcpStream> {
    let socket = tcp_socket(netns, None, to, options)?;
    if let Some(own) = own.filter(|own| own.is_ipv4() == to.is_ipv4()) {
        socket.bind(&SocketAddr::new(own, 0).into())?;
    }
    connect(socket, to, CONNECT_TIMEOUT).await
}

/// Dials tunnels for one pod's pool.
pub(crate) struct Dialer {
    pub(crate) config: Arc<Config>,
    pub(crate) identities: Manager,
    pub(crate) outcomes: Outcomes,
    pub(crate) netns: Option<NetNs>,
    pub(crate) sockets: SocketOptions,
}

impl Connector for Dialer {
    fn connect(&self, key: &TunnelKey) -> LocalBoxFuture<'_, Result<BoxedTlsStream, Error>> {
        let key = key.clone();
        Box::pin(async move {
            // The certificate first: without one there is no reason to knock.
            let certificate = self.identities.certificate(&key.source_identity, Priority::RealTime).await;
            let certificate = certificate.map_err(|error| {
                Error::dial(Reason::Identity, "no certificate for the local identity", shared_cause(error))
            })?;
            let tcp = self.dial(&key).await?;
            let connector = TlsConnector::from(client_config(&certificate, &key.accepted));
            let started = Instant::now();
            let handshake = timeout(HANDSHAKE_TIMEOUT, connector.connect(peer_name(), tcp)).await;
            let finished = matches!(handshake, Ok(Ok(_)));
            self.outcomes.handshake(Direction::Outbound, started.elapsed(), finished);
            match handshake {
                Ok(Ok(stream)) => Ok(Box::new(stream) as BoxedTlsStream),
                Ok(Err(error)) => Err(tls_failed(&key, error)),
                Err(_) => Err(Error::dial(Reason::Tls, format!("no TLS handshake within {HANDSHAKE_TIMEOUT:?}"), None)),
            }
        })
    }
}

impl Dialer {
    async fn dial(&self, key: &TunnelKey) -> Result<TcpStream, Error> {
        let to = key.destination;
        let connected = open(self.netns.as_ref(), self.config.local_address, &self.sockets, to).await;
        connected.map_err(|error| match connect_reason(&error) {
            Reason::ConnectTimeout => {
                let message =
                    format!("connection timed out, maybe a NetworkPolicy is blocking HBONE port {}: {to}", to.port());
                Error::dial(Reason::NetworkPolicy, message, shared_cause(error))
            }
            reason => Error::dial(reason, format!("connection to {to} failed"), shared_cause(error)),
        })
    }
}

fn tls_failed(key: &TunnelKey, error: io::Error) -> Error {
    Error::dial(Reason::Tls, format!("tls handshake with {} failed", key.destination), shared_cause(error))
}
