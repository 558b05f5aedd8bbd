//! The lab's network: one wire, and on it the nodes and the control plane, each a namespace of its own.
//!
//! | what | addresses |
//! |---|---|
//! | wire | 172.18.0.0/24, fd18::/64; `.2` is the control plane, node *n* is `.(10 + n)` |
//! | pods of node *n* | 10.244.*n*.0/24, fd44:*n*::/64, routed, no bridge between pods |
//! | services | 10.96.0.0/16, fd96::/112 |

use std::{
    collections::BTreeMap,
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use ipnet::IpNet;
use mesh_net::{
    NetNs, NetlinkError,
    link::{Netlink, Route},
};

use crate::delay::Delay;

/// Name of the wire-facing interface in every namespace on the wire.
pub const UPLINK: &str = "eth0";
/// The control plane's place on the wire.
pub const CONTROL: &str = "control";
const SERVICES_V6: Ipv6Addr = Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 0);

/// Why the network could not be built or changed.
#[derive(Debug, thiserror::Error)]
pub enum TopologyError {
    #[error("{step}")]
    Io { step: String, source: io::Error },
    #[error("{step}")]
    Netlink { step: String, source: NetlinkError },
}

pub(crate) trait Step<T> {
    fn step(self, step: impl Into<String>) -> Result<T, TopologyError>;
}

impl<T> Step<T> for io::Result<T> {
    fn step(self, step: impl Into<String>) -> Result<T, TopologyError> {
        self.map_err(|source| TopologyError::Io { step: step.into(), source })
    }
}

impl<T> Step<T> for Result<T, NetlinkError> {
    fn step(self, step: impl Into<String>) -> Result<T, TopologyError> {
        self.map_err(|source| TopologyError::Netlink { step: step.into(), source })
    }
}

/// A namespace on the wire.
#[derive(Clone, Debug)]
pub struct Member {
    pub name: String,
    pub ns: NetNs,
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
    /// 0 for the control plane.
    pub index: u8,
}

impl Member {
    /// The range its pods live in.
    pub fn pod_ranges(&self) -> [IpNet; 2] {
        pod_ranges(self.index)
    }

    /// The pods' gateway: the same address on every pod's link.
    pub fn gateways(&self) -> [IpAddr; 2] {
        let n = self.index;
        [Ipv4Addr::new(10, 244, n, 1).into(), pod_v6(n, 1).into()]
    }

    /// The `k`th pod's addresses, `k` from 2.
    pub fn pod_addresses(&self, k: u8) -> [IpAddr; 2] {
        [Ipv4Addr::new(10, 244, self.index, k).into(), pod_v6(self.index, k.into()).into()]
    }
}

fn pod_v6(node: u8, host: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd44, node.into(), 0, 0, 0, 0, 0, host)
}

fn pod_ranges(index: u8) -> [IpNet; 2] {
    [prefix(Ipv4Addr::new(10, 244, index, 0).into(), 24), prefix(pod_v6(index, 0).into(), 64)]
}

/// Where the pods of every node live.
pub(crate) fn all_pods() -> Vec<IpNet> {
    vec![prefix(Ipv4Addr::new(10, 244, 0, 0).into(), 16), prefix(Ipv6Addr::new(0xfd44, 0, 0, 0, 0, 0, 0, 0).into(), 16)]
}

pub(crate) fn prefix(ip: IpAddr, length: u8) -> IpNet {
    IpNet::new(ip, length).unwrap_or_else(|_| IpNet::from(ip))
}

/// A single host.
pub(crate) fn host(ip: IpAddr) -> IpNet {
    IpNet::from(ip)
}

/// The wire and everybody on it.
#[derive(Debug)]
pub struct Topology {
    wire: NetNs,
    bridge: u32,
    pub control: Member,
    pub nodes: Vec<Member>,
    delays: BTreeMap<String, Delay>,
}

impl Topology {
    /// Builds the wire, the control plane's namespace and `nodes` nodes named `node1`, `node2`, ….
    ///
    /// # Errors
    /// The step the kernel refused.
    pub fn build(nodes: u8) -> Result<Self, TopologyError> {
        let wire = NetNs::create().step("create the wire")?;
        let mut netlink = Netlink::in_ns(&wire).step("open netlink on the wire")?;
        netlink.add_bridge("wire").step("add the wire's bridge")?;
        let bridge = netlink.index("wire").step("find the wire's bridge")?;
        netlink.set_up(bridge).step("raise the wire's bridge")?;
        let mut topology =
            Self { wire, bridge, control: member(CONTROL, 0)?, nodes: Vec::new(), delays: BTreeMap::new() };
        for n in 1..=nodes {
            topology.nodes.push(member(&format!("node{n}"), n)?);
        }
        let everyone: Vec<Member> = topology.everyone().cloned().collect();
        for one in &everyone {
            topology.join(&mut netlink, one)?;
        }
        for one in &everyone {
            route_to_others(one, &everyone)?;
        }
        Ok(topology)
    }

    pub fn node(&self, name: &str) -> Option<&Member> {
        self.nodes.iter().find(|n| n.name == name)
    }

    pub fn everyone(&self) -> impl Iterator<Item = &Member> {
        std::iter::once(&self.control).chain(&self.nodes)
    }

