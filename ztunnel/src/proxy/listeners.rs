//! Listening sockets of a pod, and on which worker an accepted connection is carried.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    rc::Rc,
    time::Duration,
};

use mesh_net::{
    NetNs, SocketOptions,
    sockets::{canonical, listen_tcp, listen_udp},
};
use mesh_runtime::{drain::DrainMode, workers::WorkerHandle};
use tokio::{net::TcpStream, sync::mpsc, time::sleep};

use crate::{config::Config, error::StartError, pods::PodContext};

const BACKLOG: i32 = 1024;
/// After a failed accept; usually descriptors have run out, and trying at once would spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// A home worker keeps what it accepts until it has this many flows more than twice the idlest one's.
const BUSIER: usize = 8;

/// What a listener is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// HBONE from other proxies.
    Inbound,
    /// Captured connections of the pod's applications.
    Outbound,
    /// Captured plaintext connections to the pod.
    Passthrough,
    /// Connections of applications that ask by SOCKS.
    Socks5,
    /// DNS queries of applications, over TCP.
    Dns,
    /// The same over UDP.
    DnsDatagrams,
}

impl Kind {
    pub(crate) fn of_pod(config: &Config) -> Vec<Self> {
        if !config.proxy {
            return Vec::new();
        }
        let mut kinds = vec![Self::Outbound, Self::Passthrough, Self::Inbound];
        kinds.extend(config.socks5.then_some(Self::Socks5));
        kinds.extend(config.dns.enabled.then_some([Self::Dns, Self::DnsDatagrams]).into_iter().flatten());
        kinds
    }

    fn addresses(self, config: &Config) -> Vec<SocketAddr> {
        match self {
            Self::Inbound => vec![config.wildcard(config.ports.inbound)],
            Self::Outbound => vec![config.wildcard(config.ports.outbound)],
            Self::Passthrough => vec![config.wildcard(config.ports.passthrough)],
            Self::Socks5 => vec![config.loopback(config.ports.socks5)],
            Self::Dns | Self::DnsDatagrams => config.dns.addresses(config.local_address),
        }
    }

    pub(crate) fn is_dns(self) -> bool {
        matches!(self, Self::Dns | Self::DnsDatagrams)
    }

    fn what(self) -> &'static str {
        match self {
            Self::Inbound => "HBONE",
            Self::Outbound => "captured outbound traffic",
            Self::Passthrough => "captured inbound traffic",
            Self::Socks5 => "SOCKS5",
            Self::Dns => "DNS over TCP",
            Self::DnsDatagrams => "DNS",
        }
    }
}

/// One listening socket, not yet on a worker.
#[derive(Debug)]
pub(crate) struct Listener {
    kind: Kind,
    socket: std::net::TcpListener,
}

pub(crate) struct Bound {
    pub(crate) listeners: Vec<Listener>,
    pub(crate) datagrams: Vec<UdpSocket>,
    pub(crate) addresses: Vec<(Kind, SocketAddr)>,
    /// Whether addresses that are not the pod's may be used.
    pub(crate) transparent: bool,
}

/// Binds and listens; nothing is accepted yet, but peers can connect.
pub(crate) fn bind(
    config: &Config,
    netns: Option<&NetNs>,
    sockets: &SocketOptions,
    kinds: &[Kind],
) -> Result<Bound, StartError> {
    let options = SocketOptions {
        mark: sockets.mark,
        transparent: sockets.transparent,
        reuse_port: config.reuse_port,
        ..SocketOptions::default()
    };
    let mut bound = Bound { listeners: Vec::new(), datagrams: Vec::new(), addresses: Vec::new(), transparent: true };
    for kind in kinds {
        for address in kind.addresses(config) {
            match bound.add(*kind, netns, address, &options) {
                // A pod without IPv6 asks over IPv4.
                Err(error) if kind.is_dns() && address.ip().is_loopback() && lacks_ipv6(address, &error) => {}
                done => done.map_err(|source| StartError::Listen { what: kind.what(), address, source })?,
            }
        }
    }
    Ok(bound)
}

