//! Servers that are bothered, and peers that bother them with whatever frames and records they like.

use std::{cell::RefCell, collections::VecDeque, rc::Rc, sync::Arc, time::Duration};

use http::{HeaderMap, StatusCode};
use mesh_hbone::{
    Budget, Error, LocalBoxFuture, Settings,
    engine::{
        frame::{self, ErrorCode, HEADER, Header, Kind},
        handshake::{Established, Handshake},
        record::{self, ContentType, OVERHEAD, Open, Opened, Seal},
    },
    server::{self, Handler, Malformed, Request, Responder},
    tls,
};
use mesh_runtime::drain::{self, DrainTrigger, DrainWatcher};
use rustls::{ClientConfig, ServerConfig};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, ReadHalf, WriteHalf, copy, duplex, split},
    sync::Notify,
    task::{JoinHandle, spawn_local},
    time::{sleep, timeout},
};

use super::{
    certificates::{Parties, name},
    peer::{self, settings, settings_ack},
};

thread_local! {
    static PARTIES: Parties = Parties::new();
}

/// Of whoever dials.
pub(crate) fn client_config() -> Arc<ClientConfig> {
    PARTIES.with(|parties| parties.client.clone())
}

/// Of whoever is dialled.
pub(crate) fn server_config() -> Arc<ServerConfig> {
    PARTIES.with(|parties| parties.server.clone())
}

/// What the handler does with a CONNECT, by the port of its target.
pub(crate) const ECHO: u16 = 80;
/// Takes the stream and never reads from it.
pub(crate) const STALL: u16 = 81;
/// Never answers.
pub(crate) const SILENT: u16 = 82;
/// Everything else is forbidden.
pub(crate) const FORBIDDEN: u16 = 83;

pub(crate) struct Application {
    pub(crate) malformed: RefCell<Vec<String>>,
}

impl Handler for Application {
    fn connect(self: Rc<Self>, request: Request, mut responder: Responder) -> LocalBoxFuture<'static, ()> {
        Box::pin(async move {
            match request.authority.port() {
                ECHO => {
                    let Ok(stream) = responder.accept(&HeaderMap::new()) else { return };
                    let (mut read, mut write) = split(stream);
                    // It ends with its peer, however that ends.
                    if copy(&mut read, &mut write).await.is_ok() {
                        drop(write.shutdown().await);
                    }
                }
                STALL => {
                    let Ok(mut stream) = responder.accept(&HeaderMap::new()) else { return };
                    // Until its stream is over.
                    while stream.write_all(b"x").await.is_ok() {
                        sleep(Duration::from_secs(1)).await;
                    }
                }
                SILENT => responder.abandoned().await,
                _ => responder.reject(StatusCode::FORBIDDEN),
            }
        })
    }

    fn malformed(&self, malformed: &Malformed) {
        self.malformed.borrow_mut().push(malformed.detail.clone());
    }
}

/// One pod: its tunnels share a handler and a budget.
pub(crate) struct Server {
    pub(crate) settings: Settings,
    pub(crate) budget: Budget,
    pub(crate) application: Rc<Application>,
    watcher: DrainWatcher,
    _trigger: DrainTrigger,
}

impl Server {
    pub(crate) fn new(budget: Budget) -> Self {
        let (trigger, watcher) = drain::channel();
        let application = Rc::new(Application { malformed: RefCell::default() });
        Self { settings: Settings::default(), budget, application, watcher, _trigger: trigger }
    }

    /// A tunnel to a peer that has not said anything yet, over pipes of `capacity` bytes.
    pub(crate) async fn tunnel_through(&self, capacity: usize) -> (Bother, Served) {
        let (near, far) = duplex(capacity);
        let config = server_config();
        let (settings, budget) = (self.settings.clone(), self.budget.clone());
        let (watcher, application) = (self.watcher.clone(), self.application.clone());
        let served = spawn_local(async move {
            let secured = tls::accept(far, &config).await.expect("a handshake");
            server::serve(secured, &settings, budget, watcher, application).await
        });
        (Bother::connect(near).await, Served(served))
    }

    /// A tunnel to a peer that has sent its SETTINGS and acknowledged ours.
    pub(crate) async fn tunnel(&self) -> (Bother, Served) {
        let (mut bother, served) = self.tunnel_through(1 << 20).await;
        bother.say(&[&frame::PREFACE[..], &settings(&[]), &settings_ack()].concat()).await;
        (bother, served)
    }
}

