//! What the agent shows of itself: metrics and the list of pods.

use std::sync::Arc;

use mesh_runtime::metrics::Registry;
use prometheus::{IntCounterVec, IntGauge, Opts};
use serde::Serialize;

use crate::eligibility::DecidedBy;

/// One pod of the node, as `/debug/pods` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PodReport {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub state: PodState,
    /// Why it is outside, or what keeps it from being enrolled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Where it says whether the pod belongs to the mesh.
    pub decided_by: DecidedBy,
    pub rules: bool,
    pub announced: bool,
    /// Its DNS passes the mesh while it is captured.
    pub dns: bool,
    /// Flows that were open when the pod was enrolled and stay as they were.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub older_flows: Option<usize>,
    /// Captured flows that a leaving pod still has: its rules go when they have ended, or when the grace period is over.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub captured_flows: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PodState {
    Enrolled,
    /// Will be captured when it has a sandbox and an address.
    Awaited,
    /// Should be captured and is not (yet).
    Uncaptured,
    Leaving,
    Outside,
}

/// The list that is shown now.
pub type Reports = Arc<Vec<PodReport>>;

/// The agent's metrics; names shared with the upstream agent where it has them.
#[derive(Clone, Debug)]
pub struct Metrics {
    pub ztunnels: IntGauge,
    pub enrolled: IntGauge,
    pub uncaptured: IntGauge,
    pub requests: IntCounterVec,
    pub steps: IntCounterVec,
    pub watch_failures: IntCounterVec,
    pub installs: IntCounterVec,
    pub installed: IntGauge,
}

impl Metrics {
    pub fn new(registry: &Registry) -> Self {
        let gauge = |name, help| registry.add(IntGauge::new(name, help));
        let counter = |name, help, label| registry.add(IntCounterVec::new(Opts::new(name, help), &[label]));
        Self {
            ztunnels: gauge("ztunnel_connected", "Connected ztunnels"),
            enrolled: gauge("fairway_node_enrolled_pods", "Pods of this node that are captured"),
            uncaptured: gauge("fairway_node_uncaptured_pods", "Pods of this node that should be captured and are not"),
            requests: counter("istio_cni_plugin_requests_total", "Questions of the CNI plugin", "response_code"),
            steps: counter("nodeagent_reconcile_events_total", "Steps taken towards what should be", "type"),
            watch_failures: counter(
                "fairway_node_watch_failures_total",
                "Failures to list or watch objects of the API server",
                "watched",
            ),
            installs: counter("istio_cni_installs_total", "Installations of the CNI plugin", "result"),
            installed: gauge("istio_cni_install_ready", "Whether the CNI plugin is installed"),
        }
    }

    pub fn update(&self, reports: &[PodReport], ztunnels: usize) {
        let count = |state| reports.iter().filter(|r| r.state == state).count();
        let set = |gauge: &IntGauge, value: usize| gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        set(&self.ztunnels, ztunnels);
        set(&self.enrolled, count(PodState::Enrolled));
        set(&self.uncaptured, count(PodState::Uncaptured));
    }
}
