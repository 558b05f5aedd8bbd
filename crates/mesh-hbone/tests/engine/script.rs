//! Two ends of a tunnel in memory, with an application each, and a script of bytes that says what happens. All of it is determined by
//! the script and by what the ends say, so that two runs can be compared; what a run may do in between is a [`Style`].
//!
//! Shared with the fuzz targets: it panics when what arrives is not what was sent.

use std::{
    collections::{BTreeMap, VecDeque},
    io::{self, IoSliceMut},
    time::Duration,
};

use http::{HeaderMap, HeaderValue, StatusCode};
use mesh_hbone::{
    Budget, Process,
    engine::{
        conn::{Event, Local, Role, Room},
        frame::ErrorCode,
        out::{Filled, MAX_READ},
        record::Suite,
        state,
        tunnel::{Cursor, Step, Tunnel},
    },
};

use super::peer::tunnel;

pub(crate) const CLIENT: usize = 0;
pub(crate) const SERVER: usize = 1;

/// How a run treats what may make no difference.
pub(crate) struct Style<'a> {
    /// Ciphertext arrives in pieces of this size.
    pub(crate) piece: usize,
    /// Asked between any two steps, and after each piece: which ends are saved and restored.
    pub(crate) cut: &'a mut dyn FnMut() -> [bool; 2],
}

/// What the world sees of one end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Transcript {
    /// Ciphertext, in the order written.
    pub(crate) said: Vec<u8>,
    /// What the engine told its application.
    pub(crate) heard: Vec<String>,
}

/// Windows and limits small enough to be met.
pub(crate) fn local() -> Local {
    Local {
        stream_window: 3_000,
        connection_window: 65_535,
        frame_size: 16_384,
        header_list: 400,
        max_streams: 5,
        ping_interval: Duration::from_secs(10),
        ping_timeout: Duration::from_secs(20),
        handshake_timeout: Duration::from_secs(10),
    }
}

/// Both ends of a tunnel whose keys everybody knows: what is sealed is the same in every run.
pub(crate) fn pair(suite: Suite, local: Local) -> [Tunnel; 2] {
    [tunnel(suite, 1, 2, Role::Client, local), tunnel(suite, 2, 1, Role::Server, local)]
}

/// Lets a script happen to two tunnels, saved as blobs, and then what is under way arrive.
pub(crate) fn run(blobs: &[Vec<u8>; 2], script: &[u8], style: Style<'_>) -> [Transcript; 2] {
    let mut world = World {
        ends: [CLIENT, SERVER].map(|side| End::new(side, state::decode(&blobs[side]).expect("a tunnel"))),
        now: Duration::ZERO,
        style,
    };
    let mut script = script.iter().copied();
    while let Some(step) = script.next() {
        world.step(step, script.next().unwrap_or_default());
        world.cut();
    }
    for _ in 0..6 {
        for side in [CLIENT, SERVER] {
            world.ends[side].consume_all();
            world.flush(side, usize::MAX, usize::MAX);
            world.deliver(1 - side, usize::MAX);
        }
    }
    world.finish()
}

struct World<'a> {
    ends: [End; 2],
    now: Duration,
    style: Style<'a>,
}

impl World<'_> {
    /// The lowest bit of `step` is the side, the others are what it does, and `how` is how.
    fn step(&mut self, step: u8, how: u8) {
        let side = usize::from(step & 1);
        let amount = usize::from(how);
        let end = &mut self.ends[side];
        end.tunnel.conn.set_now(self.now);
        match step >> 1 & 0xf {
            0 => self.flush(side, 1 + 700 * (amount & 7), [40, 1 << 10, 20 << 10, usize::MAX][amount >> 3 & 3]),
            1 => self.deliver(side, if how < 64 { amount } else { usize::MAX }),
            2 => end.connect(how),
            3 => end.respond(how),
            4 => end.send(how),
            5 => end.consume(how),
            6 => end.finish(how),
            7 => end.reset(how),
            8 => {
                self.now += Duration::from_millis(20 * u64::from(how));
                self.time();
            }
            9 => end.rotate(),
            10 => end.drain(),
            11 => end.close(),
            _ => end.consume_all(),
        }
        self.ends[side].events();
    }

    fn time(&mut self) {
        for end in self.ends.iter_mut().filter(|end| !end.over) {
            end.tunnel.conn.set_now(self.now);
            if let Err(error) = end.tunnel.conn.on_time(&mut end.tunnel.out) {
                end.fail(&error.into());
            }
            end.events();
        }
    }

    /// Seals about `seal` bytes and writes at most `write`.
    fn flush(&mut self, side: usize, seal: usize, write: usize) {
        let end = &mut self.ends[side];
        if let Err(error) = end.tunnel.seal(seal) {
            end.fail(&error);
        }
        let written = end.write(write);
        end.said.extend_from_slice(&written);
        self.ends[1 - side].wire.extend(written);
    }

    fn deliver(&mut self, side: usize, most: usize) {
        let mut left = most.min(self.ends[side].wire.len());
        while left > 0 {
            let end = &mut self.ends[side];
            let bytes: Vec<u8> = end.wire.drain(..left.min(self.style.piece)).collect();
            left -= bytes.len();
            end.tunnel.conn.set_now(self.now);
            end.hear(&bytes);
            self.cut();
        }
    }

    fn cut(&mut self) {
        let cut = (self.style.cut)();
        self.ends.iter_mut().zip(cut).filter(|(_, cut)| *cut).for_each(|(end, _)| end.cut());
    }

    fn finish(self) -> [Transcript; 2] {
        self.ends.map(|end| {
            let End { tunnel, budget, said, heard, .. } = end;
            drop(tunnel);
            assert_eq!(budget.used(), 0, "memory is charged for a tunnel that is gone");
            Transcript { said, heard }
        })
    }
}

