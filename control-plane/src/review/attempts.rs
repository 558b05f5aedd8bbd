//! How often an address may have tokens of a pod reviewed. Nobody proves that he is the pod he names, so the address counts too: what
//! comes from elsewhere takes nothing away from the pod itself. No clock: time is passed in.

use std::{collections::HashMap, net::IpAddr, sync::Arc, time::Duration};

use tokio::time::Instant;

/// Attempts in a while that may be in vain. A pod has one token, or two while it is being replaced, and a refusal is kept for longer than
/// a caller waits before he comes again.
pub(super) const MOST: usize = 8;
const WHILE: Duration = Duration::from_secs(60);
const MAX_KEPT: usize = 8192;

/// An address, and the uid of the pod it claims to be.
pub(super) type Claimant = (IpAddr, Arc<str>);

#[derive(Debug, Default)]
pub(super) struct Attempts {
    kept: HashMap<Claimant, Vain>,
}

#[derive(Debug)]
struct Vain {
    count: usize,
    until: Instant,
}

impl Attempts {
    /// Whether there may be another; it counts as in vain until it is said to be otherwise.
    pub(super) fn begin(&mut self, claimant: Claimant, now: Instant) -> bool {
        if let Some(vain) = self.kept.get_mut(&claimant).filter(|vain| now < vain.until) {
            vain.count += 1;
            return vain.count <= MOST;
        }
        if self.kept.len() >= MAX_KEPT {
            self.kept.retain(|_, vain| now < vain.until);
        }
        if self.kept.len() >= MAX_KEPT {
            let first = self.kept.iter().min_by_key(|(_, vain)| vain.until).map(|(claimant, _)| claimant.clone());
            first.map(|first| self.kept.remove(&first));
        }
        self.kept.insert(claimant, Vain { count: 1, until: now + WHILE });
        true
    }

    pub(super) fn believed(&mut self, claimant: &Claimant) {
        self.kept.remove(claimant);
    }

    /// Nobody said anything: it does not count.
    pub(super) fn unanswered(&mut self, claimant: &Claimant) {
        if let Some(vain) = self.kept.get_mut(claimant) {
            vain.count = vain.count.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claimant(last: u8, uid: &str) -> Claimant {
        ([10, 0, 0, last].into(), uid.into())
    }

    #[test]
    fn attempts_in_vain_are_few_in_a_while_and_those_of_others_are_their_own() {
        let (mut attempts, start) = (Attempts::default(), Instant::now());
        for _ in 0..MOST {
            assert!(attempts.begin(claimant(1, "a"), start));
        }
        assert!(!attempts.begin(claimant(1, "a"), start + WHILE / 2));
        for other in [claimant(2, "a"), claimant(1, "b")] {
            assert!(attempts.begin(other, start));
        }
        assert!(attempts.begin(claimant(1, "a"), start + WHILE));
    }

    #[test]
    fn what_was_believed_or_not_answered_was_not_in_vain() {
        let (mut attempts, now) = (Attempts::default(), Instant::now());
        for _ in 0..3 * MOST {
            assert!(attempts.begin(claimant(1, "a"), now));
            attempts.unanswered(&claimant(1, "a"));
        }
        for _ in 0..MOST {
            assert!(attempts.begin(claimant(1, "a"), now));
        }
        attempts.believed(&claimant(1, "a"));
        assert!(attempts.begin(claimant(1, "a"), now));
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let (mut attempts, start) = (Attempts::default(), Instant::now());
        for n in 0..MAX_KEPT + 5 {
            assert!(attempts.begin(claimant(1, &n.to_string()), start));
        }
        assert_eq!(attempts.kept.len(), MAX_KEPT);
    }
}
