//! HTTP/2, frame by frame: what RFC 9113 says about a connection that carries CONNECTs, from both ends.

use std::time::Duration;

use http::{HeaderMap, StatusCode};
use mesh_hbone::engine::{
    conn::{CannotOpen, Local, Room},
    frame::{self, END_HEADERS, END_STREAM, ErrorCode, Kind, MAX_STREAM_ID, MAX_WINDOW, PADDED, PRIORITY, setting},
    out::{Filled, MAX_READ},
    record::ContentType,
    state,
    tunnel::{Tunnel, TunnelError},
};

use crate::peer::{
    self, CONNECT, Heard, Peer, connect, data, frame, go_away, headers, ok, ping, reset, settings, window_update,
};

fn server() -> Peer {
    Peer::of_server(peer::local())
}

/// With stream 1 open and answered.
fn serving() -> Peer {
    let mut peer = server();
    assert_eq!(peer.ok(&connect(1)), ["1: CONNECT 10.0.0.1:80"]);
    respond(&mut peer, 1);
    assert_eq!(peer.said(), ["HEADERS 1"]);
    peer
}

/// A client with stream 1 asked for.
fn asking() -> Peer {
    let mut peer = Peer::of_client(peer::local());
    assert_eq!(open(&mut peer), Ok(1));
    peer.frames();
    peer
}

/// A client with stream 1 open.
fn dialled() -> Peer {
    let mut peer = asking();
    assert_eq!(peer.ok(&ok(1)), ["1: 200"]);
    peer
}

fn open(peer: &mut Peer) -> Result<u32, CannotOpen> {
    peer.tunnel.conn.connect("10.0.0.1:80", std::iter::empty(), &mut peer.tunnel.out)
}

fn respond(peer: &mut Peer, stream: u32) {
    assert!(peer.tunnel.conn.respond(stream, StatusCode::OK, &HeaderMap::new(), false, &mut peer.tunnel.out));
}

/// Sends as much as may be sent, up to `bytes`; how much that was.
fn send(peer: &mut Peer, stream: u32, bytes: usize) -> usize {
    let mut sent = 0;
    while sent < bytes
        && let Room::Bytes(room) = peer.tunnel.conn.room(stream)
    {
        let read = |slices: &mut [std::io::IoSliceMut<'_>]| {
            Ok(slices.iter().map(|slice| slice.len()).sum::<usize>().min(bytes - sent))
        };
        let filled = peer.tunnel.out.fill(stream, room.min(MAX_READ), read);
        let Filled { bytes, frames, .. } = filled.expect("memory can be read");
        peer.tunnel.conn.sent(stream, bytes, frames);
        sent += bytes;
    }
    sent
}

fn end(stream: u32) -> Vec<u8> {
    frame(Kind::Data, END_STREAM, stream, b"")
}

fn is_full(peer: &mut Peer) -> bool {
    open(peer) == Err(CannotOpen::Full)
}

mod opening {
    use super::*;

    #[test]
    fn each_end_begins_with_settings() {
        let mut client = Peer::new(mesh_hbone::engine::conn::Role::Client, peer::local());
        assert_eq!(client.said(), ["Settings 0 30", "WINDOW_UPDATE 0 983041"]);
        let mut server = Peer::new(mesh_hbone::engine::conn::Role::Server, peer::local());
        assert_eq!(server.said(), ["Settings 0 30", "WINDOW_UPDATE 0 983041"]);
    }

    #[test]
    fn settings_come_first_and_are_acknowledged() {
        let new = || Peer::new(mesh_hbone::engine::conn::Role::Client, peer::local());
        let mut client = new();
        assert_eq!(client.ok(&settings(&[])), ["limits"]);
        assert_eq!(client.said().last().map(String::as_str), Some("SETTINGS ACK"));
        for first in [ping(1), peer::settings_ack(), window_update(0, 1), go_away(0, ErrorCode::NO_ERROR)] {
            new().breaks(&first, ErrorCode::PROTOCOL_ERROR, "the first frame");
        }
    }

    #[test]
    fn a_server_wants_the_preface() {
        let mut server = Peer::new(mesh_hbone::engine::conn::Role::Server, peer::local());
        server.breaks(b"GET / HTTP/1.1\r\n", ErrorCode::PROTOCOL_ERROR, "preface");
        let mut server = Peer::new(mesh_hbone::engine::conn::Role::Server, peer::local());
        let mut almost = *frame::PREFACE;
        almost[23] = b' ';
        server.breaks(&almost, ErrorCode::PROTOCOL_ERROR, "preface");
    }

    /// RFC 9113 §3.4: a server's first frame is SETTINGS, even if there is nothing else to say.
    #[test]
    fn settings_come_before_a_goodbye() {
        let mut server = Peer::new(mesh_hbone::engine::conn::Role::Server, peer::local());
        assert!(server.say(b"GET / HTTP/1.1\r\n").result.is_err());
        assert_eq!(server.said(), ["Settings 0 30", "WINDOW_UPDATE 0 983041", "GOAWAY 0 PROTOCOL_ERROR"]);
    }

    #[test]
    fn what_is_said_may_be_cut_anywhere() {
        let session = [
            &frame::PREFACE[..],
            &settings(&[]),
            &peer::settings_ack(),
            &connect(1),
            &frame(Kind::Data, PADDED, 1, b"\x02hello\0\0"),
            &ping(7),
            &headers(1, END_STREAM, &[("trailer", "x")]),
        ]
        .concat();
        for size in [1, 2, 3, 5, 8, 13, 100] {
            let mut server = Peer::new(mesh_hbone::engine::conn::Role::Server, peer::local());
            let Heard { events, result } = server.say_in(&session, size);
            assert_eq!(result, Ok(()));
            let (data, others): (Vec<String>, Vec<_>) =
                events.into_iter().partition(|event| event.starts_with("1: \""));
            assert_eq!(data.join("").replace("\"1: \"", ""), "1: \"hello\"", "in pieces of {size}");
            assert_eq!(others, ["limits", "1: CONNECT 10.0.0.1:80", "1: end"]);
        }
    }
}

