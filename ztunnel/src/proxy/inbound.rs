//! From another proxy's tunnels to the applications of the pod.

use std::{
    cell::RefCell,
    future::pending,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use foldhash::HashMap;
use http::{HeaderMap, StatusCode};
use mesh_core::{headers::TraceParent, identity::Identity, reason::Reason, workload::Workload};
use mesh_hbone::{
    LocalBoxFuture, Secured, TunnelStream,
    server::{self, Handler, Malformed, Request, Responder},
    tls,
};
use mesh_identity::{Priority, peer_identity, server_config, svid::validity};
use mesh_net::{
    Side, SocketOptions,
    sockets::{canonical, configure_accepted, limit_unsent},
};
use tokio::{
    net::TcpStream,
    time::{sleep, timeout},
};
use tracing::{Instrument as _, Span};

use crate::{
    connections::{Entry, Live},
    error::ProxyError,
    flow::{Direction, Flow},
    pods::{PodContext, hbone_settings},
    proxy::{
        Serving,
        authorize::admit,
        forward::{Carried, FlowSocket},
        listeners::Accepted,
        proxy_protocol,
        resolve::{self, BAGGAGE, TRACEPARENT, Told},
        upstream::{CONNECT_TIMEOUT, HANDSHAKE_TIMEOUT, Upstream},
    },
};

/// Handshakes one address may have pending on one worker of a pod. Proxies open few tunnels at once; only a flood needs more.
const MAX_HANDSHAKES: usize = 128;

/// One tunnel, from its handshake to its end.
pub(crate) async fn serve(pod: Rc<PodContext>, accepted: Accepted) {
    // Boxed: a handshake takes much, and what follows lasts.
    let Some((secured, tunnel)) = Box::pin(open(pod, accepted)).await else { return };
    let pod = tunnel.pod.clone();
    let settings = hbone_settings(&pod.shared.config);
    let peer = tunnel.peer;
    if let Err(error) = server::serve(secured, &settings, pod.memory.clone(), pod.drain.clone(), tunnel).await {
        tracing::debug!(%peer, %error, "tunnel ended");
        pod.shared.outcomes.tunnel_failed(Direction::Inbound, &error);
    }
}

async fn open(pod: Rc<PodContext>, accepted: Accepted) -> Option<(Secured, Rc<Tunnel>)> {
    let Accepted { socket, peer, .. } = accepted;
    let deny = |dialled, error: &ProxyError| {
        pod.shared.outcomes.early_deny(Direction::Inbound, peer, dialled, error);
    };
    let registered = socket.register().and_then(|client| Ok((canonical(client.local_addr()?), client)));
    let (dialled, client) = match registered {
        Ok(registered) => registered,
        Err(source) => {
            deny(peer, &ProxyError::Connect { to: peer, source });
            return None;
        }
    };
    let secured = match authenticate(&pod, client, peer).await {
        Ok(secured) => secured,
        Err(error) => {
            deny(dialled, &error);
            return None;
        }
    };
    let certificates = secured.peer_certificates();
    let identity = peer_identity(certificates).map(Arc::new);
    let expires = certificates.first().and_then(validity).map(|(_, not_after)| not_after);
    Some((secured, Rc::new(Tunnel { pod, peer, dialled, identity, expires })))
}

/// Mutual TLS, with the pod's own certificate, within a deadline and a share of what one address may have pending.
async fn authenticate(pod: &PodContext, client: TcpStream, peer: SocketAddr) -> Result<Secured, ProxyError> {
    let _slot = pod.handshakes.enter(peer.ip()).ok_or(ProxyError::TooManyHandshakes(MAX_HANDSHAKES))?;
    // No TCP keep-alive: the tunnel's PINGs find a dead peer sooner.
    let configured = configure_accepted(&client, &SocketOptions::default()).and_then(|()| limit_unsent(&client));
    configured.map_err(ProxyError::Tls)?;
    let local = resolve::local_workload(pod).await?;
    let started = Instant::now();
    let handshake = async {
        let certificate = pod.shared.identities.certificate(&local.identity(), Priority::RealTime).await;
        let certificate = certificate.map_err(ProxyError::Identity)?;
        let judged = pod.tunnels.judged_by(&certificate);
        let secured = tls::accept(client, &server_config(&certificate)).await.map_err(ProxyError::Tls)?;
        pod.tunnels.add(&secured, Direction::Inbound, judged);
        Ok(secured)
    };
    let done = timeout(HANDSHAKE_TIMEOUT, handshake).await;
    let done = done.unwrap_or(Err(ProxyError::HandshakeTimeout(HANDSHAKE_TIMEOUT)));
    pod.shared.outcomes.handshake(Direction::Inbound, started.elapsed(), done.is_ok());
    if done.as_ref().is_err_and(|error| error.reason() == Reason::Revoked) {
        pod.shared.outcomes.revoked(Direction::Inbound);
    }
    done
}

/// One authenticated tunnel.
struct Tunnel {
    pod: Rc<PodContext>,
    peer: SocketAddr,
    /// The address of the pod that the peer chose to dial: what its CONNECTs may name.
    dialled: SocketAddr,
    identity: Option<Arc<Identity>>,
    /// The end of the certificate that proved it.
    expires: Option<SystemTime>,
}

impl Handler for Tunnel {
    fn connect(self: Rc<Self>, request: Request, responder: Responder) -> LocalBoxFuture<'static, ()> {
        let load = self.pod.worker.occupy();
        let span = self.span(&request.headers);
        Serving::boxed(load, None, async move { self.open(&request, responder).await }.instrument(span))
    }

    fn malformed(&self, malformed: &Malformed) {
        self.deny(&ProxyError::BadRequest(malformed.detail.clone()));
    }

    fn expired(&self) -> LocalBoxFuture<'static, ()> {
        let left = self.left();
        Box::pin(async move {
            match left {
                Some(left) => sleep(left).await,
                None => pending().await,
            }
        })
    }
}

