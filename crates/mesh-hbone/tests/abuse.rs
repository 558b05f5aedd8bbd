//! What a peer may do to annoy, against the real driver: each nuisance ends its tunnel with the right error and GOAWAY, no other tunnel
//! notices, and a peer that does nothing but work is never taken for one.
//!
//! Clocks are paused: a `sleep` is a stretch of virtual time that the scenario is about (a rate, a deadline, a pause of the peer), passes
//! only while every task waits, and costs none of ours.

#[path = "engine/certificates.rs"]
mod certificates;
#[path = "engine/peer.rs"]
#[allow(dead_code, reason = "shared with the engine's own tests, which use more of it")]
mod peer;
#[path = "abuse/support.rs"]
mod support;

use std::{cell::RefCell, future::Future, rc::Rc, time::Duration};

use mesh_core::{headers::Authority, identity::Identity};
use mesh_hbone::{
    Abuse, Budget, ConnectRequest, Connector, Error, LocalBoxFuture, Pool, PoolConfig, Process, Secured, Settings,
    TunnelKey,
    engine::{
        frame::{self, ErrorCode, Kind, setting},
        record::ContentType,
    },
    tls,
};
use tokio::{
    io::{AsyncWriteExt as _, DuplexStream, duplex},
    sync::mpsc,
    task::{LocalSet, spawn_local},
    time::{Instant, sleep, timeout},
};

use self::{
    peer::{data, go_away, headers, ping, reset, settings, settings_ack, window_update},
    support::{Bother, ECHO, FORBIDDEN, SILENT, STALL, Server, client_config, connect},
};

async fn local<T>(test: impl Future<Output = T>) -> T {
    LocalSet::new().run_until(test).await
}

fn many(count: u32, frame: impl FnMut(u32) -> Vec<u8>) -> Vec<u8> {
    (0..count).flat_map(frame).collect()
}

fn stream(number: u32) -> u32 {
    2 * number + 1
}

/// After `said`, the tunnel must be over because of `kind`, and the peer must know; another tunnel's stream must not.
#[track_caller]
fn ends_tunnel(said: Vec<u8>, kind: Abuse) -> impl Future<Output = ()> {
    let caller = std::panic::Location::caller();
    local(async move {
        let server = Server::new(Budget::default());
        let (mut good, good_served) = server.tunnel().await;
        good.open(1).await;
        let (mut bad, bad_served) = server.tunnel().await;
        bad.say(&said).await;
        assert_eq!(bad.go_away().await, ErrorCode::ENHANCE_YOUR_CALM, "{caller}");
        let ended = bad_served.end().await;
        assert!(matches!(ended, Err(Error::Abuse(found)) if found == kind), "{caller}: {ended:?}");
        good.echo(1, b"still here").await;
        assert!(!good_served.is_over());
        assert_eq!(server.budget.used(), 0);
    })
}

#[tokio::test(start_paused = true)]
async fn streams_opened_and_reset_at_once() {
    let said = many(900, |n| [connect(stream(n), SILENT), reset(stream(n), ErrorCode::CANCEL)].concat());
    ends_tunnel(said, Abuse::RapidReset).await;
}

/// CVE-2025-8671: the peer makes us reset what it opened.
#[tokio::test(start_paused = true)]
async fn streams_opened_and_broken_at_once() {
    let said = many(900, |n| [connect(stream(n), SILENT), window_update(stream(n), 0)].concat());
    ends_tunnel(said, Abuse::RapidReset).await;
    let priority = |n| peer::frame(Kind::Priority, 0, stream(n), &[0; 4]);
    ends_tunnel(many(900, |n| [connect(stream(n), SILENT), priority(n)].concat()), Abuse::RapidReset).await;
}

#[tokio::test(start_paused = true)]
async fn more_streams_than_allowed_over_and_over() {
    ends_tunnel(many(900, |n| connect(stream(n), SILENT)), Abuse::RapidReset).await;
}

#[tokio::test(start_paused = true)]
async fn data_without_data() {
    let opened = connect(1, STALL);
    ends_tunnel([opened.clone(), many(200, |_| data(1, b""))].concat(), Abuse::EmptyData).await;
    let padding = peer::frame(Kind::Data, frame::PADDED, 1, &[3, 0, 0, 0]);
    ends_tunnel([opened, padding.repeat(200)].concat(), Abuse::EmptyData).await;
}

