//! One CONNECT stream: bytes both ways, with a clean end and a reset kept apart.

use std::{
    io,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::{
    driver::{Fill, Link},
    engine::frame::ErrorCode,
    snapshot::StreamSnapshot,
};

/// An open tunnel stream. Dropping it before both directions have ended sends RST_STREAM(CANCEL).
pub struct TunnelStream {
    pub(crate) link: Rc<Link>,
    pub(crate) id: u32,
    /// What must live as long: the pool's accounting, or a private tunnel's driver.
    pub(crate) held: Option<Box<dyn Held>>,
}

/// Anything kept for its drop.
pub(crate) trait Held {
    /// The stream moves so much that others should not share its tunnel.
    fn elephant(&self) {}
}

impl std::fmt::Debug for TunnelStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("TunnelStream").field(&self.snapshot()).finish()
    }
}

/// How to end a stream abnormally.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetReason {
    /// This side lost interest, by its own decision.
    Cancel,
    /// The TCP connection behind the stream was reset (RFC 9113 §8.5: "CONNECT_ERROR").
    ConnectError,
    Internal,
}

impl From<ResetReason> for ErrorCode {
    fn from(reason: ResetReason) -> Self {
        match reason {
            ResetReason::Cancel => Self::CANCEL,
            ResetReason::ConnectError => Self::CONNECT_ERROR,
            ResetReason::Internal => Self::INTERNAL_ERROR,
        }
    }
}

impl TunnelStream {
    pub(crate) fn new(link: Rc<Link>, id: u32) -> Self {
        Self { link, id, held: None }
    }

    /// Ends both directions at once; the peer's side becomes a TCP RST.
    pub fn reset(self, reason: ResetReason) {
        self.link.reset(self.id, reason.into());
    }

    pub fn snapshot(&self) -> StreamSnapshot {
        self.link.stream(self.id).unwrap_or_else(|| StreamSnapshot::over(self.id))
    }
}

impl AsyncRead for TunnelStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        self.link
            .poll_read(self.id, cx, |bytes| {
                let length = bytes.len().min(buf.remaining());
                buf.put_slice(&bytes[..length]);
                length
            })
            .map_ok(drop)
    }
}

impl AsyncWrite for TunnelStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let filled = self.link.fill(self.id, cx, buf.len(), |slices| {
            let mut rest = buf;
            for slice in slices {
                let (now, later) = rest.split_at(slice.len().min(rest.len()));
                slice[..now.len()].copy_from_slice(now);
                rest = later;
            }
            Ok(buf.len() - rest.len())
        });
        match filled {
            Fill::Sent { bytes, .. } => Poll::Ready(Ok(bytes)),
            Fill::Full => Poll::Pending,
            Fill::Eof | Fill::Empty | Fill::Source(_) | Fill::Gone => Poll::Ready(Err(self.link.broken_by())),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.link.finish(self.id);
        Poll::Ready(Ok(()))
    }
}

impl Drop for TunnelStream {
    fn drop(&mut self) {
        self.link.release(self.id);
    }
}
