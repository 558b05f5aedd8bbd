//! Tunnels in bad weather: transports that move a few bytes at a time, are not ready, stall and break, while many streams do what
//! streams do. Virtual time, fixed seeds; a seed that fails is printed. TLS makes up its own random numbers, and what the hash tables
//! do is not seeded either: a seed repeats the scenario, and nearly the same interleaving.
//!
//! What is checked: every byte in order; an end is the end, and never a truncation; whoever is reset learns it; nobody waits for ever,
//! nor for somebody else's reader; and when all is over nothing is left in the pool, the tunnels and the budgets.
//!
//! Clocks are paused: a `sleep` is a stretch of virtual time that the scenario is about (a rate, a deadline, a pause of the peer), passes
//! only while every task waits, and costs none of ours.

mod support;

use std::{
    cell::{Cell, RefCell},
    fmt,
    future::poll_fn,
    io::ErrorKind,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, HeaderName, HeaderValue, Response};
use mesh_hbone::{
    Budget, ConnectRequest, Connector, Error, LocalBoxFuture, Pool, PoolConfig, Process, ResetReason, Secured,
    Settings, TunnelKey, TunnelStream,
    server::{self, Handler, Malformed, Request, Responder},
    tls,
};
use mesh_runtime::drain::{self, DrainWatcher, Drained};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    sync::oneshot,
    task::{JoinHandle, spawn_local},
    time::{Instant, sleep, timeout},
};

use self::support::{
    Tls, key, pattern, peer, request, server_name,
    weather::{Break, Rough, Weather},
};

/// Which implementation is where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ends {
    EngineToEngine,
    EngineToPeer,
    PeerToEngine,
}

/// A reader that does not read holds out until then; everybody else is done before.
const STUBBORN: Duration = Duration::from_secs(300);
/// Nothing takes that long.
const HANG: Duration = Duration::from_secs(600);

/// Of each kind; `FAIRWAY_SIM_ROUNDS` asks for more, and `FAIRWAY_SIM_SEED` for one scenario, that often.
const ROUNDS: u64 = 120;

/// Seeds of one kind start at a multiple of this.
const APART: u64 = 1_000_000;

#[test]
fn engine_to_engine() {
    simulate(Ends::EngineToEngine, 0);
}

#[test]
fn engine_to_peer() {
    simulate(Ends::EngineToPeer, APART);
}

#[test]
fn peer_to_engine() {
    simulate(Ends::PeerToEngine, 2 * APART);
}

fn simulate(ends: Ends, first: u64) {
    let rounds = std::env::var("FAIRWAY_SIM_ROUNDS").map_or(ROUNDS, |rounds| rounds.parse().expect("a number"));
    let only = std::env::var("FAIRWAY_SIM_SEED").map(|seed| seed.parse().expect("a number"));
    for round in 0..rounds {
        let seed = only.clone().unwrap_or(first + round);
        let scenario = Rc::new(Scenario::new(ends, seed));
        let told = Told(&scenario);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let tasks = tokio::task::LocalSet::new();
        let round = tasks.run_until(run(&scenario));
        runtime.block_on(async { timeout(HANG, round).await }).expect("everybody waits for somebody");
        std::mem::forget(told);
    }
}

/// Says which seed it was.
struct Told<'a>(&'a Scenario);

impl Drop for Told<'_> {
    fn drop(&mut self) {
        eprintln!("failed: {:?}", self.0);
    }
}

/// One round, all of it decided beforehand.
#[derive(Debug)]
struct Scenario {
    ends: Ends,
    seed: u64,
    weather: Weather,
    pipe: usize,
    settings: Settings,
    /// Of an `h2` end.
    stream_window: u32,
    frame_size: u32,
    streams: Vec<Rc<Plan>>,
    /// When the server is drained.
    drain: Option<Duration>,
    /// When the client's pod goes.
    retire: Option<Duration>,
}

/// One stream: who opens it, and who accepts it.
#[derive(Debug)]
struct Plan {
    index: usize,
    start: Duration,
    near: Half,
    far: Half,
}