/// The serving of one tunnel.
pub(crate) struct Served(JoinHandle<Result<(), Error>>);

impl Served {
    /// How it ended; it must, in less than a virtual minute.
    pub(crate) async fn end(self) -> Result<(), Error> {
        timeout(Duration::from_secs(60), self.0).await.expect("the tunnel ends").expect("no panic")
    }

    pub(crate) fn is_over(&self) -> bool {
        self.0.is_finished()
    }
}

/// What a peer has heard.
#[derive(Default)]
struct Heard {
    frames: RefCell<VecDeque<(Header, Vec<u8>)>>,
    news: Notify,
}

/// A peer that knows the keys and nothing of manners.
pub(crate) struct Bother {
    write: WriteHalf<DuplexStream>,
    seal: Seal,
    heard: Rc<Heard>,
    /// Of the tunnel, not answered.
    pings: Vec<Vec<u8>>,
    /// Reads all the time, from when it is told to.
    reading: Option<(ReadHalf<DuplexStream>, Open, Vec<u8>)>,
}

impl Bother {
    pub(crate) async fn connect(io: DuplexStream) -> Self {
        let handshake = PARTIES.with(|parties| Handshake::client(&parties.client, name()));
        Self::shake_hands(io, handshake.expect("a configuration")).await
    }

    pub(crate) async fn accept(io: DuplexStream) -> Self {
        let handshake = PARTIES.with(|parties| Handshake::server(&parties.server));
        Self::shake_hands(io, handshake.expect("a configuration")).await
    }

    async fn shake_hands(mut io: DuplexStream, mut handshake: Handshake) -> Self {
        let (mut input, mut output) = (Vec::new(), Vec::new());
        loop {
            let read = handshake.read(&input).expect("a handshake");
            input.drain(..read);
            handshake.write(&mut output);
            io.write_all(&output).await.expect("the peer is there");
            output.clear();
            if handshake.is_done() {
                break;
            }
            assert_ne!(io.read_buf(&mut input).await.expect("the peer is there"), 0);
        }
        let Established { seal, open, .. } = handshake.finish().expect("keys");
        let (read, write) = split(io);
        Self { write, seal, heard: Rc::default(), pings: Vec::new(), reading: Some((read, open, input)) }
    }

    /// Closes its direction without a word.
    pub(crate) async fn leave(mut self) {
        self.write.shutdown().await.expect("the tunnel is there");
    }

    /// From now on whatever the tunnel says is read at once.
    pub(crate) fn listen(&mut self) {
        if let Some((read, open, input)) = self.reading.take() {
            spawn_local(listen(read, open, input, self.heard.clone()));
        }
    }

    pub(crate) fn sealed(&mut self, content: ContentType, plaintext: &[u8]) -> Vec<u8> {
        let mut record = vec![0; plaintext.len() + OVERHEAD];
        record[record::HEADER..][..plaintext.len()].copy_from_slice(plaintext);
        self.seal.seal(&mut record, content, plaintext.len()).expect("a key");
        record
    }

    pub(crate) fn key_update(&mut self, request: bool) -> Vec<u8> {
        let mut record = vec![0; record::KEY_UPDATE_RECORD];
        self.seal.key_update(&mut record, request).expect("a key");
        record
    }

    /// Says `plaintext` in full records and listens; the tunnel may end before everything is said.
    pub(crate) async fn say(&mut self, plaintext: &[u8]) {
        self.listen();
        self.say_deaf(plaintext).await;
    }

    /// As [`Self::say`], without listening.
    pub(crate) async fn say_deaf(&mut self, plaintext: &[u8]) {
        for piece in plaintext.chunks(record::MAX_PLAINTEXT) {
            let record = self.sealed(ContentType::ApplicationData, piece);
            self.write(&record).await;
        }
    }

    /// Ciphertext as it is.
    pub(crate) async fn write(&mut self, ciphertext: &[u8]) {
        drop(self.write.write_all(ciphertext).await);
    }

