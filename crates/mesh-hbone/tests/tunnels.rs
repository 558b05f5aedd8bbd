//! Both ends of tunnels against each other, and against scripted HTTP/2 peers, over in-memory transports.

use std::{
    cell::{Cell, RefCell},
    future::Future,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Response, StatusCode};
use mesh_core::{headers::Authority, identity::Identity, reason::Reason};
use mesh_hbone::{
    BoxedTlsStream, ConnectRequest, Connector, Error, LocalBoxFuture, Pool, PoolConfig, ResetReason, Settings,
    TunnelKey, TunnelStream, relay,
    server::{self, Handler, Malformed, Request, Responder},
};
use mesh_net::{BufferPool, End, Progress, Side, sockets::reset_on_close};
use mesh_runtime::drain::{self, DrainTrigger, DrainWatcher, Drained};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    net::{TcpListener, TcpStream},
    sync::{mpsc, oneshot},
    task::{LocalSet, spawn_local},
};

async fn local<T>(test: impl Future<Output = T>) -> T {
    LocalSet::new().run_until(test).await
}

fn key(name: &str) -> TunnelKey {
    TunnelKey {
        source_uid: name.into(),
        source_ip: [10, 0, 0, 1].into(),
        source_identity: Identity::new("cluster.local", "demo", name),
        generation: 1,
        destination: "10.0.0.2:15008".parse().unwrap(),
        accepted: vec![Identity::new("cluster.local", "demo", "server")].into(),
        network: "".into(),
    }
}

fn request() -> ConnectRequest {
    let address: SocketAddr = "10.0.0.2:8080".parse().unwrap();
    ConnectRequest { authority: Authority::Address(address), headers: Vec::new() }
}

/// Accepts everything (or answers `status`) and hands the streams to the test.
struct Accepting {
    status: Cell<StatusCode>,
    streams: mpsc::Sender<TunnelStream>,
    malformed: RefCell<Vec<Malformed>>,
}

impl Handler for Accepting {
    fn connect(self: Rc<Self>, _request: Request, responder: Responder) -> LocalBoxFuture<'static, ()> {
        Box::pin(async move {
            match self.status.get() {
                StatusCode::OK => {
                    let stream = responder.accept(HeaderMap::new()).unwrap();
                    self.streams.send(stream).await.unwrap();
                }
                status => responder.reject(status),
            }
        })
    }

    fn malformed(&self, malformed: &Malformed) {
        self.malformed.borrow_mut().push(malformed.clone());
    }
}

/// Dials in-memory pipes; the far ends go to the test, or to nobody.
struct Pipes {
    dialed: mpsc::Sender<DuplexStream>,
    fail: Cell<bool>,
    count: Cell<usize>,
}

impl Connector for Pipes {
    fn connect(&self, _key: &TunnelKey) -> LocalBoxFuture<'_, Result<BoxedTlsStream, Error>> {
        Box::pin(async move {
            self.count.set(self.count.get() + 1);
            tokio::task::yield_now().await;
            if self.fail.get() {
                return Err(Error::dial(Reason::Connect, "connection refused", None));
            }
            let (near, far) = duplex(1 << 20);
            self.dialed.send(far).await.unwrap();
            Ok(Box::new(near) as BoxedTlsStream)
        })
    }
}

struct Mesh {
    pool: Pool,
    pipes: Rc<Pipes>,
    handler: Rc<Accepting>,
    accepted: mpsc::Receiver<TunnelStream>,
    drain: DrainTrigger,
}

/// A pool whose every tunnel ends in a server of ours.
fn mesh(config: PoolConfig) -> Mesh {
    let (mesh, dialed, watcher) = unserved(config);
    spawn_local(serve_all(dialed, mesh.handler.clone(), watcher));
    mesh
}

