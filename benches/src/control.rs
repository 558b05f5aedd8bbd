//! HBONE tunnels on the `h2` crate and tokio-rustls, as fast as we could make them: what the engine of `mesh-hbone` is measured against.
//!
//! Tuned, because an untuned control proves nothing:
//! - One flush per turn: [`turn::Turn`] gathers what `h2` writes frame by frame, and the connection's task writes it out when its turn
//!   ends, so that small frames of many streams share a TLS record and a system call. Large frames pass it without a copy.
//! - [`ahead::Ahead`] reads the socket in large pieces. rustls alone asks for 4 KiB at a time.
//! - Credit for the connection is never what holds a stream up. `h2` gives credit to the stream and to the connection in one call
//!   (`release_capacity`) and cannot give the connection's back on receipt; so [`CONNECTION_WINDOW`] is larger than all stream windows
//!   of a tunnel together, which comes to the same: a reader that stalls takes nothing from its neighbours.
//! - A stream's credit goes back when the application's socket has the bytes.
//! - An application's socket is read only when it is readable and the stream has capacity; a buffer is held from there to the write.
//! - DATA frames that fill whole TLS records, [`relay`] as one hand-written future without `select!`, no task beside it.
//!
//! What a proxy needs and this has not: limits for misbehaving peers beyond those of `h2`, keep-alive, drain, idle tunnels' end.

use std::{cell::RefCell, rc::Rc};

use h2::{client, server};
use mesh_net::BufferPool;

pub mod ahead;
pub mod chunk;
pub mod far;
pub mod near;
pub mod relay;
pub mod turn;

/// Of a stream. More bought nothing on loopback.
pub const STREAM_WINDOW: u32 = 1 << 20;
/// Streams of one tunnel.
pub const MAX_STREAMS: u32 = 100;
/// More than all streams' windows together, and so never the one that binds.
pub const CONNECTION_WINDOW: u32 = 128 << 20;
/// Largest DATA frame taken.
pub const FRAME: u32 = 64 << 10;
/// One read from an application: with its frame header exactly four full TLS records.
pub const READ: usize = 4 * (16 << 10) - 9;
/// One read from the tunnel's socket.
const AHEAD: usize = 128 << 10;
/// Bytes of one stream that wait for the tunnel.
const SEND_BUFFER: usize = 256 << 10;
/// `h2` counts small DATA frames as abuse, unless allowed; ours are applications' small writes.
const DATA_FRAME_BUDGET: usize = 64 << 20;
/// Unused buffers kept, of each kind.
const RETAINED: usize = 16;

/// Buffers of the one worker; clones share.
#[derive(Clone, Debug)]
pub struct Buffers {
    /// For what is read from applications.
    pub app: BufferPool,
    /// For what waits until the end of a turn.
    pub turn: BufferPool,
    /// For ciphertext.
    pub ahead: BufferPool,
}

impl Default for Buffers {
    fn default() -> Self {
        Self {
            app: BufferPool::new(READ, RETAINED),
            turn: BufferPool::new(turn::BUFFER, RETAINED),
            ahead: BufferPool::new(AHEAD, RETAINED),
        }
    }
}

/// The dialling side's settings.
pub fn client_builder() -> client::Builder {
    let mut builder = client::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .max_send_buffer_size(SEND_BUFFER)
        .data_frame_budget(DATA_FRAME_BUDGET)
        .initial_max_send_streams(MAX_STREAMS as usize)
        .enable_push(false);
    builder
}

/// The accepting side's settings.
pub fn server_builder() -> server::Builder {
    let mut builder = server::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .max_send_buffer_size(SEND_BUFFER)
        .data_frame_budget(DATA_FRAME_BUDGET)
        .max_concurrent_streams(2 * MAX_STREAMS);
    builder
}

type Shared<T> = Rc<RefCell<T>>;

#[cfg(test)]
mod tests {
    use std::{io, rc::Rc};

