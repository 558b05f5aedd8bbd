//! Moving the bytes, and ending a connection the way it deserves.

use std::{cell::Cell, ops::Deref, pin::pin, rc::Rc, time::Duration};

use mesh_net::{BufferPool, CopyOutcome, Progress, copy_bidirectional, sockets::reset_on_close};
use tokio::{net::TcpStream, time::sleep};

use crate::{connections::Cut, error::ProxyError, error::flow_result, outcome::OpenFlow, proxy::upstream::Upstream};

const BUFFER_LENGTH: usize = 64 << 10;
/// Unused buffers a worker keeps.
const BUFFERS_RETAINED: usize = 64;
/// Between two counts of a long flow's bytes.
const REPORT_INTERVAL: Duration = Duration::from_secs(30);

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

/// Joins the local application's socket and the far side until both have ended, one failed, or `cut` says so; reports it.
pub(crate) async fn relay(local: FlowSocket, far: Upstream, mut cut: Option<&mut Cut>, flow: OpenFlow) {
    let progress = Rc::new(Progress::default());
    let mut reported = Reported { flow: Some(flow), progress: &progress };
    let mut copying = pin!(copy(&local, far, &progress));
    let result = loop {
        tokio::select! {
            biased;
            decision = denied(cut.as_deref_mut()) => break Err(ProxyError::PolicyChange(Box::new(decision))),
            outcome = &mut copying => break flow_result(outcome),
            () = sleep(REPORT_INTERVAL) => reported.note(),
        }
    };
    if result.is_ok() {
        local.end();
    }
    reported.finish(result.as_ref().copied());
}

/// Counts what a flow has moved, even if it is dropped where it stands.
struct Reported<'a> {
    flow: Option<OpenFlow>,
    progress: &'a Progress,
}

impl Reported<'_> {
    fn moved(&self) -> (u64, u64) {
        (self.progress.sent.get(), self.progress.received.get())
    }

    fn note(&mut self) {
        let (sent, received) = self.moved();
        if let Some(flow) = &mut self.flow {
            flow.progress(sent, received);
        }
    }

    fn finish(mut self, result: Result<(), &ProxyError>) {
        let (sent, received) = self.moved();
        if let Some(flow) = self.flow.take() {
            flow.finish(sent, received, result);
        }
    }
}

impl Drop for Reported<'_> {
    fn drop(&mut self) {
        self.note();
    }
}

async fn denied(cut: Option<&mut Cut>) -> mesh_core::authorize::Decision {
    match cut {
        Some(cut) => cut.denied().await,
        None => std::future::pending().await,
    }
}

async fn copy(local: &FlowSocket, far: Upstream, progress: &Rc<Progress>) -> CopyOutcome {
    match far {
        Upstream::Tcp(far) => {
            let buffers = BUFFERS.with(Clone::clone);
            let outcome = copy_bidirectional(local, &far, &buffers, progress).await;
            if matches!(outcome.end, mesh_net::End::Clean) {
                far.end();
            }
            outcome
        }
        Upstream::Tunnel(tunnel) => mesh_hbone::relay(local.stream.clone(), tunnel, progress.clone()).await,
    }
}
