//! Snapshots in the format of each release: read, and written again as they were. `golden/v1/*.bin` are written once, by
//! `cargo test -p mesh-hbone --test engine write_golden -- --ignored`, and never changed: a live hand-over meets them.

use std::{fs, path::PathBuf, time::Duration};

use http::{HeaderMap, StatusCode};
use mesh_hbone::engine::{
    conn::{Role, Room},
    frame::{self, Kind},
    out::Filled,
    record::ContentType,
    state::{self, OPTIONAL, RestoreError},
    tunnel::Tunnel,
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use crate::{
    exercise::exercise,
    peer::{self, CONNECT, Peer},
};

/// A state worth keeping, and how it goes on from there.
struct State {
    name: &'static str,
    /// The tunnel in that state, with a peer that knows its keys.
    make: fn() -> Peer,
    go_on: fn(&mut Peer),
}

const STATES: [State; 11] = [
    State {
        name: "client_idle",
        make: || Peer::of_client(peer::local()),
        go_on: |peer| {
            open(peer);
            assert_eq!(peer.said(), ["HEADERS 1"]);
        },
    },
    State {
        name: "client_new",
        make: || Peer::new(Role::Client, peer::local()),
        go_on: |peer| {
            assert_eq!(peer.ok(&peer::settings(&[])), ["limits"]);
            assert_eq!(peer.said(), ["Settings 0 30", "WINDOW_UPDATE 0 983041", "SETTINGS ACK"]);
        },
    },
    State {
        name: "server_preface",
        make: || {
            let mut peer = Peer::new(Role::Server, peer::local());
            peer.ok(&frame::PREFACE[..10]);
            peer
        },
        go_on: |peer| assert_eq!(peer.ok(&[&frame::PREFACE[10..], &peer::settings(&[])].concat()), ["limits"]),
    },
    State {
        name: "server_mid_record",
        make: || {
            let mut peer = with_stream();
            let record = peer.sealed(ContentType::ApplicationData, &peer::data(1, b"in two"));
            let (first, second) = record.split_at(20);
            peer.say_ciphertext(first).result.unwrap();
            peer.later = second.to_vec();
            peer
        },
        go_on: |peer| {
            let rest = std::mem::take(&mut peer.later);
            assert_eq!(peer.say_ciphertext(&rest).events, ["1: \"in two\""]);
        },
    },
    State {
        name: "server_half_data",
        make: || {
            let mut peer = with_stream();
            let padded = [&[3][..], b"in two halves", &[0; 3]].concat();
            let data = peer::frame(Kind::Data, frame::PADDED | frame::END_STREAM, 1, &padded);
            assert_eq!(peer.ok(&data[..frame::HEADER + 7]), ["1: \"in two\""]);
            peer
        },
        go_on: |peer| assert_eq!(peer.ok(b" halves\0\0\0"), ["1: \" halves\"", "1: end"]),
    },
    State {
        name: "server_half_header_block",
        make: || {
            let mut peer = Peer::of_server(peer::local());
            let block = peer::block(&CONNECT);
            assert!(peer.ok(&peer::frame(Kind::Headers, frame::END_STREAM, 1, &block[..10])).is_empty());
            assert!(peer.ok(&peer::frame(Kind::Continuation, 0, 1, &block[10..20])[..15]).is_empty());
            peer
        },
        go_on: |peer| {
            let block = peer::block(&CONNECT);
            let last = peer::frame(Kind::Continuation, frame::END_HEADERS, 1, &block[20..]);
            assert_eq!(peer.ok(&[&block[16..20], &last].concat()), ["1: CONNECT 10.0.0.1:80", "1: end"]);
        },
    },
    State {
        name: "server_dynamic_table",
        make: || {
            // Before our SETTINGS are acknowledged a peer may index what it says.
            let mut peer = Peer::new(Role::Server, peer::local());
            peer.ok(&[&frame::PREFACE[..], &peer::settings(&[])].concat());
            let block = b"\x42\x07CONNECT\x41\x03a:1\x40\x07baggage\x01v";
            assert_eq!(peer.ok(&peer::frame(Kind::Headers, frame::END_HEADERS, 1, block)), ["1: CONNECT a:1"]);
            peer
        },
        go_on: |peer| {
            // The three newest entries, oldest first.
            let block = b"\xc0\xbf\xbe";
            assert_eq!(peer.ok(&peer::frame(Kind::Headers, frame::END_HEADERS, 3, block)), ["3: CONNECT a:1"]);
        },
    },
    State {
        name: "client_queued",
        make: || {
            let mut peer = Peer::of_client(peer::local());
            peer.ok(&peer::settings(&[(frame::setting::INITIAL_WINDOW_SIZE, 17_000)]));
            open(&mut peer);
            open(&mut peer);
            peer.tunnel.seal(1).unwrap();
            send(&mut peer, 1, 16_990);
            peer.tunnel.seal(1_000).unwrap();
            peer.later = peer.tunnel.out.ready().flatten().copied().take(10).collect();
            peer.tunnel.out.advance(10);
            send(&mut peer, 1, 10);
            send(&mut peer, 3, 2_000);
            assert_eq!(peer.tunnel.conn.room(1), Room::Stream);
            peer
        },
        go_on: |peer| {
            // The first bytes were written by the predecessor.
            let first = std::mem::take(&mut peer.later);
            assert!(peer.take(&first).is_empty());
            let said = peer.said();
            let expected =
                ["SETTINGS ACK", "HEADERS 1", "HEADERS 3", "DATA 1 16375", "DATA 1 615", "DATA 1 10", "DATA 3 2000"];
            assert_eq!(said, expected);
            assert_eq!(peer.ok(&peer::window_update(1, 5)), ["1: writable"]);
            assert_eq!(peer.tunnel.conn.room(3), Room::Bytes(15_000));
        },
    },
    State {
        name: "server_drained",
        make: || {
            let mut peer = with_stream();
            peer.tunnel.conn.drain(&mut peer.tunnel.out);
            let frames = peer.frames();
            let (_, number) = frames.iter().find(|(header, _)| header.kind == Kind::Ping).expect("a PING").clone();
            peer.ok(&peer::frame(Kind::Ping, frame::ACK, 0, &number));
            peer
        },
        go_on: |peer| {
            assert_eq!(peer.said(), ["GOAWAY 1 NO_ERROR"]);
            assert!(peer.ok(&peer::connect(3)).is_empty(), "it is ignored");
            assert_eq!(peer.ok(&peer::data(1, b"still here")), ["1: \"still here\""]);
            assert!(!peer.tunnel.conn.is_done());
        },
    },
    State {
        name: "server_waiting",
        make: || {
            let mut peer = with_stream();
            peer.at(Duration::from_secs(9)).unwrap();
            peer.tunnel.conn.drain(&mut peer.tunnel.out);
            peer.at(Duration::from_secs(11)).unwrap();
            peer.tunnel.conn.reset(1, frame::ErrorCode::CANCEL, &mut peer.tunnel.out);
            assert!(peer.key_update(true).result.is_ok());
            peer
        },
        go_on: |peer| {
            assert_eq!(peer.said(), ["GOAWAY 2147483647 NO_ERROR", "PING", "PING", "RST_STREAM 1 CANCEL"]);
            assert!(peer.at(Duration::from_secs(30)).is_ok());
            assert!(peer.at(Duration::from_secs(31)).is_err());
        },
    },
    State {
        name: "client_half_ticket",
        make: || {
            let mut peer = Peer::of_client(peer::local());
            open(&mut peer);
            let ticket = [&[4, 0, 0, 100][..], &[7; 30]].concat();
            let record = peer.sealed(ContentType::Handshake, &ticket);
            peer.say_ciphertext(&record).result.unwrap();
            peer
        },
        go_on: |peer| {
            let record = peer.sealed(ContentType::Handshake, &[7; 70]);
            peer.say_ciphertext(&record).result.unwrap();
            assert_eq!(peer.ok(&peer::ok(1)), ["1: 200"]);
        },
    },
];

fn with_stream() -> Peer {
    let mut peer = Peer::of_server(peer::local());
    assert_eq!(peer.ok(&peer::connect(1)), ["1: CONNECT 10.0.0.1:80"]);
    assert!(peer.tunnel.conn.respond(1, StatusCode::OK, &HeaderMap::new(), false, &mut peer.tunnel.out));
    assert_eq!(peer.said(), ["HEADERS 1"]);
    peer
}

fn open(peer: &mut Peer) {
    peer.tunnel.conn.connect("10.0.0.1:80", std::iter::empty(), &mut peer.tunnel.out).unwrap();
}

fn send(peer: &mut Peer, id: u32, bytes: usize) {
    let read = |slices: &mut [std::io::IoSliceMut<'_>]| Ok(slices.iter().map(|slice| slice.len()).sum());
    let Filled { bytes, frames, .. } = peer.tunnel.out.fill(id, bytes, read).unwrap();
    peer.tunnel.conn.sent(id, bytes, frames);
}

fn path(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests/golden/v1", &format!("{name}.bin")].iter().collect()
}

fn golden(name: &str) -> Vec<u8> {
    fs::read(path(name)).unwrap_or_else(|error| panic!("{}: {error}", path(name).display()))
}

/// Only for a state that is new: what a release has written stays.
#[test]
#[ignore = "writes files"]
fn write_golden() {
    for State { name, make, .. } in STATES {
        if !path(name).exists() {
            fs::write(path(name), &*state::encode(&make().tunnel)).unwrap();
        }
    }
}

#[test]
fn what_a_release_wrote_is_read_and_written_alike() {
    for State { name, .. } in STATES {
        let blob = golden(name);
        let tunnel: Tunnel = state::decode(&blob).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(*state::encode(&tunnel) == blob, "{name} is written otherwise now");
    }
}

#[test]
fn what_a_release_left_undone_goes_on() {
    for State { name, make, go_on } in STATES {
        println!("{name}");
        let mut peer = make();
        peer.tunnel = state::decode(&golden(name)).unwrap();
        go_on(&mut peer);
    }
}

/// A field of one byte under `tag`.
fn field(tag: u16) -> Vec<u8> {
    [&tag.to_be_bytes()[..], &1u32.to_be_bytes(), &[0]].concat()
}

/// A blob with `extra` at the end of the group `within`, or of the outermost one.
fn with(blob: &[u8], within: Option<u16>, extra: &[u8]) -> Vec<u8> {
    let (start, mut rest) = blob.split_at(6);
    let mut made = start.to_vec();
    while let Some((tag, after)) = rest.split_first_chunk::<2>() {
        let (length, after) = after.split_first_chunk::<4>().unwrap();
        let (value, after) = after.split_at(usize::try_from(u32::from_be_bytes(*length)).unwrap());
        rest = after;
        let extra = if within == Some(u16::from_be_bytes(*tag)) { extra } else { &[] };
        made.extend_from_slice(tag);
        made.extend_from_slice(&u32::try_from(value.len() + extra.len()).unwrap().to_be_bytes());
        made.extend_from_slice(value);
        made.extend_from_slice(extra);
    }
    if within.is_none() {
        made.extend_from_slice(extra);
    }
    made
}

#[test]
fn a_newer_release_may_add_what_can_be_left_out_and_nothing_else() {
    let blob = golden("client_queued");
    // Of the tunnel's own fields, those made of fields.
    for within in [None, Some(1), Some(2), Some(3), Some(4), Some(7), Some(8)] {
        let tunnel: Tunnel = state::decode(&with(&blob, within, &field(OPTIONAL | 0x123))).unwrap();
        assert!(*state::encode(&tunnel) == blob, "it is as if the field had not been there");
        let refused = state::decode::<Tunnel>(&with(&blob, within, &field(0x123)));
        assert_eq!(refused.map(drop), Err(RestoreError::Unknown(0x123)), "in {within:?}");
    }
}

#[test]
fn another_format_is_not_tried() {
    let mut blob = golden("client_idle");
    blob[5] = 2;
    assert_eq!(state::decode::<Tunnel>(&blob).map(drop), Err(RestoreError::Version { found: 2 }));
}

#[test]
fn a_part_of_a_snapshot_is_none() {
    for State { name, .. } in STATES {
        let blob = golden(name);
        for length in (0..blob.len().min(3_000)).chain([blob.len() - 1]) {
            assert!(state::decode::<Tunnel>(&blob[..length]).is_err(), "{name} up to {length}");
        }
    }
}

/// What a mangled snapshot restores to may be nonsense, but it can be used.
#[test]
fn a_mangled_snapshot_is_refused_or_does_no_harm() {
    let mut rng = StdRng::seed_from_u64(1);
    let plaintext = [
        &peer::ping(1)[..],
        &peer::connect(7),
        &peer::data(1, b"some"),
        &peer::settings(&[(4, 10)]),
        &peer::window_update(0, 5),
        &peer::go_away(1, frame::ErrorCode::NO_ERROR),
    ]
    .concat();
    let mut restored = 0;
    for round in 0..6_000 {
        let mut blob = golden(STATES[round % STATES.len()].name);
        for _ in 0..rng.random_range(1..4) {
            // Mostly in what is not payload.
            let at = rng.random_range(0..blob.len().min(1_500));
            match rng.random_range(0..4) {
                0 => blob[at] = rng.random(),
                1 => blob[at] ^= 1 << rng.random_range(0..8),
                2 => blob[at] = [0, 0xff, 0x7f, 0x80][rng.random_range(0..4)],
                _ => {
                    let end = blob.len().min(at + 8);
                    blob[at..end].fill([0, 0xff][rng.random_range(0..2)]);
                }
            }
        }
        if let Ok(tunnel) = state::decode::<Tunnel>(&blob) {
            restored += 1;
            exercise(tunnel, &plaintext);
        }
    }
    assert!(restored > 500, "{restored} were restored");
}

/// A slab is 16 KiB: a blob must not turn a byte into one.
#[test]
fn restoring_costs_about_as_much_as_was_saved() {
    const OUT: u16 = 8;
    const CIPHERTEXT: u16 = 1;
    const PLAINTEXT: u16 = 2;
    let blob = golden("client_idle");
    let unsealed = |count: usize| {
        let record = [&PLAINTEXT.to_be_bytes()[..], &2u32.to_be_bytes(), &[23, 0]].concat().repeat(count);
        state::decode::<Tunnel>(&with(&blob, Some(OUT), &record)).map(drop)
    };
    assert_eq!(unsealed(200), Ok(()));
    assert!(matches!(unsealed(300), Err(RestoreError::Invalid { tag: PLAINTEXT, .. })));
    let sealed = field(CIPHERTEXT).repeat(2);
    let sealed = state::decode::<Tunnel>(&with(&blob, Some(OUT), &sealed)).map(drop);
    assert_eq!(sealed, Err(RestoreError::Repeated(CIPHERTEXT)));
}