fn unserved(config: PoolConfig) -> (Mesh, mpsc::Receiver<DuplexStream>, DrainWatcher) {
    let (dials, dialed) = mpsc::channel(64);
    let (streams, accepted) = mpsc::channel(256);
    let (drain, watcher) = drain::channel();
    let pipes = Rc::new(Pipes { dialed: dials, fail: Cell::new(false), count: Cell::new(0) });
    let handler = Rc::new(Accepting { status: Cell::new(StatusCode::OK), streams, malformed: RefCell::default() });
    let pool = Pool::new(config, pipes.clone());
    (Mesh { pool, pipes, handler, accepted, drain }, dialed, watcher)
}

async fn serve_all(mut dialed: mpsc::Receiver<DuplexStream>, handler: Rc<impl Handler + 'static>, drain: DrainWatcher) {
    while let Some(pipe) = dialed.recv().await {
        let (handler, drain) = (handler.clone(), drain.clone());
        spawn_local(async move { server::serve(pipe, &Settings::default(), drain, handler).await });
    }
}

impl Mesh {
    async fn open(&mut self) -> (TunnelStream, TunnelStream) {
        let (near, _) = self.pool.open(&key("client"), &request()).await.unwrap();
        (near, self.accepted.recv().await.unwrap())
    }
}

async fn socket_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (a, b) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    (a.unwrap(), b.unwrap().0)
}