#[derive(Debug)]
struct Half {
    seed: u64,
    /// To be sent.
    length: usize,
    /// Most bytes of one write, and of one read.
    write: usize,
    read: usize,
    /// How often it thinks about it first, and for how long.
    pause: f64,
    pause_for: Duration,
    /// Reads nothing at all until [`STUBBORN`].
    stubborn: bool,
    /// Ends the stream then, whatever has happened.
    leave: Option<(Duration, Leave)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leave {
    Drop,
    Reset,
}

impl Scenario {
    fn new(ends: Ends, seed: u64) -> Self {
        let rng = &mut StdRng::seed_from_u64(seed);
        let piece = *[3, 50, 700, 5_000, 20_000, 300_000].choose(rng).unwrap();
        // So that a round stays short, however small the pieces.
        let most = (piece * 600).min(600_000);
        let breaks = rng.random_bool(0.15).then(|| {
            let how = if rng.random() { Break::End } else { Break::Reset };
            (rng.random_range(5_000..5_000 + most), how)
        });
        let weather = Weather {
            piece,
            pending: *[0.0, 0.05, 0.5].choose(rng).unwrap(),
            stall: *[0.0, 0.0, 0.002, 0.01].choose(rng).unwrap(),
            stall_for: Duration::from_millis(rng.random_range(1..200)),
            lazy: rng.random_bool(0.2),
            breaks,
        };
        let settings = Settings {
            stream_window: *[65_535, 100_000, 1 << 20].choose(rng).unwrap(),
            connection_window: *[65_535, 1 << 20, 16 << 20].choose(rng).unwrap(),
            frame_size: *[16_384, 64 << 10, 1 << 20].choose(rng).unwrap(),
            // Nothing is lost in this weather, it only takes long.
            handshake_timeout: Duration::from_secs(100),
            answer_timeout: Duration::from_secs(600),
            keepalive: mesh_hbone::KeepAlive {
                // Never, half of the time: what keep-alive wakes, nobody forgets.
                interval: Duration::from_secs(if rng.random() { 1_000_000 } else { rng.random_range(1..10) }),
                timeout: Duration::from_secs(600),
            },
            ..Settings::default()
        };
        let count = rng.random_range(1..=24);
        let half = |rng: &mut StdRng| {
            let length = match rng.random_range(0..4) {
                0 => 0,
                1 => rng.random_range(1..=20),
                _ => rng.random_range(1..=most / 4),
            };
            Half {
                seed: rng.random(),
                length,
                write: 1 << rng.random_range(8..18),
                read: 1 << rng.random_range(8..18),
                pause: *[0.0, 0.0, 0.1].choose(rng).unwrap(),
                pause_for: Duration::from_millis(rng.random_range(1..500)),
                stubborn: rng.random_bool(0.1),
                leave: rng.random_bool(0.15).then(|| {
                    let at = Duration::from_millis(rng.random_range(0..2_000));
                    (at, if rng.random() { Leave::Drop } else { Leave::Reset })
                }),
            }
        };
        let streams = (0..count)
            .map(|index| {
                let start = Duration::from_millis(rng.random_range(0..1_000));
                Rc::new(Plan { index, start, near: half(rng), far: half(rng) })
            })
            .collect();
        let early = |rng: &mut StdRng, odds| rng.random_bool(odds).then(|| rng.random_range(0..1_500));
        Self {
            ends,
            seed,
            weather,
            pipe: 1 << rng.random_range(9..20),
            settings,
            stream_window: *[65_535, 200_000].choose(rng).unwrap(),
            frame_size: *[16_384, 1 << 20].choose(rng).unwrap(),
            streams,
            drain: early(rng, 0.2).map(Duration::from_millis),
            retire: early(rng, 0.1).map(Duration::from_millis),
        }
    }

    /// Nothing but the streams themselves ends streams.
    fn is_calm(&self) -> bool {
        self.weather.breaks.is_none() && self.retire.is_none()
    }

