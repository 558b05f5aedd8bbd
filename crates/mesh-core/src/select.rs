//! From a captured connection to its next hop.
//!
//! ```text
//! destination is a service ── has a waypoint ──▶ the waypoint (through its network's gateway when that is foreign)
//!                          └─ otherwise ───────▶ an endpoint ─┬─ on a foreign network ──▶ its gateway, HBONE in HBONE
//! destination is a workload ─ has a waypoint ──▶ the waypoint ├─ speaks HBONE ──▶ HBONE
//!                           └─ otherwise ─────────────────────┴─ otherwise ─────▶ TCP
//! neither ──▶ passed through untouched, unless the source may call the registry only
//! ```
//! An endpoint known by name only is looked up by the caller, who then asks again with what was found.
//! A reference that does not resolve rejects the connection: nothing is bypassed silently.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use crate::{
    addr::{NetworkAddress, canonical, canonical_ip},
    authorize::Decision,
    balance::{self, Endpoint, Purpose},
    headers::Authority,
    identity::Identity,
    index::Index,
    reason::Reason,
    service::{IpFamilies, LoadBalancingMode, Service},
    workload::{GatewayAddress, GatewayDestination, OutboundPolicy, TunnelProtocol, Workload},
};

/// The port every HBONE endpoint listens on.
pub const HBONE_PORT: u16 = 15008;

/// Who wants to go where.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    pub source: &'a Workload,
    pub source_ip: IpAddr,
    /// As the application dialled it.
    pub destination: SocketAddr,
    /// Uids of endpoints that a previous attempt of this connection failed to reach.
    pub exclude: &'a [Arc<str>],
    /// For sources whose record says nothing about it.
    pub outbound_policy: OutboundPolicy,
    /// What was found of the hosts of earlier [`NextHop::Lookup`]s.
    pub lookups: &'a [Lookup],
}

/// A host that was looked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lookup {
    pub host: Arc<str>,
    /// None: it has no address, or could not be looked up.
    pub addresses: Vec<IpAddr>,
}

/// The next hop, and what it was derived from.
#[derive(Clone, Debug)]
pub struct Selection {
    pub next_hop: NextHop,
    /// The workload at the next hop: an endpoint, a waypoint, or behind a gateway.
    pub destination_workload: Option<Arc<Workload>>,
    /// The service addressed.
    pub service: Option<Arc<Service>>,
    /// [`crate::authorize::Verdict::Deny`] exactly for [`NextHop::Reject`].
    pub decision: Decision,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NextHop {
    /// HBONE to `outer`, and inside that a second HBONE tunnel to `inner`.
    DoubleHbone {
        outer: Tunnel,
        inner: InnerTunnel,
    },
    Hbone(Tunnel),
    /// The endpoint drawn is known by this name only: look it up and ask again.
    Lookup {
        host: Arc<str>,
    },
    /// Not the mesh's business.
    Passthrough {
        address: SocketAddr,
    },
    Reject {
        reason: Reason,
        detail: String,
    },
    /// A mesh destination without HBONE.
    Tcp {
        address: SocketAddr,
    },
    Waypoint(Tunnel),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunnel {
    pub address: SocketAddr,
    pub authority: Authority,
    /// Whom the peer's certificate may name; never empty.
    pub accepted: Arc<[Identity]>,
}

/// A tunnel inside a tunnel: the outer one knows the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InnerTunnel {
    pub authority: Authority,
    /// Never empty.
    pub accepted: Arc<[Identity]>,
}

/// Decides; a pure function of its arguments.
pub fn select(index: &Index, request: &Request<'_>, rng: &mut impl rand::Rng) -> Selection {
    let destination = canonical(request.destination);
    let address = NetworkAddress::new(request.source.network.clone(), destination.ip());
    let mut selector = Selector { index, request, destination, rng };
    let service = index.service_by_vip(&address, &request.source.namespace);
    let found = match service {
        Some(service) => selector.toward_service(service),
        None => match index.workload_by_address(&address) {
            Some(workload) => selector.toward_workload(workload),
            None => selector.beyond_the_registry(),
        },
    };
    let (next_hop, destination_workload) = found.unwrap_or_else(|instead| (instead.into(), None));
    let decision = explain(&next_hop, service, destination_workload.as_ref(), index.version());
    Selection { next_hop, destination_workload, service: service.cloned(), decision }
}

/// Why there is no next hop to dial.
enum Instead {
    Lookup(Arc<str>),
    Reject(Reason, String),
}

impl From<Instead> for NextHop {
    fn from(instead: Instead) -> Self {
        match instead {
            Instead::Lookup(host) => Self::Lookup { host },
            Instead::Reject(reason, detail) => Self::Reject { reason, detail },
        }
    }
}

type Found = Result<(NextHop, Option<Arc<Workload>>), Instead>;

/// A waypoint or gateway that a reference resolved to.
struct Resolved<'a> {
    endpoint: Endpoint,
    service: Option<&'a Arc<Service>>,
    /// The address referenced, when it was one: it steers the choice among the endpoint's addresses.
    steer: Option<IpAddr>,
}

