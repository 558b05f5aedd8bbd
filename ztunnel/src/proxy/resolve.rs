//! What a connection is about: which workload it belongs to, where it goes next, and who is at the other end.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use http::{HeaderMap, HeaderValue};
use mesh_core::{
    addr::NetworkAddress,
    headers::{Authority, Baggage, TraceParent, encode_baggage, parse_baggage, parse_forwarded_host},
    index::Index,
    reason::Reason,
    select::{InnerTunnel, Lookup, NextHop, Request, Selection, Tunnel, select},
    service::Service,
    workload::{GatewayAddress, GatewayDestination, Workload},
};

use crate::{config::Config, discovery::on_demand, error::ProxyError, flow::Beyond, pods::PodContext};

/// How long a pod may be ahead of its own record.
const WORKLOAD_WAIT: Duration = Duration::from_secs(5);
/// `baggage` lines read of one request.
const BAGGAGE_LINES: usize = 8;

pub(crate) const BAGGAGE: &str = "baggage";
pub(crate) const FORWARDED: &str = "forwarded";
pub(crate) const TRACEPARENT: &str = "traceparent";
pub(crate) const FORWARDED_NETWORK: &str = "x-forwarded-network";

/// The pod's own record, to call out with.
pub(crate) async fn local_workload(pod: &PodContext) -> Result<Arc<Workload>, ProxyError> {
    let state = &pod.shared.state;
    let asked = on_demand::own_record(state, &pod.shared.config.cluster_id, &pod.info);
    tokio::join!(asked, state.local_workload(&pod.info, WORKLOAD_WAIT)).1.ok_or_else(|| unknown(pod))
}

/// The pod's own record, to be called by: waits, as long, for the policies that protect it.
pub(crate) async fn settled_workload(pod: &PodContext) -> Result<Arc<Workload>, ProxyError> {
    let state = &pod.shared.state;
    let asked = on_demand::own_record(state, &pod.shared.config.cluster_id, &pod.info);
    tokio::join!(asked, state.settled_workload(&pod.info, WORKLOAD_WAIT)).1.ok_or_else(|| unknown(pod))
}

fn unknown(pod: &PodContext) -> ProxyError {
    let info = &pod.info;
    ProxyError::UnknownWorkload(format!("{}.{} ({})", info.service_account, info.namespace, info.name))
}

/// An outbound connection with a next hop.
#[derive(Clone)]
pub(crate) struct Route {
    /// Tells the far side which of our connections it has before it.
    pub(crate) trace: TraceParent,
    pub(crate) source: Arc<Workload>,
    pub(crate) source_ip: IpAddr,
    pub(crate) peer: SocketAddr,
    /// As the application dialled it.
    pub(crate) destination: SocketAddr,
    pub(crate) hop: Hop,
    pub(crate) workload: Option<Arc<Workload>>,
    pub(crate) service: Option<Arc<Service>>,
    /// Who is behind the gateway, once the way is open.
    pub(crate) beyond: Option<Beyond>,
    /// Endpoints given up on, by uid.
    pub(crate) tried: Vec<Arc<str>>,
}

/// The next hops that can be dialled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Hop {
    /// A tunnel through another, which ends at a network's gateway.
    Beyond {
        gateway: Tunnel,
        inner: InnerTunnel,
    },
    Tcp(SocketAddr),
    Tunnel(Tunnel),
}

impl Hop {
    pub(crate) fn address(&self) -> SocketAddr {
        match self {
            Self::Tcp(address) => *address,
            Self::Beyond { gateway: tunnel, .. } | Self::Tunnel(tunnel) => tunnel.address,
        }
    }
}

/// Where `peer`, an application of the pod, gets to when it dials `destination`.
pub(crate) async fn outbound(
    pod: &PodContext,
    trace: TraceParent,
    peer: SocketAddr,
    destination: SocketAddr,
) -> Result<Route, ProxyError> {
    // A captured connection to one of our own loopback ports would come straight back.
    if destination.ip().is_loopback() && pod.is_own_port(destination.port()) {
        return Err(ProxyError::Loop);
    }
    let source = local_workload(pod).await?;
    // The same by the pod's own address: SOCKS clients may name any.
    if source.addresses.contains(&destination.ip().to_canonical()) && pod.is_own_port(destination.port()) {
        return Err(ProxyError::Loop);
    }
    // Where the pod has no namespace of its own, loopback clients speak for its address.
    let source_ip = pod.shared.config.local_address.unwrap_or_else(|| peer.ip());
    on_demand::destination_known(&pod.shared.state, &source, destination.ip().to_canonical()).await.map_err(
        |unanswered| {
            let detail = format!("asked what is at {}: {unanswered}", destination.ip());
            ProxyError::NoRoute { reason: Reason::Lookup, detail }
        },
    )?;
    let selection = choose(pod, &source, source_ip, destination, &[]).await;
    let hop = dialable(selection.next_hop)?;
    let (workload, service) = (selection.destination_workload, selection.service);
    Ok(Route { trace, source, source_ip, peer, destination, hop, workload, service, beyond: None, tried: Vec::new() })
}

