//! The `h2` crate on rustls as a permanent peer, in both roles, in memory and over loopback sockets. What it cannot do (padding, raw
//! frames) is in `engine.rs` and `abuse.rs`.

mod support;

use std::{
    cell::{Cell, RefCell},
    collections::HashSet,
    future::poll_fn,
    io::ErrorKind,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::join_all;
use h2::{Reason, RecvStream, SendStream, client::SendRequest, server::SendResponse};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};
use mesh_hbone::{
    Budget, ConnectRequest, Connector, Error, LocalBoxFuture, Pool, PoolConfig, ResetReason, Secured, Settings,
    TunnelKey, TunnelStream, client, server,
    tls::{self, Transport},
};
use mesh_runtime::drain::{self, DrainTrigger, DrainWatcher};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, duplex},
    sync::{mpsc, watch},
    task::{JoinHandle, spawn_local},
};

use self::support::{
    Accepting, Tls, key, local, local_in_real_time, pattern,
    peer::{self, Rekey},
    quiet, request, server_name, socket_pair,
};

/// Who dials.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Engine,
    Peer,
}

#[derive(Clone, Copy, Debug)]
enum Wire {
    Memory,
    Loopback,
}

type Io = Box<dyn Transport>;

impl Wire {
    async fn pair(self) -> (Io, Io) {
        match self {
            Self::Memory => {
                let (near, far) = duplex(256 << 10);
                (Box::new(near), Box::new(far))
            }
            Self::Loopback => {
                let (near, far) = socket_pair().await;
                (Box::new(near), Box::new(far))
            }
        }
    }
}

/// What differs between sessions.
#[derive(Clone, Debug)]
struct Config {
    /// Of the engine.
    settings: Settings,
    /// Of the peer.
    stream_window: u32,
    connection_window: u32,
    frame_size: u32,
    max_streams: u32,
    /// The server sends session tickets.
    tickets: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            settings: quiet(),
            stream_window: 65_535,
            connection_window: 65_535,
            frame_size: 16_384,
            max_streams: 200,
            tickets: false,
        }
    }
}

impl Config {
    fn large() -> Self {
        let settings = Settings { stream_window: 1 << 20, frame_size: 1 << 20, ..quiet() };
        Self { settings, stream_window: 1 << 20, connection_window: 16 << 20, frame_size: 1 << 20, ..Self::default() }
    }

    fn server_tls(&self) -> &'static Arc<rustls::ServerConfig> {
        if self.tickets { &Tls::get().server_with_tickets } else { &Tls::get().server }
    }

    fn client_tls(&self) -> &'static Arc<rustls::ClientConfig> {
        if self.tickets { &Tls::get().client_resuming } else { &Tls::get().client }
    }
}

/// A stream at the peer's end.
struct PeerStream {
    send: SendStream<Bytes>,
    recv: RecvStream,
}

impl PeerStream {
    async fn write_all(&mut self, bytes: &[u8]) -> Result<(), h2::Error> {
        let mut bytes = Bytes::copy_from_slice(bytes);
        while !bytes.is_empty() {
            self.send.reserve_capacity(bytes.len());
            let Some(capacity) = poll_fn(|cx| self.send.poll_capacity(cx)).await else {
                return Err(Reason::CANCEL.into());
            };
            let length = capacity?.min(bytes.len());
            self.send.send_data(bytes.split_to(length), false)?;
        }
        Ok(())
    }

    fn finish(&mut self) {
        self.send.send_data(Bytes::new(), true).unwrap();
    }

    /// As much as is there; empty at the end.
    async fn read(&mut self) -> Result<Bytes, h2::Error> {
        let Some(chunk) = self.recv.data().await.transpose()? else { return Ok(Bytes::new()) };
        self.recv.flow_control().release_capacity(chunk.len())?;
        Ok(chunk)
    }

    async fn read_exact(&mut self, length: usize) -> Result<Vec<u8>, h2::Error> {
        let mut all = Vec::new();
        while all.len() < length {
            let chunk = self.read().await?;
            assert!(!chunk.is_empty(), "ends after {} of {length} bytes", all.len());
            all.extend_from_slice(&chunk);
        }
        assert_eq!(all.len(), length);
        Ok(all)
    }

    async fn read_to_end(&mut self) -> Result<Vec<u8>, h2::Error> {
        let mut all = Vec::new();
        while !self.recv.is_end_stream() {
            all.extend_from_slice(&self.read().await?);
        }
        Ok(all)
    }
}

/// Both ends in one place.
struct Session {
    end: End,
    rekey: Rekey,
    drain: DrainTrigger,
    engine_task: Option<JoinHandle<Result<(), Error>>>,
    peer_task: Rc<RefCell<Option<JoinHandle<()>>>>,
    /// Tells the peer's server to send GOAWAY.
    peer_leaves: watch::Sender<bool>,
}

