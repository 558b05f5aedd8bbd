//! HTTP/2 parameters of both ends.

use std::time::Duration;

use crate::engine::{conn::Local, frame};

/// Bytes in one direction past which a flow is an elephant: no further flow shares its tunnel, and the next flow to the same authority
/// starts with a tunnel to itself.
pub const ELEPHANT: u64 = 32 << 20;

/// PINGs on a tunnel (RFC 9113 §6.7), whether data flows or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeepAlive {
    /// From the last answer to the next question.
    pub interval: Duration,
    /// How long an answer may take before the tunnel is given up.
    pub timeout: Duration,
}

/// What this end announces and enforces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Receive window a stream starts with, in bytes, at least 65,535. It grows to 1 MiB while the stream drains it and memory allows.
    pub stream_window: u32,
    /// Of the tunnel. It returns on receipt, so it bounds what is on the way and not what is kept.
    pub connection_window: u32,
    /// Largest frame taken, 16,384 to 16,777,215; payload is passed on as it comes, whatever this is.
    pub frame_size: u32,
    /// Of a request's or answer's headers.
    pub header_list: u32,
    /// Streams the server lets one client open at once.
    pub max_streams: u32,
    pub keepalive: KeepAlive,
    /// For the HTTP/2 handshake, and for a header block once begun.
    pub handshake_timeout: Duration,
    /// For the answer to a CONNECT.
    pub answer_timeout: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            stream_window: 64 << 10,
            connection_window: 16 << 20,
            frame_size: 64 << 10,
            header_list: 16 << 10,
            max_streams: 200,
            keepalive: KeepAlive { interval: Duration::from_secs(10), timeout: Duration::from_secs(20) },
            handshake_timeout: Duration::from_secs(10),
            // Above what the far side may take before it answers: 5 s for its workload's record and 10 s for the application.
            answer_timeout: Duration::from_secs(20),
        }
    }
}

impl Settings {
    /// Within what HTTP/2 allows.
    pub(crate) fn local(&self) -> Local {
        let window = |bytes: u32| bytes.clamp(frame::DEFAULT_WINDOW, frame::MAX_WINDOW);
        Local {
            stream_window: window(self.stream_window),
            connection_window: window(self.connection_window),
            frame_size: self.frame_size.clamp(frame::MIN_FRAME_SIZE, frame::MAX_FRAME_SIZE),
            header_list: self.header_list,
            max_streams: self.max_streams,
            ping_interval: self.keepalive.interval,
            ping_timeout: self.keepalive.timeout,
            handshake_timeout: self.handshake_timeout,
        }
    }
}
