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

use crate::guests::{Guest, Guests, Limits, Peer};

/// Of the server's own certificate; renewed at half of it.
const CERTIFICATE_TTL: Duration = Duration::from_secs(30 * 24 * 3600);
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Handshakes, and connections that nobody has looked at yet. One more takes the place of the oldest.
const MAX_HANDSHAKES: usize = 128;
/// Of a handshake, in which it gives place to none: when all nodes of a large cluster come back at once, each is a moment of work.
const MOMENT: Duration = Duration::from_secs(1);
/// Of a peer, after which it is not there. One that speaks HTTP/2 is asked for a sign of life more often, but only once it has spoken.
const SILENCE: Duration = Duration::from_secs(60);
/// Within which a call must have been accepted, however much else is said.
const WELCOME: Duration = Duration::from_secs(30);
/// Connections of which no call was accepted yet, those in their handshake included.
const GUESTS: Limits = Limits { per_address: 64, in_all: 4096 };
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
    let (mut handshakes, guests) = (Crowd::new(MAX_HANDSHAKES), Guests::new(GUESTS));
    loop {
        let next = async {
            handshakes.room(MOMENT).await;
            accept_one(&listener).await
        };
        let accepted = tokio::select! {
            () = stop_accepting.cancelled() => break,
            accepted = next => accepted,
        };
        let Some((stream, peer)) = accepted else { continue };
        let (guest, displaced) = guests.admit(peer.ip());
        if displaced {
            tracing::debug!(%peer, ?GUESTS, "too many connections without an accepted call; one was given up");
        }
        let acceptor = TlsAcceptor::from(certificate.current(SystemTime::now()));
        let (connections, stop) = (connections.clone(), stop.clone());
        let displaced = handshakes.admit(async move {
            let handshake = tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream));
            let handshaken = tokio::select! {
                handshaken = handshake => handshaken,
                () = guest.displaced() => return,
            };
            let stream = match handshaken {
                Ok(Ok(stream)) => stream,
                Ok(Err(error)) => return tracing::debug!(%peer, %error, "TLS handshake failed"),
                Err(_) => return tracing::debug!(%peer, "TLS handshake timed out"),
            };
            // Refused only while the server is going away.
            drop(connections.send(Ok(Connection::new(stream, guest, stop))).await);
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

/// A connection that ends when told to, whatever streams are open on it, when its peer has been silent for too long, and when it is a
/// guest's for too long.
pub(crate) struct Connection<S = TlsStream<TcpStream>> {
    stream: S,
    stopped: Pin<Box<WaitForCancellationFutureOwned>>,
    silent: Pin<Box<Sleep>>,
    guest: Guest,
    /// Of a guest.
    leaving: Option<Leaving>,
}

/// What ends a guest's connection.
struct Leaving {
    overdue: Pin<Box<Sleep>>,
    displaced: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl Leaving {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self.overdue.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(()),
            Poll::Pending => self.displaced.as_mut().poll(cx),
        }
    }
}

impl<S> Connection<S> {
    fn new(stream: S, guest: Guest, stop: CancellationToken) -> Self {
        let silent = Box::pin(tokio::time::sleep(SILENCE));
        let (overdue, displaced) = (Box::pin(tokio::time::sleep(WELCOME)), Box::pin(guest.displaced()));
        let leaving = Some(Leaving { overdue, displaced });
        Self { stream, stopped: Box::pin(stop.cancelled_owned()), silent, guest, leaving }
    }

    /// Why it has to end, whatever its peer does. Asked in every direction: who takes nothing is not read from either.
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::ErrorKind> {
        if self.stopped.as_mut().poll(cx).is_ready() {
            return Poll::Ready(io::ErrorKind::ConnectionAborted);
        }
        if self.guest.is_accepted() {
            self.leaving = None;
        }
        if self.leaving.as_mut().is_some_and(|leaving| leaving.poll(cx).is_ready()) {
            tracing::debug!(peer = %self.guest.peer().address(), "a connection without an accepted call was given up");
            return Poll::Ready(io::ErrorKind::TimedOut);
        }
        Poll::Pending
    }

