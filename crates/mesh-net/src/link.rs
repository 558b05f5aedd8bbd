//! Links, addresses, routes and rules of one namespace (blocking rtnetlink).

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd, AsRawFd},
};

use ipnet::IpNet;
use nix::sys::socket::SockProtocol;

use crate::{
    netlink::{Attrs, CREATE, EXCL, Message, NetlinkError, REPLACE, Reply, Socket, string, u32_at},
    netns::NetNs,
};

type Result<T> = std::result::Result<T, NetlinkError>;

/// An interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub up: bool,
    pub mtu: u32,
    /// The bridge it is enslaved to.
    pub master: Option<u32>,
}

/// An address on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    pub index: u32,
    pub net: IpNet,
}

/// How packets that match a route are treated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum RouteKind {
    #[default]
    Unicast,
    /// Delivered to this host, whatever the address.
    Local,
    Blackhole,
}

/// A route; `via` and `dev` may each be absent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Route {
    pub dst: IpNet,
    pub via: Option<IpAddr>,
    pub dev: Option<u32>,
    pub table: u32,
    pub kind: RouteKind,
}

/// The table that holds ordinary routes.
pub const MAIN_TABLE: u32 = 254;

impl Route {
    /// A unicast route of the main table.
    pub fn new(dst: IpNet) -> Self {
        Self { dst, via: None, dev: None, table: MAIN_TABLE, kind: RouteKind::Unicast }
    }
}

/// Which IP family a rule belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    V4,
    V6,
}

/// A policy routing rule: packets marked `mark` under `mask` are looked up in `table`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rule {
    pub family: Family,
    pub mark: u32,
    pub mask: u32,
    pub priority: u32,
    pub table: u32,
}

/// A connection to one namespace's routing configuration.
#[derive(Debug)]
pub struct Netlink(Socket);

impl Netlink {
    /// Of the calling thread's namespace, now and later.
    pub fn open() -> io::Result<Self> {
        Ok(Self(Socket::open(SockProtocol::NetlinkRoute)?))
    }

    pub fn in_ns(ns: &NetNs) -> io::Result<Self> {
        ns.run(Self::open)?
    }

    // --- links

    /// A veth pair: `name` here, `peer` in `peer_ns` (or here as well).
    pub fn add_veth(&mut self, name: &str, peer: &str, peer_ns: Option<&NetNs>, mtu: Option<u32>) -> Result<()> {
        let mut message = new_link(format!("add veth {name}"));
        name_and_mtu(&mut message, name, mtu);
        link_info(&mut message, "veth", |m| {
            m.nest(VETH_INFO_PEER, |m| {
                m.raw(&ifinfo(0, 0, 0));
                name_and_mtu(m, peer, mtu);
                if let Some(ns) = peer_ns {
                    m.attr_u32(IFLA_NET_NS_FD, raw_fd(ns));
                }
            });
        });
        self.0.request(message)
    }

    pub fn add_bridge(&mut self, name: &str) -> Result<()> {
        let mut message = new_link(format!("add bridge {name}"));
        name_and_mtu(&mut message, name, None);
        link_info(&mut message, "bridge", |_| {});
        self.0.request(message)
    }

    pub fn delete_link(&mut self, name: &str) -> Result<()> {
        let index = self.index(name)?;
        self.0.request(Message::new(libc::RTM_DELLINK, 0, &ifinfo(index, 0, 0), format!("delete link {name}")))
    }

    /// The index of an interface; `ENODEV` when there is none of that name.
    pub fn index(&mut self, name: &str) -> Result<u32> {
        let found = self.links()?.into_iter().find(|link| link.name == name);
        found.map(|link| link.index).ok_or_else(|| {
            NetlinkError::new(format!("find interface {name}"), io::Error::from_raw_os_error(libc::ENODEV))
        })
    }

    pub fn set_up(&mut self, index: u32) -> Result<()> {
        self.change(format!("set link {index} up"), ifinfo(index, IFF_UP, IFF_UP), |_| {})
    }

    pub fn set_down(&mut self, index: u32) -> Result<()> {
        self.change(format!("set link {index} down"), ifinfo(index, 0, IFF_UP), |_| {})
    }

