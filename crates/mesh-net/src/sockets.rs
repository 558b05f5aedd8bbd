//! TCP sockets of the data plane: created inside a pod's namespace, marked, transparent, with the client's address.
//!
//! Every socket is nonblocking and close-on-exec, has `TCP_NODELAY`, and reports IPv4 addresses as IPv4.

use std::{
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket},
    os::fd::AsFd,
    time::Duration,
};

use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, TcpKeepalive, Type};
use tokio::{
    net::{TcpSocket, TcpStream},
    time::timeout,
};

use crate::{netns::NetNs, sys};

/// Whether a listener takes packets for addresses that are not the pod's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transparent {
    #[default]
    Never,
    BestEffort,
    Required,
}

/// When the kernel probes a silent peer and gives it up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeepAlive {
    pub idle: Duration,
    pub interval: Duration,
    pub retries: u32,
}

/// Options of data-plane sockets; the default sets none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SocketOptions {
    /// `SO_MARK`, by which the capture rules tell the proxy's packets from the application's.
    pub mark: Option<u32>,
    pub transparent: Transparent,
    /// Lets an old and a new process listen on the same port at once.
    pub reuse_port: bool,
    pub keepalive: Option<KeepAlive>,
    /// How long sent data may stay unacknowledged.
    pub user_timeout: Option<Duration>,
}

/// Listens on `addr` inside `ns` (`None`: the thread's own). An unspecified IPv6 address is dual-stack.
/// The flag says whether the listener became transparent.
pub fn listen_tcp(
    ns: Option<&NetNs>,
    addr: SocketAddr,
    backlog: i32,
    options: &SocketOptions,
) -> io::Result<(TcpListener, bool)> {
    let socket = new_socket(ns, addr, Type::STREAM, Protocol::TCP)?;
    if addr.is_ipv6() {
        socket.set_only_v6(addr.ip() != IpAddr::V6(Ipv6Addr::UNSPECIFIED))?;
    }
    apply(&socket, options)?;
    let transparent = make_transparent(&socket, addr, options.transparent)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(options.reuse_port)?;
    socket.bind(&addr.into())?;
    socket.listen(backlog)?;
    Ok((socket.into(), transparent))
}

/// A socket ready to [`connect`] to `dest` from inside `ns`. With `bind_source` the peer sees that address, whoever owns it;
/// the port is chosen at connect. A pod calling itself (`bind_source` is the destination) needs no spoofing and gets none.
pub fn tcp_socket(
    ns: Option<&NetNs>,
    bind_source: Option<IpAddr>,
    dest: SocketAddr,
    options: &SocketOptions,
) -> io::Result<Socket> {
    let dest = canonical(dest);
    let socket = new_socket(ns, dest, Type::STREAM, Protocol::TCP)?;
    apply(&socket, options)?;
    if let Some(source) = bind_source.map(|ip| ip.to_canonical()).filter(|ip| *ip != dest.ip()) {
        spoof(&socket, source)?;
    }
    Ok(socket)
}

/// Receives datagrams for `addr` inside `ns` (`None`: the thread's own); non-blocking. An IPv6 socket takes IPv6 only. Of `options`, mark
/// and port sharing apply.
pub fn listen_udp(ns: Option<&NetNs>, addr: SocketAddr, options: &SocketOptions) -> io::Result<UdpSocket> {
    let socket = udp(ns, addr, options)?;
    if addr.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_port(options.reuse_port)?;
    socket.bind(&addr.into())?;
    Ok(socket.into())
}

/// Exchanges datagrams with `dest` and nobody else, from inside `ns` and a port of the kernel's choice; non-blocking. Never shares its
/// port: another's answers must not arrive here. `own`: the address to send from. Of `options`, the mark applies.
pub fn udp_socket(
    ns: Option<&NetNs>,
    own: Option<IpAddr>,
    dest: SocketAddr,
    options: &SocketOptions,
) -> io::Result<UdpSocket> {
    let dest = canonical(dest);
    let socket = udp(ns, dest, options)?;
    if let Some(own) = own {
        socket.bind(&SocketAddr::new(own, 0).into())?;
    }
    socket.connect(&dest.into())?;
    Ok(socket.into())
}

