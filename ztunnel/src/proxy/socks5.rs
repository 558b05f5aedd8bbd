//! SOCKS 5 (RFC 1928), without authentication, CONNECT only: a way into the outbound path that needs no capture.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use mesh_core::{names::Family, reason::Reason};
use mesh_net::sockets::configure_accepted;
use rand::seq::IndexedRandom as _;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tracing::Instrument as _;

use crate::{
    dns,
    error::ProxyError,
    flow::Direction,
    pods::PodContext,
    proxy::{
        forward::{Carried, FlowSocket},
        outbound::carry,
        resolve::local_workload,
    },
};

const NEGOTIATION_TIMEOUT: Duration = Duration::from_secs(10);

const VERSION: u8 = 5;
const NO_AUTHENTICATION: u8 = 0;
const CONNECT: u8 = 1;

/// RFC 1928 §6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Reply {
    Succeeded = 0,
    HostUnreachable = 4,
    CommandNotSupported = 7,
}

/// Where a client wants to go.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Target {
    Address(SocketAddr),
    Host(String, u16),
}

/// One client: what it asks for, then the outbound path.
pub(crate) async fn open(pod: &PodContext, mut client: TcpStream, peer: SocketAddr) -> Option<Carried> {
    drop(configure_accepted(&client, &pod.sockets));
    let span = tracing::debug_span!(parent: &pod.span, "socks5", %peer);
    let negotiated = timeout(NEGOTIATION_TIMEOUT, negotiate(pod, &mut client, peer)).instrument(span).await;
    let negotiated = negotiated.unwrap_or(Err(ProxyError::HandshakeTimeout(NEGOTIATION_TIMEOUT)));
    match negotiated {
        Ok(destination) => carry(pod, FlowSocket::new(client), peer, destination).await,
        Err(error) => {
            pod.shared.outcomes.early_deny(Direction::Outbound, peer, peer, &error);
            None
        }
    }
}

/// Success is answered before anything is dialled: the client's first bytes then wait in its socket like a captured one's.
async fn negotiate(pod: &PodContext, client: &mut TcpStream, peer: SocketAddr) -> Result<SocketAddr, ProxyError> {
    let target = match read_request(client).await {
        Ok(target) => target,
        Err(error) => {
            answer(client, Reply::CommandNotSupported).await?;
            return Err(error);
        }
    };
    match resolve(pod, &target, peer).await {
        Ok(address) => answer(client, Reply::Succeeded).await.map(|()| address),
        Err(error) => {
            answer(client, Reply::HostUnreachable).await?;
            Err(error)
        }
    }
}

/// A name is the mesh's as in DNS, or looked up; an address of the family the client speaks, where there is one.
async fn resolve(pod: &PodContext, target: &Target, peer: SocketAddr) -> Result<SocketAddr, ProxyError> {
    let (host, port) = match target {
        Target::Address(address) => return Ok(*address),
        Target::Host(host, port) => (host.trim_end_matches('.').to_ascii_lowercase(), *port),
    };
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok(SocketAddr::new(ip.to_canonical(), port));
    }
    let source = local_workload(pod).await?;
    let families = match Family::of(peer.ip()) {
        Family::Ipv4 => [Family::Ipv4, Family::Ipv6],
        Family::Ipv6 => [Family::Ipv6, Family::Ipv4],
    };
    let mut ours = false;
    for family in families {
        let answer = dns::resolve(pod, &source, &host, family);
        ours |= answer.is_some();
        if let Some(ip) = answer.and_then(|answer| answer.addresses.choose(&mut rand::rng()).copied()) {
            return Ok(SocketAddr::new(ip, port));
        }
    }
    let failed = |why: &str| ProxyError::NoRoute { reason: Reason::Lookup, detail: format!("{host}: {why}") };
    if ours {
        return Err(failed("it has no address this client can use"));
    }
    // Not counted: the names are of the client's choice, and a series each would have no end.
    let found = pod.shared.lookups.addresses(&host.as_str().into()).await;
    let of = |family| found.iter().find(|ip| Family::of(**ip) == family);
    let found = families.into_iter().find_map(of).map(|ip| SocketAddr::new(*ip, port));
    found.ok_or_else(|| failed("no ip addresses were resolved"))
}