    /// Enslaves to a bridge; `None` frees.
    pub fn set_master(&mut self, index: u32, master: Option<u32>) -> Result<()> {
        self.change(format!("set master of link {index}"), ifinfo(index, 0, 0), |m| {
            m.attr_u32(libc::IFLA_MASTER, master.unwrap_or(0));
        })
    }

    pub fn set_mtu(&mut self, index: u32, mtu: u32) -> Result<()> {
        self.change(format!("set MTU of link {index}"), ifinfo(index, 0, 0), |m| {
            m.attr_u32(libc::IFLA_MTU, mtu);
        })
    }

    /// The interface must be down.
    pub fn rename(&mut self, index: u32, name: &str) -> Result<()> {
        self.change(format!("rename link {index} to {name}"), ifinfo(index, 0, 0), |m| {
            m.attr_str(libc::IFLA_IFNAME, name);
        })
    }

    pub fn move_to(&mut self, index: u32, ns: &NetNs) -> Result<()> {
        self.change(format!("move link {index} to another namespace"), ifinfo(index, 0, 0), |m| {
            m.attr_u32(IFLA_NET_NS_FD, raw_fd(ns));
        })
    }

    fn change(&mut self, what: String, header: [u8; 16], fill: impl FnOnce(&mut Message)) -> Result<()> {
        let mut message = Message::new(libc::RTM_NEWLINK, 0, &header, what);
        fill(&mut message);
        self.0.request(message)
    }

    pub fn links(&mut self) -> Result<Vec<Link>> {
        let replies = self.0.dump(|| Message::new(libc::RTM_GETLINK, 0, &ifinfo(0, 0, 0), "list links"))?;
        Ok(replies.iter().filter_map(link_of).collect())
    }

    // --- addresses

    /// Adds an address; IPv6 without duplicate address detection, so that it is usable at once.
    pub fn add_address(&mut self, index: u32, net: IpNet) -> Result<()> {
        const IFA_F_NODAD: u8 = 2;
        let flags = if net.addr().is_ipv6() { IFA_F_NODAD } else { 0 };
        self.address_request(libc::RTM_NEWADDR, CREATE | EXCL, index, net, flags)
    }

    pub fn delete_address(&mut self, index: u32, net: IpNet) -> Result<()> {
        self.address_request(libc::RTM_DELADDR, 0, index, net, 0)
    }

    fn address_request(&mut self, kind: u16, flags: u16, index: u32, net: IpNet, address_flags: u8) -> Result<()> {
        let mut header = [0; 8];
        header[0] = family(net.addr());
        header[1] = net.prefix_len();
        header[2] = address_flags;
        header[4..8].copy_from_slice(&index.to_ne_bytes());
        let verb = if kind == libc::RTM_NEWADDR { "add" } else { "delete" };
        let mut message = Message::new(kind, flags, &header, format!("{verb} address {net} on link {index}"));
        message.attr(libc::IFA_LOCAL, &octets(net.addr())).attr(libc::IFA_ADDRESS, &octets(net.addr()));
        self.0.request(message)
    }

    pub fn addresses(&mut self) -> Result<Vec<Address>> {
        let replies = self.0.dump(|| Message::new(libc::RTM_GETADDR, 0, &[0; 8], "list addresses"))?;
        Ok(replies.iter().filter_map(address_of).collect())
    }

    // --- routes and rules

    /// Adds the route, replacing one to the same destination.
    pub fn add_route(&mut self, route: &Route) -> Result<()> {
        self.0.request(route_message(libc::RTM_NEWROUTE, CREATE | REPLACE, route, "add"))
    }

    /// Deletes the route; one that is not there is no error.
    pub fn delete_route(&mut self, route: &Route) -> Result<()> {
        let done = self.0.request(route_message(libc::RTM_DELROUTE, 0, route, "delete"));
        tolerate(done, &[libc::ESRCH, libc::ENOENT])
    }

    /// The routes of one table.
    pub fn routes(&mut self, table: u32) -> Result<Vec<Route>> {
        let replies = self.0.dump(|| Message::new(libc::RTM_GETROUTE, 0, &[0; 12], "list routes"))?;
        Ok(replies.iter().filter_map(route_of).filter(|route| route.table == table).collect())
    }

