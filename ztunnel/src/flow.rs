//! What is known of a connection once its route is decided: written down once, for the log, the counters, the dump and policy alike.

use std::{net::SocketAddr, sync::Arc};

use mesh_core::{
    headers::{Authority, Baggage},
    identity::Identity,
    service::Service,
    workload::Workload,
};

/// As the pod sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    Inbound,
    Outbound,
}

impl Direction {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }

    /// Which side of the connection this proxy reports for.
    pub fn reporter(self) -> &'static str {
        match self {
            Self::Inbound => "destination",
            Self::Outbound => "source",
        }
    }
}

/// A connection. There is one of these for every idle one: what can be derived is.
#[derive(Clone, Debug)]
pub struct Flow {
    pub direction: Direction,
    /// In a tunnel whose ends have proved who they are.
    pub mutual_tls: bool,
    /// The client's end.
    pub peer: SocketAddr,
    /// The TCP destination: with port 15008 for HBONE on both sides.
    pub destination: SocketAddr,
    /// Outbound, what the application dialled; inbound, the application.
    pub target: SocketAddr,
    /// Inbound: the service name the client used, if it said.
    pub host: Option<Arc<str>>,
    /// What the CONNECT names.
    pub authority: Option<Authority>,
    pub source: Option<Arc<Workload>>,
    /// What the peer says of itself; used only where `source` is not known.
    pub source_baggage: Option<Box<Baggage>>,
    /// Inbound: whom the client's certificate names.
    pub peer_identity: Option<Arc<Identity>>,
    pub destination_workload: Option<Arc<Workload>>,
    /// Outbound, in a tunnel inside a tunnel: what its far end, beyond a gateway, proved and said.
    pub beyond: Option<Box<Beyond>>,
    pub service: Option<Arc<Service>>,
}

/// The far end of a tunnel inside a tunnel. Here, all that is known of it is which network it is on.
#[derive(Clone, Debug, Default)]
pub struct Beyond {
    pub identity: Option<Identity>,
    pub baggage: Option<Baggage>,
}

impl Flow {
    /// A flow of which only the addresses are known; callers fill in the rest.
    pub fn new(direction: Direction, peer: SocketAddr, destination: SocketAddr) -> Self {
        Self {
            direction,
            mutual_tls: false,
            peer,
            destination,
            target: destination,
            host: None,
            authority: None,
            source: None,
            source_baggage: None,
            peer_identity: None,
            destination_workload: None,
            beyond: None,
            service: None,
        }
    }

    /// As proven, by whichever proxy presented its certificate.
    pub fn source_identity(&self) -> Option<Identity> {
        match self.direction {
            _ if !self.mutual_tls => None,
            Direction::Inbound => self.peer_identity.as_deref().cloned(),
            Direction::Outbound => self.source.as_deref().map(Workload::identity),
        }
    }

    /// Known even where the destination was reached in plain text.
    pub fn destination_identity(&self) -> Option<Identity> {
        let proven = self.beyond.as_deref().and_then(|beyond| beyond.identity.clone());
        proven.or_else(|| self.destination_workload.as_deref().map(Workload::identity))
    }
}
