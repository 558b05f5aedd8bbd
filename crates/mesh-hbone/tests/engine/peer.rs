//! A peer that says exactly what a test wants, in records cut as the test wants, to a tunnel whose keys everybody knows.

use std::time::Duration;

use mesh_hbone::{
    Budget,
    engine::{
        conn::{Conn, Event, Local, Role},
        frame::{self, ErrorCode, HEADER, Header, Kind, setting},
        out::Out,
        record::{self, ContentType, OVERHEAD, Open, Opened, PostHandshake, Seal, Suite, TrafficSecret},
        tunnel::{Cursor, MAX_RECORD, Step, Tunnel, TunnelError},
    },
};

/// What an ordinary end announces.
pub(crate) fn local() -> Local {
    Local {
        stream_window: 65_535,
        connection_window: 1 << 20,
        frame_size: 16_384,
        header_list: 1_000,
        max_streams: 10,
        ping_interval: Duration::from_secs(10),
        ping_timeout: Duration::from_secs(20),
        handshake_timeout: Duration::from_secs(10),
    }
}

/// A tunnel in `role`, `ours` and `theirs` being what its secrets are made of.
pub(crate) fn tunnel(suite: Suite, ours: u8, theirs: u8, role: Role, local: Local) -> Tunnel {
    let mut out = Out::default();
    let conn = Conn::new(role, local, Budget::default(), &mut out);
    let post_handshake = PostHandshake::new(role);
    let open = Open::new(secret(suite, theirs), 0).expect("a key");
    Tunnel::new(seal(suite, ours), open, post_handshake, conn, out)
}

fn secret(suite: Suite, byte: u8) -> TrafficSecret {
    TrafficSecret::new(suite, &vec![byte; suite.hash_len()]).expect("as long as a hash")
}

fn seal(suite: Suite, byte: u8) -> Seal {
    Seal::new(secret(suite, byte), 0).expect("a key")
}

/// The tunnel under test, and the keys of its peer.
pub(crate) struct Peer {
    pub(crate) tunnel: Tunnel,
    seal: Seal,
    open: Open,
    /// What the tunnel has written and we have not opened.
    unread: Vec<u8>,
    plaintext: Vec<u8>,
    /// Bytes a test wants to keep in mind.
    pub(crate) later: Vec<u8>,
}

/// What the tunnel made of something.
#[derive(Debug)]
pub(crate) struct Heard {
    pub(crate) events: Vec<String>,
    pub(crate) result: Result<(), TunnelError>,
}

pub(crate) type Frame = (Header, Vec<u8>);

impl Peer {
    pub(crate) fn new(role: Role, local: Local) -> Self {
        let suite = Suite::Aes128GcmSha256;
        Self {
            tunnel: tunnel(suite, 1, 2, role, local),
            seal: seal(suite, 2),
            open: Open::new(secret(suite, 1), 0).expect("a key"),
            unread: Vec::new(),
            plaintext: Vec::new(),
            later: Vec::new(),
        }
    }

    /// The peer of a client, both ends' SETTINGS exchanged.
    pub(crate) fn of_client(local: Local) -> Self {
        let mut peer = Self::new(Role::Client, local);
        peer.ok(&[settings(&[]), settings_ack()].concat());
        assert_eq!(peer.frames().first().map(|(header, _)| header.kind), Some(Kind::Settings));
        peer
    }

    /// The peer of a server, both ends' SETTINGS exchanged.
    pub(crate) fn of_server(local: Local) -> Self {
        let mut peer = Self::new(Role::Server, local);
        peer.ok(&[&frame::PREFACE[..], &settings(&[]), &settings_ack()].concat());
        assert_eq!(peer.frames().first().map(|(header, _)| header.kind), Some(Kind::Settings));
        peer
    }

    /// One record.
    pub(crate) fn sealed(&mut self, content: ContentType, plaintext: &[u8]) -> Vec<u8> {
        let mut record = vec![0; plaintext.len() + OVERHEAD];
        record[record::HEADER..][..plaintext.len()].copy_from_slice(plaintext);
        self.seal.seal(&mut record, content, plaintext.len()).expect("a key");
        record
    }

    /// A KeyUpdate, and the next key.
    pub(crate) fn key_update(&mut self, request: bool) -> Heard {
        let mut record = vec![0; record::KEY_UPDATE_RECORD];
        self.seal.key_update(&mut record, request).expect("a key");
        self.say_ciphertext(&record)
    }

    /// Says `plaintext` in as few records as it takes.
    pub(crate) fn say(&mut self, plaintext: &[u8]) -> Heard {
        self.say_in(plaintext, record::MAX_PLAINTEXT)
    }

