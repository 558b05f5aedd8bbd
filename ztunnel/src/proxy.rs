//! The path of one connection: accepted (`listeners`), understood (`resolve`), admitted (`authorize`), carried on (`outbound`,
//! `inbound`, `passthrough`) over what `upstream` opens, and its bytes moved (`forward`).

use std::{
    future::Future,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use mesh_hbone::LocalBoxFuture;
use mesh_runtime::workers::Occupied;
use tokio::task::JoinSet;

use crate::{
    dns,
    error::ProxyError,
    flow::Direction,
    outcome::SocketGuard,
    pods::PodContext,
    proxy::{
        forward::Carried,
        listeners::{Accepted, Kind},
    },
};

pub(crate) mod listeners;

pub(crate) mod outbound;
pub(crate) mod socks5;

pub(crate) mod inbound;
pub(crate) mod passthrough;

pub(crate) mod authorize;
pub(crate) mod proxy_protocol;
pub(crate) mod resolve;

pub(crate) mod probe;

pub(crate) mod forward;
pub(crate) mod upstream;

/// Carries one accepted connection to its end, in a task of its own.
pub(crate) fn serve(pod: Rc<PodContext>, accepted: Accepted, tasks: &mut JoinSet<()>) {
    let load = pod.worker.occupy();
    if accepted.kind.is_dns() {
        tasks.spawn_local(async move {
            let _open = load;
            dns::streams::serve(pod, accepted).await;
        });
        return;
    }
    let socket = pod.shared.outcomes.socket(accepted.kind.direction());
    match accepted.kind {
        Kind::Inbound => tasks.spawn_local(async move {
            let _open = (load, socket);
            inbound::serve(pod, accepted).await;
        }),
        Kind::Outbound | Kind::Passthrough | Kind::Socks5 | Kind::Dns | Kind::DnsDatagrams => {
            tasks.spawn_local(Serving::boxed(load, Some(socket), open(pod, accepted)))
        }
    };
}

/// Opens the way of a connection that will be one flow; none when that failed, and was reported.
async fn open(pod: Rc<PodContext>, accepted: Accepted) -> Option<Carried> {
    let Accepted { socket, peer, kind } = accepted;
    let client = match socket.register() {
        Ok(client) => client,
        Err(source) => {
            let error = ProxyError::Connect { to: peer, source };
            pod.shared.outcomes.early_deny(kind.direction(), peer, peer, &error);
            return None;
        }
    };
    match kind {
        Kind::Outbound => outbound::open(&pod, client, peer).await,
        Kind::Passthrough => passthrough::open(&pod, client, peer).await,
        Kind::Socks5 => socks5::open(&pod, client, peer).await,
        // Not one flow; in tasks of their own kind.
        Kind::Inbound | Kind::Dns | Kind::DnsDatagrams => None,
    }
}

/// One flow: its way is opened, then its bytes are moved. What the first takes, which is much, is given back before the second begins:
/// most flows are idle most of the time.
pub(crate) struct Serving {
    phase: Phase,
    _load: Occupied,
    _socket: Option<SocketGuard>,
}

enum Phase {
    Opening(LocalBoxFuture<'static, Option<Carried>>),
    Carrying(Carried),
}

impl Serving {
    /// `open` has reported what it does not return. Boxed: the runtime's tasks are a multiple of 128 bytes, of which little is used.
    pub(crate) fn boxed(
        load: Occupied,
        socket: Option<SocketGuard>,
        open: impl Future<Output = Option<Carried>> + 'static,
    ) -> Pin<Box<Self>> {
        Box::pin(Self { phase: Phase::Opening(Box::pin(open)), _load: load, _socket: socket })
    }
}

impl Future for Serving {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            match &mut self.phase {
                Phase::Opening(open) => match ready!(open.as_mut().poll(cx)) {
                    Some(carried) => self.phase = Phase::Carrying(carried),
                    None => return Poll::Ready(()),
                },
                Phase::Carrying(carried) => return Pin::new(carried).poll(cx),
            }
        }
    }
}

impl Kind {
    pub(crate) fn direction(self) -> Direction {
        match self {
            Self::Inbound | Self::Passthrough => Direction::Inbound,
            Self::Outbound | Self::Socks5 | Self::Dns | Self::DnsDatagrams => Direction::Outbound,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{connections::Entry, outcome::meter::Meter};

    /// What an idle flow costs here: its task, what is known of it, and its counters. Its sockets, its place in the tunnel and the
    /// runtime's part come on top.
    #[test]
    fn an_open_flow_is_small() {
        assert!(size_of::<Serving>() <= 192, "{}", size_of::<Serving>());
        assert!(size_of::<Entry>() <= 240, "{}", size_of::<Entry>());
        assert!(size_of::<Meter>() <= 56, "{}", size_of::<Meter>());
    }
}
