//! A waypoint for bytes: what its ztunnel hands over, it carries to where the client was going.
//!
//! ztunnel keeps HBONE and identities to itself and tells such a proxy, in a PROXY header (version 2) before the first byte, who
//! calls and whom. The relay's own connection leaves its pod like any other, so the destination sees the waypoint's identity.

use std::{
    io::{self, Read},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs as _},
    sync::Arc,
    thread,
    time::Duration,
};

use serde::{Deserialize, Serialize};

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, command PROXY.
const PROXY: u8 = 0x21;
const TCP4: u8 = 0x11;
const TCP6: u8 = 0x21;
/// The source's SPIFFE identity, by agreement among the proxies of the mesh.
const TLV_IDENTITY: u8 = 0xd0;
const PATIENCE: Duration = Duration::from_secs(10);

/// What the header says of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    pub source: SocketAddr,
    /// As the client dialled it: an address of a service, or of a workload.
    pub destination: SocketAddr,
    /// Who the source proved to be.
    pub identity: Option<String>,
}

/// A host whose connections go to another one, port for port: a waypoint knows the endpoints of its services, and not every
/// ztunnel lets it dial the address by which it was reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instead {
    pub host: String,
    pub other: String,
}

impl Instead {
    /// The destination itself, unless it is an address of the host.
    ///
    /// # Errors
    /// When a name has no address of the destination's family.
    fn of(&self, destination: SocketAddr) -> io::Result<SocketAddr> {
        let port = destination.port();
        if !(self.host.as_str(), port).to_socket_addrs()?.any(|address| address == destination) {
            return Ok(destination);
        }
        let others = (self.other.as_str(), port).to_socket_addrs()?;
        others.into_iter().find(|a| a.is_ipv4() == destination.is_ipv4()).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

/// Relays every connection until the process ends; `told` hears of each before its destination is dialled.
///
/// # Errors
/// When the port cannot be bound.
pub fn serve(listen: SocketAddr, instead: Vec<Instead>, told: fn(&Told)) -> io::Result<()> {
    let instead: Arc<[Instead]> = instead.into();
    for stream in TcpListener::bind(listen)?.incoming() {
        let Ok(stream) = stream else { continue };
        let instead = instead.clone();
        // What fails is closed: the client sees that nothing comes.
        thread::spawn(move || drop(relay(stream, &instead, told)));
    }
    Ok(())
}

fn relay(near: TcpStream, instead: &[Instead], told: fn(&Told)) -> io::Result<()> {
    near.set_read_timeout(Some(PATIENCE))?;
    let header = read(&mut &near)?;
    near.set_read_timeout(None)?;
    told(&header);
    let destination = instead.iter().try_fold(header.destination, |destination, instead| instead.of(destination))?;
    let far = TcpStream::connect_timeout(&destination, PATIENCE)?;
    near.set_nodelay(true).and_then(|()| far.set_nodelay(true))?;
    let back = (far.try_clone()?, near.try_clone()?);
    let answers = thread::spawn(move || copy(&back.0, &back.1));
    copy(&near, &far);
    drop(answers.join());
    Ok(())
}

/// One direction, to its end; a direction that fails takes the other along.
fn copy(mut from: &TcpStream, mut to: &TcpStream) {
    let how = if io::copy(&mut from, &mut to).is_ok() { Shutdown::Write } else { Shutdown::Both };
    // Whoever has gone by now needs no telling.
    drop(to.shutdown(how));
    if how == Shutdown::Both {
        drop(from.shutdown(how));
    }
}

/// Reads a header and nothing beyond it.
fn read(stream: &mut impl Read) -> io::Result<Told> {
    let mut head = [0; 16];
    stream.read_exact(&mut head)?;
    if head[..12] != SIGNATURE || head[12] != PROXY {
        return Err(malformed("no PROXY header of version 2"));
    }
    let mut body = vec![0; usize::from(u16::from_be_bytes([head[14], head[15]]))];
    stream.read_exact(&mut body)?;
    parse(head[13], &body).ok_or_else(|| malformed("a PROXY header without addresses"))
}

fn parse(family: u8, body: &[u8]) -> Option<Told> {
    let (source, destination, rest) = match family {
        TCP4 => addresses::<4>(body)?,
        TCP6 => addresses::<16>(body)?,
        _ => return None,
    };
    let identity = tlv(rest, TLV_IDENTITY).and_then(|value| String::from_utf8(value.to_vec()).ok());
    Some(Told { source, destination, identity })
}

/// Two addresses of `N` bytes, two ports, and what follows.
fn addresses<const N: usize>(body: &[u8]) -> Option<(SocketAddr, SocketAddr, &[u8])>
where
    IpAddr: From<[u8; N]>,
{
    let (source, rest) = body.split_first_chunk::<N>()?;
    let (destination, rest) = rest.split_first_chunk::<N>()?;
    let (&[a, b, c, d], rest) = rest.split_first_chunk()?;
    let (from, to) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
    Some((SocketAddr::new((*source).into(), from), SocketAddr::new((*destination).into(), to), rest))
}

fn tlv(mut rest: &[u8], wanted: u8) -> Option<&[u8]> {
    while let Some((&[kind, high, low], after)) = rest.split_first_chunk() {
        let (value, after) = after.split_at_checked(usize::from(u16::from_be_bytes([high, low])))?;
        if kind == wanted {
            return Some(value);
        }
        rest = after;
    }
    None
}

fn malformed(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDENTITY: &[u8] = b"spiffe://td/ns/n/sa/s";

    fn header(family: u8, body: &[u8]) -> Vec<u8> {
        let length = u16::try_from(body.len()).unwrap().to_be_bytes();
        [&SIGNATURE[..], &[PROXY, family], &length, body].concat()
    }

    #[test]
    fn addresses_and_identity_are_read_and_the_first_byte_after_is_left() {
        let unknown = [0x04, 0, 1, 9];
        let identity = [&[TLV_IDENTITY, 0, 21], IDENTITY].concat();
        let v4 = [&[10, 0, 0, 9, 10, 96, 0, 1, 0x12, 0x34, 0, 80][..], &unknown, &identity].concat();
        let bytes = [&header(TCP4, &v4)[..], b"x"].concat();
        let mut rest = &bytes[..];
        let told = read(&mut rest).unwrap();
        assert_eq!((told.source, told.destination), (([10, 0, 0, 9], 0x1234).into(), ([10, 96, 0, 1], 80).into()));
        assert_eq!((told.identity.as_deref(), rest), (Some("spiffe://td/ns/n/sa/s"), &b"x"[..]));
        let v6 = [&[1; 16][..], &[2; 16], &[0, 1, 0, 2]].concat();
        let told = read(&mut &header(TCP6, &v6)[..]).unwrap();
        assert_eq!((told.source.port(), told.destination.port(), told.identity), (1, 2, None));
    }

    #[test]
    fn a_host_is_exchanged_and_every_other_kept() {
        let instead = Instead { host: "127.0.0.1".to_owned(), other: "127.0.0.2".to_owned() };
        let v4 = |last| SocketAddr::from(([127, 0, 0, last], 80));
        assert_eq!((instead.of(v4(1)).unwrap(), instead.of(v4(3)).unwrap()), (v4(2), v4(3)));
        assert!(Instead { other: "::1".to_owned(), ..instead }.of(v4(1)).is_err());
    }

    #[test]
    fn what_is_no_header_is_refused() {
        let v4 = [0; 12];
        let cut = header(TCP4, &v4);
        for bad in [&b"GET / HTTP/1.1\r\n\r\n"[..], &cut[..20], &header(TCP4, &v4[..11]), &header(0, &v4)] {
            assert!(read(&mut &*bad).is_err(), "{bad:?}");
        }
        let beyond = [&v4[..], &[TLV_IDENTITY, 0xff, 0xff]].concat();
        assert_eq!(read(&mut &header(TCP4, &beyond)[..]).unwrap().identity, None);
    }
}
