//! What a flow is carried on: a TCP connection from inside the pod's namespace, or a tunnel on one.

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_core::{identity::Identity, reason::Reason};
use mesh_hbone::{
    ConnectRequest, Connector, Error, LocalBoxFuture, Secured, TunnelKey, TunnelStream,
    client::connect_once,
    tls::{self, Transport},
};
use mesh_identity::{Manager, Priority, Svid, client_config, peer_identity, peer_name};
use mesh_net::{
    NetNs, SocketOptions,
    sockets::{connect, limit_unsent, tcp_socket},
};
use tokio::{net::TcpStream, time::timeout};

use crate::{
    config::Config,
    error::{ProxyError, connect_reason, shared_cause, tls_reason},
    flow::{Beyond, Direction},
    outcome::Outcomes,
    pods::{PodContext, hbone_settings},
    proxy::{forward::FlowSocket, resolve},
    tunnels::Tunnels,
};

pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const CERTIFICATE_TIMEOUT: Duration = Duration::from_secs(10);
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
pub(crate) async fn open(
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
    pub(crate) tunnels: Rc<Tunnels>,
    pub(crate) config: Arc<Config>,
    pub(crate) identities: Manager,
    pub(crate) outcomes: Outcomes,
    pub(crate) netns: Option<NetNs>,
    pub(crate) sockets: SocketOptions,
}

impl Connector for Dialer {
    fn connect(&self, key: &TunnelKey) -> LocalBoxFuture<'_, Result<Secured, Error>> {
        let key = key.clone();
        Box::pin(async move {
            // The certificate first: without one there is no reason to knock.
            let certificate = certificate(&self.identities, &key.source_identity).await?;
            let tcp = self.dial(&key).await?;
            secure(&self.outcomes, &self.tunnels, tcp, &certificate, &key.accepted, &key.destination).await
        })
    }

    fn failed(&self, key: &TunnelKey, error: &Error) {
        tracing::debug!(peer = %key.destination, %error, "tunnel ended");
        self.outcomes.tunnel_failed(Direction::Outbound, error);
    }
}

/// Mutual TLS as a client, to a peer that must be one of `accepted`.
async fn secure(
    outcomes: &Outcomes,
    tunnels: &Tunnels,
    io: impl Transport + 'static,
    certificate: &Arc<Svid>,
    accepted: &Arc<[Identity]>,
    peer: &dyn fmt::Display,
) -> Result<Secured, Error> {
    let config = client_config(certificate, accepted);
    let judged = tunnels.judged_by(certificate);
    let started = Instant::now();
    let handshake = timeout(HANDSHAKE_TIMEOUT, tls::connect(io, &config, peer_name())).await;
    let finished = matches!(handshake, Ok(Ok(_)));
    outcomes.handshake(Direction::Outbound, started.elapsed(), finished);
    match handshake {
        Ok(Ok(secured)) => {
            tunnels.add(&secured, Direction::Outbound, judged);
            Ok(secured)
        }
        Ok(Err(error)) => {
            let reason = tls_reason(&error);
            if reason == Reason::Revoked {
                outcomes.revoked(Direction::Outbound);
            }
            Err(Error::dial(reason, format!("tls handshake with {peer} failed"), shared_cause(error)))
        }
        Err(_) => Err(Error::dial(Reason::Tls, format!("no TLS handshake within {HANDSHAKE_TIMEOUT:?}"), None)),
    }
}

/// Opens a tunnel of its own inside `outer`, a stream to a network's gateway: a gateway chooses a destination per stream, so a tunnel
/// that several connections shared would bind them all to one.
pub(crate) async fn open_inside(
    pod: &PodContext,
    outer: TunnelStream,
    source: &Identity,
    accepted: &Arc<[Identity]>,
    request: &ConnectRequest,
) -> Result<(TunnelStream, Beyond), Error> {
    let shared = &pod.shared;
    let certificate = certificate(&shared.identities, source).await?;
    let secured = secure(&shared.outcomes, &pod.tunnels, outer, &certificate, accepted, &request.authority).await?;
    let identity = peer_identity(secured.peer_certificates());
    let settings = hbone_settings(&shared.config);
    let (stream, response) = connect_once(secured, &settings, pod.memory.clone(), request).await?;
    let baggage = resolve::baggage(&shared.config, &response.headers);
    Ok((stream, Beyond { identity, baggage }))
}

impl Dialer {
    async fn dial(&self, key: &TunnelKey) -> Result<TcpStream, Error> {
        let to = key.destination;
        let connected = open(self.netns.as_ref(), self.config.local_address, &self.sockets, to).await;
        let connected = connected.and_then(|stream| limit_unsent(&stream).map(|()| stream));
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

/// Everyone who wants the tunnel waits for this, so it has an end.
async fn certificate(identities: &Manager, identity: &Identity) -> Result<Arc<Svid>, Error> {
    match timeout(CERTIFICATE_TIMEOUT, identities.certificate(identity, Priority::RealTime)).await {
        Ok(Ok(certificate)) => Ok(certificate),
        Ok(Err(error)) => {
            Err(Error::dial(Reason::Identity, "no certificate for the local identity", shared_cause(error)))
        }
        Err(_) => {
            let message = format!("no certificate for the local identity within {CERTIFICATE_TIMEOUT:?}");
            Err(Error::dial(Reason::Identity, message, None))
        }
    }
}

#[cfg(test)]
mod tests {
    use mesh_identity::{CaClient, CaError, ca::BoxFuture};

    use super::*;

    struct Mute;

    impl CaClient for Mute {
        fn sign(&self, _: &Identity, _: String) -> BoxFuture<'_, Result<Vec<String>, CaError>> {
            Box::pin(std::future::pending())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_ca_that_never_answers_fails_the_dial_for_want_of_identity() {
        let (identities, task) = Manager::new(mesh_identity::Config::default(), Arc::new(Mute));
        let task = tokio::spawn(task);
        let identity = Identity::new("cluster.local", "demo", "client");
        let error = certificate(&identities, &identity).await.expect_err("no certificate");
        assert_eq!(error.reason(), Reason::Identity);
        assert_eq!(error.to_string(), "no certificate for the local identity within 10s");
        task.abort();
    }
}
