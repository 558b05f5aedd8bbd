//! Every metric family of the process. Traffic series are kept by hand: one set of labels serves five families, a connection holds its
//! series, idle series leave, and a cap keeps strangers from filling memory.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use mesh_core::{reason::Reason, workload::Workload};
use mesh_hbone::Abuse;
use mesh_runtime::{
    metrics::{Registry, counter, family},
    telemetry,
};
use prometheus::{
    Gauge, GaugeVec, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    core::{Collector, Desc, Describer},
    proto::{LabelPair, Metric, MetricFamily, MetricType},
};

use crate::{dns::metrics::DnsMetrics, flow::Direction};

pub mod labels;

pub use labels::TrafficLabels;

/// A series that no connection holds and nothing has changed for this long is dropped.
const IDLE: Duration = Duration::from_secs(3600);
/// Label sets at once; connections beyond share one series whose labels say so.
const MAX_SERIES: usize = 20_000;

/// What the data path counts.
#[derive(Debug)]
pub struct Metrics {
    pub traffic: Traffic,
    sockets: [IntGauge; 2],
    failures: IntCounterVec,
    abuses: IntCounterVec,
    revocations: IntCounterVec,
    handshakes: HistogramVec,
    pub(crate) dns: DnsMetrics,
    lookups: IntCounterVec,
}

impl Metrics {
    /// # Panics
    /// When called twice for one registry.
    pub fn new(registry: &Registry) -> Self {
        let traffic = Traffic::default();
        registry.register(Box::new(traffic.clone()));
        registry.register(Box::new(DroppedLines::new()));
        let sockets = registry.add(IntGaugeVec::new(
            Opts::new("istio_tcp_sockets_open", "Accepted sockets that are open (unstable)"),
            &["reporter"],
        ));
        let failures = registry.add(IntCounterVec::new(
            Opts::new(
                "fairway_connection_failures_total",
                "Connections that did not go as asked, by reason (unstable)",
            ),
            &["reporter", "reason"],
        ));
        let abuses = registry.add(IntCounterVec::new(
            Opts::new(
                "fairway_tunnel_abuse_total",
                "Tunnels ended because the peer ran into a limit, by the limit (unstable)",
            ),
            &["reporter", "limit"],
        ));
        let revocations = registry.add(IntCounterVec::new(
            Opts::new(
                "istio_crl_policy_rejections_total",
                "Handshakes refused and tunnels cut because a revocation list names the peer (unstable)",
            ),
            &["reporter"],
        ));
        let buckets = vec![0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 10.0];
        let handshakes = HistogramOpts::new(
            "fairway_tls_handshake_duration_seconds",
            "From the first byte of a TLS handshake to its end (unstable)",
        );
        let handshakes = registry.add(HistogramVec::new(handshakes.buckets(buckets), &["reporter", "result"]));
        let lookups = registry.add(IntCounterVec::new(
            Opts::new("istio_on_demand_dns_total", "Uses of hosts known by name only (unstable)"),
            &labels::LOOKUP,
        ));
        let dns = DnsMetrics::new(registry);
        let sockets = [Direction::Inbound, Direction::Outbound].map(|d| sockets.with_label_values(&[d.reporter()]));
        Self { traffic, sockets, failures, abuses, revocations, handshakes, dns, lookups }
    }

    pub fn sockets(&self, direction: Direction) -> &IntGauge {
        match direction {
            Direction::Inbound => &self.sockets[0],
            Direction::Outbound => &self.sockets[1],
        }
    }

    pub fn failed(&self, direction: Direction, reason: Reason) {
        self.failures.with_label_values(&[direction.reporter(), reason.as_str()]).inc();
    }

    pub fn looked_up(&self, source: &Workload, hostname: &str) {
        let values = labels::lookup(source, hostname);
        self.lookups.with_label_values(&values.each_ref().map(String::as_str)).inc();
    }

    pub fn abused(&self, direction: Direction, abuse: Abuse) {
        self.abuses.with_label_values(&[direction.reporter(), abuse.label()]).inc();
    }

    pub fn revoked(&self, direction: Direction) {
        self.revocations.with_label_values(&[direction.reporter()]).inc();
    }

    pub fn handshake(&self, direction: Direction, took: Duration, ok: bool) {
        let result = if ok { "ok" } else { "failed" };
        self.handshakes.with_label_values(&[direction.reporter(), result]).observe(took.as_secs_f64());
    }
}

/// What the control side counts.
#[derive(Clone, Debug)]
pub struct ControlMetrics {
    pub proxies_active: IntGauge,
    pub proxies_pending: IntGauge,
    pub proxies_started: IntCounter,
    pub proxies_stopped: IntCounter,
    pub xds_connected: IntGauge,
    /// Unix time.
    pub xds_last_message: Gauge,
    pub xds_terminations: IntCounterVec,
    pub xds_messages: IntCounterVec,
    pub xds_bytes: IntCounterVec,
    pub crl_loads: IntCounterVec,
}