#[tokio::test(start_paused = true)]
async fn data_byte_by_byte() {
    ends_tunnel([connect(1, ECHO), many(11_000, |_| data(1, b"x"))].concat(), Abuse::TinyData).await;
}

#[tokio::test(start_paused = true)]
async fn settings_over_and_over() {
    ends_tunnel(many(100, |_| settings(&[])), Abuse::Settings).await;
    ends_tunnel(settings_ack().repeat(100), Abuse::Settings).await;
    ends_tunnel(settings(&[(setting::MAX_HEADER_LIST_SIZE, 1); 100]), Abuse::Settings).await;
}

#[tokio::test(start_paused = true)]
async fn pings_over_and_over() {
    ends_tunnel(many(300, |n| ping(n.into())), Abuse::Ping).await;
    let unasked = peer::frame(Kind::Ping, frame::ACK, 0, &[0; 8]);
    ends_tunnel(unasked.repeat(300), Abuse::Ping).await;
}

#[tokio::test(start_paused = true)]
async fn header_blocks_in_many_pieces() {
    let begin = peer::frame(Kind::Headers, 0, 1, b"");
    let piece = peer::frame(Kind::Continuation, 0, 1, b"");
    ends_tunnel([begin.clone(), piece.repeat(100)].concat(), Abuse::Continuation).await;
    let end = peer::frame(Kind::Continuation, frame::END_HEADERS, 1, &peer::block(&peer::CONNECT));
    ends_tunnel([begin, piece.repeat(62), end, settings(&[]).repeat(100)].concat(), Abuse::Settings).await;
}

#[tokio::test(start_paused = true)]
async fn a_header_list_too_long_is_answered_and_one_beyond_patience_is_not() {
    local(async {
        let server = Server::new(Budget::default());
        let (mut peer, served) = server.tunnel().await;
        let value = "v".repeat(20_000);
        let fields = [peer::CONNECT[0], peer::CONNECT[1], ("baggage", &*value)];
        peer.say(&headers(1, 0, &fields)).await;
        let status = peer.next(|header, payload| (header.kind == Kind::Headers).then(|| payload.to_vec())).await;
        assert!(status.ends_with(b"431"), "{status:?}");
        assert_eq!(peer.reset(1).await, ErrorCode::NO_ERROR);
        assert_eq!(*server.application.malformed.borrow(), ["the header list is too large"]);
        peer.open(3).await;
        peer.echo(3, b"as if nothing had happened").await;

        let value = "v".repeat(60_000);
        let fields = peer::block(&[peer::CONNECT[0], peer::CONNECT[1], ("baggage", &*value)]);
        let begin = peer::frame(Kind::Headers, 0, 5, &fields);
        peer.say(&[begin, peer::frame(Kind::Continuation, 0, 5, &[0; 10_000])].concat()).await;
        assert_eq!(peer.go_away().await, ErrorCode::ENHANCE_YOUR_CALM);
        assert!(matches!(served.end().await, Err(Error::Abuse(Abuse::HeaderList))));
    })
    .await;
}

