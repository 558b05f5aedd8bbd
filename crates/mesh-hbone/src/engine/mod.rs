//! The tunnel engine: HTTP/2 for CONNECT tunnels in TLS 1.3, as state without sockets, clock or tasks.
//!
//! Reading order: [`frame`] the wire, [`hpack`] and [`head`] header lists, [`flow`] windows and memory, [`limits`] nuisances,
//! [`out`] what is to be written, [`conn`] HTTP/2, [`stream`] what its streams keep; [`handshake`] (the only module that knows rustls) and [`record`] TLS; [`tunnel`] both
//! together; [`state`] how all of it is written down for a successor. `docs/tunnel-engine.md` has the invariants.
//!
//! Public for tests, fuzzers and benchmarks; users of the crate need none of it.

pub mod conn;
pub mod flow;
pub mod frame;
pub mod handshake;
pub mod head;
pub mod hpack;
pub mod limits;
pub mod out;
pub mod record;
pub mod state;
pub mod stream;
pub mod tunnel;

/// Which end of a tunnel this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Client,
    Server,
}