impl ControlMetrics {
    /// # Panics
    /// When called twice for one registry.
    pub fn new(registry: &Registry, version: &str) -> Self {
        let build: GaugeVec =
            registry.add(GaugeVec::new(Opts::new("istio_build", "Istio component build info"), &["component", "tag"]));
        build.with_label_values(&["ztunnel", version]).set(1.0);
        let counter = |name: &str, help: &str| registry.add(IntCounter::new(name, help));
        let gauge = |name: &str, help: &str| registry.add(IntGauge::new(name, help));
        let vec =
            |name: &str, help: &str, label: &str| registry.add(IntCounterVec::new(Opts::new(name, help), &[label]));
        Self {
            proxies_active: gauge("workload_manager_active_proxy_count", "Pods being served (unstable)"),
            proxies_pending: gauge(
                "workload_manager_pending_proxy_count",
                "Pods whose listeners failed, being retried (unstable)",
            ),
            proxies_started: counter("workload_manager_proxies_started_total", "Pods taken into service (unstable)"),
            proxies_stopped: counter("workload_manager_proxies_stopped_total", "Pods taken out of service (unstable)"),
            xds_connected: gauge("fairway_xds_connected", "Whether the discovery stream is up (unstable)"),
            xds_last_message: registry.add(Gauge::new(
                "fairway_xds_last_message_timestamp_seconds",
                "When discovery last sent something (unstable)",
            )),
            xds_terminations: vec(
                "istio_xds_connection_terminations_total",
                "Discovery streams that ended (unstable)",
                "reason",
            ),
            xds_messages: vec("istio_xds_message_total", "Discovery messages received (unstable)", "url"),
            xds_bytes: vec(
                "istio_xds_message_bytes_total",
                "Bytes of resources received by discovery (unstable)",
                "url",
            ),
            crl_loads: vec(
                "fairway_crl_loads_total",
                "Attempts at reading the revocation lists; after a failed one the lists before it stay (unstable)",
                "result",
            ),
        }
    }
}

/// One set of labels, five counters. A connection holds it, which also keeps it from leaving.
#[derive(Debug)]
pub struct Series {
    labels: Arc<TrafficLabels>,
    pub opened: AtomicU64,
    pub closed: AtomicU64,
    pub failed: AtomicU64,
    /// Client to server.
    pub received: AtomicU64,
    /// Server to client.
    pub sent: AtomicU64,
}

impl Series {
    fn new(labels: Arc<TrafficLabels>) -> Self {
        Self {
            labels,
            opened: AtomicU64::default(),
            closed: AtomicU64::default(),
            failed: AtomicU64::default(),
            received: AtomicU64::default(),
            sent: AtomicU64::default(),
        }
    }

    pub fn labels(&self) -> &TrafficLabels {
        &self.labels
    }

    fn values(&self) -> [u64; FAMILIES.len()] {
        [&self.opened, &self.closed, &self.failed, &self.received, &self.sent].map(|counter| counter.load(Relaxed))
    }
}

/// Names and help texts, in the order of [`Series::values`].
const FAMILIES: [(&str, &str); 5] = [
    ("istio_tcp_connections_opened_total", "Connections whose route was decided"),
    ("istio_tcp_connections_closed_total", "Connections that have ended, whatever the outcome"),
    ("istio_tcp_connections_failed_total", "Connections that ended with a response flag (unstable)"),
    ("istio_tcp_received_bytes_total", "Bytes from clients to servers"),
    ("istio_tcp_sent_bytes_total", "Bytes from servers to clients"),
];

/// All traffic series. Cheap to clone; looked up once per connection.
#[derive(Clone, Default)]
pub struct Traffic(Arc<Mutex<HashMap<Arc<TrafficLabels>, Held>>>);

struct Held {
    series: Arc<Series>,
    seen: [u64; FAMILIES.len()],
    changed: Instant,
}

impl fmt::Debug for Traffic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Traffic").field("series", &self.lock().len()).finish()
    }
}

impl Traffic {
    /// The series of these labels, or the shared overflow series when there are too many.
    pub fn series(&self, labels: TrafficLabels) -> Arc<Series> {
        let mut map = self.lock();
        if let Some(held) = map.get(&labels) {
            return held.series.clone();
        }
        let labels = Arc::new(if map.len() < MAX_SERIES { labels } else { labels.overflow() });
        let held = map.entry(labels.clone()).or_insert_with(|| Held {
            series: Arc::new(Series::new(labels)),
            seen: [0; FAMILIES.len()],
            changed: Instant::now(),
        });
        held.series.clone()
    }

