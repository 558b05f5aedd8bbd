//! `/config_dump`: everything known, in the shape that `istioctl ztunnel-config` reads.

use std::{collections::BTreeMap, sync::Arc};

use http::StatusCode;
use mesh_core::{
    index::{Index, Resource},
    policy::{Action, Match, Policy, Scope as PolicyScope, ServiceAccountMatch, StringMatch},
    service::{HealthPolicy, IpFamilies, LoadBalancing, LoadBalancingMode, Scope, Service, Visibility},
    workload::{
        ApplicationTunnel, GatewayAddress, GatewayDestination, Health, Locality, NetworkMode, PortMapping,
        TunnelProtocol, Workload, WorkloadType,
    },
};
use mesh_runtime::admin::{Request, Response, text};
use serde_json::{Map, Value, json};

use super::{Context, answer};
use crate::config::Config;

mod certificates;

/// Parts that need a walk over all that is known.
const KNOWN: [&str; 5] = ["workloads", "services", "policies", "stagedServices", "stateVersion"];

/// Answers from one snapshot; with `?part=` of it alone, in the same shape.
pub fn respond(context: &Context, request: &Request) -> Response {
    let part = request.query("part");
    let index = context.shared.state.snapshot();
    let config = &context.shared.config;
    let Ok(shown) = effective(config) else {
        return text(StatusCode::INTERNAL_SERVER_ERROR, "cannot encode the configuration\n");
    };
    let mut dump = if part.is_none_or(|part| KNOWN.contains(&part)) { known(&index) } else { Map::new() };
    let others = [
        ("staticConfig", static_config(&context.shared.state.static_resources())),
        ("version", version(&config.version)),
        ("config", shown),
        ("certificates", json!(certificates::dump(&context.shared.identities.entries()))),
    ];
    extend(&mut dump, others.map(|(name, value)| (name, Some(value))));
    if config.is_shared() {
        dump.insert("workloadState".to_owned(), json!(context.pods.dump()));
    }
    let Some(part) = part else { return answer(&Value::Object(dump)) };
    match dump.remove(part) {
        Some(value) => answer(&json!({ part: value })),
        None => text(StatusCode::NOT_FOUND, format!("there is no part `{part}`\n")),
    }
}

/// What discovery, the operator and this node have said.
fn known(index: &Index) -> Map<String, Value> {
    object(json!({
        "workloads": sorted(index.workloads(), |w| w.uid.clone(), workload),
        "services": sorted(index.services(), |s| format!("{}/{}", s.hostname, s.namespace), |s| service(index, s)),
        "policies": sorted(index.policies(), |p| p.key(), policy),
        "stagedServices": staged(index),
        "stateVersion": index.version(),
    }))
}

/// The configuration, its addresses in upstream's form.
fn effective(config: &Config) -> serde_json::Result<Value> {
    let mut shown = serde_json::to_value(config)?;
    let anywhere = |port| json!({ "SocketAddr": config.wildcard(port).to_string() });
    shown["adminAddr"] = match config.local_address {
        None => json!({ "Localhost": [config.ipv6, config.ports.admin] }),
        Some(_) => json!({ "SocketAddr": config.loopback(config.ports.admin).to_string() }),
    };
    shown["statsAddr"] = anywhere(config.ports.stats);
    shown["readinessAddr"] = anywhere(config.ports.readiness);
    Ok(shown)
}

/// What was written down beside the proxy, in the form in which it is written.
pub(crate) fn static_config(resources: &[Resource]) -> Value {
    let (mut workloads, mut services, mut policies) = (Vec::new(), Vec::new(), Vec::new());
    for resource in resources {
        match resource {
            Resource::Workload(w) => {
                let mut shown = workload(w);
                shown["services"] =
                    w.services.iter().map(|(key, list)| (key.to_string(), ports(list.iter()))).collect();
                workloads.push(shown);
            }
            Resource::Service(s) => services.push(service(&Index::default(), s)),
            Resource::Policy(p) => {
                let mut shown = object(policy(p));
                shown.remove("origin");
                policies.push(Value::Object(shown));
            }
        }
    }
    json!({ "workloads": workloads, "policies": policies, "services": services })
}

/// Endpoints of services that are not known.
fn staged(index: &Index) -> Value {
    let endpoints = |key: &str| -> Value {
        Value::Object(index.endpoints(key).map(|w| (w.uid.to_string(), endpoint(key, w))).collect())
    };
    Value::Object(index.staged_services().map(|key| (key.to_string(), endpoints(key))).collect())
}

fn sorted<'a, T: 'a, K: Ord>(
    items: impl Iterator<Item = &'a Arc<T>>,
    key: impl Fn(&T) -> K,
    show: impl Fn(&T) -> Value,
) -> Vec<Value> {
    let mut items: Vec<&Arc<T>> = items.collect();
    items.sort_by_cached_key(|item| key(item));
    items.into_iter().map(|item| show(item)).collect()
}

