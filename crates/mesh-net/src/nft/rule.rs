//! A rule, composed of matches and one action, in the order they are written.

use std::net::IpAddr;

use ipnet::IpNet;

use super::expr::{AddressType, Cmp, Ct, CtState, Direction, Expr, Meta, Nat, Payload, Verdict, octets, protocol};

/// A rule as data. Matches narrow it from left to right; the comment identifies it when rules are read back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// At most 127 bytes reach the kernel.
    pub comment: String,
    pub exprs: Vec<Expr>,
}

const TCP: u8 = 6;
const UDP: u8 = 17;

impl Rule {
    pub fn new(comment: impl Into<String>) -> Self {
        Self { comment: comment.into(), exprs: Vec::new() }
    }

    /// Any expressions, for what the methods below do not cover.
    pub fn with(mut self, exprs: impl IntoIterator<Item = Expr>) -> Self {
        self.exprs.extend(exprs);
        self
    }

    fn matches(self, load: Expr, op: Cmp, value: impl Into<Vec<u8>>) -> Self {
        self.with([load, Expr::Cmp(op, value.into())])
    }

    fn matches_masked(self, load: Expr, mask: Vec<u8>, op: Cmp, value: Vec<u8>) -> Self {
        let xor = vec![0; mask.len()];
        self.with([load, Expr::Mask { mask, xor }, Expr::Cmp(op, value)])
    }

    // --- matches

    pub fn tcp(self) -> Self {
        self.matches(Expr::LoadMeta(Meta::TransportProtocol), Cmp::Equal, [TCP])
    }

    pub fn udp(self) -> Self {
        self.matches(Expr::LoadMeta(Meta::TransportProtocol), Cmp::Equal, [UDP])
    }

    /// After [`Rule::tcp`] or [`Rule::udp`], like the other ports.
    pub fn dport(self, port: u16) -> Self {
        self.matches(Expr::LoadPayload(Payload::DestinationPort), Cmp::Equal, port.to_be_bytes())
    }

    pub fn not_dport(self, port: u16) -> Self {
        self.matches(Expr::LoadPayload(Payload::DestinationPort), Cmp::NotEqual, port.to_be_bytes())
    }

    pub fn sport(self, port: u16) -> Self {
        self.matches(Expr::LoadPayload(Payload::SourcePort), Cmp::Equal, port.to_be_bytes())
    }

    /// The packet opens a TCP connection: SYN without ACK. After [`Rule::tcp`].
    pub fn syn(self) -> Self {
        const SYN: u8 = 0x02;
        const ACK: u8 = 0x10;
        self.matches_masked(Expr::LoadPayload(Payload::TcpFlags), vec![SYN | ACK], Cmp::Equal, vec![SYN])
    }

    pub fn mark(self, value: u32, mask: u32) -> Self {
        self.marked(Expr::LoadMeta(Meta::Mark), Cmp::Equal, value, mask)
    }

    pub fn not_mark(self, value: u32, mask: u32) -> Self {
        self.marked(Expr::LoadMeta(Meta::Mark), Cmp::NotEqual, value, mask)
    }

    pub fn ct_mark(self, value: u32, mask: u32) -> Self {
        self.marked(Expr::LoadCt(Ct::Mark), Cmp::Equal, value, mask)
    }

    fn marked(self, load: Expr, op: Cmp, value: u32, mask: u32) -> Self {
        self.matches_masked(load, mask.to_ne_bytes().to_vec(), op, value.to_ne_bytes().to_vec())
    }

    /// The connection is in one of these states.
    pub fn ct_state(self, states: &[CtState]) -> Self {
        let bits = states.iter().fold(0, |bits, state| bits | *state as u32);
        self.matches_masked(Expr::LoadCt(Ct::State), bits.to_ne_bytes().to_vec(), Cmp::NotEqual, vec![0; 4])
    }

    pub fn ct_direction(self, direction: Direction) -> Self {
        self.matches(Expr::LoadCt(Ct::Direction), Cmp::Equal, [direction as u8])
    }

    pub fn iifname(self, name: &str) -> Self {
        self.matches(Expr::LoadMeta(Meta::InterfaceIn), Cmp::Equal, interface(name))
    }

    pub fn oifname(self, name: &str) -> Self {
        self.matches(Expr::LoadMeta(Meta::InterfaceOut), Cmp::Equal, interface(name))
    }

    pub fn not_oifname(self, name: &str) -> Self {
        self.matches(Expr::LoadMeta(Meta::InterfaceOut), Cmp::NotEqual, interface(name))
    }

