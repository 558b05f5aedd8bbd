//! What became of a connection, said once: one line in the access log and one set of counters, whatever way it ends.

use std::{
    cell::Cell,
    net::SocketAddr,
    rc::Rc,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use mesh_core::{headers::Authority, identity::Identity, reason::Reason, workload::Workload};
use mesh_net::Progress;
use mesh_runtime::metrics::Registry;
use prometheus::IntGauge;

use self::meter::Meter;
use crate::{
    connections::Entry,
    dns::metrics::DnsMetrics,
    error::ProxyError,
    flow::{Direction, Flow},
    metrics::{Metrics, TrafficLabels},
};

pub(crate) mod meter;

/// Where flows are reported. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Outcomes(Arc<Metrics>);

impl Outcomes {
    /// # Panics
    /// When called twice for one registry.
    pub fn new(registry: &Registry) -> Self {
        Self(Arc::new(Metrics::new(registry)))
    }

    /// The route is decided: counts an opened connection, unless its far end is beyond a gateway. Who that is, the tunnel to it tells;
    /// such a connection counts as opened when it is open, or has failed.
    pub(crate) fn opened(&self, entry: Arc<Entry>) -> OpenFlow {
        let meter = self.meter(&entry.flow);
        let flow = OpenFlow { outcomes: self.clone(), entry, meter, counted: Cell::new(false), since: Instant::now() };
        if flow.entry.flow.beyond.is_none() {
            flow.count_opened();
        }
        flow
    }

    fn meter(&self, flow: &Flow) -> Rc<Meter> {
        Meter::new(self.0.traffic.series(TrafficLabels::of(flow)), flow.direction)
    }

    /// A connection that failed before a route was decided.
    pub fn early_deny(&self, direction: Direction, peer: SocketAddr, destination: SocketAddr, error: &ProxyError) {
        self.0.failed(direction, error.reason());
        let error = error.chain();
        let direction = direction.as_str();
        tracing::warn!(target: "access", parent: None, { src.addr = %peer, dst.addr = %destination, direction, error }, "connection failed");
    }

    /// Counts an accepted socket until the guard is dropped.
    pub fn socket(&self, direction: Direction) -> SocketGuard {
        let gauge = self.0.sockets(direction).clone();
        gauge.inc();
        SocketGuard(gauge)
    }

    /// A host known by name only was looked up on behalf of `source`.
    pub fn looked_up(&self, source: &Workload, hostname: &str) {
        self.0.looked_up(source, hostname);
    }

    pub(crate) fn dns(&self) -> &DnsMetrics {
        &self.0.dns
    }

    pub fn handshake(&self, direction: Direction, took: Duration, ok: bool) {
        self.0.handshake(direction, took, ok);
    }

    /// A handshake was refused, or a tunnel cut, over a revocation list.
    pub(crate) fn revoked(&self, direction: Direction) {
        self.0.revoked(direction);
    }

    /// A tunnel ended otherwise than in order; its flows are told apart.
    pub fn tunnel_failed(&self, direction: Direction, error: &mesh_hbone::Error) {
        if let mesh_hbone::Error::Abuse(abuse) = error {
            self.0.abused(direction, *abuse);
        }
    }
}

/// See [`Outcomes::socket`].
#[derive(Debug)]
pub struct SocketGuard(IntGauge);

impl Drop for SocketGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// A connection between route and end. Dropping it unfinished (a worker stopping, a pod gone) reports it as drained.
#[derive(Debug)]
#[must_use = "a flow is finished exactly once"]
pub(crate) struct OpenFlow {
    outcomes: Outcomes,
    entry: Arc<Entry>,
    meter: Rc<Meter>,
    /// As opened.
    counted: Cell<bool>,
    since: Instant,
}

impl OpenFlow {
    pub(crate) fn entry(&self) -> &Arc<Entry> {
        &self.entry
    }

    /// Where its bytes are to be counted: `sent` is what this side's application sent, `received` what it got.
    pub(crate) fn progress(&self) -> &Rc<Progress> {
        self.meter.progress()
    }

    /// Has the counters follow the bytes while the flow is open. Call once, within a `LocalSet`, when the way is open.
    pub(crate) fn follow(&self) {
        self.meter.follow();
    }

    /// The connection goes elsewhere before any byte was sent: another endpoint was tried. Counts as closed there and opened here, so
    /// that every series' opens and closes stay paired; the log keeps to one line, about where it went in the end.
    pub(crate) fn retarget(&mut self, entry: Arc<Entry>) {
        if self.counted.replace(false) {
            self.meter.series().closed.fetch_add(1, Relaxed);
        }
        self.meter = self.outcomes.meter(&entry.flow);
        self.entry = entry;
        self.count_opened();
    }

    /// Once.
    fn count_opened(&self) {
        if !self.counted.replace(true) {
            self.meter.series().opened.fetch_add(1, Relaxed);
            self.log_opened();
        }
    }

    /// The end.
    pub(crate) fn finish(self, result: Result<(), &ProxyError>) {
        match result {
            Ok(()) => self.end(None, || None),
            Err(error) => self.end(Some(error.reason()), || Some(error.chain())),
        }
    }

    /// Once; nothing happens the second time.
    fn end(&self, reason: Option<Reason>, error: impl FnOnce() -> Option<String>) {
        if !self.meter.end() {
            return;
        }
        self.count_opened();
        let series = self.meter.series();
        match reason {
            None => drop(series.closed.fetch_add(1, Relaxed)),
            Some(reason) => {
                let flagged = series.labels().clone().with_flags(reason.response_flag());
                let series = self.outcomes.0.traffic.series(flagged);
                series.closed.fetch_add(1, Relaxed);
                series.failed.fetch_add(1, Relaxed);
                self.outcomes.0.failed(self.entry.flow.direction, reason);
            }
        }
        self.log_complete(error());
    }

    fn log_opened(&self) {
        if tracing::enabled!(target: "access", tracing::Level::DEBUG) {
            let flow = &self.entry.flow;
            let f = LogFields::of(flow);
            tracing::debug!(target: "access", parent: None, {
                src.addr = %flow.peer, src.workload = f.src_workload, src.namespace = f.src_namespace,
                src.identity = f.src_identity, src.cluster = f.src_cluster, dst.addr = %flow.destination,
                dst.hbone_addr = f.hbone_addr, dst.service = f.service, dst.workload = f.dst_workload,
                dst.namespace = f.dst_namespace, dst.identity = f.dst_identity, dst.cluster = f.dst_cluster,
                direction = flow.direction.as_str(),
            }, "connection opened");
        }
    }

    /// One macro per level: a level is part of the call site's constant metadata.
    fn log_complete(&self, error: Option<String>) {
        let flow = &self.entry.flow;
        let f = LogFields::of(flow);
        let (bytes_sent, bytes_recv) = (self.progress().sent.get(), self.progress().received.get());
        let duration = format!("{}ms", self.since.elapsed().as_millis());
        macro_rules! line {
            ($level:ident) => {
                tracing::$level!(target: "access", parent: None, {
                    src.addr = %flow.peer, src.workload = f.src_workload, src.namespace = f.src_namespace,
                    src.identity = f.src_identity, src.cluster = f.src_cluster, dst.addr = %flow.destination,
                    dst.hbone_addr = f.hbone_addr, dst.service = f.service, dst.workload = f.dst_workload,
                    dst.namespace = f.dst_namespace, dst.identity = f.dst_identity, dst.cluster = f.dst_cluster,
                    direction = flow.direction.as_str(), bytes_sent, bytes_recv, duration, error,
                }, "connection complete")
            };
        }
        match error {
            None => line!(info),
            Some(_) => line!(error),
        }
    }
}

impl Drop for OpenFlow {
    fn drop(&mut self) {
        self.end(Some(Reason::Drain), || Some(ProxyError::Drain.to_string()));
    }
}

/// The access log's optional fields; absent ones are left out of the line.
struct LogFields<'a> {
    src_workload: Option<&'a str>,
    src_namespace: Option<&'a str>,
    src_identity: Option<String>,
    src_cluster: Option<&'a str>,
    hbone_addr: Option<tracing::field::DisplayValue<&'a Authority>>,
    service: Option<&'a str>,
    dst_workload: Option<&'a str>,
    dst_namespace: Option<&'a str>,
    dst_identity: Option<String>,
    dst_cluster: Option<&'a str>,
}