fn version(istio: &str) -> Value {
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "gitRevision": option_env!("FAIRWAY_GIT_REVISION").unwrap_or("unknown"),
        "rustVersion": env!("CARGO_PKG_RUST_VERSION"),
        "buildProfile": if cfg!(debug_assertions) { "debug" } else { "release" },
        "buildStatus": "unknown",
        "istioVersion": istio,
        "cryptoProvider": "aws-lc-rs",
    })
}

pub(super) fn workload(w: &Workload) -> Value {
    let mut out = object(json!({
        "uid": w.uid,
        "name": w.name,
        "namespace": w.namespace,
        "workloadIps": w.addresses,
        "protocol": if w.tunnel_protocol == TunnelProtocol::Hbone { "HBONE" } else { "TCP" },
        "networkMode": if w.network_mode == NetworkMode::HostNetwork { "HostNetwork" } else { "Standard" },
        "status": if w.health == Health::Healthy { "Healthy" } else { "Unhealthy" },
        "clusterId": w.cluster_id,
        "capacity": w.capacity,
        "workloadType": workload_type(w.workload_type),
        "services": w.services.keys().collect::<Vec<_>>(),
    }));
    let texts = [
        ("trustDomain", &w.trust_domain),
        ("serviceAccount", &w.service_account),
        ("network", &w.network),
        ("workloadName", &w.workload_name),
        ("canonicalName", &w.canonical_name),
        ("canonicalRevision", &w.canonical_revision),
        ("hostname", &w.hostname),
        ("node", &w.node),
    ];
    for (name, text) in texts.into_iter().filter(|(_, text)| !text.is_empty()) {
        out.insert(name.to_owned(), json!(text));
    }
    let optional = [
        ("waypoint", w.waypoint.as_ref().map(gateway)),
        ("networkGateway", w.network_gateway.as_ref().map(gateway)),
        ("applicationTunnel", w.application_tunnel.as_ref().map(application_tunnel)),
        ("locality", (w.locality != Locality::default()).then(|| locality(&w.locality))),
        ("authorizationPolicies", (!w.authorization_policies.is_empty()).then(|| json!(w.authorization_policies))),
        ("nativeTunnel", w.native_tunnel.then_some(Value::Bool(true))),
    ];
    extend(&mut out, optional);
    Value::Object(out)
}

fn workload_type(kind: WorkloadType) -> &'static str {
    match kind {
        WorkloadType::CronJob => "cronjob",
        WorkloadType::Deployment => "deployment",
        WorkloadType::Job => "job",
        WorkloadType::Pod => "pod",
    }
}

fn application_tunnel(tunnel: &ApplicationTunnel) -> Value {
    json!({ "protocol": if tunnel.proxy_protocol { "PROXY" } else { "NONE" }, "port": tunnel.port })
}

fn locality(l: &Locality) -> Value {
    json!({ "region": l.region, "zone": l.zone, "subzone": l.subzone })
}

fn gateway(gateway: &GatewayAddress) -> Value {
    let destination = match &gateway.destination {
        GatewayDestination::Address(address) => address.to_string(),
        GatewayDestination::Hostname { namespace, hostname } => format!("{namespace}/{hostname}"),
    };
    json!({ "destination": destination, "hboneMtlsPort": gateway.hbone_mtls_port })
}

pub(super) fn service(index: &Index, s: &Service) -> Value {
    let key = s.key();
    let endpoints: BTreeMap<&str, Value> = index.endpoints(&key).map(|w| (&*w.uid, endpoint(&key, w))).collect();
    let mut out = object(json!({
        "name": s.name,
        "namespace": s.namespace,
        "hostname": s.hostname,
        "vips": s.vips.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "ports": ports(s.ports.iter().map(|p| &p.mapping)),
        "endpoints": endpoints,
        "subjectAltNames": s.subject_alt_names,
        "canonical": s.canonical,
        "visibility": match s.visibility { Visibility::Public => "Public", Visibility::Namespace => "Namespace" },
    }));
    let families = match s.ip_families {
        IpFamilies::Automatic => None,
        IpFamilies::Dual => Some("Dual"),
        IpFamilies::Ipv4Only => Some("IPv4"),
        IpFamilies::Ipv6Only => Some("IPv6"),
    };
    let cidrs: Vec<Value> =
        s.cidr_vips.iter().map(|(network, cidr)| json!({"network": network, "cidr": cidr})).collect();
    let weighted = |(g, weight): &(GatewayAddress, u32)| json!({ "destination": gateway(g), "weight": weight });
    let weighted: Vec<Value> = s.weighted_waypoints.iter().map(weighted).collect();
    let optional = [
        ("cidrVips", (!cidrs.is_empty()).then_some(Value::Array(cidrs))),
        ("waypoint", s.waypoint.as_ref().map(gateway)),
        ("weightedWaypoints", (!weighted.is_empty()).then_some(Value::Array(weighted))),
        ("loadBalancer", s.load_balancing.as_ref().map(load_balancer)),
        ("ipFamilies", families.map(|f| json!(f))),
    ];
    extend(&mut out, optional);
    Value::Object(out)
}