    fn wire(&self, rng: &RefCell<StdRng>) -> (Rough<DuplexStream>, Rough<DuplexStream>) {
        let (near, far) = duplex(self.pipe);
        let rng = &mut *rng.borrow_mut();
        // One end notices first.
        let whole = Weather { breaks: None, ..self.weather };
        let (one, other) = if rng.random() { (self.weather, whole) } else { (whole, self.weather) };
        (Rough::new(near, one, rng), Rough::new(far, other, rng))
    }
}

/// Either implementation's end of a stream.
enum End {
    Engine(TunnelStream),
    Peer { send: SendStream<Bytes>, recv: RecvStream },
}

/// What became of one end.
#[derive(Clone, Debug, Default)]
struct Outcome {
    /// All was written and the end announced.
    finished: bool,
    received: usize,
    /// The peer's end has come.
    ended: bool,
    /// The stream or the tunnel broke.
    reset: bool,
    left: bool,
    over: Duration,
}

impl End {
    async fn live(mut self, us: &Half, them: &Half, began: Instant, rng: StdRng) -> Outcome {
        let outcome = RefCell::new(Outcome::default());
        let rng = &RefCell::new(rng);
        let both = async {
            let (sent, received) = match &mut self {
                Self::Engine(stream) => {
                    let (read, write) = tokio::io::split(stream);
                    let sending = send(us, rng, EngineWriter(write));
                    tokio::join!(sending, receive(us, them, rng, EngineReader(read), &outcome))
                }
                Self::Peer { send: writer, recv } => {
                    let sending = send(us, rng, PeerWriter(writer));
                    tokio::join!(sending, receive(us, them, rng, PeerReader(recv), &outcome))
                }
            };
            let outcome = &mut *outcome.borrow_mut();
            outcome.finished = sent.is_ok();
            outcome.ended = received.is_ok();
            outcome.reset = received.is_err() || sent.is_err();
        };
        let leaving = async {
            match us.leave {
                Some((after, how)) => {
                    sleep(after).await;
                    how
                }
                None => std::future::pending().await,
            }
        };
        let left = tokio::select! {
            () = both => None,
            how = leaving => Some(how),
        };
        match (self, left) {
            (Self::Engine(stream), Some(Leave::Reset)) => stream.reset(ResetReason::ConnectError),
            (Self::Peer { mut send, .. }, Some(Leave::Reset)) => send.send_reset(Reason::CONNECT_ERROR),
            (end, _) => drop(end),
        }
        Outcome { left: left.is_some(), over: began.elapsed(), ..outcome.into_inner() }
    }
}

/// The stream is no more.
#[derive(Debug)]
struct Gone;

trait Write {
    /// How many bytes were taken.
    async fn write(&mut self, bytes: &[u8]) -> Result<usize, Gone>;
    async fn finish(&mut self) -> Result<(), Gone>;
}

trait Read {
    /// Empty at the end.
    async fn read(&mut self, most: usize) -> Result<Vec<u8>, Gone>;
}

struct EngineWriter<'a>(tokio::io::WriteHalf<&'a mut TunnelStream>);
struct EngineReader<'a>(tokio::io::ReadHalf<&'a mut TunnelStream>);
struct PeerWriter<'a>(&'a mut SendStream<Bytes>);
struct PeerReader<'a>(&'a mut RecvStream);

fn only_reset(error: std::io::Error) -> Gone {
    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
    Gone
}

impl Write for EngineWriter<'_> {
    async fn write(&mut self, bytes: &[u8]) -> Result<usize, Gone> {
        self.0.write(bytes).await.map_err(only_reset)
    }

    async fn finish(&mut self) -> Result<(), Gone> {
        self.0.shutdown().await.map_err(only_reset)
    }
}

impl Read for EngineReader<'_> {
    async fn read(&mut self, most: usize) -> Result<Vec<u8>, Gone> {
        let mut bytes = vec![0; most];
        let length = self.0.read(&mut bytes).await.map_err(only_reset)?;
        bytes.truncate(length);
        Ok(bytes)
    }
}