mod frames {
    use super::*;

    #[test]
    fn what_is_unknown_or_deprecated_is_skipped() {
        let mut peer = serving();
        let said = [
            frame(Kind::Unknown(0xfa), 0xff, 1, &[1; 300]),
            frame(Kind::Unknown(0x0b), 0, 0, b""),
            frame(Kind::Priority, 0, 1, &[0; 5]),
            frame(Kind::Priority, 0, 99, &[0; 5]),
            data(1, b"after"),
        ];
        assert_eq!(peer.ok(&said.concat()), ["1: \"after\""]);
        // RFC 9113 §6.5.2: parameters and flags, too.
        assert_eq!(peer.ok(&settings(&[(0xf00, 7), (0, 0)])), ["limits"]);
        assert_eq!(peer.ok(&frame(Kind::Ping, 0xfe, 0, b"12345678")), [""; 0]);
        assert_eq!(peer.said(), ["SETTINGS ACK", "PONG [49, 50, 51, 52, 53, 54, 55, 56]"]);
    }

    #[test]
    fn sizes_are_what_they_must_be() {
        let size = ErrorCode::FRAME_SIZE_ERROR;
        for (said, why) in [
            (frame(Kind::Data, 0, 1, &[0; 16_385]), "beyond"),
            (frame(Kind::Data, PADDED, 1, b""), "padding"),
            (frame(Kind::Headers, PADDED | END_HEADERS, 3, b""), "shorter"),
            (frame(Kind::Headers, PRIORITY | END_HEADERS, 3, b"1234"), "shorter"),
            (frame(Kind::RstStream, 0, 1, b"123"), "wrong size"),
            (frame(Kind::Settings, 0, 0, b"12345"), "a part"),
            (frame(Kind::Settings, frame::ACK, 0, b"123456"), "acknowledgement"),
            (frame(Kind::Ping, 0, 0, b"1234567"), "wrong size"),
            (frame(Kind::GoAway, 0, 0, b"1234567"), "short"),
            (frame(Kind::WindowUpdate, 0, 1, b"12345"), "wrong size"),
        ] {
            serving().breaks(&said, size, why);
        }
        // Of one stream only.
        let mut peer = serving();
        assert_eq!(peer.ok(&frame(Kind::Priority, 0, 1, b"1234")), ["1: FRAME_SIZE_ERROR"]);
        assert_eq!(peer.said(), ["RST_STREAM 1 FRAME_SIZE_ERROR"]);
    }

    #[test]
    fn each_is_about_a_stream_or_about_the_connection() {
        for said in [
            frame(Kind::Data, 0, 0, b"x"),
            frame(Kind::Headers, END_HEADERS, 0, &peer::block(&CONNECT)),
            frame(Kind::Priority, 0, 0, &[0; 5]),
            reset(0, ErrorCode::CANCEL),
            frame(Kind::Settings, 0, 1, b""),
            frame(Kind::Ping, 0, 1, &[0; 8]),
            frame(Kind::GoAway, 0, 1, &[0; 8]),
        ] {
            serving().breaks(&said, ErrorCode::PROTOCOL_ERROR, "");
        }
    }

    #[test]
    fn nothing_is_pushed() {
        serving().breaks(&frame(Kind::PushPromise, 0, 1, &[0; 8]), ErrorCode::PROTOCOL_ERROR, "PUSH_PROMISE");
        dialled().breaks(&frame(Kind::PushPromise, 0, 1, &[0; 8]), ErrorCode::PROTOCOL_ERROR, "PUSH_PROMISE");
        dialled().breaks(&settings(&[(setting::ENABLE_PUSH, 1)]), ErrorCode::PROTOCOL_ERROR, "PUSH");
        serving().breaks(&settings(&[(setting::ENABLE_PUSH, 2)]), ErrorCode::PROTOCOL_ERROR, "PUSH");
        assert_eq!(serving().ok(&settings(&[(setting::ENABLE_PUSH, 1)])), ["limits"]);
    }

    #[test]
    fn padding_is_read_past_and_costs_credit() {
        let mut peer = serving();
        let padded = |padding: u8, text: &[u8], flags| {
            frame(Kind::Data, PADDED | flags, 1, &[&[padding][..], text, &vec![0; padding.into()]].concat())
        };
        assert_eq!(peer.ok(&padded(0, b"none", 0)), ["1: \"none\""]);
        assert_eq!(peer.ok(&padded(200, b"much", 0)), ["1: \"much\""]);
        assert_eq!(peer.ok(&padded(3, b"", END_STREAM)), ["1: end"]);
        peer.breaks(&frame(Kind::Data, PADDED, 1, &[5, 0, 0, 0, 0]), ErrorCode::PROTOCOL_ERROR, "more padding");

        // As padding is never taken by anybody, its credit comes back at once.
        let mut peer = serving();
        for _ in 0..2_000 {
            assert_eq!(peer.ok(&padded(255, b"hello, hello, hello", 0)), ["1: \"hello, hello, hello\""]);
            peer.tunnel.conn.consumed(1, 19, &mut peer.tunnel.out);
        }
        let said = peer.said();
        assert!(said.iter().any(|frame| frame.starts_with("WINDOW_UPDATE 1 ")), "{said:?}");
        assert!(said.iter().any(|frame| frame.starts_with("WINDOW_UPDATE 0 ")), "{said:?}");
    }
}

mod heads {
    use super::*;

