//! From another proxy's tunnels to the applications of the pod.

use std::{
    cell::RefCell,
    net::{IpAddr, SocketAddr},
    rc::Rc,
    sync::Arc,
    time::Instant,
};

use foldhash::HashMap;
use http::{HeaderMap, StatusCode};
use mesh_core::{identity::Identity, workload::Workload};
use mesh_hbone::{
    LocalBoxFuture,
    server::{self, Handler, Malformed, Request, Responder},
};
use mesh_identity::{Priority, peer_identity, server_config};
use mesh_net::{
    SocketOptions,
    sockets::{canonical, configure_accepted},
};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use crate::{
    connections::{InboundConnection, Protocol},
    error::ProxyError,
    outcome::{Direction, Flow, OpenFlow},
    pods::{PodContext, hbone_settings},
    proxy::{
        authorize::{Admission, admit},
        forward::{FlowSocket, relay},
        resolve::{self, BAGGAGE, Told},
        upstream::{HANDSHAKE_TIMEOUT, Upstream},
    },
};

/// Handshakes one address may have pending on one worker of a pod. Proxies open few tunnels at once; only a flood needs more.
const MAX_HANDSHAKES: usize = 128;

/// One tunnel, from its handshake to its end.
pub(crate) async fn serve(pod: Rc<PodContext>, client: TcpStream, peer: SocketAddr) {
    let dialled = match client.local_addr() {
        Ok(address) => canonical(address),
        Err(_) => return,
    };
    let outcomes = &pod.shared.outcomes;
    let stream = match authenticate(&pod, client, peer).await {
        Ok(stream) => stream,
        Err(error) => return outcomes.early_deny(Direction::Inbound, peer, dialled, &error),
    };
    let identity = stream.get_ref().1.peer_certificates().and_then(peer_identity);
    let tunnel = Rc::new(Tunnel { pod: pod.clone(), peer, dialled, identity });
    let settings = hbone_settings(&pod.shared.config);
    if let Err(error) = server::serve(stream, &settings, pod.drain.clone(), tunnel).await {
        tracing::debug!(%peer, %error, "tunnel ended");
    }
}

/// Mutual TLS, with the pod's own certificate, within a deadline and a share of what one address may have pending.
async fn authenticate(
    pod: &PodContext,
    client: TcpStream,
    peer: SocketAddr,
) -> Result<TlsStream<TcpStream>, ProxyError> {
    let _slot = pod.handshakes.enter(peer.ip()).ok_or(ProxyError::TooManyHandshakes(MAX_HANDSHAKES))?;
    // No TCP keep-alive: the tunnel's PINGs find a dead peer sooner.
    configure_accepted(&client, &SocketOptions::default()).map_err(ProxyError::Tls)?;
    let local = resolve::local_workload(pod).await?;
    let started = Instant::now();
    let handshake = async {
        let certificate = pod.shared.identities.certificate(&local.identity(), Priority::RealTime).await;
        let acceptor = TlsAcceptor::from(server_config(&certificate.map_err(ProxyError::Identity)?));
        acceptor.accept(client).await.map_err(ProxyError::Tls)
    };
    let done = timeout(HANDSHAKE_TIMEOUT, handshake).await;
    let done = done.unwrap_or(Err(ProxyError::HandshakeTimeout(HANDSHAKE_TIMEOUT)));
    pod.shared.outcomes.handshake(Direction::Inbound, started.elapsed(), done.is_ok());
    done
}

/// One authenticated tunnel.
struct Tunnel {
    pod: Rc<PodContext>,
    peer: SocketAddr,
    /// The address of the pod that the peer chose to dial: what its CONNECTs may name.
    dialled: SocketAddr,
    identity: Option<Identity>,
}

impl Handler for Tunnel {
    fn connect(self: Rc<Self>, request: Request, responder: Responder) -> LocalBoxFuture<'static, ()> {
        Box::pin(async move {
            let _load = self.pod.worker.occupy();
            let local = resolve::local_workload(&self.pod).await;
            match local.and_then(|local| Ok((self.target(&local, &request)?, local))) {
                Ok((target, local)) => self.carry(&local, target, &request, responder).await,
                Err(error) => self.refuse(&error, responder),
            }
        })
    }

    fn malformed(&self, malformed: &Malformed) {
        self.deny(&ProxyError::BadRequest(malformed.detail.clone()));
    }
}

