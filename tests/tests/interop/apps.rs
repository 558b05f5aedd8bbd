//! What applications do: both ends of flows.

use std::{
    cell::Cell,
    io,
    net::{Ipv4Addr, SocketAddr},
    rc::Rc,
    time::Duration,
};

use mesh_net::sockets::reset_on_close;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy},
    net::{TcpListener, TcpSocket, TcpStream},
    task::{JoinHandle, spawn_local},
    time::sleep,
};

/// `length` bytes that tell where they belong; no two seeds give the same.
pub(crate) fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length + 8);
    let mut word = seed.rotate_left(32);
    while bytes.len() < length {
        word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&word.rotate_left(29).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// An application whose accepted sockets the test plays.
pub(crate) struct Target {
    listener: TcpListener,
}

impl Target {
    /// Its sockets buffer little, so that one that is not read holds the sender soon.
    pub(crate) fn listen() -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(64 << 10).unwrap();
        socket.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        Self { listener: socket.listen(1024).unwrap() }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.listener.local_addr().unwrap()
    }

    pub(crate) async fn accept(&self) -> TcpStream {
        let (socket, _) = self.listener.accept().await.unwrap();
        socket.set_nodelay(true).unwrap();
        socket
    }
}

/// An application that sends everything back, and ends when its client does.
pub(crate) fn echo() -> SocketAddr {
    let target = Target::listen();
    let address = target.address();
    spawn_local(async move {
        loop {
            let mut socket = target.accept().await;
            spawn_local(async move {
                let (mut from, mut to) = socket.split();
                // A test that breaks a flow breaks this too.
                if copy(&mut from, &mut to).await.is_ok() {
                    drop(to.shutdown().await);
                }
            });
        }
    });
    address
}

/// An address where nobody listens, as long as the socket lives.
pub(crate) fn nobody() -> (SocketAddr, TcpSocket) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    (socket.local_addr().unwrap(), socket)
}

/// Sends `length` bytes to an echo, ends its direction, and gets every byte and a clean end back.
pub(crate) async fn roundtrip(mut app: TcpStream, seed: u64, length: usize) {
    let sent = pattern(seed, length);
    let mut received = Vec::with_capacity(length);
    let (mut from, mut to) = app.split();
    let sending = async {
        to.write_all(&sent).await?;
        to.shutdown().await
    };
    let (sending, receiving) = tokio::join!(sending, from.read_to_end(&mut received));
    sending.and(receiving).unwrap_or_else(|error| panic!("{length} bytes, {} back: {error}", received.len()));
    assert!(received == sent, "{length} bytes, {} back, not the same", received.len());
}

/// Writes far more than anybody may buffer, ending its direction if `ends`, and returns once nothing moves any more: what is written,
/// and the writer's future.
pub(crate) async fn write_until_held(mut writer: TcpStream, ends: bool) -> (Vec<u8>, JoinHandle<TcpStream>) {
    let sent = pattern(7, 32 << 20);
    let (copy, progress) = (sent.clone(), Rc::new(Cell::new(0)));
    let written = progress.clone();
    let writing = spawn_local(async move {
        for chunk in copy.chunks(64 << 10) {
            writer.write_all(chunk).await.unwrap();
            written.set(written.get() + chunk.len());
        }
        if ends {
            writer.shutdown().await.unwrap();
        }
        writer
    });
    let mut before = usize::MAX;
    while progress.get() != before {
        before = progress.get();
        // Two programs and the kernel fill their buffers; none says when. Looking too early leaves less held, and fails nothing.
        sleep(Duration::from_millis(300)).await;
    }
    assert!(before < sent.len(), "everything was taken though nobody read");
    (sent, writing)
}

/// Reads only once the writer is held, and gets every byte.
pub(crate) async fn hold_and_release(writer: TcpStream, mut reader: TcpStream) {
    let (sent, writing) = write_until_held(writer, false).await;
    let mut received = vec![0; sent.len()];
    reader.read_exact(&mut received).await.unwrap();
    assert!(received == sent);
    drop(writing.await.unwrap());
}

/// One byte to an echo and back: the flow is open and alive.
pub(crate) async fn ping(app: &mut TcpStream, byte: u8) {
    app.write_all(&[byte]).await.unwrap();
    assert_eq!(app.read_u8().await.unwrap(), byte);
}

/// Ends a connection with RST.
pub(crate) fn reset(socket: TcpStream) {
    reset_on_close(&socket).unwrap();
}

/// What a reader meets in the end.
pub(crate) async fn read_end(socket: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut received = Vec::new();
    socket.read_to_end(&mut received).await.map(|_| received)
}

pub(crate) fn is_reset<T>(result: &io::Result<T>) -> bool {
    result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::ConnectionReset)
}
