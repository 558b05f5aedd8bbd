//! Bytes of the far end of a tunnel, from its handshake to its payload, and those of a predecessor's snapshot.
//!
//! Keys are known to everybody here, so that records can be made and every run is the same; only `handshake` uses real ones.

use std::{ops::Range, sync::LazyLock, time::Duration};

use fuzz::target;
use http::{HeaderMap, StatusCode};
use mesh_hbone::{
    Budget,
    engine::{
        conn::{Event, Role, Room},
        frame,
        handshake::Handshake,
        hpack::{Decoder, Encoder},
        out::{Filled, MAX_READ},
        record::{ContentType, Suite, header},
        state,
        stream::Flow,
        tunnel::Tunnel,
    },
};
use tokio::{task::LocalSet, time::sleep};

use self::{
    certificates::{Parties, name},
    exercise::exercise,
    peer::Peer,
    script::Style,
    support::Server,
};

#[path = "../../../crates/mesh-hbone/tests/engine/certificates.rs"]
mod certificates;
#[path = "../../../crates/mesh-hbone/tests/engine/exercise.rs"]
mod exercise;
#[path = "../../../crates/mesh-hbone/tests/engine/peer.rs"]
#[allow(dead_code, reason = "shared with the engine's own tests, which use more of it")]
mod peer;
#[path = "../../../crates/mesh-hbone/tests/engine/script.rs"]
mod script;
#[path = "../../../crates/mesh-hbone/tests/abuse/support.rs"]
#[allow(dead_code, reason = "shared with the tests of what peers may not do, which use more of it")]
mod support;

/// Bytes as instructions: what is not there is zero.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or_default()
    }

    fn take(&mut self, length: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// Whether there was another one.
    fn next(&mut self) -> Option<u8> {
        (!self.0.is_empty()).then(|| self.byte())
    }
}

target!(
    /// HTTP/2 to either role, as noise or as frames made of noise: what the engine tells makes sense, and what it holds can be saved.
    engine_frames,
    |bytes: &[u8]| {
        let mut input = Input(bytes);
        let mode = input.byte();
        let role = if mode & 1 == 0 { Role::Server } else { Role::Client };
        let mut plaintext = Vec::new();
        if mode & 2 != 0 {
            let preface: &[u8] = if role == Role::Server { frame::PREFACE } else { &[] };
            plaintext.extend_from_slice(&[preface, &peer::settings(&[]), &peer::settings_ack()].concat());
        }
        if mode & 4 == 0 {
            plaintext.extend_from_slice(input.0);
        } else {
            while let Some(kind) = input.next() {
                let (flags, stream, length) = (input.byte(), input.byte(), input.byte());
                let payload = input.take(usize::from(length)).to_vec();
                let padded = [payload, vec![0; if flags & 0x40 != 0 { 900 } else { 0 }]].concat();
                plaintext.extend(peer::frame((kind % 11).into(), flags & !0x40, u32::from(stream & 0x1f), &padded));
            }
        }
        let piece = [usize::MAX, 1, 7, 100][usize::from(mode >> 3 & 3)];
        let mut end = End::new(role);
        for (turn, piece) in plaintext.chunks(piece).enumerate() {
            if !end.hear(piece) {
                return;
            }
            if turn % 16 == 0 {
                end.act();
            }
            if turn == 20 && mode & 0x20 != 0 {
                end.save();
            }
        }
        end.save();
    }
);

/// One end, and what it may still say about each stream.
struct End {
    tunnel: Tunnel,
    streams: Vec<(u32, Told)>,
    role: Role,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    Asked,
    Answered,
    Ended,
    Reset,
}

impl End {
    fn new(role: Role) -> Self {
        let mut tunnel = peer::tunnel(Suite::Aes128GcmSha256, 1, 2, role, script::local());
        let mut streams = Vec::new();
        if role == Role::Client {
            for _ in 0..4 {
                let id = tunnel.conn.connect("a:1", std::iter::empty(), &mut tunnel.out).expect("a stream");
                streams.push((id, Told::Asked));
            }
        }
        Self { tunnel, streams, role }
    }

    /// False when the connection is over.
    fn hear(&mut self, input: &[u8]) -> bool {
        let mut at = 0;
        loop {
            match self.tunnel.conn.next(input, &mut at, &mut self.tunnel.out) {
                Ok(Some(event)) => self.check(&event, input),
                Ok(None) => break,
                Err(error) => {
                    self.tunnel.fail(&error.into());
                    return false;
                }
            }
        }
        assert_eq!(at, input.len(), "something was not read");
        true
    }

