//! HBONE tunnels on the `h2` crate and tokio-rustls, as fast as we could make them: what the engine of `mesh-hbone` is measured against.
//!
//! Tuned, because an untuned control proves nothing:
//! - One flush per turn: [`turn::Turn`] gathers what `h2` writes frame by frame, and the connection's task writes it out when its turn
//!   ends, so that small frames of many streams share a TLS record and a system call. Large frames pass it without a copy.
//! - [`ahead::Ahead`] reads the socket in large pieces. rustls alone asks for 4 KiB at a time.
//! - Credit for the connection is never what holds a stream up. `h2` gives credit to the stream and to the connection in one call
//!   (`release_capacity`) and cannot give the connection's back on receipt; so [`CONNECTION_WINDOW`] is larger than all stream windows
//!   of a tunnel together, which comes to the same: a reader that stalls takes nothing from its neighbours.
//! - A stream's credit goes back when the application's socket has the bytes.
//! - An application's socket is read only when it is readable and the stream has capacity; a buffer is held from there to the write.
//! - DATA frames that fill whole TLS records, [`relay`] as one hand-written future without `select!`, no task beside it.
//!
//! What a proxy needs and this has not: limits for misbehaving peers beyond those of `h2`, keep-alive, drain, idle tunnels' end.

use std::{cell::RefCell, rc::Rc};

use h2::{client, server};
use mesh_net::BufferPool;

pub mod ahead;
pub mod chunk;
pub mod far;
pub mod near;
pub mod relay;
pub mod turn;

/// Of a stream. More bought nothing on loopback.
pub const STREAM_WINDOW: u32 = 1 << 20;
/// Streams of one tunnel.
pub const MAX_STREAMS: u32 = 100;
/// More than all streams' windows together, and so never the one that binds.
pub const CONNECTION_WINDOW: u32 = 128 << 20;
/// Largest DATA frame taken.
pub const FRAME: u32 = 64 << 10;
/// One read from an application: with its frame header exactly four full TLS records.
pub const READ: usize = 4 * (16 << 10) - 9;
/// One read from the tunnel's socket.
const AHEAD: usize = 128 << 10;
/// Bytes of one stream that wait for the tunnel.
const SEND_BUFFER: usize = 256 << 10;
/// `h2` counts small DATA frames as abuse, unless allowed; ours are applications' small writes.
const DATA_FRAME_BUDGET: usize = 64 << 20;
/// Unused buffers kept, of each kind.
const RETAINED: usize = 16;

/// Buffers of the one worker; clones share.
#[derive(Clone, Debug)]
pub struct Buffers {
    /// For what is read from applications.
    pub app: BufferPool,
    /// For what waits until the end of a turn.
    pub turn: BufferPool,
    /// For ciphertext.
    pub ahead: BufferPool,
}

impl Default for Buffers {
    fn default() -> Self {
        Self {
            app: BufferPool::new(READ, RETAINED),
            turn: BufferPool::new(turn::BUFFER, RETAINED),
            ahead: BufferPool::new(AHEAD, RETAINED),
        }
    }
}

/// The dialling side's settings.
pub fn client_builder() -> client::Builder {
    let mut builder = client::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .max_send_buffer_size(SEND_BUFFER)
        .data_frame_budget(DATA_FRAME_BUDGET)
        .initial_max_send_streams(MAX_STREAMS as usize)
        .enable_push(false);
    builder
}

/// The accepting side's settings.
pub fn server_builder() -> server::Builder {
    let mut builder = server::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .max_send_buffer_size(SEND_BUFFER)
        .data_frame_budget(DATA_FRAME_BUDGET)
        .max_concurrent_streams(2 * MAX_STREAMS);
    builder
}

type Shared<T> = Rc<RefCell<T>>;
