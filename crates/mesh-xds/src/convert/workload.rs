//! `istio.workload.Workload`.

use std::{collections::BTreeMap, sync::Arc};

use mesh_core::{
    identity::DEFAULT_TRUST_DOMAIN,
    workload::{
        ApplicationTunnel, Health, Locality, Memberships, NetworkMode, OutboundPolicy, PortMapping, TunnelProtocol,
        Workload, WorkloadType,
    },
};
use prost::Message as _;
use proto::{fairway::v1 as ours, workload as wire};

use super::{
    Unacceptable, gateway_from_wire, gateway_to_wire, ip_from_wire, ip_to_wire, or_default, port_from_wire,
    unknown_enum, unless_default,
};

const DEFAULT_SERVICE_ACCOUNT: &str = "default";
const DEFAULT_CLUSTER: &str = "Kubernetes";
/// The extension that carries an [`ours::OutboundTrafficPolicy`].
const OUTBOUND_POLICY_EXTENSION: &str = "fairway.outbound_traffic_policy";
const OUTBOUND_POLICY_TYPE_URL: &str = "type.googleapis.com/fairway.v1.OutboundTrafficPolicy";

/// # Errors
/// A missing uid, an address of a wrong length, a service key without `/`, an unknown enum value, a gateway without destination, an
/// extension of ours that is not what it says.
pub fn workload_from_wire(w: wire::Workload) -> Result<Workload, Unacceptable> {
    if w.uid.is_empty() {
        return Err(Unacceptable::new("uid", "is empty"));
    }
    let mut authorization_policies: Vec<Arc<str>> = w.authorization_policies.into_iter().map(Into::into).collect();
    authorization_policies.sort_unstable();
    authorization_policies.dedup();
    Ok(Workload {
        uid: w.uid.into(),
        name: w.name.into(),
        namespace: w.namespace.into(),
        service_account: or_default(w.service_account, DEFAULT_SERVICE_ACCOUNT),
        trust_domain: or_default(w.trust_domain, DEFAULT_TRUST_DOMAIN),
        addresses: w.addresses.iter().map(|a| ip_from_wire("addresses", a)).collect::<Result<_, _>>()?,
        network: w.network.into(),
        cluster_id: or_default(w.cluster_id, DEFAULT_CLUSTER),
        node: w.node.into(),
        locality: w.locality.map(locality_from_wire).unwrap_or_default(),
        tunnel_protocol: match wire::TunnelProtocol::try_from(w.tunnel_protocol) {
            // Sidecars' own mutual TLS is not ours to speak; such pods are reached in plain TCP rather than refused.
            Ok(wire::TunnelProtocol::None | wire::TunnelProtocol::LegacyIstioMtls) => TunnelProtocol::None,
            Ok(wire::TunnelProtocol::Hbone) => TunnelProtocol::Hbone,
            Err(_) => return Err(unknown_enum("tunnel_protocol", w.tunnel_protocol)),
        },
        native_tunnel: w.native_tunnel,
        network_mode: match wire::NetworkMode::try_from(w.network_mode) {
            Ok(wire::NetworkMode::Standard) => NetworkMode::Standard,
            Ok(wire::NetworkMode::HostNetwork) => NetworkMode::HostNetwork,
            Err(_) => return Err(unknown_enum("network_mode", w.network_mode)),
        },
        health: match wire::WorkloadStatus::try_from(w.status) {
            Ok(wire::WorkloadStatus::Healthy) => Health::Healthy,
            Ok(wire::WorkloadStatus::Unhealthy) => Health::Unhealthy,
            Err(_) => return Err(unknown_enum("status", w.status)),
        },
        waypoint: w.waypoint.map(|g| gateway_from_wire("waypoint", g)).transpose()?,
        network_gateway: w.network_gateway.map(|g| gateway_from_wire("network_gateway", g)).transpose()?,
        application_tunnel: w.application_tunnel.map(tunnel_from_wire).transpose()?,
        hostname: w.hostname.into(),
        canonical_name: w.canonical_name.into(),
        canonical_revision: w.canonical_revision.into(),
        workload_type: match wire::WorkloadType::try_from(w.workload_type) {
            Ok(wire::WorkloadType::Cronjob) => WorkloadType::CronJob,
            Ok(wire::WorkloadType::Deployment) => WorkloadType::Deployment,
            Ok(wire::WorkloadType::Job) => WorkloadType::Job,
            Ok(wire::WorkloadType::Pod) => WorkloadType::Pod,
            Err(_) => return Err(unknown_enum("workload_type", w.workload_type)),
        },
        workload_name: w.workload_name.into(),
        authorization_policies,
        services: services_from_wire(w.services)?,
        // Zero would make the endpoint unpickable; the wire's absent value means one.
        capacity: w.capacity.unwrap_or(1),
        outbound_policy: outbound_policy_from_extensions(&w.extensions)?,
    })
}

