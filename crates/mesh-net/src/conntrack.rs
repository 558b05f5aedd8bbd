//! Where a redirected datagram was meant to go. A TCP socket can be asked; of UDP only connection tracking knows.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use nix::sys::socket::SockProtocol;

use crate::{
    netlink::{Attrs, Message, NetlinkError, Socket},
    netns::NetNs,
    nft::octets,
};

/// The connections a namespace tracks.
#[derive(Debug)]
pub struct Conntrack(Socket);

impl Conntrack {
    /// Needs `CAP_NET_ADMIN` over the namespace.
    pub fn in_ns(ns: &NetNs) -> io::Result<Self> {
        ns.run(|| Socket::open(SockProtocol::NetlinkNetFilter))?.map(Self)
    }

    /// Where a datagram from `client` was sent that arrived at `local`; `None` when nothing is tracked about it. Blocks for as long as the
    /// kernel takes to look it up.
    ///
    /// # Errors
    /// When the kernel refuses, and `InvalidInput` for addresses of two families.
    pub fn udp_destination(
        &mut self,
        client: SocketAddr,
        local: SocketAddr,
    ) -> Result<Option<SocketAddr>, NetlinkError> {
        let what = format!("find where {client} sent a datagram");
        if client.is_ipv4() != local.is_ipv4() {
            return Err(NetlinkError::new(what, io::ErrorKind::InvalidInput));
        }
        match self.0.get(question(client, local, what)) {
            Ok(reply) => Ok(destination(reply.body.get(HEADER..).unwrap_or_default())),
            Err(error) if error.is(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

// Numbers of linux/netfilter/nfnetlink.h and nfnetlink_conntrack.h.
const CTNETLINK: u16 = 1;
const GET: u16 = 1;
/// Family, version, resource id.
const HEADER: usize = 4;
const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const TUPLE_IP: u16 = 1;
const TUPLE_PROTOCOL: u16 = 2;
const IPV4_SOURCE: u16 = 1;
const IPV4_DESTINATION: u16 = 2;
const IPV6_SOURCE: u16 = 3;
const IPV6_DESTINATION: u16 = 4;
const PROTOCOL_NUMBER: u16 = 1;
const SOURCE_PORT: u16 = 2;
const DESTINATION_PORT: u16 = 3;
const UDP: u8 = 17;

/// Asks by the direction that is known: an answer goes from `local` to `client`.
fn question(client: SocketAddr, local: SocketAddr, what: String) -> Message {
    let (family, source, destination) = match local {
        SocketAddr::V4(_) => (libc::AF_INET, IPV4_SOURCE, IPV4_DESTINATION),
        SocketAddr::V6(_) => (libc::AF_INET6, IPV6_SOURCE, IPV6_DESTINATION),
    };
    let family = u8::try_from(family).unwrap_or_default();
    let mut message = Message::new(CTNETLINK << 8 | GET, 0, &[family, 0, 0, 0], what);
    message.nest(TUPLE_REPLY, |m| {
        m.nest(TUPLE_IP, |m| {
            m.attr(source, &octets(local.ip())).attr(destination, &octets(client.ip()));
        });
        m.nest(TUPLE_PROTOCOL, |m| {
            m.attr(PROTOCOL_NUMBER, &[UDP]);
            m.attr(SOURCE_PORT, &local.port().to_be_bytes()).attr(DESTINATION_PORT, &client.port().to_be_bytes());
        });
    });
    message
}

fn destination(attributes: &[u8]) -> Option<SocketAddr> {
    let original = Attrs(attributes).value(TUPLE_ORIGINAL)?;
    let port = Attrs(Attrs(original).value(TUPLE_PROTOCOL)?).value(DESTINATION_PORT)?;
    let address = Attrs(original).value(TUPLE_IP)?;
    let ip: IpAddr = match Attrs(address).value(IPV4_DESTINATION) {
        Some(octets) => <[u8; 4]>::try_from(octets).ok()?.into(),
        None => <[u8; 16]>::try_from(Attrs(address).value(IPV6_DESTINATION)?).ok()?.into(),
    };
    Some(SocketAddr::new(ip, u16::from_be_bytes(port.try_into().ok()?)))
}
