//! Payload on its way to the application: straight from the opened record into its socket, and only what the socket does not take is
//! kept.

use std::{
    io::{self, IoSlice},
    ops::Range,
    rc::Rc,
    task::{Context, Poll, ready},
};

use mesh_net::Progress;
use smallvec::SmallVec;
use tokio::net::TcpStream;

use super::link::{Core, Link, Slot, broken_by, register};
use crate::engine::frame::ErrorCode;

/// The application's socket, and where its bytes are counted.
#[derive(Clone)]
pub(crate) struct Plug {
    pub(crate) tcp: Rc<TcpStream>,
    pub(crate) progress: Rc<Progress>,
}

/// DATA of one stream that lies in the input, not yet delivered.
#[derive(Debug, Default)]
pub(super) struct Gather {
    stream: u32,
    ranges: SmallVec<[Range<usize>; Gather::MAX]>,
}

impl Gather {
    /// Slices one system call writes.
    const MAX: usize = 32;

    pub(super) fn takes(&self, stream: u32) -> bool {
        self.ranges.is_empty() || (self.stream == stream && self.ranges.len() < Self::MAX)
    }

    pub(super) fn push(&mut self, stream: u32, range: Range<usize>) {
        self.stream = stream;
        self.ranges.push(range);
    }
}

impl Core {
    /// Gives what was gathered to its stream's owner.
    pub(super) fn deliver(&mut self, input: &[u8], gather: &mut Gather) {
        if gather.ranges.is_empty() {
            return;
        }
        let id = gather.stream;
        let mut slices: SmallVec<[IoSlice<'_>; Gather::MAX]> =
            gather.ranges.drain(..).map(|range| IoSlice::new(&input[range])).collect();
        let total: usize = slices.iter().map(|slice| slice.len()).sum();
        let Some(slot) = self.slots.get_mut(&id) else {
            // Its owner has left without a word to the peer: cannot be, but credit must not be lost.
            self.tunnel.conn.consumed(id, total, &mut self.tunnel.out);
            return;
        };
        if slot.flow.reset.is_some() {
            // Nothing may follow a gap.
            return;
        }
        slot.flow.received += total as u64;
        let written = slot.write_through(&slices);
        if written < total {
            let mut rest = &mut slices[..];
            IoSlice::advance_slices(&mut rest, written);
            let budget = self.tunnel.conn.budget();
            let mut fits = true;
            if slot.broken.is_none() {
                for slice in &*rest {
                    fits &= slot.flow.stall.push(slice, budget);
                }
            }
            if !fits {
                // Its reader will hear of the reset and not of the bytes; nobody else shall pay for them until then.
                slot.flow.stall.clear(budget);
                slot.flow.reset = Some(ErrorCode::ENHANCE_YOUR_CALM);
                self.tunnel.conn.reset(id, ErrorCode::ENHANCE_YOUR_CALM, &mut self.tunnel.out);
            }
            slot.wake_reader();
        }
        if slot.flow.grew() {
            slot.wake_reader();
        }
        self.tunnel.conn.consumed(id, written, &mut self.tunnel.out);
    }
}

impl Slot {
    /// How many bytes the application's socket took at once.
    fn write_through(&mut self, slices: &[IoSlice<'_>]) -> usize {
        let Some(plug) = self.plug.as_ref().filter(|_| self.flow.stall.is_empty() && self.broken.is_none()) else {
            return 0;
        };
        match plug.tcp.try_write_vectored(slices) {
            Ok(written) => {
                plug.progress.received.set(plug.progress.received.get() + written as u64);
                written
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(error) => {
                self.broken = Some(error.kind());
                0
            }
        }
    }
}

/// What reading from a stream came to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Drained {
    /// All that came has been taken, and more may come.
    Open,
    /// All that came has been taken, and the peer ended in order.
    Ended,
}

impl Link {
    /// From now on payload goes straight to the application's socket.
    pub(crate) fn plug(&self, id: u32, plug: Plug) {
        if let Some(slot) = self.core().slots.get_mut(&id) {
            slot.plug = Some(plug);
        }
    }

    /// Lets `write` take what has stalled, until that is empty. Then says whether more may come, and wakes the task when it does.
    ///
    /// # Errors
    /// Those of `write`; `ConnectionReset` when the stream was reset or the tunnel is over, or one that holds [`crate::Error::Cut`]
    /// when that was our doing.
    pub(crate) fn poll_drain(
        &self,
        id: u32,
        cx: &mut Context<'_>,
        mut write: impl FnMut(&mut Context<'_>, &[u8]) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<Drained>> {
        let core = &mut *self.core();
        let Some(slot) = core.slots.get_mut(&id) else { return Poll::Ready(Ok(Drained::Ended)) };
        let mut taken = 0;
        let result = loop {
            if let Some(kind) = slot.broken {
                break Poll::Ready(Err(kind.into()));
            }
            if slot.flow.stall.is_empty() {
                break match (slot.flow.ended, slot.flow.reset, &core.ended) {
                    // RFC 9113 §8.1: NO_ERROR says that the answer is complete, not that it failed.
                    (true, ..) | (false, Some(ErrorCode::NO_ERROR), _) => Poll::Ready(Ok(Drained::Ended)),
                    (false, Some(_), _) => Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
                    (false, None, Some(error)) => Poll::Ready(Err(broken_by(Some(error)))),
                    (false, None, None) => {
                        register(&mut slot.reader, cx);
                        Poll::Ready(Ok(Drained::Open))
                    }
                };
            }
            match write(cx, slot.flow.stall.front()) {
                Poll::Ready(Ok(0)) | Poll::Pending => {
                    register(&mut slot.reader, cx);
                    break Poll::Pending;
                }
                Poll::Ready(Ok(count)) => {
                    slot.flow.stall.take(count, core.tunnel.conn.budget());
                    taken += count;
                }
                Poll::Ready(Err(error)) => break Poll::Ready(Err(error)),
            }
        };
        if taken > 0 {
            core.tunnel.conn.consumed(id, taken, &mut core.tunnel.out);
            if core.tunnel.wants_write() {
                core.wake_driver();
            }
        }
        result
    }

    /// For readers with a buffer: as many stalled bytes as fit, 0 at the end.
    ///
    /// # Errors
    /// `ConnectionReset` when the stream was reset or the tunnel is over.
    pub(crate) fn poll_read(
        &self,
        id: u32,
        cx: &mut Context<'_>,
        mut take: impl FnMut(&[u8]) -> usize,
    ) -> Poll<io::Result<usize>> {
        let mut total = 0;
        let drained = self.poll_drain(id, cx, |_, bytes| {
            let count = take(bytes);
            total += count;
            Poll::Ready(Ok(count))
        });
        if total > 0 {
            return Poll::Ready(Ok(total));
        }
        match ready!(drained)? {
            Drained::Ended => Poll::Ready(Ok(0)),
            Drained::Open => Poll::Pending,
        }
    }
}