    fn save(&mut self) {
        self.act();
        let blob = state::encode(&self.tunnel);
        let restored: Tunnel = state::decode(&blob).expect("what was saved can be restored");
        assert!(*state::encode(&restored) == *blob, "a restored tunnel is saved as it was");
        self.tunnel = restored;
    }

    fn told(&mut self, id: u32) -> &mut Told {
        let stream = self.streams.iter_mut().find(|(known, _)| *known == id);
        stream.map(|(_, told)| told).expect("nothing is told about a stream that is not known")
    }

    fn check(&mut self, event: &Event, input: &[u8]) {
        match event {
            Event::Request { stream, head } => {
                assert!(self.role == Role::Server && stream % 2 == 1 && !head.method.is_empty());
                assert!(self.streams.last().is_none_or(|(last, _)| last < stream), "streams are opened in order");
                self.streams.push((*stream, Told::Answered));
            }
            Event::Response { stream, .. } => {
                let told = self.told(*stream);
                assert_eq!(std::mem::replace(told, Told::Answered), Told::Asked);
            }
            Event::Data { stream, range: Range { start, end } } => {
                assert!(start < end && *end <= input.len());
                assert_eq!(*self.told(*stream), Told::Answered);
                self.tunnel.conn.consumed(*stream, end - start, &mut self.tunnel.out);
            }
            Event::End { stream } => {
                let told = self.told(*stream);
                assert_eq!(std::mem::replace(told, Told::Ended), Told::Answered);
            }
            Event::Reset { stream, .. } => {
                let told = self.told(*stream);
                assert_ne!(std::mem::replace(told, Told::Reset), Told::Reset);
            }
            Event::Writable { stream } => assert_ne!(*self.told(*stream), Told::Reset),
            Event::Malformed { .. } => assert_eq!(self.role, Role::Server),
            Event::AllWritable | Event::Limits => {}
        }
    }

    /// Answers, and says something on each stream.
    fn act(&mut self) {
        let Tunnel { conn, out, .. } = &mut self.tunnel;
        for (id, _) in &self.streams {
            if self.role == Role::Server {
                conn.respond(*id, StatusCode::OK, &HeaderMap::new(), false, out);
            }
            if let Room::Bytes(room) = conn.room(*id) {
                let filled = out.fill(*id, room.min(MAX_READ).min(100), |slices| Ok(slices[0].len()));
                let Filled { bytes, frames, .. } = filled.expect("memory can be read");
                conn.sent(*id, bytes, frames);
            }
        }
        while conn.pending_event().is_some() {}
        self.tunnel.seal(1 << 20).expect("a key");
        let ready = self.tunnel.out.ready().map(<[u8]>::len).sum();
        self.tunnel.out.advance(ready);
    }
}

target!(
    /// Header blocks one after the other: bounded, and the decoder can be saved after each. What was understood is encoded and read
    /// again.
    engine_hpack,
    |bytes: &[u8]| {
        let mut input = Input(bytes);
        let (mut decoder, mut encoder, mut reader) = (Decoder::new(), Encoder::new(), Decoder::new());
        while let Some(first) = input.next() {
            if first & 0xf0 == 0xf0 {
                decoder.set_limit(usize::from(input.byte()) * 20);
                continue;
            }
            let limit = usize::from(first >> 4) * 100;
            let length = usize::from(input.byte());
            let block = input.take(length);
            let mut restored: Decoder = state::decode(&state::encode(&decoder)).expect("what was saved can be restored");
            assert_eq!(restored, decoder);
            let list = decoder.decode(block, limit);
            assert_eq!(restored.decode(block, limit), list);
            let Ok(list) = list else { return };
            let size: usize = list.iter().map(|(name, value)| name.len() + value.len() + 32).sum();
            assert!(size <= limit && (list.too_large || limit > 0 || list.is_empty()));
            let mut encoded = Vec::new();
            list.iter().for_each(|(name, value)| encoder.field(name, value, &mut encoded));
            let read = reader.decode(&encoded, limit).expect("our own");
            assert!(read.iter().eq(list.iter()));
        }
    }
);

