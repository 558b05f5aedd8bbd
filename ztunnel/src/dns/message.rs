//! DNS messages (RFC 1035 §4) as far as the proxy reads them: the question of a query, and answers of its own. What is relayed is never
//! written anew.

use std::net::IpAddr;

use hickory_proto::{
    op::{Message, OpCode, Query, ResponseCode},
    rr::{DNSClass, Name, RecordType},
    serialize::binary::{BinDecodable, BinDecoder},
};
use mesh_core::names::Family;

/// The largest message: its length has two bytes in TCP (RFC 1035 §4.2.2).
pub const MAX_MESSAGE: usize = 65_535;
/// What a UDP client takes that says nothing about it (RFC 1035 §4.2.1), and the least it may say (RFC 6891 §6.2.3).
const UDP_PAYLOAD: u16 = 512;
/// Seconds an answer of ours may be kept: changes of the mesh are seen after it at the latest.
pub const TTL: u32 = 30;

const HEADER: usize = 12;

/// A client's message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Incoming {
    /// Asks for addresses of a name: lower case, without the last dot.
    Addresses { name: String, family: Family },
    /// Asks for something else, which is never ours.
    Other(RecordType),
    /// To be answered with [`refusal`].
    Refused(ResponseCode),
    /// Too short to be answered, or an answer itself.
    Stub,
}

/// What a client wants.
pub fn read(message: &[u8]) -> Incoming {
    let Some(header) = message.first_chunk::<HEADER>() else { return Incoming::Stub };
    let (is_response, opcode) = (header[2] & 0x80 != 0, header[2] >> 3 & 0xf);
    if is_response {
        // Two servers that answered each other's answers would never end.
        return Incoming::Stub;
    }
    if opcode != u8::from(OpCode::Query) {
        return Incoming::Refused(ResponseCode::NotImp);
    }
    match u16::from_be_bytes([header[4], header[5]]) {
        // As RFC 7873 §5.4 asks for a server's cookie.
        0 => Incoming::Other(RecordType::ZERO),
        1 => match question(message) {
            Some((question, _)) => wanted(&question),
            None => Incoming::Refused(ResponseCode::FormErr),
        },
        // RFC 9619 §4
        _ => Incoming::Refused(ResponseCode::FormErr),
    }
}

fn wanted(question: &Query) -> Incoming {
    let kind = question.query_type();
    let family = match kind {
        RecordType::A => Family::Ipv4,
        RecordType::AAAA => Family::Ipv6,
        _ => return Incoming::Other(kind),
    };
    match host(question.name()) {
        Some(name) if question.query_class() == DNSClass::IN => Incoming::Addresses { name, family },
        _ => Incoming::Other(kind),
    }
}

/// The first question, and where it ends.
fn question(message: &[u8]) -> Option<(Query, usize)> {
    let mut decoder = BinDecoder::new(message);
    decoder.read_slice(HEADER).ok()?;
    let question = Query::read(&mut decoder).ok()?;
    Some((question, decoder.index()))
}

/// Labels of hosts only: a label may hold any byte, and one with a dot in it is not two.
fn host(name: &Name) -> Option<String> {
    let mut text = String::with_capacity(name.len());
    for label in name.iter() {
        if !label.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'-' || *b == b'_') {
            return None;
        }
        if !text.is_empty() {
            text.push('.');
        }
        text.extend(label.iter().map(|b| char::from(b.to_ascii_lowercase())));
    }
    Some(text)
}

/// The identifier by which a query and its answer are matched.
pub fn id(message: &[u8]) -> Option<[u8; 2]> {
    message.first_chunk().copied()
}

/// Whether `message` can be the answer to a query of this identifier.
pub fn answers(message: &[u8], to: [u8; 2]) -> bool {
    message.len() >= HEADER && id(message) == Some(to) && message[2] & 0x80 != 0
}

/// The answer to a query that gets none; empty for a stub. The question is repeated where it reads: resolvers ignore an answer without
/// it.
pub fn refusal(query: &[u8], code: ResponseCode) -> Vec<u8> {
    if query.len() < HEADER {
        return Vec::new();
    }
    let end = question(query).filter(|_| query[4..6] == [0, 1]).map(|(_, end)| end);
    let mut answer = query[..end.unwrap_or(HEADER)].to_vec();
    // QR and what the query said of opcode and RD; RA and the code.
    answer[2] = 0x80 | query[2] & 0x79;
    answer[3] = 0x80 | code.low();
    answer[4..HEADER].fill(0);
    answer[5] = u8::from(end.is_some());
    answer
}