pub fn workload_to_wire(w: &Workload) -> wire::Workload {
    wire::Workload {
        name: w.name.to_string(),
        namespace: w.namespace.to_string(),
        addresses: w.addresses.iter().map(|ip| ip_to_wire(*ip)).collect(),
        network: w.network.to_string(),
        tunnel_protocol: match w.tunnel_protocol {
            TunnelProtocol::None => wire::TunnelProtocol::None,
            TunnelProtocol::Hbone => wire::TunnelProtocol::Hbone,
        } as i32,
        trust_domain: unless_default(&w.trust_domain, DEFAULT_TRUST_DOMAIN),
        service_account: unless_default(&w.service_account, DEFAULT_SERVICE_ACCOUNT),
        waypoint: w.waypoint.as_ref().map(gateway_to_wire),
        node: w.node.to_string(),
        canonical_name: w.canonical_name.to_string(),
        canonical_revision: w.canonical_revision.to_string(),
        workload_type: match w.workload_type {
            WorkloadType::CronJob => wire::WorkloadType::Cronjob,
            WorkloadType::Deployment => wire::WorkloadType::Deployment,
            WorkloadType::Job => wire::WorkloadType::Job,
            WorkloadType::Pod => wire::WorkloadType::Pod,
        } as i32,
        workload_name: w.workload_name.to_string(),
        native_tunnel: w.native_tunnel,
        authorization_policies: w.authorization_policies.iter().map(ToString::to_string).collect(),
        status: match w.health {
            Health::Healthy => wire::WorkloadStatus::Healthy,
            Health::Unhealthy => wire::WorkloadStatus::Unhealthy,
        } as i32,
        cluster_id: unless_default(&w.cluster_id, DEFAULT_CLUSTER),
        network_gateway: w.network_gateway.as_ref().map(gateway_to_wire),
        uid: w.uid.to_string(),
        hostname: w.hostname.to_string(),
        services: w.services.iter().map(|(key, ports)| (key.to_string(), ports_to_wire(ports))).collect(),
        application_tunnel: w.application_tunnel.as_ref().map(|t| wire::ApplicationTunnel {
            protocol: match t.proxy_protocol {
                true => wire::application_tunnel::Protocol::Proxy,
                false => wire::application_tunnel::Protocol::None,
            } as i32,
            port: t.port.unwrap_or(0).into(),
        }),
        locality: (w.locality != Locality::default()).then(|| wire::Locality {
            region: w.locality.region.to_string(),
            zone: w.locality.zone.to_string(),
            subzone: w.locality.subzone.to_string(),
        }),
        network_mode: match w.network_mode {
            NetworkMode::Standard => wire::NetworkMode::Standard,
            NetworkMode::HostNetwork => wire::NetworkMode::HostNetwork,
        } as i32,
        extensions: w.outbound_policy.map(outbound_policy_to_extension).into_iter().collect(),
        capacity: (w.capacity != 1).then_some(w.capacity),
    }
}

/// An extension of ours that cannot be read rejects the workload: it restricts what the workload may do.
fn outbound_policy_from_extensions(extensions: &[wire::Extension]) -> Result<Option<OutboundPolicy>, Unacceptable> {
    let Some(extension) = extensions.iter().find(|e| e.name == OUTBOUND_POLICY_EXTENSION) else { return Ok(None) };
    let config = extension.config.as_ref().filter(|config| config.type_url == OUTBOUND_POLICY_TYPE_URL);
    // Nothing at all would decode too, as a policy that allows everything.
    let config = config.ok_or_else(|| {
        Unacceptable::new(
            "extensions",
            format!("{OUTBOUND_POLICY_EXTENSION} does not hold a {OUTBOUND_POLICY_TYPE_URL}"),
        )
    })?;
    let policy = ours::OutboundTrafficPolicy::decode(&*config.value)
        .map_err(|_| Unacceptable::new("extensions", "holds an outbound traffic policy that cannot be decoded"))?;
    Ok(Some(if policy.registry_only { OutboundPolicy::RegistryOnly } else { OutboundPolicy::AllowAny }))
}

fn outbound_policy_to_extension(policy: OutboundPolicy) -> wire::Extension {
    let policy = ours::OutboundTrafficPolicy { registry_only: policy == OutboundPolicy::RegistryOnly };
    let config = prost_types::Any { type_url: OUTBOUND_POLICY_TYPE_URL.to_owned(), value: policy.encode_to_vec() };
    wire::Extension { name: OUTBOUND_POLICY_EXTENSION.to_owned(), config: Some(config) }
}

fn locality_from_wire(l: wire::Locality) -> Locality {
    Locality { region: l.region.into(), zone: l.zone.into(), subzone: l.subzone.into() }
}

fn tunnel_from_wire(t: wire::ApplicationTunnel) -> Result<ApplicationTunnel, Unacceptable> {
    let proxy_protocol = match wire::application_tunnel::Protocol::try_from(t.protocol) {
        Ok(wire::application_tunnel::Protocol::None) => false,
        Ok(wire::application_tunnel::Protocol::Proxy) => true,
        Err(_) => return Err(unknown_enum("application_tunnel.protocol", t.protocol)),
    };
    let port = port_from_wire("application_tunnel.port", t.port)?;
    Ok(ApplicationTunnel { proxy_protocol, port: (port != 0).then_some(port) })
}

fn services_from_wire(services: BTreeMap<String, wire::PortList>) -> Result<Memberships, Unacceptable> {
    let one = |(key, ports): (String, wire::PortList)| {
        if !key.contains('/') {
            return Err(Unacceptable::new("services", format!("key `{key}` is not namespace/hostname")));
        }
        let ports = ports.ports.iter().map(|p| port_pair(p.service_port, p.target_port)).collect::<Result<_, _>>()?;
        Ok((key.into(), ports))
    };
    services.into_iter().map(one).collect()
}

pub(super) fn port_pair(service_port: u32, target_port: u32) -> Result<PortMapping, Unacceptable> {
    Ok(PortMapping {
        service_port: port_from_wire("ports.service_port", service_port)?,
        target_port: port_from_wire("ports.target_port", target_port)?,
    })
}

fn ports_to_wire(ports: &[PortMapping]) -> wire::PortList {
    let one = |p: &PortMapping| wire::Port {
        service_port: p.service_port.into(),
        target_port: p.target_port.into(),
        app_protocol: wire::AppProtocol::Unknown as i32,
    };
    wire::PortList { ports: ports.iter().map(one).collect() }
}
