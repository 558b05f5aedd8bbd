//! The other implementation: `h2` on rustls, in both roles.

use std::{
    cell::Cell,
    io,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
};

use mesh_hbone::tls::Transport;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use super::{Tls, server_name};

pub(crate) async fn connect<T: Transport>(io: T) -> Peer<T> {
    connect_with(io, &Tls::get().client).await
}

pub(crate) async fn accept<T: Transport>(io: T) -> Peer<T> {
    accept_with(io, &Tls::get().server).await
}

pub(crate) async fn connect_with<T: Transport>(io: T, config: &Arc<rustls::ClientConfig>) -> Peer<T> {
    let tls = TlsConnector::from(config.clone()).connect(server_name(), io).await.unwrap();
    Peer { tls: tls.into(), rekey: Rekey::default() }
}

pub(crate) async fn accept_with<T: Transport>(io: T, config: &Arc<rustls::ServerConfig>) -> Peer<T> {
    let tls = TlsAcceptor::from(config.clone()).accept(io).await.unwrap();
    Peer { tls: tls.into(), rekey: Rekey::default() }
}

/// For transports that may break.
pub(crate) async fn try_connect<T: Transport>(io: T) -> io::Result<Peer<T>> {
    let tls = TlsConnector::from(Tls::get().client.clone()).connect(server_name(), io).await?;
    Ok(Peer { tls: tls.into(), rekey: Rekey::default() })
}

/// As [`try_connect`].
pub(crate) async fn try_accept<T: Transport>(io: T) -> io::Result<Peer<T>> {
    let tls = TlsAcceptor::from(Tls::get().server.clone()).accept(io).await?;
    Ok(Peer { tls: tls.into(), rekey: Rekey::default() })
}

/// How many KeyUpdates, asking for one in return, the peer shall still send; each goes in front of its next write.
pub(crate) type Rekey = Rc<Cell<u32>>;

/// A transport in rustls' hands.
pub(crate) struct Peer<T> {
    pub(crate) tls: TlsStream<T>,
    pub(crate) rekey: Rekey,
}

impl<T: Transport> AsyncRead for Peer<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_read(cx, buf)
    }
}

impl<T: Transport> AsyncWrite for Peer<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if let Some(left) = self.rekey.get().checked_sub(1) {
            self.rekey.set(left);
            let rekeyed = match &mut self.tls {
                TlsStream::Client(tls) => tls.get_mut().1.refresh_traffic_keys(),
                TlsStream::Server(tls) => tls.get_mut().1.refresh_traffic_keys(),
            };
            rekeyed.map_err(io::Error::other)?;
        }
        Pin::new(&mut self.tls).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(cx)
    }
}
