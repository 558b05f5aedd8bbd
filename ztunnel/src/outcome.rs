//! What became of a connection, said once: one line in the access log and one set of counters, whatever way it ends.

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use mesh_core::{headers::Baggage, identity::Identity, reason::Reason, service::Service, workload::Workload};
use mesh_runtime::metrics::Registry;
use prometheus::IntGauge;

use crate::{
    error::ProxyError,
    metrics::{Metrics, Series, TrafficLabels},
};

/// As the pod sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    Inbound,
    Outbound,
}

impl Direction {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }

    /// Which side of the connection this proxy reports for.
    pub fn reporter(self) -> &'static str {
        match self {
            Self::Inbound => "destination",
            Self::Outbound => "source",
        }
    }
}

/// What is known of a connection once its route is decided.
#[derive(Clone, Debug)]
pub struct Flow {
    pub direction: Direction,
    /// The client's end.
    pub peer: SocketAddr,
    /// The TCP destination: with port 15008 for HBONE on both sides.
    pub destination: SocketAddr,
    /// What the CONNECT names.
    pub authority: Option<String>,
    pub mutual_tls: bool,
    pub source: Option<Arc<Workload>>,
    /// What the peer says of itself; used only where `source` is not known.
    pub source_baggage: Option<Baggage>,
    pub source_identity: Option<Identity>,
    pub destination_workload: Option<Arc<Workload>>,
    pub service: Option<Arc<Service>>,
    pub destination_identity: Option<Identity>,
}

impl Flow {
    /// A flow of which only the addresses are known; callers fill in the rest.
    pub fn new(direction: Direction, peer: SocketAddr, destination: SocketAddr) -> Self {
        Self {
            direction,
            peer,
            destination,
            authority: None,
            mutual_tls: false,
            source: None,
            source_baggage: None,
            source_identity: None,
            destination_workload: None,
            service: None,
            destination_identity: None,
        }
    }
}

/// Where flows are reported. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Outcomes(Metrics);

impl Outcomes {
    /// # Panics
    /// When called twice for one registry.
    pub fn new(registry: &Registry) -> Self {
        Self(Metrics::new(registry))
    }

    /// The route is decided: counts an opened connection.
    pub fn opened(&self, flow: Flow) -> OpenFlow {
        let labels = TrafficLabels::of(&flow);
        let series = self.0.traffic.series(labels.clone());
        series.opened.fetch_add(1, Relaxed);
        OpenFlow { outcomes: self.clone(), flow, labels, series, since: Instant::now(), moved: (0, 0), finished: false }
            .log_opened()
    }

    /// A connection that failed before a route was decided.
    pub fn early_deny(&self, direction: Direction, peer: SocketAddr, destination: SocketAddr, error: &ProxyError) {
        self.0.failed(direction, error.reason());
        let error = error.chain();
        let direction = direction.as_str();
        tracing::warn!(target: "access", { src.addr = %peer, dst.addr = %destination, direction, error }, "connection failed");
    }

    /// Counts an accepted socket until the guard is dropped.
    pub fn socket(&self, direction: Direction) -> SocketGuard {
        let gauge = self.0.sockets(direction).clone();
        gauge.inc();
        SocketGuard(gauge)
    }