    #[test]
    fn padding_and_priority_of_headers_mean_nothing() {
        let block = peer::block(&CONNECT);
        let mut peer = server();
        let padded = [&[4][..], &block, &[0; 4]].concat();
        assert_eq!(peer.ok(&frame(Kind::Headers, PADDED | END_HEADERS, 1, &padded)), ["1: CONNECT 10.0.0.1:80"]);
        let both = [&[4, 0x80, 0, 0, 1, 7][..], &block, &[0; 4]].concat();
        let flags = PADDED | PRIORITY | END_HEADERS | END_STREAM;
        assert_eq!(peer.ok(&frame(Kind::Headers, flags, 3, &both)), ["3: CONNECT 10.0.0.1:80", "3: end"]);
        let itself = [&[0, 0, 0, 5, 7][..], &block].concat();
        let said = frame(Kind::Headers, PRIORITY | END_HEADERS, 5, &itself);
        peer.breaks(&said, ErrorCode::PROTOCOL_ERROR, "depends on itself");
        let short = frame(Kind::Headers, PADDED | END_HEADERS, 1, &[4, 0, 0]);
        server().breaks(&short, ErrorCode::PROTOCOL_ERROR, "more padding");
    }

    #[test]
    fn a_block_may_come_in_pieces_but_not_be_interrupted() {
        let block = peer::block(&CONNECT);
        let begin = frame(Kind::Headers, END_STREAM, 1, &block[..3]);
        let more = frame(Kind::Continuation, 0, 1, &block[3..7]);
        let last = frame(Kind::Continuation, END_HEADERS, 1, &block[7..]);
        let mut peer = server();
        let events = peer.ok(&[&begin[..], &more, &last].concat());
        assert_eq!(events, ["1: CONNECT 10.0.0.1:80", "1: end"], "the end is that of HEADERS");
        for other in [
            ping(1),
            connect(3),
            frame(Kind::Continuation, 0, 3, b""),
            frame(Kind::Unknown(99), 0, 1, b""),
            data(1, b""),
        ] {
            server().breaks(&[begin.clone(), other].concat(), ErrorCode::PROTOCOL_ERROR, "interrupted");
        }
        server().breaks(&more, ErrorCode::PROTOCOL_ERROR, "CONTINUATION without");
    }

    #[test]
    fn requests_that_are_none_are_reset() {
        let path = [(":method", "GET"), (":scheme", "https"), (":path", "/")];
        let with = |name, value| [CONNECT[0], CONNECT[1], (name, value)];
        for fields in [
            &[(":authority", "a:1")][..],
            &path[..2],
            &[path[0], path[2]],
            &[path[0], path[1], (":path", "")],
            &[CONNECT[0], CONNECT[0], CONNECT[1]],
            &with(":scheme", "https"),
            &with(":path", "/"),
            &with(":status", "200"),
            &with(":unknown", "x"),
            &with("Upper", "x"),
            &with("connection", "close"),
            &with("transfer-encoding", "chunked"),
            &with("te", "gzip"),
            &with("", "x"),
            &with("sp ace", "x"),
            &with("new", "li\nne"),
            &[("host", "a"), CONNECT[0], CONNECT[1]],
        ] {
            let mut peer = server();
            let events = peer.ok(&headers(1, 0, fields));
            assert!(matches!(&events[..], [one] if one.starts_with("malformed: ")), "{fields:?}: {events:?}");
            assert_eq!(peer.said(), ["RST_STREAM 1 PROTOCOL_ERROR"], "{fields:?}");
            assert_eq!(peer.ok(&connect(3)), ["3: CONNECT 10.0.0.1:80"]);
        }
        for fields in [&path[..], &with("te", "trailers"), &with("x", ""), &CONNECT[..1]] {
            assert_eq!(server().ok(&headers(1, 0, fields)).len(), 1, "{fields:?}");
        }
    }

    #[test]
    fn a_block_that_cannot_be_decompressed_ends_everything() {
        let nonsense = frame(Kind::Headers, END_HEADERS, 1, &[0xff; 20]);
        server().breaks(&nonsense, ErrorCode::COMPRESSION_ERROR, "decompressed");
        // Also for a stream that nobody wants any more.
        let mut peer = serving();
        peer.tunnel.conn.reset(1, ErrorCode::CANCEL, &mut peer.tunnel.out);
        peer.breaks(&nonsense, ErrorCode::COMPRESSION_ERROR, "decompressed");
        // RFC 9113 §4.3.1: we have set the table's size to 0, and the peer has acknowledged.
        let silent = frame(Kind::Headers, END_HEADERS, 1, b"\x42\x07CONNECT\x41\x03a:1");
        server().breaks(&silent, ErrorCode::COMPRESSION_ERROR, "decompressed");
    }

    #[test]
    fn a_list_that_is_too_large_is_answered() {
        let value = "v".repeat(1_000);
        let mut peer = server();
        let large = headers(1, 0, &[CONNECT[0], CONNECT[1], ("a", &value)]);
        assert_eq!(peer.ok(&large), ["malformed: the header list is too large"]);
        assert_eq!(peer.said(), ["HEADERS 1 END", "RST_STREAM 1 NO_ERROR"]);
        assert_eq!(peer.ok(&[data(1, b"on its way"), end(1)].concat()), [""; 0]);
        assert_eq!(peer.said(), [""; 0]);
        // An answer that is too large is one we cannot take.
        let mut peer = asking();
        let large = headers(1, 0, &[(":status", "200"), ("a", &value)]);
        assert_eq!(peer.ok(&large), ["1: ENHANCE_YOUR_CALM"]);
    }

    #[test]
    fn trailers_end_a_stream() {
        let trailers = headers(1, END_STREAM, &[("grpc-status", "0")]);
        assert_eq!(serving().ok(&trailers), ["1: end"]);
        assert_eq!(dialled().ok(&trailers), ["1: end"]);
        for wrong in
            [headers(1, 0, &[("a", "b")]), headers(1, END_STREAM, &CONNECT), headers(1, END_STREAM, &[("A", "b")])]
        {
            let mut peer = serving();
            assert_eq!(peer.ok(&wrong), ["1: PROTOCOL_ERROR"]);
            assert_eq!(peer.said(), ["RST_STREAM 1 PROTOCOL_ERROR"]);
            assert_eq!(dialled().ok(&wrong), ["1: PROTOCOL_ERROR"]);
        }
    }

