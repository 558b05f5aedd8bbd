//! The dialling side: tunnels to one far side, and streams in them.

use std::{
    cell::{Cell, RefCell},
    future::{Future, poll_fn},
    io,
    net::SocketAddr,
    pin::pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
};

use anyhow::{Context as _, ensure};
use h2::client::{Connection, SendRequest};
use http::{Method, Request, StatusCode};
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::Mutex,
};
use tokio_rustls::TlsConnector;

use super::{Buffers, MAX_STREAMS, ahead::Ahead, chunk::Chunk, client_builder, relay::Relay, turn::Turn};

/// Tunnels to `far`, each dialled when the others are full.
pub struct Tunnels {
    far: SocketAddr,
    tls: TlsConnector,
    name: ServerName<'static>,
    buffers: Buffers,
    open: RefCell<Vec<Rc<Tunnel>>>,
    dialling: Mutex<()>,
}

struct Tunnel {
    requests: SendRequest<Chunk>,
    streams: Cell<u32>,
    over: Cell<bool>,
}

/// A place in a tunnel.
struct Lease(Rc<Tunnel>);

impl Drop for Lease {
    fn drop(&mut self) {
        self.0.streams.set(self.0.streams.get() - 1);
    }
}

impl Tunnels {
    pub fn new(far: SocketAddr, tls: Arc<ClientConfig>, name: ServerName<'static>) -> Self {
        Self {
            far,
            tls: tls.into(),
            name,
            buffers: Buffers::default(),
            open: RefCell::default(),
            dialling: Mutex::default(),
        }
    }

    /// Carries one connection to `target` behind the far side.
    ///
    /// # Errors
    /// When there is no tunnel or the far side refuses. What happens after that is the connection's own end.
    pub async fn carry(&self, tcp: TcpStream, target: SocketAddr) -> anyhow::Result<()> {
        let lease = self.lease().await?;
        let mut requests = lease.0.requests.clone();
        poll_fn(|cx| requests.poll_ready(cx)).await?;
        let request = Request::builder().method(Method::CONNECT).uri(target.to_string()).body(())?;
        let (answer, send) = requests.send_request(request, false)?;
        drop(requests);
        let (head, recv) = answer.await?.into_parts();
        ensure!(head.status == StatusCode::OK, "the far side says {}", head.status);
        Relay::new(tcp, send, recv, self.buffers.app.clone()).await;
        Ok(())
    }

    async fn lease(&self) -> anyhow::Result<Lease> {
        loop {
            if let Some(tunnel) = self.free() {
                tunnel.streams.set(tunnel.streams.get() + 1);
                return Ok(Lease(tunnel));
            }
            let _one_at_a_time = self.dialling.lock().await;
            if self.free().is_none() {
                let tunnel = self.dial().await.context("cannot dial the far side")?;
                self.open.borrow_mut().push(tunnel);
            }
        }
    }

    fn free(&self) -> Option<Rc<Tunnel>> {
        let mut open = self.open.borrow_mut();
        open.retain(|tunnel| !tunnel.over.get());
        open.iter().find(|tunnel| tunnel.streams.get() < MAX_STREAMS).cloned()
    }

    async fn dial(&self) -> anyhow::Result<Rc<Tunnel>> {
        let tcp = TcpStream::connect(self.far).await?;
        tcp.set_nodelay(true)?;
        mesh_net::sockets::limit_unsent(&tcp)?;
        let tls = self.tls.connect(self.name.clone(), Ahead::new(tcp, self.buffers.ahead.clone())).await?;
        let turn = Turn::new(tls, self.buffers.turn.clone());
        let (requests, connection) = client_builder().handshake::<_, Chunk>(turn.clone()).await?;
        let tunnel = Rc::new(Tunnel { requests, streams: Cell::new(0), over: Cell::new(false) });
        tokio::task::spawn_local({
            let tunnel = tunnel.clone();
            async move {
                if let Err(error) = drive(connection, turn).await {
                    eprintln!("tunnel lost: {error}");
                }
                tunnel.over.set(true);
            }
        });
        Ok(tunnel)
    }
}

/// Runs a tunnel; each turn ends with its one flush.
///
/// # Errors
/// Why it ended, if not in order.
pub async fn drive<S>(connection: Connection<Turn<S>, Chunk>, turn: Turn<S>) -> anyhow::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut connection = pin!(connection);
    poll_fn(|cx| {
        let ended = connection.as_mut().poll(cx).map_err(anyhow::Error::from);
        flushed(&turn, cx, ended)
    })
    .await
}

/// Ends a turn with its flush: `result`, or why that failed.
pub fn flushed<S, T, E>(turn: &Turn<S>, cx: &mut Context<'_>, result: Poll<Result<T, E>>) -> Poll<Result<T, E>>
where
    S: AsyncRead + AsyncWrite + Unpin,
    E: From<io::Error>,
{
    match (turn.poll_out(cx), result) {
        (Poll::Ready(Err(error)), Poll::Pending) => Poll::Ready(Err(error.into())),
        (_, result) => result,
    }
}