fn udp(ns: Option<&NetNs>, addr: SocketAddr, options: &SocketOptions) -> io::Result<Socket> {
    let socket = new_socket(ns, addr, Type::DGRAM, Protocol::UDP)?;
    if let Some(mark) = options.mark {
        socket.set_mark(mark)?;
    }
    Ok(socket)
}

/// Connects within `limit`; `TimedOut` after it.
pub async fn connect(socket: Socket, dest: SocketAddr, limit: Duration) -> io::Result<TcpStream> {
    let socket = TcpSocket::from_std_stream(socket.into());
    match timeout(limit, socket.connect(canonical(dest))).await {
        Ok(connected) => connected,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer from {dest} within {limit:?}"))),
    }
}

/// Where the client of a redirected connection wanted to go; without redirection, the address it dialled.
pub fn original_dst(socket: &impl AsFd) -> io::Result<SocketAddr> {
    let socket = SockRef::from(socket);
    let address = socket.original_dst_v4().or_else(|_| socket.original_dst_v6()).or_else(|_| socket.local_addr())?;
    socket_addr(&address)
}

/// Options an accepted socket does not inherit from its listener.
pub fn configure_accepted(stream: &TcpStream, options: &SocketOptions) -> io::Result<()> {
    let socket = SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    set_liveness(&socket, options)
}

/// Not yet sent bytes that the kernel queues for a tunnel; what waits longer waits where it can still be put in order.
const UNSENT: u32 = 128 << 10;

/// Bounds the kernel's queue of a tunnel's connection: it is writable while less than 128 KiB wait in it.
pub fn limit_unsent(stream: &TcpStream) -> io::Result<()> {
    SockRef::from(stream).set_tcp_notsent_lowat(UNSENT)
}

/// Makes the coming close of the socket a RST instead of a FIN.
pub fn reset_on_close(stream: &TcpStream) -> io::Result<()> {
    SockRef::from(stream).set_linger(Some(Duration::ZERO))
}

/// Whether the connection is gone without our having closed it: the peer sent RST, or the kernel gave it up. Not meaningful once
/// both directions were shut down in order.
pub fn peer_was_reset(stream: &TcpStream) -> bool {
    const TCP_CLOSE: u8 = 7;
    sys::struct_option::<libc::tcp_info>(stream, libc::IPPROTO_TCP, libc::TCP_INFO)
        .is_ok_and(|info| info.tcpi_state == TCP_CLOSE)
}

/// An IPv4-mapped address as the IPv4 address it means.
pub fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

fn new_socket(ns: Option<&NetNs>, addr: SocketAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let open = || Socket::new(Domain::for_address(addr), kind.nonblocking().cloexec(), Some(protocol));
    match ns {
        Some(ns) => ns.run(open)?,
        None => open(),
    }
}

fn apply(socket: &Socket, options: &SocketOptions) -> io::Result<()> {
    if let Some(mark) = options.mark {
        socket.set_mark(mark)?;
    }
    socket.set_tcp_nodelay(true)?;
    set_liveness(socket, options)
}

fn set_liveness(socket: &Socket, options: &SocketOptions) -> io::Result<()> {
    if let Some(KeepAlive { idle, interval, retries }) = options.keepalive {
        let parameters = TcpKeepalive::new().with_time(idle).with_interval(interval).with_retries(retries);
        socket.set_tcp_keepalive(&parameters)?;
    }
    match options.user_timeout {
        Some(limit) => socket.set_tcp_user_timeout(Some(limit)),
        None => Ok(()),
    }
}

