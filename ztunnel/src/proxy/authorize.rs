//! Whether an inbound connection may be, now and for as long as it lives.

use mesh_core::{identity::Identity, workload::Workload};

use crate::{
    connections::{Cut, Facts, InboundConnection, Live},
    error::ProxyError,
    pods::PodContext,
};

/// An allowed connection: in the live table until dropped, and told through `cut` when policy changes its mind.
pub(crate) struct Admission {
    _live: Live,
    pub(crate) cut: Cut,
}

/// Registers the connection and decides, in this order, so that no policy change is missed in between.
pub(crate) fn admit(
    pod: &PodContext,
    local: &Workload,
    shown: InboundConnection,
    source_identity: Option<Identity>,
) -> Result<Admission, ProxyError> {
    let facts = Facts { source_ip: shown.src.ip(), source_identity, destination: shown.actual_dst };
    let (live, cut) = pod.connections.inbound(shown, facts.clone());
    let index = pod.shared.state.snapshot();
    // The record may have been replaced while the connection waited for something.
    let current = index.workload(&local.uid).map_or(local, |workload| workload);
    let decision = facts.ask(&index.policies_for(current));
    log(pod, &facts, &decision);
    if decision.is_allowed() { Ok(Admission { _live: live, cut }) } else { Err(ProxyError::Denied(Box::new(decision))) }
}

fn log(pod: &PodContext, facts: &Facts, decision: &mesh_core::authorize::Decision) {
    for policy in &decision.dry_run {
        tracing::info!(%policy, source = %facts.source_ip, destination = %facts.destination, "would be denied (dry run)");
    }
    if pod.shared.config.log_decisions {
        tracing::info!(verdict = ?decision.verdict, why = decision.explanation, destination = %facts.destination, "policy");
    } else {
        tracing::debug!(verdict = ?decision.verdict, why = decision.explanation, destination = %facts.destination, "policy");
    }
}