    #[test]
    fn interim_answers_are_passed_over() {
        let interim = |status| headers(1, 0, &[(":status", status), ("link", "x")]);
        assert_eq!(asking().ok(&[interim("103"), interim("100"), ok(1)].concat()), ["1: 200"]);
        for wrong in [
            interim("101"),
            headers(1, END_STREAM, &[(":status", "103")]),
            headers(1, 0, &[(":status", "20")]),
            headers(1, 0, &[("no", "status")]),
            headers(1, 0, &CONNECT),
        ] {
            assert_eq!(asking().ok(&wrong), ["1: PROTOCOL_ERROR"]);
        }
        let whole = headers(1, END_STREAM, &[(":status", "403")]);
        assert_eq!(asking().ok(&whole), ["1: 403", "1: end"]);
        // Data before the answer.
        assert_eq!(asking().ok(&data(1, b"x")), ["1: PROTOCOL_ERROR"]);
        assert_eq!(asking().ok(&[interim("103"), data(1, b"x")].concat()), ["1: PROTOCOL_ERROR"]);
    }
}

mod streams {
    use super::*;

    #[test]
    fn are_opened_by_the_client_in_order() {
        let mut peer = server();
        assert_eq!(peer.ok(&connect(5)), ["5: CONNECT 10.0.0.1:80"]);
        peer.breaks(&connect(3), ErrorCode::STREAM_CLOSED, "over");
        server().breaks(&connect(2), ErrorCode::PROTOCOL_ERROR, "even");
        dialled().breaks(&ok(2), ErrorCode::PROTOCOL_ERROR, "never opened");
        dialled().breaks(&ok(3), ErrorCode::PROTOCOL_ERROR, "never opened");
    }

    #[test]
    fn cannot_be_spoken_of_before_they_are_opened() {
        for said in [data(3, b"x"), reset(3, ErrorCode::CANCEL), window_update(3, 1), window_update(2, 1), data(2, b"")]
        {
            serving().breaks(&said, ErrorCode::PROTOCOL_ERROR, "never opened");
            dialled().breaks(&said, ErrorCode::PROTOCOL_ERROR, "never opened");
        }
    }

    #[test]
    fn end_in_each_direction_by_itself() {
        let mut peer = serving();
        assert_eq!(peer.ok(&frame(Kind::Data, END_STREAM, 1, b"bye")), ["1: \"bye\"", "1: end"]);
        assert_eq!(send(&mut peer, 1, 10), 10);
        peer.tunnel.conn.finish(1, &mut peer.tunnel.out);
        peer.tunnel.conn.finish(1, &mut peer.tunnel.out);
        assert_eq!(peer.said(), ["DATA 1 10", "DATA 1 0 END"]);
        assert_eq!(peer.tunnel.conn.open_streams(), 0);
        assert_eq!(peer.tunnel.conn.room(1), Room::Closed);

        let mut peer = serving();
        peer.tunnel.conn.finish(1, &mut peer.tunnel.out);
        assert_eq!(peer.tunnel.conn.room(1), Room::Closed);
        assert_eq!(peer.ok(&[data(1, b"still"), end(1)].concat()), ["1: \"still\"", "1: end"]);
        assert_eq!(peer.tunnel.conn.open_streams(), 0);
    }

    #[test]
    fn take_nothing_after_their_end() {
        let mut peer = serving();
        assert_eq!(peer.ok(&[end(1), data(1, b"more")].concat()), ["1: end", "1: STREAM_CLOSED"]);
        assert_eq!(peer.said(), ["RST_STREAM 1 STREAM_CLOSED"]);
        let mut peer = serving();
        peer.breaks(&[end(1), headers(1, END_STREAM, &[])].concat(), ErrorCode::STREAM_CLOSED, "after the end");
        let mut peer = dialled();
        assert_eq!(peer.ok(&[end(1), ok(1)].concat()), ["1: end", "1: STREAM_CLOSED"]);
    }

    #[test]
    fn that_are_over_are_spoken_of_in_vain() {
        // Ended by both.
        let mut peer = serving();
        peer.tunnel.conn.finish(1, &mut peer.tunnel.out);
        peer.ok(&end(1));
        peer.frames();
        let said = [window_update(1, 5), reset(1, ErrorCode::CANCEL), frame(Kind::Priority, 0, 1, &[0; 5])];
        assert_eq!(peer.ok(&said.concat()), [""; 0]);
        assert_eq!(peer.said(), [""; 0]);
        // More than that is answered once.
        assert_eq!(peer.ok(&data(1, b"x").repeat(5)), [""; 0]);
        assert_eq!(peer.said(), ["RST_STREAM 1 STREAM_CLOSED"]);

        // Reset by us: what was on its way is nobody's fault.
        let mut peer = serving();
        peer.tunnel.conn.reset(1, ErrorCode::CANCEL, &mut peer.tunnel.out);
        peer.tunnel.conn.reset(1, ErrorCode::CANCEL, &mut peer.tunnel.out);
        assert_eq!(peer.said(), ["RST_STREAM 1 CANCEL"]);
        let said =
            [data(1, b"x"), window_update(1, 5), headers(1, END_STREAM, &[("a", "b")]), reset(1, ErrorCode::CANCEL)];
        assert_eq!(peer.ok(&said.concat()), [""; 0]);
        assert_eq!(peer.said(), [""; 0]);

        // In the middle of a frame.
        let mut peer = serving();
        let whole = [frame(Kind::Data, END_STREAM, 1, &[7; 50]), ping(1)].concat();
        assert_eq!(peer.ok(&whole[..30]), ["1: 21 bytes"]);
        peer.tunnel.conn.reset(1, ErrorCode::CANCEL, &mut peer.tunnel.out);
        peer.ok(&whole[30..]);
        assert_eq!(peer.said(), ["RST_STREAM 1 CANCEL", "PONG [0, 0, 0, 0, 0, 0, 0, 1]"]);
    }