enum End {
    Dialing { pool: Pool, wires: Rc<Wires>, accepted: mpsc::Receiver<PeerRequest> },
    Accepting { client: SendRequest<Bytes>, handler: Rc<Accepting>, accepted: mpsc::Receiver<TunnelStream> },
}

/// A request at the peer's server.
struct PeerRequest {
    request: http::Request<RecvStream>,
    respond: SendResponse<Bytes>,
}

impl PeerRequest {
    fn accept(self, headers: HeaderMap) -> PeerStream {
        let mut respond = self.respond;
        let mut response = Response::new(());
        *response.headers_mut() = headers;
        let send = respond.send_response(response, false).unwrap();
        PeerStream { send, recv: self.request.into_body() }
    }
}

/// Dials the peer.
struct Wires {
    wire: Wire,
    config: Config,
    rekey: Rekey,
    requests: mpsc::Sender<PeerRequest>,
    count: Cell<usize>,
    peer_task: Rc<RefCell<Option<JoinHandle<()>>>>,
    peer_leaves: watch::Receiver<bool>,
    failed: RefCell<Vec<Error>>,
}

impl Connector for Wires {
    fn connect(&self, _key: &TunnelKey) -> LocalBoxFuture<'_, Result<Secured, Error>> {
        Box::pin(async move {
            self.count.set(self.count.get() + 1);
            let (near, far) = self.wire.pair().await;
            let (config, rekey, requests) = (self.config.clone(), self.rekey.clone(), self.requests.clone());
            let mut leaves = self.peer_leaves.clone();
            let serving = spawn_local(async move {
                let mut io = peer::accept_with(far, config.server_tls()).await;
                io.rekey = rekey;
                let mut builder = h2::server::Builder::new();
                builder
                    .initial_window_size(config.stream_window)
                    .initial_connection_window_size(config.connection_window)
                    .max_frame_size(config.frame_size)
                    .max_concurrent_streams(config.max_streams);
                let mut connection = builder.handshake::<_, Bytes>(io).await.unwrap();
                let mut leaving = false;
                loop {
                    let next = tokio::select! {
                        next = connection.accept() => next,
                        _ = leaves.wait_for(|leaves| *leaves), if !leaving => {
                            leaving = true;
                            connection.graceful_shutdown();
                            continue;
                        }
                    };
                    let Some(Ok((request, respond))) = next else { break };
                    drop(requests.send(PeerRequest { request, respond }).await);
                }
            });
            *self.peer_task.borrow_mut() = Some(serving);
            Ok(tls::connect(near, self.config.client_tls(), server_name()).await.unwrap())
        })
    }

    fn failed(&self, _key: &TunnelKey, error: &Error) {
        self.failed.borrow_mut().push(error.clone());
    }
}

impl Session {
    async fn new(role: Role, wire: Wire, config: Config) -> Self {
        let rekey = Rekey::default();
        let (drain, watcher) = drain::channel();
        let peer_task = Rc::new(RefCell::new(None));
        let (peer_leaves, told_to_leave) = watch::channel(false);
        let (end, engine_task) = match role {
            Role::Engine => {
                let (requests, accepted) = mpsc::channel(256);
                let pool_config = PoolConfig { settings: config.settings.clone(), ..PoolConfig::default() };
                let wires = Rc::new(Wires {
                    wire,
                    config,
                    rekey: rekey.clone(),
                    requests,
                    count: Cell::new(0),
                    peer_task: peer_task.clone(),
                    peer_leaves: told_to_leave,
                    failed: RefCell::default(),
                });
                (End::Dialing { pool: Pool::new(pool_config, Budget::default(), wires.clone()), wires, accepted }, None)
            }
            Role::Peer => {
                let (client, task, handler, accepted) = Self::dial(wire, config, watcher, &rekey, &peer_task).await;
                (End::Accepting { client, handler, accepted }, Some(task))
            }
        };
        Self { end, rekey, drain, engine_task, peer_task, peer_leaves }
    }

    /// The peer dials the engine.
    async fn dial(
        wire: Wire,
        config: Config,
        watcher: DrainWatcher,
        rekey: &Rekey,
        peer_task: &RefCell<Option<JoinHandle<()>>>,
    ) -> (SendRequest<Bytes>, JoinHandle<Result<(), Error>>, Rc<Accepting>, mpsc::Receiver<TunnelStream>) {
        let (near, far) = wire.pair().await;
        let (handler, accepted) = Accepting::new();
        let (serving, server_tls, settings) = (handler.clone(), config.server_tls(), config.settings.clone());
        let engine_task = spawn_local(async move {
            let secured = tls::accept(far, server_tls).await.unwrap();
            server::serve(secured, &settings, Budget::default(), watcher, serving).await
        });
        let mut io = peer::connect_with(near, config.client_tls()).await;
        io.rekey = rekey.clone();
        let mut builder = h2::client::Builder::new();
        builder
            .initial_window_size(config.stream_window)
            .initial_connection_window_size(config.connection_window)
            .max_frame_size(config.frame_size)
            .initial_max_send_streams(100);
        let (client, connection) = builder.handshake(io).await.unwrap();
        *peer_task.borrow_mut() = Some(spawn_local(async move { drop(connection.await) }));
        (client, engine_task, handler, accepted)
    }

