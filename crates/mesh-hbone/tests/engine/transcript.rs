//! Saved and restored anywhere, a tunnel says and hears the same, to the byte.

use std::mem;

use mesh_hbone::{
    Budget,
    engine::{
        conn::{Conn, Local, Role},
        frame::{self, END_HEADERS, END_STREAM, ErrorCode, Kind, PADDED},
        handshake::{Established, Handshake},
        out::Out,
        record::{ContentType, Suite},
        state,
        tunnel::Tunnel,
    },
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use crate::{
    certificates::{Parties, name},
    peer::{self, Heard, Peer},
    script::{self, Style, Transcript},
};

/// Two tunnels with the keys of a handshake.
fn shake_hands(local: Local) -> [Tunnel; 2] {
    let parties = Parties::new();
    let mut client = Handshake::client(&parties.client, name()).unwrap();
    let mut server = Handshake::server(&parties.server).unwrap();
    let (mut to_server, mut to_client) = (Vec::new(), Vec::new());
    while !client.is_done() || !server.is_done() {
        client.write(&mut to_server);
        let read = server.read(&to_server).unwrap();
        to_server.drain(..read);
        server.write(&mut to_client);
        let read = client.read(&to_client).unwrap();
        to_client.drain(..read);
    }
    assert!(to_server.is_empty() && to_client.is_empty());
    [(Role::Client, client), (Role::Server, server)].map(|(role, handshake)| {
        let Established { seal, open, post_handshake, alpn, peer_certificates } = handshake.finish().unwrap();
        assert_eq!((alpn.as_deref(), peer_certificates.len()), (Some(&b"h2"[..]), 1));
        let mut out = Out::default();
        let conn = Conn::new(role, local, Budget::default(), &mut out);
        Tunnel::new(seal, open, post_handshake, conn, out)
    })
}

/// What small windows stop, and what larger ones let through until the connection's is full.
fn both_sizes() -> [[Vec<u8>; 2]; 2] {
    [3_000, 60_000].map(|stream_window| saved(shake_hands(Local { stream_window, ..script::local() })))
}

fn saved(tunnels: [Tunnel; 2]) -> [Vec<u8>; 2] {
    tunnels.map(|tunnel| state::encode(&tunnel).to_vec())
}

/// As many steps, some of which send much if `large`.
fn a_script(seed: u64, steps: usize, large: bool) -> Vec<u8> {
    // How often each step is taken, by its number.
    const WEIGHTS: [u32; 13] = [30, 30, 8, 8, 40, 12, 4, 1, 6, 1, 0, 0, 12];
    let mut rng = StdRng::seed_from_u64(seed);
    let mut script = Vec::new();
    let mut add = |kind: u8, side: u8, how: u8| script.extend([kind << 1 | side, how]);
    // Everything begins with the peer's SETTINGS.
    for side in [0, 1, 0, 1] {
        add(0, side, 0xff);
        add(1, 1 - side, 0xff);
    }
    let drains = rng.random_range(0..3 * steps);
    for step in 0..steps {
        let mut pick = rng.random_range(0..WEIGHTS.iter().sum());
        let kind = WEIGHTS.iter().position(|weight| match pick.checked_sub(*weight) {
            Some(rest) => {
                pick = rest;
                false
            }
            None => true,
        });
        let kind = u8::try_from(kind.expect("within the sum")).expect("a few");
        let [side, how]: [u8; 2] = rng.random();
        let how = match kind {
            2 if (100..240).contains(&how) => how & !1,
            4 if !large => how & !4,
            _ => how,
        };
        add(if step == drains { 10 + (how & 1) } else { kind }, side & 1, how);
    }
    script
}

fn compare(seed: u64, what: &str, run: &[Transcript; 2], plain: &[Transcript; 2]) {
    for (side, (run, plain)) in ["client", "server"].iter().zip(run.iter().zip(plain)) {
        let different = run.heard.iter().zip(&plain.heard).position(|(one, other)| one != other);
        if let Some(at) = different {
            panic!("seed {seed}, {what}: {side} heard {} instead of {}", run.heard[at], plain.heard[at]);
        }
        assert_eq!(run.heard.len(), plain.heard.len(), "seed {seed}, {what}: {side} heard more or less");
        assert!(run.said == plain.said, "seed {seed}, {what}: {side} said something else");
    }
}

fn plainly(blobs: &[Vec<u8>; 2], script: &[u8]) -> [Transcript; 2] {
    script::run(blobs, script, Style { piece: usize::MAX, cut: &mut || [false; 2] })
}

#[test]
fn between_any_two_steps() {
    let blobs = both_sizes();
    for seed in 0..60 {
        let blobs = &blobs[usize::from(seed % 2 == 0)];
        let script = a_script(seed, 150, true);
        let plain = plainly(blobs, &script);
        for (what, cut) in [("both", [true; 2]), ("client", [true, false]), ("server", [false, true])] {
            let run = script::run(blobs, &script, Style { piece: usize::MAX, cut: &mut || cut });
            compare(seed, what, &run, &plain);
        }
    }
}

#[test]
fn between_any_two_bytes() {
    let blobs = saved(shake_hands(script::local()));
    let mut bytes = 0;
    for seed in 0..12 {
        let script = a_script(seed, 60, false);
        let plain = plainly(&blobs, &script);
        bytes += plain.iter().map(|transcript| transcript.said.len()).sum::<usize>();
        let run = script::run(&blobs, &script, Style { piece: 1, cut: &mut || [false; 2] });
        compare(seed, "byte by byte", &run, &plain);
        let run = script::run(&blobs, &script, Style { piece: 1, cut: &mut || [true; 2] });
        compare(seed, "byte by byte, restored at each", &run, &plain);
    }
    assert!(bytes > 10_000, "hardly anything was said: {bytes} bytes");
}

#[test]
fn now_and_then_in_pieces_of_any_size() {
    let blobs = saved(script::pair(Suite::Aes128GcmSha256, script::local()));
    for seed in 0..60 {
        let script = a_script(seed, 200, true);
        let plain = plainly(&blobs, &script);
        let mut rng = StdRng::seed_from_u64(seed);
        let piece = 1 << rng.random_range(5..15);
        let mut cut = || [rng.random_range(0..4) == 0, rng.random_range(0..4) == 0];
        let run = script::run(&blobs, &script, Style { piece, cut: &mut cut });
        compare(seed, "now and then", &run, &plain);
    }
}

/// Our own frames never span records; others' may, and are padded, interrupted and odd.
#[test]
fn between_any_two_bytes_of_a_peer_that_cuts_its_frames_anywhere() {
    let block = peer::block(&peer::CONNECT);
    let requests = [
        &frame::PREFACE[..],
        &peer::settings(&[(1, 0), (4, 100), (9, 9)]),
        &peer::frame(Kind::Headers, 0, 1, &block[..5]),
        &peer::frame(Kind::Continuation, 0, 1, b""),
        &peer::frame(Kind::Continuation, END_HEADERS, 1, &block[5..]),
        &peer::frame(Kind::Data, PADDED, 1, b"\x03payload\0\0\0"),
        &peer::settings_ack(),
        &peer::frame(Kind::Unknown(77), 3, 1, b"what"),
        &peer::frame(Kind::Data, END_STREAM, 1, b"the rest"),
        &peer::connect(3),
        &peer::reset(3, ErrorCode::CANCEL),
        &peer::ping(1),
        &peer::window_update(0, 9),
        &peer::data(3, b"for nobody"),
        &peer::frame(Kind::GoAway, 0, 0, b"\0\0\0\0\0\0\0\0for people to read"),
        &peer::data(0, b"wrong"),
    ];
    let answers = [
        &peer::settings(&[(3, 3)])[..],
        &peer::frame(Kind::Headers, PADDED, 1, &[&[2][..], &peer::block(&[(":status", "103")]), &[0, 0]].concat()),
        &peer::frame(Kind::Continuation, END_HEADERS, 1, b""),
        &peer::ok(1),
        &peer::settings_ack(),
        &peer::data(1, b"payload"),
        &peer::headers(1, END_STREAM, &[("trailer", "x")]),
        &peer::go_away(3, ErrorCode::NO_ERROR),
        &peer::data(3, b"before the answer"),
        &peer::headers(2, 0, &[]),
    ];
    for (role, session) in [(Role::Server, requests.concat()), (Role::Client, answers.concat())] {
        for size in [1, 4, 9, 40, 10_000] {
            let plain = told(role, &session, size, usize::MAX);
            assert!(plain.0.len() > 7 && plain.1.len() > 5, "{plain:?}");
            assert_eq!(told(role, &session, size, 1), plain, "{role:?} in records of {size}");
            assert_eq!(told(role, &session, size, 7), plain, "{role:?} in records of {size}");
        }
    }
}

/// What an end hears and says, restored after every `piece` bytes of ciphertext.
fn told(role: Role, session: &[u8], size: usize, piece: usize) -> (Vec<String>, Vec<String>) {
    let mut peer = Peer::new(role, peer::local());
    let (mut heard, mut said) = (Vec::new(), Vec::new());
    if role == Role::Client {
        for _ in 0..3 {
            peer.tunnel.conn.connect("10.0.0.1:80", std::iter::empty(), &mut peer.tunnel.out).unwrap();
        }
    }
    for record in session.chunks(size) {
        let record = peer.sealed(ContentType::ApplicationData, record);
        for piece in record.chunks(piece) {
            let Heard { events, result } = peer.say_ciphertext(piece);
            heard.extend(events);
            if let Err(error) = result {
                heard.push(error.to_string());
                said.extend(peer.said());
                return (heard, said);
            }
            peer.tunnel = state::decode(&state::encode(&peer.tunnel)).unwrap();
        }
        said.extend(peer.said());
    }
    panic!("the session ends with something wrong");
}

/// The scripts are worth what they reach.
#[test]
fn scripts_reach_what_matters() {
    let blobs = both_sizes();
    let mut heard = Vec::new();
    let mut said = 0;
    for seed in 0..80 {
        for mut transcript in plainly(&blobs[usize::from(seed % 2 == 0)], &a_script(seed, 150, true)) {
            said += transcript.said.len();
            heard.append(&mut mem::take(&mut transcript.heard));
        }
    }
    println!("{} events, {said} bytes", heard.len());
    for needle in [
        "Request {",
        "Response {",
        "End {",
        "Reset {",
        "code: ErrorCode(7)",
        "Writable {",
        "AllWritable",
        "Limits",
        "GoingAway",
        "Full",
        ": Stream",
        "closed",
        "Malformed {",
    ] {
        let count = heard.iter().filter(|line| line.contains(needle)).count();
        println!("{needle}: {count}");
        assert!(count > 0, "no script led to {needle}");
    }
}
