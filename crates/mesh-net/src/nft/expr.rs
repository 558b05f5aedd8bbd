//! The expressions a rule is made of, and their encoding. Each works on register 1 unless it needs a second.

use std::net::IpAddr;

use super::{DATA_VERDICT, IMMEDIATE_DATA, VERDICT_CHAIN};
use crate::netlink::Message;

/// One expression. Matches come as a load followed by [`Expr::Mask`]s and a [`Expr::Cmp`]; [`super::Rule`] composes them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expr {
    LoadMeta(Meta),
    LoadPayload(Payload),
    LoadCt(Ct),
    /// The kind of the destination address: local, broadcast, …
    LoadDestinationType,
    /// A random number below the modulus.
    LoadRandom {
        modulus: u32,
    },
    /// A constant, in the order of bytes its use asks for.
    LoadValue(Vec<u8>),
    /// register = register & mask ^ xor.
    Mask {
        mask: Vec<u8>,
        xor: Vec<u8>,
    },
    /// Ends the rule unless it holds.
    Cmp(Cmp, Vec<u8>),
    /// Ends the rule unless the register is in the set (or, inverted, if it is).
    Lookup {
        set: String,
        invert: bool,
    },
    StoreMeta(Meta),
    StoreCt(Ct),
    Verdict(Verdict),
    /// To a local port; the original destination stays known to the socket.
    Redirect(u16),
    Nat(Nat),
    Masquerade,
    Counter,
}

/// Facts about a packet. Marks and users are numbers in host order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meta {
    Mark = 3,
    InterfaceIn = 6,
    InterfaceOut = 7,
    SocketUser = 10,
    NetworkProtocol = 15,
    TransportProtocol = 16,
}

/// Bytes of a packet, in network order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Payload {
    Ipv4Source,
    Ipv4Destination,
    Ipv6Source,
    Ipv6Destination,
    /// Of TCP and UDP alike.
    SourcePort,
    DestinationPort,
    TcpFlags,
}

impl Payload {
    /// Base header (1 network, 2 transport), offset, length.
    fn location(self) -> (u32, u32, u32) {
        match self {
            Self::Ipv4Source => (1, 12, 4),
            Self::Ipv4Destination => (1, 16, 4),
            Self::Ipv6Source => (1, 8, 16),
            Self::Ipv6Destination => (1, 24, 16),
            Self::SourcePort => (2, 0, 2),
            Self::DestinationPort => (2, 2, 2),
            Self::TcpFlags => (2, 13, 1),
        }
    }
}

/// Facts about the connection a packet belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ct {
    State = 0,
    Direction = 1,
    Mark = 3,
    Zone = 17,
}

/// Bits of [`Ct::State`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CtState {
    Invalid = 1,
    Established = 2,
    Related = 4,
    New = 8,
    Untracked = 64,
}

/// Values of [`Ct::Direction`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Original = 0,
    Reply = 1,
}

/// Values of [`Expr::LoadDestinationType`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressType {
    Unicast = 1,
    Local = 2,
    Broadcast = 3,
    Multicast = 5,
}

/// How the register compares with the value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cmp {
    Equal = 0,
    NotEqual = 1,
    Less = 2,
    LessOrEqual = 3,
    Greater = 4,
    GreaterOrEqual = 5,
}

/// What becomes of the packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Accept,
    Drop,
    /// Back to the calling chain; in a base chain: its policy.
    Return,
    Jump(String),
    Goto(String),
}

/// A new address, and port if given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nat {
    Destination(IpAddr, Option<u16>),
    Source(IpAddr, Option<u16>),
}

