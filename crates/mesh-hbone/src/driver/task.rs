//! The task of one tunnel: reads, lets the engine work, writes.

use std::{
    cell::RefCell,
    future::Future,
    io::{self, IoSlice},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
    time::Duration,
};

use smallvec::SmallVec;
use tokio::{
    io::ReadBuf,
    time::{Sleep, sleep_until},
};

use super::{
    deliver::Gather,
    link::{Core, Link, QUEUE_LIMIT, lost},
};
use crate::{
    config::Settings,
    cut::Cut,
    engine::{
        conn::{Conn, ConnError, Event, Role},
        flow::Budget,
        head::RequestHead,
        out::Out,
        tunnel::{Cursor, MAX_RECORD, Step, Tunnel, TunnelError},
    },
    error::Error,
    tls::{BoxedTransport, Secured},
};

/// What one read may bring. More bought nothing.
const INPUT: usize = 256 << 10;
/// Reads in one turn, so that a busy tunnel does not starve its neighbours.
const READS: usize = 2;
/// What is sealed before it is offered to the kernel: a refusal leaves little that is sealed and waits.
const WRITE: usize = 128 << 10;
/// Records of one write.
const SLICES: usize = 16;
/// After a failure: for the last words, and for the peer to read them.
const LINGER: Duration = Duration::from_secs(1);
/// After an orderly end. To close a socket while the peer still says something is to reset it, which would cost what the kernel has not
/// sent yet: the last bytes of streams that ended well. Healthy peers close at once.
const FAREWELL: Duration = Duration::from_secs(10);

thread_local! {
    /// Of this worker: ciphertext is read and opened here, one tunnel at a time.
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; MAX_RECORD + INPUT].into_boxed_slice());
}

/// What a server's tunnel brought.
#[derive(Debug)]
pub(crate) enum Incoming {
    Request(u32, RequestHead),
    Malformed(&'static str),
}

/// Must be polled for the tunnel to live.
pub(crate) struct Driver {
    link: Rc<Link>,
    io: BoxedTransport,
    sleep: Pin<Box<Sleep>>,
    /// Came with the handshake.
    leftover: Vec<u8>,
    /// Why the transport takes no more. What the peer has sent before it left is still read.
    unheard: Option<io::Error>,
    phase: Phase,
    cut: Cut,
}

#[derive(Debug)]
enum Phase {
    Running,
    /// The last words are on their way.
    Closing,
    /// They are out; the peer is given the time to read them before the kernel drops them with what it still sends.
    Lingering,
    Over,
}

impl Driver {
    pub(crate) fn new(secured: Secured, role: Role, settings: &Settings, budget: Budget) -> (Self, Rc<Link>) {
        let Secured { io, established, leftover, cut } = secured;
        let mut out = Out::default();
        let conn = Conn::new(role, settings.local(), budget, &mut out);
        let tunnel = Tunnel::new(established.seal, established.open, established.post_handshake, conn, out);
        let link = Link::new(tunnel);
        let deadline = link.core().deadline();
        let driver = Self {
            link: link.clone(),
            io,
            sleep: Box::pin(sleep_until(deadline)),
            leftover,
            unheard: None,
            phase: Phase::Running,
            cut,
        };
        (driver, link)
    }

    /// Resolves once the peer's SETTINGS have come.
    pub(crate) async fn established(&mut self) -> Result<(), Error> {
        std::future::poll_fn(|cx| {
            if let Poll::Ready(result) = self.poll(cx) {
                return Poll::Ready(result.and(Err(Error::GoAway)));
            }
            let link = self.link.clone();
            let conn = &link.core().tunnel.conn;
            match (conn.is_established(), conn.is_going_away()) {
                (true, true) => Poll::Ready(Err(Error::GoAway)),
                (true, false) => Poll::Ready(Ok(())),
                (false, _) => Poll::Pending,
            }
        })
        .await
    }

