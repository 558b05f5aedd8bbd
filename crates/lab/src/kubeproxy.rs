//! Service addresses without a mesh: what kube-proxy does on a node, as far as the lab needs it.
//!
//! Every node translates a service's addresses to one of its endpoints, chosen at random per connection.

use std::{collections::BTreeMap, net::IpAddr};

use mesh_net::{
    NetNs,
    nft::{Batch, Chain, ChainType, Family, Hook, Nft, Rule},
};
use serde_json::Value;

use crate::{
    pods::Pod,
    topology::{Step, TopologyError, host},
};

const TABLE: &str = "lab-services";
const CHAIN: &str = "services";
/// Destination NAT's standard place (NF_IP_PRI_NAT_DST).
const PRIORITY: i32 = -100;

/// One address and port of a service, and where it leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    pub vip: IpAddr,
    pub port: u16,
    pub endpoints: Vec<(IpAddr, u16)>,
}

/// Every service port with the running pods that its selector picks.
pub fn services<'a>(services: impl Iterator<Item = &'a Value>, pods: &BTreeMap<String, Pod>) -> Vec<Backend> {
    let mut out = Vec::new();
    for service in services {
        let chosen: Vec<&Pod> = pods.values().filter(|p| p.problem.is_none() && selects(service, p)).collect();
        let vips =
            service["spec"]["clusterIPs"].as_array().into_iter().flatten().filter_map(|v| v.as_str()?.parse().ok());
        for vip in vips {
            for port in service["spec"]["ports"].as_array().into_iter().flatten() {
                let Some(number) = port["port"].as_u64().and_then(|p| u16::try_from(p).ok()) else { continue };
                let endpoints = chosen.iter().filter_map(|p| endpoint(p, port, number, vip)).collect();
                out.push(Backend { vip, port: number, endpoints });
            }
        }
    }
    out
}

fn selects(service: &Value, pod: &Pod) -> bool {
    let Some(selector) = service["spec"]["selector"].as_object().filter(|s| !s.is_empty()) else { return false };
    service["metadata"]["namespace"].as_str() == Some(&pod.namespace)
        && selector.iter().all(|(k, v)| pod.manifest["metadata"]["labels"][k] == *v)
}

fn endpoint(pod: &Pod, port: &Value, number: u16, vip: IpAddr) -> Option<(IpAddr, u16)> {
    let address = pod.addresses.iter().copied().find(|a| a.is_ipv4() == vip.is_ipv4())?;
    let target = match &port["targetPort"] {
        Value::Number(n) => n.as_u64().and_then(|p| u16::try_from(p).ok())?,
        Value::String(name) => named_port(pod, name)?,
        _ => number,
    };
    Some((address, target))
}

fn named_port(pod: &Pod, name: &str) -> Option<u16> {
    let containers = pod.manifest["spec"]["containers"].as_array()?;
    let ports = containers.iter().flat_map(|c| c["ports"].as_array().into_iter().flatten());
    let port = ports.into_iter().find(|p| p["name"].as_str() == Some(name))?;
    port["containerPort"].as_u64().and_then(|p| u16::try_from(p).ok())
}

/// Replaces a node's rules in one transaction.
///
/// # Errors
/// What the kernel refused.
pub fn program(node: &NetNs, backends: &[Backend]) -> Result<(), TopologyError> {
    let mut batch = Batch::new(Family::Inet);
    batch.replace_table(TABLE);
    batch.add_chain(TABLE, &Chain::regular(CHAIN));
    for hook in [Hook::Prerouting, Hook::Output] {
        let name = if hook == Hook::Output { "output" } else { "prerouting" };
        batch.add_chain(TABLE, &Chain::base(name, ChainType::Nat, hook, PRIORITY));
        batch.add_rule(TABLE, name, &Rule::new("to services").jump(CHAIN));
    }
    for backend in backends {
        let count = backend.endpoints.len();
        for (i, (ip, port)) in backend.endpoints.iter().enumerate() {
            // The i-th of n gets one in (n − i) of what the ones before it left: an even share for each.
            let rule = Rule::new(format!("{}:{}", backend.vip, backend.port))
                .daddr(host(backend.vip))
                .tcp()
                .dport(backend.port);
            let left = u32::try_from(count - i).unwrap_or(1);
            let rule = if left > 1 { rule.one_in(left) } else { rule };
            batch.add_rule(TABLE, CHAIN, &rule.dnat(*ip, Some(*port)));
        }
    }
    let mut nft = Nft::in_ns(node).step("open nf_tables on a node")?;
    nft.apply(batch).step("program service addresses")
}