impl Route {
    /// Whether the service addressed has further endpoints.
    pub(crate) fn has_alternatives(&self, pod: &PodContext) -> bool {
        let Some(service) = &self.service else { return false };
        pod.shared.state.snapshot().endpoints(&service.key()).nth(1).is_some()
    }

    /// Turns to another endpoint; false when there is none.
    pub(crate) async fn reroute(&mut self, pod: &PodContext) -> bool {
        let Some(failed) = &self.workload else { return false };
        self.tried.push(failed.uid.clone());
        let selection = choose(pod, &self.source, self.source_ip, self.destination, &self.tried).await;
        let fresh = selection.destination_workload.filter(|workload| !self.tried.contains(&workload.uid));
        match (dialable(selection.next_hop), fresh) {
            (Ok(hop), Some(workload)) => {
                (self.hop, self.workload, self.service) = (hop, Some(workload), selection.service);
                true
            }
            _ => false,
        }
    }
}

/// Hosts of one connection that may have to be looked up: every round may draw another endpoint.
const LOOKUPS: usize = 4;

async fn choose(
    pod: &PodContext,
    source: &Workload,
    source_ip: IpAddr,
    destination: SocketAddr,
    exclude: &[Arc<str>],
) -> Selection {
    let outbound_policy = pod.shared.config.outbound_policy;
    let mut lookups = Vec::new();
    loop {
        let request = Request { source, source_ip, destination, exclude, outbound_policy, lookups: &lookups };
        let selection = select(&pod.shared.state.snapshot(), &request, &mut rand::rng());
        match &selection.next_hop {
            NextHop::Lookup { host } if lookups.len() < LOOKUPS => {
                pod.shared.outcomes.looked_up(source, host);
                let addresses = pod.shared.lookups.addresses(host).await.to_vec();
                lookups.push(Lookup { host: host.clone(), addresses });
            }
            _ => return selection,
        }
    }
}

fn dialable(hop: NextHop) -> Result<Hop, ProxyError> {
    match hop {
        NextHop::Passthrough { address } | NextHop::Tcp { address } => Ok(Hop::Tcp(address)),
        NextHop::Hbone(tunnel) | NextHop::Waypoint(tunnel) => Ok(Hop::Tunnel(tunnel)),
        NextHop::Reject { reason, detail } => Err(ProxyError::NoRoute { reason, detail }),
        NextHop::Lookup { host } => {
            let detail = format!("{host} is one name too many: {LOOKUPS} were looked up for this connection");
            Err(ProxyError::NoRoute { reason: Reason::Lookup, detail })
        }
        NextHop::DoubleHbone { outer, inner } => Ok(Hop::Beyond { gateway: outer, inner }),
    }
}

/// Where a CONNECT ends: checks that it is meant for `local` and finds the port, which must not be one of ours. The address is always
/// the one dialled.
pub(crate) fn inbound_target(
    is_own_port: impl Fn(u16) -> bool,
    index: &Index,
    local: &Workload,
    dialled: IpAddr,
    authority: &Authority,
) -> Result<SocketAddr, ProxyError> {
    let port = match authority {
        Authority::Address(asked) => {
            if !is_for(index, local, dialled, asked.ip()) {
                return Err(ProxyError::AddressMismatch { dialled, asked: asked.ip() });
            }
            asked.port()
        }
        Authority::Host { host, port } => {
            // A workload that takes everything on one port needs no mapping.
            let tunnel = local.application_tunnel.as_ref().and_then(|tunnel| tunnel.port);
            let port = port_of(index, local, host, *port).or(tunnel);
            port.ok_or_else(|| ProxyError::UnknownTarget(authority.to_string()))?
        }
    };
    if is_own_port(port) {
        return Err(ProxyError::Loop);
    }
    let port = local.application_tunnel.as_ref().and_then(|tunnel| tunnel.port).unwrap_or(port);
    Ok(SocketAddr::new(dialled, port))
}

/// The address a client named, for a workload that is told about it: of a service, one of its VIPs, of the workload's own network and
/// IPv4 where there is a choice.
pub(crate) fn named_address(index: &Index, local: &Workload, authority: &Authority) -> Option<SocketAddr> {
    match authority {
        Authority::Address(address) => Some(*address),
        Authority::Host { host, port } => {
            let service = index.service_by_hostname(host, &local.namespace)?;
            let vip = service.vips.iter().min_by_key(|vip| (vip.network != local.network, vip.ip.is_ipv6()))?;
            Some(SocketAddr::new(vip.ip, *port))
        }
    }
}