impl Tunnel {
    /// Numbered as on the client's side, where that one says how.
    fn span(&self, headers: &HeaderMap) -> Span {
        let trace = || {
            let told = headers.get(TRACEPARENT).and_then(|value| value.to_str().ok()?.parse().ok());
            told.unwrap_or_else(|| TraceParent::random(&mut rand::rng()))
        };
        tracing::debug_span!(parent: &self.pod.span, "inbound", id = %trace().id(), peer = %self.peer)
    }

    /// Opens the way of one CONNECT; none when that failed, and was answered and reported.
    async fn open(&self, request: &Request, mut responder: Responder) -> Option<Carried> {
        let local = tokio::select! {
            biased;
            local = resolve::settled_workload(&self.pod) => local,
            () = responder.abandoned() => Err(ProxyError::Reset(Side::Second)),
        };
        let error = match local.and_then(|local| Ok((self.target(&local, request)?, local))) {
            // Also what was sent before the peer knew that it should go elsewhere.
            Ok(_) if self.left() == Some(Duration::ZERO) => ProxyError::PeerExpired,
            Ok((target, local)) => return self.carry(&local, &target, request, responder).await,
            Err(error) => error,
        };
        if matches!(error, ProxyError::PeerExpired) {
            // Not processed: whoever has a newer certificate by now asks again in a new tunnel.
            responder.refuse();
            self.deny(&error);
        } else {
            self.refuse(&error, responder);
        }
        None
    }

    /// For how long the identity is proven; nothing where there is none.
    fn left(&self) -> Option<Duration> {
        self.expires.map(|at| at.duration_since(SystemTime::now()).unwrap_or_default())
    }

    fn target(&self, local: &Workload, request: &Request) -> Result<Target, ProxyError> {
        let index = self.pod.shared.state.snapshot();
        let is_own_port = |port| self.pod.is_own_port(port);
        let address = resolve::inbound_target(is_own_port, &index, local, self.dialled.ip(), &request.authority)?;
        if !local.application_tunnel.as_ref().is_some_and(|tunnel| tunnel.proxy_protocol) {
            return Ok(Target { address, connect: address, preface: Vec::new() });
        }
        let named = resolve::named_address(&index, local, &request.authority)
            .ok_or_else(|| ProxyError::UnknownTarget(request.authority.to_string()))?;
        let preface = proxy_protocol::encode(self.peer, named, self.identity.as_deref());
        // Told the client's address in words, the application need not see it; over loopback no capture rule is in the way.
        let on_loopback = self.pod.shared.config.localhost_app_tunnel;
        let connect = if on_loopback { loopback_of(address) } else { address };
        Ok(Target { address, connect, preface })
    }

    async fn carry(
        &self,
        local: &Arc<Workload>,
        target: &Target,
        request: &Request,
        mut responder: Responder,
    ) -> Option<Carried> {
        let flow = self.pod.shared.outcomes.opened(self.describe(local, target.address, request));
        let reached = tokio::select! {
            biased;
            reached = self.reach(local, target, flow.entry()) => reached,
            // The client has gone: nobody waits for the application any more.
            () = responder.abandoned() => Err(ProxyError::Reset(Side::Second)),
        };
        let joined = match reached {
            Ok((application, live)) => self
                .answer(local, responder, &application, &target.preface)
                .await
                .map(|stream| (application, live, stream)),
            Err(error) => {
                responder.reject(status(&error));
                Err(error)
            }
        };
        match joined {
            Ok((application, live, stream)) => Some(Carried::new(application, Upstream::Tunnel(stream), flow, live)),
            Err(error) => {
                flow.finish(Err(&error));
                None
            }
        }
    }

    async fn reach(
        &self,
        local: &Workload,
        target: &Target,
        entry: &Arc<Entry>,
    ) -> Result<(FlowSocket, Live), ProxyError> {
        let live = admit(&self.pod, local, entry)?;
        let application = if target.connect == target.address {
            self.pod.connect_as(self.peer.ip(), target.connect).await?
        } else {
            self.pod.connect(target.connect).await?
        };
        Ok((application, live))
    }