impl<'a> LogFields<'a> {
    fn of(flow: &'a Flow) -> Self {
        let (src, dst) = (flow.source.as_deref(), flow.destination_workload.as_deref());
        let told = flow.source_baggage.as_ref().filter(|_| src.is_none());
        // What the far end says of itself is nearer the truth than the record that stands for its network.
        let beyond = flow.beyond.as_deref().and_then(|beyond| beyond.baggage.as_ref());
        let text = |identity: Identity| identity.to_string();
        Self {
            src_workload: src.and_then(name).or_else(|| told?.workload_name.as_deref()),
            src_namespace: src.and_then(|w| known(&w.namespace)).or_else(|| told?.namespace.as_deref()),
            src_identity: flow.source_identity().map(text),
            src_cluster: src.and_then(|w| known(&w.cluster_id)).or_else(|| told?.cluster.as_deref()),
            hbone_addr: flow.authority.as_ref().map(tracing::field::display),
            service: flow.service.as_deref().and_then(|s| known(&s.hostname)),
            dst_workload: beyond.and_then(|b| b.workload_name.as_deref()).or_else(|| dst.and_then(name)),
            dst_namespace: beyond
                .and_then(|b| b.namespace.as_deref())
                .or_else(|| dst.and_then(|w| known(&w.namespace))),
            dst_identity: flow.destination_identity().filter(|_| flow.mutual_tls).map(text),
            dst_cluster: beyond.and_then(|b| b.cluster.as_deref()).or_else(|| dst.and_then(|w| known(&w.cluster_id))),
        }
    }
}

/// The pod's name, else its canonical service.
fn name(workload: &Workload) -> Option<&str> {
    known(&workload.name).or_else(|| known(&workload.canonical_name))
}

fn known(text: &str) -> Option<&str> {
    Some(text).filter(|t| !t.is_empty())
}

#[cfg(test)]
mod tests;
