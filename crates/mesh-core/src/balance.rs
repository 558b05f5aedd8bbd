//! Which endpoint of a service: eligibility, locality rank, weighted draw.

use std::{fmt, sync::Arc};

use rand::RngExt as _;
use smallvec::SmallVec;

use crate::{
    index::Index,
    service::{LoadBalancingMode, Scope, Service},
    workload::Workload,
};

/// What the endpoint is wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The application's own traffic, or a network gateway.
    Standard,
    /// A waypoint: an endpoint with an application tunnel serves any port.
    Waypoint,
}

/// An endpoint and the port it serves the request on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub workload: Arc<Workload>,
    pub port: u16,
}

/// Draws an endpoint of `service` for `port`, or `None` when none is eligible. Endpoints in `exclude` (uids) are never drawn, so a
/// retry falls over to lower ranks before it gives up.
pub fn pick(
    index: &Index,
    service: &Service,
    source: &Workload,
    port: u16,
    purpose: Purpose,
    exclude: &[Arc<str>],
    rng: &mut impl rand::Rng,
) -> Option<Endpoint> {
    let key = service.key();
    let mut best: SmallVec<[(&Arc<Workload>, u16); 16]> = SmallVec::new();
    let mut best_rank = 0;
    for workload in index.endpoints(&key).filter(|w| !exclude.contains(&w.uid)) {
        let Ok((port, rank)) = eligible(service, &key, source, workload, port, purpose) else { continue };
        if rank > best_rank {
            best.clear();
            best_rank = rank;
        }
        if rank == best_rank {
            best.push((workload, port));
        }
    }
    let chosen = draw(best.iter().map(|(workload, _)| workload.capacity), rng)?;
    best.get(chosen).map(|&(workload, port)| Endpoint { workload: workload.clone(), port })
}

/// Why an endpoint is not drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ineligible {
    /// The service's locality rules forbid it to this source.
    Elsewhere,
    /// It does not serve the port.
    NoPort,
    /// No address, no name, no gateway.
    Unreachable,
    Unhealthy,
}

impl fmt::Display for Ineligible {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Elsewhere => "it is not where the service's traffic policy asks for",
            Self::NoPort => "it does not serve the port",
            Self::Unreachable => "it has neither an address nor a host name nor a gateway",
            Self::Unhealthy => "it is not ready",
        })
    }
}

/// Every endpoint of a service, and the port it serves `port` on, or why [`pick`] would not draw it.
pub fn examine<'a>(
    index: &'a Index,
    service: &Service,
    source: &Workload,
    port: u16,
) -> Vec<(&'a Arc<Workload>, Result<u16, Ineligible>)> {
    let key = service.key();
    let judge = |w| eligible(service, &key, source, w, port, Purpose::Standard).map(|(port, _)| port);
    index.endpoints(&key).map(|workload| (workload, judge(workload))).collect()
}

/// The port to use and the rank, higher being nearer.
fn eligible(
    service: &Service,
    key: &str,
    source: &Workload,
    workload: &Workload,
    port: u16,
    purpose: Purpose,
) -> Result<(u16, usize), Ineligible> {
    if !service.health_policy().takes(workload.health) {
        return Err(Ineligible::Unhealthy);
    }
    let via_gateway = workload.network != source.network && workload.network_gateway.is_some();
    if workload.addresses.is_empty() && workload.hostname.is_empty() && !via_gateway {
        return Err(Ineligible::Unreachable);
    }
    let port = target_port(service, key, workload, port, purpose).ok_or(Ineligible::NoPort)?;
    let rank = rank(service, source, workload).ok_or(Ineligible::Elsewhere)?;
    Ok((port, rank))
}

/// The port `workload` serves the service's `port` on. A service's target 0 is a named port, which the endpoint itself must map.
fn target_port(service: &Service, key: &str, workload: &Workload, port: u16, purpose: Purpose) -> Option<u16> {
    let defined = service.ports.iter().map(|p| p.mapping).find(|p| p.service_port == port);
    let tunnel = workload.application_tunnel.as_ref().filter(|_| purpose == Purpose::Waypoint);
    if defined.is_none() && tunnel.is_none() {
        return None;
    }
    let mapped = workload.services.get(key).and_then(|ports| ports.iter().find(|p| p.service_port == port).copied());
    mapped
        .or(defined)
        .map(|mapping| mapping.target_port)
        .filter(|&target| target != 0)
        .or_else(|| tunnel.and_then(|tunnel| tunnel.port).map(|_| port))
}