impl Bound {
    fn add(
        &mut self,
        kind: Kind,
        netns: Option<&NetNs>,
        address: SocketAddr,
        options: &SocketOptions,
    ) -> io::Result<()> {
        if kind == Kind::DnsDatagrams {
            let socket = listen_udp(netns, address, options)?;
            self.addresses.push((kind, socket.local_addr()?));
            self.datagrams.push(socket);
            return Ok(());
        }
        let (socket, transparent) = listen(netns, address, options)?;
        self.addresses.push((kind, socket.local_addr()?));
        self.listeners.push(Listener { kind, socket });
        self.transparent &= transparent;
        Ok(())
    }
}

fn lacks_ipv6(address: SocketAddr, error: &io::Error) -> bool {
    // Of a kernel without it; there is no stable `ErrorKind`.
    const EAFNOSUPPORT: i32 = 97;
    let lacks = error.kind() == io::ErrorKind::AddrNotAvailable || error.raw_os_error() == Some(EAFNOSUPPORT);
    address.is_ipv6() && lacks
}

/// Without IPv6 there is an IPv4 listener where a dual-stack one was wanted; nothing is lost by it.
pub(crate) fn listen(
    netns: Option<&NetNs>,
    address: SocketAddr,
    options: &SocketOptions,
) -> io::Result<(std::net::TcpListener, bool)> {
    match listen_tcp(netns, address, BACKLOG, options) {
        Err(error) if address.ip().is_unspecified() && lacks_ipv6(address, &error) => {
            listen_tcp(netns, (Ipv4Addr::UNSPECIFIED, address.port()).into(), BACKLOG, options)
        }
        done => done,
    }
}

/// A connection on its way to the worker that will carry it; nothing was read from it.
#[derive(Debug)]
pub(crate) struct Accepted {
    pub(crate) socket: Socket,
    pub(crate) peer: SocketAddr,
    pub(crate) kind: Kind,
}

#[derive(Debug)]
pub(crate) enum Socket {
    /// Registered with the worker that gets it.
    Here(TcpStream),
    /// Registered with no worker.
    Moved(std::net::TcpStream),
}

impl Socket {
    /// Call on the worker that carries the connection.
    pub(crate) fn register(self) -> io::Result<TcpStream> {
        match self {
            Self::Here(stream) => Ok(stream),
            Self::Moved(stream) => TcpStream::from_std(stream),
        }
    }
}

/// Chooses workers for the connections of one pod.
pub(crate) struct Placement {
    workers: Vec<WorkerHandle>,
    senders: Vec<mpsc::Sender<Accepted>>,
    home: usize,
}

impl Placement {
    pub(crate) fn new(workers: Vec<WorkerHandle>, senders: Vec<mpsc::Sender<Accepted>>, home: WorkerHandle) -> Self {
        let home = workers.iter().position(|worker| worker.index() == home.index()).unwrap_or(0);
        Self { workers, senders, home }
    }

    /// Waits while the pod's task is too busy to take more: the backlog then fills, and the kernel slows clients down.
    async fn place(&self, stream: TcpStream, peer: SocketAddr, kind: Kind) {
        let loads: Vec<usize> = self.workers.iter().map(WorkerHandle::load).collect();
        let target = choose(&loads, self.home);
        let mut accepted = Accepted { socket: Socket::Here(stream), peer, kind };
        if target != self.home {
            let Some(moved) = detach(accepted) else { return };
            match self.senders[target].try_send(moved) {
                Ok(()) => return,
                Err(mpsc::error::TrySendError::Full(back) | mpsc::error::TrySendError::Closed(back)) => accepted = back,
            }
        }
        // An error means that the pod is being stopped: the connection goes with it.
        drop(self.senders[self.home].send(accepted).await);
    }
}

