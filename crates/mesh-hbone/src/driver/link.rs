//! What the driver and the streams of a tunnel share.

use std::{
    cell::{RefCell, RefMut},
    collections::{HashMap, VecDeque},
    io::{self, IoSliceMut},
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use foldhash::fast::RandomState;
use http::{HeaderMap, StatusCode};
use tokio::time::Instant;

use super::deliver::Plug;
use crate::{
    connect::ConnectRequest,
    engine::{
        conn::{CannotOpen, Room},
        frame::ErrorCode,
        head::{RequestHead, ResponseHead},
        out::{Filled, MAX_READ},
        stream::Flow,
        tunnel::Tunnel,
    },
    error::Error,
    snapshot::StreamSnapshot,
};

/// Bytes waiting to be written beyond which streams have to wait; what the kernel holds comes on top.
pub(crate) const QUEUE_LIMIT: usize = 256 << 10;

/// One tunnel, for its driver and its streams. Never borrowed across a poll.
pub(crate) struct Link(RefCell<Core>);

pub(super) struct Core {
    pub(super) tunnel: Tunnel,
    /// Stream id to what its owner waits for: as many as streams, plus those whose owner has not looked yet.
    pub(super) slots: HashMap<u32, Slot, RandomState>,
    /// Of the driver's task, unless somebody has woken it already.
    pub(super) driver: Option<Waker>,
    /// Streams that wait for room in the queue, and for the connection's window; each in one line at most, first come first served.
    /// Whoever is woken from one may have to go to the other.
    for_queue: VecDeque<u32>,
    for_window: VecDeque<u32>,
    /// Those who want a stream when the peer allows no more; bounded by the pool's flows.
    openers: Vec<Waker>,
    pub(super) requests: VecDeque<(u32, RequestHead)>,
    pub(super) malformed: VecDeque<&'static str>,
    /// The tunnel is over, and why.
    pub(super) ended: Option<Error>,
    /// Nobody wants it any more.
    pub(super) closing: bool,
    began: Instant,
}

/// A stream as its owner sees it.
#[derive(Default)]
pub(crate) struct Slot {
    /// Where payload goes at once.
    pub(super) plug: Option<Plug>,
    pub(super) flow: Flow,
    pub(super) reader: Option<Waker>,
    pub(super) writer: Option<Waker>,
    /// The answer, until its owner takes it.
    pub(super) response: Option<Box<ResponseHead>>,
    /// Stands in a line.
    waiting: bool,
    /// The application's socket refused what came for it.
    pub(super) broken: Option<io::ErrorKind>,
}

impl Slot {
    fn new(target: Box<str>) -> Self {
        Self { flow: Flow::new(target), ..Self::default() }
    }

    pub(super) fn wake(&mut self) {
        self.wake_reader();
        self.wake_writer();
    }

    pub(super) fn wake_reader(&mut self) {
        self.reader.take().into_iter().for_each(Waker::wake);
    }

    pub(super) fn wake_writer(&mut self) {
        self.writer.take().into_iter().for_each(Waker::wake);
    }
}

/// What a peer's RST_STREAM means for the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PeerReset {
    /// NO_ERROR or CANCEL: it wants nothing more from us. What it sent may be complete; the receiving half knows.
    Stopped,
    Broken,
}

/// What became of an attempt to send.
#[derive(Debug)]
pub(crate) enum Fill {
    Sent {
        bytes: usize,
        /// The source had no more at that moment.
        all: bool,
    },
    /// The source has ended.
    Eof,
    /// The source has nothing now.
    Empty,
    /// The tunnel takes no more now; the task is woken when it does.
    Full,
    Source(io::Error),
    /// The stream is over.
    Gone,
}

impl Core {
    pub(super) fn wake_driver(&mut self) {
        self.driver.take().into_iter().for_each(Waker::wake);
    }

    /// Brings the tunnel's clock up to date.
    pub(super) fn set_now(&mut self) -> Instant {
        let now = Instant::now();
        self.tunnel.conn.set_now(now.duration_since(self.began));
        now
    }

    pub(super) fn deadline(&self) -> Instant {
        self.began + self.tunnel.conn.next_deadline()
    }