fn endpoint(service_key: &str, w: &Workload) -> Value {
    let mapping = w.services.get(service_key).into_iter().flatten();
    let status = if w.health == Health::Healthy { "Healthy" } else { "Unhealthy" };
    json!({ "workloadUid": w.uid, "port": ports(mapping), "status": status })
}

fn ports<'a>(mappings: impl Iterator<Item = &'a PortMapping>) -> Value {
    Value::Object(mappings.map(|p| (p.service_port.to_string(), json!(p.target_port))).collect())
}

fn load_balancer(lb: &LoadBalancing) -> Value {
    let scope = |scope: &Scope| match scope {
        Scope::Cluster => "Cluster",
        Scope::Network => "Network",
        Scope::Node => "Node",
        Scope::Region => "Region",
        Scope::Subzone => "Subzone",
        Scope::Zone => "Zone",
    };
    let mode = match lb.mode {
        LoadBalancingMode::Failover => "Failover",
        LoadBalancingMode::Passthrough => "Passthrough",
        LoadBalancingMode::Standard => "Standard",
        LoadBalancingMode::Strict => "Strict",
    };
    let health = match lb.health_policy {
        HealthPolicy::AllowAll => "AllowAll",
        HealthPolicy::OnlyHealthy => "OnlyHealthy",
    };
    let preferences: Vec<&str> = lb.routing_preference.iter().map(scope).collect();
    json!({ "routingPreferences": preferences, "mode": mode, "healthPolicy": health })
}

pub(super) fn policy(p: &Policy) -> Value {
    let rule = |rule: &mesh_core::policy::Rule| -> Vec<Vec<Value>> {
        rule.clauses.iter().map(|clause| clause.matches.iter().map(matches).collect()).collect()
    };
    let scope = match p.scope {
        PolicyScope::Global => "Global",
        PolicyScope::Namespace => "Namespace",
        PolicyScope::WorkloadSelector => "WorkloadSelector",
    };
    json!({
        "name": p.name,
        "namespace": p.namespace,
        "scope": scope,
        "action": if p.action == Action::Allow { "Allow" } else { "Deny" },
        "dryRun": p.dry_run,
        "rules": p.rules.iter().map(rule).collect::<Vec<_>>(),
        "origin": p.origin.to_string(),
    })
}

fn matches(m: &Match) -> Value {
    let texts = |list: &[StringMatch]| -> Vec<Value> { list.iter().map(string_match).collect() };
    let accounts = |list: &[ServiceAccountMatch]| -> Vec<Value> {
        list.iter().map(|a| json!({"namespace": a.namespace, "serviceAccount": a.service_account})).collect()
    };
    let fields = [
        ("namespaces", json!(texts(&m.namespaces))),
        ("notNamespaces", json!(texts(&m.not_namespaces))),
        ("principals", json!(texts(&m.principals))),
        ("notPrincipals", json!(texts(&m.not_principals))),
        ("sourceIps", json!(m.source_ips)),
        ("notSourceIps", json!(m.not_source_ips)),
        ("destinationIps", json!(m.destination_ips)),
        ("notDestinationIps", json!(m.not_destination_ips)),
        ("destinationPorts", json!(m.destination_ports)),
        ("notDestinationPorts", json!(m.not_destination_ports)),
        ("serviceAccounts", json!(accounts(&m.service_accounts))),
        ("notServiceAccounts", json!(accounts(&m.not_service_accounts))),
    ];
    let used = fields.into_iter().filter(|(_, list)| list.as_array().is_some_and(|list| !list.is_empty()));
    Value::Object(used.map(|(name, list)| (name.to_owned(), list)).collect())
}

fn string_match(m: &StringMatch) -> Value {
    match m {
        StringMatch::Exact(text) => json!({ "Exact": text }),
        StringMatch::Prefix(text) => json!({ "Prefix": text }),
        StringMatch::Suffix(text) => json!({ "Suffix": text }),
        StringMatch::Presence => json!({ "Presence": [] }),
    }
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

fn extend<const N: usize>(out: &mut Map<String, Value>, optional: [(&str, Option<Value>); N]) {
    out.extend(optional.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))));
}

#[cfg(test)]
mod tests;
