//! The PROXY protocol, version 2: what a workload that is itself a proxy is told about a connection before its first byte.

use std::net::SocketAddr;

use mesh_core::identity::Identity;

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, command PROXY.
const PROXY: u8 = 0x21;
const TCP4: u8 = 0x11;
const TCP6: u8 = 0x21;
/// A stream between addresses of different families, which cannot be told.
const UNSPECIFIED: u8 = 0x01;
/// The source's SPIFFE identity, by agreement among the proxies of the mesh.
const TLV_IDENTITY: u8 = 0xd0;

/// The header for a connection from `source`, known as `identity`, to `destination`.
pub(crate) fn encode(source: SocketAddr, destination: SocketAddr, identity: Option<&Identity>) -> Vec<u8> {
    let (family, addresses) = addresses(source, destination);
    let identity = identity.and_then(|identity| tlv(TLV_IDENTITY, identity.to_string().as_bytes()));
    let body = [addresses, identity.unwrap_or_default()].concat();
    // An identity fits a certificate, so this is far below the limit; should it ever not, the header stays well-formed.
    let length = u16::try_from(body.len()).unwrap_or(0);
    let body = &body[..usize::from(length)];
    [&SIGNATURE[..], &[PROXY, family], &length.to_be_bytes(), body].concat()
}

fn addresses(source: SocketAddr, destination: SocketAddr) -> (u8, Vec<u8>) {
    let ports = [source.port().to_be_bytes(), destination.port().to_be_bytes()].concat();
    match (source, destination) {
        (SocketAddr::V4(s), SocketAddr::V4(d)) => (TCP4, [&s.ip().octets()[..], &d.ip().octets(), &ports].concat()),
        (SocketAddr::V6(s), SocketAddr::V6(d)) => (TCP6, [&s.ip().octets()[..], &d.ip().octets(), &ports].concat()),
        _ => (UNSPECIFIED, Vec::new()),
    }
}

/// Type, length, value; none when the value is too long for one.
fn tlv(kind: u8, value: &[u8]) -> Option<Vec<u8>> {
    let length = u16::try_from(value.len()).ok().filter(|length| *length < 1 << 15)?;
    Some([&[kind], &length.to_be_bytes()[..], value].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv4_header_has_the_documented_bytes() {
        let identity = Identity::new("td", "ns", "sa");
        let header = encode(([10, 0, 0, 9], 0x1234).into(), ([10, 96, 0, 1], 80).into(), Some(&identity));
        let uri = b"spiffe://td/ns/ns/sa/sa";
        let expected = [
            &b"\x0d\x0a\x0d\x0a\x00\x0d\x0a\x51\x55\x49\x54\x0a\x21\x11"[..],
            &[0, 12 + 3 + 23],
            &[10, 0, 0, 9, 10, 96, 0, 1, 0x12, 0x34, 0, 80],
            &[0xd0, 0, 23],
            uri,
        ];
        assert_eq!(header, expected.concat());
    }

    #[test]
    fn ipv6_and_mixed_families_are_told_apart() {
        let (v4, v6) = ("10.0.0.1:1".parse().unwrap(), "[2001:db8::1]:1".parse().unwrap());
        let header = encode(v6, v6, None);
        assert_eq!((header[13], header.len()), (0x21, 16 + 36));
        assert_eq!(encode(v4, v6, None)[13..], [0x01, 0, 0]);
    }
}