/// Higher is nearer; `None` when the service forbids this endpoint to this source.
fn rank(service: &Service, source: &Workload, workload: &Workload) -> Option<usize> {
    let Some(lb) = &service.load_balancing else { return Some(0) };
    let same = |scope: &Scope| same_scope(*scope, source, workload);
    match lb.mode {
        LoadBalancingMode::Standard | LoadBalancingMode::Passthrough => Some(0),
        LoadBalancingMode::Strict => lb.routing_preference.iter().all(same).then_some(0),
        // A leading NETWORK preference outweighs all that follow, and the others still rank endpoints of foreign networks.
        LoadBalancingMode::Failover => Some(match lb.routing_preference.split_first() {
            Some((Scope::Network, rest)) => {
                let network = if same(&Scope::Network) { 1 + rest.len() } else { 0 };
                network + rest.iter().take_while(|scope| same(scope)).count()
            }
            _ => lb.routing_preference.iter().take_while(|scope| same(scope)).count(),
        }),
    }
}

fn same_scope(scope: Scope, a: &Workload, b: &Workload) -> bool {
    match scope {
        Scope::Cluster => a.cluster_id == b.cluster_id,
        Scope::Network => a.network == b.network,
        Scope::Node => a.node == b.node,
        Scope::Region => a.locality.region == b.locality.region,
        Scope::Subzone => a.locality.subzone == b.locality.subzone,
        Scope::Zone => a.locality.zone == b.locality.zone,
    }
}

