//! From an application of the pod to wherever it dialled.

use std::{cell::Cell, future::Future, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use futures_util::future::{Either, select};
use http::{HeaderName, HeaderValue};
use mesh_core::{
    headers::{Authority, TraceParent, encode_forwarded},
    select::Tunnel,
};
use mesh_hbone::{ConnectRequest, TunnelKey};
use mesh_net::sockets::{canonical, configure_accepted, original_dst};
use tokio::{net::TcpStream, time::sleep};
use tracing::Instrument as _;

use crate::{
    connections::Entry,
    error::ProxyError,
    flow::{Direction, Flow},
    pods::PodContext,
    proxy::{
        forward::{Carried, FlowSocket},
        resolve::{self, BAGGAGE, FORWARDED, FORWARDED_NETWORK, Hop, Route, TRACEPARENT, baggage_header},
        upstream::{Upstream, open_inside},
    },
};

/// A captured connection.
pub(crate) async fn open(pod: &PodContext, client: TcpStream, peer: SocketAddr) -> Option<Carried> {
    let client = FlowSocket::new(client);
    let accepted = configure_accepted(&client, &pod.sockets).and_then(|()| original_dst(&*client));
    let (destination, error) = match accepted {
        // Not redirected: the client dialled our port itself, and carrying it there would come back here without end.
        Ok(destination) if dialled_us(pod, &client, destination) => (destination, ProxyError::Loop),
        Ok(destination) => return carry(pod, client, peer, destination).await,
        Err(source) => (peer, ProxyError::OriginalDestination(source)),
    };
    pod.shared.outcomes.early_deny(Direction::Outbound, peer, destination, &error);
    None
}

fn dialled_us(pod: &PodContext, client: &TcpStream, destination: SocketAddr) -> bool {
    let local = client.local_addr().map(canonical);
    pod.is_own_port(destination.port()) && local.is_ok_and(|local| local == canonical(destination))
}

/// Opens the way of a client to `destination`, however its wish became known. Its bytes stay in its socket until then.
pub(crate) async fn carry(
    pod: &PodContext,
    client: FlowSocket,
    peer: SocketAddr,
    destination: SocketAddr,
) -> Option<Carried> {
    let trace = TraceParent::random(&mut rand::rng());
    // The same number as on the far side. Made only where somebody wants to read it.
    let span = tracing::debug_span!(parent: &pod.span, "outbound", id = %trace.id());
    carry_traced(pod, trace, client, peer, destination).instrument(span).await
}

async fn carry_traced(
    pod: &PodContext,
    trace: TraceParent,
    client: FlowSocket,
    peer: SocketAddr,
    destination: SocketAddr,
) -> Option<Carried> {
    let mut route = match resolve::outbound(pod, trace, peer, destination).await {
        Ok(route) => route,
        Err(error) => {
            pod.shared.outcomes.early_deny(Direction::Outbound, peer, destination, &error);
            return None;
        }
    };
    let mut flow = pod.shared.outcomes.opened(describe(&route));
    let mut live = pod.connections.add(flow.entry().clone());
    let first = route.hop.clone();
    let established = establish(pod, &mut route).await;
    if route.hop != first || route.beyond.is_some() {
        let entry = describe(&route);
        live.retarget(entry.clone());
        flow.retarget(entry);
    }
    match established {
        Ok(upstream) => Some(Carried::new(client, upstream, flow, live)),
        Err(error) => {
            flow.finish(Err(&error));
            None
        }
    }
}

fn describe(route: &Route) -> Arc<Entry> {
    let mut flow = Flow::new(Direction::Outbound, route.peer, route.hop.address());
    flow.target = route.destination;
    flow.source = Some(route.source.clone());
    flow.destination_workload = route.workload.clone();
    flow.service = route.service.clone();
    match &route.hop {
        Hop::Tcp(_) => {}
        Hop::Tunnel(tunnel) => (flow.authority, flow.mutual_tls) = (Some(tunnel.authority.clone()), true),
        Hop::Beyond { gateway, .. } => {
            (flow.authority, flow.mutual_tls) = (Some(gateway.authority.clone()), true);
            flow.beyond = Some(Box::new(route.beyond.clone().unwrap_or_default()));
        }
    }
    Entry::new(flow)
}

/// How long an endpoint may keep a connection waiting before another one is asked as well. Longer than ways across regions take; a pod
/// that went without a word, or a node, would otherwise cost every connection to it the whole of a timeout.
const HEAD_START: Duration = Duration::from_millis(300);

/// Opens the way. As no byte of the application has been sent before this returns, a failure may be tried again: once on a fresh
/// tunnel where the old one broke under the request, and once at another endpoint; both within the pod's budget. Where an endpoint says
/// nothing, another is tried beside it, and the first that answers has the connection; only when both fail is a third one asked.
async fn establish(pod: &PodContext, route: &mut Route) -> Result<Upstream, ProxyError> {
    pod.retries.earn();
    if !route.has_alternatives(pod) {
        return retry(pod, route).await;
    }
    let mut first = Box::pin(reach(pod, route.clone()));
    let error = tokio::select! {
        biased;
        (reached, result) = &mut first => match settle(route, reached, result) {
            Ok(upstream) => return Ok(upstream),
            Err(error) => error,
        },
        () = sleep(HEAD_START) => match beside(pod, route, first).await {
            Ok(upstream) => return Ok(upstream),
            Err(error) => error,
        },
    };
    elsewhere(pod, route, error).await
}

/// The first endpoint goes on; another one, where the budget allows, is tried at the same time.
async fn beside(
    pod: &PodContext,
    route: &mut Route,
    first: impl Future<Output = (Route, Result<Upstream, ProxyError>)>,
) -> Result<Upstream, ProxyError> {
    if !pod.retries.spend() {
        let (reached, result) = first.await;
        return settle(route, reached, result);
    }
    let mut other = route.clone();
    let second = async {
        if !other.reroute(pod).await {
            return None;
        }
        tracing::debug!(next = %other.hop.address(), "trying another endpoint as well");
        Some(reach(pod, other).await)
    };
    match select(pin!(first), pin!(second)).await {
        Either::Left(((reached, result), second)) => match settle(route, reached, result) {
            Ok(upstream) => Ok(upstream),
            Err(error) => match second.await {
                Some((reached, result)) => settle(route, reached, result),
                None => Err(error),
            },
        },
        Either::Right((Some((reached, Ok(upstream))), _)) => settle(route, reached, Ok(upstream)),
        Either::Right((second, first)) => {
            // Not to be drawn again should the first one fail, too.
            route.tried.extend(second.and_then(|(reached, _)| reached.workload).map(|failed| failed.uid.clone()));
            let (reached, result) = first.await;
            settle(route, reached, result)
        }
    }
}

/// `route` becomes what was reached, or failed to be.
fn settle(route: &mut Route, reached: Route, result: Result<Upstream, ProxyError>) -> Result<Upstream, ProxyError> {
    let tried = std::mem::take(&mut route.tried);
    *route = reached;
    route.tried.extend(tried);
    result
}

async fn retry(pod: &PodContext, route: &mut Route) -> Result<Upstream, ProxyError> {
    let (reached, result) = reach(pod, route.clone()).await;
    match settle(route, reached, result) {
        Ok(upstream) => Ok(upstream),
        Err(error) => elsewhere(pod, route, error).await,
    }
}

/// Another endpoint, if there is one and the failure leaves hope.
async fn elsewhere(pod: &PodContext, route: &mut Route, error: ProxyError) -> Result<Upstream, ProxyError> {
    if !error.retryable() || !pod.retries.spend() || !route.reroute(pod).await {
        return Err(error);
    }
    tracing::debug!(error = error.chain(), next = %route.hop.address(), "trying another endpoint");
    let (reached, result) = reach(pod, route.clone()).await;
    settle(route, reached, result)
}

/// One endpoint: a second time where its tunnel broke under the request.
async fn reach(pod: &PodContext, mut route: Route) -> (Route, Result<Upstream, ProxyError>) {
    let mut result = attempt(pod, &mut route).await;
    if result.as_ref().is_err_and(broke_underneath) && pod.retries.spend() {
        result = attempt(pod, &mut route).await;
    }
    (route, result)
}

/// Whether the failure says something about the tunnel used rather than about the endpoint.
fn broke_underneath(error: &ProxyError) -> bool {
    use mesh_hbone::Error::{GoAway, Lost, Refused};
    matches!(error, ProxyError::Tunnel(GoAway | Lost { .. } | Refused))
}

async fn attempt(pod: &PodContext, route: &mut Route) -> Result<Upstream, ProxyError> {
    route.beyond = None;
    match &route.hop {
        Hop::Tcp(address) => Ok(Upstream::Tcp(pod.connect(*address).await?)),
        Hop::Tunnel(tunnel) => {
            let request = request(route, &tunnel.authority);
            let (stream, _response) = pod.pool.open(&key(pod, route, tunnel), &request).await?;
            Ok(Upstream::Tunnel(stream))
        }
        Hop::Beyond { gateway, inner } => {
            let asked = request(route, &gateway.authority);
            let (outer, _response) = pod.pool.open(&key(pod, route, gateway), &asked).await?;
            let mut asked = request(route, &inner.authority);
            // Tells the far side that its TCP peer, a gateway, is not the source.
            let network = HeaderValue::try_from(&*pod.shared.config.network);
            asked.headers.extend(network.ok().map(|network| (HeaderName::from_static(FORWARDED_NETWORK), network)));
            let source = route.source.identity();
            // Boxed: few connections need it, and every one's future would have room for it.
            let opening = Box::pin(open_inside(pod, outer, &source, &inner.accepted, &asked));
            let (stream, beyond) = opening.await?;
            route.beyond = Some(beyond);
            Ok(Upstream::Tunnel(stream))
        }
    }
}

fn key(pod: &PodContext, route: &Route, tunnel: &Tunnel) -> TunnelKey {
    let source_identity = route.source.identity();
    // None before the first: the dial waits for it.
    let generation = pod.shared.identities.cached(&source_identity).map_or(0, |certificate| certificate.generation);
    TunnelKey {
        source_uid: route.source.uid.clone(),
        source_ip: route.source_ip,
        source_identity,
        generation,
        destination: tunnel.address,
        accepted: tunnel.accepted.clone(),
        network: route.source.network.clone(),
    }
}

fn request(route: &Route, authority: &Authority) -> ConnectRequest {
    let host = route.service.as_ref().map(|service| &*service.hostname);
    let forwarded = encode_forwarded(SocketAddr::new(route.source_ip, route.peer.port()), host);
    let headers = [
        (BAGGAGE, baggage_header(&route.source)),
        (FORWARDED, HeaderValue::try_from(forwarded).ok()),
        (TRACEPARENT, HeaderValue::try_from(route.trace.to_string()).ok()),
    ];
    let headers = headers.into_iter().filter_map(|(name, value)| Some((HeaderName::from_static(name), value?)));
    ConnectRequest { authority: authority.clone(), headers: headers.collect() }
}

/// Retries a pod's flows may cost on one worker: a fifth of its connections, and a few more at first. A destination that is down must
/// not be met with twice the load.
#[derive(Debug)]
pub(crate) struct RetryBudget(Cell<u32>);

/// In units of one connection's earnings.
const RETRY_COST: u32 = 5;
const BUDGET_AT_FIRST: u32 = 10 * RETRY_COST;
const BUDGET_LIMIT: u32 = 100 * RETRY_COST;

impl Default for RetryBudget {
    fn default() -> Self {
        Self(Cell::new(BUDGET_AT_FIRST))
    }
}

impl RetryBudget {
    fn earn(&self) {
        self.0.set((self.0.get() + 1).min(BUDGET_LIMIT));
    }

    /// Whether one more retry is covered; if so it is paid.
    fn spend(&self) -> bool {
        let left = self.0.get().checked_sub(RETRY_COST);
        self.0.set(left.unwrap_or_else(|| self.0.get()));
        left.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_stay_a_fifth_of_the_connections() {
        let budget = RetryBudget::default();
        let first = (0..).take_while(|_| budget.spend()).count();
        assert_eq!(first, 10);
        for _ in 0..RETRY_COST {
            assert!(!budget.spend());
            budget.earn();
        }
        assert!(budget.spend());
        assert!(!budget.spend());
    }
}
