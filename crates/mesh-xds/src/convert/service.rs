//! `istio.workload.Service`.

use ipnet::IpNet;
use mesh_core::{
    addr::NetworkAddress,
    service::{
        AppProtocol, HealthPolicy, IpFamilies, LoadBalancing, LoadBalancingMode, Scope, Service, ServicePort,
        Visibility,
    },
};
use proto::workload as wire;
use wire::{load_balancing as lb, service::Visibility as WireVisibility};

use super::{
    Unacceptable, gateway_from_wire, gateway_to_wire, ip_from_wire, ip_to_wire, prefix_from_wire, unknown_enum,
    workload::port_pair,
};

/// # Errors
/// A missing hostname, a malformed address, port or gateway, an unknown enum value. An unknown visibility counts as public, as it
/// does upstream.
pub fn service_from_wire(s: wire::Service) -> Result<Service, Unacceptable> {
    if s.hostname.is_empty() {
        return Err(Unacceptable::new("hostname", "is empty"));
    }
    let mut service = Service::new(s.namespace, s.name, s.hostname);
    for address in s.addresses {
        let ip = ip_from_wire("addresses", &address.address)?;
        let prefix = match address.length {
            // The length is that of the bytes sent; an IPv4-mapped address is folded, and its length with it.
            Some(length) if address.address.len() == 16 && ip.is_ipv4() => {
                prefix_from_wire("addresses", &address.address, length.saturating_sub(96))?
            }
            Some(length) => prefix_from_wire("addresses", &address.address, length)?,
            None => ip.into(),
        };
        if prefix.prefix_len() == prefix.max_prefix_len() {
            service.vips.push(NetworkAddress::new(address.network, prefix.addr()));
        } else {
            service.cidr_vips.push((address.network.into(), prefix.trunc()));
        }
    }
    service.ports = s.ports.into_iter().map(port_from_wire).collect::<Result<_, _>>()?;
    service.subject_alt_names = s.subject_alt_names.into_iter().map(Into::into).collect();
    service.waypoint = s.waypoint.map(|g| gateway_from_wire("waypoint", g)).transpose()?;
    for weighted in s.weighted_waypoints {
        let Some(destination) = weighted.destination else {
            return Err(Unacceptable::new("weighted_waypoints.destination", "is missing"));
        };
        service
            .weighted_waypoints
            .push((gateway_from_wire("weighted_waypoints.destination", destination)?, weighted.weight));
    }
    service.load_balancing = s.load_balancing.map(load_balancing_from_wire).transpose()?;
    service.ip_families = match wire::IpFamilies::try_from(s.ip_families) {
        Ok(wire::IpFamilies::Automatic) => IpFamilies::Automatic,
        Ok(wire::IpFamilies::Dual) => IpFamilies::Dual,
        Ok(wire::IpFamilies::Ipv4Only) => IpFamilies::Ipv4Only,
        Ok(wire::IpFamilies::Ipv6Only) => IpFamilies::Ipv6Only,
        Err(_) => return Err(unknown_enum("ip_families", s.ip_families)),
    };
    service.canonical = s.canonical;
    service.ingress_use_waypoint = s.ingress_use_waypoint;
    service.visibility = match WireVisibility::try_from(s.visibility) {
        Ok(WireVisibility::Namespace) => Visibility::Namespace,
        Ok(WireVisibility::Public) | Err(_) => Visibility::Public,
    };
    Ok(service)
}

pub fn service_to_wire(s: &Service) -> wire::Service {
    let vip = |v: &NetworkAddress| wire::NetworkAddress {
        network: v.network.to_string(),
        address: ip_to_wire(v.ip),
        length: None,
    };
    let range = |(network, prefix): &(std::sync::Arc<str>, IpNet)| wire::NetworkAddress {
        network: network.to_string(),
        address: ip_to_wire(prefix.addr()),
        length: Some(prefix.prefix_len().into()),
    };
    wire::Service {
        name: s.name.to_string(),
        namespace: s.namespace.to_string(),
        hostname: s.hostname.to_string(),
        addresses: s.vips.iter().map(vip).chain(s.cidr_vips.iter().map(range)).collect(),
        ports: s.ports.iter().map(port_to_wire).collect(),
        subject_alt_names: s.subject_alt_names.iter().map(ToString::to_string).collect(),
        waypoint: s.waypoint.as_ref().map(gateway_to_wire),
        load_balancing: s.load_balancing.as_ref().map(load_balancing_to_wire),
        ip_families: match s.ip_families {
            IpFamilies::Automatic => wire::IpFamilies::Automatic,
            IpFamilies::Dual => wire::IpFamilies::Dual,
            IpFamilies::Ipv4Only => wire::IpFamilies::Ipv4Only,
            IpFamilies::Ipv6Only => wire::IpFamilies::Ipv6Only,
        } as i32,
        extensions: Vec::new(),
        canonical: s.canonical,
        ingress_use_waypoint: s.ingress_use_waypoint,
        weighted_waypoints: s
            .weighted_waypoints
            .iter()
            .map(|(g, weight)| wire::WeightedWaypoint { destination: Some(gateway_to_wire(g)), weight: *weight })
            .collect(),
        visibility: match s.visibility {
            Visibility::Namespace => WireVisibility::Namespace,
            Visibility::Public => WireVisibility::Public,
        } as i32,
    }
}

