//! Addresses as the mesh compares them.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

/// Folds an IPv4-mapped IPv6 address (RFC 4291 §2.5.5.2) to IPv4, so that a dual-stack socket's peers are found by their pod address.
pub fn canonical_ip(ip: IpAddr) -> IpAddr {
    ip.to_canonical()
}

/// [`canonical_ip`] for a socket address; port kept, flow label and scope dropped on folding.
pub fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(canonical_ip(addr.ip()), addr.port())
}

/// An address within a named network; the default network's name is empty.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetworkAddress {
    pub network: Arc<str>,
    /// Always canonical.
    pub ip: IpAddr,
}

impl NetworkAddress {
    pub fn new(network: impl Into<Arc<str>>, ip: IpAddr) -> Self {
        Self { network: network.into(), ip: canonical_ip(ip) }
    }
}

/// `network/ip`, the form of resource aliases and of the configuration dump.
impl fmt::Display for NetworkAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.ip)
    }
}