impl Write for PeerWriter<'_> {
    async fn write(&mut self, bytes: &[u8]) -> Result<usize, Gone> {
        self.0.reserve_capacity(bytes.len());
        let capacity = poll_fn(|cx| self.0.poll_capacity(cx)).await.ok_or(Gone)?.map_err(|_| Gone)?;
        let length = capacity.min(bytes.len());
        self.0.send_data(Bytes::copy_from_slice(&bytes[..length]), false).map_err(|_| Gone)?;
        Ok(length)
    }

    async fn finish(&mut self) -> Result<(), Gone> {
        self.0.send_data(Bytes::new(), true).map_err(|_| Gone)
    }
}

impl Read for PeerReader<'_> {
    async fn read(&mut self, _most: usize) -> Result<Vec<u8>, Gone> {
        loop {
            let Some(chunk) = self.0.data().await.transpose().map_err(|_| Gone)? else { return Ok(Vec::new()) };
            self.0.flow_control().release_capacity(chunk.len()).map_err(|_| Gone)?;
            if !chunk.is_empty() {
                return Ok(chunk.to_vec());
            }
        }
    }
}

async fn think(half: &Half, rng: &RefCell<StdRng>) {
    let pause = {
        let rng = &mut *rng.borrow_mut();
        rng.random_bool(half.pause).then(|| half.pause_for.mul_f64(rng.random()))
    };
    if let Some(pause) = pause {
        sleep(pause).await;
    }
}

async fn send(us: &Half, rng: &RefCell<StdRng>, mut to: impl Write) -> Result<(), Gone> {
    let bytes = pattern(us.seed, us.length);
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        think(us, rng).await;
        let length = rng.borrow_mut().random_range(1..=us.write).min(rest.len());
        let written = to.write(&rest[..length]).await?;
        rest = &rest[written..];
    }
    think(us, rng).await;
    to.finish().await
}

async fn receive(
    us: &Half,
    them: &Half,
    rng: &RefCell<StdRng>,
    mut from: impl Read,
    outcome: &RefCell<Outcome>,
) -> Result<(), Gone> {
    let expected = pattern(them.seed, them.length);
    if us.stubborn {
        sleep(STUBBORN).await;
    }
    loop {
        think(us, rng).await;
        let most = rng.borrow_mut().random_range(1..=us.read);
        let bytes = from.read(most).await?;
        let outcome = &mut *outcome.borrow_mut();
        let rest = &expected[outcome.received..];
        if bytes.is_empty() {
            assert!(rest.is_empty(), "the end comes after {} of {} bytes", outcome.received, them.length);
            return Ok(());
        }
        assert!(rest.starts_with(&bytes), "{} wrong bytes after {}", bytes.len(), outcome.received);
        outcome.received += bytes.len();
    }
}

/// Names the stream in its request.
const INDEX: HeaderName = HeaderName::from_static("x-stream");

/// The accepting ends of all streams.
struct Far {
    streams: Vec<Rc<Plan>>,
    outcomes: RefCell<Vec<Option<Outcome>>>,
    running: Cell<usize>,
    tasks: RefCell<Vec<JoinHandle<()>>>,
    rng: RefCell<StdRng>,
    began: Instant,
}

impl Far {
    async fn live(self: Rc<Self>, headers: &HeaderMap, end: End) {
        let index: usize = headers[INDEX].to_str().unwrap().parse().unwrap();
        let plan = self.streams[index].clone();
        let rng = StdRng::seed_from_u64(self.rng.borrow_mut().random());
        self.running.set(self.running.get() + 1);
        let outcome = end.live(&plan.far, &plan.near, self.began, rng).await;
        self.running.set(self.running.get() - 1);
        let before = self.outcomes.borrow_mut()[index].replace(outcome);
        assert!(before.is_none(), "stream {index} was accepted twice");
    }
}