    /// Adds the rule; one that is there already is no error.
    pub fn add_rule(&mut self, rule: &Rule) -> Result<()> {
        tolerate(self.0.request(rule_message(libc::RTM_NEWRULE, CREATE | EXCL, rule, "add")), &[libc::EEXIST])
    }

    /// Deletes the rule; one that is not there is no error.
    pub fn delete_rule(&mut self, rule: &Rule) -> Result<()> {
        let done = self.0.request(rule_message(libc::RTM_DELRULE, 0, rule, "delete"));
        tolerate(done, &[libc::ENOENT, libc::ESRCH, libc::EAFNOSUPPORT])
    }

    /// The rules that match a mark.
    pub fn rules(&mut self) -> Result<Vec<Rule>> {
        let replies = self.0.dump(|| Message::new(libc::RTM_GETRULE, 0, &[0; 12], "list rules"))?;
        Ok(replies.iter().filter_map(rule_of).collect())
    }
}

const IFF_UP: u32 = libc::IFF_UP as u32;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
const FRA_PRIORITY: u16 = 6;
const FRA_FWMARK: u16 = 10;
const FRA_TABLE: u16 = 15;
const FRA_FWMASK: u16 = 16;
const FR_ACT_TO_TBL: u8 = 1;

fn tolerate(done: Result<()>, errnos: &[i32]) -> Result<()> {
    match done {
        Err(error) if errnos.iter().any(|e| error.is(*e)) => Ok(()),
        done => done,
    }
}

fn new_link(what: String) -> Message {
    Message::new(libc::RTM_NEWLINK, CREATE | EXCL, &ifinfo(0, 0, 0), what)
}

fn ifinfo(index: u32, flags: u32, change: u32) -> [u8; 16] {
    let mut header = [0; 16];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..16].copy_from_slice(&change.to_ne_bytes());
    header
}

fn name_and_mtu(message: &mut Message, name: &str, mtu: Option<u32>) {
    message.attr_str(libc::IFLA_IFNAME, name);
    if let Some(mtu) = mtu {
        message.attr_u32(libc::IFLA_MTU, mtu);
    }
}

fn link_info(message: &mut Message, kind: &str, data: impl FnOnce(&mut Message)) {
    message.nest(libc::IFLA_LINKINFO, |m| {
        m.attr_str(IFLA_INFO_KIND, kind).nest(IFLA_INFO_DATA, data);
    });
}

fn raw_fd(ns: &NetNs) -> u32 {
    ns.as_fd().as_raw_fd().cast_unsigned()
}

fn route_message(kind: u16, flags: u16, route: &Route, verb: &str) -> Message {
    let (type_, scope) = match route.kind {
        RouteKind::Unicast if route.via.is_some() => (libc::RTN_UNICAST, libc::RT_SCOPE_UNIVERSE),
        RouteKind::Unicast => (libc::RTN_UNICAST, libc::RT_SCOPE_LINK),
        RouteKind::Local => (libc::RTN_LOCAL, libc::RT_SCOPE_HOST),
        RouteKind::Blackhole => (libc::RTN_BLACKHOLE, libc::RT_SCOPE_UNIVERSE),
    };
    let mut header = [0; 12];
    header[0] = family(route.dst.addr());
    header[1] = route.dst.prefix_len();
    header[5] = libc::RTPROT_STATIC;
    header[6] = scope;
    header[7] = type_;
    let what = format!("{verb} route to {} in table {}", route.dst, route.table);
    let mut message = Message::new(kind, flags, &header, what);
    message.attr(libc::RTA_DST, &octets(route.dst.network())).attr_u32(libc::RTA_TABLE, route.table);
    if let Some(via) = route.via {
        message.attr(libc::RTA_GATEWAY, &octets(via));
    }
    if let Some(dev) = route.dev {
        message.attr_u32(libc::RTA_OIF, dev);
    }
    message
}

