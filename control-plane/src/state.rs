//! What is published, as `/debug/state` shows it.

use mesh_core::{
    index::Resource,
    policy::Policy,
    service::Service,
    workload::{GatewayAddress, GatewayDestination, Health, OutboundPolicy, TunnelProtocol, Workload},
};
use mesh_xds::{convert::resource_from_wire, server::Cache};
use proto::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL};
use serde_json::{Map, Value, json};

pub(crate) fn describe(published: &Cache) -> Value {
    let (mut workloads, mut services, mut policies) = (Map::new(), Map::new(), Map::new());
    for type_url in [ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL] {
        published.visit(type_url, |message| match resource_from_wire(type_url, message) {
            Ok(Resource::Workload(w)) => drop(workloads.insert(w.uid.to_string(), workload(&w))),
            Ok(Resource::Service(s)) => drop(services.insert(s.key().to_string(), service(&s))),
            Ok(Resource::Policy(p)) => drop(policies.insert(p.key().to_string(), policy(&p))),
            Err(error) => tracing::error!(%error, "what was published cannot be read"),
        });
    }
    json!({"version": published.version(), "workloads": workloads, "services": services, "policies": policies})
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
