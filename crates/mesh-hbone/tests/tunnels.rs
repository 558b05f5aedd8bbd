//! Both ends of tunnels against each other, and against scripted HTTP/2 peers, over in-memory transports.
//!
//! Where a test sleeps, its clock is paused: a `sleep` is a stretch of virtual time that the scenario is about (a rate, a deadline, a pause of the peer), passes
//! only while every task waits, and costs none of ours.

mod support;

use std::{cell::Cell, future::Future, rc::Rc, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, Response, StatusCode};
use mesh_core::reason::Reason;
use mesh_hbone::{
    Budget, Error, LocalBoxFuture, PoolConfig, ResetReason, Secured, Settings, TunnelKey, TunnelStream, client, relay,
    server::{self, Handler, Malformed, Request, Responder},
    tls,
};
use mesh_net::{End, Side, sockets::reset_on_close};
use mesh_runtime::drain::{self, Drained};
use socket2::SockRef;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::oneshot,
    task::spawn_local,
    time::timeout,
};

use self::support::{
    Accepting, Mesh, Tls, accept, key, local, local_in_real_time, mesh, mesh_with, pattern, peer, quiet, quiet_pool,
    request, secured_pair, serve_all, settle, socket_pair, unserved,
};

/// client app ↔ relay ↔ tunnel ↔ relay ↔ server app; runs `scenario` on the apps and returns both ends.
async fn relayed<F: Future>(scenario: impl FnOnce(TcpStream, TcpStream) -> F) -> (End, End, F::Output) {
    let mut mesh = mesh(quiet_pool());
    let (near, far) = mesh.open().await;
    let ((client, inner_client), (server, inner_server)) = (socket_pair().await, socket_pair().await);
    let side = |tcp: TcpStream, stream| async move {
        let outcome = relay(Rc::new(tcp), stream, Rc::default()).await;
        outcome.end
    };
    tokio::join!(side(inner_client, near), side(inner_server, far), scenario(client, server))
}