async fn read_request(client: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> Result<Target, ProxyError> {
    let [version, methods] = read(client).await?;
    expect(version == VERSION, "not SOCKS version 5")?;
    let mut offered = vec![0; usize::from(methods)];
    client.read_exact(&mut offered).await.map_err(broken)?;
    expect(offered.contains(&NO_AUTHENTICATION), "the client insists on authentication")?;
    client.write_all(&[VERSION, NO_AUTHENTICATION]).await.map_err(broken)?;
    let [version, command, _reserved, kind] = read(client).await?;
    expect(version == VERSION && command == CONNECT, "only CONNECT is supported")?;
    read_target(client, kind).await
}

async fn read_target(client: &mut (impl AsyncRead + Unpin), kind: u8) -> Result<Target, ProxyError> {
    let ip: IpAddr = match kind {
        1 => Ipv4Addr::from(read::<4>(client).await?).into(),
        4 => Ipv6Addr::from(read::<16>(client).await?).into(),
        3 => {
            let [length] = read(client).await?;
            let mut name = vec![0; usize::from(length)];
            client.read_exact(&mut name).await.map_err(broken)?;
            let name = String::from_utf8(name).map_err(|_| bad("the host name is not text"))?;
            return Ok(Target::Host(name, u16::from_be_bytes(read(client).await?)));
        }
        _ => return Err(bad("unknown address type")),
    };
    Ok(Target::Address(SocketAddr::new(ip.to_canonical(), u16::from_be_bytes(read(client).await?))))
}

async fn read<const N: usize>(client: &mut (impl AsyncRead + Unpin)) -> Result<[u8; N], ProxyError> {
    let mut bytes = [0; N];
    client.read_exact(&mut bytes).await.map_err(broken)?;
    Ok(bytes)
}

/// The bound address is not known yet, and nobody uses it.
async fn answer(client: &mut (impl AsyncWrite + Unpin), reply: Reply) -> Result<(), ProxyError> {
    client.write_all(&[VERSION, reply as u8, 0, 1, 0, 0, 0, 0, 0, 0]).await.map_err(broken)
}

fn expect(holds: bool, otherwise: &str) -> Result<(), ProxyError> {
    if holds { Ok(()) } else { Err(bad(otherwise)) }
}

fn bad(what: &str) -> ProxyError {
    ProxyError::BadRequest(format!("SOCKS5: {what}"))
}

fn broken(error: std::io::Error) -> ProxyError {
    bad(&error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn request(bytes: &[u8]) -> Result<Target, ProxyError> {
        let (mut near, mut far) = tokio::io::duplex(1024);
        far.write_all(bytes).await.expect("write");
        far.shutdown().await.expect("shut down");
        read_request(&mut near).await
    }

    #[tokio::test]
    async fn understands_every_kind_of_address() {
        let v4 = request(&[5, 1, 0, 5, 1, 0, 1, 10, 0, 0, 1, 0, 80]).await.expect("request");
        assert_eq!(v4, Target::Address("10.0.0.1:80".parse().expect("address")));
        let name = request(b"\x05\x02\x01\x00\x05\x01\x00\x03\x03web\x1f\x90").await.expect("request");
        assert_eq!(name, Target::Host("web".into(), 8080));
        let mut mapped = vec![5, 1, 0, 5, 1, 0, 4];
        mapped.extend(Ipv4Addr::new(10, 0, 0, 1).to_ipv6_mapped().octets());
        mapped.extend([0, 80]);
        assert_eq!(request(&mapped).await.expect("request"), v4, "IPv4 in IPv6 is IPv4");
    }

    #[tokio::test]
    async fn refuses_what_is_not_a_plain_connect() {
        for bytes in [
            &b"GET / HTTP/1.1"[..],
            &[4, 1, 0],
            &[5, 1, 2],
            &[5, 1, 0, 5, 2, 0, 1, 10, 0, 0, 1, 0, 80],
            &[5, 1, 0, 5, 1, 0, 9, 0],
            &[5],
        ] {
            assert!(request(bytes).await.is_err(), "{bytes:?}");
        }
    }
}