    /// Says `plaintext` in records of `size`.
    pub(crate) fn say_in(&mut self, plaintext: &[u8], size: usize) -> Heard {
        let records: Vec<u8> =
            plaintext.chunks(size).flat_map(|piece| self.sealed(ContentType::ApplicationData, piece)).collect();
        self.say_ciphertext(&records)
    }

    pub(crate) fn say_ciphertext(&mut self, records: &[u8]) -> Heard {
        let mut input = std::mem::take(&mut self.tunnel.carry);
        input.extend_from_slice(records);
        let mut cursor = Cursor::default();
        let mut events = Vec::new();
        let result = loop {
            match self.tunnel.step(&mut input, &mut cursor) {
                Ok(Step::Event(event)) => events.push(describe(&event, &input)),
                Ok(Step::Starved) => {
                    self.tunnel.carry = input.split_off(cursor.at);
                    assert!(self.tunnel.carry.len() < MAX_RECORD);
                    break Ok(());
                }
                Ok(Step::Closed) => {
                    events.push("closed".to_owned());
                    break Ok(());
                }
                Err(error) => {
                    self.tunnel.fail(&error);
                    break Err(error);
                }
            }
        };
        Heard { events, result }
    }

    /// Says something that breaks no rule.
    pub(crate) fn ok(&mut self, plaintext: &[u8]) -> Vec<String> {
        let Heard { events, result } = self.say(plaintext);
        assert_eq!(result, Ok(()), "after {events:?}");
        events
    }

    /// Says something after which the connection is over, for `code` and with `why` somewhere in the reason.
    #[track_caller]
    pub(crate) fn breaks(&mut self, plaintext: &[u8], code: ErrorCode, why: &str) {
        let Heard { events, result } = self.say(plaintext);
        match result {
            Err(TunnelError::Connection(error)) => {
                assert_eq!(error.code, code, "{error}");
                assert!(error.why.contains(why), "{error}");
            }
            other => panic!("{other:?} after {events:?}"),
        }
        let frames = self.frames();
        let (last, payload) = frames.last().expect("a GOAWAY");
        assert_eq!((last.kind, &payload[4..]), (Kind::GoAway, &code.0.to_be_bytes()[..]));
    }

    pub(crate) fn at(&mut self, now: Duration) -> Result<Vec<String>, TunnelError> {
        self.tunnel.conn.set_now(now);
        self.tunnel.conn.on_time(&mut self.tunnel.out)?;
        Ok(self.pending())
    }

    pub(crate) fn pending(&mut self) -> Vec<String> {
        std::iter::from_fn(|| self.tunnel.conn.pending_event()).map(|event| describe(&event, &[])).collect()
    }

    /// What the tunnel has said since the last time, frame by frame.
    pub(crate) fn frames(&mut self) -> Vec<Frame> {
        loop {
            self.tunnel.seal(1 << 20).expect("a key");
            let bytes: Vec<u8> = self.tunnel.out.ready().flatten().copied().collect();
            if bytes.is_empty() {
                break;
            }
            self.tunnel.out.advance(bytes.len());
            self.unread.extend(bytes);
        }
        self.read()
    }

    /// As [`Self::frames`] of bytes that were taken from the tunnel otherwise.
    pub(crate) fn take(&mut self, bytes: &[u8]) -> Vec<Frame> {
        self.unread.extend_from_slice(bytes);
        self.read()
    }

    fn read(&mut self) -> Vec<Frame> {
        while let Some(length) = record::header(&self.unread).expect("a record").filter(|end| *end <= self.unread.len())
        {
            let mut record: Vec<u8> = self.unread.drain(..length).collect();
            match self.open.open(&mut record).expect("a record") {
                Opened::Data(data) => self.plaintext.extend_from_slice(data),
                Opened::Handshake(message) => {
                    assert!(message.starts_with(&[24, 0, 0, 1]), "a KeyUpdate");
                    self.open.update().expect("a key");
                }
                Opened::Alert { .. } => {}
            }
        }
        if self.plaintext.starts_with(frame::PREFACE) {
            self.plaintext.drain(..frame::PREFACE.len());
        }
        let mut frames = Vec::new();
        while let Some(header) = self.plaintext.first_chunk::<HEADER>().map(Header::parse) {
            let end = HEADER + usize::try_from(header.length).expect("a length");
            if self.plaintext.len() < end {
                break;
            }
            let frame: Vec<u8> = self.plaintext.drain(..end).collect();
            frames.push((header, frame[HEADER..].to_vec()));
        }
        frames
    }

    /// [`Self::frames`], as text.
    pub(crate) fn said(&mut self) -> Vec<String> {
        self.frames().iter().map(|(header, payload)| summary(header, payload)).collect()
    }
}