impl Tunnel {
    fn target(&self, local: &Workload, request: &Request) -> Result<SocketAddr, ProxyError> {
        let index = self.pod.shared.state.snapshot();
        if local.application_tunnel.as_ref().is_some_and(|tunnel| tunnel.proxy_protocol) {
            let what = "application tunnels with PROXY protocol are not supported yet";
            return Err(ProxyError::UnknownTarget(what.to_owned()));
        }
        let is_own_port = |port| self.pod.is_own_port(port);
        resolve::inbound_target(is_own_port, &index, local, self.dialled.ip(), &request.authority)
    }

    async fn carry(&self, local: &Arc<Workload>, target: SocketAddr, request: &Request, mut responder: Responder) {
        let told = resolve::told(&self.pod.shared.config, &request.headers);
        let host = told.host.clone();
        let flow = self.pod.shared.outcomes.opened(self.describe(local, target, request, told));
        let opened = tokio::select! {
            biased;
            opened = self.open(local, target, host) => opened,
            // The client has gone: nobody waits for the application any more.
            () = responder.abandoned() => Err(ProxyError::Reset(mesh_net::Side::Second)),
        };
        match opened {
            Ok((application, admission)) => self.join(local, application, admission, responder, flow).await,
            Err(error) => {
                responder.reject(status(&error));
                flow.finish(0, 0, Err(&error));
            }
        }
    }

    async fn open(
        &self,
        local: &Workload,
        target: SocketAddr,
        original_dst: Option<String>,
    ) -> Result<(FlowSocket, Admission), ProxyError> {
        let protocol = if self.identity.is_some() { Protocol::Hbone } else { Protocol::Tcp };
        let shown = InboundConnection { src: self.peer, original_dst, actual_dst: target, protocol };
        let admission = admit(&self.pod, local, shown, self.identity.clone())?;
        Ok((self.pod.connect_as(self.peer.ip(), target).await?, admission))
    }

    /// The answer is sent only now that the application is known to be there.
    async fn join(
        &self,
        local: &Workload,
        application: FlowSocket,
        mut admission: Admission,
        responder: Responder,
        flow: OpenFlow,
    ) {
        let mut headers = HeaderMap::new();
        if self.pod.shared.config.response_baggage
            && let Some(baggage) = resolve::baggage_header(local)
        {
            headers.insert(BAGGAGE, baggage);
        }
        match responder.accept(headers) {
            Ok(stream) => relay(application, Upstream::Tunnel(stream), Some(&mut admission.cut), flow).await,
            Err(error) => flow.finish(0, 0, Err(&error.into())),
        }
    }

    fn describe(&self, local: &Arc<Workload>, target: SocketAddr, request: &Request, told: Told) -> Flow {
        let index = self.pod.shared.state.snapshot();
        let mut flow = Flow::new(Direction::Inbound, self.peer, self.dialled);
        flow.authority = Some(request.authority.to_string());
        flow.mutual_tls = self.identity.is_some();
        if !told.remote {
            flow.source = resolve::source_by_address(&index, local, self.peer.ip());
        }
        flow.source_baggage = told.baggage;
        flow.source_identity = self.identity.clone();
        flow.service = resolve::inbound_service(&index, local, told.host.as_deref(), target.port());
        flow.destination_identity = Some(local.identity());
        flow.destination_workload = Some(local.clone());
        flow
    }

    fn refuse(&self, error: &ProxyError, responder: Responder) {
        responder.reject(status(error));
        self.deny(error);
    }

    fn deny(&self, error: &ProxyError) {
        self.pod.shared.outcomes.early_deny(Direction::Inbound, self.peer, self.dialled, error);
    }
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
        let connect =
            ProxyError::Connect { to: ([10, 0, 0, 1], 80).into(), source: std::io::ErrorKind::TimedOut.into() };
        assert_eq!(status(&mismatch), 400);
        assert_eq!(status(&ProxyError::UnknownWorkload("web".into())), 503);
        assert_eq!(status(&ProxyError::Loop), 503);
        assert_eq!(status(&connect), 503);
    }
}
