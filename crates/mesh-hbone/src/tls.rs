//! The handshake on a transport: from a connected socket to a peer that is known.

use std::{io, pin::Pin, sync::Arc};

use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use crate::{
    cut::Cut,
    engine::{
        handshake::{Established, Handshake, HandshakeError},
        tunnel::MAX_RECORD,
    },
};

/// What a tunnel runs on: a TCP connection, or a stream of another tunnel.
pub trait Transport: AsyncRead + AsyncWrite + Unpin {}

impl<T: AsyncRead + AsyncWrite + Unpin> Transport for T {}

pub(crate) type BoxedTransport = Pin<Box<dyn Transport>>;

/// A transport with both keys, ready for HTTP/2.
pub struct Secured {
    pub(crate) io: BoxedTransport,
    pub(crate) established: Established,
    /// Records that came behind the handshake.
    pub(crate) leftover: Vec<u8>,
    pub(crate) cut: Cut,
}

impl std::fmt::Debug for Secured {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Secured").field("alpn", &self.established.alpn).finish_non_exhaustive()
    }
}

impl Secured {
    /// Leaf first.
    pub fn peer_certificates(&self) -> &[CertificateDer<'static>] {
        &self.established.peer_certificates
    }

    /// By which the tunnel that will run on this can be ended.
    pub fn cut(&self) -> Cut {
        self.cut.clone()
    }
}

/// Opens TLS as a client. No deadline of its own; cancel safe in that the connection is lost with it.
///
/// # Errors
/// Those of the transport; `InvalidData` with rustls' reason inside when TLS fails.
pub async fn connect(
    io: impl Transport + 'static,
    config: &Arc<ClientConfig>,
    name: ServerName<'static>,
) -> io::Result<Secured> {
    shake_hands(io, Handshake::client(config, name).map_err(invalid)?).await
}

/// Opens TLS as a server; see [`connect`].
///
/// # Errors
/// As for [`connect`].
pub async fn accept(io: impl Transport + 'static, config: &Arc<ServerConfig>) -> io::Result<Secured> {
    shake_hands(io, Handshake::server(config).map_err(invalid)?).await
}

async fn shake_hands(mut io: impl Transport + 'static, mut handshake: Handshake) -> io::Result<Secured> {
    let mut input = Vec::new();
    let mut output = Vec::new();
    loop {
        let result = handshake.read(&input);
        handshake.write(&mut output);
        if !output.is_empty() {
            // After an error this is the alert that says why.
            io.write_all(&output).await?;
            io.flush().await?;
            output.clear();
        }
        input.drain(..result.map_err(invalid)?);
        if handshake.is_done() {
            break;
        }
        // A record at most is incomplete; the rest was consumed.
        input.reserve(MAX_RECORD);
        if io.read_buf(&mut input).await? == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the peer left during the TLS handshake"));
        }
    }
    let established = handshake.finish().map_err(invalid)?;
    Ok(Secured { io: Box::pin(io), established, leftover: input, cut: Cut::new() })
}

fn invalid(error: HandshakeError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
