//! Moving the bytes, and ending a connection the way it deserves.

use std::{
    cell::Cell,
    future::Future,
    ops::Deref,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use mesh_hbone::{LocalBoxFuture, Relay};
use mesh_net::{BufferPool, CopyOutcome, End, Progress, copy_bidirectional, sockets::reset_on_close};
use tokio::net::TcpStream;

use crate::{
    connections::Live,
    error::{ProxyError, flow_result},
    outcome::OpenFlow,
    proxy::upstream::Upstream,
};

const BUFFER_LENGTH: usize = 64 << 10;
/// Unused buffers a worker keeps.
const BUFFERS_RETAINED: usize = 64;

thread_local! {
    static BUFFERS: BufferPool = BufferPool::new(BUFFER_LENGTH, BUFFERS_RETAINED);
}

/// A socket whose close is a RST unless the flow ended in order: an application must never take a failed, denied or cut connection for
/// a complete one, whatever path the failure takes.
#[derive(Debug)]
pub(crate) struct FlowSocket {
    /// Shared with the tunnel, which writes what comes straight to it.
    stream: Rc<TcpStream>,
    ended: Cell<bool>,
}

impl FlowSocket {
    pub(crate) fn new(stream: TcpStream) -> Self {
        Self { stream: Rc::new(stream), ended: Cell::new(false) }
    }

    /// Both directions ended in order.
    fn end(&self) {
        self.ended.set(true);
    }
}

impl Deref for FlowSocket {
    type Target = TcpStream;

    fn deref(&self) -> &TcpStream {
        &self.stream
    }
}

impl Drop for FlowSocket {
    fn drop(&mut self) {
        if !self.ended.get() {
            // Fails only on a socket that is gone already.
            drop(reset_on_close(&self.stream));
        }
    }
}

/// Joins the local application's socket and the far side until both have ended, one failed, or policy says so; reports it. Dropping it
/// ends the flow where it stands.
///
/// All that stays of a flow once its way is open, in fields that are dropped in this order.
#[must_use = "nothing moves unless it is polled"]
pub(crate) struct Carried {
    copying: Copying,
    /// Until it is reported.
    flow: Option<OpenFlow>,
    local: FlowSocket,
    live: Live,
}

enum Copying {
    ToTunnel(Relay),
    /// Boxed, so that tunnels' flows do not pay for its size.
    ToTcp(LocalBoxFuture<'static, CopyOutcome>),
}

impl Carried {
    pub(crate) fn new(local: FlowSocket, far: Upstream, flow: OpenFlow, live: Live) -> Self {
        let progress = flow.progress().clone();
        let copying = match far {
            Upstream::Tunnel(tunnel) => Copying::ToTunnel(mesh_hbone::relay(local.stream.clone(), tunnel, progress)),
            Upstream::Tcp(far) => Copying::ToTcp(Box::pin(copy(local.stream.clone(), far, progress))),
        };
        flow.follow();
        Self { copying, flow: Some(flow), local, live }
    }

    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ProxyError>> {
        // First, so that nothing more is moved for a connection that may not be.
        if let Poll::Ready(decision) = self.live.poll_denied(cx) {
            return Poll::Ready(Err(ProxyError::PolicyChange(decision)));
        }
        let outcome = match &mut self.copying {
            Copying::ToTunnel(relay) => Pin::new(relay).poll(cx),
            Copying::ToTcp(copy) => copy.as_mut().poll(cx),
        };
        outcome.map(flow_result)
    }
}

impl Future for Carried {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        let result = ready!(this.poll_end(cx));
        if result.is_ok() {
            this.local.end();
        }
        if let Some(flow) = this.flow.take() {
            flow.finish(result.as_ref().copied());
        }
        Poll::Ready(())
    }
}

async fn copy(local: Rc<TcpStream>, far: FlowSocket, progress: Rc<Progress>) -> CopyOutcome {
    let buffers = BUFFERS.with(Clone::clone);
    let outcome = copy_bidirectional(&local, &far, &buffers, &progress).await;
    if matches!(outcome.end, End::Clean) {
        far.end();
    }
    outcome
}