/// client app ↔ relay ↔ tunnel ↔ relay ↔ server app; runs `scenario` on the apps and returns both ends.
async fn relayed<F: Future>(scenario: impl FnOnce(TcpStream, TcpStream) -> F) -> (End, End, F::Output) {
    let mut mesh = mesh(PoolConfig::default());
    let (near, far) = mesh.open().await;
    let ((client, inner_client), (server, inner_server)) = (socket_pair().await, socket_pair().await);
    let side = |tcp: TcpStream, stream| async move {
        let outcome = relay(&tcp, stream, &BufferPool::new(64 << 10, 4), &Progress::default()).await;
        drop(tcp);
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
        let mut mesh = mesh(PoolConfig::default());
        let mut stuck = Vec::new();
        for _ in 0..10 {
            let (mut near, far) = mesh.open().await;
            let mut written = 0;
            let block = vec![0; 64 << 10];
            // Until the stream's own window is used up.
            while let Ok(Ok(n)) = tokio::time::timeout(Duration::from_millis(100), near.write(&block)).await {
                written += n;
            }
            assert!(written >= 1 << 20, "{written}");
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
        let mesh = mesh(PoolConfig::default());
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
async fn full_tunnels_get_company_and_idle_ones_close() {
    local(async {
        let config = PoolConfig { max_streams: 2, idle: Duration::from_secs(300), ..PoolConfig::default() };
        let mut mesh = mesh(config);
        let streams = [mesh.open().await, mesh.open().await, mesh.open().await];
        assert_eq!(mesh.pool.snapshot().len(), 2);
        drop(streams);
        tokio::time::sleep(Duration::from_secs(299)).await;
        assert_eq!(mesh.pool.snapshot().len(), 2);
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(mesh.pool.snapshot().len(), 0);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn pods_never_share_and_a_retired_pod_loses_its_streams() {
    local(async {
        let mut mesh = mesh(PoolConfig::default());
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
async fn a_renewed_certificate_gets_a_tunnel_of_its_own_and_open_streams_stay() {
    local(async {
        let mut mesh = mesh(PoolConfig::default());
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
        let mut mesh = mesh(PoolConfig::default());
        let (mut near, mut far) = mesh.open().await;
        let Mesh { pool, pipes, drain, .. } = mesh;
        let draining = spawn_local(drain.drain(Duration::from_secs(60)));
        tokio::time::sleep(Duration::from_millis(10)).await;
        // The old tunnel is going away; whoever asks now gets a new one.
        drop(tokio::time::timeout(Duration::from_millis(10), pool.open(&key("client"), &request())).await);
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
        let mesh = mesh(PoolConfig::default());
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
                silent.push(pipe);
            }
        });
        let error = mesh.pool.open(&key("client"), &request()).await.unwrap_err();
        assert!(matches!(error, Error::AnswerTimeout(_)), "{error}");
        assert!(mesh.pool.open(&key("client"), &request()).await.is_err());
        assert_eq!(mesh.pipes.count.get(), 1, "keep-alive decides");
        assert!(mesh.pool.open(&key("client"), &request()).await.is_err());
        assert_eq!(mesh.pipes.count.get(), 2, "and finds it dead");

        let (near, far) = duplex(1024);
        let (_drain, watcher) = drain::channel();
        let result = server::serve(near, &Settings::default(), watcher, mesh.handler.clone()).await;
        assert!(matches!(result, Err(Error::HandshakeTimeout(_))), "{result:?}");
        drop(far);
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
            if let Ok(stream) = responder.accept(HeaderMap::new()) {
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
        let (mesh, dialed, watcher) = unserved(PoolConfig::default());
        let slow = Rc::new(Slow { delay: Cell::default(), expires: Some(Duration::from_secs(30)) });
        spawn_local(serve_all(dialed, slow, watcher));
        let (mut open, _) = mesh.pool.open(&key("client"), &request()).await.unwrap();
        tokio::time::sleep(Duration::from_secs(31)).await;
        let _next = mesh.pool.open(&key("client"), &request()).await.unwrap();
        assert_eq!(mesh.pipes.count.get(), 2);
        let quiet = tokio::time::timeout(Duration::from_secs(5), open.read(&mut [0])).await;
        assert!(quiet.is_err(), "{quiet:?}");
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_slow_answer_is_waited_for_and_an_overdue_one_leaves_the_tunnel_to_the_others() {
    local(async {
        let (mesh, dialed, watcher) = unserved(PoolConfig::default());
        let slow = Rc::new(Slow { delay: Cell::new(Duration::from_secs(15)), expires: None });
        spawn_local(serve_all(dialed, slow.clone(), watcher));
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
        let settings = Settings { max_streams: 2, ..Settings::default() };
        spawn_local(async move { server::serve(far, &settings, watcher, slow).await });
        let (mut client, connection) = h2::client::handshake(near).await.unwrap();
        spawn_local(connection);
        let connect = || http::Request::connect("10.0.0.2:8080").body(()).unwrap();
        for _ in 0..2 {
            let abandoned = client.send_request(connect(), false).unwrap();
            tokio::time::sleep(Duration::from_millis(10)).await;
            drop(abandoned);
            tokio::time::sleep(Duration::from_millis(10)).await;
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
    let mut connection = h2::server::handshake(pipe).await.unwrap();
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
            let (mesh, mut dialed, _watcher) = unserved(PoolConfig::default());
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
            let relaying = spawn_local(async move {
                relay(&inner, stream, &BufferPool::new(64 << 10, 4), &Progress::default()).await.end
            });
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
        let (mut mesh, _dialed, watcher) = unserved(PoolConfig::default());
        let (near, far) = duplex(1 << 20);
        let handler = mesh.handler.clone();
        spawn_local(async move { server::serve(far, &Settings::default(), watcher, handler).await });
        let (mut client, connection) = h2::client::handshake(near).await.unwrap();
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
        let (mesh, _dialed, watcher) = unserved(PoolConfig::default());
        let (mut near, far) = duplex(1 << 20);
        near.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let result = server::serve(far, &Settings::default(), watcher, mesh.handler.clone()).await;
        assert!(result.is_err());
        let cause: Arc<dyn std::error::Error> = Arc::new(result.unwrap_err());
        assert!(cause.source().is_some());
    })
    .await;
}

#[tokio::test]
async fn an_explicit_reset_reaches_the_peer_as_one() {
    local(async {
        let mut mesh = mesh(PoolConfig::default());
        let (near, mut far) = mesh.open().await;
        near.reset(ResetReason::ConnectError);
        let error = far.read(&mut [0]).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    })
    .await;
}
