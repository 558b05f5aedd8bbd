//! The lab's primary CNI plugin: a routed point-to-point link per pod.
//!
//! It is executed as real runtimes execute plugins (CNI 1.0: environment, standard input, a result on standard output), and is
//! followed in the chain by `fairway-cni`. Addresses come from the runtime through the `ips` capability; the gateway is
//! `169.254.1.1`-like: the node answers for it on every pod's link.

use mesh_runtime::telemetry::error_chain;
use std::{
    collections::HashMap,
    env, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    process::ExitCode,
};

use ipnet::IpNet;
use mesh_net::{
    NetNs,
    link::{Netlink, Route},
};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::topology::{Step, TopologyError, host, prefix};

const VERSIONS: [&str; 5] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0", "0.3.0"];

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Config {
    cni_version: String,
    #[serde(default)]
    runtime_config: RuntimeConfig,
    /// The node's address on every pod's link, one per family.
    #[serde(default)]
    gateways: Vec<IpAddr>,
}

#[derive(Debug, Default, Deserialize)]
struct RuntimeConfig {
    #[serde(default)]
    ips: Vec<IpNet>,
}

/// Entry point of the plugin program.
pub fn main() -> ExitCode {
    let vars: HashMap<String, String> = env::vars().collect();
    let mut input = String::new();
    let outcome = io::Read::read_to_string(&mut io::stdin(), &mut input)
        .map_err(|e| e.to_string())
        .and_then(|_| run(&vars, &input));
    match outcome {
        Ok(result) => {
            println!("{result}");
            ExitCode::SUCCESS
        }
        Err(message) => {
            println!("{}", json!({"cniVersion": "1.0.0", "code": 100, "msg": message}));
            ExitCode::FAILURE
        }
    }
}

fn run(vars: &HashMap<String, String>, input: &str) -> Result<Value, String> {
    let var = |name: &str| vars.get(name).cloned().ok_or_else(|| format!("{name} is not set"));
    let command = var("CNI_COMMAND")?;
    if command == "VERSION" {
        return Ok(json!({"cniVersion": "1.1.0", "supportedVersions": VERSIONS}));
    }
    let config: Config = serde_json::from_str(input).map_err(|e| format!("standard input: {e}"))?;
    match command.as_str() {
        "ADD" => add(&config, &var("CNI_NETNS")?, &var("CNI_CONTAINERID")?, &var("CNI_IFNAME")?),
        "DEL" => del(&var("CNI_CONTAINERID")?).map(|()| json!({})),
        // The link cannot be half there: it was made in one step and dies with its namespace.
        "CHECK" | "GC" | "STATUS" => Ok(json!({})),
        other => Err(format!("CNI_COMMAND `{other}` is not one of ADD, CHECK, DEL, GC, STATUS, VERSION")),
    }
}

fn add(config: &Config, netns: &str, container: &str, interface: &str) -> Result<Value, String> {
    let pod = NetNs::open(netns).map_err(|e| format!("CNI_NETNS {netns}: {e}"))?;
    let mut node = Netlink::open().map_err(|e| e.to_string())?;
    let ips: Vec<IpAddr> = config.runtime_config.ips.iter().map(IpNet::addr).collect();
    attach(&mut node, &pod, &node_side(container), interface, &ips, &config.gateways).map_err(|e| error_chain(&e))?;
    let ips: Vec<Value> = config
        .runtime_config
        .ips
        .iter()
        .map(|ip| json!({"address": ip.to_string(), "gateway": gateway(config, ip.addr()), "interface": 0}))
        .collect();
    Ok(json!({
        "cniVersion": config.cni_version,
        "interfaces": [{"name": interface, "sandbox": netns}],
        "ips": ips,
        "dns": {},
    }))
}

/// Makes a pod's link: its addresses inside, routes to them outside, and the node as the way to everywhere else.
///
/// # Errors
/// The step that the kernel refused.
pub(crate) fn attach(
    node: &mut Netlink,
    pod: &NetNs,
    node_side: &str,
    interface: &str,
    ips: &[IpAddr],
    gateways: &[IpAddr],
) -> Result<(), TopologyError> {
    node.add_veth(node_side, interface, Some(pod), None).step("add the pod's link")?;
    let here = node.index(node_side).step("find the node's end")?;
    node.set_up(here).step("raise the node's end")?;
    let mut inside = Netlink::in_ns(pod).step("open netlink in the pod")?;
    let there = inside.index(interface).step("find the pod's end")?;
    inside.set_up(there).step("raise the pod's end")?;
    for ip in ips {
        inside.add_address(there, host(*ip)).step("address the pod")?;
        node.add_route(&Route { dev: Some(here), ..Route::new(host(*ip)) }).step("route to the pod")?;
        let Some(gateway) = gateways.iter().copied().find(|g| g.is_ipv4() == ip.is_ipv4()) else { continue };
        node.add_address(here, host(gateway)).step("address the node's end")?;
        inside.add_route(&Route { dev: Some(there), ..Route::new(host(gateway)) }).step("route to the gateway")?;
        let everywhere = if ip.is_ipv4() {
            prefix(Ipv4Addr::UNSPECIFIED.into(), 0)
        } else {
            prefix(Ipv6Addr::UNSPECIFIED.into(), 0)
        };
        let default = Route { via: Some(gateway), dev: Some(there), ..Route::new(everywhere) };
        inside.add_route(&default).step("add the default route")?;
    }
    Ok(())
}

fn gateway(config: &Config, ip: IpAddr) -> Option<IpAddr> {
    config.gateways.iter().copied().find(|g| g.is_ipv4() == ip.is_ipv4())
}

/// DEL succeeds when there is nothing left to do (CNI 1.0 §DEL).
fn del(container: &str) -> Result<(), String> {
    let mut node = Netlink::open().map_err(|e| e.to_string())?;
    let name = node_side(container);
    let present = node.links().map_err(|e| e.to_string())?.iter().any(|l| l.name == name);
    if present { node.delete_link(&name).map_err(|e| e.to_string()) } else { Ok(()) }
}

/// At most 15 bytes, unique per sandbox.
fn node_side(container: &str) -> String {
    format!("veth{}", container.chars().filter(char::is_ascii_alphanumeric).take(11).collect::<String>())
}
