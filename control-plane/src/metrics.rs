//! What the control plane counts, under the names dashboards know.

use std::time::SystemTime;

use mesh_identity::authority::SigningAuthority;
use mesh_runtime::metrics::Registry;
use mesh_xds::server::Event;
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, exponential_buckets,
};
use proto::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL};

/// Handles to every family; cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Metrics {
    pub(crate) csr_count: IntCounter,
    pub(crate) authentication_failures: IntCounter,
    pub(crate) authentications_deferred: IntCounter,
    pub(crate) token_reviews: IntCounterVec,
    pub(crate) csr_parsing_errors: IntCounter,
    pub(crate) csr_sign_errors: IntCounter,
    pub(crate) issued: IntCounter,
    pub(crate) refusals: IntCounterVec,
    root_expiry: Gauge,
    chain_expiry: Gauge,
    pub(crate) ca_rejected: IntCounter,
    pub(crate) leader: IntGauge,
    pub(crate) writes: IntCounterVec,
    pub(crate) admission_reviews: IntCounterVec,
    pub(crate) problems: IntGauge,
    pub(crate) services: IntGauge,
    pub(crate) workloads: IntGauge,
    pub(crate) policies: IntGauge,
    watch_failures: IntCounterVec,
    watch_failing_since: GaugeVec,
    pub(crate) event_to_publish: Histogram,
    clients: IntGauge,
    pushes: IntCounterVec,
    initial: IntCounterVec,
    rejects: IntCounterVec,
}

impl Metrics {
    pub(crate) fn register(registry: &Registry) -> Self {
        let counter = |name, help| registry.add(IntCounter::new(name, help));
        let gauge = |name, help| registry.add(IntGauge::new(name, help));
        let by = |name, help, label| registry.add(IntCounterVec::new(Opts::new(name, help), &[label]));
        Self {
            csr_count: counter("citadel_server_csr_count", "Certificate requests received"),
            authentication_failures: counter(
                "citadel_server_authentication_failure_count",
                "Calls whose credentials were not believed",
            ),
            authentications_deferred: counter(
                "fairwayd_authentications_deferred_total",
                "Calls that were told to come again, since who calls could not be told yet",
            ),
            token_reviews: by(
                "fairwayd_token_reviews_total",
                "Tokens the API server was asked about: believed, refused or unanswered",
                "outcome",
            ),
            csr_parsing_errors: counter("citadel_server_csr_parsing_err_count", "Unreadable certificate requests"),
            csr_sign_errors: counter(
                "citadel_server_csr_sign_err_count",
                "Certificate requests that could not be signed",
            ),
            issued: counter("citadel_server_success_cert_issuance_count", "Certificates issued"),
            refusals: by("fairwayd_ca_refusals_total", "Identities refused to a caller, by reason", "reason"),
            root_expiry: registry.add(Gauge::new(
                "citadel_server_root_cert_expiry_timestamp",
                "Unix time at which the first root certificate expires",
            )),
            chain_expiry: registry.add(Gauge::new(
                "citadel_server_cert_chain_expiry_timestamp",
                "Unix time at which the CA's own certificate expires",
            )),
            ca_rejected: counter(
                "fairwayd_ca_material_rejected_total",
                "Times the CA could not be used as it was kept, and the last good one stayed in force",
            ),
            writes: registry.add(IntCounterVec::new(
                Opts::new("fairwayd_writes_total", "Objects the leader wrote, by what they are and what came of it"),
                &["what", "outcome"],
            )),
            admission_reviews: by(
                "fairwayd_admission_reviews_total",
                "Objects the API server asked about: allowed, warned (allowed with warnings), denied, passed (not ours to judge), or \
                 unanswered: malformed, oversized, timed_out, displaced, failed",
                "result",
            ),
            leader: gauge("fairway_leader", "Whether this replica writes what only one may write"),
            problems: gauge("fairwayd_manifest_problems", "Problems found in the manifests as they are now"),
            services: gauge("pilot_services", "Services known"),
            workloads: gauge("fairwayd_workloads", "Workloads known"),
            policies: gauge("fairwayd_policies", "Layer-4 policies in force"),
            watch_failures: by("fairwayd_watch_failures_total", "Failures of watches on the API server", "kind"),
            watch_failing_since: registry.add(GaugeVec::new(
                Opts::new(
                    "fairwayd_watch_failing_since_timestamp_seconds",
                    "Unix time since which a watch fails, and its objects may be old; 0 while it works",
                ),
                &["kind"],
            )),
            event_to_publish: registry.add(Histogram::with_opts(
                HistogramOpts::new(
                    "fairwayd_event_to_publish_seconds",
                    "From the arrival of an event of the API server to its publication for discovery clients",
                )
                .buckets(exponential_buckets(0.001, 2.0, 14).unwrap_or_default()),
            )),
            clients: gauge("pilot_xds", "Discovery clients connected"),
            pushes: by("pilot_xds_pushes", "Discovery responses sent, by resource type", "type"),
            initial: by(
                "fairwayd_xds_initial_resources_total",
                "Resources considered for first answers on discovery streams: sent, or unchanged since the client's last stream",
                "outcome",
            ),
            rejects: by(
                "pilot_total_xds_rejects",
                "Discovery responses that clients rejected, by resource type",
                "type",
            ),
        }
    }