impl Expr {
    pub(crate) fn encode(&self, m: &mut Message) {
        match self {
            Self::LoadMeta(key) => load(m, "meta", META_DREG, META_KEY, *key as u32),
            Self::LoadCt(key) => load(m, "ct", CT_DREG, CT_KEY, *key as u32),
            Self::StoreMeta(key) => load(m, "meta", META_SREG, META_KEY, *key as u32),
            Self::StoreCt(key) => load(m, "ct", CT_SREG, CT_KEY, *key as u32),
            Self::LoadPayload(field) => load_payload(m, *field),
            Self::LoadDestinationType => expression(m, "fib", |m| {
                m.attr_be32(FIB_DREG, REG_1).attr_be32(FIB_RESULT, FIB_ADDRTYPE).attr_be32(FIB_FLAGS, FIB_DADDR);
            }),
            Self::LoadRandom { modulus } => expression(m, "numgen", |m| {
                m.attr_be32(NG_DREG, REG_1).attr_be32(NG_MODULUS, *modulus).attr_be32(NG_TYPE, NG_RANDOM);
            }),
            Self::LoadValue(value) => immediate(m, REG_1, value),
            Self::Mask { mask, xor } => bitwise(m, mask, xor),
            Self::Cmp(op, value) => expression(m, "cmp", |m| {
                m.attr_be32(CMP_SREG, REG_1).attr_be32(CMP_OP, *op as u32);
                data(m, CMP_DATA, value);
            }),
            Self::Lookup { set, invert } => expression(m, "lookup", |m| {
                m.attr_str(LOOKUP_SET, set).attr_be32(LOOKUP_SREG, REG_1);
                m.attr_be32(LOOKUP_FLAGS, u32::from(*invert));
            }),
            Self::Verdict(verdict) => encode_verdict(m, verdict),
            Self::Redirect(port) => {
                immediate(m, REG_1, &port.to_be_bytes());
                expression(m, "redir", |m| {
                    m.attr_be32(REDIR_PROTO_MIN, REG_1).attr_be32(REDIR_PROTO_MAX, REG_1);
                });
            }
            Self::Nat(nat) => encode_nat(m, *nat),
            Self::Masquerade => expression(m, "masq", |_| {}),
            Self::Counter => expression(m, "counter", |_| {}),
        }
    }
}

// Numbers of linux/netfilter/nf_tables.h.
const LIST_ELEMENT: u16 = 1;
const EXPR_NAME: u16 = 1;
const EXPR_DATA: u16 = 2;
const DATA_VALUE: u16 = 1;
const VERDICT_CODE: u16 = 1;
const REG_VERDICT: u32 = 0;
const REG_1: u32 = 1;
const REG_2: u32 = 2;
const META_DREG: u16 = 1;
const META_KEY: u16 = 2;
const META_SREG: u16 = 3;
const CT_DREG: u16 = 1;
const CT_KEY: u16 = 2;
const CT_SREG: u16 = 4;
const PAYLOAD_DREG: u16 = 1;
const PAYLOAD_BASE: u16 = 2;
const PAYLOAD_OFFSET: u16 = 3;
const PAYLOAD_LENGTH: u16 = 4;
const FIB_DREG: u16 = 1;
const FIB_RESULT: u16 = 2;
const FIB_FLAGS: u16 = 3;
const FIB_ADDRTYPE: u32 = 3;
const FIB_DADDR: u32 = 2;
const NG_DREG: u16 = 1;
const NG_MODULUS: u16 = 2;
const NG_TYPE: u16 = 3;
const NG_RANDOM: u32 = 1;
const IMMEDIATE_DREG: u16 = 1;
const BITWISE_SREG: u16 = 1;
const BITWISE_DREG: u16 = 2;
const BITWISE_LENGTH: u16 = 3;
const BITWISE_MASK: u16 = 4;
const BITWISE_XOR: u16 = 5;
const CMP_SREG: u16 = 1;
const CMP_OP: u16 = 2;
const CMP_DATA: u16 = 3;
const LOOKUP_SET: u16 = 1;
const LOOKUP_SREG: u16 = 2;
const LOOKUP_FLAGS: u16 = 5;
const REDIR_PROTO_MIN: u16 = 1;
const REDIR_PROTO_MAX: u16 = 2;
const NAT_TYPE: u16 = 1;
const NAT_FAMILY: u16 = 2;
const NAT_ADDR_MIN: u16 = 3;
const NAT_PROTO_MIN: u16 = 5;
const NAT_SOURCE: u32 = 0;
const NAT_DESTINATION: u32 = 1;