struct Selector<'a, R> {
    index: &'a Index,
    request: &'a Request<'a>,
    destination: SocketAddr,
    rng: &'a mut R,
}

impl<'a, R: rand::Rng> Selector<'a, R> {
    fn toward_service(&mut self, service: &Arc<Service>) -> Found {
        // One of several waypoints is sent neither back to itself nor to one beside it.
        let mut waypoints =
            service.waypoint.iter().chain(service.weighted_waypoints.iter().map(|(waypoint, _)| waypoint));
        if !waypoints.any(|waypoint| self.source_is(waypoint))
            && let Some(waypoint) = self.waypoint_of(service)
        {
            return self.toward_waypoint(&waypoint, Some(service));
        }
        if service.load_balancing.as_ref().is_some_and(|lb| lb.mode == LoadBalancingMode::Passthrough) {
            return Ok((NextHop::Passthrough { address: self.destination }, None));
        }
        let endpoint = self.pick(service, self.destination.port(), Purpose::Standard).ok_or_else(|| {
            let (host, port) = (&service.hostname, self.destination.port());
            Instead::Reject(Reason::NoEndpoint, format!("no healthy upstream: {} ({host}:{port})", self.destination))
        })?;
        self.toward_endpoint(&endpoint, Some(service))
    }

    fn toward_workload(&mut self, workload: &Arc<Workload>) -> Found {
        if let Some(waypoint) = &workload.waypoint
            && !self.source_is(waypoint)
        {
            return self.toward_waypoint(waypoint, None);
        }
        self.toward_endpoint(&Endpoint { workload: workload.clone(), port: self.destination.port() }, None)
    }

    fn beyond_the_registry(&self) -> Found {
        let address = self.destination;
        match self.request.source.outbound_policy.unwrap_or(self.request.outbound_policy) {
            OutboundPolicy::AllowAny => Ok((NextHop::Passthrough { address }, None)),
            OutboundPolicy::RegistryOnly => {
                let detail = format!("{address} is not in the registry, and outboundTrafficPolicy is REGISTRY_ONLY");
                Err(Instead::Reject(Reason::NotInRegistry, detail))
            }
        }
    }

    fn toward_waypoint(&mut self, reference: &GatewayAddress, service: Option<&Arc<Service>>) -> Found {
        let waypoint = self.resolve(reference, Purpose::Waypoint).ok_or_else(|| unresolved("waypoint", reference))?;
        if waypoint.endpoint.workload.network != self.request.source.network {
            return self.through_gateway(&waypoint.endpoint.workload, service);
        }
        let tunnel = self.tunnel_to(&waypoint, Authority::Address(self.destination))?;
        Ok((NextHop::Waypoint(tunnel), Some(waypoint.endpoint.workload)))
    }

    fn toward_endpoint(&mut self, endpoint: &Endpoint, service: Option<&Arc<Service>>) -> Found {
        let workload = &endpoint.workload;
        if workload.network != self.request.source.network {
            return self.through_gateway(workload, service);
        }
        let families = service.map_or(IpFamilies::Automatic, |s| s.ip_families);
        let ip = self.address_of(workload, self.destination.ip(), families)?;
        let address = SocketAddr::new(ip, endpoint.port);
        let next_hop = match workload.tunnel_protocol {
            TunnelProtocol::None => NextHop::Tcp { address },
            TunnelProtocol::Hbone => NextHop::Hbone(Tunnel {
                address: SocketAddr::new(ip, HBONE_PORT),
                authority: Authority::Address(address),
                accepted: accepted(Some(workload), service),
            }),
        };
        Ok((next_hop, Some(workload.clone())))
    }

