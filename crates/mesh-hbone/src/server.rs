//! The accepting end: CONNECTs to a handler, GOAWAY on drain, keep-alive.

use std::{
    future::{pending, poll_fn},
    rc::Rc,
};

use http::{HeaderMap, StatusCode};
use mesh_runtime::drain::{DrainMode, DrainWatcher};
use tokio::task::JoinSet;

pub use crate::connect::{Malformed, Request};
use crate::{
    LocalBoxFuture,
    config::Settings,
    driver::{Driver, Incoming, Link},
    engine::{conn::Role, flow::Budget, frame::ErrorCode, head::RequestHead},
    error::Error,
    stream::TunnelStream,
    tls::Secured,
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
#[derive(Debug)]
pub struct Responder(TunnelStream);

impl Responder {
    /// 200: the tunnel is open.
    ///
    /// # Errors
    /// When the peer has given up meanwhile.
    pub fn accept(self, headers: &HeaderMap) -> Result<TunnelStream, Error> {
        let stream = self.0;
        if stream.link.respond(stream.id, StatusCode::OK, headers, false) { Ok(stream) } else { Err(Error::Abandoned) }
    }

    /// A refusal with an empty body.
    pub fn reject(self, status: StatusCode) {
        let stream = self.0;
        // False when the peer has gone, who then needs no answer.
        if stream.link.respond(stream.id, status, &HeaderMap::new(), true) {
            // RFC 9113 §8.1: the answer is complete, and nothing the peer still sends is wanted.
            stream.link.reset(stream.id, ErrorCode::NO_ERROR);
        }
    }

    /// REFUSED_STREAM: not processed, and welcome in another tunnel (RFC 9113 §8.7).
    pub fn refuse(self) {
        self.0.link.reset(self.0.id, ErrorCode::REFUSED_STREAM);
    }

    /// Resolves when the peer gives up waiting.
    pub async fn abandoned(&mut self) {
        poll_fn(|cx| self.0.link.poll_abandoned(self.0.id, cx)).await;
    }
}

/// Serves one tunnel until it ends. On a graceful drain the peer is told to go elsewhere and open streams run on; on an immediate one
/// everything is dropped. `budget` is whom the tunnel's memory is charged to.
///
/// # Errors
/// When the handshake fails or the tunnel breaks.
pub async fn serve<H: Handler + 'static>(
    secured: Secured,
    settings: &Settings,
    budget: Budget,
    drain: DrainWatcher,
    handler: Rc<H>,
) -> Result<(), Error> {
    let (mut driver, link) = Driver::new(secured, Role::Server, settings, budget);
    let mut handlers = JoinSet::new();
    let max_handlers = usize::try_from(settings.max_streams).unwrap_or(usize::MAX);
    let mut draining = None;
    let (mut expired, mut going_away) = (handler.expired(), false);
    let result = loop {
        let incoming = tokio::select! {
            incoming = poll_fn(|cx| driver.poll_incoming(cx)) => incoming,
            (mode, guard) = drain.signalled(), if draining.is_none() => {
                if mode == DrainMode::Immediate {
                    return Ok(());
                }
                draining = Some(guard);
                link.drain();
                continue;
            }
            () = drain.stopped() => return Ok(()),
            () = &mut expired, if !going_away => {
                going_away = true;
                link.drain();
                continue;
            }
            // Reap what has finished; an empty set is disabled by the guard.
            Some(_) = handlers.join_next(), if !handlers.is_empty() => continue,
        };
        match incoming {
            Ok(Some(Incoming::Request(id, head))) => dispatch(&link, id, head, &handler, &mut handlers, max_handlers),
            Ok(Some(Incoming::Malformed(why))) => {
                handler.malformed(&Malformed { status: StatusCode::BAD_REQUEST, detail: why.to_owned() })
            }
            Ok(None) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    // The streams are over; their handlers notice by themselves and still have to account for them.
    drop(driver);
    tokio::select! {
        () = async { while handlers.join_next().await.is_some() {} } => {}
        () = drain.stopped() => {}
    }
    result
}

fn dispatch<H: Handler + 'static>(
    link: &Rc<Link>,
    id: u32,
    head: RequestHead,
    handler: &Rc<H>,
    handlers: &mut JoinSet<()>,
    max_handlers: usize,
) {
    let responder = Responder(TunnelStream::new(link.clone(), id));
    match Request::parse(head) {
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
