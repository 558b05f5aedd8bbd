//! HTTP/2 parameters of both ends.

use std::time::Duration;

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
    /// Receive window of a stream, in bytes. Far below the connection's, so that one stalled reader leaves room for the others.
    pub stream_window: u32,
    pub connection_window: u32,
    /// Largest frame taken, 16,384 to 16,777,215. Beyond 64 KiB nothing is gained under TLS.
    pub frame_size: u32,
    /// Bytes of one stream waiting to be written to the tunnel.
    pub send_buffer: usize,
    /// Of a request's or answer's headers.
    pub header_list: u32,
    /// Streams the server lets one client open at once.
    pub max_streams: u32,
    pub keepalive: KeepAlive,
    /// For the HTTP/2 handshake.
    pub handshake_timeout: Duration,
    /// For the answer to a CONNECT.
    pub answer_timeout: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            stream_window: 1 << 20,
            connection_window: 16 << 20,
            frame_size: 64 << 10,
            send_buffer: 256 << 10,
            header_list: 16 << 10,
            max_streams: 200,
            keepalive: KeepAlive { interval: Duration::from_secs(10), timeout: Duration::from_secs(20) },
            handshake_timeout: Duration::from_secs(10),
            // Above what the far side may take before it answers: 5 s for its workload's record and 10 s for the application.
            answer_timeout: Duration::from_secs(20),
        }
    }
}

/// A peer may send many small DATA frames quite legitimately; memory is bounded by windows and streams instead of by this.
const DATA_FRAME_BUDGET: usize = 64 << 20;
/// Rapid-reset guards (CVE-2023-44487 and its kin).
const MAX_RESET_STREAMS: usize = 50;
const MAX_PENDING_ACCEPT_RESETS: usize = 20;
const MAX_LOCAL_ERROR_RESETS: usize = 1024;

impl Settings {
    pub(crate) fn client(&self, assumed_streams: usize) -> h2::client::Builder {
        let mut builder = h2::client::Builder::new();
        builder
            .initial_window_size(self.stream_window)
            .initial_connection_window_size(self.connection_window)
            .max_frame_size(self.frame_size)
            .max_header_list_size(self.header_list)
            .max_send_buffer_size(self.send_buffer)
            .initial_max_send_streams(assumed_streams)
            .max_concurrent_reset_streams(MAX_RESET_STREAMS)
            .max_pending_accept_reset_streams(MAX_PENDING_ACCEPT_RESETS)
            .max_local_error_reset_streams(Some(MAX_LOCAL_ERROR_RESETS))
            .data_frame_budget(DATA_FRAME_BUDGET)
            .enable_push(false);
        builder
    }

    pub(crate) fn server(&self) -> h2::server::Builder {
        let mut builder = h2::server::Builder::new();
        builder
            .initial_window_size(self.stream_window)
            .initial_connection_window_size(self.connection_window)
            .max_frame_size(self.frame_size)
            .max_header_list_size(self.header_list)
            .max_send_buffer_size(self.send_buffer)
            .max_concurrent_streams(self.max_streams)
            .max_concurrent_reset_streams(MAX_RESET_STREAMS)
            .max_pending_accept_reset_streams(MAX_PENDING_ACCEPT_RESETS)
            .max_local_error_reset_streams(Some(MAX_LOCAL_ERROR_RESETS))
            .data_frame_budget(DATA_FRAME_BUDGET);
        builder
    }
}