target!(
    /// Ciphertext: noise, valid records of any content, and valid ones with a bit changed, in any pieces.
    engine_records,
    |bytes: &[u8]| {
        let mut input = Input(bytes);
        let mode = input.byte();
        let role = if mode & 1 == 0 { Role::Server } else { Role::Client };
        let mut peer = if mode & 2 == 0 { Peer::new(role, peer::local()) } else { opened(role) };
        if mode & 4 != 0 {
            assert!(header(input.0).is_ok_and(|length| length.is_none_or(|length| length <= 16_645)) || header(input.0).is_err());
            peer.say_ciphertext(input.0);
            return;
        }
        while let Some(first) = input.next() {
            let content = [ContentType::ApplicationData, ContentType::Handshake, ContentType::Alert][usize::from(first % 3)];
            let length = usize::from(input.byte());
            let plaintext = input.take(length);
            let mut record = peer.sealed(content, plaintext);
            let damaged = first & 0x80 != 0;
            if damaged {
                let at = usize::from(input.byte()) % record.len();
                record[at] ^= 1 << (first >> 4 & 7);
            }
            let piece = usize::from(first >> 2 & 3) * 9 + 1;
            let heard = record.chunks(piece).map(|piece| peer.say_ciphertext(piece));
            let results: Vec<_> = heard.map(|heard| heard.result).collect();
            let failed = results.iter().any(Result::is_err);
            // A length that became longer makes it wait.
            assert!(!damaged || failed || !peer.tunnel.carry.is_empty(), "damage was not noticed");
            if failed || damaged || peer.tunnel.is_peer_closed() {
                return;
            }
            peer.frames();
        }
    }
);

fn opened(role: Role) -> Peer {
    match role {
        Role::Client => Peer::of_client(peer::local()),
        Role::Server => Peer::of_server(peer::local()),
    }
}

target!(
    /// A blob of a predecessor that nobody vouches for, of a tunnel or of one of its flows. A tunnel is used a little.
    engine_snapshot,
    |bytes: &[u8]| {
        if let Ok(flow) = state::decode::<Flow>(bytes) {
            assert_eq!(state::decode::<Flow>(&state::encode(&flow)), Ok(flow));
        }
        if let Ok(tunnel) = state::decode::<Tunnel>(bytes) {
            let said = [peer::ping(1), peer::connect(9), peer::data(1, b"some"), peer::settings(&[(4, 10)])].concat();
            exercise(tunnel, &said);
        }
    }
);

target!(
    /// Two tunnels do what the bytes say; saved and restored anywhere, they say and hear the same.
    engine_snapshot_transcript,
    runs = 200,
    |bytes: &[u8]| {
        static BLOBS: LazyLock<[Vec<u8>; 2]> = LazyLock::new(|| {
            script::pair(Suite::Aes128GcmSha256, script::local()).map(|tunnel| state::encode(&tunnel).to_vec())
        });
        // Each step may move 64 KiB, twice.
        let Some(([seed, piece], script)) = bytes.split_first_chunk() else { return };
        let script = &script[..script.len().min(400)];
        let plain = script::run(&BLOBS, script, Style { piece: usize::MAX, cut: &mut || [false; 2] });
        let mut state = u32::from(*seed);
        let mut cut = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            [state >> 30 == 0, state >> 28 & 3 == 0]
        };
        let piece = 1 + 64 * usize::from(*piece);
        let restored = script::run(&BLOBS, script, Style { piece, cut: &mut cut });
        for (plain, restored) in plain.iter().zip(&restored) {
            assert_eq!(plain.heard, restored.heard);
            assert!(plain.said == restored.said, "something else was said");
        }
    }
);

target!(
    /// Anything at all instead of a handshake, or behind its beginning.
    handshake,
    runs = 300,
    |bytes: &[u8]| {
        static PARTIES: LazyLock<Parties> = LazyLock::new(Parties::new);
        let mut input = Input(bytes);
        let mode = input.byte();
        let mut ours = if mode & 1 == 0 {
            Handshake::server(&PARTIES.server).expect("a configuration")
        } else {
            Handshake::client(&PARTIES.client, name()).expect("a configuration")
        };
        let mut said = Vec::new();
        let mut heard = Vec::new();
        if mode & 2 != 0 {
            // The other side is a real one, up to some byte.
            let mut peer = if mode & 1 == 0 {
                Handshake::client(&PARTIES.client, name()).expect("a configuration")
            } else {
                Handshake::server(&PARTIES.server).expect("a configuration")
            };
            ours.write(&mut said);
            peer.read(&said).expect("a hello");
            peer.write(&mut heard);
            let kept = usize::from(input.byte()) << 3 | usize::from(input.byte() & 7);
            heard.truncate(kept);
        }
        heard.extend_from_slice(input.0);
        let mut read = 0;
        for end in (0..=heard.len()).step_by(1 + usize::from(mode >> 2)).chain([heard.len()]) {
            match ours.read(&heard[read..end]) {
                Ok(consumed) => read += consumed,
                Err(_) => break,
            }
            assert!(read <= end);
        }
        ours.write(&mut said);
        // Only a real server's whole answer leads to keys.
        let done = ours.is_done();
        assert!(!done || mode & 3 == 3);
        assert_eq!(ours.finish().is_ok(), done);
    }
);

