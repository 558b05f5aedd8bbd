//! Tunnels and streams as plain data: what a dump shows, and the place where an exportable engine will put what a successor process
//! needs.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::{Rc, Weak},
};

use crate::config::Settings;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Client,
    Server,
}

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

/// A stream's live figures.
#[derive(Debug)]
pub(crate) struct StreamRecord {
    pub(crate) id: u32,
    pub(crate) target: String,
    pub(crate) sent: Cell<u64>,
    pub(crate) received: Cell<u64>,
    pub(crate) unreleased: Cell<usize>,
    pub(crate) send_closed: Cell<bool>,
    pub(crate) recv_closed: Cell<bool>,
}

impl StreamRecord {
    pub(crate) fn snapshot(&self) -> StreamSnapshot {
        StreamSnapshot {
            id: self.id,
            target: self.target.clone(),
            sent: self.sent.get(),
            received: self.received.get(),
            unreleased: self.unreleased.get(),
            send_closed: self.send_closed.get(),
            recv_closed: self.recv_closed.get(),
        }
    }
}

/// The open streams of one tunnel: stream id to figures, as many as the peer's stream limit plus what is being closed.
#[derive(Debug, Default)]
pub(crate) struct Streams(RefCell<HashMap<u32, Weak<StreamRecord>>>);

impl Streams {
    pub(crate) fn add(&self, record: &Rc<StreamRecord>) {
        let mut streams = self.0.borrow_mut();
        streams.retain(|_, known| known.strong_count() > 0);
        streams.insert(record.id, Rc::downgrade(record));
    }

    pub(crate) fn snapshot(&self) -> Vec<StreamSnapshot> {
        let mut all: Vec<_> =
            self.0.borrow().values().filter_map(Weak::upgrade).map(|record| record.snapshot()).collect();
        all.sort_by_key(|stream| stream.id);
        all
    }
}