    /// To a workload of another network. Addresses mean nothing there, so the service's name goes in both tunnels.
    fn through_gateway(&mut self, workload: &Arc<Workload>, service: Option<&Arc<Service>>) -> Found {
        let no_route = |why: &str| {
            Instead::Reject(
                Reason::NoRoute,
                format!("no valid routing destination for workload {}: {why}", workload.uid),
            )
        };
        let service = service.ok_or_else(|| no_route("it is on another network and was not addressed as a service"))?;
        let reference = workload.network_gateway.as_ref();
        let reference = reference.ok_or_else(|| no_route("it is on another network, whose gateway is not known"))?;
        let gateway =
            self.resolve(reference, Purpose::Standard).ok_or_else(|| unresolved("network gateway", reference))?;
        let inner_accepted = accepted(None, Some(service));
        if inner_accepted.is_empty() {
            return Err(no_route("its service names no identity to expect behind the gateway"));
        }
        let authority = Authority::Host { host: service.hostname.clone(), port: self.destination.port() };
        let outer = self.tunnel_to(&gateway, authority.clone())?;
        let inner = InnerTunnel { authority, accepted: inner_accepted };
        Ok((NextHop::DoubleHbone { outer, inner }, Some(workload.clone())))
    }

    fn tunnel_to(&mut self, hop: &Resolved<'_>, authority: Authority) -> Result<Tunnel, Instead> {
        let Endpoint { workload, port } = &hop.endpoint;
        let families = hop.service.map_or(IpFamilies::Automatic, |s| s.ip_families);
        let ip = self.address_of(workload, hop.steer.unwrap_or_else(|| self.destination.ip()), families)?;
        let accepted = accepted(Some(workload), hop.service);
        Ok(Tunnel { address: SocketAddr::new(ip, *port), authority, accepted })
    }

    /// Weighted waypoints, where there are any to draw from, before the single one.
    fn waypoint_of(&mut self, service: &Service) -> Option<GatewayAddress> {
        let drawn = balance::draw(service.weighted_waypoints.iter().map(|(_, weight)| *weight), self.rng);
        drawn.map(|i| service.weighted_waypoints[i].0.clone()).or_else(|| service.waypoint.clone())
    }

