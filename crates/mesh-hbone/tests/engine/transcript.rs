//! Saved and restored anywhere, a tunnel says and hears the same, to the byte.

use std::mem;

use mesh_hbone::{
    Budget,
    engine::{
        conn::{Conn, Local, Role},
        handshake::{Established, Handshake},
        out::Out,
        record::Suite,
        state,
        tunnel::Tunnel,
    },
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use crate::{
    certificates::{Parties, name},
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
    for seed in 0..150 {
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
    for seed in 0..40 {
        let script = a_script(seed, 60, false);
        let plain = plainly(&blobs, &script);
        bytes += plain.iter().map(|transcript| transcript.said.len()).sum::<usize>();
        let run = script::run(&blobs, &script, Style { piece: 1, cut: &mut || [false; 2] });
        compare(seed, "byte by byte", &run, &plain);
        let run = script::run(&blobs, &script, Style { piece: 1, cut: &mut || [true; 2] });
        compare(seed, "byte by byte, restored at each", &run, &plain);
    }
    assert!(bytes > 40_000, "hardly anything was said: {bytes} bytes");
}

#[test]
fn now_and_then_in_pieces_of_any_size() {
    let blobs = saved(script::pair(Suite::Aes128GcmSha256, script::local()));
    for seed in 0..150 {
        let script = a_script(seed, 200, true);
        let plain = plainly(&blobs, &script);
        let mut rng = StdRng::seed_from_u64(seed);
        let piece = 1 << rng.random_range(5..15);
        let mut cut = || [rng.random_range(0..4) == 0, rng.random_range(0..4) == 0];
        let run = script::run(&blobs, &script, Style { piece, cut: &mut cut });
        compare(seed, "now and then", &run, &plain);
    }
}

/// The scripts are worth what they reach.
#[test]
fn scripts_reach_what_matters() {
    let blobs = both_sizes();
    let mut heard = Vec::new();
    let mut said = 0;
    for seed in 0..150 {
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