    /// A stream: our end, and the peer's.
    async fn open(&mut self) -> (TunnelStream, PeerStream) {
        match &mut self.end {
            End::Dialing { pool, accepted, .. } => {
                let (key, wanted) = (key("client"), request());
                let far = async { accepted.recv().await.unwrap().accept(HeaderMap::new()) };
                let (near, far) = tokio::join!(pool.open(&key, &wanted), far);
                (near.unwrap().0, far)
            }
            End::Accepting { client, accepted, .. } => {
                *client = client.clone().ready().await.unwrap();
                let (answer, send) = client.send_request(connect_request(), false).unwrap();
                let answer = answer.await.unwrap();
                assert_eq!(answer.status(), 200);
                (accepted.recv().await.unwrap(), PeerStream { send, recv: answer.into_body() })
            }
        }
    }

    fn pool(&self) -> &Pool {
        let End::Dialing { pool, .. } = &self.end else { panic!("the peer dials") };
        pool
    }

    fn wires(&self) -> &Wires {
        let End::Dialing { wires, .. } = &self.end else { panic!("the peer dials") };
        wires
    }

    /// The connection disappears, without a word, as far as TLS and HTTP/2 are concerned.
    async fn peer_vanishes(&self) {
        let task = self.peer_task.borrow_mut().take().unwrap();
        task.abort();
        drop(task.await);
    }
}

fn connect_request() -> http::Request<()> {
    http::Request::connect("10.0.0.2:8080").body(()).unwrap()
}

/// Each scenario in both roles, in memory and over sockets.
macro_rules! with_every_session {
    ($($name:ident)*) => {
        mod engine_dials_in_memory {
            $(#[tokio::test(start_paused = true)]
            async fn $name() {
                super::local(super::$name(super::Role::Engine, super::Wire::Memory)).await;
            })*
        }
        mod engine_dials_over_loopback {
            $(#[tokio::test]
            async fn $name() {
                super::local_in_real_time(super::$name(super::Role::Engine, super::Wire::Loopback)).await;
            })*
        }
        mod peer_dials_in_memory {
            $(#[tokio::test(start_paused = true)]
            async fn $name() {
                super::local(super::$name(super::Role::Peer, super::Wire::Memory)).await;
            })*
        }
        mod peer_dials_over_loopback {
            $(#[tokio::test]
            async fn $name() {
                super::local_in_real_time(super::$name(super::Role::Peer, super::Wire::Loopback)).await;
            })*
        }
    };
}

with_every_session! {
    bytes_of_every_size_pass_both_ways
    bytes_of_every_size_pass_through_large_windows
    either_end_may_close_first
    the_peers_resets_are_told_apart
    our_resets_carry_their_code
    a_stream_dropped_is_cancelled
    keys_change_while_bytes_flow
    session_tickets_are_read_past
    stalled_readers_of_ours_stop_nobody
    stalled_readers_of_the_peer_stop_nobody
    a_peer_that_vanishes_breaks_its_streams
    a_peer_that_vanishes_between_streams_is_no_failure
    repeated_headers_arrive_as_they_were_sent
    many_short_streams_leave_nothing_behind
}

const SIZES: [usize; 19] = [
    0,
    1,
    2,
    15,
    16,
    1_000,
    4_095,
    16_366,
    16_375,
    16_376,
    16_384,
    16_393,
    65_499,
    65_535,
    65_536,
    100_003,
    262_144,
    (1 << 20) + 1,
    (3 << 20) + 7,
];

async fn bytes_of_every_size_pass_both_ways(role: Role, wire: Wire) {
    exchange_every_size(Session::new(role, wire, Config::default()).await).await;
}

async fn bytes_of_every_size_pass_through_large_windows(role: Role, wire: Wire) {
    exchange_every_size(Session::new(role, wire, Config::large()).await).await;
}

/// All at once: each stream one size to the peer and another one back.
async fn exchange_every_size(mut session: Session) {
    let mut all = Vec::new();
    for (index, size) in SIZES.into_iter().enumerate() {
        let (near, far) = session.open().await;
        all.push(exchange(near, far, index as u64, size, SIZES[SIZES.len() - 1 - index]));
    }
    join_all(all).await;
}

