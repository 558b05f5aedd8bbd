//! The TLS listener under the gRPC services and the webhook: server certificate only, who calls gRPC proves himself by token.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use mesh_identity::authority::{AuthorityError, SigningAuthority};
use mesh_runtime::crowd::Crowd;
use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
    time::{Instant, Sleep},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::server::Connected;

/// Of the server's own certificate; renewed at half of it.
const CERTIFICATE_TTL: Duration = Duration::from_secs(30 * 24 * 3600);
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Handshakes, and connections that nobody has looked at yet. One more takes the place of the oldest.
const MAX_HANDSHAKES: usize = 128;
/// Of a peer, after which it is not there. One that speaks HTTP/2 is asked for a sign of life more often, but only once it has spoken.
const SILENCE: Duration = Duration::from_secs(60);
/// Rest after a failed accept: out of descriptors, most likely, and spinning would make it worse.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The server's certificate, renewed in time.
#[derive(Debug)]
pub(crate) struct Certificate {
    authority: watch::Receiver<Arc<SigningAuthority>>,
    names: Vec<String>,
    protocol: &'static [u8],
    config: Arc<ServerConfig>,
    renew_at: SystemTime,
}

#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    #[error("the server certificate cannot be made")]
    Authority(#[from] AuthorityError),
    #[error("the server certificate cannot be used")]
    Tls(#[from] rustls::Error),
}

impl Certificate {
    /// For a server that speaks `protocol` (ALPN).
    pub(crate) fn new(
        authority: watch::Receiver<Arc<SigningAuthority>>,
        names: Vec<String>,
        protocol: &'static [u8],
        now: SystemTime,
    ) -> Result<Self, CertificateError> {
        let current = authority.borrow().clone();
        let config = server_config(&current, &names, protocol, now)?;
        Ok(Self { authority, names, protocol, config, renew_at: now + CERTIFICATE_TTL / 2 })
    }

    /// The configuration for a connection accepted `now`, signed by the authority of now.
    fn current(&mut self, now: SystemTime) -> Arc<ServerConfig> {
        if now >= self.renew_at || self.authority.has_changed().unwrap_or(false) {
            let authority = self.authority.borrow_and_update().clone();
            match server_config(&authority, &self.names, self.protocol, now) {
                Ok(config) => (self.config, self.renew_at) = (config, now + CERTIFICATE_TTL / 2),
                Err(error) => tracing::error!(%error, "the old server certificate stays in use"),
            }
        }
        self.config.clone()
    }
}

fn server_config(
    authority: &SigningAuthority,
    names: &[String],
    protocol: &[u8],
    now: SystemTime,
) -> Result<Arc<ServerConfig>, CertificateError> {
    let certificate = authority.server_certificate(names, CERTIFICATE_TTL, now)?;
    let mut config = ServerConfig::builder_with_provider(mesh_identity::tls::provider())
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(certificate.chain, certificate.key)?;
    config.alpn_protocols = vec![protocol.to_vec()];
    Ok(Arc::new(config))
}

/// Accepts until `stop_accepting`; what was accepted ends at `stop`. Handshakes run side by side, and peers that stall in theirs keep
/// nobody out.
pub(crate) async fn accept(
    listener: TcpListener,
    mut certificate: Certificate,
    connections: mpsc::Sender<io::Result<Connection>>,
    stop_accepting: CancellationToken,
    stop: CancellationToken,
) {
    let mut handshakes = Crowd::new(MAX_HANDSHAKES);
    loop {
        let accepted = tokio::select! {
            () = stop_accepting.cancelled() => break,
            // Reap what has finished; an empty set is disabled by the guard.
            Some(_) = handshakes.ended(), if !handshakes.is_empty() => continue,
            accepted = accept_one(&listener) => accepted,
        };
        let Some((stream, peer)) = accepted else { continue };
        let acceptor = TlsAcceptor::from(certificate.current(SystemTime::now()));
        let (connections, stop) = (connections.clone(), stop.clone());
        let displaced = handshakes.admit(async move {
            let handshake = tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream));
            let stream = match handshake.await {
                Ok(Ok(stream)) => stream,
                Ok(Err(error)) => return tracing::debug!(%peer, %error, "TLS handshake failed"),
                Err(_) => return tracing::debug!(%peer, "TLS handshake timed out"),
            };
            // Refused only while the server is going away.
            drop(connections.send(Ok(Connection::new(stream, stop))).await);
        });
        if displaced {
            tracing::debug!(%peer, "{MAX_HANDSHAKES} TLS handshakes are under way; the oldest was given up");
        }
    }
    handshakes.shutdown().await;
}

async fn accept_one(listener: &TcpListener) -> Option<(TcpStream, SocketAddr)> {
    match listener.accept().await {
        Ok((stream, peer)) => {
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!(%peer, %error, "cannot disable Nagle's algorithm");
            }
            Some((stream, peer))
        }
        Err(error) => {
            tracing::warn!(%error, "accept failed");
            tokio::time::sleep(ACCEPT_PAUSE).await;
            None
        }
    }
}

/// A connection that ends when told to, whatever streams are open on it, and when its peer has been silent for too long.
pub(crate) struct Connection {
    stream: TlsStream<TcpStream>,
    stopped: Pin<Box<WaitForCancellationFutureOwned>>,
    silent: Pin<Box<Sleep>>,
}

impl Connection {
    fn new(stream: TlsStream<TcpStream>, stop: CancellationToken) -> Self {
        let silent = Box::pin(tokio::time::sleep(SILENCE));
        Self { stream, stopped: Box::pin(stop.cancelled_owned()), silent }
    }
}

impl Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.stopped.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        match Pin::new(&mut self.stream).poll_read(cx, buf) {
            Poll::Ready(read) => {
                self.silent.as_mut().reset(Instant::now() + SILENCE);
                Poll::Ready(read)
            }
            Poll::Pending => self.silent.as_mut().poll(cx).map(|()| Err(io::ErrorKind::TimedOut.into())),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