target!(
    /// A tunnel whose peer opens HTTP/2 and then sends anything at all: it ends, by itself or when the peer leaves, without a panic, and
    /// holds nothing afterwards.
    hbone_server,
    |bytes: &[u8]| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
        let runtime = runtime.expect("a runtime");
        let tunnel = async {
            let server = Server::new(Budget::default());
            let (mut peer, served) = server.tunnel().await;
            peer.say(bytes).await;
            // An end too early would hide the requests behind it.
            sleep(Duration::from_secs(1)).await;
            peer.leave().await;
            drop(served.end().await);
            assert_eq!(server.budget.used(), 0);
        };
        LocalSet::new().block_on(&runtime, tunnel);
    }
);

/// What the first seeds were made by: `cargo test -p fuzz write_seeds -- --ignored` adds what is not there.
#[test]
#[ignore = "writes files"]
fn write_seeds() {
    let write = |target: &str, name: &str, bytes: &[u8]| {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
        std::fs::create_dir_all(&folder).expect("a folder");
        if !folder.join(name).exists() {
            std::fs::write(folder.join(name), bytes).expect("a file");
        }
    };
    let session = [
        peer::connect(1),
        peer::data(1, b"hello"),
        peer::window_update(0, 100),
        peer::window_update(1, 100),
        peer::ping(7),
        peer::frame(frame::Kind::Data, frame::PADDED | frame::END_STREAM, 1, b"\x02bye\0\0"),
        peer::connect(3),
        peer::reset(3, frame::ErrorCode::CANCEL),
        peer::go_away(0, frame::ErrorCode::NO_ERROR),
    ]
    .concat();
    write("engine_frames", "server_session", &[&[2][..], &session].concat());
    write("engine_frames", "server_opening", &[&[0][..], frame::PREFACE, &peer::settings(&[(4, 10), (1, 0)])].concat());
    let block = peer::block(&peer::CONNECT);
    let pieces = [
        peer::frame(frame::Kind::Headers, 0, 1, &block[..9]),
        peer::frame(frame::Kind::Continuation, 0, 1, &block[9..20]),
        peer::frame(frame::Kind::Continuation, frame::END_HEADERS, 1, &block[20..]),
        peer::headers(1, frame::END_STREAM, &[("trailer", "x")]),
    ]
    .concat();
    write("engine_frames", "server_header_block", &[&[2 | 1 << 3][..], &pieces].concat());
    let answers = [
        peer::headers(1, 0, &[(":status", "103")]),
        peer::ok(1),
        peer::data(1, b"hello"),
        peer::headers(3, frame::END_STREAM, &[(":status", "503")]),
        peer::reset(5, frame::ErrorCode::REFUSED_STREAM),
        peer::settings(&[(3, 1), (4, 0), (4, 100)]),
        peer::headers(1, frame::END_STREAM, &[("trailer", "x")]),
        peer::go_away(5, frame::ErrorCode::NO_ERROR),
    ]
    .concat();
    write("engine_frames", "client_session", &[&[3][..], &answers].concat());
    let made: Vec<u8> = (0..11).flat_map(|kind| [kind, 5, kind % 4, 4, 0, 0, 0, 9]).collect();
    write("engine_frames", "frames_of_noise", &[&[2 | 4 | 2 << 3][..], &made].concat());
    write("engine_frames", "client_frames_of_noise", &[&[3 | 4][..], &made].concat());

    // RFC 7541 C.3, C.4: three requests each, plain and in Huffman's code.
    let hex = |digits: &str| -> Vec<u8> {
        let digit = |at| u8::from_str_radix(&digits[at..at + 2], 16).expect("hexadecimal");
        (0..digits.len()).step_by(2).map(digit).collect()
    };
    let blocks = |blocks: &[&str]| -> Vec<u8> {
        let block =
            |digits: &&str| [&[0x50, u8::try_from(digits.len() / 2).expect("short")][..], &hex(digits)].concat();
        blocks.iter().flat_map(block).collect()
    };
    let plain = ["828684410f7777772e6578616d706c652e636f6d", "828684be58086e6f2d6361636865"];
    write("engine_hpack", "plain", &blocks(&plain));
    let coded = [
        "828684418cf1e3c2e5f23a6ba0ab90f4ff",
        "828684be5886a8eb10649cbf",
        "828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf",
    ];
    write("engine_hpack", "coded", &blocks(&coded));
    write("engine_hpack", "limited", &[&blocks(&plain)[..], &[0xf0, 0], &blocks(&["20", "2082"])].concat());
    write("engine_hpack", "too_large", &[&[0x00, 1, 0x82][..], &[0x10, 3, 0x82, 0x86, 0x84]].concat());

    let record = |first: u8, bytes: &[u8]| [&[first, u8::try_from(bytes.len()).expect("short")][..], bytes].concat();
    let hello = [&peer::connect(1)[..], &peer::data(1, b"x")].concat();
    write(
        "engine_records",
        "data",
        &[&[2][..], &record(0, &hello), &record(12, b""), &record(0, &peer::ping(1))].concat(),
    );
    write(
        "engine_records",
        "key_updates",
        &[&[2][..], &record(1, &[24, 0, 0, 1, 1]), &record(1, &[24, 0, 0, 1, 0])].concat(),
    );
    write("engine_records", "ticket", &[&[3][..], &record(1, &[4, 0, 0, 3, 1]), &record(1, &[2, 3])].concat());
    write("engine_records", "closed", &[&[2][..], &record(0, &hello), &record(2, &[1, 0])].concat());
    write("engine_records", "damaged", &[&[2][..], &record(0x80, &hello), &[30]].concat());
    let mut noise = opened(Role::Server);
    write("engine_records", "ciphertext", &[&[6][..], &noise.sealed(ContentType::ApplicationData, &hello)].concat());

    let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/mesh-hbone/tests/golden/v1");
    for entry in std::fs::read_dir(golden).expect("golden snapshots").flatten() {
        let blob = std::fs::read(entry.path()).expect("a snapshot");
        if blob.len() < 2_000 {
            write("engine_snapshot", &entry.path().file_stem().expect("a name").to_string_lossy(), &blob);
        }
    }

    let step = |kind: u8, side: u8, how: u8| [kind << 1 | side, how];
    let opening: Vec<u8> =
        [0, 1, 0, 1].into_iter().flat_map(|side| [step(0, side, 0xff), step(1, 1 - side, 0xff)]).flatten().collect();
    let exchange = |sizes: [u8; 2]| -> Vec<u8> {
        let steps = [
            step(2, 0, 3),
            step(0, 0, 0xff),
            step(1, 1, 0xff),
            step(3, 1, 0),
            step(4, 1, sizes[0]),
            step(0, 1, 9),
            step(1, 0, 5),
            step(1, 0, 0xff),
            step(0, 1, 0xff),
            step(1, 0, 0xff),
            step(4, 0, sizes[1]),
            step(5, 0, 3),
            step(12, 0, 0),
            step(0, 0, 0xff),
            step(1, 1, 0xff),
            step(9, 1, 0),
            step(6, 0, 0),
            step(8, 0, 200),
            step(0, 0, 0xff),
            step(1, 1, 20),
        ];
        steps.concat()
    };
    for (name, seed, piece, sizes) in [("small", 1, 0, [2, 3]), ("large", 2, 3, [7, 5]), ("bytes", 3, 0, [4, 1])] {
        let drained = if seed == 2 { step(10, 1, 0).to_vec() } else { Vec::new() };
        let script = [&[seed, piece][..], &opening, &exchange(sizes), &drained, &exchange(sizes)].concat();
        write("engine_snapshot_transcript", name, &script);
    }

    let mut flow = Flow::new("10.0.0.1:80".into());
    assert!(flow.stall.push(b"not taken", &Budget::default()));
    flow.reset = Some(frame::ErrorCode::CANCEL);
    write("engine_snapshot", "flow", &state::encode(&flow));

    static PARTIES: LazyLock<Parties> = LazyLock::new(Parties::new);
    let mut hello = Vec::new();
    Handshake::client(&PARTIES.client, name()).expect("a configuration").write(&mut hello);
    write("handshake", "client_hello", &[&[0][..], &hello].concat());
    let mut answer = Vec::new();
    let mut server = Handshake::server(&PARTIES.server).expect("a configuration");
    server.read(&hello).expect("a hello");
    server.write(&mut answer);
    write("handshake", "answer_to_somebody_else", &[&[1][..], &answer].concat());
    write("handshake", "half_a_hello", &[2, 20, 0]);
    write("handshake", "whole_answer", &[3 | 40 << 2, 0xff, 7]);
    write("handshake", "no_tls", b"\0GET / HTTP/1.1\r\n\r\n");
    write("handshake", "alert", &[0, 21, 3, 3, 0, 2, 2, 40]);
}