fn describe(event: &Event, input: &[u8]) -> String {
    match event {
        Event::Request { stream, head } => {
            format!("{stream}: {} {}", head.method, head.authority.as_deref().unwrap_or("nothing"))
        }
        Event::Malformed { why } => format!("malformed: {why}"),
        Event::Response { stream, head } => format!("{stream}: {}", head.status.as_u16()),
        Event::Data { stream, range } => {
            let bytes = &input[range.clone()];
            match std::str::from_utf8(bytes) {
                Ok(text) if text.len() < 20 => format!("{stream}: {text:?}"),
                _ => format!("{stream}: {} bytes", bytes.len()),
            }
        }
        Event::End { stream } => format!("{stream}: end"),
        Event::Reset { stream, code } => format!("{stream}: {code}"),
        Event::Writable { stream } => format!("{stream}: writable"),
        Event::AllWritable => "writable".to_owned(),
        Event::Limits => "limits".to_owned(),
    }
}

fn summary(header: &Header, payload: &[u8]) -> String {
    let word = |at: usize| payload.get(at..at + 4).map_or(0, |word| u32::from_be_bytes(word.try_into().expect("four")));
    let Header { stream, length, .. } = header;
    match header.kind {
        Kind::RstStream => format!("RST_STREAM {stream} {}", ErrorCode(word(0))),
        Kind::WindowUpdate => format!("WINDOW_UPDATE {stream} {}", word(0)),
        Kind::GoAway => format!("GOAWAY {} {}", word(0), ErrorCode(word(4))),
        Kind::Ping if header.has(frame::ACK) => format!("PONG {payload:?}"),
        Kind::Ping => "PING".to_owned(),
        Kind::Settings if header.has(frame::ACK) => "SETTINGS ACK".to_owned(),
        Kind::Data if header.has(frame::END_STREAM) => format!("DATA {stream} {length} END"),
        Kind::Data => format!("DATA {stream} {length}"),
        Kind::Headers if header.has(frame::END_STREAM) => format!("HEADERS {stream} END"),
        Kind::Headers => format!("HEADERS {stream}"),
        kind => format!("{kind:?} {stream} {length}"),
    }
}

pub(crate) fn frame(kind: Kind, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a frame");
    [&Header { length, kind, flags, stream }.encode()[..], payload].concat()
}

pub(crate) fn settings(values: &[(u16, u32)]) -> Vec<u8> {
    let mut payload = Vec::new();
    values.iter().for_each(|(id, value)| setting::encode(*id, *value, &mut payload));
    frame(Kind::Settings, 0, 0, &payload)
}

pub(crate) fn settings_ack() -> Vec<u8> {
    frame(Kind::Settings, frame::ACK, 0, &[])
}

pub(crate) fn window_update(stream: u32, increment: u32) -> Vec<u8> {
    frame(Kind::WindowUpdate, 0, stream, &increment.to_be_bytes())
}

pub(crate) fn reset(stream: u32, code: ErrorCode) -> Vec<u8> {
    frame(Kind::RstStream, 0, stream, &code.0.to_be_bytes())
}

pub(crate) fn go_away(last: u32, code: ErrorCode) -> Vec<u8> {
    frame(Kind::GoAway, 0, 0, &[last.to_be_bytes(), code.0.to_be_bytes()].concat())
}

pub(crate) fn ping(number: u64) -> Vec<u8> {
    frame(Kind::Ping, 0, 0, &number.to_be_bytes())
}

pub(crate) fn data(stream: u32, payload: &[u8]) -> Vec<u8> {
    frame(Kind::Data, 0, stream, payload)
}

/// The first octets choose an empty dynamic table (RFC 7541 §6.3); each field is a literal that is not indexed (§6.2.2).
pub(crate) fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = vec![0x20];
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            match u8::try_from(text.len()) {
                Ok(length @ ..0x7f) => block.push(length),
                _ => {
                    let mut rest = text.len() - 0x7f;
                    block.push(0x7f);
                    while rest >= 0x80 {
                        block.push(rest.to_le_bytes()[0] | 0x80);
                        rest >>= 7;
                    }
                    block.push(rest.to_le_bytes()[0]);
                }
            }
            block.extend_from_slice(text.as_bytes());
        }
    }
    block
}

pub(crate) fn headers(stream: u32, flags: u8, fields: &[(&str, &str)]) -> Vec<u8> {
    frame(Kind::Headers, flags | frame::END_HEADERS, stream, &block(fields))
}

pub(crate) const CONNECT: [(&str, &str); 2] = [(":method", "CONNECT"), (":authority", "10.0.0.1:80")];

pub(crate) fn connect(stream: u32) -> Vec<u8> {
    headers(stream, 0, &CONNECT)
}

pub(crate) fn ok(stream: u32) -> Vec<u8> {
    headers(stream, 0, &[(":status", "200")])
}