    fn resolve(&mut self, reference: &GatewayAddress, purpose: Purpose) -> Option<Resolved<'a>> {
        let steer = match &reference.destination {
            GatewayDestination::Address(address) => Some(canonical_ip(address.ip)),
            GatewayDestination::Hostname { .. } => None,
        };
        let port = reference.hbone_mtls_port;
        if let Some(service) = self.service_at(reference) {
            let endpoint = self.pick(service, port, purpose)?;
            return Some(Resolved { endpoint, service: Some(service), steer });
        }
        let workload = self.workload_at(reference)?.clone();
        Some(Resolved { endpoint: Endpoint { workload, port }, service: None, steer })
    }

    fn service_at(&self, reference: &GatewayAddress) -> Option<&'a Arc<Service>> {
        match &reference.destination {
            GatewayDestination::Address(address) => self.index.service_by_vip(address, &self.request.source.namespace),
            GatewayDestination::Hostname { namespace, hostname } => {
                self.index.service(&format!("{namespace}/{hostname}"))
            }
        }
    }

    fn workload_at(&self, reference: &GatewayAddress) -> Option<&'a Arc<Workload>> {
        match &reference.destination {
            GatewayDestination::Address(address) => self.index.workload_by_address(address),
            GatewayDestination::Hostname { namespace, hostname } => {
                self.index.workload_by_hostname(namespace, hostname)
            }
        }
    }

    /// A waypoint's own traffic must not be sent back to it.
    fn source_is(&self, waypoint: &GatewayAddress) -> bool {
        let Request { source, source_ip, .. } = self.request;
        let source_ip = canonical_ip(*source_ip);
        let is_source = |w: &Arc<Workload>| {
            w.namespace == source.namespace
                && w.service_account == source.service_account
                && w.trust_domain == source.trust_domain
                && w.addresses.contains(&source_ip)
        };
        match self.service_at(waypoint) {
            Some(service) => self.index.endpoints(&service.key()).any(is_source),
            None => self.workload_at(waypoint).is_some_and(is_source),
        }
    }

    /// The address of `workload` to dial: the very one asked for; else, of those the service's families leave, one of the same family.
    /// A workload without any is looked up by its host name.
    fn address_of(&mut self, workload: &Workload, asked: IpAddr, families: IpFamilies) -> Result<IpAddr, Instead> {
        if workload.addresses.contains(&asked) {
            return Ok(asked);
        }
        let fits = |ip: &&IpAddr| families.allow(**ip);
        let same_family = |ip: &&IpAddr| ip.is_ipv4() == asked.is_ipv4();
        if workload.addresses.is_empty() && !workload.hostname.is_empty() {
            let host = &workload.hostname;
            let Some(lookup) = self.request.lookups.iter().find(|lookup| lookup.host == *host) else {
                return Err(Instead::Lookup(host.clone()));
            };
            let usable = || lookup.addresses.iter().filter(fits);
            let mut choice: Vec<&IpAddr> = usable().filter(same_family).collect();
            if choice.is_empty() {
                choice = usable().collect();
            }
            let drawn = balance::draw(choice.iter().map(|_| 1), self.rng).map(|drawn| *choice[drawn]);
            let no_address = || format!("no ip addresses were resolved for workload: {} ({host})", workload.uid);
            return drawn.ok_or_else(|| Instead::Reject(Reason::Lookup, no_address()));
        }
        let usable = || workload.addresses.iter().filter(fits);
        usable().find(same_family).or_else(|| usable().next()).copied().ok_or_else(|| {
            let why = match workload.addresses.is_empty() {
                true => "it has none",
                false => "none of its addresses is of a family the service allows",
            };
            Instead::Reject(Reason::NoRoute, format!("no ip address for workload {}: {why}", workload.uid))
        })
    }

    fn pick(&mut self, service: &Service, port: u16, purpose: Purpose) -> Option<Endpoint> {
        let Request { source, exclude, .. } = *self.request;
        balance::pick(self.index, service, source, port, purpose, exclude, self.rng)
    }
}

/// The peer's own identity, then those the service vouches for.
fn accepted(workload: Option<&Arc<Workload>>, service: Option<&Arc<Service>>) -> Arc<[Identity]> {
    let mut accepted: Vec<Identity> = workload.map(|w| w.identity()).into_iter().collect();
    for identity in service.iter().flat_map(|s| &s.subject_alt_names).filter_map(|name| name.parse().ok()) {
        if !accepted.contains(&identity) {
            accepted.push(identity);
        }
    }
    accepted.into()
}

fn unresolved(what: &str, reference: &GatewayAddress) -> Instead {
    let port = reference.hbone_mtls_port;
    let name = match &reference.destination {
        GatewayDestination::Address(address) => address.to_string(),
        GatewayDestination::Hostname { namespace, hostname } => format!("{namespace}/{hostname}"),
    };
    Instead::Reject(
        Reason::NoRoute,
        format!("unknown {what}: {name}, port {port}, is not known or has no healthy endpoint"),
    )
}

fn explain(hop: &NextHop, service: Option<&Arc<Service>>, workload: Option<&Arc<Workload>>, version: u64) -> Decision {
    let via = match hop {
        NextHop::DoubleHbone { outer, .. } => format!("HBONE in HBONE through gateway {}", outer.address),
        NextHop::Hbone(tunnel) => format!("HBONE to {}", tunnel.address),
        NextHop::Lookup { host } => format!("{host} is to be looked up"),
        NextHop::Passthrough { address } => format!("passed through to {address}"),
        NextHop::Reject { reason, detail } => return Decision::deny(*reason, detail, version),
        NextHop::Tcp { address } => format!("plain TCP to {address}"),
        NextHop::Waypoint(tunnel) => format!("HBONE to waypoint {}", tunnel.address),
    };
    let service = service.map(|s| format!("service {}", s.key()));
    let workload = workload.map(|w| format!("workload {}", w.uid));
    let parts: Vec<String> = [service, workload, Some(via)].into_iter().flatten().collect();
    Decision::allow(parts.join(", "), version)
}

#[cfg(test)]
mod tests;