fn detach(accepted: Accepted) -> Option<Accepted> {
    let socket = match accepted.socket {
        Socket::Here(stream) => Socket::Moved(stream.into_std().ok()?),
        moved @ Socket::Moved(_) => moved,
    };
    Some(Accepted { socket, ..accepted })
}

/// The home worker, unless it is clearly busier than the idlest.
fn choose(loads: &[usize], home: usize) -> usize {
    let idlest = loads.iter().enumerate().min_by_key(|(_, load)| **load);
    match (idlest, loads.get(home)) {
        (Some((idlest, least)), Some(own)) if *own > 2 * least + BUSIER => idlest,
        _ => home,
    }
}

/// Accepts until the drain, then what the kernel has accepted already, and closes the listener.
pub(crate) async fn accept(pod: Rc<PodContext>, listener: Listener, placement: Rc<Placement>) {
    let Listener { kind, socket } = listener;
    let listener = match tokio::net::TcpListener::from_std(socket) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(%error, what = kind.what(), "cannot register listener"),
    };
    let (mode, _guard) = loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => placement.place(stream, canonical(peer), kind).await,
                Err(error) => {
                    tracing::warn!(%error, what = kind.what(), "cannot accept");
                    sleep(ACCEPT_PAUSE).await;
                }
            },
            drained = pod.drain.signalled() => break drained,
        }
    };
    if mode == DrainMode::Graceful {
        finish_backlog(listener, &placement, kind).await;
    }
}

/// Closing a listener resets what waits in its backlog; those clients believe to be connected.
async fn finish_backlog(listener: tokio::net::TcpListener, placement: &Placement, kind: Kind) {
    let Ok(listener) = listener.into_std() else { return };
    while let Ok((stream, peer)) = listener.accept() {
        // An accepted socket does not inherit the listener's mode.
        if stream.set_nonblocking(true).is_ok()
            && let Ok(stream) = TcpStream::from_std(stream)
        {
            placement.place(stream, canonical(peer), kind).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use mesh_runtime::workers::Workers;

    use super::*;

    #[test]
    fn a_kernel_without_ipv6_is_known_by_its_errors() {
        let lacks = |address: &str, code| lacks_ipv6(address.parse().unwrap(), &io::Error::from_raw_os_error(code));
        let (family, address, in_use) = (97, 99, 98);
        assert!(lacks("[::]:1", family) && lacks("[::]:1", address) && !lacks("[::]:1", in_use));
        assert!(!lacks("0.0.0.0:1", family) && !lacks("0.0.0.0:1", address));
    }

    #[tokio::test]
    async fn clients_in_the_backlog_are_taken_before_the_listener_closes() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        // Connected, as far as they know: the kernel has answered for us.
        let mut clients = Vec::new();
        for _ in 0..3 {
            clients.push(TcpStream::connect(address).await.unwrap());
        }
        let workers = Workers::spawn(1, "test").unwrap();
        let (sender, mut arrivals) = mpsc::channel(8);
        let placement = Placement::new(workers.handles().to_vec(), vec![sender], workers.handles()[0].clone());
        finish_backlog(listener, &placement, Kind::Outbound).await;
        drop(placement);
        let mut taken = Vec::new();
        while let Some(accepted) = arrivals.recv().await {
            assert_eq!(accepted.kind, Kind::Outbound);
            taken.push(accepted.peer);
        }
        let wanted: Vec<SocketAddr> = clients.iter().map(|client| client.local_addr().unwrap()).collect();
        assert_eq!(taken, wanted);
        TcpStream::connect(address).await.expect_err("closed to newcomers");
    }

    #[test]
    fn a_connection_leaves_home_only_when_home_is_clearly_busier() {
        assert_eq!(choose(&[8, 0], 0), 0);
        assert_eq!(choose(&[9, 0], 0), 1);
        assert_eq!(choose(&[100, 46, 47], 0), 0);
        assert_eq!(choose(&[100, 46, 45], 0), 2);
        assert_eq!(choose(&[0, 50], 1), 0);
        assert_eq!(choose(&[50], 0), 0);
    }
}
