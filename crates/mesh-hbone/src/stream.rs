//! One CONNECT stream: bytes both ways, with a clean end and a reset kept apart.

use std::{
    cell::Cell,
    io,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::{
    chunk::Chunk,
    snapshot::{StreamRecord, StreamSnapshot},
};

/// Largest single write taken by [`AsyncWrite`].
const MAX_WRITE: usize = 64 << 10;

/// An open tunnel stream. Dropping it before both directions have ended sends RST_STREAM(CANCEL).
pub struct TunnelStream {
    pub(crate) send: SendHalf,
    pub(crate) recv: RecvHalf,
    /// What must live as long: the pool's accounting, or a private tunnel's driver.
    pub(crate) held: Option<Box<dyn Held>>,
}

/// Anything kept for its drop.
pub(crate) trait Held {}

impl std::fmt::Debug for TunnelStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("TunnelStream").field(&self.send.record.snapshot()).finish()
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

impl From<ResetReason> for Reason {
    fn from(reason: ResetReason) -> Self {
        match reason {
            ResetReason::Cancel => Self::CANCEL,
            ResetReason::ConnectError => Self::CONNECT_ERROR,
            ResetReason::Internal => Self::INTERNAL_ERROR,
        }
    }
}

impl TunnelStream {
    pub(crate) fn new(
        send: SendStream<Chunk>,
        recv: RecvStream,
        record: Rc<StreamRecord>,
        held: Option<Box<dyn Held>>,
    ) -> Self {
        let recv = RecvHalf { stream: recv, unread: Bytes::new(), record: record.clone() };
        Self { send: SendHalf { stream: send, record }, recv, held }
    }

    /// Ends both directions at once; the peer's side becomes a TCP RST.
    pub fn reset(mut self, reason: ResetReason) {
        self.send.stream.send_reset(reason.into());
    }

    pub fn snapshot(&self) -> StreamSnapshot {
        self.send.record.snapshot()
    }
}

pub(crate) struct SendHalf {
    stream: SendStream<Chunk>,
    record: Rc<StreamRecord>,
}

/// What a peer's RST_STREAM means for the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PeerReset {
    /// NO_ERROR or CANCEL: it wants nothing more from us. What it sent may be complete; the receiving half knows.
    Stopped,
    Broken,
}

impl SendHalf {
    /// Room for at least one byte, up to `wanted`. Call [`Self::send`] or [`Self::relinquish`] after it.
    pub(crate) fn poll_room(&mut self, cx: &mut Context<'_>, wanted: usize) -> Poll<io::Result<usize>> {
        self.stream.reserve_capacity(wanted);
        loop {
            // The library announces changes of capacity only; what is there already must be asked for.
            match self.stream.capacity() {
                0 => match ready!(self.stream.poll_capacity(cx)) {
                    Some(Ok(_)) => {}
                    Some(Err(error)) => return Poll::Ready(Err(reset(error))),
                    None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
                },
                room => return Poll::Ready(Ok(room.min(wanted))),
            }
        }
    }

    /// Gives unused room back to the other streams of the tunnel.
    pub(crate) fn relinquish(&mut self) {
        self.stream.reserve_capacity(0);
    }

    pub(crate) fn send(&mut self, chunk: Chunk) -> io::Result<()> {
        let length = chunk.remaining() as u64;
        self.stream.send_data(chunk, false).map_err(reset)?;
        self.record.sent.set(self.record.sent.get() + length);
        Ok(())
    }

    /// END_STREAM, once.
    pub(crate) fn finish(&mut self) -> io::Result<()> {
        if self.record.send_closed.replace(true) {
            return Ok(());
        }
        self.stream.send_data(Chunk::empty(), true).map_err(reset)
    }

    /// Resolves when the peer resets the stream, or the tunnel breaks.
    pub(crate) fn poll_peer_reset(&mut self, cx: &mut Context<'_>) -> Poll<PeerReset> {
        Poll::Ready(match ready!(self.stream.poll_reset(cx)) {
            Ok(Reason::NO_ERROR | Reason::CANCEL) => PeerReset::Stopped,
            Ok(_) | Err(_) => PeerReset::Broken,
        })
    }
}

pub(crate) struct RecvHalf {
    stream: RecvStream,
    /// Taken from the library, not yet by the reader.
    unread: Bytes,
    record: Rc<StreamRecord>,
}

impl RecvHalf {
    /// The next bytes, `None` at a clean end. Their window is returned by [`Self::release`] only.
    pub(crate) fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        match ready!(self.stream.poll_data(cx)) {
            Some(Ok(bytes)) => {
                self.record.received.set(self.record.received.get() + bytes.len() as u64);
                self.record.unreleased.set(self.record.unreleased.get() + bytes.len());
                Poll::Ready(Ok(Some(bytes)))
            }
            // RFC 9113 §8.1: NO_ERROR says that the response is complete, not that it failed.
            Some(Err(error)) if error.is_reset() && error.reason() == Some(Reason::NO_ERROR) => self.ended(),
            Some(Err(error)) => Poll::Ready(Err(reset(error))),
            None => self.ended(),
        }
    }

    /// The reader is done with `length` bytes: the peer may send as many more.
    pub(crate) fn release(&mut self, length: usize) {
        self.record.unreleased.set(self.record.unreleased.get().saturating_sub(length));
        // Fails only on a stream that is over, where credit means nothing.
        drop(self.stream.flow_control().release_capacity(length));
    }

    fn ended(&self) -> Poll<io::Result<Option<Bytes>>> {
        self.record.recv_closed.set(true);
        Poll::Ready(Ok(None))
    }
}

fn reset(error: h2::Error) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, error)
}

impl AsyncRead for TunnelStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let recv = &mut self.get_mut().recv;
        while recv.unread.is_empty() {
            match ready!(recv.poll_chunk(cx))? {
                Some(bytes) => recv.unread = bytes,
                None => return Poll::Ready(Ok(())),
            }
        }
        let length = recv.unread.len().min(buf.remaining());
        buf.put_slice(&recv.unread[..length]);
        recv.unread.advance(length);
        recv.release(length);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for TunnelStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let send = &mut self.get_mut().send;
        let room = ready!(send.poll_room(cx, buf.len().min(MAX_WRITE)))?;
        send.send(Chunk::Copied(Bytes::copy_from_slice(&buf[..room])))?;
        Poll::Ready(Ok(room))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.get_mut().send.finish())
    }
}

impl Drop for TunnelStream {
    fn drop(&mut self) {
        // Bytes that nobody will read must not keep the connection's window.
        let unreleased = self.recv.record.unreleased.get();
        self.recv.release(unreleased);
        drop(self.held.take());
    }
}

/// Shared by the halves and the tunnel's list.
pub(crate) fn record(id: u32, target: String) -> Rc<StreamRecord> {
    Rc::new(StreamRecord {
        id,
        target,
        sent: Cell::new(0),
        received: Cell::new(0),
        unreleased: Cell::new(0),
        send_closed: Cell::new(false),
        recv_closed: Cell::new(false),
    })
}