#[tokio::test]
async fn bytes_arrive_both_ways_and_half_close_passes_each_way() {
    local(async {
        for client_first in [true, false] {
            let (a, b, ()) = relayed(|client, server| async move {
                let (mut early, mut late) = if client_first { (client, server) } else { (server, client) };
                let mut text = String::new();
                early.write_all(b"question").await.unwrap();
                early.shutdown().await.unwrap();
                late.read_to_string(&mut text).await.unwrap();
                late.write_all(b"answer").await.unwrap();
                late.shutdown().await.unwrap();
                early.read_to_string(&mut text).await.unwrap();
                assert_eq!(text, "questionanswer");
            })
            .await;
            assert!(matches!((&a, &b), (End::Clean, End::Clean)), "{a:?} {b:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_reset_of_either_app_resets_the_other() {
    local(async {
        for client_resets in [true, false] {
            let (near, far, ()) = relayed(|client, server| async move {
                let (mut rude, mut victim) = if client_resets { (client, server) } else { (server, client) };
                rude.write_all(b"x").await.unwrap();
                victim.read_exact(&mut [0]).await.unwrap();
                reset_on_close(&rude).unwrap();
                drop(rude);
                let error = victim.read(&mut [0]).await.unwrap_err();
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
            })
            .await;
            let (rude, victim) = if client_resets { (near, far) } else { (far, near) };
            assert!(matches!(rude, End::Reset(Side::First)), "{rude:?}");
            assert!(matches!(victim, End::Reset(Side::Second)), "{victim:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn megabytes_pass_unchanged_and_leave_no_credit_behind() {
    local(async {
        let (_, _, received) = relayed(|mut client, mut server| async move {
            let sent: Vec<u8> = (0..8u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
            let copy = sent.clone();
            let sending = async move {
                client.write_all(&copy).await.unwrap();
                client.shutdown().await.unwrap();
                client
            };
            let mut received = Vec::new();
            let (_client, _) = tokio::join!(sending, server.read_to_end(&mut received));
            (sent, received)
        })
        .await;
        assert!(received.0 == received.1);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_never_reads_does_not_stop_its_neighbours() {
    local(async {
        let mut mesh = mesh(quiet_pool());
        let mut stuck = Vec::new();
        for _ in 0..10 {
            let (mut near, far) = mesh.open().await;
            let mut written = 0;
            let block = vec![0; 64 << 10];
            // Until the stream's own window is used up.
            while let Ok(Ok(n)) = timeout(Duration::from_millis(100), near.write(&block)).await {
                written += n;
            }
            assert!(written >= 64 << 10, "{written}");
            stuck.push((near, far));
        }
        let (mut near, mut far) = mesh.open().await;
        near.write_all(b"ping").await.unwrap();
        let mut answer = [0; 4];
        far.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"ping");
        assert_eq!(mesh.pipes.count.get(), 1, "all on one tunnel");
        assert_eq!(mesh.pool.snapshot()[0].streams.len(), 11);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn one_dial_serves_all_waiters_in_success_and_failure() {
    local(async {
        let mesh = mesh(quiet_pool());
        let (key, request) = (key("client"), request());
        mesh.pipes.fail.set(true);
        let all = futures_util::future::join_all((0..20).map(|_| mesh.pool.open(&key, &request))).await;
        assert!(all.iter().all(|result| matches!(result, Err(Error::Dial { reason: Reason::Connect, .. }))));
        assert!(mesh.pool.open(&key, &request).await.is_err());
        assert_eq!(mesh.pipes.count.get(), 1, "the failure is remembered");
        mesh.pipes.fail.set(false);
        tokio::time::advance(Duration::from_secs(2)).await;
        let all = futures_util::future::join_all((0..20).map(|_| mesh.pool.open(&key, &request))).await;
        assert!(all.iter().all(Result::is_ok));
        assert_eq!(mesh.pipes.count.get(), 2);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_takes_no_streams_is_a_failed_dial_and_not_a_loop_of_them() {
    local(async {
        let mesh = mesh_with(quiet_pool(), Settings { max_streams: 0, ..quiet() });
        for _ in 0..10 {
            assert!(matches!(mesh.pool.open(&key("client"), &request()).await, Err(Error::Refused)));
        }
        assert_eq!(mesh.pipes.count.get(), 1, "the failure is remembered");
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn full_tunnels_get_company_and_idle_ones_close() {
    local(async {
        let config = PoolConfig { max_streams: 2, idle: Duration::from_secs(300), ..quiet_pool() };
        let mut mesh = mesh(config);
        let streams = [mesh.open().await, mesh.open().await, mesh.open().await];
        assert_eq!(mesh.pool.snapshot().len(), 2);
        drop(streams);
        tokio::time::sleep(Duration::from_secs(9)).await;
        assert_eq!(mesh.pool.snapshot().len(), 2);
        tokio::time::sleep(Duration::from_secs(290)).await;
        assert_eq!(mesh.pool.snapshot().len(), 1, "one is enough for the next flow");
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(mesh.pool.snapshot().len(), 0);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn pods_never_share_and_a_retired_pod_loses_its_streams() {
    local(async {
        let mut mesh = mesh(quiet_pool());
        let (mut gone, _) = mesh.pool.open(&key("a"), &request()).await.unwrap();
        let (mut stays, _) = mesh.pool.open(&key("b"), &request()).await.unwrap();
        let (_gone_far, mut stays_far) = (mesh.accepted.recv().await.unwrap(), mesh.accepted.recv().await.unwrap());
        assert_eq!(mesh.pipes.count.get(), 2);
        mesh.pool.retire("a");
        assert!(gone.read(&mut [0]).await.is_err());
        stays.write_all(b"x").await.unwrap();
        stays_far.read_exact(&mut [0]).await.unwrap();
        assert_eq!(mesh.pool.snapshot().len(), 1);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn whoever_waits_for_an_answer_when_the_pod_goes_is_told_and_asks_nobody_else() {
    local(async {
        let (mesh, dialed, watcher) = unserved(quiet_pool());
        let slow = Rc::new(Slow { delay: Cell::new(Duration::from_secs(15)), expires: None });
        spawn_local(serve_all(dialed, quiet(), slow, watcher));
        let pool = mesh.pool.clone();
        let waiting = spawn_local(async move { pool.open(&key("client"), &request()).await });
        tokio::time::sleep(Duration::from_secs(1)).await;
        mesh.pool.retire("client");
        let error = waiting.await.unwrap().unwrap_err();
        assert!(matches!(error, Error::Retired), "{error}");
        assert_eq!(mesh.pipes.count.get(), 1, "the request may have been carried out");
    })
    .await;
}

/// Says SETTINGS, acknowledges ours, and falls silent.
async fn taciturn(pipe: DuplexStream) {
    let mut peer = peer::accept(pipe).await;
    peer.write_all(b"\0\0\0\x04\0\0\0\0\0\0\0\0\x04\x01\0\0\0\0").await.unwrap();
    let mut ignored = Vec::new();
    drop(peer.read_to_end(&mut ignored).await);
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_never_comes_leaves_it_to_keep_alive_whether_the_peer_lives() {
    local(async {
        let (mesh, mut dialed, _watcher) = unserved(PoolConfig::default());
        spawn_local(async move {
            while let Some(pipe) = dialed.recv().await {
                spawn_local(taciturn(pipe));
            }
        });
        let error = mesh.pool.open(&key("client"), &request()).await.unwrap_err();
        assert!(matches!(error, Error::AnswerTimeout(_)), "{error}");
        let error = mesh.pool.open(&key("client"), &request()).await.unwrap_err();
        assert!(matches!(error, Error::Silent(_)), "{error}");
        assert_eq!(mesh.pipes.count.get(), 1, "keep-alive decides");
        assert!(mesh.pool.open(&key("client"), &request()).await.is_err());
        assert_eq!(mesh.pipes.count.get(), 2, "and finds it dead");
        assert!(matches!(mesh.pipes.failed.borrow()[0], Error::Silent(_)));
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_has_come_counts_though_nobody_looked_in_time() {
    local(async {
        let (near, far) = duplex(1 << 20);
        let (_drain, watcher) = drain::channel();
        let (handler, _accepted) = Accepting::new();
        let serving = spawn_local(async move {
            let secured = accept(far).await;
            server::serve(secured, &Settings::default(), Budget::default(), watcher, handler).await
        });
        let mut peer = peer::connect(near).await;
        let settings = b"\0\0\0\x04\0\0\0\0\0\0\0\0\x04\x01\0\0\0\0";
        peer.write_all(&[b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &settings[..]].concat()).await.unwrap();
        for _ in 0..3 {
            let number = loop {
                let mut header = [0; 9];
                peer.read_exact(&mut header).await.unwrap();
                let mut payload = vec![0; usize::from(header[2])];
                peer.read_exact(&mut payload).await.unwrap();
                if header[3] == 6 {
                    break payload;
                }
            };
            peer.write_all(&[b"\0\0\x08\x06\x01\0\0\0\0", &number[..]].concat()).await.unwrap();
            // As if the process had been stopped for longer than a PING may take.
            tokio::time::advance(Duration::from_secs(60)).await;
        }
        peer.shutdown().await.unwrap();
        let result = serving.await.unwrap();
        assert!(matches!(result, Ok(())), "{result:?}");
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_renewed_certificate_gets_a_tunnel_of_its_own_and_open_streams_stay() {
    local(async {
        let mut mesh = mesh(quiet_pool());
        let (mut near, mut far) = mesh.open().await;
        let renewed = TunnelKey { generation: 2, ..key("client") };
        let _new = mesh.pool.open(&renewed, &request()).await.unwrap();
        assert_eq!(mesh.pipes.count.get(), 2);
        near.write_all(b"x").await.unwrap();
        far.read_exact(&mut [0]).await.unwrap();
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn drain_sends_new_streams_elsewhere_and_lets_open_ones_finish() {
    local(async {
        let mut mesh = mesh(quiet_pool());
        let (mut near, mut far) = mesh.open().await;
        let Mesh { pool, pipes, drain, .. } = mesh;
        let draining = spawn_local(drain.drain(Duration::from_secs(60)));
        settle().await;
        // The old tunnel is going away; whoever asks now gets a new one.
        drop(timeout(Duration::from_millis(10), pool.open(&key("client"), &request())).await);
        assert_eq!(pipes.count.get(), 2);
        near.write_all(b"still here").await.unwrap();
        let mut text = [0; 10];
        far.read_exact(&mut text).await.unwrap();
        assert_eq!(&text, b"still here");
        near.shutdown().await.unwrap();
        far.shutdown().await.unwrap();
        drop((near, far, pool));
        assert_eq!(draining.await.unwrap(), Drained::Forced, "the acceptor itself holds a watcher");
    })
    .await;
}

#[tokio::test]
async fn refusals_carry_their_status_and_only_503_may_be_retried() {
    local(async {
        let mesh = mesh(quiet_pool());
        for (status, retryable) in [(400, false), (401, false), (503, true)] {
            mesh.handler.status.set(StatusCode::from_u16(status).unwrap());
            let error = mesh.pool.open(&key("client"), &request()).await.unwrap_err();
            assert_eq!((error.retryable(), error.reason()), (retryable, Reason::Tunnel), "{error}");
            assert!(error.to_string().starts_with(&format!("http status: {status}")), "{error}");
        }
        assert_eq!(mesh.pipes.count.get(), 1, "a verdict leaves the tunnel usable");
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_silent_peer_meets_deadlines() {
    local(async {
        let (mesh, mut dialed, _watcher) = unserved(PoolConfig::default());
        spawn_local(async move {
            let mut silent = Vec::new();
            while let Some(pipe) = dialed.recv().await {
                silent.push(accept(pipe).await);
            }
        });
        let error = mesh.pool.open(&key("client"), &request()).await.unwrap_err();
        assert!(matches!(error, Error::HandshakeTimeout(_)), "{error}");
        assert!(mesh.pool.open(&key("client"), &request()).await.is_err());
        assert_eq!(mesh.pipes.count.get(), 1, "the failure is remembered");

        let (near, far) = secured_pair().await;
        let (_drain, watcher) = drain::channel();
        let result = server::serve(far, &Settings::default(), Budget::default(), watcher, mesh.handler.clone()).await;
        assert!(matches!(result, Err(Error::Silent(_))), "{result:?}");
        drop(near);
    })
    .await;
}

/// Answers after `delay`.
struct Slow {
    delay: Cell<Duration>,
    expires: Option<Duration>,
}

impl Handler for Slow {
    fn connect(self: Rc<Self>, _request: Request, responder: Responder) -> LocalBoxFuture<'static, ()> {
        Box::pin(async move {
            tokio::time::sleep(self.delay.get()).await;
            if let Ok(stream) = responder.accept(&HeaderMap::new()) {
                tokio::time::sleep(Duration::from_secs(3600)).await;
                drop(stream);
            }
        })
    }

    fn malformed(&self, _: &Malformed) {}

    fn expired(&self) -> LocalBoxFuture<'static, ()> {
        let at = self.expires;
        Box::pin(async move { tokio::time::sleep(at.unwrap_or(Duration::MAX)).await })
    }
}

#[tokio::test(start_paused = true)]
async fn an_expired_tunnel_keeps_its_streams_and_sends_new_ones_elsewhere() {
    local(async {
        let (mesh, dialed, watcher) = unserved(quiet_pool());
        let slow = Rc::new(Slow { delay: Cell::default(), expires: Some(Duration::from_secs(30)) });
        spawn_local(serve_all(dialed, quiet(), slow, watcher));
        let (mut open, _) = mesh.pool.open(&key("client"), &request()).await.unwrap();
        tokio::time::sleep(Duration::from_secs(31)).await;
        let _next = mesh.pool.open(&key("client"), &request()).await.unwrap();
        assert_eq!(mesh.pipes.count.get(), 2);
        let quiet = timeout(Duration::from_secs(5), open.read(&mut [0])).await;
        assert!(quiet.is_err(), "{quiet:?}");
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_slow_answer_is_waited_for_and_an_overdue_one_leaves_the_tunnel_to_the_others() {
    local(async {
        let (mesh, dialed, watcher) = unserved(quiet_pool());
        let slow = Rc::new(Slow { delay: Cell::new(Duration::from_secs(15)), expires: None });
        spawn_local(serve_all(dialed, quiet(), slow.clone(), watcher));
        let _patient = mesh.pool.open(&key("client"), &request()).await.unwrap();
        slow.delay.set(Duration::from_secs(60));
        let error = mesh.pool.open(&key("client"), &request()).await.unwrap_err();
        assert!(matches!(error, Error::AnswerTimeout(_)), "{error}");
        slow.delay.set(Duration::ZERO);
        let _next = mesh.pool.open(&key("client"), &request()).await.unwrap();
        assert_eq!(mesh.pipes.count.get(), 1, "one tunnel for all");
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn streams_that_were_reset_count_until_their_handlers_are_done() {
    local(async {
        let (near, far) = duplex(1 << 20);
        let (_drain, watcher) = drain::channel();
        let slow = Rc::new(Slow { delay: Cell::new(Duration::from_secs(60)), expires: None });
        let settings = Settings { max_streams: 2, ..quiet() };
        spawn_local(async move {
            let secured = accept(far).await;
            server::serve(secured, &settings, Budget::default(), watcher, slow).await
        });
        let (mut client, connection) = h2::client::handshake(peer::connect(near).await).await.unwrap();
        spawn_local(connection);
        let connect = || http::Request::connect("10.0.0.2:8080").body(()).unwrap();
        for _ in 0..2 {
            let abandoned = client.send_request(connect(), false).unwrap();
            settle().await;
            drop(abandoned);
            settle().await;
        }
        let (answer, _stream) = client.send_request(connect(), false).unwrap();
        assert_eq!(answer.await.unwrap_err().reason(), Some(h2::Reason::REFUSED_STREAM));
        tokio::time::sleep(Duration::from_secs(60)).await;
        let (answer, _stream) = client.send_request(connect(), false).unwrap();
        assert_eq!(answer.await.unwrap().status(), 200);
    })
    .await;
}

/// A scripted HTTP/2 server: answers 200, then does as told.
async fn scripted(pipe: DuplexStream, script: impl AsyncFnOnce(h2::SendStream<Bytes>, h2::RecvStream)) {
    let mut connection = h2::server::handshake(peer::accept(pipe).await).await.unwrap();
    let (request, mut respond) = connection.accept().await.unwrap().unwrap();
    let send = respond.send_response(Response::new(()), false).unwrap();
    let driving = async { while let Some(Ok(_)) = connection.accept().await {} };
    tokio::join!(driving, script(send, request.into_body()));
}

#[tokio::test]
async fn the_kind_of_reset_decides_between_end_and_failure() {
    local(async {
        let cases = [
            (h2::Reason::NO_ERROR, true),
            (h2::Reason::CANCEL, false),
            (h2::Reason::CONNECT_ERROR, false),
            (h2::Reason::INTERNAL_ERROR, false),
        ];
        for (reason, clean) in cases {
            let (mesh, mut dialed, _watcher) = unserved(quiet_pool());
            let (arrived, data_arrived) = oneshot::channel();
            let peer = spawn_local(async move {
                let pipe = dialed.recv().await.unwrap();
                scripted(pipe, async |mut send, _recv| {
                    send.send_data(Bytes::from_static(b"data"), false).unwrap();
                    // A reset replaces what has not been sent yet.
                    data_arrived.await.unwrap();
                    send.send_reset(reason);
                })
                .await;
            });
            let (stream, _) = mesh.pool.open(&key("client"), &request()).await.unwrap();
            let (mut app, inner) = socket_pair().await;
            let relaying = spawn_local(async move { relay(Rc::new(inner), stream, Rc::default()).await.end });
            let mut text = [0; 4];
            app.read_exact(&mut text).await.unwrap();
            assert_eq!(&text, b"data", "{reason}");
            arrived.send(()).unwrap();
            let read = app.read(&mut text).await;
            assert_eq!(matches!(read, Ok(0)), clean, "{reason}: {read:?}");
            assert_eq!(matches!(relaying.await.unwrap(), End::Clean), clean, "{reason}");
            peer.abort();
        }
    })
    .await;
}

#[tokio::test]
async fn what_is_not_a_connect_is_refused_and_the_tunnel_lives_on() {
    local(async {
        let (mut mesh, _dialed, watcher) = unserved(quiet_pool());
        let (near, far) = duplex(1 << 20);
        let handler = mesh.handler.clone();
        spawn_local(async move {
            let secured = accept(far).await;
            server::serve(secured, &quiet(), Budget::default(), watcher, handler).await
        });
        let (mut client, connection) = h2::client::handshake(peer::connect(near).await).await.unwrap();
        spawn_local(connection);
        let get = http::Request::get("https://10.0.0.2:8080/").body(()).unwrap();
        let (answer, _) = client.send_request(get, true).unwrap();
        assert_eq!(answer.await.unwrap().status(), 400);
        let mut nowhere = http::Request::connect("10.0.0.2").body(()).unwrap();
        *nowhere.version_mut() = http::Version::HTTP_2;
        let (answer, _stream) = client.send_request(nowhere, false).unwrap();
        assert_eq!(answer.await.unwrap().status(), 400);
        let good = http::Request::connect("10.0.0.2:8080").body(()).unwrap();
        let (answer, _stream) = client.send_request(good, false).unwrap();
        assert_eq!(answer.await.unwrap().status(), 200);
        assert!(mesh.accepted.recv().await.is_some());
        let told: Vec<String> = mesh.handler.malformed.borrow().iter().map(|m| m.detail.clone()).collect();
        assert_eq!(told, ["method is GET; expected CONNECT", "no valid authority pseudo header: `10.0.0.2`"]);
    })
    .await;
}

#[tokio::test]
async fn garbage_instead_of_http2_ends_that_connection_only() {
    local(async {
        let (mesh, _dialed, watcher) = unserved(quiet_pool());
        let (near, far) = duplex(1 << 20);
        let (mut near, far) = tokio::join!(peer::connect(near), accept(far));
        near.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let result = server::serve(far, &quiet(), Budget::default(), watcher, mesh.handler.clone()).await;
        assert!(result.is_err());
        let cause: Arc<dyn std::error::Error> = Arc::new(result.unwrap_err());
        assert!(cause.source().is_some());
    })
    .await;
}

#[tokio::test]
async fn an_explicit_reset_reaches_the_peer_as_one() {
    local(async {
        let mut mesh = mesh(quiet_pool());
        let (near, mut far) = mesh.open().await;
        near.reset(ResetReason::ConnectError);
        let error = far.read(&mut [0]).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    })
    .await;
}

#[tokio::test]
async fn garbage_instead_of_tls_is_told_apart_from_a_lost_transport() {
    local(async {
        let (mut near, far) = duplex(1 << 20);
        near.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let error = tls::accept(far, &Tls::get().server).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidData, "{error}");

        let (near, far) = duplex(1 << 20);
        drop(near);
        let error = tls::accept(far, &Tls::get().server).await.unwrap_err();
        assert_ne!(error.kind(), std::io::ErrorKind::InvalidData, "{error}");
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn forty_readers_that_never_read_hold_more_than_the_tunnels_window_and_stop_nobody() {
    local(async {
        // 40 MiB of promises on a tunnel whose window is 16 MiB.
        let settings = Settings { stream_window: 1 << 20, ..quiet() };
        let mut mesh = mesh_with(quiet_pool(), settings);
        let mut stuck = Vec::new();
        for _ in 0..40 {
            let (mut near, far) = mesh.open().await;
            near.write_all(&vec![0; 1 << 20]).await.unwrap();
            stuck.push((near, far));
        }
        for _ in 0..10 {
            let (mut near, mut far) = mesh.open().await;
            ping(&mut near, &mut far).await;
            ping(&mut far, &mut near).await;
        }
        assert_eq!(mesh.pipes.count.get(), 1, "all on one tunnel");
        // And what was stuck is all there once somebody reads.
        for (near, far) in &mut stuck {
            let mut received = vec![1; 1 << 20];
            far.read_exact(&mut received).await.unwrap();
            assert!(received.iter().all(|byte| *byte == 0));
            ping(near, far).await;
        }
    })
    .await;
}

async fn ping(from: &mut TunnelStream, to: &mut TunnelStream) {
    from.write_all(b"ping").await.unwrap();
    let mut answer = [0; 4];
    to.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"ping");
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_nobody_wants_any_more_still_delivers_what_was_said() {
    local(async {
        // A peer that reads nothing for longer than anybody lingers, and less than keep-alive endures.
        let (near, far) = duplex(1 << 10);
        let (near, far) = tokio::join!(support::connect(near), peer::accept(far));
        let ((answered, told_answered), (stopped, told_stopped)) = (oneshot::channel(), oneshot::channel());
        let peer = spawn_local(async move {
            let mut connection = h2::server::Builder::new()
                .initial_window_size(1 << 20)
                .initial_connection_window_size(1 << 20)
                .handshake::<_, Bytes>(far)
                .await
                .unwrap();
            let (request, mut respond) = connection.accept().await.unwrap().unwrap();
            let mut send = respond.send_response(Response::new(()), false).unwrap();
            send.send_data(Bytes::new(), true).unwrap();
            tokio::select! {
                _ = connection.accept() => panic!("no further stream"),
                answered = told_answered => answered.unwrap(),
            }
            stopped.send(()).unwrap();
            tokio::time::sleep(Duration::from_secs(5)).await;
            let driving = async { while let Some(Ok(_)) = connection.accept().await {} };
            let reading = async {
                let mut body = request.into_body();
                let mut length = 0;
                while let Some(chunk) = body.data().await {
                    length += chunk.unwrap().len();
                }
                length
            };
            tokio::join!(driving, reading).1
        });
        let (mut stream, _) = client::connect_once(near, &quiet(), Budget::default(), &request()).await.unwrap();
        assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
        answered.send(()).unwrap();
        told_stopped.await.unwrap();
        stream.write_all(&vec![7; 200_000]).await.unwrap();
        stream.shutdown().await.unwrap();
        drop(stream);
        assert_eq!(peer.await.unwrap(), 200_000);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_runs_inside_another_and_ends_with_its_stream() {
    local(async {
        let mut mesh = mesh(quiet_pool());
        let (outer_near, outer_far) = mesh.open().await;
        let (near, far) = support::secure(outer_near, outer_far).await;
        let (handler, mut accepted) = Accepting::new();
        let (_drain, watcher) = drain::channel();
        let serving =
            spawn_local(async move { server::serve(far, &quiet(), Budget::default(), watcher, handler).await });
        let (mut near, _) = client::connect_once(near, &quiet(), Budget::default(), &request()).await.unwrap();
        let mut far = accepted.recv().await.unwrap();
        ping(&mut near, &mut far).await;
        let sent = pattern(1, 3 << 20);
        let sending = async {
            near.write_all(&sent).await.unwrap();
            near.shutdown().await.unwrap();
        };
        let mut received = Vec::new();
        let ((), result) = tokio::join!(sending, far.read_to_end(&mut received));
        result.unwrap();
        assert!(received == sent);
        far.shutdown().await.unwrap();
        assert_eq!(near.read(&mut [0]).await.unwrap(), 0);
        drop((near, far));
        assert!(matches!(serving.await.unwrap(), Ok(())));
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!(mesh.pool.snapshot()[0].streams, [], "the outer stream is over too");
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_that_is_cut_ends_its_streams_with_the_reason_and_those_of_tunnels_inside_it() {
    /// Both ends of the one stream of a tunnel.
    async fn open(near: Secured, far: Secured) -> (TunnelStream, TunnelStream) {
        let (handler, mut accepted) = Accepting::new();
        spawn_local(async move {
            let (_drain, watcher) = drain::channel();
            server::serve(far, &quiet(), Budget::default(), watcher, handler).await
        });
        let (stream, _) = client::connect_once(near, &quiet(), Budget::default(), &request()).await.unwrap();
        (stream, accepted.recv().await.unwrap())
    }
    local(async {
        for nested in [false, true] {
            let (near, far) = secured_pair().await;
            let cut = near.cut();
            let (mut near, mut far) = open(near, far).await;
            if nested {
                let (inner_near, inner_far) = support::secure(near, far).await;
                (near, far) = open(inner_near, inner_far).await;
            }
            ping(&mut near, &mut far).await;
            assert!(!cut.is_over());
            cut.cut(Reason::Revoked, "not any more");
            let error = near.read(&mut [0]).await.unwrap_err();
            let said = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()).expect("ours");
            assert_eq!((said.reason(), said.to_string()), (Reason::Revoked, "not any more".to_owned()));
            assert_eq!(far.read(&mut [0]).await.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
            drop((near, far));
            settle().await;
            assert!(cut.is_over());
        }
    })
    .await;
}

#[tokio::test]
async fn flows_of_odd_sizes_pass_between_sockets_whatever_their_readers_do() {
    local_in_real_time(async {
        const SIZES: [usize; 12] =
            [0, 1, 9, 1_000, 16_375, 16_376, 65_535, 65_536, 200_000, 1_000_003, 2_500_000, (3 << 20) + 1];
        let mut mesh = mesh(quiet_pool());
        let mut flows = Vec::new();
        for (index, size) in SIZES.into_iter().cycle().take(36).enumerate() {
            let (near, far) = mesh.open().await;
            let ((client, inner_client), (server, inner_server)) = (socket_pair().await, socket_pair().await);
            // So that the sockets are what holds things up, now and then.
            for socket in [&client, &server, &inner_client, &inner_server] {
                SockRef::from(socket).set_recv_buffer_size(64 << 10).unwrap();
                SockRef::from(socket).set_send_buffer_size(64 << 10).unwrap();
            }
            let (up, down) = (pattern(2 * index as u64, size), pattern(2 * index as u64 + 1, SIZES[(index * 5) % 12]));
            let lazy = index % 3;
            flows.push(spawn_local(async move {
                let (client, server) = (client.into_split(), server.into_split());
                let (a, b, ..) = tokio::join!(
                    relay(Rc::new(inner_client), near, Rc::default()),
                    relay(Rc::new(inner_server), far, Rc::default()),
                    speak(client.1, &up),
                    listen(server.0, &up, lazy),
                    speak(server.1, &down),
                    listen(client.0, &down, lazy),
                );
                for outcome in [&a, &b] {
                    assert!(matches!(outcome.end, End::Clean), "{outcome:?}");
                }
                assert_eq!((a.sent, a.received), (up.len() as u64, down.len() as u64));
                assert_eq!((b.sent, b.received), (down.len() as u64, up.len() as u64));
            }));
        }
        for flow in flows {
            flow.await.unwrap();
        }
        assert_eq!(mesh.pool.snapshot().iter().flat_map(|tunnel| &tunnel.streams).count(), 0);
    })
    .await;
}

async fn speak(mut to: OwnedWriteHalf, bytes: &[u8]) {
    to.write_all(bytes).await.unwrap();
    to.shutdown().await.unwrap();
}

/// Reads to the end: at once, or a little at a time with others' turns between.
async fn listen(mut from: OwnedReadHalf, expected: &[u8], turns: usize) {
    let mut received = Vec::new();
    let mut buffer = [0; 5_000];
    loop {
        for _ in 0..turns {
            tokio::task::yield_now().await;
        }
        match from.read(&mut buffer).await.unwrap() {
            0 => break,
            length => received.extend_from_slice(&buffer[..length]),
        }
    }
    assert!(received == expected, "{} of {} bytes", received.len(), expected.len());
}
