//! Istio's DNS metrics.

use std::time::Duration;

use hickory_proto::rr::RecordType;
use mesh_core::workload::Workload;
use mesh_runtime::metrics::Registry;
use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, Opts};

use crate::metrics::labels::UNKNOWN;

const LABELS: [&str; 4] =
    ["request_query_type", "request_protocol", "source_canonical_service", "source_canonical_revision"];

#[derive(Debug)]
pub(crate) struct DnsMetrics {
    requests: IntCounterVec,
    relayed: IntCounterVec,
    failures: IntCounterVec,
    durations: HistogramVec,
}

/// How a query came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Tcp,
    Udp,
}

/// Whose query, of what kind.
#[derive(Clone, Debug)]
pub(crate) struct Labels([String; 4]);

impl Labels {
    /// `source`: the pod's record, where it is known.
    pub(crate) fn new(kind: RecordType, transport: Transport, source: Option<&Workload>) -> Self {
        let transport = match transport {
            Transport::Tcp => "tcp",
            Transport::Udp => "udp",
        };
        let known = |value: &str| if value.is_empty() { UNKNOWN } else { value }.to_owned();
        // Types without a name share one series: clients choose the number.
        let kind: &'static str = kind.into();
        Self([
            kind.to_owned(),
            transport.to_owned(),
            known(source.map_or("", |w| &w.canonical_name)),
            known(source.map_or("", |w| &w.canonical_revision)),
        ])
    }

    fn values(&self) -> [&str; 4] {
        self.0.each_ref().map(String::as_str)
    }
}

impl DnsMetrics {
    /// # Panics
    /// When called twice for one registry.
    pub(crate) fn new(registry: &Registry) -> Self {
        let counter = |name: &str, help: &str| registry.add(IntCounterVec::new(Opts::new(name, help), &LABELS));
        let durations = HistogramOpts::new(
            "istio_dns_upstream_request_duration_seconds",
            "From relaying a DNS query to its answer (unstable)",
        );
        Self {
            requests: counter("istio_dns_requests_total", "DNS queries of applications (unstable)"),
            relayed: counter("istio_dns_upstream_requests_total", "DNS queries relayed to a nameserver (unstable)"),
            failures: counter("istio_dns_upstream_failures_total", "DNS queries relayed and not answered (unstable)"),
            durations: registry
                .add(HistogramVec::new(durations.buckets(vec![0.0005, 0.001, 0.01, 0.1, 1.0, 5.0]), &LABELS)),
        }
    }

    pub(crate) fn asked(&self, labels: &Labels) {
        self.requests.with_label_values(&labels.values()).inc();
    }

    pub(crate) fn relayed(&self, labels: &Labels) {
        self.relayed.with_label_values(&labels.values()).inc();
    }

    pub(crate) fn answered(&self, labels: &Labels, took: Duration) {
        self.durations.with_label_values(&labels.values()).observe(took.as_secs_f64());
    }

    pub(crate) fn failed(&self, labels: &Labels) {
        self.failures.with_label_values(&labels.values()).inc();
    }
}