    /// There is room in the queue: those who waited for it try again.
    pub(super) fn wake_for_queue(&mut self) {
        let line = std::mem::take(&mut self.for_queue);
        self.wake_line(line);
    }

    /// The connection's window has opened.
    pub(super) fn wake_for_window(&mut self) {
        let line = std::mem::take(&mut self.for_window);
        self.wake_line(line);
    }

    fn wake_line(&mut self, line: VecDeque<u32>) {
        for id in line {
            if let Some(slot) = self.slots.get_mut(&id) {
                slot.waiting = false;
                slot.wake_writer();
            }
        }
    }

    pub(super) fn has_waiting(&self) -> bool {
        !self.for_queue.is_empty() || !self.for_window.is_empty()
    }

    pub(super) fn wake_openers(&mut self) {
        self.openers.drain(..).for_each(Waker::wake);
    }

    /// Everybody learns that the tunnel is over.
    pub(super) fn end(&mut self, error: Error) {
        if self.ended.is_none() {
            self.ended = Some(error);
            self.slots.values_mut().for_each(Slot::wake);
            self.wake_openers();
        }
    }

    fn wait(&mut self, id: u32, line: fn(&mut Self) -> &mut VecDeque<u32>, cx: &Context<'_>) {
        let Some(slot) = self.slots.get_mut(&id) else { return };
        register(&mut slot.writer, cx);
        if !std::mem::replace(&mut slot.waiting, true) {
            line(self).push_back(id);
        }
    }

    pub(super) fn insert(&mut self, id: u32, target: Box<str>) {
        self.slots.insert(id, Slot::new(target));
    }
}

impl Drop for Core {
    /// Requests that nobody took have bytes too.
    fn drop(&mut self) {
        let budget = self.tunnel.conn.budget();
        self.slots.values_mut().for_each(|slot| slot.flow.stall.clear(budget));
    }
}

impl Link {
    pub(super) fn new(tunnel: Tunnel) -> Rc<Self> {
        // A tunnel that was restored has an age already.
        let now = Instant::now();
        let began = now.checked_sub(tunnel.conn.now()).unwrap_or(now);
        Rc::new(Self(RefCell::new(Core {
            tunnel,
            slots: HashMap::default(),
            driver: None,
            for_queue: VecDeque::new(),
            for_window: VecDeque::new(),
            openers: Vec::new(),
            requests: VecDeque::new(),
            malformed: VecDeque::new(),
            ended: None,
            closing: false,
            began,
        })))
    }