    #[test]
    fn are_reset_by_the_peer() {
        let mut peer = serving();
        assert_eq!(peer.ok(&reset(1, ErrorCode::CONNECT_ERROR)), ["1: CONNECT_ERROR"]);
        assert_eq!((peer.tunnel.conn.room(1), peer.tunnel.conn.open_streams()), (Room::Closed, 0));
        assert_eq!(peer.ok(&headers(3, END_STREAM, &CONNECT)), ["3: CONNECT 10.0.0.1:80", "3: end"]);
        assert_eq!(peer.ok(&reset(3, ErrorCode(0xabcd))), ["3: error 0xabcd"]);
        // The answer is complete, and the rest of the request is not wanted.
        let whole = headers(1, END_STREAM, &[(":status", "403")]);
        assert_eq!(asking().ok(&[whole, reset(1, ErrorCode::NO_ERROR)].concat()), ["1: 403", "1: end", "1: NO_ERROR"]);
    }

    #[test]
    fn are_answered_once() {
        let mut peer = server();
        peer.ok(&connect(1));
        let no = HeaderMap::new();
        let Tunnel { conn, out, .. } = &mut peer.tunnel;
        assert!(conn.respond(1, StatusCode::OK, &no, false, out));
        assert!(!conn.respond(1, StatusCode::OK, &no, false, out));
        assert!(!conn.respond(3, StatusCode::OK, &no, false, out));
        peer.ok(&[connect(3), reset(3, ErrorCode::CANCEL)].concat());
        let Tunnel { conn, out, .. } = &mut peer.tunnel;
        assert!(!conn.respond(3, StatusCode::OK, &no, false, out), "it was given up");
        assert_eq!(peer.said(), ["HEADERS 1"]);
    }

    #[test]
    fn are_as_many_as_the_server_says() {
        let mut peer = Peer::of_server(Local { max_streams: 2, ..peer::local() });
        assert_eq!(peer.ok(&[connect(1), connect(3), connect(5)].concat()).len(), 2);
        assert_eq!(peer.said(), ["RST_STREAM 5 REFUSED_STREAM"]);
        peer.tunnel.conn.reset(1, ErrorCode::CANCEL, &mut peer.tunnel.out);
        assert_eq!(peer.ok(&connect(7)).len(), 1);

        let mut peer = Peer::of_client(peer::local());
        peer.ok(&settings(&[(setting::MAX_CONCURRENT_STREAMS, 2)]));
        assert_eq!(peer.tunnel.conn.peer_max_streams(), Some(2));
        assert_eq!((open(&mut peer), open(&mut peer)), (Ok(1), Ok(3)));
        assert!(is_full(&mut peer));
        assert_eq!(peer.ok(&reset(1, ErrorCode::REFUSED_STREAM)), ["limits", "1: REFUSED_STREAM"]);
        assert_eq!(open(&mut peer), Ok(5));
        assert!(is_full(&mut peer));
        peer.ok(&settings(&[(setting::MAX_CONCURRENT_STREAMS, 0)]));
        peer.tunnel.conn.reset(3, ErrorCode::CANCEL, &mut peer.tunnel.out);
        peer.tunnel.conn.reset(5, ErrorCode::CANCEL, &mut peer.tunnel.out);
        peer.pending();
        assert!(is_full(&mut peer), "the peer takes none now");
    }

    /// A blob, with the 32-bit number `tag` of the connection made `value`.
    fn with_number(blob: &[u8], tag: u16, value: u32) -> Vec<u8> {
        const CONN: u16 = 7;
        let field = |bytes: &[u8], tag: u16| {
            let mut at = 0;
            loop {
                let [a, b, l0, l1, l2, l3] = *bytes[at..].first_chunk().unwrap();
                if u16::from_be_bytes([a, b]) == tag {
                    return at + 6;
                }
                at += 6 + usize::try_from(u32::from_be_bytes([l0, l1, l2, l3])).unwrap();
            }
        };
        let conn = 6 + field(&blob[6..], CONN);
        let at = conn + field(&blob[conn..], tag);
        let mut blob = blob.to_vec();
        blob[at..at + 4].copy_from_slice(&value.to_be_bytes());
        blob
    }

    #[test]
    fn have_identifiers_that_run_out() {
        const NEXT_ID: u16 = 10;
        let mut peer = Peer::of_client(peer::local());
        let blob = with_number(&state::encode(&peer.tunnel), NEXT_ID, MAX_STREAM_ID - 2);
        peer.tunnel = state::decode(&blob).unwrap();
        assert_eq!(open(&mut peer), Ok(MAX_STREAM_ID - 2));
        assert!(!peer.tunnel.conn.is_going_away());
        assert_eq!(open(&mut peer), Ok(MAX_STREAM_ID));
        assert!(peer.tunnel.conn.is_going_away());
        assert_eq!(open(&mut peer), Err(CannotOpen::GoingAway));
        assert_eq!(peer.ok(&ok(MAX_STREAM_ID)), ["2147483647: 200"]);
        peer.tunnel = state::decode(&state::encode(&peer.tunnel)).unwrap();
        assert_eq!(open(&mut peer), Err(CannotOpen::GoingAway));

        let mut peer = server();
        assert_eq!(peer.ok(&connect(MAX_STREAM_ID)), ["2147483647: CONNECT 10.0.0.1:80"]);
        peer.breaks(&connect(1), ErrorCode::STREAM_CLOSED, "over");
    }
}

mod flow {
    use super::*;