struct End {
    side: usize,
    tunnel: Tunnel,
    budget: Budget,
    /// Written by the peer, not yet read.
    wire: VecDeque<u8>,
    streams: BTreeMap<u32, Stream>,
    /// Streams not answered.
    requests: VecDeque<u32>,
    over: bool,
    said: Vec<u8>,
    heard: Vec<String>,
}

/// A stream as the application sees it.
#[derive(Default)]
struct Stream {
    sent: usize,
    received: usize,
    consumed: usize,
    finished: bool,
    ended: bool,
}

/// What the application on `side` says at `offset` of a stream.
fn payload(side: usize, stream: u32, offset: usize) -> u8 {
    let mixed = (side + 1).wrapping_mul(31) ^ offset.wrapping_mul(7) ^ (offset >> 8) ^ stream as usize;
    mixed.to_le_bytes()[0]
}

impl End {
    fn new(side: usize, mut tunnel: Tunnel) -> Self {
        // Enough for some windows to grow and for others not to.
        let budget = Budget::new(20_000, Process::new(1 << 20));
        tunnel.conn.set_budget(budget.clone());
        Self {
            side,
            tunnel,
            budget,
            wire: VecDeque::new(),
            streams: BTreeMap::new(),
            requests: VecDeque::new(),
            over: false,
            said: Vec::new(),
            heard: Vec::new(),
        }
    }

    /// A successor takes over.
    fn cut(&mut self) {
        let blob = state::encode(&self.tunnel);
        let mut successor: Tunnel = state::decode(&blob).expect("what was saved can be restored");
        assert!(*state::encode(&successor) == *blob, "a restored tunnel is saved as it was");
        successor.conn.set_budget(self.budget.clone());
        self.tunnel = successor;
    }

    fn tell(&mut self, what: impl Into<String>) {
        self.heard.push(what.into());
    }

    fn hear(&mut self, bytes: &[u8]) {
        if self.over {
            return;
        }
        let mut input = std::mem::take(&mut self.tunnel.carry);
        input.extend_from_slice(bytes);
        let mut cursor = Cursor::default();
        loop {
            match self.tunnel.step(&mut input, &mut cursor) {
                Ok(Step::Event(event)) => self.event(event, &input),
                Ok(Step::Starved) => break self.tunnel.carry = input.split_off(cursor.at),
                Ok(Step::Closed) => {
                    self.tell("closed");
                    break self.over = true;
                }
                Err(error) => break self.fail(&error),
            }
        }
    }

    fn fail(&mut self, error: &mesh_hbone::engine::tunnel::TunnelError) {
        self.tell(format!("{error:?}"));
        self.over = true;
        self.tunnel.fail(error);
        self.events();
    }

    fn events(&mut self) {
        while let Some(event) = self.tunnel.conn.pending_event() {
            self.event(event, &[]);
        }
    }

    fn event(&mut self, event: Event, input: &[u8]) {
        match event {
            Event::Data { stream: id, range } => {
                let bytes = &input[range];
                self.heard.push(format!("{id}: {} bytes", bytes.len()));
                let Some(stream) = self.streams.get_mut(&id) else {
                    // It was reset by us in the middle of a frame.
                    return self.tunnel.conn.consumed(id, bytes.len(), &mut self.tunnel.out);
                };
                let peer = 1 - self.side;
                let expected = (stream.received..).map(|offset| payload(peer, id, offset));
                assert!(expected.zip(bytes).all(|(expected, byte)| expected == *byte), "stream {id} has other bytes");
                stream.received += bytes.len();
            }
            event => {
                self.tell(format!("{event:?}"));
                match event {
                    Event::Request { stream, .. } => {
                        self.streams.insert(stream, Stream::default());
                        self.requests.push_back(stream);
                    }
                    Event::Reset { stream, .. } => drop(self.streams.remove(&stream)),
                    Event::End { stream } => {
                        self.streams.entry(stream).and_modify(|stream| stream.ended = true);
                        self.forget(stream);
                    }
                    _ => {}
                }
            }
        }
    }

