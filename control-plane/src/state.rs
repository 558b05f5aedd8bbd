//! The model as `/debug/state` shows it.

use mesh_core::{
    index::Index,
    policy::Policy,
    service::Service,
    workload::{GatewayAddress, GatewayDestination, Health, OutboundPolicy, TunnelProtocol, Workload},
};
use serde_json::{Value, json};

pub(crate) fn describe(index: &Index) -> Value {
    json!({
        "version": index.version(),
        "workloads": sorted(index.workloads().map(|w| (w.uid.to_string(), workload(w)))),
        "services": sorted(index.services().map(|s| (s.key().to_string(), service(s)))),
        "policies": sorted(index.policies().map(|p| (p.key().to_string(), policy(p)))),
    })
}

fn sorted(entries: impl Iterator<Item = (String, Value)>) -> Value {
    Value::Object(entries.collect())
}

fn workload(w: &Workload) -> Value {
    json!({
        "addresses": w.addresses,
        "node": *w.node,
        "network": *w.network,
        "identity": w.identity().to_string(),
        "hbone": w.tunnel_protocol == TunnelProtocol::Hbone,
        "healthy": w.health == Health::Healthy,
        "workload": *w.workload_name,
        "services": w.services.keys().map(|key| key.to_string()).collect::<Vec<_>>(),
        "hostname": *w.hostname,
        "waypoint": w.waypoint.as_ref().map(gateway),
        "registryOnly": w.outbound_policy == Some(OutboundPolicy::RegistryOnly),
        "policies": w.authorization_policies.iter().map(|key| key.to_string()).collect::<Vec<_>>(),
    })
}

fn service(s: &Service) -> Value {
    let ranges = s.cidr_vips.iter().map(|(network, range)| format!("{network}/{range}"));
    json!({
        "vips": s.vips.iter().map(|vip| vip.to_string()).chain(ranges).collect::<Vec<_>>(),
        "waypoint": s.waypoint.as_ref().map(gateway),
        "visibility": format!("{:?}", s.visibility),
        "ports": s.ports.iter().map(|p| format!("{}→{}", p.mapping.service_port, p.mapping.target_port)).collect::<Vec<_>>(),
    })
}

fn gateway(g: &GatewayAddress) -> String {
    match &g.destination {
        GatewayDestination::Address(address) => address.to_string(),
        GatewayDestination::Hostname { namespace, hostname } => format!("{namespace}/{hostname}"),
    }
}

fn policy(p: &Policy) -> Value {
    json!({
        "action": format!("{:?}", p.action),
        "scope": format!("{:?}", p.scope),
        "dryRun": p.dry_run,
        "rules": p.rules.len(),
        "origin": p.origin.to_string(),
    })
}