    pub fn handshake(&self, direction: Direction, took: Duration, ok: bool) {
        self.0.handshake(direction, took, ok);
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
pub struct OpenFlow {
    outcomes: Outcomes,
    flow: Flow,
    labels: TrafficLabels,
    series: Arc<Series>,
    since: Instant,
    /// Bytes counted already.
    moved: (u64, u64),
    finished: bool,
}

impl OpenFlow {
    pub fn flow(&self) -> &Flow {
        &self.flow
    }

    /// The connection goes elsewhere before any byte was sent: another endpoint was tried. Counts as closed there and opened here, so
    /// that every series' opens and closes stay paired; the log keeps to one line, about where it went in the end.
    pub fn retarget(&mut self, flow: Flow) {
        self.series.closed.fetch_add(1, Relaxed);
        self.labels = TrafficLabels::of(&flow);
        self.flow = flow;
        self.series = self.outcomes.0.traffic.series(self.labels.clone());
        self.series.opened.fetch_add(1, Relaxed);
    }

    /// Counts bytes of a long connection while it is open; totals since its start, as for [`Self::finish`].
    pub fn progress(&mut self, sent: u64, received: u64) {
        let (up, down) = (sent.saturating_sub(self.moved.0), received.saturating_sub(self.moved.1));
        self.moved = (sent.max(self.moved.0), received.max(self.moved.1));
        let (to_server, to_client) = match self.flow.direction {
            Direction::Outbound => (up, down),
            Direction::Inbound => (down, up),
        };
        self.series.received.fetch_add(to_server, Relaxed);
        self.series.sent.fetch_add(to_client, Relaxed);
    }

    /// The end. `sent` and `received` are totals as this side's application sees them: outbound, `sent` is client to server; inbound,
    /// server to client.
    pub fn finish(mut self, sent: u64, received: u64, result: Result<(), &ProxyError>) {
        self.finished = true;
        self.progress(sent, received);
        match result {
            Ok(()) => self.end(None, None),
            Err(error) => self.end(Some(error.reason()), Some(error.chain())),
        }
    }

    fn end(&mut self, reason: Option<Reason>, error: Option<String>) {
        match reason {
            None => drop(self.series.closed.fetch_add(1, Relaxed)),
            Some(reason) => {
                let flagged = self.labels.clone().with_flags(reason.response_flag());
                let series = self.outcomes.0.traffic.series(flagged);
                series.closed.fetch_add(1, Relaxed);
                series.failed.fetch_add(1, Relaxed);
                self.outcomes.0.failed(self.flow.direction, reason);
            }
        }
        self.log_complete(error);
    }

    fn log_opened(self) -> Self {
        if tracing::enabled!(target: "access", tracing::Level::DEBUG) {
            let f = LogFields::of(&self.flow);
            tracing::debug!(target: "access", {
                src.addr = %self.flow.peer, src.workload = f.src_workload, src.namespace = f.src_namespace,
                src.identity = f.src_identity, src.cluster = f.src_cluster, dst.addr = %self.flow.destination,
                dst.hbone_addr = f.hbone_addr, dst.service = f.service, dst.workload = f.dst_workload,
                dst.namespace = f.dst_namespace, dst.identity = f.dst_identity, dst.cluster = f.dst_cluster,
                direction = self.flow.direction.as_str(),
            }, "connection opened");
        }
        self
    }

    /// One macro per level: a level is part of the call site's constant metadata.
    fn log_complete(&self, error: Option<String>) {
        let f = LogFields::of(&self.flow);
        let (bytes_sent, bytes_recv) = self.moved;
        let duration = format!("{}ms", self.since.elapsed().as_millis());
        macro_rules! line {
            ($level:ident) => {
                tracing::$level!(target: "access", {
                    src.addr = %self.flow.peer, src.workload = f.src_workload, src.namespace = f.src_namespace,
                    src.identity = f.src_identity, src.cluster = f.src_cluster, dst.addr = %self.flow.destination,
                    dst.hbone_addr = f.hbone_addr, dst.service = f.service, dst.workload = f.dst_workload,
                    dst.namespace = f.dst_namespace, dst.identity = f.dst_identity, dst.cluster = f.dst_cluster,
                    direction = self.flow.direction.as_str(), bytes_sent, bytes_recv, duration, error,
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
        if !self.finished {
            self.end(Some(Reason::Drain), Some("connection closed due to connection drain".to_owned()));
        }
    }
}

/// The access log's optional fields; absent ones are left out of the line.
struct LogFields<'a> {
    src_workload: Option<&'a str>,
    src_namespace: Option<&'a str>,
    src_identity: Option<String>,
    src_cluster: Option<&'a str>,
    hbone_addr: Option<tracing::field::DisplayValue<&'a String>>,
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
        let identity =
            |identity: &Option<Identity>| identity.as_ref().filter(|_| flow.mutual_tls).map(ToString::to_string);
        Self {
            src_workload: src.and_then(name).or_else(|| told?.workload_name.as_deref()),
            src_namespace: src.and_then(|w| known(&w.namespace)).or_else(|| told?.namespace.as_deref()),
            src_identity: identity(&flow.source_identity),
            src_cluster: src.and_then(|w| known(&w.cluster_id)).or_else(|| told?.cluster.as_deref()),
            hbone_addr: flow.authority.as_ref().map(tracing::field::display),
            service: flow.service.as_deref().and_then(|s| known(&s.hostname)),
            dst_workload: dst.and_then(name),
            dst_namespace: dst.and_then(|w| known(&w.namespace)),
            dst_identity: identity(&flow.destination_identity),
            dst_cluster: dst.and_then(|w| known(&w.cluster_id)),
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