/// The address dialled, anything for a workload that is itself a proxy, and whatever has us for a waypoint.
fn is_for(index: &Index, local: &Workload, dialled: IpAddr, asked: IpAddr) -> bool {
    if asked == dialled || local.application_tunnel.is_some() {
        return true;
    }
    let address = NetworkAddress::new(local.network.clone(), asked);
    let by_service = index.service_by_vip(&address, &local.namespace).into_iter().flat_map(|service| {
        service.waypoint.iter().chain(service.weighted_waypoints.iter().map(|(waypoint, _)| waypoint))
    });
    let by_workload = index.workload_by_address(&address).and_then(|workload| workload.waypoint.as_ref());
    by_service.chain(by_workload).any(|waypoint| leads_to(index, waypoint, local))
}

fn leads_to(index: &Index, gateway: &GatewayAddress, local: &Workload) -> bool {
    let (service, workload) = match &gateway.destination {
        GatewayDestination::Address(address) => {
            (index.service_by_vip(address, &local.namespace), index.workload_by_address(address))
        }
        GatewayDestination::Hostname { namespace, hostname } => {
            (index.service(&format!("{namespace}/{hostname}")), index.workload_by_hostname(namespace, hostname))
        }
    };
    service.is_some_and(|service| local.services.contains_key(&service.key()))
        || workload.is_some_and(|workload| workload.uid == local.uid)
}

/// The endpoint's own mapping of a service's port, or the service's.
fn port_of(index: &Index, local: &Workload, host: &str, port: u16) -> Option<u16> {
    let service = index.service_by_hostname(host, &local.namespace)?;
    let mapped = local.services.get(&service.key()).into_iter().flatten().find(|p| p.service_port == port);
    let mapped = mapped.or_else(|| service.ports.iter().map(|p| &p.mapping).find(|p| p.service_port == port));
    mapped.map(|p| p.target_port).filter(|target| *target != 0)
}

/// The service an inbound connection came for, for telemetry: the one the client named, else the first of the workload's that leads to
/// `port`.
pub(crate) fn inbound_service(index: &Index, local: &Workload, named: Option<&str>, port: u16) -> Option<Arc<Service>> {
    let services = || local.services.iter().filter_map(|(key, ports)| Some((index.service(key)?, ports)));
    let by_name = services().find(|(service, _)| named.is_some_and(|named| *service.hostname == *named));
    let by_port = || {
        services().find(|(service, ports)| {
            ports.iter().chain(service.ports.iter().map(|p| &p.mapping)).any(|p| p.target_port == port)
        })
    };
    by_name.or_else(by_port).map(|(service, _)| service.clone())
}

/// What a peer said about the source of its connection. For telemetry.
#[derive(Debug, Default)]
pub(crate) struct Told {
    pub(crate) baggage: Option<Baggage>,
    /// The service the client addressed.
    pub(crate) host: Option<String>,
    /// It came through a gateway of another network: the TCP peer is not the source.
    pub(crate) remote: bool,
}

pub(crate) fn told(config: &Config, headers: &HeaderMap) -> Told {
    let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
    Told {
        baggage: baggage(config, headers),
        host: text(FORWARDED).and_then(parse_forwarded_host),
        remote: text(FORWARDED_NETWORK).is_some_and(|network| !network.eq_ignore_ascii_case(&config.network)),
    }
}

/// What either end of a CONNECT said of itself.
pub(crate) fn baggage(config: &Config, headers: &HeaderMap) -> Option<Baggage> {
    let lines = headers.get_all(BAGGAGE).iter().take(BAGGAGE_LINES).filter_map(|value| value.to_str().ok());
    let text = lines.collect::<Vec<_>>().join(",");
    (config.response_baggage && !text.is_empty()).then(|| parse_baggage(&text))
}

/// The workload at an address of the pod's own network.
pub(crate) fn source_by_address(index: &Index, local: &Workload, ip: IpAddr) -> Option<Arc<Workload>> {
    index.workload_by_address(&NetworkAddress::new(local.network.clone(), ip)).cloned()
}

/// A `baggage` header; none for a workload of which there is nothing to say.
pub(crate) fn baggage_header(workload: &Workload) -> Option<HeaderValue> {
    let text = encode_baggage(workload);
    HeaderValue::try_from(text).ok().filter(|value| !value.is_empty())
}

#[cfg(test)]
mod tests;