impl Handler for Far {
    fn connect(self: Rc<Self>, request: Request, responder: Responder) -> LocalBoxFuture<'static, ()> {
        Box::pin(async move {
            // In a task of its own: what the test knows of it does not depend on the tunnel's end.
            let (over, told_over) = oneshot::channel::<()>();
            let far = self.clone();
            let living = spawn_local(async move {
                let _over = over;
                if let Ok(stream) = responder.accept(&HeaderMap::new()) {
                    far.live(&request.headers, End::Engine(stream)).await;
                }
            });
            self.tasks.borrow_mut().push(living);
            drop(told_over.await);
        })
    }

    fn malformed(&self, malformed: &Malformed) {
        panic!("{malformed:?}");
    }
}

/// Dials the far end, whoever that is.
struct Dialer {
    scenario: Rc<Scenario>,
    wires: RefCell<StdRng>,
    far: Rc<Far>,
    drain: DrainWatcher,
    budget: Budget,
    serving: RefCell<Vec<JoinHandle<()>>>,
    failed: RefCell<Vec<Error>>,
}

impl Dialer {
    fn serve(&self, io: Rough<DuplexStream>) {
        let (parts, far, drain, budget) =
            (self.scenario.clone(), self.far.clone(), self.drain.clone(), self.budget.clone());
        let serving = spawn_local(async move {
            if parts.ends == Ends::EngineToPeer {
                return serve_as_peer(io, &parts, far, drain).await;
            }
            let secured = match tls::accept(io, &Tls::get().server).await {
                Ok(secured) => secured,
                Err(error) => return assert!(!parts.is_calm(), "{error}"),
            };
            let result = server::serve(secured, &parts.settings, budget, drain, far).await;
            assert!(result.is_ok() || !parts.is_calm(), "{result:?}");
        });
        self.serving.borrow_mut().push(serving);
    }
}

impl Connector for Dialer {
    fn connect(&self, _key: &TunnelKey) -> LocalBoxFuture<'_, Result<Secured, Error>> {
        Box::pin(async move {
            let (near, far) = self.scenario.wire(&self.wires);
            self.serve(far);
            let secured = tls::connect(near, &Tls::get().client, server_name()).await;
            secured.map_err(|error| Error::dial(mesh_core::reason::Reason::Tls, "no handshake", Some(Arc::new(error))))
        })
    }

    fn failed(&self, _key: &TunnelKey, error: &Error) {
        self.failed.borrow_mut().push(error.clone());
    }
}

async fn serve_as_peer(io: Rough<DuplexStream>, parts: &Scenario, far: Rc<Far>, drain: DrainWatcher) {
    let Ok(io) = peer::try_accept(io).await else { return assert!(!parts.is_calm()) };
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(parts.stream_window)
        .initial_connection_window_size(16 << 20)
        .max_frame_size(parts.frame_size)
        .max_concurrent_streams(100);
    let Ok(mut connection) = builder.handshake::<_, Bytes>(io).await else { return assert!(!parts.is_calm()) };
    let mut draining = None;
    loop {
        let next = tokio::select! {
            next = connection.accept() => next,
            (_, guard) = drain.signalled(), if draining.is_none() => {
                draining = Some(guard);
                connection.graceful_shutdown();
                continue;
            }
        };
        let (request, mut respond) = match next {
            Some(Ok(next)) => next,
            Some(Err(error)) => {
                // The engine may leave before `h2` has said everything; streams would notice.
                assert!(error.is_io() || !parts.is_calm(), "{error}");
                break;
            }
            None => break,
        };
        let Ok(send) = respond.send_response(Response::new(()), false) else { continue };
        let far_end = far.clone();
        let living = spawn_local(async move {
            let (parts, recv) = request.into_parts();
            far_end.live(&parts.headers, End::Peer { send, recv }).await;
        });
        far.tasks.borrow_mut().push(living);
    }
}