    /// Where to listen for what crosses between nodes, and on which interfaces.
    pub fn wire(&self) -> &NetNs {
        &self.wire
    }

    /// Takes a member off the wire, or puts it back: the cable is pulled, the namespace does not notice more than that.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn set_connected(&self, member: &str, connected: bool) -> Result<(), TopologyError> {
        let mut netlink = Netlink::in_ns(&self.wire).step("open netlink on the wire")?;
        let port = netlink.index(member).step(format!("find {member}'s port"))?;
        let master = connected.then_some(self.bridge);
        netlink.set_master(port, master).step(format!("re-plug {member}"))
    }

    /// Makes what a member sends arrive later by `delay`; zero makes the cable an ordinary one again.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn set_delay(&mut self, member: &str, delay: Duration) -> Result<(), TopologyError> {
        if !self.everyone().any(|m| m.name == member) {
            let source = io::Error::new(io::ErrorKind::NotFound, "it is not on the wire");
            return Err(TopologyError::Io { step: format!("delay {member}"), source });
        }
        let stub = format!("slow-{member}");
        let mut netlink = Netlink::in_ns(&self.wire).step("open netlink on the wire")?;
        if self.delays.remove(member).is_some() {
            netlink.delete_link(&stub).step("remove the slow cable")?;
        }
        if delay.is_zero() {
            return self.set_connected(member, true);
        }
        let plug = format!("plug-{member}");
        netlink.add_veth(&stub, &plug, None, None).step("add the slow cable")?;
        for (name, master) in [(&stub, None), (&plug, Some(self.bridge))] {
            let index = netlink.index(name).step("find the slow cable")?;
            netlink.set_master(index, master).step("plug the slow cable in")?;
            netlink.set_up(index).step("raise the slow cable")?;
        }
        self.set_connected(member, false)?;
        let relay = Delay::start(&self.wire, member, &stub, delay).step("carry frames")?;
        self.delays.insert(member.to_owned(), relay);
        Ok(())
    }

    fn join(&self, wire: &mut Netlink, one: &Member) -> Result<(), TopologyError> {
        wire.add_veth(&one.name, UPLINK, Some(&one.ns), None).step(format!("add {}'s cable", one.name))?;
        let port = wire.index(&one.name).step("find the port")?;
        wire.set_master(port, Some(self.bridge)).step("plug the cable in")?;
        wire.set_up(port).step("raise the port")?;
        let mut netlink = Netlink::in_ns(&one.ns).step(format!("open netlink of {}", one.name))?;
        let uplink = netlink.index(UPLINK).step("find the uplink")?;
        netlink.set_up(uplink).step("raise the uplink")?;
        netlink.add_address(uplink, prefix(one.v4.into(), 24)).step("address the uplink")?;
        netlink.add_address(uplink, prefix(one.v6.into(), 64)).step("address the uplink")?;
        // The node's own connections to services need a way, which they leave when their destination is translated.
        for services in [prefix(Ipv4Addr::new(10, 96, 0, 0).into(), 16), prefix(SERVICES_V6.into(), 112)] {
            let route = Route { dev: Some(uplink), ..Route::new(services) };
            netlink.add_route(&route).step(format!("route {services} on {}", one.name))?;
        }
        Ok(())
    }
}

fn member(name: &str, index: u8) -> Result<Member, TopologyError> {
    let ns = NetNs::create().step(format!("create {name}"))?;
    let forward =
        [("net/ipv4/ip_forward", "1"), ("net/ipv6/conf/all/forwarding", "1"), ("net/ipv4/conf/all/rp_filter", "0")];
    set_sysctls(&ns, &forward)?;
    let host = if index == 0 { 2 } else { 10 + index };
    Ok(Member {
        name: name.to_owned(),
        ns,
        v4: Ipv4Addr::new(172, 18, 0, host),
        v6: Ipv6Addr::new(0xfd18, 0, 0, 0, 0, 0, 0, host.into()),
        index,
    })
}

/// Writes settings below `/proc/sys` as a namespace sees them.
///
/// # Errors
/// The setting that was refused. One that does not exist (no IPv6) is passed over.
pub(crate) fn set_sysctls(ns: &NetNs, settings: &[(&str, &str)]) -> Result<(), TopologyError> {
    for (name, value) in settings {
        let written = ns.run(|| fs::write(format!("/proc/sys/{name}"), value)).step("enter the namespace")?;
        match written {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => other.step(format!("set {name}={value}"))?,
        }
    }
    Ok(())
}

fn route_to_others(one: &Member, everyone: &[Member]) -> Result<(), TopologyError> {
    let mut netlink = Netlink::in_ns(&one.ns).step("open netlink")?;
    for other in everyone.iter().filter(|o| o.index != 0 && o.index != one.index) {
        let [v4, v6] = other.pod_ranges();
        for (range, via) in [(v4, IpAddr::from(other.v4)), (v6, IpAddr::from(other.v6))] {
            let route = Route { via: Some(via), ..Route::new(range) };
            netlink.add_route(&route).step(format!("route {range} on {}", one.name))?;
        }
    }
    Ok(())
}