    pub(super) fn core(&self) -> RefMut<'_, Core> {
        self.0.borrow_mut()
    }

    /// Asks for a stream, waiting while the peer allows no more.
    pub(crate) fn poll_connect(&self, cx: &Context<'_>, request: &ConnectRequest) -> Poll<Result<u32, Error>> {
        let core = &mut *self.core();
        if let Some(error) = &core.ended {
            return Poll::Ready(Err(error.clone()));
        }
        let authority = request.authority.to_string();
        let headers = request.headers.iter().map(|(name, value)| (name.as_str(), value.as_bytes()));
        match core.tunnel.conn.connect(&authority, headers, &mut core.tunnel.out) {
            Ok(id) => {
                core.insert(id, authority.into());
                core.wake_driver();
                Poll::Ready(Ok(id))
            }
            Err(CannotOpen::GoingAway) => Poll::Ready(Err(Error::GoAway)),
            Err(CannotOpen::Full) => {
                if !core.openers.iter().any(|waker| waker.will_wake(cx.waker())) {
                    core.openers.push(cx.waker().clone());
                }
                Poll::Pending
            }
        }
    }

    /// The answer to a CONNECT.
    pub(crate) fn poll_response(&self, id: u32, cx: &Context<'_>) -> Poll<Result<ResponseHead, Error>> {
        let core = &mut *self.core();
        let Some(slot) = core.slots.get_mut(&id) else { return Poll::Ready(Err(lost("the stream is over"))) };
        if let Some(response) = slot.response.take() {
            return Poll::Ready(Ok(*response));
        }
        match (slot.flow.reset, &core.ended) {
            (Some(ErrorCode::REFUSED_STREAM), _) if core.tunnel.conn.is_going_away() => Poll::Ready(Err(Error::GoAway)),
            (Some(ErrorCode::REFUSED_STREAM), _) => Poll::Ready(Err(Error::Refused)),
            (Some(code), _) => Poll::Ready(Err(lost(format!("the peer reset the stream: {code}")))),
            (None, Some(error)) => Poll::Ready(Err(error.clone())),
            (None, None) => {
                register(&mut slot.reader, cx);
                Poll::Pending
            }
        }
    }

    /// Answers a request; false when the peer has given up meanwhile.
    pub(crate) fn respond(&self, id: u32, status: StatusCode, headers: &HeaderMap, end: bool) -> bool {
        let core = &mut *self.core();
        if core.ended.is_some() {
            return false;
        }
        let answered = core.tunnel.conn.respond(id, status, headers, end, &mut core.tunnel.out);
        core.wake_driver();
        answered
    }

    /// Sends what `read` brings, as much as the windows and the queue allow.
    pub(crate) fn fill(
        &self,
        id: u32,
        cx: &Context<'_>,
        max: usize,
        read: impl FnOnce(&mut [IoSliceMut<'_>]) -> io::Result<usize>,
    ) -> Fill {
        let core = &mut *self.core();
        if core.ended.is_some() {
            return Fill::Gone;
        }
        if core.tunnel.out.queued() >= QUEUE_LIMIT {
            core.wait(id, |core| &mut core.for_queue, cx);
            return Fill::Full;
        }
        let room = match core.tunnel.conn.room(id) {
            Room::Bytes(room) => room.min(max).min(MAX_READ),
            Room::Closed => return Fill::Gone,
            Room::Connection => {
                core.wait(id, |core| &mut core.for_window, cx);
                return Fill::Full;
            }
            Room::Stream => {
                if let Some(slot) = core.slots.get_mut(&id) {
                    register(&mut slot.writer, cx);
                }
                return Fill::Full;
            }
        };
        match core.tunnel.out.fill(id, room, read) {
            Ok(Filled { bytes: 0, .. }) => Fill::Eof,
            Ok(Filled { bytes, frames, all }) => {
                core.tunnel.conn.sent(id, bytes, frames);
                if let Some(slot) = core.slots.get_mut(&id) {
                    slot.flow.sent += bytes as u64;
                    slot.flow.grew();
                }
                core.wake_driver();
                Fill::Sent { bytes, all }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Fill::Empty,
            Err(error) => Fill::Source(error),
        }
    }

    /// END_STREAM, once. False when the stream is over.
    pub(crate) fn finish(&self, id: u32) -> bool {
        let core = &mut *self.core();
        let Some(slot) = core.slots.get_mut(&id) else { return false };
        if core.ended.is_some() || slot.flow.reset.is_some() {
            return false;
        }
        slot.flow.send_closed = true;
        core.tunnel.conn.finish(id, &mut core.tunnel.out);
        core.wake_driver();
        true
    }

    /// Ends a stream at once, unless it is over.
    pub(crate) fn reset(&self, id: u32, code: ErrorCode) {
        let core = &mut *self.core();
        core.tunnel.conn.reset(id, code, &mut core.tunnel.out);
        core.wake_driver();
    }

    /// The owner is gone: an unfinished stream is cancelled.
    pub(crate) fn release(&self, id: u32) {
        let core = &mut *self.core();
        if let Some(mut slot) = core.slots.remove(&id) {
            slot.flow.stall.clear(core.tunnel.conn.budget());
        }
        if core.slots.is_empty() {
            core.slots = HashMap::default();
        }
        core.tunnel.conn.reset(id, ErrorCode::CANCEL, &mut core.tunnel.out);
        core.wake_driver();
    }

    /// What the peer's reset, or the tunnel's end, means for the stream; nothing if neither happened, and the task is woken when one
    /// does.
    pub(crate) fn peer_reset(&self, id: u32, cx: &Context<'_>) -> Option<PeerReset> {
        let core = &mut *self.core();
        let slot = core.slots.get_mut(&id)?;
        register(&mut slot.reader, cx);
        match slot.flow.reset {
            Some(ErrorCode::NO_ERROR | ErrorCode::CANCEL) => Some(PeerReset::Stopped),
            Some(_) => Some(PeerReset::Broken),
            // What came in full is in full, whatever happened to the tunnel afterwards.
            None if core.ended.is_some() && !(slot.flow.ended && slot.flow.send_closed) => Some(PeerReset::Broken),
            None => None,
        }
    }

    /// What a stream that broke under its owner reports: by whose doing, where that was ours.
    pub(crate) fn broken_by(&self) -> io::Error {
        broken_by(self.core().ended.as_ref())
    }

    /// Resolves when the peer resets the stream or the tunnel ends.
    pub(crate) fn poll_abandoned(&self, id: u32, cx: &Context<'_>) -> Poll<()> {
        let core = &mut *self.core();
        match core.slots.get_mut(&id) {
            Some(slot) if slot.flow.reset.is_none() && core.ended.is_none() => {
                register(&mut slot.reader, cx);
                Poll::Pending
            }
            Some(_) | None => Poll::Ready(()),
        }
    }

    /// Whether the application's socket failed when something was delivered.
    pub(crate) fn is_broken(&self, id: u32) -> bool {
        self.core().slots.get(&id).is_some_and(|slot| slot.broken.is_some())
    }

    /// Whether the stream has become an elephant.
    pub(crate) fn is_large(&self, id: u32) -> bool {
        self.core().slots.get(&id).is_some_and(|slot| slot.flow.large)
    }

    pub(crate) fn stream(&self, id: u32) -> Option<StreamSnapshot> {
        self.core().slots.get(&id).map(|slot| describe(id, slot))
    }

    pub(crate) fn streams(&self) -> Vec<StreamSnapshot> {
        let core = self.core();
        let mut all: Vec<_> = core.slots.iter().map(|(id, slot)| describe(*id, slot)).collect();
        all.sort_by_key(|stream| stream.id);
        all
    }

    /// Streams the peer allows at once, if it has said.
    pub(crate) fn peer_max_streams(&self) -> Option<u32> {
        self.core().tunnel.conn.peer_max_streams()
    }

    /// Takes new streams.
    pub(crate) fn is_usable(&self) -> bool {
        let core = self.core();
        core.ended.is_none() && !core.closing && !core.tunnel.conn.is_going_away()
    }

    /// More is waiting to be written than a newcomer should have to wait for.
    pub(crate) fn is_busy(&self) -> bool {
        let core = self.core();
        core.tunnel.out.queued() >= QUEUE_LIMIT / 2 || core.has_waiting()
    }

    /// Nobody will want another stream: once the open ones are over, so is the tunnel.
    pub(crate) fn close(&self) {
        let mut core = self.core();
        core.closing = true;
        core.wake_driver();
    }

    /// Server: asks the peer to go elsewhere with new streams.
    pub(crate) fn drain(&self) {
        let core = &mut *self.core();
        core.set_now();
        core.tunnel.conn.drain(&mut core.tunnel.out);
        core.wake_driver();
    }
}

fn describe(id: u32, slot: &Slot) -> StreamSnapshot {
    StreamSnapshot {
        id,
        target: slot.flow.target.to_string(),
        sent: slot.flow.sent,
        received: slot.flow.received,
        unreleased: slot.flow.stall.len(),
        send_closed: slot.flow.send_closed,
        recv_closed: slot.flow.ended,
    }
}

/// Leaves the task's waker, unless it is there.
pub(super) fn register(waker: &mut Option<Waker>, cx: &Context<'_>) {
    if !waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
        *waker = Some(cx.waker().clone());
    }
}

pub(super) fn broken_by(ended: Option<&Error>) -> io::Error {
    match ended {
        Some(error @ Error::Cut { .. }) => io::Error::other(error.clone()),
        _ => io::ErrorKind::ConnectionReset.into(),
    }
}

pub(super) fn lost(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::Lost { source: Arc::from(why.into()) }
}