/// A few octets that stand for much: the table's entry is long, the index is not (an "HPACK bomb").
#[tokio::test(start_paused = true)]
async fn a_header_list_is_bounded_whatever_is_compressed_in_it() {
    local(async {
        let server = Server::new(Budget::default());
        let (mut peer, _served) = server.tunnel_through(1 << 20).await;
        peer.say(&[&frame::PREFACE[..], &settings(&[])].concat()).await;
        let long = [&[0x40, 1, b'a', 0x7f, 0x80 | 0x51, 0x1e][..], &[b'v'; 4_000][..]].concat();
        let long = [&long[..6], &long[6..]].concat();
        let bomb = [&b"\x42\x07CONNECT\x41\x03a:1"[..], &long, &[0xbe; 50_000]].concat();
        peer.say(&peer::frame(Kind::Headers, frame::END_HEADERS, 1, &bomb)).await;
        let status = peer.next(|header, payload| (header.kind == Kind::Headers).then(|| payload.to_vec())).await;
        assert!(status.ends_with(b"431"), "{status:?}");
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn window_updates_over_and_over() {
    ends_tunnel(window_update(0, 1).repeat(5_000), Abuse::WindowUpdate).await;
    ends_tunnel([connect(1, ECHO), window_update(1, 1).repeat(5_000)].concat(), Abuse::WindowUpdate).await;
}

#[tokio::test(start_paused = true)]
async fn windows_beyond_their_bounds() {
    local(async {
        let server = Server::new(Budget::default());
        for (said, code) in [
            (window_update(0, 0), ErrorCode::PROTOCOL_ERROR),
            (window_update(0, frame::MAX_WINDOW), ErrorCode::FLOW_CONTROL_ERROR),
            (settings(&[(setting::INITIAL_WINDOW_SIZE, frame::MAX_WINDOW + 1)]), ErrorCode::FLOW_CONTROL_ERROR),
        ] {
            let (mut peer, served) = server.tunnel().await;
            peer.say(&said).await;
            assert_eq!(peer.go_away().await, code);
            assert!(matches!(served.end().await, Err(Error::Lost { .. })));
        }
        let (mut peer, _served) = server.tunnel().await;
        peer.open(1).await;
        peer.open(3).await;
        peer.open(5).await;
        peer.say(&window_update(1, 0)).await;
        assert_eq!(peer.reset(1).await, ErrorCode::PROTOCOL_ERROR);
        peer.say(&window_update(3, frame::MAX_WINDOW)).await;
        assert_eq!(peer.reset(3).await, ErrorCode::FLOW_CONTROL_ERROR);
        peer.echo(5, b"unharmed").await;
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn windows_made_smaller_stop_what_is_sent_and_nothing_else() {
    local(async {
        let server = Server::new(Budget::default());
        let (mut peer, _served) = server.tunnel().await;
        peer.open(1).await;
        peer.echo(1, &[7; 1_000]).await;
        // 1,000 of 65,535 are used: 10 leave -990.
        peer.say(&settings(&[(setting::INITIAL_WINDOW_SIZE, 10)])).await;
        peer.say(&data(1, b"stuck")).await;
        peer.say(&window_update(1, 990)).await;
        sleep(Duration::from_secs(1)).await;
        assert!(peer.unasked().iter().all(|header| header.kind != Kind::Data), "the window is empty");
        peer.say(&window_update(1, 2)).await;
        let two = peer.next(|header, payload| (header.kind == Kind::Data).then(|| payload.to_vec())).await;
        assert_eq!(two, b"st");
        peer.say(&settings(&[(setting::INITIAL_WINDOW_SIZE, 1_000)])).await;
        let rest = peer.next(|header, payload| (header.kind == Kind::Data).then(|| payload.to_vec())).await;
        assert_eq!(rest, b"uck");
    })
    .await;
}

/// More than a stream's window, or than the connection's.
#[tokio::test(start_paused = true)]
async fn windows_overrun() {
    local(async {
        let mut server = Server::new(Budget::default());
        server.settings = Settings { connection_window: 100_000, ..Settings::default() };
        let (mut peer, served) = server.tunnel().await;
        peer.say(&connect(1, STALL)).await;
        peer.say(&data(1, &[0; 16_000]).repeat(5)).await;
        assert_eq!(peer.reset(1).await, ErrorCode::FLOW_CONTROL_ERROR);
        peer.open(3).await;
        peer.echo(3, b"x").await;
        // Its beginning is enough to know.
        peer.say(&peer::frame(Kind::Data, 0, 3, &[0; 65_536])[..9]).await;
        assert_eq!(peer.reset(3).await, ErrorCode::FLOW_CONTROL_ERROR);
        assert!(!served.is_over());
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn frames_that_mean_nothing() {
    ends_tunnel(peer::frame(Kind::Priority, 0, 1, &[0; 5]).repeat(1_200), Abuse::Useless).await;
    ends_tunnel(peer::frame(Kind::Unknown(0xbe), 0, 0, b"grease").repeat(1_200), Abuse::Useless).await;
    let over = [connect(1, FORBIDDEN), reset(1, ErrorCode::CANCEL)].concat();
    ends_tunnel([over.clone(), reset(1, ErrorCode::CANCEL).repeat(1_200)].concat(), Abuse::Useless).await;
    ends_tunnel(many(1_200, |n| headers(stream(n), 0, &[(":path", "/")])), Abuse::Useless).await;
    let go_away = go_away(0, ErrorCode::NO_ERROR).repeat(1_200);
    ends_tunnel([connect(1, STALL), go_away].concat(), Abuse::Useless).await;
}

/// `make` gives a record, again and again.
async fn records_end_tunnel(mut make: impl FnMut(&mut Bother) -> Vec<u8>) {
    local(async {
        let server = Server::new(Budget::default());
        let (mut peer, served) = server.tunnel().await;
        peer.open(1).await;
        for _ in 0..300 {
            let record = make(&mut peer);
            peer.write(&record).await;
        }
        assert_eq!(peer.go_away().await, ErrorCode::ENHANCE_YOUR_CALM);
        assert!(matches!(served.end().await, Err(Error::Abuse(Abuse::Records))));
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn records_without_content() {
    records_end_tunnel(|peer| peer.sealed(ContentType::ApplicationData, b"")).await;
}

#[tokio::test(start_paused = true)]
async fn keys_changed_over_and_over() {
    records_end_tunnel(|peer| peer.key_update(false)).await;
    records_end_tunnel(|peer| peer.key_update(true)).await;
}

/// In memory; the far ends go to the test.
struct Dial {
    far: mpsc::UnboundedSender<DuplexStream>,
    failed: RefCell<Vec<Error>>,
}

impl Connector for Dial {
    fn connect(&self, _key: &TunnelKey) -> LocalBoxFuture<'_, Result<Secured, Error>> {
        Box::pin(async {
            let (near, far) = duplex(1 << 20);
            self.far.send(far).expect("the test goes on");
            Ok(tls::connect(near, &client_config(), certificates::name()).await.expect("a handshake"))
        })
    }

    fn failed(&self, _key: &TunnelKey, error: &Error) {
        self.failed.borrow_mut().push(error.clone());
    }
}

#[tokio::test(start_paused = true)]
async fn tickets_over_and_over() {
    local(async {
        let (far, mut dialed) = mpsc::unbounded_channel();
        let dial = Rc::new(Dial { far, failed: RefCell::default() });
        let pool = Pool::new(PoolConfig::default(), Budget::default(), dial.clone());
        let opener = pool.clone();
        let opening = spawn_local(async move {
            let key = TunnelKey {
                source_uid: "client".into(),
                source_ip: [10, 0, 0, 1].into(),
                source_identity: Identity::new("cluster.local", "demo", "client"),
                generation: 1,
                destination: ([10, 0, 0, 2], 15008).into(),
                accepted: [Identity::new("cluster.local", "demo", "server")].into(),
                network: "".into(),
            };
            let authority = Authority::Address(([10, 0, 0, 2], 80).into());
            opener.open(&key, &ConnectRequest { authority, headers: Vec::new() }).await.map(drop)
        });
        let mut server = Bother::accept(dialed.recv().await.expect("a dial")).await;
        // A few are nothing unusual.
        let ticket = [4, 0, 0, 20, 0, 0, 14, 16, 0, 0, 0, 0, 1, 0, 0, 5, 1, 2, 3, 4, 5, 0, 0, 0];
        for _ in 0..4 {
            let record = server.sealed(ContentType::Handshake, &ticket);
            server.write(&record).await;
        }
        server.say(&[settings(&[]), settings_ack()].concat()).await;
        server.next(|header, _| (header.kind == Kind::Headers).then_some(())).await;
        for _ in 0..300 {
            let record = server.sealed(ContentType::Handshake, &ticket);
            server.write(&record).await;
        }
        assert_eq!(server.go_away().await, ErrorCode::ENHANCE_YOUR_CALM);
        let opened = timeout(Duration::from_secs(60), opening).await.expect("it fails").expect("no panic");
        assert!(matches!(opened, Err(Error::Abuse(Abuse::Records))), "{opened:?}");
        // Whoever counts failures hears of it once the last words are said.
        sleep(Duration::from_secs(5)).await;
        assert!(matches!(dial.failed.borrow()[..], [Error::Abuse(Abuse::Records)]));
        drop(pool);
    })
    .await;
}

/// It asks and asks, at a rate that would be fine, and never reads an answer: so it never sees our PING either.
#[tokio::test(start_paused = true)]
async fn a_peer_that_never_reads_is_silent() {
    local(async {
        let server = Server::new(Budget::default());
        let (mut peer, served) = server.tunnel_through(1_000).await;
        let start = Instant::now();
        let asking = spawn_local(async move {
            peer.say_deaf(&[&frame::PREFACE[..], &settings(&[]), &settings_ack()].concat()).await;
            for number in 0.. {
                peer.say_deaf(&ping(number)).await;
                sleep(Duration::from_millis(200)).await;
            }
        });
        let ended = served.end().await;
        assert!(matches!(ended, Err(Error::Silent(_))), "{ended:?}");
        assert!(start.elapsed() <= Duration::from_secs(32));
        asking.abort();
    })
    .await;
}

/// Answers that nobody fetches are not collected for ever, however regular what asks for them is.
#[tokio::test(start_paused = true)]
async fn a_peer_that_never_reads_and_asks_much_is_cut() {
    local(async {
        let server = Server::new(Budget::default());
        let (mut peer, served) = server.tunnel_through(1_000).await;
        let start = Instant::now();
        let asking = spawn_local(async move {
            peer.say_deaf(&[&frame::PREFACE[..], &settings(&[]), &settings_ack()].concat()).await;
            for number in 0.. {
                let request = [
                    connect(stream(number), FORBIDDEN),
                    peer::frame(Kind::Data, frame::END_STREAM, stream(number), b""),
                ];
                peer.say_deaf(&request.concat()).await;
                if number % 50 == 0 {
                    sleep(Duration::from_millis(1)).await;
                }
            }
        });
        let ended = served.end().await;
        assert!(matches!(ended, Err(Error::Abuse(Abuse::NeverReads))), "{ended:?}");
        assert!(start.elapsed() < Duration::from_secs(10));
        assert_eq!(server.budget.used(), 0);
        asking.abort();
    })
    .await;
}

/// The handshake's deadline is its caller's, and a handshake in small pieces is none the worse.
#[tokio::test(start_paused = true)]
async fn a_tls_handshake_byte_by_byte() {
    local(async {
        let (mut near, far) = duplex(1);
        let server = support::server_config();
        let accepting = spawn_local(async move { timeout(Duration::from_secs(5), tls::accept(far, &server)).await });
        let slow = spawn_local(async move {
            for byte in [22, 3, 1, 2, 0].into_iter().chain(std::iter::repeat(0)) {
                drop(near.write_all(&[byte]).await);
                sleep(Duration::from_millis(100)).await;
            }
        });
        assert!(accepting.await.expect("no panic").is_err(), "the caller's patience ends it");
        slow.abort();

        let (near, far) = duplex(16);
        let server = support::server_config();
        let accepting = spawn_local(async move { tls::accept(far, &server).await.map(drop) });
        let connected = tls::connect(near, &client_config(), certificates::name()).await;
        assert!(connected.is_ok() && accepting.await.expect("no panic").is_ok());
    })
    .await;
}

/// After `said` nothing more comes but `trickle`, a byte each second, and in between no PING is answered.
async fn ends_silent(said: Vec<u8>, trickle: &[u8], code: ErrorCode, within: Duration) {
    local(async {
        let server = Server::new(Budget::default());
        let (mut peer, served) = server.tunnel_through(1 << 20).await;
        let start = Instant::now();
        peer.say(&said).await;
        for byte in trickle {
            peer.say(&[*byte]).await;
            sleep(Duration::from_secs(1)).await;
        }
        let ended = served.end().await;
        assert!(matches!(ended, Err(Error::Silent(_))), "{ended:?}");
        assert_eq!(peer.go_away().await, code);
        assert!(start.elapsed() <= within, "it took {:?}", start.elapsed());
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_is_too_slow() {
    let (ten, thirty) = (Duration::from_secs(13), Duration::from_secs(33));
    let opening = [&frame::PREFACE[..], &settings(&[])].concat();
    let open = [&opening[..], &settings_ack()].concat();
    // Nothing; the preface byte by byte; no SETTINGS; SETTINGS byte by byte; no acknowledgement of ours.
    ends_silent(Vec::new(), b"", ErrorCode::SETTINGS_TIMEOUT, ten).await;
    ends_silent(Vec::new(), &frame::PREFACE[..10], ErrorCode::SETTINGS_TIMEOUT, ten).await;
    ends_silent(frame::PREFACE.to_vec(), b"", ErrorCode::SETTINGS_TIMEOUT, ten).await;
    ends_silent(frame::PREFACE.to_vec(), &settings(&[(4, 5)])[..10], ErrorCode::SETTINGS_TIMEOUT, ten).await;
    ends_silent(opening, b"", ErrorCode::SETTINGS_TIMEOUT, ten).await;
    // A PING is not answered, whether or not something else is said meanwhile.
    ends_silent(open.clone(), b"", ErrorCode::NO_ERROR, thirty).await;
    let long = headers(1, 0, &[("a", "b"); 20]);
    ends_silent(open, &long[..29], ErrorCode::NO_ERROR, thirty).await;
}

#[tokio::test(start_paused = true)]
async fn a_header_block_that_never_ends() {
    local(async {
        let server = Server::new(Budget::default());
        let (mut peer, served) = server.tunnel().await;
        let start = Instant::now();
        peer.say(&peer::frame(Kind::Headers, 0, 1, &peer::block(&peer::CONNECT))).await;
        for _ in 0..4 {
            sleep(Duration::from_secs(2)).await;
            peer.say(&peer::frame(Kind::Continuation, 0, 1, b"\0")).await;
        }
        assert_eq!(peer.go_away().await, ErrorCode::ENHANCE_YOUR_CALM);
        assert!(matches!(served.end().await, Err(Error::Abuse(Abuse::Continuation))));
        assert!(start.elapsed() <= Duration::from_secs(12));
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_works_hard_is_left_alone() {
    local(async {
        let server = Server::new(Budget::default());
        let (mut peer, served) = server.tunnel().await;
        for number in 0..3_000 {
            let id = stream(number);
            let whole = [connect(id, ECHO), data(id, b"hello"), peer::frame(Kind::Data, frame::END_STREAM, id, b"")];
            peer.say(&whole.concat()).await;
            let end =
                |header: &frame::Header, _: &[u8]| (header.stream == id && header.has(frame::END_STREAM)).then_some(());
            peer.next(end).await;
            // Credit for what it has read, of both windows.
            peer.say(&[window_update(0, 5), window_update(id, 5)].concat()).await;
            if number % 20 == 0 {
                sleep(Duration::from_millis(50)).await;
            }
            // Now and then it loses interest at once, or says that it has when all is said.
            if number % 100 == 0 {
                peer.say(&reset(id, ErrorCode::CANCEL)).await;
            }
        }
        assert!(!served.is_over());
        // Many at a time.
        for wave in 0..20 {
            let ids = || (0..150).map(|n| stream(10_000 + 150 * wave + n));
            let opened: Vec<u8> = ids().flat_map(|id| connect(id, ECHO)).collect();
            peer.say(&opened).await;
            let rest: Vec<u8> =
                ids().flat_map(|id| peer::frame(Kind::Data, frame::END_STREAM, id, b"all of it")).collect();
            peer.say(&rest).await;
            let mut ended = 0;
            let all = |header: &frame::Header, _: &[u8]| {
                ended += u32::from(header.has(frame::END_STREAM) && header.kind == Kind::Data);
                (ended == 150).then_some(())
            };
            peer.next(all).await;
        }
        // And for ten minutes it asks whether we are there, as we do.
        let id = stream(20_000);
        peer.open(id).await;
        for number in 0..3_000 {
            peer.say(&ping(number)).await;
            sleep(Duration::from_millis(200)).await;
            peer.answer_pings().await;
        }
        peer.echo(id, b"still here").await;
        assert!(!served.is_over());
        assert_eq!(server.budget.used(), 0);
    })
    .await;
}

/// A key now and then, and a record for each small thing that is said, are how some TLS libraries are.
#[tokio::test(start_paused = true)]
async fn a_peer_with_odd_habits_is_left_alone() {
    local(async {
        let server = Server::new(Budget::default());
        let (mut peer, served) = server.tunnel().await;
        peer.open(1).await;
        for number in 0..5_000 {
            peer.echo(1, b"x").await;
            if number % 10 == 0 {
                sleep(Duration::from_millis(200)).await;
                peer.answer_pings().await;
                let rekey = peer.key_update(number % 20 == 0);
                peer.write(&rekey).await;
                // An empty record behind each write hid the IV once.
                let empty = peer.sealed(ContentType::ApplicationData, b"");
                peer.write(&empty).await;
            }
            if number % 100 == 0 {
                peer.say(&window_update(0, 100)).await;
                peer.say(&window_update(1, 100)).await;
            }
        }
        assert!(!served.is_over());
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn readers_that_do_not_read_cost_no_more_than_the_budget() {
    const LIMIT: usize = 1 << 20;
    local(async {
        let process = Process::new(1 << 30);
        let server = Server::new(Budget::new(LIMIT, process.clone()));
        let (mut good, good_served) = server.tunnel().await;
        good.open(1).await;
        let (mut bad, bad_served) = server.tunnel().await;
        bad.open(1).await;
        let mut most = 0;
        for number in 1..=100 {
            bad.say(&[connect(stream(number), STALL), data(stream(number), &[0; 15_000]).repeat(4)].concat()).await;
            tokio::task::yield_now().await;
            most = most.max(server.budget.used());
        }
        sleep(Duration::from_secs(1)).await;
        most = most.max(server.budget.used());
        assert!(most > LIMIT, "the streams were to stall: {most} bytes are held");
        // Twice the limit for what was promised, and one delivery.
        assert!(most <= 2 * LIMIT + 65_536, "{most} bytes are held");
        assert_eq!(process.used(), server.budget.used());

        // No new stream is welcome, and it may try elsewhere.
        bad.say(&connect(stream(500), ECHO)).await;
        assert_eq!(bad.reset(stream(500)).await, ErrorCode::REFUSED_STREAM);
        good.say(&connect(3, ECHO)).await;
        assert_eq!(good.reset(3).await, ErrorCode::REFUSED_STREAM);
        // Those that read have what they had.
        good.echo(1, b"unharmed").await;
        bad.echo(1, b"unharmed, too").await;
        assert!(!good_served.is_over() && !bad_served.is_over());

        // Given up one by one, they are forgotten.
        bad.say(&many(101, |number| reset(stream(number + 1), ErrorCode::CANCEL))).await;
        bad.leave().await;
        let ended = bad_served.end().await;
        assert!(matches!(ended, Err(Error::Lost { .. })), "a stream was open: {ended:?}");
        sleep(Duration::from_secs(1)).await;
        good.open(5).await;
        assert_eq!((server.budget.used(), process.used()), (0, 0));
    })
    .await;
}

/// Their windows were promised before the budget was spent: what is more than twice of it is let go, and only that.
#[tokio::test(start_paused = true)]
async fn readers_that_were_there_before_the_budget_was_spent_are_let_go() {
    const LIMIT: usize = 1 << 20;
    local(async {
        let server = Server::new(Budget::new(LIMIT, Process::new(1 << 30)));
        let (mut good, good_served) = server.tunnel().await;
        good.open(1).await;
        let (mut bad, bad_served) = server.tunnel().await;
        bad.say(&many(60, |number| connect(stream(number), STALL))).await;
        let mut answers = 0;
        bad.next(|header, _| {
            answers += u32::from(header.kind == Kind::Headers);
            (answers == 60).then_some(())
        })
        .await;
        let mut most = 0;
        for number in 0..60 {
            bad.say(&data(stream(number), &[0; 15_000]).repeat(4)).await;
            tokio::task::yield_now().await;
            most = most.max(server.budget.used());
        }
        let mut calmed = 0;
        bad.next(|header, payload| {
            let is_calm = header.kind == Kind::RstStream && payload == ErrorCode::ENHANCE_YOUR_CALM.0.to_be_bytes();
            calmed += u32::from(is_calm);
            (calmed == 20).then_some(())
        })
        .await;
        assert!((LIMIT..=2 * LIMIT + 65_536).contains(&most), "{most} bytes are held");
        assert!(server.budget.used() <= 2 * LIMIT);
        good.echo(1, b"unharmed").await;
        assert!(!good_served.is_over() && !bad_served.is_over());
        bad.leave().await;
        assert!(bad_served.end().await.is_err());
        assert_eq!(server.budget.used(), 0);
    })
    .await;
}
