//! The accepting side: CONNECTs, and connections to where they want to go.

use std::{future::poll_fn, net::SocketAddr, sync::Arc};

use anyhow::Context as _;
use h2::{Reason, RecvStream, server::SendResponse};
use http::{Method, Request, Response, StatusCode};
use mesh_net::BufferPool;
use rustls::ServerConfig;
use tokio::{net::TcpStream, task::JoinSet};
use tokio_rustls::TlsAcceptor;

use super::{Buffers, ahead::Ahead, chunk::Chunk, near::flushed, relay::Relay, server_builder, turn::Turn};

/// Serves tunnels.
pub struct Server {
    tls: TlsAcceptor,
    buffers: Buffers,
}

impl Server {
    pub fn new(tls: Arc<ServerConfig>) -> Self {
        Self { tls: tls.into(), buffers: Buffers::default() }
    }

    /// Serves one tunnel until it ends.
    ///
    /// # Errors
    /// When a handshake fails or the tunnel breaks.
    pub async fn serve(&self, tcp: TcpStream) -> anyhow::Result<()> {
        mesh_net::sockets::limit_unsent(&tcp)?;
        let tls = self.tls.accept(Ahead::new(tcp, self.buffers.ahead.clone())).await.context("TLS")?;
        let turn = Turn::new(tls, self.buffers.turn.clone());
        let mut connection = server_builder().handshake::<_, Chunk>(turn.clone()).await.context("HTTP/2")?;
        let mut flows = JoinSet::new();
        // Streams end with their tunnel, and their tasks by themselves; the set is here so that none outlives it.
        while let Some((request, respond)) = poll_fn(|cx| {
            let accepted = connection.poll_accept(cx).map(|accepted| accepted.transpose().map_err(anyhow::Error::from));
            flushed(&turn, cx, accepted)
        })
        .await?
        {
            while flows.try_join_next().is_some() {}
            flows.spawn_local(carry(request, respond, self.buffers.app.clone()));
        }
        while flows.join_next().await.is_some() {}
        Ok(())
    }
}

async fn carry(request: Request<RecvStream>, mut respond: SendResponse<Chunk>, pool: BufferPool) {
    let target = request.uri().authority().and_then(|authority| authority.as_str().parse::<SocketAddr>().ok());
    let Some(target) = target.filter(|_| request.method() == Method::CONNECT) else {
        return refuse(respond, StatusCode::BAD_REQUEST);
    };
    let Ok(tcp) = connect(target).await else { return refuse(respond, StatusCode::SERVICE_UNAVAILABLE) };
    match respond.send_response(Response::new(()), false) {
        Ok(send) => Relay::new(tcp, send, request.into_body(), pool).await,
        Err(_) => respond.send_reset(Reason::CANCEL),
    }
}

async fn connect(target: SocketAddr) -> std::io::Result<TcpStream> {
    let tcp = TcpStream::connect(target).await?;
    tcp.set_nodelay(true)?;
    Ok(tcp)
}

fn refuse(mut respond: SendResponse<Chunk>, status: StatusCode) {
    let mut response = Response::new(());
    *response.status_mut() = status;
    // Fails only when the peer has gone, who then needs no answer.
    drop(respond.send_response(response, true));
}
