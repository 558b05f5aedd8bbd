//! The tunnel engine's parts on their own, and the whole of it beside the control: what a chunk of payload costs without a kernel.

use std::{
    future::poll_fn,
    hint::black_box,
    io,
    task::{Context, Poll},
    time::Duration,
};

use benches::{
    control::{
        Buffers,
        ahead::Ahead,
        chunk::Chunk,
        client_builder,
        near::{drive, flushed},
        server_builder,
        turn::Turn,
    },
    pair::tls::{Certificates, server_name},
};
use bytes::{Buf as _, Bytes};
use criterion::{BenchmarkId, Criterion, Throughput};
use h2::{RecvStream, SendStream};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use mesh_core::{headers::encode_baggage, workload::Workload};
use mesh_hbone::{
    Budget,
    engine::{
        conn::{Conn, Event, Local, Role, Room},
        handshake::Handshake,
        hpack::{Decoder, Encoder},
        out::Out,
        record::aead::{self, Algorithm, NONCE, TAG},
        tunnel::{Cursor, Step, Tunnel},
    },
};
use tokio::{
    io::{AsyncReadExt as _, DuplexStream, duplex},
    runtime::{Builder, Runtime},
    task::LocalSet,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Of a chunk: a ping, a small answer, bulk.
const SIZES: [usize; 3] = [64, 1 << 10, 16 << 10];
/// Streams that each send a chunk in one turn.
const STREAMS: usize = 16;
const AUTHORITY: &str = "10.244.1.17:8080";
/// Between the two ends of the control.
const WIRE: usize = 1 << 20;

// --- the record cipher

/// Sequence numbers as they would come, because one back end refuses others.
fn nonce(sequence: &mut u64) -> [u8; NONCE] {
    let mut nonce = [0; NONCE];
    nonce[4..].copy_from_slice(&sequence.to_be_bytes());
    *sequence += 1;
    nonce
}

macro_rules! back_end {
    ($module:ident, $criterion:ident, $algorithm:ident, $size:ident) => {{
        const HEADER: [u8; 5] = [23, 3, 3, 0, 0];
        let key = &[7; 32][..$algorithm.key_len()];
        let mut group = $criterion.benchmark_group(format!("{:?} of {} bytes", $algorithm, $size));
        group.throughput(Throughput::Bytes($size as u64));
        let mut record = vec![0x5a; $size + TAG];
        group.bench_function(BenchmarkId::new("seal", stringify!($module)), |b| {
            let mut sealer = aead::$module::Sealer::new($algorithm, key).expect("a key of the right length");
            let mut sequence = 0;
            b.iter(|| black_box(sealer.seal(nonce(&mut sequence), &HEADER, &mut record[..$size]).expect("sealed")));
        });
        // Opening needs a fresh copy each time; the copy is measured with it, the same for every back end.
        let mut sealer = aead::$module::Sealer::new($algorithm, key).expect("a key of the right length");
        let tag = sealer.seal([0; NONCE], &HEADER, &mut record[..$size]).expect("sealed");
        record[$size..].copy_from_slice(&tag);
        let mut scratch = record.clone();
        group.bench_function(BenchmarkId::new("open", stringify!($module)), |b| {
            let mut opener = aead::$module::Opener::new($algorithm, key).expect("a key of the right length");
            b.iter(|| {
                scratch.copy_from_slice(&record);
                black_box(opener.open([0; NONCE], &HEADER, &mut scratch).expect("opened"))
            });
        });
        group.finish();
    }};
}

/// One record sealed or opened in place, by each back end there is. They stand next to each other within a size, so that a change in
/// the machine's load hits all of them.
pub(crate) fn aead(c: &mut Criterion) {
    for algorithm in [Algorithm::Aes128Gcm, Algorithm::Aes256Gcm] {
        for size in SIZES {
            back_end!(aws_lc, c, algorithm, size);
            back_end!(ring, c, algorithm, size);
            back_end!(tls_record, c, algorithm, size);
            #[cfg(feature = "boring")]
            back_end!(boring, c, algorithm, size);
        }
    }
}

// --- header lists

/// Our CONNECT, as we write it and as `h2` does (Huffman, dynamic table).
pub(crate) fn hpack(c: &mut Criterion) {
    let baggage = encode_baggage(&workload());
    let fields = [(":method", "CONNECT"), (":authority", AUTHORITY), ("baggage", &*baggage)];
    let encode = |encoder: &mut Encoder, block: &mut Vec<u8>| {
        for (name, value) in fields {
            encoder.field(name.as_bytes(), value.as_bytes(), block);
        }
    };
    let mut encoder = Encoder::new();
    encode(&mut encoder, &mut Vec::new());
    let mut ours = Vec::new();
    encode(&mut encoder, &mut ours);
    let theirs = block_of_h2(&baggage);

    let mut group = c.benchmark_group("hpack");
    let mut block = Vec::with_capacity(512);
    group.bench_function("CONNECT: write", |b| {
        b.iter(|| {
            block.clear();
            encode(&mut encoder, &mut block);
            black_box(block.len())
        });
    });
    let mut decoder = Decoder::new();
    group.bench_function(format!("CONNECT: read ours, {} bytes", ours.len()), |b| {
        b.iter(|| decoder.decode(black_box(&ours), 16 << 10).expect("it is well-formed"));
    });
    group.bench_function(format!("CONNECT: read the first of h2, {} bytes", theirs.len()), |b| {
        b.iter_with_setup(Decoder::new, |mut decoder| {
            decoder.decode(black_box(&theirs), 16 << 10).expect("it is well-formed")
        });
    });
}

fn workload() -> Workload {
    let mut workload = Workload::new("Kubernetes//Pod/shop/cart-7d9f8-abcde", "shop", "cart-7d9f8-abcde");
    workload.canonical_name = "cart".into();
    workload.workload_name = "cart".into();
    workload
}

/// The header block of the first CONNECT that `h2` sends in a connection.
fn block_of_h2(baggage: &str) -> Vec<u8> {
    const PREFACE: usize = 24;
    const HEADERS: u8 = 1;
    let (near, mut far) = duplex(WIRE);
    runtime().block_on(async {
        let (mut requests, connection) =
            h2::client::Builder::new().handshake::<_, Bytes>(near).await.expect("it opens");
        let request = Request::builder().method(Method::CONNECT).uri(AUTHORITY).header("baggage", baggage);
        let answer = requests.send_request(request.body(()).expect("it is a request"), false).expect("it is sent");
        let sending = async {
            // Ends when the far end does.
            drop(connection.await);
        };
        let receiving = async {
            let mut bytes = vec![0; PREFACE];
            far.read_exact(&mut bytes).await.expect("a preface");
            loop {
                let mut header = [0; 9];
                far.read_exact(&mut header).await.expect("a frame");
                let mut payload = vec![0; usize::from(u16::from_be_bytes([header[1], header[2]]))];
                far.read_exact(&mut payload).await.expect("its payload");
                if header[3] == HEADERS {
                    drop(far);
                    return payload;
                }
            }
        };
        let (block, ()) = tokio::join!(receiving, sending);
        drop(answer);
        block
    })
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().expect("a runtime")
}

// --- a turn of a tunnel

/// [`STREAMS`] chunks from one end to the other: framed, sealed, opened, taken, with the credit that goes back. The application is a
/// copy on one side and nothing on the other; the wire is a copy. Time is per turn; elements are chunks.
pub(crate) fn chunks(c: &mut Criterion) {
    for size in SIZES {
        let mut group = c.benchmark_group(format!("{STREAMS} chunks of {size} bytes"));
        group.throughput(Throughput::Elements(STREAMS as u64));
        let payload = vec![0x5a; size];
        let mut ours = Ours::new();
        group.bench_function("engine", |b| b.iter(|| ours.turn(&payload)));
        let mut control = Control::new();
        group.bench_function("h2", |b| b.iter(|| control.turn(&payload)));
    }
}

/// Two ends of a tunnel of the engine.
struct Ours {
    client: Tunnel,
    server: Tunnel,
    streams: Vec<u32>,
    wire: Vec<u8>,
}

impl Ours {
    fn new() -> Self {
        let (client, server) = secured();
        let mut ours = Self { client, server, streams: Vec::new(), wire: Vec::new() };
        ours.settle();
        for _ in 0..STREAMS {
            let id = ours.client.conn.connect(AUTHORITY, std::iter::empty(), &mut ours.client.out);
            ours.streams.push(id.expect("there is room for another stream"));
        }
        ours.settle();
        for id in &ours.streams {
            assert!(ours.server.conn.respond(*id, StatusCode::OK, &HeaderMap::new(), false, &mut ours.server.out));
        }
        ours.settle();
        ours
    }

    fn turn(&mut self, payload: &[u8]) {
        for id in &self.streams {
            let Room::Bytes(room) = self.client.conn.room(*id) else { panic!("the window is shut") };
            assert!(room >= payload.len());
            let filled =
                self.client.out.fill(*id, payload.len(), |slices| Ok(scatter(payload, slices))).expect("a copy");
            self.client.conn.sent(*id, filled.bytes, filled.frames);
        }
        let received = self.settle();
        assert_eq!(received, STREAMS * payload.len());
    }

    /// Until neither has anything to say; payload that came.
    fn settle(&mut self) -> usize {
        let mut received = 0;
        while self.client.wants_write() || self.server.wants_write() {
            received += pump(&mut self.client, &mut self.server, &mut self.wire);
            received += pump(&mut self.server, &mut self.client, &mut self.wire);
        }
        received
    }
}

fn scatter(payload: &[u8], slices: &mut [io::IoSliceMut<'_>]) -> usize {
    let mut rest = payload;
    for slice in slices {
        let (now, later) = rest.split_at(slice.len().min(rest.len()));
        slice[..now.len()].copy_from_slice(now);
        rest = later;
    }
    payload.len() - rest.len()
}

/// All that one end has to say, to the other.
fn pump(from: &mut Tunnel, to: &mut Tunnel, wire: &mut Vec<u8>) -> usize {
    let mut received = 0;
    while from.wants_write() {
        from.seal(128 << 10).expect("sealed");
        wire.clear();
        from.out.ready().for_each(|record| wire.extend_from_slice(record));
        from.out.advance(wire.len());
        let mut cursor = Cursor::default();
        loop {
            match to.step(wire, &mut cursor).expect("a good peer") {
                Step::Event(Event::Data { stream, range }) => {
                    let length = black_box(&wire[range]).len();
                    received += length;
                    to.conn.consumed(stream, length, &mut to.out);
                }
                Step::Event(event) => drop(black_box(event)),
                Step::Starved => break,
                Step::Closed => panic!("nobody has closed it"),
            }
        }
        assert_eq!(cursor.at, wire.len(), "whole records are written");
    }
    received
}

/// Both ends of a connection after the handshake.
fn secured() -> (Tunnel, Tunnel) {
    let certificates = Certificates::generate().expect("certificates");
    let (client, server) = (certificates.client_config(), certificates.server_config());
    let mut client = Handshake::client(&client.expect("a configuration"), server_name()).expect("a handshake");
    let mut server = Handshake::server(&server.expect("a configuration")).expect("a handshake");
    let mut wire = Vec::new();
    while !(client.is_done() && server.is_done()) {
        for _ in 0..2 {
            client.write(&mut wire);
            let read = server.read(&wire).expect("a good peer");
            wire.drain(..read);
            std::mem::swap(&mut client, &mut server);
        }
    }
    let tunnel = |handshake: Handshake, role| {
        let established = handshake.finish().expect("it is done");
        let mut out = Out::default();
        let conn = Conn::new(role, local(), Budget::default(), &mut out);
        Tunnel::new(established.seal, established.open, established.post_handshake, conn, out)
    };
    (tunnel(client, Role::Client), tunnel(server, Role::Server))
}

/// What the proxy announces.
fn local() -> Local {
    let mesh_hbone::Settings { stream_window, connection_window, frame_size, header_list, max_streams, .. } =
        mesh_hbone::Settings::default();
    Local {
        // As the control has from the start, and ours grows to.
        stream_window: stream_window.max(benches::control::STREAM_WINDOW),
        connection_window,
        frame_size,
        header_list,
        max_streams,
        ping_interval: Duration::MAX,
        ping_timeout: Duration::MAX,
        handshake_timeout: Duration::MAX,
    }
}

/// Two ends of a tunnel of the control.
struct Control {
    runtime: Runtime,
    tasks: LocalSet,
    streams: Vec<(SendStream<Chunk>, RecvStream)>,
    /// The other halves: for as long as the streams.
    _halves: Vec<(SendStream<Chunk>, RecvStream)>,
    buffers: Buffers,
}

impl Control {
    fn new() -> Self {
        let (runtime, tasks, buffers) = (runtime(), LocalSet::new(), Buffers::default());
        let (streams, halves) = tasks.block_on(&runtime, open(&buffers));
        Self { runtime, tasks, streams, _halves: halves, buffers }
    }

    fn turn(&mut self, payload: &[u8]) {
        let Self { runtime, tasks, streams, buffers, .. } = self;
        tasks.block_on(runtime, async {
            for (send, _) in &mut *streams {
                send.reserve_capacity(payload.len());
                poll_fn(|cx| poll_room(send, payload.len(), cx)).await;
                let mut buffer = buffers.app.take();
                buffer[..payload.len()].copy_from_slice(payload);
                send.send_data(Chunk::pooled(buffer, payload.len()), false).expect("an open stream");
            }
            for (_, recv) in &mut *streams {
                let mut left = payload.len();
                while left > 0 {
                    let mut bytes = poll_fn(|cx| recv.poll_data(cx)).await.expect("more data").expect("a good peer");
                    let length = black_box(bytes.chunk()).len();
                    bytes.advance(length);
                    recv.flow_control().release_capacity(length).expect("it was received");
                    left -= length;
                }
            }
        });
    }
}

fn poll_room(send: &mut SendStream<Chunk>, wanted: usize, cx: &mut Context<'_>) -> Poll<()> {
    while send.capacity() < wanted {
        match send.poll_capacity(cx) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(room) => drop(room.expect("an open stream").expect("a good peer")),
        }
    }
    Poll::Ready(())
}

type Streams = Vec<(SendStream<Chunk>, RecvStream)>;

/// The client's sending and the server's receiving halves, and the others.
async fn open(buffers: &Buffers) -> (Streams, Streams) {
    let certificates = Certificates::generate().expect("certificates");
    let connector = TlsConnector::from(certificates.client_config().expect("a configuration"));
    let acceptor = TlsAcceptor::from(certificates.server_config().expect("a configuration"));
    let (near, far) = duplex(WIRE);
    let ahead = |io: DuplexStream| Ahead::new(io, buffers.ahead.clone());
    let (near, far) = tokio::join!(connector.connect(server_name(), ahead(near)), acceptor.accept(ahead(far)));
    let near = Turn::new(near.expect("TLS"), buffers.turn.clone());
    let far = Turn::new(far.expect("TLS"), buffers.turn.clone());
    let (mut requests, connection) = client_builder().handshake::<_, Chunk>(near.clone()).await.expect("HTTP/2");
    tokio::task::spawn_local(drive(connection, near));
    let (accepted, mut accepting) = tokio::sync::mpsc::unbounded_channel();
    tokio::task::spawn_local(async move {
        let mut connection = server_builder().handshake::<_, Chunk>(far.clone()).await.expect("HTTP/2");
        while let Some((request, mut respond)) = poll_fn(|cx| {
            let next = connection.poll_accept(cx).map(|next| next.transpose().map_err(io::Error::other));
            flushed(&far, cx, next)
        })
        .await
        .expect("a good peer")
        {
            let send = respond.send_response(Response::new(()), false).expect("an open stream");
            // Nobody asks any more once all have been opened.
            drop(accepted.send((send, request.into_body())));
        }
    });
    let (mut streams, mut others) = (Vec::new(), Vec::new());
    for _ in 0..STREAMS {
        let request = Request::builder().method(Method::CONNECT).uri(AUTHORITY).body(()).expect("it is a request");
        let (answer, send) = requests.send_request(request, false).expect("there is room for another stream");
        let recv = answer.await.expect("an answer").into_body();
        let (theirs, received) = accepting.recv().await.expect("the other end of it");
        streams.push((send, received));
        others.push((theirs, recv));
    }
    (streams, others)
}
