//! The node's probes of pods: whose may pass, and whether they do.

use std::net::IpAddr;

use super::Driver;
use crate::{
    agent::{
        enroll::{Uid, Wanted},
        probes::{self, Probes},
    },
    eligibility::Pod,
};

impl Driver {
    /// Of every pod that should be captured, sooner than it is: the node's probes pass a pod without rules as well.
    pub(super) fn want_probes(&mut self) {
        let Some(probes) = &self.probes else { return };
        let mut wanted = probes::Wanted { complete: true, ..probes::Wanted::default() };
        for (uid, pod) in &self.pods {
            if self.machine.get(uid).is_some_and(|state| state.wanted == Wanted::Enrolled) {
                let addresses = self.addresses_of(uid, pod);
                wanted.complete &= !addresses.is_empty();
                wanted.addresses.extend(addresses);
            }
        }
        probes.wanted.send_if_modified(|now| {
            let differs = *now != wanted;
            *now = wanted;
            differs
        });
    }

    fn addresses_of<'a>(&'a self, uid: &Uid, pod: &'a Pod) -> &'a [IpAddr] {
        let told = || self.addresses.get(uid).map(Vec::as_slice).unwrap_or_default();
        if pod.ips.is_empty() { told() } else { &pod.ips }
    }

    pub(super) fn are_probes_marked(&self, uid: &Uid) -> bool {
        let (Some(probes), Some(pod)) = (&self.probes, self.pods.get(uid)) else { return true };
        probes.marked.borrow().is_settled(self.addresses_of(uid, pod))
    }
}

/// Completes when more probes are marked. Cancel safe.
pub(super) async fn marked(probes: &mut Option<Probes>) {
    if let Some(probes) = probes
        && probes.marked.changed().await.is_ok()
    {
        return;
    }
    std::future::pending().await
}