/// Sends `up` bytes to the peer and `down` bytes back at the same time, and checks both, ends included.
async fn exchange(near: TunnelStream, far: PeerStream, seed: u64, up: usize, down: usize) {
    let (upward, downward) = (pattern(2 * seed, up), pattern(2 * seed + 1, down));
    let (mut near_read, mut near_write) = tokio::io::split(near);
    let PeerStream { send, recv } = far;
    let near_sends = async {
        near_write.write_all(&upward).await.unwrap();
        near_write.shutdown().await.unwrap();
    };
    let near_receives = async {
        let mut received = Vec::new();
        near_read.read_to_end(&mut received).await.unwrap();
        assert!(received == downward, "stream {seed}: {} of {down} bytes down", received.len());
    };
    let far_sends = send_all(send, &downward);
    let far_receives = async {
        let received = receive_all(recv).await;
        assert!(received == upward, "stream {seed}: {} of {up} bytes up", received.len());
    };
    tokio::join!(near_sends, near_receives, far_sends, far_receives);
}

async fn send_all(mut send: SendStream<Bytes>, bytes: &[u8]) {
    let mut bytes = Bytes::copy_from_slice(bytes);
    while !bytes.is_empty() {
        send.reserve_capacity(bytes.len());
        let capacity = poll_fn(|cx| send.poll_capacity(cx)).await.unwrap().unwrap();
        let length = capacity.min(bytes.len());
        send.send_data(bytes.split_to(length), false).unwrap();
    }
    send.send_data(Bytes::new(), true).unwrap();
}

async fn receive_all(mut recv: RecvStream) -> Vec<u8> {
    let mut all = Vec::new();
    while let Some(chunk) = recv.data().await {
        let chunk = chunk.unwrap();
        recv.flow_control().release_capacity(chunk.len()).unwrap();
        all.extend_from_slice(&chunk);
    }
    all
}

async fn either_end_may_close_first(role: Role, wire: Wire) {
    let mut session = Session::new(role, wire, Config::default()).await;
    let (mut near, mut far) = session.open().await;
    near.write_all(b"question").await.unwrap();
    near.shutdown().await.unwrap();
    assert_eq!(far.read_to_end().await.unwrap(), b"question");
    let sending = async {
        far.write_all(&pattern(1, 200_000)).await.unwrap();
        far.finish();
    };
    let mut answer = Vec::new();
    let (result, ()) = tokio::join!(near.read_to_end(&mut answer), sending);
    result.unwrap();
    assert!(answer == pattern(1, 200_000));

    let (mut near, mut far) = session.open().await;
    far.write_all(b"question").await.unwrap();
    far.finish();
    let mut question = Vec::new();
    near.read_to_end(&mut question).await.unwrap();
    assert_eq!(question, b"question");
    let sending = async {
        near.write_all(&pattern(2, 200_000)).await.unwrap();
        near.shutdown().await.unwrap();
    };
    let (answer, ()) = tokio::join!(far.read_to_end(), sending);
    assert!(answer.unwrap() == pattern(2, 200_000));
}

async fn the_peers_resets_are_told_apart(role: Role, wire: Wire) {
    let mut session = Session::new(role, wire, Config::default()).await;
    let codes = [
        (Reason::NO_ERROR, true),
        (Reason::CANCEL, false),
        (Reason::CONNECT_ERROR, false),
        (Reason::INTERNAL_ERROR, false),
    ];
    for (code, is_end) in codes {
        let (mut near, mut far) = session.open().await;
        far.write_all(b"data").await.unwrap();
        let mut data = [0; 4];
        near.read_exact(&mut data).await.unwrap();
        far.send.send_reset(code);
        let read = near.read(&mut data).await;
        assert_eq!(matches!(read, Ok(0)), is_end, "{code}: {read:?}");
        if let Err(error) = read {
            assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{code}");
        }
        assert_eq!(near.write(b"x").await.unwrap_err().kind(), ErrorKind::ConnectionReset, "{code}");
    }
    let (near, far) = session.open().await;
    exchange(near, far, 1, 1000, 1000).await;
}

async fn our_resets_carry_their_code(role: Role, wire: Wire) {
    let mut session = Session::new(role, wire, Config::default()).await;
    let codes = [
        (ResetReason::Cancel, Reason::CANCEL),
        (ResetReason::ConnectError, Reason::CONNECT_ERROR),
        (ResetReason::Internal, Reason::INTERNAL_ERROR),
    ];
    for (reason, code) in codes {
        let (mut near, mut far) = session.open().await;
        near.write_all(b"data").await.unwrap();
        assert_eq!(far.read_exact(4).await.unwrap(), b"data");
        near.reset(reason);
        let error = far.read().await.unwrap_err();
        assert_eq!(error.reason(), Some(code));
    }
    let (near, far) = session.open().await;
    exchange(near, far, 1, 1000, 1000).await;
}

