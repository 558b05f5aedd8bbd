//! The dialling end of a tunnel: HTTP/2 over a secured transport, and CONNECTs in it.

use std::{future::poll_fn, rc::Rc, time::Duration};

use http::StatusCode;
use tokio::{task::JoinHandle, time::timeout};

use crate::{
    config::Settings,
    connect::{ConnectRequest, ConnectResponse},
    driver::{Driver, Link},
    engine::{conn::Role, flow::Budget},
    error::Error,
    snapshot::StreamSnapshot,
    stream::{Held, TunnelStream},
    tls::Secured,
};

/// Streams of ours in one tunnel, unless configured otherwise.
pub(crate) const ASSUMED_STREAMS: usize = 100;

/// A handle for opening streams; the driver returned with it must run.
#[derive(Clone)]
pub(crate) struct Sender {
    link: Rc<Link>,
    answer_timeout: Duration,
}

/// Opens HTTP/2 and waits for the peer's SETTINGS: only then is its limit of streams known. The driver returned must run.
pub(crate) async fn handshake(
    secured: Secured,
    settings: &Settings,
    budget: Budget,
) -> Result<(Sender, Driver), Error> {
    let (mut driver, link) = Driver::new(secured, Role::Client, settings, budget);
    timeout(settings.handshake_timeout, driver.established())
        .await
        .unwrap_or(Err(Error::HandshakeTimeout(settings.handshake_timeout)))?;
    Ok((Sender { link, answer_timeout: settings.answer_timeout }, driver))
}

impl Sender {
    /// Streams the peer allows at once, if it says.
    pub(crate) fn max_streams(&self) -> Option<usize> {
        self.link.peer_max_streams().map(|max| usize::try_from(max).unwrap_or(usize::MAX))
    }

    pub(crate) fn is_usable(&self) -> bool {
        self.link.is_usable()
    }

    pub(crate) fn is_busy(&self) -> bool {
        self.link.is_busy()
    }

    pub(crate) fn streams(&self) -> Vec<StreamSnapshot> {
        self.link.streams()
    }

    /// No stream will be asked for any more: the driver ends the tunnel in order.
    pub(crate) fn close(&self) {
        self.link.close();
    }

    /// One CONNECT, answered with 200 within the deadline. Cancel safe: the stream is then reset.
    pub(crate) async fn connect(&self, request: &ConnectRequest) -> Result<(TunnelStream, ConnectResponse), Error> {
        match timeout(self.answer_timeout, self.exchange(request)).await {
            Ok(result) => result,
            Err(_) => Err(Error::AnswerTimeout(self.answer_timeout)),
        }
    }

    async fn exchange(&self, request: &ConnectRequest) -> Result<(TunnelStream, ConnectResponse), Error> {
        let id = poll_fn(|cx| self.link.poll_connect(cx, request)).await?;
        let stream = TunnelStream::new(self.link.clone(), id);
        let head = poll_fn(|cx| self.link.poll_response(id, cx)).await?;
        if head.status != StatusCode::OK {
            return Err(Error::Status(head.status));
        }
        Ok((stream, ConnectResponse { headers: head.headers, stream_id: id }))
    }
}

/// Opens a tunnel for one stream only, over any transport; for tunnels inside tunnels, which are never shared.
///
/// # Errors
/// As for pooled tunnels.
pub async fn connect_once(
    secured: Secured,
    settings: &Settings,
    budget: Budget,
    request: &ConnectRequest,
) -> Result<(TunnelStream, ConnectResponse), Error> {
    let (sender, driver) = handshake(secured, settings, budget).await?;
    let driver =
        Private { task: tokio::task::spawn_local(async move { drop(driver.await) }), link: sender.link.clone() };
    let (mut stream, response) = sender.connect(request).await?;
    stream.held = Some(Box::new(driver));
    Ok((stream, response))
}

/// Lets a private tunnel end with its stream.
struct Private {
    /// Ends by itself, soon after the tunnel is closed.
    #[expect(dead_code, reason = "detached on purpose: it still has to say goodbye")]
    task: JoinHandle<()>,
    link: Rc<Link>,
}

impl Held for Private {}

impl Drop for Private {
    fn drop(&mut self) {
        self.link.close();
    }
}
