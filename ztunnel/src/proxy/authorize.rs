//! Whether an inbound connection may be, now and for as long as it lives.

use std::sync::Arc;

use mesh_core::{authorize::Decision, workload::Workload};

use crate::{
    connections::{Entry, Live},
    error::ProxyError,
    flow::Flow,
    pods::PodContext,
};

/// Registers the connection and decides, in this order, so that no policy change is missed in between. An allowed connection is in the
/// live table until dropped, and told when policy changes its mind.
pub(crate) fn admit(pod: &PodContext, local: &Workload, entry: &Arc<Entry>) -> Result<Live, ProxyError> {
    let live = pod.connections.add(entry.clone());
    let index = pod.shared.state.snapshot();
    // The record may have been replaced while the connection waited for something.
    let current = index.workload(&local.uid).map_or(local, |workload| workload);
    let decision = entry.ask(&index.policies_for(current));
    log(pod, &entry.flow, &decision);
    if decision.is_allowed() { Ok(live) } else { Err(ProxyError::Denied(Box::new(decision))) }
}

fn log(pod: &PodContext, Flow { peer, target, .. }: &Flow, decision: &Decision) {
    let source = peer.ip();
    for policy in &decision.dry_run {
        tracing::info!(%policy, %source, destination = %target, "would be denied (dry run)");
    }
    if pod.shared.config.log_decisions {
        tracing::info!(verdict = ?decision.verdict, why = decision.explanation, destination = %target, "policy");
    } else {
        tracing::debug!(verdict = ?decision.verdict, why = decision.explanation, destination = %target, "policy");
    }
}