    /// Moves everything that can be moved. Resolves when the tunnel is over: in order, or with the reason.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        loop {
            match self.phase {
                Phase::Running => ready!(self.poll_running(cx)),
                Phase::Closing => {
                    // Neither a peer that does not read nor a broken socket keeps us.
                    if self.sleep.as_mut().poll(cx).is_pending() && self.poll_goodbye(cx).is_pending() {
                        return Poll::Pending;
                    }
                    self.phase = Phase::Lingering;
                }
                Phase::Lingering => {
                    if self.sleep.as_mut().poll(cx).is_pending() && self.poll_discard(cx).is_pending() {
                        return Poll::Pending;
                    }
                    self.phase = Phase::Over;
                }
                Phase::Over => {
                    return Poll::Ready(match &self.link.core().ended {
                        Some(Error::GoAway) | None => Ok(()),
                        Some(error) => Err(error.clone()),
                    });
                }
            }
        }
    }

    /// The next request; `None` when the tunnel has ended in order.
    ///
    /// # Errors
    /// Why it ended otherwise.
    pub(crate) fn poll_incoming(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Incoming>, Error>> {
        let ended = self.poll(cx);
        let core = &mut *self.link.core();
        if let Some(why) = core.malformed.pop_front() {
            return Poll::Ready(Ok(Some(Incoming::Malformed(why))));
        }
        if let Some((id, head)) = core.requests.pop_front() {
            return Poll::Ready(Ok(Some(Incoming::Request(id, head))));
        }
        ended.map_ok(|()| None)
    }

    /// Ready when the phase has changed.
    fn poll_running(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let link = self.link.clone();
        let core = &mut *link.core();
        core.driver = Some(cx.waker().clone());
        if let Some(error) = self.cut.poll(cx.waker()) {
            // Without a word: a peer that must not be talked to is not told good-bye.
            core.end(error);
            self.phase = Phase::Over;
            return Poll::Ready(());
        }
        let over = match self.turn(core, cx) {
            Ok(over) => over,
            Err(error) => {
                if let Failure::Tunnel(error) = &error {
                    core.tunnel.fail(error);
                }
                core.end(error.into());
                true
            }
        };
        if over {
            self.phase = Phase::Closing;
            let patience = if matches!(core.ended, Some(Error::GoAway)) { FAREWELL } else { LINGER };
            self.sleep.as_mut().reset(core.set_now() + patience);
            return Poll::Ready(());
        }
        Poll::Pending
    }

    /// One turn: time, input, output. True when the tunnel is over, in order.
    fn turn(&mut self, core: &mut Core, cx: &mut Context<'_>) -> Result<bool, Failure> {
        core.set_now();
        let mut eof = false;
        if !self.leftover.is_empty() {
            let mut input = std::mem::take(&mut self.leftover);
            core.process(&mut input)?;
            eof = core.tunnel.is_peer_closed();
        }
        for read in 0.. {
            if eof {
                break;
            }
            match self.poll_input(core, cx) {
                Ok(Poll::Ready(0)) => eof = true,
                Ok(Poll::Ready(_)) if core.tunnel.is_peer_closed() => eof = true,
                Ok(Poll::Ready(_)) if read + 1 == READS => cx.waker().wake_by_ref(),
                Ok(Poll::Ready(_)) => continue,
                Ok(Poll::Pending) => {}
                Err(Failure::Io(error)) => {
                    self.unheard = Some(error);
                    eof = true;
                }
                Err(failure) => return Err(failure),
            }
            break;
        }
        // After the input: an answer that lies there is not late because we were.
        core.tunnel.conn.on_time(&mut core.tunnel.out).map_err(TunnelError::from)?;
        core.pending_events();
        // What the kernel does not take now has left a waker there.
        let flushed = match self.flush(core, cx) {
            Ok(flushed) => flushed,
            Err(Failure::Io(error)) => {
                self.unheard = Some(error);
                // There may be no other reason to look what the peer has said.
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            Err(failure) => return Err(failure),
        };
        if eof {
            let whole = core.tunnel.conn.open_streams() == 0;
            core.end(match self.unheard.take() {
                // However a peer leaves: between streams nothing is lost.
                _ if whole => Error::GoAway,
                Some(error) => transport_error(error),
                None => lost("the peer closed the connection"),
            });
            return Ok(true);
        }
        let unwanted = core.closing && core.slots.is_empty();
        // What streams have said before they ended is theirs to take the time it takes; keep-alive watches over it.
        if (unwanted || core.tunnel.conn.is_done()) && flushed.is_ready() {
            core.tunnel.close();
            core.end(Error::GoAway);
            return Ok(true);
        }
        let deadline = core.deadline();
        if self.sleep.deadline() != deadline {
            self.sleep.as_mut().reset(deadline);
        }
        if self.sleep.as_mut().poll(cx).is_ready() {
            cx.waker().wake_by_ref();
        }
        Ok(false)
    }

    /// Reads once and lets the engine see it.
    fn poll_input(&mut self, core: &mut Core, cx: &mut Context<'_>) -> Result<Poll<usize>, Failure> {
        BUFFER.with_borrow_mut(|buffer| {
            let carried = core.tunnel.carry.len();
            let mut read = ReadBuf::new(&mut buffer[carried..carried + INPUT]);
            match self.io.as_mut().poll_read(cx, &mut read) {
                Poll::Pending => return Ok(Poll::Pending),
                Poll::Ready(result) => result?,
            }
            let length = read.filled().len();
            if length > 0 {
                buffer[..carried].copy_from_slice(&core.tunnel.carry);
                core.process(&mut buffer[..carried + length])?;
            }
            Ok(Poll::Ready(length))
        })
    }

    /// Seals and writes until nothing is left or the kernel takes no more.
    fn flush(&mut self, core: &mut Core, cx: &mut Context<'_>) -> Result<Poll<()>, Failure> {
        if self.unheard.is_some() {
            return Ok(Poll::Pending);
        }
        let flushed = loop {
            core.tunnel.seal(WRITE)?;
            let slices: SmallVec<[IoSlice<'_>; SLICES]> =
                core.tunnel.out.ready().take(SLICES).map(IoSlice::new).collect();
            if slices.is_empty() {
                // For transports that keep something back themselves.
                break self.io.as_mut().poll_flush(cx)?;
            }
            match self.io.as_mut().poll_write_vectored(cx, &slices)? {
                Poll::Ready(0) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                Poll::Ready(written) => {
                    drop(slices);
                    core.tunnel.out.advance(written);
                }
                Poll::Pending => break Poll::Pending,
            }
        };
        if core.tunnel.out.queued() < QUEUE_LIMIT / 2 {
            core.wake_for_queue();
        }
        Ok(flushed)
    }

    fn poll_goodbye(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.unheard.is_some() {
            return Poll::Ready(());
        }
        let link = self.link.clone();
        match self.flush(&mut link.core(), cx) {
            Ok(Poll::Pending) => Poll::Pending,
            Ok(Poll::Ready(())) => self.io.as_mut().poll_shutdown(cx).map(drop),
            Err(_) => Poll::Ready(()),
        }
    }

    fn poll_discard(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        BUFFER.with_borrow_mut(|buffer| {
            loop {
                let mut read = ReadBuf::new(buffer);
                match ready!(self.io.as_mut().poll_read(cx, &mut read)) {
                    Ok(()) if !read.filled().is_empty() => {}
                    Ok(()) | Err(_) => return Poll::Ready(()),
                }
            }
        })
    }
}

impl Drop for Driver {
    /// A driver that is dropped, rather than run to its end, takes the tunnel with it.
    fn drop(&mut self) {
        self.link.core().end(Error::Retired);
    }
}

impl Future for Driver {
    type Output = Result<(), Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Self::poll(self.get_mut(), cx)
    }
}

impl Core {
    /// Lets the engine read `input`, and keeps what is not a whole record.
    fn process(&mut self, input: &mut [u8]) -> Result<(), Failure> {
        let mut cursor = Cursor::default();
        let mut gather = Gather::default();
        let result = loop {
            match self.tunnel.step(input, &mut cursor) {
                Ok(Step::Event(Event::Data { stream, range })) => {
                    if !gather.takes(stream) {
                        self.deliver(input, &mut gather);
                    }
                    gather.push(stream, range);
                }
                Ok(Step::Event(event)) => {
                    // What came before it is told before it.
                    self.deliver(input, &mut gather);
                    self.event(event);
                }
                Ok(Step::Starved | Step::Closed) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        self.deliver(input, &mut gather);
        let rest = &input[cursor.at..];
        if rest.is_empty() || self.tunnel.is_peer_closed() || result.is_err() {
            self.tunnel.carry = Vec::new();
        } else {
            self.tunnel.carry.clear();
            self.tunnel.carry.extend_from_slice(rest);
        }
        Ok(result?)
    }

    /// What happened without input.
    fn pending_events(&mut self) {
        while let Some(event) = self.tunnel.conn.pending_event() {
            self.event(event);
        }
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Request { stream, head } => {
                self.insert(stream, head.authority.clone().unwrap_or_default().into());
                self.requests.push_back((stream, head));
            }
            Event::Malformed { why } => self.malformed.push_back(why),
            Event::Response { stream, head } => {
                if let Some(slot) = self.slots.get_mut(&stream) {
                    slot.response = Some(Box::new(head));
                    slot.wake_reader();
                }
            }
            Event::End { stream } => {
                if let Some(slot) = self.slots.get_mut(&stream) {
                    slot.flow.ended = true;
                    slot.wake_reader();
                }
            }
            Event::Reset { stream, code } => {
                if let Some(slot) = self.slots.get_mut(&stream) {
                    slot.flow.reset = Some(code);
                    slot.wake();
                }
            }
            Event::Writable { stream } => {
                if let Some(slot) = self.slots.get_mut(&stream) {
                    slot.wake_writer();
                }
            }
            Event::AllWritable => self.wake_for_window(),
            Event::Limits => self.wake_openers(),
            // Gathered by the caller.
            Event::Data { .. } => {}
        }
    }
}

/// Why a turn ended the tunnel.
#[derive(Debug)]
enum Failure {
    Io(io::Error),
    Tunnel(TunnelError),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<TunnelError> for Failure {
    fn from(error: TunnelError) -> Self {
        Self::Tunnel(error)
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Io(error) => transport_error(error),
            Failure::Tunnel(TunnelError::Connection(ConnError { abuse: Some(abuse), .. })) => Self::Abuse(abuse),
            Failure::Tunnel(TunnelError::Connection(ConnError { silent: true, why, .. })) => Self::Silent(why),
            Failure::Tunnel(error) => lost(error),
        }
    }
}

/// A tunnel inside one that was cut was cut, too.
fn transport_error(error: io::Error) -> Error {
    match error.get_ref().and_then(|inner| inner.downcast_ref()) {
        Some(Error::Cut { reason, message }) => Error::Cut { reason: *reason, message },
        _ => lost(error),
    }
}