/// What is answered for a name of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply<'a> {
    /// The name that owns the addresses, where the one asked for is only an alias of it.
    pub alias_of: Option<&'a str>,
    /// In the order of the answer.
    pub addresses: &'a [IpAddr],
    /// Over UDP, where an answer must fit what the client takes; the rest is left for it to ask again over TCP.
    pub datagram: bool,
}

/// The authoritative answer to an address query; `None` when the rest of the query does not read. The question is repeated as it was
/// written: clients compare it, case included.
pub fn answer(query: &[u8], reply: &Reply<'_>) -> Option<Vec<u8>> {
    let edns = Message::from_vec(query).ok()?.edns;
    let (_, end) = question(query)?;
    let payload = edns.as_ref().map_or(UDP_PAYLOAD, |edns| edns.max_payload().max(UDP_PAYLOAD));
    let limit = if reply.datagram { usize::from(payload) } else { MAX_MESSAGE };
    let room = limit.saturating_sub(if edns.is_some() { OPT_LENGTH } else { 0 });
    let mut out = query[..end].to_vec();
    let (mut owner, mut records) = (pointer(HEADER), 0);
    if let Some(name) = reply.alias_of {
        let name = Name::from_ascii(name).ok()?;
        let labels: Vec<u8> = name.iter().flat_map(|l| [&[u8::try_from(l.len()).unwrap_or(0)], l].concat()).collect();
        push(&mut out, owner, RecordType::CNAME, &[&labels, &[0][..]].concat());
        owner = pointer(out.len() - labels.len() - 1);
        records += 1;
    }
    let mut left = reply.addresses.iter();
    while let Some(ip) = left.as_slice().first().filter(|ip| out.len() + FIXED + octets(ip) <= room) {
        match ip {
            IpAddr::V4(ip) => push(&mut out, owner, RecordType::A, &ip.octets()),
            IpAddr::V6(ip) => push(&mut out, owner, RecordType::AAAA, &ip.octets()),
        }
        records += 1;
        left.next();
    }
    // What does not fit is left out, and the client told so (RFC 2181 §9).
    let truncated = left.len() > 0 || out.len() > room;
    if out.len() > room {
        out.truncate(end);
        records = 0;
    }
    if let Some(edns) = &edns {
        // RFC 6891 §6.1.2: the root's name, the payload for a class, version and flags for a TTL, and no options.
        let flags = if edns.flags().dnssec_ok { 0x80 } else { 0 };
        let kind = u16::from(RecordType::OPT).to_be_bytes();
        let payload = payload.to_be_bytes();
        out.extend([0, kind[0], kind[1], payload[0], payload[1], 0, edns.version(), flags, 0, 0, 0]);
    }
    // QR, AA, TC, and the query's RD; RA, and the query's CD.
    out[2] = 0x84 | u8::from(truncated) << 1 | query[2] & 0x01;
    out[3] = 0x80 | query[3] & 0x10;
    out[6..8].copy_from_slice(&u16::to_be_bytes(records));
    out[8..HEADER].copy_from_slice(&[0, 0, 0, u8::from(edns.is_some())]);
    Some(out)
}

/// Owner as a pointer, type, class, TTL and length.
const FIXED: usize = 2 + 2 + 2 + 4 + 2;
const OPT_LENGTH: usize = 11;

fn octets(ip: &IpAddr) -> usize {
    if ip.is_ipv4() { 4 } else { 16 }
}

/// To the name at `offset` (RFC 1035 §4.1.4), which is within the question or the first record.
fn pointer(offset: usize) -> [u8; 2] {
    (0xc000 | u16::try_from(offset).unwrap_or(0)).to_be_bytes()
}

fn push(out: &mut Vec<u8>, owner: [u8; 2], kind: RecordType, data: &[u8]) {
    out.extend(owner);
    out.extend(u16::from(kind).to_be_bytes());
    out.extend(u16::from(DNSClass::IN).to_be_bytes());
    out.extend(TTL.to_be_bytes());
    // A name or an address.
    out.extend(u16::try_from(data.len()).unwrap_or(0).to_be_bytes());
    out.extend(data);
}

#[cfg(test)]
mod tests;