    #[test]
    fn a_stream_stops_at_its_window_and_at_the_connections() {
        let mut peer = dialled();
        assert_eq!(send(&mut peer, 1, 100_000), 65_535);
        assert_eq!(peer.tunnel.conn.room(1), Room::Stream);
        assert_eq!(peer.ok(&window_update(1, 100)), ["1: writable"]);
        assert_eq!(peer.tunnel.conn.room(1), Room::Connection);
        assert_eq!(peer.ok(&window_update(0, 30)), ["writable"]);
        assert_eq!(send(&mut peer, 1, 100_000), 30);
        assert_eq!(peer.tunnel.conn.room(1), Room::Connection);
        // Who did not wait is not told.
        assert_eq!(peer.ok(&window_update(1, 100)), [""; 0]);
    }

    #[test]
    fn a_window_may_become_negative() {
        let mut peer = dialled();
        assert_eq!(send(&mut peer, 1, 1_000), 1_000);
        peer.ok(&settings(&[(setting::INITIAL_WINDOW_SIZE, 0)]));
        assert_eq!(peer.tunnel.conn.room(1), Room::Stream);
        assert_eq!(peer.ok(&window_update(1, 1_000)), [""; 0], "it is 0 now");
        assert_eq!(peer.tunnel.conn.room(1), Room::Stream);
        assert_eq!(peer.ok(&settings(&[(setting::INITIAL_WINDOW_SIZE, 7)])), ["1: writable", "limits"]);
        assert_eq!(peer.tunnel.conn.room(1), Room::Bytes(7));
        // A new stream begins with the new size.
        assert_eq!(open(&mut peer), Ok(3));
        peer.ok(&ok(3));
        assert_eq!(peer.tunnel.conn.room(3), Room::Bytes(7));
    }

    #[test]
    fn a_window_is_at_most_what_31_bits_hold() {
        let beyond = settings(&[(setting::INITIAL_WINDOW_SIZE, MAX_WINDOW + 1)]);
        serving().breaks(&beyond, ErrorCode::FLOW_CONTROL_ERROR, "2^31-1");
        serving().breaks(&window_update(0, MAX_WINDOW), ErrorCode::FLOW_CONTROL_ERROR, "2^31-1");
        let mut peer = serving();
        assert_eq!(peer.ok(&window_update(1, MAX_WINDOW - 65_535)), [""; 0]);
        // By a setting, it is the connection's fault (RFC 9113 §6.9.2).
        let one_more = settings(&[(setting::INITIAL_WINDOW_SIZE, 65_536)]);
        peer.breaks(&one_more, ErrorCode::FLOW_CONTROL_ERROR, "2^31-1");
        let mut peer = serving();
        assert_eq!(peer.ok(&window_update(1, MAX_WINDOW)), ["1: FLOW_CONTROL_ERROR"]);
        assert_eq!(peer.said(), ["RST_STREAM 1 FLOW_CONTROL_ERROR"]);
        serving().breaks(&window_update(0, 0), ErrorCode::PROTOCOL_ERROR, "nothing");
        assert_eq!(serving().ok(&window_update(1, 0)), ["1: PROTOCOL_ERROR"]);
        // The highest bit is reserved.
        assert_eq!(serving().ok(&window_update(0, 0x8000_0001)), ["writable"]);
    }

    #[test]
    fn a_peer_keeps_to_our_windows() {
        let mut peer = Peer::of_server(Local { stream_window: 100, ..peer::local() });
        peer.ok(&connect(1));
        respond(&mut peer, 1);
        assert_eq!(peer.ok(&data(1, &[0xff; 100])), ["1: 100 bytes"]);
        assert_eq!(peer.ok(&data(1, b"x")), ["1: FLOW_CONTROL_ERROR"]);
        // Of the connection: nothing comes back within a frame.
        let local = Local { stream_window: 200_000, connection_window: 65_535, frame_size: 100_000, ..peer::local() };
        let mut peer = Peer::of_server(local);
        peer.ok(&connect(1));
        peer.breaks(&data(1, &[0; 65_536]), ErrorCode::FLOW_CONTROL_ERROR, "overrun");
    }

    #[test]
    fn credit_comes_back_at_once_for_the_connection_and_when_it_is_taken_for_the_stream() {
        let mut peer = Peer::of_server(Local { connection_window: 65_535, stream_window: 40_000, ..peer::local() });
        peer.ok(&connect(1));
        respond(&mut peer, 1);
        peer.frames();
        peer.ok(&[data(1, &[0; 16_000]), data(1, &[0; 16_000]), data(1, &[0; 1_000])].concat());
        assert_eq!(peer.said(), ["WINDOW_UPDATE 0 33000"]);
        peer.tunnel.conn.consumed(1, 33_000, &mut peer.tunnel.out);
        assert_eq!(peer.said(), ["WINDOW_UPDATE 1 33000"]);
        // What comes for nobody still goes back.
        peer.tunnel.conn.reset(1, ErrorCode::CANCEL, &mut peer.tunnel.out);
        peer.ok(&data(1, &[0; 16_000]).repeat(3));
        assert_eq!(peer.said(), ["RST_STREAM 1 CANCEL", "WINDOW_UPDATE 0 48000"]);
    }