async fn a_stream_dropped_is_cancelled(role: Role, wire: Wire) {
    let mut session = Session::new(role, wire, Config::default()).await;
    let (mut near, mut far) = session.open().await;
    near.shutdown().await.unwrap();
    assert_eq!(far.read_to_end().await.unwrap(), b"");
    drop(near);
    let reset = poll_fn(|cx| far.send.poll_reset(cx)).await.unwrap();
    assert_eq!(reset, Reason::CANCEL, "half closed is not closed");

    let (near, mut far) = session.open().await;
    drop(near);
    assert_eq!(far.read().await.unwrap_err().reason(), Some(Reason::CANCEL));
}

async fn keys_change_while_bytes_flow(role: Role, wire: Wire) {
    let mut session = Session::new(role, wire, Config::default()).await;
    for round in 0..5 {
        let (near, far) = session.open().await;
        session.rekey.set(4);
        exchange(near, far, round, 300_000, 300_000).await;
        assert_eq!(session.rekey.get(), 0, "every KeyUpdate was sent");
    }
}

async fn session_tickets_are_read_past(role: Role, wire: Wire) {
    let config = Config { tickets: true, ..Config::default() };
    let mut session = Session::new(role, wire, config).await;
    let (near, far) = session.open().await;
    exchange(near, far, 1, 100_000, 100_000).await;
}

async fn stalled_readers_of_ours_stop_nobody(role: Role, wire: Wire) {
    // 40 MiB of promises, on a tunnel whose window is 16 MiB.
    let settings = Settings { stream_window: 1 << 20, ..quiet() };
    let mut session = Session::new(role, wire, Config { settings, ..Config::default() }).await;
    let mut stalled = Vec::new();
    for _ in 0..40 {
        let (near, mut far) = session.open().await;
        far.write_all(&pattern(1, 1 << 20)).await.unwrap();
        stalled.push((near, far));
    }
    for _ in 0..10 {
        let (mut near, mut far) = session.open().await;
        ping(&mut near, &mut far).await;
    }
    for (near, far) in &mut stalled {
        let mut received = vec![0; 1 << 20];
        near.read_exact(&mut received).await.unwrap();
        assert!(received == pattern(1, 1 << 20));
        ping(near, far).await;
    }
}

async fn stalled_readers_of_the_peer_stop_nobody(role: Role, wire: Wire) {
    let config = Config { connection_window: 16 << 20, ..Config::default() };
    let mut session = Session::new(role, wire, config).await;
    let mut stalled = Vec::new();
    for _ in 0..40 {
        let (mut near, far) = session.open().await;
        near.write_all(&pattern(1, 65_535)).await.unwrap();
        stalled.push((near, far));
    }
    // More of the same waits for its stream's window.
    let blocked: Vec<_> = stalled
        .into_iter()
        .map(|(mut near, mut far)| {
            let (go, told) = tokio::sync::oneshot::channel::<()>();
            let writing = spawn_local(async move {
                near.write_all(&pattern(2, 100_000)).await.unwrap();
                near
            });
            let reading = spawn_local(async move {
                told.await.unwrap();
                assert!(far.read_exact(65_535).await.unwrap() == pattern(1, 65_535));
                assert!(far.read_exact(100_000).await.unwrap() == pattern(2, 100_000));
                far
            });
            (go, writing, reading)
        })
        .collect();
    for _ in 0..10 {
        let (mut near, mut far) = session.open().await;
        ping(&mut near, &mut far).await;
    }
    for (go, writing, reading) in blocked {
        go.send(()).unwrap();
        ping(&mut writing.await.unwrap(), &mut reading.await.unwrap()).await;
    }
}

async fn ping(near: &mut TunnelStream, far: &mut PeerStream) {
    near.write_all(b"ping").await.unwrap();
    assert_eq!(far.read_exact(4).await.unwrap(), b"ping");
    far.write_all(b"pong").await.unwrap();
    let mut answer = [0; 4];
    near.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"pong");
}