    fn connect(&mut self, how: u8) {
        let value = vec![b'v'; usize::from(how) * 2];
        let headers = [("baggage", &value[..])];
        let headers = headers.into_iter().take(usize::from(how & 1));
        if self.over || self.side == SERVER {
            return;
        }
        let opened = self.tunnel.conn.connect("10.0.0.1:80", headers, &mut self.tunnel.out);
        self.tell(format!("connect: {opened:?}"));
        if let Ok(id) = opened {
            self.streams.insert(id, Stream::default());
        }
    }

    fn respond(&mut self, how: u8) {
        let Some(id) = self.requests.pop_front().filter(|_| !self.over) else { return };
        let mut headers = HeaderMap::new();
        if how & 4 == 0 {
            headers.insert("via", HeaderValue::from_static("somebody"));
        }
        let (status, end) = if how & 7 == 7 { (StatusCode::FORBIDDEN, true) } else { (StatusCode::OK, false) };
        let open = self.tunnel.conn.respond(id, status, &headers, end, &mut self.tunnel.out);
        self.tell(format!("respond: {open}"));
        if end {
            self.tunnel.conn.reset(id, ErrorCode::NO_ERROR, &mut self.tunnel.out);
            self.streams.remove(&id);
        }
    }

    /// The stream that `how` means, if any is open.
    fn pick(&self, how: u8) -> Option<u32> {
        let count = self.streams.len().max(1);
        self.streams.keys().nth(usize::from(how) % count).copied().filter(|_| !self.over)
    }

    fn send(&mut self, how: u8) {
        const SIZES: [usize; 8] = [1, 15, 130, 1_000, 2_500, 5_000, 20_000, MAX_READ];
        let Some(id) = self.pick(how >> 3).filter(|id| !self.requests.contains(id)) else { return };
        let wanted = SIZES[usize::from(how & 7)];
        let room = match self.tunnel.conn.room(id) {
            Room::Bytes(room) => room.min(MAX_READ),
            other => return self.tell(format!("{id}: {other:?}")),
        };
        let stream = self.streams.get_mut(&id).expect("it was picked");
        let (side, start) = (self.side, stream.sent);
        let read = |slices: &mut [IoSliceMut<'_>]| {
            if how == u8::MAX {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let bytes = slices.iter_mut().flat_map(|slice| slice.iter_mut()).take(wanted);
            let read = bytes.enumerate().map(|(at, byte)| *byte = payload(side, id, start + at)).count();
            Ok(read)
        };
        match self.tunnel.out.fill(id, room, read) {
            Ok(Filled { bytes, frames, .. }) => {
                stream.sent += bytes;
                self.tunnel.conn.sent(id, bytes, frames);
                self.tell(format!("{id}: sent {bytes} in {frames}"));
            }
            Err(_) => self.tell(format!("{id}: nothing to send")),
        }
    }

    fn consume(&mut self, how: u8) {
        let Some(id) = self.pick(how >> 2) else { return };
        let stream = self.streams.get_mut(&id).expect("it was picked");
        let bytes = (stream.received - stream.consumed) * usize::from(1 + (how & 3)) / 4;
        stream.consumed += bytes;
        self.tunnel.conn.consumed(id, bytes, &mut self.tunnel.out);
    }

    fn consume_all(&mut self) {
        for (id, stream) in self.streams.iter_mut().filter(|_| !self.over) {
            let bytes = stream.received - std::mem::replace(&mut stream.consumed, stream.received);
            self.tunnel.conn.consumed(*id, bytes, &mut self.tunnel.out);
        }
    }

    fn finish(&mut self, how: u8) {
        if let Some(id) = self.pick(how).filter(|id| !self.requests.contains(id)) {
            self.tunnel.conn.finish(id, &mut self.tunnel.out);
            self.streams.entry(id).and_modify(|stream| stream.finished = true);
            self.forget(id);
        }
    }

    fn forget(&mut self, id: u32) {
        if self.streams.get(&id).is_some_and(|stream| stream.finished && stream.ended) {
            self.streams.remove(&id);
        }
    }

    fn reset(&mut self, how: u8) {
        if let Some(id) = self.pick(how >> 2) {
            self.tunnel.conn.reset(id, ErrorCode::CANCEL, &mut self.tunnel.out);
            self.streams.remove(&id);
        }
    }

    fn rotate(&mut self) {
        if !self.over
            && let Err(error) = self.tunnel.rotate()
        {
            self.fail(&error);
        }
    }

    fn drain(&mut self) {
        if !self.over && self.side == SERVER {
            self.tunnel.conn.drain(&mut self.tunnel.out);
        }
    }

    fn close(&mut self) {
        if !self.over {
            self.tunnel.close();
            self.over = true;
        }
    }

    /// Takes at most `most` bytes of what can be written.
    fn write(&mut self, most: usize) -> Vec<u8> {
        let written: Vec<u8> = self.tunnel.out.ready().flatten().copied().take(most).collect();
        self.tunnel.out.advance(written.len());
        written
    }
}