    /// The packet was sent by a socket of this user.
    pub fn skuid(self, user: u32) -> Self {
        self.matches(Expr::LoadMeta(Meta::SocketUser), Cmp::Equal, user.to_ne_bytes())
    }

    /// The packet is of the family of this address.
    pub fn family_of(self, ip: IpAddr) -> Self {
        self.matches(Expr::LoadMeta(Meta::NetworkProtocol), Cmp::Equal, [protocol(ip)])
    }

    pub fn saddr(self, net: IpNet) -> Self {
        let field = if net.addr().is_ipv4() { Payload::Ipv4Source } else { Payload::Ipv6Source };
        self.address(field, Cmp::Equal, net)
    }

    pub fn daddr(self, net: IpNet) -> Self {
        self.address(destination(net.addr()), Cmp::Equal, net)
    }

    /// Of the same family, but not in `net`.
    pub fn not_daddr(self, net: IpNet) -> Self {
        self.address(destination(net.addr()), Cmp::NotEqual, net)
    }

    fn address(self, field: Payload, op: Cmp, net: IpNet) -> Self {
        let value = octets(net.network());
        let rule = self.family_of(net.addr());
        if net.prefix_len() == net.max_prefix_len() {
            return rule.matches(Expr::LoadPayload(field), op, value);
        }
        rule.matches_masked(Expr::LoadPayload(field), octets(net.netmask()), op, value)
    }

    /// The destination is in a set of addresses of the family of `any` (its value does not matter).
    pub fn daddr_in(self, any: IpAddr, set: &str) -> Self {
        let lookup = Expr::Lookup { set: set.to_owned(), invert: false };
        self.family_of(any).with([Expr::LoadPayload(destination(any)), lookup])
    }

    pub fn daddr_type(self, kind: AddressType) -> Self {
        self.matches(Expr::LoadDestinationType, Cmp::Equal, (kind as u32).to_ne_bytes())
    }

    /// Holds for one connection in `modulus`.
    pub fn one_in(self, modulus: u32) -> Self {
        self.matches(Expr::LoadRandom { modulus }, Cmp::Equal, 0u32.to_ne_bytes())
    }

    // --- actions

    pub fn counter(self) -> Self {
        self.with([Expr::Counter])
    }

    pub fn accept(self) -> Self {
        self.with([Expr::Verdict(Verdict::Accept)])
    }

    pub fn drop(self) -> Self {
        self.with([Expr::Verdict(Verdict::Drop)])
    }

    pub fn jump(self, chain: &str) -> Self {
        self.with([Expr::Verdict(Verdict::Jump(chain.to_owned()))])
    }

    pub fn redirect(self, port: u16) -> Self {
        self.with([Expr::Redirect(port)])
    }

    pub fn dnat(self, ip: IpAddr, port: Option<u16>) -> Self {
        self.with([Expr::Nat(Nat::Destination(ip, port))])
    }

    pub fn snat(self, ip: IpAddr) -> Self {
        self.with([Expr::Nat(Nat::Source(ip, None))])
    }

    pub fn masquerade(self) -> Self {
        self.with([Expr::Masquerade])
    }

    pub fn set_mark(self, value: u32) -> Self {
        self.with([Expr::LoadValue(value.to_ne_bytes().to_vec()), Expr::StoreMeta(Meta::Mark)])
    }

    /// Replaces the bits of the connection's mark under `mask`.
    pub fn set_ct_mark(self, value: u32, mask: u32) -> Self {
        let change = Expr::Mask { mask: (!mask).to_ne_bytes().to_vec(), xor: value.to_ne_bytes().to_vec() };
        self.with([Expr::LoadCt(Ct::Mark), change, Expr::StoreCt(Ct::Mark)])
    }

    /// The packet is tracked among those of this zone only, apart from equal ones of other zones. Before connection tracking looks at it:
    /// in a chain of priority -300.
    pub fn set_ct_zone(self, zone: u16) -> Self {
        self.with([Expr::LoadValue(zone.to_ne_bytes().to_vec()), Expr::StoreCt(Ct::Zone)])
    }

    /// The packet takes the mark of its connection.
    pub fn restore_mark(self) -> Self {
        self.with([Expr::LoadCt(Ct::Mark), Expr::StoreMeta(Meta::Mark)])
    }
}

fn destination(ip: IpAddr) -> Payload {
    if ip.is_ipv4() { Payload::Ipv4Destination } else { Payload::Ipv6Destination }
}

/// Names are compared whole, padded to what the kernel reserves for them.
fn interface(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.resize(libc::IFNAMSIZ, 0);
    bytes
}