fn rule_message(kind: u16, flags: u16, rule: &Rule, verb: &str) -> Message {
    let mut header = [0; 12];
    header[0] = if rule.family == Family::V4 { AF_INET } else { AF_INET6 };
    header[7] = FR_ACT_TO_TBL;
    let Rule { mark, mask, priority, table, .. } = *rule;
    let what = format!("{verb} rule fwmark {mark:#x}/{mask:#x} lookup {table} priority {priority}");
    let mut message = Message::new(kind, flags, &header, what);
    message
        .attr_u32(FRA_PRIORITY, priority)
        .attr_u32(FRA_FWMARK, mark)
        .attr_u32(FRA_FWMASK, mask)
        .attr_u32(FRA_TABLE, table);
    message
}

fn link_of(reply: &Reply) -> Option<Link> {
    let attributes = |kind| Attrs(reply.body.get(16..).unwrap_or_default()).value(kind);
    Some(Link {
        index: u32_at(&reply.body, 4)?,
        name: string(attributes(libc::IFLA_IFNAME)?),
        up: u32_at(&reply.body, 8)? & IFF_UP != 0,
        mtu: attributes(libc::IFLA_MTU).and_then(|v| u32_at(v, 0)).unwrap_or(0),
        master: attributes(libc::IFLA_MASTER).and_then(|v| u32_at(v, 0)),
    })
}

fn address_of(reply: &Reply) -> Option<Address> {
    let attributes = |kind| Attrs(reply.body.get(8..).unwrap_or_default()).value(kind);
    // With a peer, IFA_ADDRESS is the other end; IPv6 has only IFA_ADDRESS.
    let ip = ip_of(attributes(libc::IFA_LOCAL).or_else(|| attributes(libc::IFA_ADDRESS))?)?;
    Some(Address { index: u32_at(&reply.body, 4)?, net: IpNet::new(ip, *reply.body.get(1)?).ok()? })
}

fn route_of(reply: &Reply) -> Option<Route> {
    let attributes = |kind| Attrs(reply.body.get(12..).unwrap_or_default()).value(kind);
    let any = match *reply.body.first()? {
        AF_INET => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        AF_INET6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    let dst = attributes(libc::RTA_DST).and_then(ip_of).unwrap_or(any);
    Some(Route {
        dst: IpNet::new(dst, *reply.body.get(1)?).ok()?,
        via: attributes(libc::RTA_GATEWAY).and_then(ip_of),
        dev: attributes(libc::RTA_OIF).and_then(|v| u32_at(v, 0)),
        table: attributes(libc::RTA_TABLE).and_then(|v| u32_at(v, 0))?,
        kind: match *reply.body.get(7)? {
            libc::RTN_UNICAST => RouteKind::Unicast,
            libc::RTN_LOCAL => RouteKind::Local,
            libc::RTN_BLACKHOLE => RouteKind::Blackhole,
            _ => return None,
        },
    })
}

fn rule_of(reply: &Reply) -> Option<Rule> {
    let number = |kind| Attrs(reply.body.get(12..).unwrap_or_default()).value(kind).and_then(|v| u32_at(v, 0));
    Some(Rule {
        family: if *reply.body.first()? == AF_INET { Family::V4 } else { Family::V6 },
        mark: number(FRA_FWMARK)?,
        mask: number(FRA_FWMASK).unwrap_or(u32::MAX),
        priority: number(FRA_PRIORITY).unwrap_or(0),
        table: number(FRA_TABLE)?,
    })
}

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

fn family(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { AF_INET } else { AF_INET6 }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn ip_of(value: &[u8]) -> Option<IpAddr> {
    match value.len() {
        4 => Some(IpAddr::from(<[u8; 4]>::try_from(value).ok()?)),
        16 => Some(IpAddr::from(<[u8; 16]>::try_from(value).ok()?)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_replies_are_skipped() {
        let reply = |body: Vec<u8>| Reply::for_test(libc::RTM_NEWLINK, body);
        for length in 0..16 {
            assert_eq!(link_of(&reply(vec![2; length])), None);
            assert_eq!(address_of(&reply(vec![2; length])), None);
            assert_eq!(route_of(&reply(vec![2; length])), None);
            assert_eq!(rule_of(&reply(vec![2; length])), None);
        }
    }
}