/// The position of a weighted random choice; `None` when every weight is 0.
pub(crate) fn draw(weights: impl Iterator<Item = u32> + Clone, rng: &mut impl rand::Rng) -> Option<usize> {
    let total: u64 = weights.clone().map(u64::from).sum();
    if total == 0 {
        return None;
    }
    let mut point = rng.random_range(0..total);
    weights.map(u64::from).position(|weight| {
        let hit = point < weight;
        point = point.saturating_sub(weight);
        hit
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use rand::{SeedableRng, rngs::StdRng};

    use super::*;
    use crate::{
        index::{Delta, Provenance, Resource},
        service::{AppProtocol, HealthPolicy, LoadBalancing, ServicePort},
        workload::{ApplicationTunnel, Health, PortMapping, Ports},
    };

    fn service(load_balancing: Option<LoadBalancing>) -> Service {
        let mut service = Service::new("demo", "web", "web.demo.svc.cluster.local");
        let mapping = PortMapping { service_port: 80, target_port: 8080 };
        service.ports = vec![ServicePort { mapping, app_protocol: AppProtocol::Unknown }];
        service.load_balancing = load_balancing;
        service
    }

    fn endpoint(name: &str, change: impl FnOnce(&mut Workload)) -> Workload {
        let mut workload = Workload::new(format!("Kubernetes//Pod/demo/{name}"), "demo", name);
        workload.addresses = vec!["10.0.0.1".parse().unwrap()];
        workload.services = [("demo/web.demo.svc.cluster.local".into(), Ports::new())].into_iter().collect();
        change(&mut workload);
        workload
    }

    fn place(region: &str, zone: &str) -> impl FnOnce(&mut Workload) {
        move |w| {
            w.locality.region = region.into();
            w.locality.zone = zone.into();
        }
    }

    fn failover(preference: &[Scope]) -> Option<LoadBalancing> {
        Some(LoadBalancing {
            routing_preference: preference.to_vec(),
            mode: LoadBalancingMode::Failover,
            health_policy: HealthPolicy::OnlyHealthy,
        })
    }

    fn index_of(service: &Service, endpoints: Vec<Workload>) -> Index {
        let mut index = Index::default();
        let mut upserts: Vec<Resource> = endpoints.into_iter().map(|w| Resource::Workload(Arc::new(w))).collect();
        upserts.push(Resource::Service(Arc::new(service.clone())));
        index.apply(Delta { provenance: Provenance::Xds, upserts, removals: Vec::new() });
        index
    }

    fn picks(
        service: &Service,
        endpoints: Vec<Workload>,
        port: u16,
        purpose: Purpose,
        exclude: &[Arc<str>],
    ) -> BTreeMap<String, u32> {
        let index = index_of(service, endpoints);
        let source = endpoint("client", place("r", "z"));
        let mut rng = StdRng::seed_from_u64(7);
        let mut seen = BTreeMap::new();
        for _ in 0..2000 {
            if let Some(e) = pick(&index, service, &source, port, purpose, exclude, &mut rng) {
                *seen.entry(format!("{}:{}", e.workload.name, e.port)).or_insert(0) += 1;
            }
        }
        seen
    }

    #[test]
    fn draws_in_proportion_to_capacity_and_never_a_zero() {
        let endpoints =
            vec![endpoint("a", |w| w.capacity = 3), endpoint("b", |_| ()), endpoint("c", |w| w.capacity = 0)];
        let seen = picks(&service(None), endpoints, 80, Purpose::Standard, &[]);
        assert_eq!(seen.len(), 2);
        assert!((1350..1650).contains(&seen["a:8080"]), "{seen:?}");
    }

    #[test]
    fn unhealthy_endpoints_serve_only_where_allowed() {
        let sick = || vec![endpoint("a", |w| w.health = Health::Unhealthy)];
        assert!(picks(&service(None), sick(), 80, Purpose::Standard, &[]).is_empty());
        let mut lb = failover(&[]).unwrap();
        lb.health_policy = HealthPolicy::AllowAll;
        assert_eq!(picks(&service(Some(lb)), sick(), 80, Purpose::Standard, &[]).len(), 1);
    }

    #[test]
    fn failover_keeps_the_nearest_and_falls_over_when_they_are_excluded() {
        let endpoints = || {
            vec![endpoint("near", place("r", "z")), endpoint("mid", place("r", "y")), endpoint("far", place("q", "z"))]
        };
        let service = service(failover(&[Scope::Region, Scope::Zone]));
        let names = |exclude: &[Arc<str>]| {
            picks(&service, endpoints(), 80, Purpose::Standard, exclude).into_keys().collect::<Vec<_>>()
        };
        let uid = |name: &str| Arc::from(format!("Kubernetes//Pod/demo/{name}"));
        assert_eq!(names(&[]), ["near:8080"]);
        assert_eq!(names(&[uid("near")]), ["mid:8080"]);
        assert_eq!(names(&[uid("near"), uid("mid"), uid("far")]), Vec::<String>::new());
    }

    #[test]
    fn a_leading_network_preference_ranks_as_documented() {
        let service = service(failover(&[Scope::Network, Scope::Region, Scope::Zone]));
        let source = endpoint("client", place("r", "z"));
        let ranked = |network: &str, region: &str, zone: &str| {
            let workload = endpoint("e", |w| {
                place(region, zone)(w);
                w.network = network.into();
            });
            rank(&service, &source, &workload).unwrap()
        };
        let ranks = [
            ranked("", "r", "z"),
            ranked("", "r", "-"),
            ranked("", "-", "z"),
            ranked("n", "r", "z"),
            ranked("n", "r", "-"),
            ranked("n", "-", "-"),
        ];
        assert_eq!(ranks, [5, 4, 3, 2, 1, 0]);
    }

    #[test]
    fn strict_uses_only_endpoints_that_match_everything() {
        let mut lb = failover(&[Scope::Node]).unwrap();
        lb.mode = LoadBalancingMode::Strict;
        let elsewhere = vec![endpoint("a", |w| w.node = "other".into())];
        assert!(picks(&service(Some(lb)), elsewhere, 80, Purpose::Standard, &[]).is_empty());
    }

    #[test]
    fn a_named_port_is_served_only_by_endpoints_that_map_it() {
        let mut service = service(None);
        service.ports[0].mapping.target_port = 0;
        let mapped = endpoint("mapped", |w| {
            let ports = Ports::from_slice(&[PortMapping { service_port: 80, target_port: 9090 }]);
            w.services = [("demo/web.demo.svc.cluster.local".into(), ports)].into_iter().collect();
        });
        let seen = picks(&service, vec![mapped, endpoint("unmapped", |_| ())], 80, Purpose::Standard, &[]);
        assert_eq!(seen.into_keys().collect::<Vec<_>>(), ["mapped:9090"]);
    }

    #[test]
    fn an_undefined_port_is_served_only_by_a_waypoint_with_an_application_tunnel() {
        let tunnel = || {
            vec![endpoint("w", |w| {
                w.application_tunnel = Some(ApplicationTunnel { proxy_protocol: true, port: Some(15088) })
            })]
        };
        assert!(picks(&service(None), tunnel(), 15008, Purpose::Standard, &[]).is_empty());
        assert_eq!(
            picks(&service(None), tunnel(), 15008, Purpose::Waypoint, &[]).into_keys().collect::<Vec<_>>(),
            ["w:15008"]
        );
    }
}