fn expression(m: &mut Message, name: &str, fill: impl FnOnce(&mut Message)) {
    m.nest(LIST_ELEMENT, |m| {
        m.attr_str(EXPR_NAME, name).nest(EXPR_DATA, fill);
    });
}

fn load(m: &mut Message, name: &str, register: u16, key_attribute: u16, key: u32) {
    expression(m, name, |m| {
        m.attr_be32(key_attribute, key).attr_be32(register, REG_1);
    });
}

fn load_payload(m: &mut Message, field: Payload) {
    let (base, offset, length) = field.location();
    expression(m, "payload", |m| {
        m.attr_be32(PAYLOAD_DREG, REG_1).attr_be32(PAYLOAD_BASE, base);
        m.attr_be32(PAYLOAD_OFFSET, offset).attr_be32(PAYLOAD_LENGTH, length);
    });
}

fn data(m: &mut Message, attribute: u16, value: &[u8]) {
    m.nest(attribute, |m| {
        m.attr(DATA_VALUE, value);
    });
}

fn immediate(m: &mut Message, register: u32, value: &[u8]) {
    expression(m, "immediate", |m| {
        m.attr_be32(IMMEDIATE_DREG, register);
        data(m, IMMEDIATE_DATA, value);
    });
}

fn bitwise(m: &mut Message, mask: &[u8], xor: &[u8]) {
    // Registers are at most 16 bytes.
    let length = u32::try_from(mask.len()).unwrap_or(u32::MAX);
    expression(m, "bitwise", |m| {
        m.attr_be32(BITWISE_SREG, REG_1).attr_be32(BITWISE_DREG, REG_1).attr_be32(BITWISE_LENGTH, length);
        data(m, BITWISE_MASK, mask);
        data(m, BITWISE_XOR, xor);
    });
}

fn encode_verdict(m: &mut Message, verdict: &Verdict) {
    let (code, chain) = match verdict {
        Verdict::Drop => (0, None),
        Verdict::Accept => (1, None),
        Verdict::Jump(chain) => (-3, Some(chain)),
        Verdict::Goto(chain) => (-4, Some(chain)),
        Verdict::Return => (-5, None),
    };
    expression(m, "immediate", |m| {
        m.attr_be32(IMMEDIATE_DREG, REG_VERDICT).nest(IMMEDIATE_DATA, |m| {
            m.nest(DATA_VERDICT, |m| {
                m.attr_be32(VERDICT_CODE, i32::cast_unsigned(code));
                if let Some(chain) = chain {
                    m.attr_str(VERDICT_CHAIN, chain);
                }
            });
        });
    });
}

fn encode_nat(m: &mut Message, nat: Nat) {
    let (kind, ip, port) = match nat {
        Nat::Destination(ip, port) => (NAT_DESTINATION, ip, port),
        Nat::Source(ip, port) => (NAT_SOURCE, ip, port),
    };
    immediate(m, REG_1, &octets(ip));
    if let Some(port) = port {
        immediate(m, REG_2, &port.to_be_bytes());
    }
    expression(m, "nat", |m| {
        m.attr_be32(NAT_TYPE, kind).attr_be32(NAT_FAMILY, u32::from(protocol(ip))).attr_be32(NAT_ADDR_MIN, REG_1);
        if port.is_some() {
            m.attr_be32(NAT_PROTO_MIN, REG_2);
        }
    });
}

/// The value of [`Meta::NetworkProtocol`] for an address.
pub(super) fn protocol(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 2 } else { 10 }
}

pub(crate) fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}
