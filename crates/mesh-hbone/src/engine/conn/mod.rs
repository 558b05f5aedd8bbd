//! One HTTP/2 connection that carries CONNECT streams (RFC 9113), without sockets, clock or tasks.
//!
//! Plaintext goes in through [`Conn::next`], one event comes out at a time, and what has to be said goes to an [`Out`]. Payload is never
//! stored here: a DATA event is a range of the input. Both roles.
//!
//! Credit: what arrives gives the *connection's* window back at once, so that a stalled stream never stops its neighbours; the
//! *stream's* goes back when [`Conn::consumed`] says that the application has the bytes. So memory is bounded by streams times stream
//! window, and a [`Budget`] binds how far those grow.

mod frames;
mod input;
mod snapshot;
mod time;

use std::{
    collections::{HashMap, VecDeque},
    ops::Range,
    time::Duration,
};

use foldhash::fast::RandomState;
use http::{HeaderMap, Method, StatusCode};

use self::{
    input::{Block, Parse},
    time::Pings,
};
use super::{
    flow::{Budget, RecvWindow, SendWindow},
    frame::{self, ErrorCode, Kind, setting},
    head::{RequestHead, ResponseHead},
    hpack,
    limits::{Abuse, Limits},
    out::{MAX_PAYLOAD, Out},
};

/// Largest stream window that growth reaches. More bought nothing, on loopback or at 1 ms.
pub const MAX_STREAM_WINDOW: u32 = 1 << 20;
/// Streams remembered as reset by us: what the peer sent before it knew is no error.
const RESETS_REMEMBERED: usize = 256;
/// A window smaller than this is silly (RFC 9293 §3.8.6.2).
const SLIVER: usize = 16;
/// Beyond it the peer is not reading what it asks for.
const MAX_QUEUED: usize = 512 << 10;

pub use super::Role;

/// What this end announces and enforces; see [`crate::Settings`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Local {
    pub stream_window: u32,
    pub connection_window: u32,
    pub frame_size: u32,
    pub header_list: u32,
    pub max_streams: u32,
    pub ping_interval: Duration,
    pub ping_timeout: Duration,
    /// For the peer's SETTINGS, its acknowledgement of ours, and a header block begun.
    pub handshake_timeout: Duration,
}

/// What the peer announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Peer {
    initial_window: u32,
    max_streams: Option<u32>,
    /// Its SETTINGS have come.
    known: bool,
}

/// One thing that happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// Server: somebody asks for something.
    Request { stream: u32, head: RequestHead },
    /// Server: a request that was none; it has been answered.
    Malformed { why: &'static str },
    /// Client: the answer.
    Response { stream: u32, head: ResponseHead },
    /// Payload: this range of the input.
    Data { stream: u32, range: Range<usize> },
    /// The peer has ended its direction, in order.
    End { stream: u32 },
    /// The stream is over, by the peer's word or because it broke a rule.
    Reset { stream: u32, code: ErrorCode },
    /// The stream may send again.
    Writable { stream: u32 },
    /// The connection's window has opened: whoever waited for it may try.
    AllWritable,
    /// The peer takes another number of streams than before, or none any more.
    Limits,
}

/// Why a connection is over. The peer is told the code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{why} ({code})")]
pub struct ConnError {
    pub code: ErrorCode,
    pub why: &'static str,
    pub abuse: Option<Abuse>,
    /// The peer fell silent; it broke no rule.
    pub silent: bool,
}

impl ConnError {
    const fn new(code: ErrorCode, why: &'static str) -> Self {
        Self { code, why, abuse: None, silent: false }
    }

    const fn protocol(why: &'static str) -> Self {
        Self::new(ErrorCode::PROTOCOL_ERROR, why)
    }
}

impl From<Abuse> for ConnError {
    fn from(abuse: Abuse) -> Self {
        Self {
            abuse: Some(abuse),
            ..Self::new(ErrorCode::ENHANCE_YOUR_CALM, "the peer does too much of something that helps nobody")
        }
    }
}

/// Why no stream can be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CannotOpen {
    /// Either side is going away, or the stream identifiers are used up.
    GoingAway,
    /// As many are open as the peer takes.
    Full,
}

/// What a stream may send now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    Bytes(usize),
    /// Wait for [`Event::Writable`].
    Stream,
    /// Wait for [`Event::AllWritable`].
    Connection,
    /// It is over.
    Closed,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Stream {
    send: SendWindow,
    recv: RecvWindow,
    /// We have sent END_STREAM.
    local_closed: bool,
    /// The peer has.
    remote_closed: bool,
    /// Server: answered. Client: the final answer came.
    headed: bool,
    /// Something waits for its window.
    blocked: bool,
}