async fn a_peer_that_vanishes_breaks_its_streams(role: Role, wire: Wire) {
    let mut session = Session::new(role, wire, Config::default()).await;
    let (mut near, mut far) = session.open().await;
    ping(&mut near, &mut far).await;
    // What had ended in order before stays whole.
    let (mut whole, mut whole_far) = session.open().await;
    whole_far.write_all(b"whole").await.unwrap();
    whole_far.finish();
    whole.shutdown().await.unwrap();
    assert_eq!(whole_far.read_to_end().await.unwrap(), b"");
    ping(&mut near, &mut far).await;
    session.peer_vanishes().await;
    let error = near.read(&mut [0]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert!(near.write(b"x").await.is_err());
    let mut text = Vec::new();
    whole.read_to_end(&mut text).await.unwrap();
    assert_eq!(text, b"whole");
    if let Some(task) = session.engine_task.take() {
        assert!(matches!(task.await.unwrap(), Err(Error::Lost { .. })));
    } else {
        // The pool dials anew.
        let (mut near, mut far) = session.open().await;
        ping(&mut near, &mut far).await;
        assert_eq!(session.wires().count.get(), 2);
    }
}

async fn a_peer_that_vanishes_between_streams_is_no_failure(role: Role, wire: Wire) {
    let mut session = Session::new(role, wire, Config::default()).await;
    let (near, far) = session.open().await;
    exchange(near, far, 1, 10_000, 10_000).await;
    session.peer_vanishes().await;
    if let Some(task) = session.engine_task.take() {
        assert!(matches!(task.await.unwrap(), Ok(())));
    } else {
        let (near, far) = loop {
            // Until the news has come.
            tokio::task::yield_now().await;
            if session.pool().snapshot().is_empty() {
                break session.open().await;
            }
            // Over loopback the news takes real time, and nothing announces it; the length of the pause decides nothing.
            tokio::time::sleep(Duration::from_millis(1)).await;
        };
        exchange(near, far, 2, 10_000, 10_000).await;
        assert!(session.wires().failed.borrow().is_empty(), "{:?}", session.wires().failed);
    }
}

/// Values of all kinds of compression: long and short, repeated, sensitive, with few and many bits in Huffman's code.
fn headers(round: usize) -> Vec<(HeaderName, HeaderValue)> {
    let mut sensitive = HeaderValue::from_static("secret");
    sensitive.set_sensitive(true);
    let value = |text: String| HeaderValue::try_from(text).unwrap();
    let name = HeaderName::from_static;
    vec![
        (name("traceparent"), value(format!("00-{round:032x}-{round:016x}-00"))),
        (name("baggage"), value("k8s.namespace.name=demo,k8s.deployment.name=client,service.name=client".repeat(3))),
        (name("x-repeated"), value("the same".into())),
        (name("x-repeated"), value(format!("another {}", round % 3))),
        (name("x-repeated"), value("the same".into())),
        (name("x-empty"), value(String::new())),
        (name("x-bits"), HeaderValue::from_bytes(&(0x80..=0xFF).collect::<Vec<u8>>()).unwrap()),
        (name("x-long"), value("~".repeat(round * 97 % 3000))),
        (name("authorization"), sensitive),
    ]
}

async fn repeated_headers_arrive_as_they_were_sent(role: Role, wire: Wire) {
    let mut session = Session::new(role, wire, Config::default()).await;
    for round in 0..60 {
        let mut expected = HeaderMap::new();
        for (name, value) in headers(round) {
            expected.append(name, value);
        }
        match &mut session.end {
            End::Dialing { pool, accepted, .. } => {
                let (key, wanted) = (key("client"), ConnectRequest { headers: headers(round), ..request() });
                let far = async {
                    let request = accepted.recv().await.unwrap();
                    assert_eq!(request.request.headers(), &expected);
                    request.accept(expected.clone())
                };
                let (near, _far) = tokio::join!(pool.open(&key, &wanted), far);
                let (_near, response) = near.unwrap();
                assert_eq!(response.headers, expected);
            }
            End::Accepting { client, handler, .. } => {
                let mut wanted = connect_request();
                *wanted.headers_mut() = expected.clone();
                *handler.headers.borrow_mut() = expected.clone();
                let (answer, _send) = client.send_request(wanted, false).unwrap();
                let answer = answer.await.unwrap();
                assert_eq!(answer.headers(), &expected);
                assert_eq!(handler.requests.borrow()[round], expected);
            }
        }
    }
}

async fn many_short_streams_leave_nothing_behind(role: Role, wire: Wire) {
    let mut session = Session::new(role, wire, Config::default()).await;
    for round in 0..300 {
        let (near, far) = session.open().await;
        exchange(near, far, round, 100, 1000).await;
    }
    if role == Role::Engine {
        assert_eq!(session.wires().count.get(), 1);
        assert_eq!(session.pool().snapshot()[0].streams, []);
    }
}

// The rest has one role only.

#[tokio::test(start_paused = true)]
async fn a_peer_that_says_goaway_keeps_its_streams_and_gets_no_more() {
    local(async {
        let mut session = Session::new(Role::Engine, Wire::Memory, Config::default()).await;
        let (mut near, mut far) = session.open().await;
        session.peer_leaves.send_replace(true);
        ping(&mut near, &mut far).await;
        session.peer_leaves.send_replace(false);
        let (mut next, mut next_far) = session.open().await;
        assert_eq!(session.wires().count.get(), 2, "elsewhere");
        ping(&mut near, &mut far).await;
        ping(&mut next, &mut next_far).await;
        exchange(near, far, 1, 100_000, 100_000).await;
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!(session.pool().snapshot().len(), 1, "the old one is over");
        assert!(session.wires().failed.borrow().is_empty());
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn our_drain_lets_the_peers_streams_finish() {
    local(async {
        let mut session = Session::new(Role::Peer, Wire::Memory, Config::default()).await;
        let (mut near, mut far) = session.open().await;
        let Session { end, drain, engine_task, peer_task, .. } = session;
        let draining = spawn_local(drain.drain(Duration::from_secs(60)));
        tokio::time::sleep(Duration::from_secs(1)).await;
        let End::Accepting { client, .. } = end else { panic!("the peer dials") };
        let error = match client.ready().await {
            Ok(mut client) => client.send_request(connect_request(), false).unwrap().0.await.unwrap_err(),
            Err(error) => error,
        };
        assert!(error.is_go_away() || error.reason() == Some(Reason::REFUSED_STREAM), "{error}");
        ping(&mut near, &mut far).await;
        exchange(near, far, 1, 100_000, 100_000).await;
        assert!(matches!(engine_task.unwrap().await.unwrap(), Ok(())));
        assert_eq!(draining.await.unwrap(), drain::Drained::Complete);
        peer_task.take().unwrap().await.unwrap();
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_client_that_wants_no_more_streams_keeps_those_it_has() {
    local(async {
        let mut session = Session::new(Role::Peer, Wire::Memory, Config::default()).await;
        let (mut near, mut far) = session.open().await;
        let Session { end, engine_task, drain, .. } = session;
        // The last handle: h2 says GOAWAY when the streams are over.
        drop(end);
        ping(&mut near, &mut far).await;
        exchange(near, far, 1, 100_000, 100_000).await;
        assert!(matches!(engine_task.unwrap().await.unwrap(), Ok(())));
        drop(drain);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_gives_up_the_connection_breaks_its_streams() {
    local(async {
        let (near, far) = duplex(1 << 20);
        let peer = spawn_local(async move {
            let mut connection = h2::server::handshake(peer::accept(far).await).await.unwrap();
            let (_request, mut respond) = connection.accept().await.unwrap().unwrap();
            let mut send = respond.send_response(Response::new(()), false).unwrap();
            send.send_data(Bytes::from_static(b"data"), false).unwrap();
            let quiet = tokio::time::timeout(Duration::from_secs(1), connection.accept()).await;
            assert!(quiet.is_err());
            connection.abrupt_shutdown(Reason::INTERNAL_ERROR);
            while let Some(Ok(_)) = connection.accept().await {}
        });
        let secured = support::connect(near).await;
        let (mut stream, _) = client::connect_once(secured, &quiet(), Budget::default(), &request()).await.unwrap();
        let mut data = [0; 4];
        stream.read_exact(&mut data).await.unwrap();
        assert_eq!(stream.read(&mut data).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
        peer.await.unwrap();
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_refusal_by_the_peer_may_be_retried() {
    local(async {
        let mut session = Session::new(Role::Engine, Wire::Memory, Config::default()).await;
        let End::Dialing { pool, accepted, .. } = &mut session.end else { panic!("we dial") };
        let refusing = async { accepted.recv().await.unwrap().respond.send_reset(Reason::REFUSED_STREAM) };
        let (key, wanted) = (key("client"), request());
        let (refused, ()) = tokio::join!(pool.open(&key, &wanted), refusing);
        let error = refused.unwrap_err();
        assert!(matches!(error, Error::Refused), "{error}");
        assert!(error.retryable());

        let resetting = async { accepted.recv().await.unwrap().respond.send_reset(Reason::INTERNAL_ERROR) };
        let (reset, ()) = tokio::join!(pool.open(&key, &wanted), resetting);
        assert!(matches!(reset, Err(Error::Lost { .. })));

        let rejecting = async {
            let mut respond = accepted.recv().await.unwrap().respond;
            let response = Response::builder().status(StatusCode::SERVICE_UNAVAILABLE).body(()).unwrap();
            respond.send_response(response, true).unwrap();
        };
        let (rejected, ()) = tokio::join!(pool.open(&key, &wanted), rejecting);
        assert!(matches!(rejected, Err(Error::Status(StatusCode::SERVICE_UNAVAILABLE))));
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_refusal_of_ours_has_its_status_and_ends_the_stream() {
    local(async {
        let session = Session::new(Role::Peer, Wire::Memory, Config::default()).await;
        let End::Accepting { client, handler, .. } = &session.end else { panic!("the peer dials") };
        let mut client = client.clone();
        handler.status.set(StatusCode::UNAUTHORIZED);
        for _ in 0..100 {
            let (answer, send) = client.send_request(connect_request(), false).unwrap();
            let answer = answer.await.unwrap();
            assert_eq!(answer.status(), 401);
            let mut stream = PeerStream { send, recv: answer.into_body() };
            assert!(stream.recv.is_end_stream());
            let reset = poll_fn(|cx| stream.send.poll_reset(cx)).await.unwrap();
            assert_eq!(reset, Reason::NO_ERROR, "RFC 9113 §8.1");
        }
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn the_peers_limit_is_kept_and_further_streams_go_elsewhere() {
    for limit in 1..=3 {
        local(async {
            let config = Config { max_streams: limit, ..Config::default() };
            let mut session = Session::new(Role::Engine, Wire::Memory, config).await;
            let mut open = Vec::new();
            for _ in 0..10 {
                open.push(session.open().await);
            }
            let limit = usize::try_from(limit).unwrap();
            assert_eq!(session.wires().count.get(), 10_usize.div_ceil(limit));
            for (index, (near, far)) in open.into_iter().enumerate() {
                exchange(near, far, index as u64, 10_000, 10_000).await;
            }
            assert!(session.pool().snapshot().iter().all(|tunnel| tunnel.peer_max_streams == Some(limit)));
        })
        .await;
    }
}

#[tokio::test(start_paused = true)]
async fn our_limit_makes_the_peer_wait() {
    for limit in 1..=3 {
        local(async {
            let settings = Settings { max_streams: limit, ..quiet() };
            let session = Session::new(Role::Peer, Wire::Memory, Config { settings, ..Config::default() }).await;
            let End::Accepting { client, mut accepted, .. } = session.end else { panic!("the peer dials") };
            let client = client.ready().await.unwrap();
            let limit = usize::try_from(limit).unwrap();
            let (most, now) = (Cell::new(0), Cell::new(0));
            let all = (0..10_u64).map(|index| {
                let mut client = client.clone();
                async move {
                    client = client.ready().await.unwrap();
                    let (answer, send) = client.send_request(connect_request(), false).unwrap();
                    (index, send, answer.await.unwrap().into_body())
                }
            });
            let openers = async {
                for opener in all.map(spawn_local).collect::<Vec<_>>() {
                    let (index, send, recv) = opener.await.unwrap();
                    send_all(send, &pattern(index, 1000)).await;
                    receive_all(recv).await;
                }
            };
            let serving = async {
                let mut handled = Vec::new();
                for _ in 0..10 {
                    let mut near = accepted.recv().await.unwrap();
                    now.set(now.get() + 1);
                    most.set(most.get().max(now.get()));
                    let now = &now;
                    handled.push(async move {
                        let mut bytes = Vec::new();
                        near.read_to_end(&mut bytes).await.unwrap();
                        assert_eq!(bytes.len(), 1000);
                        near.shutdown().await.unwrap();
                        now.set(now.get() - 1);
                    });
                    if handled.len() == limit {
                        join_all(handled.drain(..)).await;
                    }
                }
                join_all(handled).await;
            };
            tokio::join!(openers, serving);
            assert!(most.get() <= limit, "{} of {limit}", most.get());
        })
        .await;
    }
}

#[tokio::test(start_paused = true)]
async fn close_notify_and_a_plain_end_of_the_transport_both_end_the_tunnel_in_order() {
    local(async {
        for close_notify in [true, false] {
            let (near, far) = duplex(1 << 20);
            let (_drain, watcher) = drain::channel();
            let (handler, _accepted) = Accepting::new();
            let serving = spawn_local(async move {
                let secured = support::accept(far).await;
                server::serve(secured, &quiet(), Budget::default(), watcher, handler).await
            });
            let mut peer = peer::connect(near).await;
            peer.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
            let mut settings = [0; 9];
            peer.read_exact(&mut settings).await.unwrap();
            assert_eq!(settings[3], 4, "SETTINGS come first");
            if close_notify {
                peer.shutdown().await.unwrap();
                // The engine's own goodbye: GOAWAY or not, the end is an end.
                let mut rest = Vec::new();
                drop(peer.read_to_end(&mut rest).await);
            }
            drop(peer);
            assert!(matches!(serving.await.unwrap(), Ok(())), "close_notify {close_notify}");
        }
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn peers_that_ask_alike_get_streams_of_their_own() {
    local(async {
        let mut session = Session::new(Role::Engine, Wire::Memory, Config::default()).await;
        let mut ids = HashSet::new();
        for _ in 0..50 {
            let (near, _far) = session.open().await;
            ids.insert(near.snapshot().id);
        }
        assert_eq!(ids.len(), 50);
    })
    .await;
}