    /// Says yes, only now that the application is known to be there.
    async fn answer(
        &self,
        local: &Workload,
        responder: Responder,
        application: &TcpStream,
        preface: &[u8],
    ) -> Result<TunnelStream, ProxyError> {
        let mut headers = HeaderMap::new();
        if self.pod.shared.config.response_baggage
            && let Some(baggage) = resolve::baggage_header(local)
        {
            headers.insert(BAGGAGE, baggage);
        }
        let stream = responder.accept(&headers)?;
        let said = say(application, preface).await;
        said.map(|()| stream).map_err(|source| ProxyError::Copy { side: Side::First, source })
    }

    fn describe(&self, local: &Arc<Workload>, target: SocketAddr, request: &Request) -> Arc<Entry> {
        let Told { baggage, host, remote } = resolve::told(&self.pod.shared.config, &request.headers);
        let index = self.pod.shared.state.snapshot();
        let mut flow = Flow::new(Direction::Inbound, self.peer, self.dialled);
        flow.target = target;
        flow.authority = Some(request.authority.clone());
        flow.mutual_tls = self.identity.is_some();
        if !remote {
            flow.source = resolve::source_by_address(&index, local, self.peer.ip());
        }
        flow.source_baggage = baggage.filter(|_| flow.source.is_none()).map(Box::new);
        flow.peer_identity = self.identity.clone();
        flow.service = resolve::inbound_service(&index, local, host.as_deref(), target.port());
        flow.host = host.map(|host| match &flow.service {
            Some(service) if *service.hostname == *host => service.hostname.clone(),
            _ => host.into(),
        });
        flow.destination_workload = Some(local.clone());
        Entry::new(flow)
    }

    fn refuse(&self, error: &ProxyError, responder: Responder) {
        responder.reject(status(error));
        self.deny(error);
    }

    fn deny(&self, error: &ProxyError) {
        self.pod.shared.outcomes.early_deny(Direction::Inbound, self.peer, self.dialled, error);
    }
}

/// Where a CONNECT leads.
struct Target {
    /// What policy is asked about.
    address: SocketAddr,
    connect: SocketAddr,
    /// Sent to the application ahead of the client's bytes.
    preface: Vec<u8>,
}

fn loopback_of(address: SocketAddr) -> SocketAddr {
    let ip = if address.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
    SocketAddr::new(ip, address.port())
}

/// Writes a few bytes to an application that has just accepted.
async fn say(application: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    let writing = async {
        while !bytes.is_empty() {
            application.writable().await?;
            match application.try_write(bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    };
    timeout(CONNECT_TIMEOUT, writing).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// What other proxies expect to be told.
fn status(error: &ProxyError) -> StatusCode {
    match error {
        ProxyError::AddressMismatch { .. } | ProxyError::BadRequest(_) => StatusCode::BAD_REQUEST,
        ProxyError::Denied(_) | ProxyError::PolicyChange(_) => StatusCode::UNAUTHORIZED,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    }
}

/// Handshakes pending, by address.
#[derive(Debug, Default)]
pub(crate) struct HandshakeSlots(RefCell<HashMap<IpAddr, usize>>);

/// One pending handshake.
pub(crate) struct HandshakeSlot<'a> {
    slots: &'a HandshakeSlots,
    from: IpAddr,
}

impl HandshakeSlots {
    fn enter(&self, from: IpAddr) -> Option<HandshakeSlot<'_>> {
        let mut pending = self.0.borrow_mut();
        let count = pending.entry(from).or_insert(0);
        (*count < MAX_HANDSHAKES).then(|| {
            *count += 1;
            HandshakeSlot { slots: self, from }
        })
    }
}

impl Drop for HandshakeSlot<'_> {
    fn drop(&mut self) {
        let mut pending = self.slots.0.borrow_mut();
        if let Some(count) = pending.get_mut(&self.from) {
            *count -= 1;
            if *count == 0 {
                pending.remove(&self.from);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_cannot_hold_every_handshake() {
        let slots = HandshakeSlots::default();
        let (flood, other) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let held: Vec<_> = (0..MAX_HANDSHAKES).map_while(|_| slots.enter(flood)).collect();
        assert_eq!(held.len(), MAX_HANDSHAKES);
        assert!(slots.enter(flood).is_none());
        assert!(slots.enter(other).is_some());
        drop(held);
        assert!(slots.enter(flood).is_some());
        assert!(slots.0.borrow().is_empty());
    }

    #[test]
    fn refusals_carry_the_status_that_other_proxies_expect() {
        let mismatch = ProxyError::AddressMismatch { dialled: [10, 0, 0, 1].into(), asked: [10, 0, 0, 2].into() };
        let connect = ProxyError::Connect { to: ([10, 0, 0, 1], 80).into(), source: io::ErrorKind::TimedOut.into() };
        assert_eq!(status(&mismatch), 400);
        assert_eq!(status(&ProxyError::UnknownWorkload("web".into())), 503);
        assert_eq!(status(&ProxyError::Loop), 503);
        assert_eq!(status(&connect), 503);
    }
}