    /// Counts a watch's failure, and since when it fails; whether that is news.
    pub(crate) fn watch_failed(&self, kind: &str) -> bool {
        self.watch_failures.with_label_values(&[kind]).inc();
        let since = self.watch_failing_since.with_label_values(&[kind]);
        let is_news = since.get() == 0.0;
        if is_news {
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            since.set(now.as_secs_f64());
        }
        is_news
    }

    #[cfg(test)]
    pub(crate) fn watch_is_failing(&self, kind: &str) -> bool {
        self.watch_failing_since.with_label_values(&[kind]).get() != 0.0
    }

    pub(crate) fn watch_recovered(&self, kind: &str) {
        self.watch_failing_since.with_label_values(&[kind]).set(0.0);
    }

    /// Shows when the authority in force ends.
    pub(crate) fn show_authority(&self, authority: &SigningAuthority) {
        let seconds = |at: SystemTime| at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        self.root_expiry.set(authority.roots_not_after().map_or(0.0, seconds));
        self.chain_expiry.set(seconds(authority.not_after()));
    }

    /// Counts and logs what happens on discovery streams.
    pub(crate) fn observe(&self, event: &Event<'_>) {
        match event {
            Event::Opened { caller, node_id } => {
                self.clients.inc();
                tracing::info!(node = %caller.node, node_id, "discovery client connected");
            }
            Event::Closed { caller } => {
                self.clients.dec();
                tracing::info!(node = %caller.node, "discovery client gone");
            }
            Event::Sent { caller, type_url, resources, removals, initial, unchanged } => {
                self.pushes.with_label_values(&[short(type_url)]).inc();
                if *initial {
                    self.initial.with_label_values(&["sent"]).inc_by(*resources as u64);
                    self.initial.with_label_values(&["unchanged"]).inc_by(*unchanged as u64);
                }
                tracing::debug!(node = %caller.node, r#type = short(type_url), resources, removals, initial, unchanged, "pushed");
            }
            Event::Nacked { caller, type_url, message } => {
                self.rejects.with_label_values(&[short(type_url)]).inc();
                tracing::warn!(node = %caller.node, r#type = short(type_url), message, "a client rejected resources");
            }
        }
    }
}

/// Bounded, whatever a client asks for.
fn short(type_url: &str) -> &'static str {
    match type_url {
        ADDRESS_TYPE_URL => "wds",
        AUTHORIZATION_TYPE_URL => "wads",
        _ => "other",
    }
}