    use mesh_net::sockets::reset_on_close;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::{TcpListener, TcpStream},
        task::{LocalSet, spawn_local},
    };

    use super::{far::Server, near::Tunnels};
    use crate::pair::tls::{Certificates, server_name};

    /// More than all windows and buffers on the way hold.
    const MANY: usize = 24 << 20;

    /// Both halves, and whom connections are for.
    struct Path {
        near: Rc<Tunnels>,
        apps: TcpListener,
    }

    impl Path {
        async fn new() -> Self {
            let certificates = Certificates::generate().unwrap();
            let far = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = far.local_addr().unwrap();
            let server = Rc::new(Server::new(certificates.server_config().unwrap()));
            spawn_local(async move {
                while let Ok((tcp, _)) = far.accept().await {
                    let server = server.clone();
                    spawn_local(async move { server.serve(tcp).await });
                }
            });
            let near = Rc::new(Tunnels::new(address, certificates.client_config().unwrap(), server_name()));
            Self { near, apps: TcpListener::bind("127.0.0.1:0").await.unwrap() }
        }

        async fn connect(&self) -> (TcpStream, TcpStream) {
            let entrance = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let (client, entered) = tokio::join!(TcpStream::connect(entrance.local_addr().unwrap()), entrance.accept());
            let (near, target) = (self.near.clone(), self.apps.local_addr().unwrap());
            spawn_local(async move { near.carry(entered.unwrap().0, target).await });
            (client.unwrap(), self.apps.accept().await.unwrap().0)
        }
    }

    async fn with_path<F: Future<Output = ()>>(scenario: impl FnOnce(Path) -> F) {
        LocalSet::new().run_until(async { scenario(Path::new().await).await }).await;
    }

    fn pattern(salt: usize) -> Vec<u8> {
        (0..MANY).map(|i| (i.wrapping_mul(0x9e37_79b9).wrapping_add(salt) >> 13).to_le_bytes()[0]).collect()
    }

    async fn expect_all(from: &mut TcpStream, to: &mut TcpStream, bytes: &[u8]) {
        let sending = async {
            from.write_all(bytes).await.unwrap();
            from.shutdown().await.unwrap();
        };
        let mut got = Vec::new();
        let ((), read) = tokio::join!(sending, to.read_to_end(&mut got));
        read.unwrap();
        assert!(got == bytes);
    }

    #[tokio::test]
    async fn every_byte_and_each_half_close_passes_both_ways() {
        with_path(|path| async move {
            let (mut client, mut server) = path.connect().await;
            expect_all(&mut client, &mut server, &pattern(1)).await;
            expect_all(&mut server, &mut client, &pattern(2)).await;
        })
        .await;
    }

    #[tokio::test]
    async fn a_reset_passes_each_way() {
        with_path(|path| async move {
            for client_resets in [true, false] {
                let (client, server) = path.connect().await;
                let (mut rude, mut victim) = if client_resets { (client, server) } else { (server, client) };
                rude.write_all(b"x").await.unwrap();
                victim.read_exact(&mut [0]).await.unwrap();
                reset_on_close(&rude).unwrap();
                drop(rude);
                let error = victim.read(&mut [0]).await.unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
            }
        })
        .await;
    }

    #[tokio::test]
    async fn readers_that_stall_do_not_stop_their_neighbours() {
        with_path(|path| async move {
            let mut stalled = Vec::new();
            for _ in 0..40 {
                let (client, mut server) = path.connect().await;
                let filling = spawn_local(async move { while server.write_all(&[0; 64 << 10]).await.is_ok() {} });
                stalled.push((client, filling));
            }
            for _ in 0..100 {
                let (mut client, mut server) = path.connect().await;
                client.write_all(b"ping").await.unwrap();
                server.read_exact(&mut [0; 4]).await.unwrap();
                server.write_all(b"pong").await.unwrap();
                client.read_exact(&mut [0; 4]).await.unwrap();
            }
        })
        .await;
    }
}
