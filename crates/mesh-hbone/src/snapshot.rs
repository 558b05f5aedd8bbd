//! Tunnels and streams as plain data: what a dump shows. What a successor process needs is [`crate::engine::state`]'s.

use crate::config::Settings;

pub use crate::engine::Role;

/// One tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelSnapshot {
    pub role: Role,
    /// Unique within its worker and role.
    pub id: u64,
    /// The far end, as the owner names it.
    pub peer: String,
    pub settings: Settings,
    /// Streams the peer lets us open at once.
    pub peer_max_streams: Option<usize>,
    /// No new stream goes here.
    pub closing: bool,
    pub streams: Vec<StreamSnapshot>,
}

/// One stream of a tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamSnapshot {
    pub id: u32,
    /// `:authority`.
    pub target: String,
    pub sent: u64,
    pub received: u64,
    /// Bytes received whose window has not been given back: the reader has not taken them yet.
    pub unreleased: usize,
    pub send_closed: bool,
    pub recv_closed: bool,
}

impl StreamSnapshot {
    /// Of a stream nothing is known about any more.
    pub(crate) fn over(id: u32) -> Self {
        Self { id, target: String::new(), sent: 0, received: 0, unreleased: 0, send_closed: true, recv_closed: true }
    }
}
