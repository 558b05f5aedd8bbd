//! The dialling end of a tunnel: HTTP/2 over a finished TLS stream, and CONNECTs in it.

use std::{future::poll_fn, rc::Rc, sync::Arc, time::Duration};

use http::StatusCode;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    task::JoinHandle,
    time::timeout,
};

use crate::{
    chunk::Chunk,
    config::Settings,
    connect::{ConnectRequest, ConnectResponse},
    error::Error,
    keepalive,
    snapshot::Streams,
    stream::{self, Held, TunnelStream},
};

/// Streams assumed to be allowed until the peer's SETTINGS say otherwise.
pub(crate) const ASSUMED_STREAMS: usize = 100;

/// A handle for opening streams; the driver returned with it must run.
#[derive(Clone)]
pub(crate) struct Sender {
    requests: h2::client::SendRequest<Chunk>,
    streams: Rc<Streams>,
    answer_timeout: Duration,
}

/// Opens HTTP/2 on `io`. The future returned drives the tunnel until it ends: peer gone, keep-alive failed, or nobody holds a
/// sender or stream any more.
pub(crate) async fn handshake<S>(
    io: S,
    settings: &Settings,
) -> Result<(Sender, impl Future<Output = ()> + use<S>), Error>
where
    S: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let opening = settings.client(ASSUMED_STREAMS).handshake::<_, Chunk>(io);
    let (requests, mut connection) = timeout(settings.handshake_timeout, opening)
        .await
        .map_err(|_| Error::HandshakeTimeout(settings.handshake_timeout))?
        .map_err(|error| Error::Handshake { source: Arc::new(error) })?;
    let (ping_pong, keepalive) = (connection.ping_pong(), settings.keepalive);
    let driver = async move {
        tokio::select! {
            result = connection => if let Err(error) = result {
                tracing::debug!(%error, "tunnel ended");
            },
            () = keepalive::watch(ping_pong, keepalive) => tracing::warn!("HBONE ping timeout/error"),
        }
    };
    Ok((Sender { requests, streams: Rc::default(), answer_timeout: settings.answer_timeout }, driver))
}

impl Sender {
    /// Streams the peer allows at once.
    pub(crate) fn max_streams(&self) -> usize {
        self.requests.current_max_send_streams()
    }

    pub(crate) fn streams(&self) -> &Streams {
        &self.streams
    }

    /// One CONNECT, answered with 200 within the deadline.
    pub(crate) async fn connect(&self, request: &ConnectRequest) -> Result<(TunnelStream, ConnectResponse), Error> {
        match timeout(self.answer_timeout, self.exchange(request)).await {
            Ok(result) => result,
            Err(_) => Err(Error::AnswerTimeout(self.answer_timeout)),
        }
    }

    async fn exchange(&self, request: &ConnectRequest) -> Result<(TunnelStream, ConnectResponse), Error> {
        let message = request.to_http().ok_or(Error::Authority)?;
        let mut requests = self.requests.clone();
        poll_fn(|cx| requests.poll_ready(cx)).await.map_err(Error::of_stream)?;
        let (answer, send) = requests.send_request(message, false).map_err(Error::of_stream)?;
        let (head, recv) = answer.await.map_err(Error::of_stream)?.into_parts();
        if head.status != StatusCode::OK {
            return Err(Error::Status(head.status));
        }
        let stream_id = send.stream_id().as_u32();
        let record = stream::record(stream_id, request.authority.to_string());
        self.streams.add(&record);
        let stream = TunnelStream::new(send, recv, record, None);
        Ok((stream, ConnectResponse { headers: head.headers, stream_id }))
    }
}

/// Opens a tunnel for one stream only, over any transport; for tunnels inside tunnels, which are never shared.
///
/// # Errors
/// As for pooled tunnels.
pub async fn connect_once<S>(
    io: S,
    settings: &Settings,
    request: &ConnectRequest,
) -> Result<(TunnelStream, ConnectResponse), Error>
where
    S: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let (sender, driver) = handshake(io, settings).await?;
    let driver = Driver(tokio::task::spawn_local(driver));
    let (mut stream, response) = sender.connect(request).await?;
    stream.held = Some(Box::new(driver));
    Ok((stream, response))
}

/// Stops a private tunnel's task with its stream.
struct Driver(JoinHandle<()>);

impl Held for Driver {}

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}
