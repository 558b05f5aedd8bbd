//! The path of one connection: accepted (`listeners`), understood (`resolve`), admitted (`authorize`), carried on (`outbound`,
//! `inbound`, `passthrough`) over what `upstream` opens, and its bytes moved (`forward`).

use std::rc::Rc;

use crate::{
    error::ProxyError,
    outcome::Direction,
    pods::PodContext,
    proxy::listeners::{Accepted, Kind},
};

pub(crate) mod listeners;

pub(crate) mod outbound;
pub(crate) mod socks5;

pub(crate) mod inbound;
pub(crate) mod passthrough;

pub(crate) mod authorize;
pub(crate) mod proxy_protocol;
pub(crate) mod resolve;

pub(crate) mod forward;
pub(crate) mod upstream;

/// Carries one accepted connection to its end.
pub(crate) async fn serve(pod: Rc<PodContext>, accepted: Accepted) {
    let _load = pod.worker.occupy();
    let Accepted { socket, peer, kind } = accepted;
    let direction = kind.direction();
    let _open = pod.shared.outcomes.socket(direction);
    let client = match socket.register() {
        Ok(client) => client,
        Err(source) => {
            let error = ProxyError::Connect { to: peer, source };
            return pod.shared.outcomes.early_deny(direction, peer, peer, &error);
        }
    };
    match kind {
        Kind::Inbound => inbound::serve(pod, client, peer).await,
        Kind::Outbound => outbound::serve(pod, client, peer).await,
        Kind::Passthrough => passthrough::serve(pod, client, peer).await,
        Kind::Socks5 => socks5::serve(pod, client, peer).await,
    }
}

impl Kind {
    pub(crate) fn direction(self) -> Direction {
        match self {
            Self::Inbound | Self::Passthrough => Direction::Inbound,
            Self::Outbound | Self::Socks5 => Direction::Outbound,
        }
    }
}