    #[test]
    fn a_window_grows_while_its_stream_drains_it() {
        let mut peer = Peer::of_server(Local { stream_window: 40_000, connection_window: 16 << 20, ..peer::local() });
        peer.ok(&connect(1));
        respond(&mut peer, 1);
        let budget = peer.tunnel.conn.budget().clone();
        for _ in 0..400 {
            peer.ok(&data(1, &[0; 16_000]));
            peer.tunnel.conn.consumed(1, 16_000, &mut peer.tunnel.out);
        }
        let grown = budget.used();
        assert!(grown > 400_000 && grown <= 1 << 20, "{grown}");
        // Once it has ended, nobody needs credit.
        peer.frames();
        peer.ok(&frame(Kind::Data, END_STREAM, 1, &[0; 16_000]));
        peer.tunnel.conn.consumed(1, 16_000, &mut peer.tunnel.out);
        assert_eq!(peer.said(), [""; 0]);
        peer.tunnel.conn.finish(1, &mut peer.tunnel.out);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn frames_never_exceed_the_smallest_maximum() {
        let mut peer = dialled();
        let grants = [window_update(0, 1 << 20), window_update(1, 1 << 20)].concat();
        peer.ok(&[settings(&[(setting::MAX_FRAME_SIZE, 1 << 20)]), grants].concat());
        assert_eq!(send(&mut peer, 1, 200_000), 200_000);
        assert!(peer.frames().iter().all(|(header, _)| header.length <= frame::MIN_FRAME_SIZE));
        for size in [16_383, 1 << 24] {
            let wrong = settings(&[(setting::MAX_FRAME_SIZE, size)]);
            dialled().breaks(&wrong, ErrorCode::PROTOCOL_ERROR, "MAX_FRAME_SIZE");
        }
    }
}

mod leaving {
    use super::*;

    fn drained() -> (Peer, Vec<u8>) {
        let mut peer = serving();
        peer.tunnel.conn.drain(&mut peer.tunnel.out);
        let frames = peer.frames();
        let kinds: Vec<Kind> = frames.iter().map(|(header, _)| header.kind).collect();
        assert_eq!(kinds, [Kind::GoAway, Kind::Ping]);
        assert_eq!(frames[0].1[..4], MAX_STREAM_ID.to_be_bytes());
        let pong = frame(Kind::Ping, frame::ACK, 0, &frames[1].1);
        (peer, pong)
    }

    #[test]
    fn happens_in_two_steps() {
        let (mut peer, pong) = drained();
        assert!(peer.tunnel.conn.is_going_away() && !peer.tunnel.conn.is_done());
        // Sent before the peer knew.
        assert_eq!(peer.ok(&connect(3)), ["3: CONNECT 10.0.0.1:80"]);
        assert_eq!(peer.ok(&pong), ["limits"]);
        assert_eq!(peer.said(), ["GOAWAY 3 NO_ERROR"]);
        // Sent by one that should have known, and its rest.
        let late =
            [connect(5), data(5, b"x"), window_update(5, 1), headers(5, END_STREAM, &[]), reset(5, ErrorCode::CANCEL)];
        assert_eq!(peer.ok(&late.concat()), [""; 0]);
        assert_eq!(peer.said(), [""; 0]);
        // Who was there is served.
        assert_eq!(peer.ok(&[data(1, b"go on"), end(1)].concat()), ["1: \"go on\"", "1: end"]);
        peer.tunnel.conn.finish(1, &mut peer.tunnel.out);
        assert!(!peer.tunnel.conn.is_done());
        peer.ok(&reset(3, ErrorCode::CANCEL));
        assert!(peer.tunnel.conn.is_done());
        // RFC 9113 §6.8: the last stream must not go up again.
        peer.frames();
        peer.tunnel.close();
        assert_eq!(peer.said(), ["GOAWAY 3 NO_ERROR"]);
    }

    #[test]
    fn does_not_wait_for_ever() {
        let (mut peer, pong) = drained();
        peer.tunnel.conn.drain(&mut peer.tunnel.out);
        assert_eq!(peer.said(), [""; 0], "once is enough");
        assert_eq!(peer.at(Duration::from_secs(10)).unwrap(), [""; 0]);
        assert_eq!(peer.said(), ["PING"]);
        assert_eq!(peer.at(Duration::from_secs(20)).unwrap(), ["limits"]);
        assert_eq!(peer.said(), ["GOAWAY 1 NO_ERROR"]);
        assert_eq!(peer.ok(&pong), [""; 0], "it comes late");
    }

    #[test]
    fn of_the_peer_leaves_open_what_it_takes() {
        let mut peer = Peer::of_client(peer::local());
        assert_eq!((open(&mut peer), open(&mut peer), open(&mut peer)), (Ok(1), Ok(3), Ok(5)));
        assert_eq!(peer.ok(&go_away(MAX_STREAM_ID, ErrorCode::NO_ERROR)), ["limits"]);
        assert_eq!(open(&mut peer), Err(CannotOpen::GoingAway));
        let events = peer.ok(&go_away(1, ErrorCode::NO_ERROR));
        assert_eq!(events, ["3: REFUSED_STREAM", "5: REFUSED_STREAM", "limits"]);
        // It never goes up.
        assert_eq!(peer.ok(&go_away(5, ErrorCode::NO_ERROR)), ["limits"]);
        assert_eq!(peer.ok(&ok(1)), ["1: 200"]);
        assert!(!peer.tunnel.conn.is_done());
        peer.tunnel.conn.finish(1, &mut peer.tunnel.out);
        assert_eq!(peer.ok(&end(1)), ["1: end"]);
        assert!(peer.tunnel.conn.is_done());
        // Debug data, however much a frame takes.
        let with_text = frame(Kind::GoAway, 0, 0, &[&[0; 8][..], &[b'x'; 10_000]].concat());
        assert_eq!(Peer::of_client(peer::local()).ok(&[with_text, ping(1)].concat()), ["limits"]);
    }

    #[test]
    fn of_a_client_concerns_no_request() {
        let mut peer = serving();
        assert_eq!(peer.ok(&go_away(0, ErrorCode::NO_ERROR)), ["limits"]);
        assert_eq!(peer.ok(&data(1, b"go on")), ["1: \"go on\""]);
        assert!(!peer.tunnel.conn.is_done());
        peer.ok(&reset(1, ErrorCode::CANCEL));
        assert!(peer.tunnel.conn.is_done());
    }
}

mod time {
    use super::*;