/// How far our own going away has come (RFC 9113 §6.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaving {
    No,
    /// The first GOAWAY is out; the second follows when this PING is answered: all the peer sent before it knew is here then.
    Announced {
        ping: u64,
        deadline: Duration,
    },
    /// Streams above this one are ignored.
    Final {
        last: u32,
    },
}

/// See the module.
#[derive(Debug)]
pub struct Conn {
    role: Role,
    local: Local,
    peer: Peer,
    /// Time since the connection began, as last told.
    now: Duration,
    parse: Parse,
    block: Option<Block>,
    decoder: hpack::Decoder,
    encoder: hpack::Encoder,
    /// Stream id to stream: the open ones, so at most both sides' limits.
    streams: HashMap<u32, Stream, RandomState>,
    /// Ours next (client), and the peer's highest so far (server).
    next_id: u32,
    highest: u32,
    send: SendWindow,
    recv: RecvWindow,
    settings_acked: bool,
    pings: Pings,
    limits: Limits,
    leaving: Leaving,
    /// The peer's GOAWAY: the last stream it takes.
    left: Option<u32>,
    /// Reset by us lately, oldest first.
    reset: VecDeque<u32>,
    last_tiny: Option<u32>,
    /// Happened and not yet told; a frame makes few.
    events: VecDeque<Event>,
    budget: Budget,
}

impl Conn {
    /// Opens a connection: preface (client), SETTINGS, the connection's window.
    pub fn new(role: Role, local: Local, budget: Budget, out: &mut Out) -> Self {
        let mut settings = Vec::with_capacity(6 * setting::LENGTH);
        // No dynamic table: its state would be the larger part of an idle tunnel.
        setting::encode(setting::HEADER_TABLE_SIZE, 0, &mut settings);
        match role {
            Role::Client => {
                out.preface(frame::PREFACE);
                setting::encode(setting::ENABLE_PUSH, 0, &mut settings);
            }
            Role::Server => setting::encode(setting::MAX_CONCURRENT_STREAMS, local.max_streams, &mut settings),
        }
        setting::encode(setting::INITIAL_WINDOW_SIZE, local.stream_window, &mut settings);
        setting::encode(setting::MAX_FRAME_SIZE, local.frame_size, &mut settings);
        setting::encode(setting::MAX_HEADER_LIST_SIZE, local.header_list, &mut settings);
        out.frame(Kind::Settings, 0, 0, &settings);
        let mut recv = RecvWindow::new(frame::DEFAULT_WINDOW);
        let increment = recv.grow(local.connection_window);
        if increment > 0 {
            out.frame(Kind::WindowUpdate, 0, 0, &increment.to_be_bytes());
        }
        Self {
            role,
            local,
            peer: Peer { initial_window: frame::DEFAULT_WINDOW, max_streams: None, known: false },
            now: Duration::ZERO,
            parse: if role == Role::Server { Parse::Preface { seen: 0 } } else { Parse::default() },
            block: None,
            decoder: hpack::Decoder::default(),
            encoder: hpack::Encoder::default(),
            streams: HashMap::default(),
            next_id: 1,
            highest: 0,
            send: SendWindow::new(frame::DEFAULT_WINDOW),
            recv,
            settings_acked: false,
            pings: Pings::default(),
            limits: Limits::default(),
            leaving: Leaving::No,
            left: None,
            reset: VecDeque::new(),
            last_tiny: None,
            events: VecDeque::new(),
            budget,
        }
    }

    /// The time since the connection began, before anything else is asked of it in this turn. Never goes back.
    pub fn set_now(&mut self, now: Duration) {
        self.now = self.now.max(now);
    }

    pub fn now(&self) -> Duration {
        self.now
    }

    /// Whom memory is charged to from now on.
    pub fn set_budget(&mut self, budget: Budget) {
        let grown: usize = self.streams.values().map(|stream| self.grown(stream)).sum();
        self.budget.shrink(grown);
        budget.grow(grown);
        self.budget = budget;
    }

    pub fn budget(&self) -> &Budget {
        &self.budget
    }

    pub fn is_established(&self) -> bool {
        self.peer.known
    }

    /// Streams open, in either direction.
    pub fn open_streams(&self) -> usize {
        self.streams.len()
    }