fn port_from_wire(p: wire::Port) -> Result<ServicePort, Unacceptable> {
    let app_protocol = match wire::AppProtocol::try_from(p.app_protocol) {
        Ok(wire::AppProtocol::Grpc) => AppProtocol::Grpc,
        Ok(wire::AppProtocol::Http11) => AppProtocol::Http11,
        Ok(wire::AppProtocol::Http2) => AppProtocol::Http2,
        Ok(wire::AppProtocol::Tcp) => AppProtocol::Tcp,
        Ok(wire::AppProtocol::Tls) => AppProtocol::Tls,
        // A hint for L7 only: a protocol invented later must not cost the service.
        Ok(wire::AppProtocol::Unknown) | Err(_) => AppProtocol::Unknown,
    };
    Ok(ServicePort { mapping: port_pair(p.service_port, p.target_port)?, app_protocol })
}

fn port_to_wire(p: &ServicePort) -> wire::Port {
    wire::Port {
        service_port: p.mapping.service_port.into(),
        target_port: p.mapping.target_port.into(),
        app_protocol: match p.app_protocol {
            AppProtocol::Grpc => wire::AppProtocol::Grpc,
            AppProtocol::Http11 => wire::AppProtocol::Http11,
            AppProtocol::Http2 => wire::AppProtocol::Http2,
            AppProtocol::Tcp => wire::AppProtocol::Tcp,
            AppProtocol::Tls => wire::AppProtocol::Tls,
            AppProtocol::Unknown => wire::AppProtocol::Unknown,
        } as i32,
    }
}

fn load_balancing_from_wire(l: wire::LoadBalancing) -> Result<LoadBalancing, Unacceptable> {
    let scope = |value: &i32| match lb::Scope::try_from(*value) {
        Ok(lb::Scope::Cluster) => Ok(Scope::Cluster),
        Ok(lb::Scope::Network) => Ok(Scope::Network),
        Ok(lb::Scope::Node) => Ok(Scope::Node),
        Ok(lb::Scope::Region) => Ok(Scope::Region),
        Ok(lb::Scope::Subzone) => Ok(Scope::Subzone),
        Ok(lb::Scope::Zone) => Ok(Scope::Zone),
        Ok(lb::Scope::UnspecifiedScope) | Err(_) => Err(unknown_enum("load_balancing.routing_preference", *value)),
    };
    Ok(LoadBalancing {
        routing_preference: l.routing_preference.iter().map(scope).collect::<Result<_, _>>()?,
        mode: match lb::Mode::try_from(l.mode) {
            Ok(lb::Mode::UnspecifiedMode) => LoadBalancingMode::Standard,
            Ok(lb::Mode::Strict) => LoadBalancingMode::Strict,
            Ok(lb::Mode::Failover) => LoadBalancingMode::Failover,
            Ok(lb::Mode::Passthrough) => LoadBalancingMode::Passthrough,
            Err(_) => return Err(unknown_enum("load_balancing.mode", l.mode)),
        },
        health_policy: match lb::HealthPolicy::try_from(l.health_policy) {
            Ok(lb::HealthPolicy::OnlyHealthy) => HealthPolicy::OnlyHealthy,
            Ok(lb::HealthPolicy::AllowAll) => HealthPolicy::AllowAll,
            Err(_) => return Err(unknown_enum("load_balancing.health_policy", l.health_policy)),
        },
    })
}

fn load_balancing_to_wire(l: &LoadBalancing) -> wire::LoadBalancing {
    let scope = |scope: &Scope| match scope {
        Scope::Cluster => lb::Scope::Cluster,
        Scope::Network => lb::Scope::Network,
        Scope::Node => lb::Scope::Node,
        Scope::Region => lb::Scope::Region,
        Scope::Subzone => lb::Scope::Subzone,
        Scope::Zone => lb::Scope::Zone,
    } as i32;
    wire::LoadBalancing {
        routing_preference: l.routing_preference.iter().map(scope).collect(),
        mode: match l.mode {
            LoadBalancingMode::Failover => lb::Mode::Failover,
            LoadBalancingMode::Passthrough => lb::Mode::Passthrough,
            LoadBalancingMode::Standard => lb::Mode::UnspecifiedMode,
            LoadBalancingMode::Strict => lb::Mode::Strict,
        } as i32,
        health_policy: match l.health_policy {
            HealthPolicy::AllowAll => lb::HealthPolicy::AllowAll,
            HealthPolicy::OnlyHealthy => lb::HealthPolicy::OnlyHealthy,
        } as i32,
    }
}