    #[test]
    fn a_ping_is_answered_and_one_of_ours_is_waited_for() {
        let mut peer = serving();
        assert_eq!(peer.tunnel.conn.next_deadline(), Duration::from_secs(10));
        peer.at(Duration::from_secs(10)).unwrap();
        let frames = peer.frames();
        assert_eq!(frames[0].0.kind, Kind::Ping);
        assert_eq!(peer.tunnel.conn.next_deadline(), Duration::from_secs(30));
        peer.at(Duration::from_secs(15)).unwrap();
        peer.ok(&frame(Kind::Ping, frame::ACK, 0, &frames[0].1));
        assert_eq!(peer.tunnel.conn.next_deadline(), Duration::from_secs(25));
        peer.at(Duration::from_secs(25)).unwrap();
        assert_eq!(peer.said(), ["PING"]);
        // Other answers are none.
        peer.ok(&frame(Kind::Ping, frame::ACK, 0, &[9; 8]));
        assert!(peer.at(Duration::from_secs(44)).is_ok());
        let silent = peer.at(Duration::from_secs(45));
        assert!(
            matches!(silent, Err(TunnelError::Connection(error)) if error.silent && error.code == ErrorCode::NO_ERROR)
        );
    }

    #[test]
    fn settings_are_waited_for_and_so_is_their_acknowledgement() {
        for said in [&b""[..], frame::PREFACE, &[&frame::PREFACE[..], &settings(&[])].concat()] {
            let mut peer = Peer::new(mesh_hbone::engine::conn::Role::Server, peer::local());
            peer.ok(said);
            assert_eq!(peer.tunnel.conn.next_deadline(), Duration::from_secs(10));
            let silent = peer.at(Duration::from_secs(10));
            let code = ErrorCode::SETTINGS_TIMEOUT;
            assert!(matches!(silent, Err(TunnelError::Connection(error)) if error.silent && error.code == code));
        }
    }

    #[test]
    fn a_header_block_ends_or_the_connection_does() {
        let mut peer = serving();
        peer.at(Duration::from_secs(3)).unwrap();
        peer.ok(&frame(Kind::Headers, 0, 3, b""));
        peer.at(Duration::from_secs(8)).unwrap();
        peer.ok(&frame(Kind::Continuation, 0, 3, b""));
        assert!(peer.at(Duration::from_secs(12)).is_ok());
        assert!(peer.at(Duration::from_secs(13)).is_err());
    }
}

mod tls {
    use super::*;

    #[test]
    fn keys_change_in_both_directions() {
        let mut peer = serving();
        for request in [false, true, true, false] {
            assert_eq!(peer.key_update(request).result, Ok(()));
            assert_eq!(peer.ok(&data(1, b"new key")), ["1: \"new key\""]);
            // Whether or not it was asked for one.
            assert_eq!(send(&mut peer, 1, 5), 5);
            assert_eq!(peer.said(), ["DATA 1 5"]);
            peer.tunnel.rotate().unwrap();
            assert_eq!(send(&mut peer, 1, 5), 5);
            assert_eq!(peer.said(), ["DATA 1 5"]);
        }
    }

    /// Behind ciphertext that waits, requests for a new key are answered once.
    #[test]
    fn a_peer_that_does_not_read_gets_one_answer() {
        let mut peer = serving();
        send(&mut peer, 1, 100);
        peer.tunnel.seal(1 << 20).unwrap();
        let before = peer.tunnel.out.queued();
        for _ in 0..100 {
            assert_eq!(peer.key_update(true).result, Ok(()));
            peer.tunnel.seal(1 << 20).unwrap();
        }
        assert_eq!(peer.tunnel.out.queued(), before);
        assert!(peer.tunnel.wants_write());
        assert_eq!(peer.said(), ["DATA 1 100"]);
        assert!(!peer.tunnel.wants_write());
    }

    /// A slab for each small record would be 400 times what is said.
    #[test]
    fn what_waits_behind_ciphertext_gathers_in_one_record() {
        let mut peer = serving();
        send(&mut peer, 1, 100);
        for _ in 0..50 {
            send(&mut peer, 1, 10);
            peer.tunnel.seal(1 << 20).unwrap();
        }
        let sealed: usize = peer.tunnel.out.ready().count();
        assert_eq!(sealed, 1, "only the first");
        assert_eq!(peer.frames().len(), 51);
    }

    #[test]
    fn a_record_that_is_none_is_answered_with_an_alert() {
        let mut record = serving().sealed(ContentType::ApplicationData, b"x");
        record[7] ^= 1;
        for (said, alert) in [(record, 20), (vec![21, 3, 3, 0, 2], 10), (vec![23, 3, 3, 0xff, 0xff], 22)] {
            let mut peer = serving();
            let heard = peer.say_ciphertext(&said);
            assert!(matches!(&heard.result, Err(TunnelError::Record(error)) if error.alert() == alert), "{heard:?}");
        }
    }

    #[test]
    fn a_peer_says_that_it_closes() {
        let mut peer = serving();
        let close = peer.sealed(ContentType::Alert, &[1, 0]);
        let more = peer.sealed(ContentType::ApplicationData, &data(1, b"x"));
        assert_eq!(peer.say_ciphertext(&[close, more].concat()).events, ["closed"]);
        assert!(peer.tunnel.is_peer_closed());
        let mut peer = serving();
        let fatal = peer.sealed(ContentType::Alert, &[2, 40]);
        assert_eq!(peer.say_ciphertext(&fatal).result, Err(TunnelError::Alert(40)));
    }

    #[test]
    fn a_goodbye_comes_after_everything_else() {
        let mut peer = serving();
        send(&mut peer, 1, 5);
        peer.tunnel.close();
        assert_eq!(peer.said(), ["DATA 1 5", "GOAWAY 1 NO_ERROR"]);
        // But before what has not been sealed when something is wrong.
        let mut peer = serving();
        send(&mut peer, 1, 5);
        peer.breaks(&data(0, b""), ErrorCode::PROTOCOL_ERROR, "");
    }
}