    /// Drops what has been idle until `now`, and returns the rest.
    fn sweep(&self, now: Instant) -> Vec<(Arc<TrafficLabels>, [u64; FAMILIES.len()])> {
        let mut map = self.lock();
        map.retain(|_, held| {
            let values = held.series.values();
            if values != held.seen || Arc::strong_count(&held.series) > 1 {
                (held.seen, held.changed) = (values, now);
            }
            now.saturating_duration_since(held.changed) < IDLE
        });
        map.iter().map(|(labels, held)| (labels.clone(), held.seen)).collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Arc<TrafficLabels>, Held>> {
        // Counters cannot be left torn by a panic elsewhere.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Collector for Traffic {
    /// None: the families come and go with their series, so the registry has nothing constant to check them against.
    fn desc(&self) -> Vec<&Desc> {
        Vec::new()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let mut series = self.sweep(Instant::now());
        // Connections that are still on their way to somebody have counted nothing yet.
        series.retain(|(_, values)| values.iter().any(|value| *value > 0));
        series.sort_by(|(a, _), (b, _)| a.cmp(b));
        let pairs: Vec<Vec<LabelPair>> = series.iter().map(|(labels, _)| labels.pairs()).collect();
        let family = |(i, described): (usize, &(&'static str, &'static str))| {
            let values = series.iter().map(|(_, values)| values[i]);
            let metrics: Vec<Metric> = pairs.iter().zip(values).filter(|(_, v)| i < 2 || *v > 0).map(metric).collect();
            (!metrics.is_empty()).then(|| family(*described, MetricType::COUNTER, metrics))
        };
        FAMILIES.iter().enumerate().filter_map(family).collect()
    }
}

#[expect(clippy::cast_precision_loss, reason = "Prometheus values are floats; exact up to 2^53")]
fn metric((labels, value): (&Vec<LabelPair>, u64)) -> Metric {
    let mut metric = counter(value as f64);
    metric.set_label(labels.clone());
    metric
}

const DROPPED_LINES: (&str, &str) =
    ("fairway_log_lines_dropped_total", "Log lines lost to a full queue since the start (unstable)");

/// Log lines lost to a full queue, read from the logger at each scrape.
#[derive(Debug)]
struct DroppedLines(Desc);

impl DroppedLines {
    fn new() -> Self {
        let (name, help) = DROPPED_LINES;
        Self(Opts::new(name, help).describe().expect("constant names are valid"))
    }
}

impl Collector for DroppedLines {
    fn desc(&self) -> Vec<&Desc> {
        vec![&self.0]
    }

    fn collect(&self) -> Vec<MetricFamily> {
        #[expect(clippy::cast_precision_loss, reason = "Prometheus values are floats; exact up to 2^53")]
        let lost = counter(telemetry::dropped_lines() as f64);
        vec![family(DROPPED_LINES, MetricType::COUNTER, vec![lost])]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_series_leave_and_held_ones_stay() {
        let traffic = Traffic::default();
        let held = traffic.series(TrafficLabels::unknown(Direction::Outbound));
        drop(traffic.series(TrafficLabels::unknown(Direction::Inbound)));
        let start = Instant::now();
        assert_eq!(traffic.sweep(start).len(), 2);
        assert_eq!(traffic.sweep(start + IDLE * 2).len(), 1);
        assert!(Arc::ptr_eq(&held, &traffic.series(TrafficLabels::unknown(Direction::Outbound))));
    }

    #[test]
    fn strangers_cannot_fill_memory() {
        let traffic = Traffic::default();
        for i in 0..MAX_SERIES + 10 {
            let mut labels = TrafficLabels::unknown(Direction::Inbound);
            labels.source.workload = i.to_string().as_str().into();
            traffic.series(labels).opened.fetch_add(1, Relaxed);
        }
        let overflow = traffic.series(TrafficLabels::unknown(Direction::Inbound).overflow());
        assert_eq!(overflow.opened.load(Relaxed), 10);
    }

    #[test]
    fn names_are_upstreams() {
        let registry = Registry::new();
        let metrics = Metrics::new(&registry);
        ControlMetrics::new(&registry, "1.2.3").xds_terminations.with_label_values(&["Complete"]).inc();
        let series = metrics.traffic.series(TrafficLabels::unknown(Direction::Outbound));
        series.opened.fetch_add(2, Relaxed);
        series.sent.fetch_add(7, Relaxed);
        metrics.sockets(Direction::Inbound).inc();
        metrics.failed(Direction::Inbound, Reason::Denied);
        metrics.handshake(Direction::Inbound, Duration::from_millis(3), true);
        let text = registry.encode();
        let labels = r#"istio_tcp_connections_opened_total{reporter="source",source_workload="unknown",source_canonical_service="unknown","#;
        for wanted in [
            labels,
            "response_flags=\"-\",connection_security_policy=\"unknown\"} 2",
            "istio_tcp_sent_bytes_total{reporter=\"source\"",
            "istio_tcp_sockets_open{reporter=\"destination\"} 1",
            "fairway_connection_failures_total{reason=\"denied\",reporter=\"destination\"} 1",
            "fairway_tls_handshake_duration_seconds_count{reporter=\"destination\",result=\"ok\"} 1",
            "istio_build{component=\"ztunnel\",tag=\"1.2.3\"} 1",
            "istio_xds_connection_terminations_total{reason=\"Complete\"} 1",
        ] {
            assert!(text.contains(wanted), "{wanted} missing from\n{text}");
        }
        assert!(!text.contains("istio_tcp_connections_failed_total"), "families without a value are left out");
    }
}