async fn run(scenario: &Rc<Scenario>) {
    let began = Instant::now();
    let rng = RefCell::new(StdRng::seed_from_u64(scenario.seed + 1));
    let process = Process::new(512 << 20);
    let budgets = [Budget::new(64 << 20, process.clone()), Budget::new(64 << 20, process.clone())];
    let (trigger, watcher) = drain::channel();
    let far = Rc::new(Far {
        streams: scenario.streams.clone(),
        outcomes: RefCell::new(vec![None; scenario.streams.len()]),
        running: Cell::new(0),
        tasks: RefCell::default(),
        rng: RefCell::new(StdRng::seed_from_u64(scenario.seed + 2)),
        began,
    });
    let calm = scenario.is_calm();
    let dialer = Rc::new(Dialer {
        scenario: scenario.clone(),
        wires: RefCell::new(StdRng::seed_from_u64(scenario.seed + 3)),
        far: far.clone(),
        drain: watcher,
        budget: budgets[1].clone(),
        serving: RefCell::default(),
        failed: RefCell::default(),
    });
    let near = match scenario.ends {
        Ends::EngineToEngine | Ends::EngineToPeer => {
            let config = PoolConfig { settings: scenario.settings.clone(), ..PoolConfig::default() };
            Near::Pool(Pool::new(config, budgets[0].clone(), dialer.clone()))
        }
        Ends::PeerToEngine => {
            Near::Peer(Rc::new(PeerClient { dialer: dialer.clone(), current: tokio::sync::Mutex::default() }))
        }
    };

    let opening: Vec<_> = scenario
        .streams
        .iter()
        .map(|plan| {
            let (plan, near) = (plan.clone(), near.clone());
            let rng = StdRng::seed_from_u64(rng.borrow_mut().random());
            spawn_local(async move {
                sleep(plan.start).await;
                let end = near.open(plan.index).await?;
                Ok(end.live(&plan.near, &plan.far, began, rng).await)
            })
        })
        .collect();
    let drain_at = scenario.drain;
    let (over, told_over) = oneshot::channel::<()>();
    let draining = spawn_local(async move {
        // A trigger that is dropped cuts everything.
        let Some(at) = drain_at else { return drop(told_over.await) };
        sleep(at).await;
        assert_eq!(trigger.drain(HANG).await, Drained::Complete);
    });
    if let (Some(at), Near::Pool(pool)) = (scenario.retire, &near) {
        let pool = pool.clone();
        spawn_local(async move {
            sleep(at).await;
            pool.retire("client");
        });
    }

    let mut nears = Vec::new();
    for stream in opening {
        nears.push(stream.await.unwrap());
    }
    // The far ends learn of it in their time.
    while far.running.get() > 0 {
        sleep(Duration::from_secs(1)).await;
    }
    let tasks = std::mem::take(&mut *far.tasks.borrow_mut());
    for task in tasks {
        task.await.unwrap();
    }
    for (plan, near_end) in scenario.streams.iter().zip(&nears) {
        let far_end = far.outcomes.borrow_mut()[plan.index].take();
        check(scenario, plan, near_end.as_ref(), far_end.as_ref());
    }

    // Nothing is left of the streams.
    sleep(Duration::from_secs(10)).await;
    if let Near::Pool(pool) = &near {
        for tunnel in pool.snapshot() {
            assert_eq!(tunnel.streams, [], "in the pool");
        }
    }
    for budget in &budgets {
        assert_eq!(budget.used(), 0, "streams leave memory behind");
    }
    if calm {
        assert!(dialer.failed.borrow().is_empty(), "{:?}", dialer.failed);
    }
    // Nor of the tunnels.
    drop(near);
    let serving = std::mem::take(&mut *dialer.serving.borrow_mut());
    for server in serving {
        server.await.unwrap();
    }
    drop(dialer);
    drop(over);
    draining.await.unwrap();
    assert_eq!(process.used(), 0, "tunnels leave memory behind");
}

/// Who opens the streams.
#[derive(Clone)]
enum Near {
    Pool(Pool),
    Peer(Rc<PeerClient>),
}

struct PeerClient {
    dialer: Rc<Dialer>,
    current: tokio::sync::Mutex<Option<h2::client::SendRequest<Bytes>>>,
}

