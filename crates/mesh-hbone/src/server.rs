//! The accepting end: CONNECTs to a handler, GOAWAY on drain, keep-alive.

use std::{
    future::{pending, poll_fn},
    rc::Rc,
    sync::Arc,
};

use http::{HeaderMap, Response, StatusCode};
use mesh_runtime::drain::{DrainMode, DrainWatcher};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    task::JoinSet,
    time::timeout,
};

pub use crate::connect::{Malformed, Request};
use crate::{
    LocalBoxFuture,
    chunk::Chunk,
    config::Settings,
    error::Error,
    keepalive,
    stream::{self, TunnelStream},
};

/// What to do with CONNECTs. One per tunnel.
pub trait Handler {
    /// Decides on one CONNECT and, once accepted, carries its bytes. Runs beside the others of the tunnel and is dropped with it.
    fn connect(self: Rc<Self>, request: Request, responder: Responder) -> LocalBoxFuture<'static, ()>;

    /// Something that was no CONNECT, already answered.
    fn malformed(&self, malformed: &Malformed);

    /// Resolves when the tunnel shall take no more CONNECTs; the peer is then told to go elsewhere, and open streams run on.
    fn expired(&self) -> LocalBoxFuture<'static, ()> {
        Box::pin(pending())
    }
}

/// The pending answer to a CONNECT. Dropping it unanswered resets the stream.
pub struct Responder {
    respond: h2::server::SendResponse<Chunk>,
    recv: h2::RecvStream,
    target: String,
}

impl std::fmt::Debug for Responder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Responder").field("target", &self.target).finish_non_exhaustive()
    }
}

impl Responder {
    /// 200: the tunnel is open.
    ///
    /// # Errors
    /// When the peer has given up meanwhile.
    pub fn accept(mut self, headers: HeaderMap) -> Result<TunnelStream, Error> {
        let mut response = Response::new(());
        *response.headers_mut() = headers;
        let send = self.respond.send_response(response, false).map_err(Error::of_stream)?;
        let record = stream::record(send.stream_id().as_u32(), self.target);
        Ok(TunnelStream::new(send, self.recv, record, None))
    }

    /// A refusal with an empty body.
    pub fn reject(mut self, status: StatusCode) {
        let mut response = Response::new(());
        *response.status_mut() = status;
        // Fails only when the peer has gone, who then needs no answer.
        drop(self.respond.send_response(response, true));
    }

    /// REFUSED_STREAM: not processed, and welcome elsewhere (RFC 9113 §8.7).
    fn refuse(mut self) {
        self.respond.send_reset(h2::Reason::REFUSED_STREAM);
    }

    /// Resolves when the peer gives up waiting.
    pub async fn abandoned(&mut self) {
        // An error means that the tunnel is gone, which is giving up too.
        drop(poll_fn(|cx| self.respond.poll_reset(cx)).await);
    }
}

/// Serves one tunnel until it ends. On a graceful drain the peer is told to go elsewhere and open streams run on; on an immediate one
/// everything is dropped.
///
/// # Errors
/// When the handshake fails or the tunnel breaks.
pub async fn serve<S, H>(io: S, settings: &Settings, drain: DrainWatcher, handler: Rc<H>) -> Result<(), Error>
where
    S: AsyncRead + AsyncWrite + Unpin,
    H: Handler + 'static,
{
    let mut connection = timeout(settings.handshake_timeout, settings.server().handshake::<_, Chunk>(io))
        .await
        .map_err(|_| Error::HandshakeTimeout(settings.handshake_timeout))?
        .map_err(|error| Error::Handshake { source: Arc::new(error) })?;
    let keepalive = keepalive::watch(connection.ping_pong(), settings.keepalive);
    tokio::pin!(keepalive);
    let mut handlers = JoinSet::new();
    let max_handlers = usize::try_from(settings.max_streams).unwrap_or(usize::MAX);
    let mut draining = None;
    let (mut expired, mut going_away) = (handler.expired(), false);
    let result = loop {
        let accepted = tokio::select! {
            accepted = connection.accept() => accepted,
            (mode, guard) = drain.signalled(), if draining.is_none() => {
                if mode == DrainMode::Immediate {
                    return Ok(());
                }
                draining = Some(guard);
                connection.graceful_shutdown();
                continue;
            }
            () = drain.stopped() => return Ok(()),
            () = &mut expired, if !going_away => {
                going_away = true;
                connection.graceful_shutdown();
                continue;
            }
            () = &mut keepalive => break Err(Error::KeepAlive(settings.keepalive.timeout)),
            // Reap what has finished; an empty set is disabled by the guard.
            Some(_) = handlers.join_next(), if !handlers.is_empty() => continue,
        };
        match accepted {
            Some(Ok((request, respond))) => dispatch(request, respond, &handler, &mut handlers, max_handlers),
            Some(Err(error)) => break Err(Error::Lost { source: Arc::new(error) }),
            None => break Ok(()),
        }
    };
    // The streams are over; their handlers notice by themselves and still have to account for them.
    drop(connection);
    tokio::select! {
        () = async { while handlers.join_next().await.is_some() {} } => {}
        () = drain.stopped() => {}
    }
    result
}

fn dispatch<H: Handler + 'static>(
    request: http::Request<h2::RecvStream>,
    respond: h2::server::SendResponse<Chunk>,
    handler: &Rc<H>,
    handlers: &mut JoinSet<()>,
    max_handlers: usize,
) {
    let parsed = Request::parse(&request);
    let target = request.uri().authority().map(ToString::to_string).unwrap_or_default();
    let responder = Responder { respond, recv: request.into_body(), target };
    match parsed {
        Ok(request) => {
            while handlers.try_join_next().is_some() {}
            // HTTP/2 counts open streams; what a peer reset may still be worked on.
            if handlers.len() >= max_handlers {
                return responder.refuse();
            }
            handlers.spawn_local(handler.clone().connect(request, responder));
        }
        Err(malformed) => {
            responder.reject(malformed.status);
            handler.malformed(&malformed);
        }
    }
}