    /// What came of an attempt; if nothing, whether the peer has been silent for too long.
    fn poll_silence<T>(&mut self, attempt: Poll<io::Result<T>>, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        match attempt {
            Poll::Ready(done) => Poll::Ready(done),
            Poll::Pending => self.silent.as_mut().poll(cx).map(|()| Err(io::ErrorKind::TimedOut.into())),
        }
    }
}

impl<S> Connected for Connection<S> {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.guest.peer().clone()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Connection<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Poll::Ready(end) = self.poll_end(cx) {
            return Poll::Ready(Err(end.into()));
        }
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        if read.is_ready() {
            self.silent.as_mut().reset(Instant::now() + SILENCE);
        }
        self.poll_silence(read, cx)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Connection<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if let Poll::Ready(end) = self.poll_end(cx) {
            return Poll::Ready(Err(end.into()));
        }
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.poll_silence(written, cx)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Poll::Ready(end) = self.poll_end(cx) {
            return Poll::Ready(Err(end.into()));
        }
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.poll_silence(flushed, cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

    use super::*;

    fn connection() -> (Connection<DuplexStream>, Guests, DuplexStream) {
        let (ours, theirs) = tokio::io::duplex(64);
        let guests = Guests::new(Limits { per_address: 1, in_all: 1 });
        let (guest, _) = guests.admit([10, 0, 0, 1].into());
        (Connection::new(ours, guest, CancellationToken::new()), guests, theirs)
    }

    /// Says something again and again, as who answers pings does.
    async fn chat(mut theirs: DuplexStream) {
        while theirs.write_all(b"pong").await.is_ok() {
            tokio::time::sleep(SILENCE / 6).await;
        }
    }

    async fn read_for(connection: &mut Connection<DuplexStream>, span: Duration) -> io::Result<()> {
        let reading = async {
            while connection.read(&mut [0; 64]).await? > 0 {}
            Ok(())
        };
        tokio::time::timeout(span, reading).await.unwrap_or(Ok(()))
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_says_much_and_makes_no_call_ends() {
        let (mut connection, _guests, theirs) = connection();
        let began = Instant::now();
        let (ended, ()) = tokio::join!(read_for(&mut connection, 10 * SILENCE), async {
            tokio::time::timeout(SILENCE, chat(theirs)).await.unwrap_or_default();
        });
        assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(began.elapsed() >= WELCOME);
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_of_which_a_call_was_accepted_stays_while_its_peer_is_there() {
        let (mut connection, guests, theirs) = connection();
        connection.connect_info().accept();
        let (_newcomer, displaced) = guests.admit([10, 0, 0, 1].into());
        assert!(!displaced);
        let chatting = tokio::spawn(chat(theirs));
        read_for(&mut connection, 10 * SILENCE).await.expect("it stays");
        chatting.abort();
        let (mut connection, _guests, _theirs) = self::connection();
        connection.connect_info().accept();
        assert_eq!(read_for(&mut connection, 10 * SILENCE).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test(start_paused = true)]
    async fn a_guest_whose_place_is_needed_goes_at_once() {
        let (mut connection, guests, _theirs) = connection();
        let began = Instant::now();
        let ended = read_for(&mut connection, 10 * SILENCE);
        let (ended, _newcomer) = tokio::join!(ended, async { guests.admit([10, 0, 0, 1].into()) });
        assert!(ended.is_err() && began.elapsed() < WELCOME);
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_takes_nothing_is_given_up_whether_it_is_a_guest_or_not() {
        for accepted in [false, true] {
            let (mut connection, _guests, _theirs) = connection();
            if accepted {
                connection.connect_info().accept();
            }
            let ended = connection.write_all(&[0; 1000]).await.unwrap_err();
            assert_eq!(ended.kind(), io::ErrorKind::TimedOut, "{accepted}");
        }
    }
}