fn make_transparent(socket: &Socket, addr: SocketAddr, wanted: Transparent) -> io::Result<bool> {
    if wanted == Transparent::Never {
        return Ok(false);
    }
    // A dual-stack socket needs both options: each covers the packets of its own family.
    let v4 = socket.set_ip_transparent_v4(true);
    let v6 = if addr.is_ipv6() { socket.set_ip_transparent_v6(true) } else { Ok(()) };
    match (v4.and(v6), wanted) {
        (Ok(()), _) => Ok(true),
        (Err(_), Transparent::BestEffort) => Ok(false),
        (Err(error), _) => Err(error),
    }
}

fn spoof(socket: &Socket, source: IpAddr) -> io::Result<()> {
    if source.is_ipv4() {
        socket.set_ip_transparent_v4(true)?;
        socket.set_freebind_v4(true)?;
    } else {
        socket.set_ip_transparent_v6(true)?;
        socket.set_freebind_v6(true)?;
    }
    // Without this, bind takes a port that is unique for the address alone and 28,000 flows exhaust a client's address.
    sys::set_int_option(socket, libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)?;
    socket.bind(&SocketAddr::new(source, 0).into())
}

fn socket_addr(address: &SockAddr) -> io::Result<SocketAddr> {
    let address = address.as_socket();
    address.map(canonical).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not an IP socket"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn a_dual_stack_listener_reports_ipv4_peers_as_ipv4() {
        let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
        let (listener, _) = listen_tcp(None, any, 16, &SocketOptions::default()).expect("listen");
        let listener = tokio::net::TcpListener::from_std(listener).expect("register");
        let dest = SocketAddr::from(([127, 0, 0, 1], listener.local_addr().expect("address").port()));
        let client = connect(tcp_socket(None, None, dest, &SocketOptions::default()).expect("socket"), dest, LIMIT);
        let (client, accepted) = tokio::join!(client, listener.accept());
        let (server, peer) = accepted.expect("accept");
        assert_eq!(canonical(peer), client.expect("connect").local_addr().expect("address"));
        assert_eq!(original_dst(&server).expect("original destination"), dest);
        assert!(server.nodelay().is_ok());
        configure_accepted(&server, &SocketOptions { user_timeout: Some(LIMIT), ..Default::default() })
            .expect("configure");
    }

    #[tokio::test]
    async fn a_refused_connect_is_an_error_of_that_kind() {
        let (listener, _) = listen_tcp(None, ([127, 0, 0, 1], 0).into(), 1, &SocketOptions::default()).expect("listen");
        let dest = listener.local_addr().expect("address");
        drop(listener);
        let socket = tcp_socket(None, None, dest, &SocketOptions::default()).expect("socket");
        assert_eq!(connect(socket, dest, LIMIT).await.expect_err("refused").kind(), io::ErrorKind::ConnectionRefused);
    }

    #[tokio::test]
    async fn a_datagram_socket_hears_its_destination_only() {
        let listen = || listen_udp(None, ([127, 0, 0, 1], 0).into(), &SocketOptions::default()).expect("listen");
        let (server, stranger) = (listen(), listen());
        let dest = server.local_addr().expect("address");
        let own = Some([127, 0, 0, 1].into());
        let client = udp_socket(None, own, dest, &SocketOptions::default()).expect("socket");
        let client = tokio::net::UdpSocket::from_std(client).expect("register");
        let back = client.local_addr().expect("address");
        stranger.send_to(b"spoofed", back).expect("send");
        server.send_to(b"answer", back).expect("send");
        let mut buffer = [0; 16];
        let length = client.recv(&mut buffer).await.expect("receive");
        assert_eq!(&buffer[..length], b"answer");
    }

    #[tokio::test]
    async fn two_listeners_share_a_port_only_when_both_ask() {
        let reuse = SocketOptions { reuse_port: true, ..Default::default() };
        let (first, _) = listen_tcp(None, ([127, 0, 0, 1], 0).into(), 1, &reuse).expect("listen");
        let address = first.local_addr().expect("address");
        listen_tcp(None, address, 1, &reuse).expect("second listener");
        listen_tcp(None, address, 1, &SocketOptions::default()).expect_err("not shared");
    }
}