    /// The next frame that `wanted` says yes to; those before it are forgotten.
    pub(crate) async fn next<T>(&mut self, mut wanted: impl FnMut(&Header, &[u8]) -> Option<T>) -> T {
        self.listen();
        let find = async {
            loop {
                while let Some((header, payload)) = self.heard.frames.borrow_mut().pop_front() {
                    if header.kind == Kind::Ping && !header.has(frame::ACK) {
                        self.pings.push(payload.clone());
                    }
                    if let Some(found) = wanted(&header, &payload) {
                        return found;
                    }
                }
                self.heard.news.notified().await;
            }
        };
        timeout(Duration::from_secs(60), find).await.expect("the tunnel says it")
    }

    /// The code of the GOAWAY that ends the tunnel.
    pub(crate) async fn go_away(&mut self) -> ErrorCode {
        self.next(|header, payload| (header.kind == Kind::GoAway).then(|| ErrorCode(word(&payload[4..])))).await
    }

    /// The code with which the tunnel resets a stream.
    pub(crate) async fn reset(&mut self, stream: u32) -> ErrorCode {
        let wanted = |header: &Header, payload: &[u8]| {
            (header.kind == Kind::RstStream && header.stream == stream).then(|| ErrorCode(word(payload)))
        };
        self.next(wanted).await
    }

    /// Frames heard and not asked for.
    pub(crate) fn unasked(&self) -> Vec<Header> {
        self.heard.frames.borrow().iter().map(|(header, _)| *header).collect()
    }

    /// Opens a stream to the echo and waits for the answer.
    pub(crate) async fn open(&mut self, stream: u32) {
        self.say(&connect(stream, ECHO)).await;
        self.next(|header, _| (header.kind == Kind::Headers && header.stream == stream).then_some(())).await;
    }

    /// Has `bytes` echoed on an open stream.
    pub(crate) async fn echo(&mut self, stream: u32, bytes: &[u8]) {
        self.say(&peer::data(stream, bytes)).await;
        let mut echoed = Vec::new();
        self.next(|header, payload| {
            assert!(!(header.kind == Kind::RstStream && header.stream == stream), "the stream was reset");
            if header.kind == Kind::Data && header.stream == stream {
                echoed.extend_from_slice(payload);
            }
            (echoed.len() >= bytes.len()).then_some(())
        })
        .await;
        assert_eq!(echoed, bytes);
    }

    /// Answers the tunnel's PINGs, as it should; what else was heard is forgotten.
    pub(crate) async fn answer_pings(&mut self) {
        let heard = self.heard.frames.take();
        let pings = heard.into_iter().filter(|(header, _)| header.kind == Kind::Ping && !header.has(frame::ACK));
        let pings = self.pings.drain(..).chain(pings.map(|(_, payload)| payload));
        let pongs: Vec<u8> = pings.flat_map(|payload| peer::frame(Kind::Ping, frame::ACK, 0, &payload)).collect();
        self.say(&pongs).await;
    }
}

async fn listen(mut read: ReadHalf<DuplexStream>, mut open: Open, mut input: Vec<u8>, heard: Rc<Heard>) {
    let mut plaintext = Vec::new();
    loop {
        while let Some(length) = record::header(&input).expect("a record").filter(|length| *length <= input.len()) {
            let mut record: Vec<u8> = input.drain(..length).collect();
            match open.open(&mut record).expect("a record") {
                Opened::Data(data) => plaintext.extend_from_slice(data),
                Opened::Handshake(_) => open.update().expect("a key"),
                Opened::Alert { .. } => {}
            }
        }
        let mut at = if plaintext.starts_with(frame::PREFACE) { frame::PREFACE.len() } else { 0 };
        while let Some(header) = plaintext[at..].first_chunk::<HEADER>().map(Header::parse) {
            let start = at + HEADER;
            let end = start + usize::try_from(header.length).expect("a length");
            let Some(payload) = plaintext.get(start..end) else { break };
            heard.frames.borrow_mut().push_back((header, payload.to_vec()));
            at = end;
        }
        plaintext.drain(..at);
        heard.news.notify_one();
        if read.read_buf(&mut input).await.map_or(0, |read| read) == 0 {
            return;
        }
    }
}

fn word(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(*bytes.first_chunk().expect("four bytes"))
}

pub(crate) fn connect(stream: u32, port: u16) -> Vec<u8> {
    peer::headers(stream, 0, &[(":method", "CONNECT"), (":authority", &format!("10.0.0.1:{port}"))])
}