    /// Streams the peer lets us open at once, if it has said.
    pub fn peer_max_streams(&self) -> Option<u32> {
        self.peer.max_streams
    }

    /// No new stream will be opened here.
    pub fn is_going_away(&self) -> bool {
        self.left.is_some() || self.leaving != Leaving::No || self.next_id > frame::MAX_STREAM_ID
    }

    /// Going away, and nothing left to wait for.
    pub fn is_done(&self) -> bool {
        self.streams.is_empty() && (matches!(self.leaving, Leaving::Final { .. }) || self.left.is_some())
    }

    /// Client: asks for a CONNECT (RFC 9113 §8.5). The stream's id.
    ///
    /// # Errors
    /// See [`CannotOpen`].
    pub fn connect<'a>(
        &mut self,
        authority: &str,
        headers: impl Iterator<Item = (&'a str, &'a [u8])>,
        out: &mut Out,
    ) -> Result<u32, CannotOpen> {
        // A server opens nothing: its peer's streams have these numbers.
        if self.role == Role::Server || self.is_going_away() {
            return Err(CannotOpen::GoingAway);
        }
        if self.peer.max_streams.is_some_and(|max| self.streams.len() >= usize::try_from(max).unwrap_or(usize::MAX)) {
            return Err(CannotOpen::Full);
        }
        let id = self.next_id;
        self.next_id += 2;
        let mut block = Vec::with_capacity(256);
        self.encoder.field(b":method", Method::CONNECT.as_str().as_bytes(), &mut block);
        self.encoder.field(b":authority", authority.as_bytes(), &mut block);
        headers.for_each(|(name, value)| self.encoder.field(name.as_bytes(), value, &mut block));
        send_block(id, &block, false, out);
        self.insert(id);
        Ok(id)
    }

    /// Server: answers a request; `end` closes our direction at once. False when it is over meanwhile.
    pub fn respond(&mut self, id: u32, status: StatusCode, headers: &HeaderMap, end: bool, out: &mut Out) -> bool {
        let Some(stream) = self.streams.get_mut(&id).filter(|stream| !stream.headed && !stream.local_closed) else {
            return false;
        };
        stream.headed = true;
        stream.local_closed = end;
        let over = end && stream.remote_closed;
        let mut block = Vec::with_capacity(128);
        self.encoder.field(b":status", status.as_str().as_bytes(), &mut block);
        for (name, value) in headers {
            self.encoder.field(name.as_str().as_bytes(), value.as_bytes(), &mut block);
        }
        send_block(id, &block, end, out);
        if over {
            self.remove(id);
        }
        true
    }

    /// What the stream may send. A stream that may not is told once it may.
    pub fn room(&mut self, id: u32) -> Room {
        let Some(stream) = self.streams.get_mut(&id).filter(|stream| !stream.local_closed) else {
            return Room::Closed;
        };
        match (stream.send.available(), self.send.available()) {
            (0, _) => {
                stream.blocked = true;
                Room::Stream
            }
            (_, 0) => Room::Connection,
            (stream, connection) => Room::Bytes(stream.min(connection)),
        }
    }

    /// `bytes` within [`Self::room`] were queued, in `frames` DATA frames.
    pub fn sent(&mut self, id: u32, bytes: usize, frames: u32) {
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.send.take(bytes);
            self.send.take(bytes);
            // What the peer's window cut to a sliver pays for no further slivers.
            if bytes >= SLIVER || stream.send.available() > 0 {
                self.limits.sent_data(frames);
            }
        }
    }

    /// Ends our direction in order, once.
    pub fn finish(&mut self, id: u32, out: &mut Out) {
        let Some(stream) = self.streams.get_mut(&id).filter(|stream| !stream.local_closed) else { return };
        stream.local_closed = true;
        let over = stream.remote_closed;
        out.frame(Kind::Data, frame::END_STREAM, id, &[]);
        if over {
            self.remove(id);
        }
    }

    /// Ends a stream at once. Nothing happens to one that is over.
    pub fn reset(&mut self, id: u32, code: ErrorCode, out: &mut Out) {
        if self.streams.contains_key(&id) {
            self.remove(id);
            self.send_reset(id, code, out);
        }
    }

    /// The application has taken `bytes` of the stream: the peer may send as many more, and further ones if that helps.
    pub fn consumed(&mut self, id: u32, bytes: usize, out: &mut Out) {
        let bytes = u32::try_from(bytes).expect("a window is smaller than 4 GiB");
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let mut increment = stream.recv.release(bytes);
        if stream.remote_closed {
            return;
        }
        if let Some(announced) = &mut increment
            && stream.recv.wants_growth()
        {
            let target = stream.recv.target();
            let more = target.min(MAX_STREAM_WINDOW.saturating_sub(target));
            if more > 0 && self.budget.try_grow(widen(more)) {
                *announced += stream.recv.grow(target + more);
            }
        }
        if let Some(increment) = increment {
            out.frame(Kind::WindowUpdate, 0, id, &increment.to_be_bytes());
        }
    }

    /// Asks the peer to go elsewhere with new streams; open ones run on. Server only; once.
    pub fn drain(&mut self, out: &mut Out) {
        if self.leaving == Leaving::No {
            send_go_away(frame::MAX_STREAM_ID, ErrorCode::NO_ERROR, out);
            let ping = self.pings.send(out);
            self.leaving = Leaving::Announced { ping, deadline: self.now + self.local.ping_timeout };
        }
    }

    /// Says goodbye for good.
    pub fn close(&mut self, code: ErrorCode, out: &mut Out) {
        let last = match self.leaving {
            // RFC 9113 §6.8: the last stream must never go up again.
            Leaving::Final { last } => last,
            Leaving::No | Leaving::Announced { .. } => self.highest,
        };
        send_go_away(last, code, out);
        self.leaving = Leaving::Final { last };
    }

    fn insert(&mut self, id: u32) {
        let stream = Stream {
            send: SendWindow::new(self.peer.initial_window),
            recv: RecvWindow::new(self.local.stream_window),
            local_closed: false,
            remote_closed: false,
            headed: false,
            blocked: false,
        };
        self.streams.insert(id, stream);
    }

    /// What its window costs beyond the first one.
    fn grown(&self, stream: &Stream) -> usize {
        widen(stream.recv.target().saturating_sub(self.local.stream_window))
    }

    fn remove(&mut self, id: u32) {
        let Some(stream) = self.streams.remove(&id) else { return };
        self.budget.shrink(self.grown(&stream));
        if self.role == Role::Client && self.peer.max_streams.is_some() {
            self.events.push_back(Event::Limits);
        }
        if self.streams.is_empty() {
            // The table's memory: a tunnel between uses has none.
            self.streams = HashMap::default();
        }
    }

    fn send_reset(&mut self, id: u32, code: ErrorCode, out: &mut Out) {
        out.frame(Kind::RstStream, 0, id, &code.0.to_be_bytes());
        if self.reset.len() == RESETS_REMEMBERED {
            self.reset.pop_front();
        }
        self.reset.push_back(id);
    }

    /// The peer broke a rule within one stream. To make us reset it is no better than to reset it (CVE-2025-8671).
    fn fail(&mut self, id: u32, code: ErrorCode, out: &mut Out) -> Result<(), ConnError> {
        let Some(stream) = self.streams.get(&id) else { return Ok(()) };
        if self.role == Role::Server && !stream.headed {
            self.limits.spend(Abuse::RapidReset, self.now)?;
        }
        self.remove(id);
        self.events.push_back(Event::Reset { stream: id, code });
        self.send_reset(id, code, out);
        Ok(())
    }
}

impl Drop for Conn {
    fn drop(&mut self) {
        let grown: usize = self.streams.values().map(|stream| self.grown(stream)).sum();
        self.budget.shrink(grown);
    }
}

fn widen(bytes: u32) -> usize {
    usize::try_from(bytes).expect("at least 32 bits")
}

fn send_block(id: u32, block: &[u8], end: bool, out: &mut Out) {
    let end = if end { frame::END_STREAM } else { 0 };
    let mut pieces = block.chunks(MAX_PAYLOAD).peekable();
    let mut kind = Kind::Headers;
    while let Some(piece) = pieces.next() {
        let last = if pieces.peek().is_none() { frame::END_HEADERS } else { 0 };
        let flags = if kind == Kind::Headers { end | last } else { last };
        out.frame(kind, flags, id, piece);
        kind = Kind::Continuation;
    }
}

fn send_go_away(last: u32, code: ErrorCode, out: &mut Out) {
    let mut payload = [0; 8];
    payload[..4].copy_from_slice(&last.to_be_bytes());
    payload[4..].copy_from_slice(&code.0.to_be_bytes());
    out.frame(Kind::GoAway, 0, 0, &payload);
}