impl Near {
    async fn open(&self, index: usize) -> Result<End, String> {
        let value = HeaderValue::from(index);
        match self {
            Self::Pool(pool) => {
                let wanted = ConnectRequest { headers: vec![(INDEX, value)], ..request() };
                let opened = pool.open(&key("client"), &wanted).await;
                opened.map(|(stream, _)| End::Engine(stream)).map_err(|error| format!("{error:?}"))
            }
            Self::Peer(client) => {
                let mut wanted = http::Request::connect("10.0.0.2:8080").body(()).unwrap();
                wanted.headers_mut().insert(INDEX, value);
                client.open(wanted).await
            }
        }
    }
}

impl PeerClient {
    /// On the current connection, or on another one when that takes no more.
    async fn open(&self, wanted: http::Request<()>) -> Result<End, String> {
        for _ in 0..3 {
            let client = {
                let mut current = self.current.lock().await;
                let usable = match current.take() {
                    Some(client) => client.ready().await.ok(),
                    None => None,
                };
                match usable {
                    Some(client) => current.insert(client).clone(),
                    None => current.insert(self.dial().await?).clone(),
                }
            };
            let Ok(mut client) = client.ready().await else { continue };
            let Ok((answer, send)) = client.send_request(wanted.clone(), false) else { continue };
            match answer.await {
                Ok(answer) => {
                    assert_eq!(answer.status(), 200);
                    return Ok(End::Peer { send, recv: answer.into_body() });
                }
                Err(error) if error.is_go_away() || error.reason() == Some(Reason::REFUSED_STREAM) => {}
                Err(error) => return Err(format!("{error:?}")),
            }
        }
        Err("refused again and again".into())
    }

    async fn dial(&self) -> Result<h2::client::SendRequest<Bytes>, String> {
        let parts = &self.dialer.scenario;
        let (near, far) = parts.wire(&self.dialer.wires);
        self.dialer.serve(far);
        let io = peer::try_connect(near).await.map_err(|error| error.to_string())?;
        let mut builder = h2::client::Builder::new();
        builder
            .initial_window_size(parts.stream_window)
            .initial_connection_window_size(16 << 20)
            .max_frame_size(parts.frame_size);
        let (client, connection) = builder.handshake(io).await.map_err(|error| error.to_string())?;
        spawn_local(async move { drop(connection.await) });
        Ok(client)
    }
}

fn check(scenario: &Scenario, plan: &Plan, near: Result<&Outcome, &String>, far: Option<&Outcome>) {
    let told = Both { plan, near, far };
    let (Ok(near), Some(far)) = (near, far) else {
        // An end that was never opened, or that had left before the other one came to be.
        let left = [near.ok(), far].into_iter().flatten().any(|end| end.left);
        let excused = left || !scenario.is_calm() || (scenario.drain.is_some() && near.is_err());
        return assert!(excused, "{told}");
    };
    let disturbed = near.left || far.left || !scenario.is_calm();
    for (us, half, other) in [(near, &plan.near, far), (far, &plan.far, near)] {
        // One that is whole and in order both ways knows of no reset.
        let whole = us.finished && us.ended;
        if !disturbed {
            assert!(whole && !us.reset, "{told}");
        }
        if !us.left {
            assert!(whole || us.reset, "{told}");
        }
        // Whoever left early, and was still wanted, is missed.
        if other.left && !us.left && !us.ended {
            assert!(us.reset, "{told}");
        }
        // Nobody waits for somebody else's reader.
        let patient = plan.near.stubborn || plan.far.stubborn;
        if !patient && !us.left {
            assert!(us.over < STUBBORN, "{half:?} took {:?}: {told}", us.over);
        }
    }
}

struct Both<'a> {
    plan: &'a Plan,
    near: Result<&'a Outcome, &'a String>,
    far: Option<&'a Outcome>,
}

impl fmt::Display for Both<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stream {}: near {:?}, far {:?}", self.plan.index, self.near, self.far)
    }
}
