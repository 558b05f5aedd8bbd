//! One pod in the machine: the next step follows from what should be and what is.

use std::time::Instant;

use super::{Outcome, Pace, Redirection, Step, Wanted};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rules {
    /// Not looked at yet in this process or this namespace.
    Unknown,
    Applied {
        recheck_at: Instant,
    },
    Flushed {
        until: Instant,
        count_at: Instant,
        /// Captured flows at the last count.
        open: usize,
    },
    Clean,
}

/// What ztunnels know of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Announced {
    No,
    /// A snapshot may have told them, an answer may have been lost, or they have a former sandbox: to be withdrawn, but not enough
    /// to call the pod enrolled.
    Maybe,
    Yes,
}

/// One pod: what should be, what is, and what is under way.
#[derive(Clone, Debug)]
pub struct State {
    pub wanted: Wanted,
    pub(super) netns: bool,
    pub(super) rules: Rules,
    pub(super) announced: Announced,
    pub(super) status: Option<Redirection>,
    pub(super) in_flight: Option<Step>,
    pub(super) failures: u32,
    /// The announcement failed and nobody has been told that the pod is pending.
    owes_pending: bool,
    pub(super) retry_at: Option<Instant>,
    /// Why the last step failed; cleared by the next that succeeds.
    pub error: Option<String>,
}

impl State {
    pub(super) fn new(wanted: Wanted, status: Option<Redirection>) -> Self {
        Self {
            wanted,
            netns: false,
            rules: Rules::Unknown,
            // An earlier process may have announced what it wrote down.
            announced: if status.is_some() { Announced::Maybe } else { Announced::No },
            status,
            in_flight: None,
            failures: 0,
            owes_pending: false,
            retry_at: None,
            error: None,
        }
    }

    /// Captured, and written down as such.
    pub fn is_enrolled(&self) -> bool {
        self.is_captured() && self.status == Some(Redirection::Enabled)
    }

    /// Nothing of the pod passes uncaptured, and ztunnel serves it.
    pub fn is_captured(&self) -> bool {
        self.has_rules() && self.is_announced()
    }

    pub fn has_rules(&self) -> bool {
        matches!(self.rules, Rules::Applied { .. })
    }

    /// Captured flows at the last count, of a pod that leaves.
    pub fn captured_flows(&self) -> Option<usize> {
        match self.rules {
            Rules::Flushed { open, .. } => Some(open),
            _ => None,
        }
    }

    pub fn is_announced(&self) -> bool {
        self.announced == Announced::Yes
    }

    pub fn status(&self) -> Option<Redirection> {
        self.status
    }

    /// Nothing of ours remains and nothing should be.
    pub(super) fn is_finished(&self) -> bool {
        let rules_matter = self.wanted == Wanted::Unenrolled;
        self.wanted != Wanted::Enrolled
            && self.announced == Announced::No
            && self.status.is_none()
            && (!rules_matter || self.rules == Rules::Clean)
    }

    pub(super) fn next(&self, now: Instant) -> Option<Step> {
        if self.in_flight.is_some() {
            return None;
        }
        if self.owes_pending && self.wanted == Wanted::Enrolled {
            return Some(Step::WriteStatus(Some(Redirection::Pending)));
        }
        if self.retry_at.is_some_and(|at| at > now) {
            return None;
        }
        match self.wanted {
            Wanted::Enrolled => self.towards_enrolled(now),
            Wanted::Unenrolled => self.towards_unenrolled(now),
            Wanted::Gone if self.announced != Announced::No => Some(Step::Withdraw),
            Wanted::Gone => self.status.map(|_| Step::WriteStatus(None)),
        }
    }

    fn towards_enrolled(&self, now: Instant) -> Option<Step> {
        if !self.netns {
            return Some(Step::FindNetns);
        }
        if self.is_new() {
            return Some(Step::Announce);
        }
        match self.rules {
            Rules::Applied { recheck_at } if recheck_at > now => {}
            _ => return Some(Step::ApplyRules),
        }
        if !self.is_announced() {
            return Some(Step::Announce);
        }
        (self.status != Some(Redirection::Enabled)).then_some(Step::WriteStatus(Some(Redirection::Enabled)))
    }

    /// Never captured, as far as anybody knows, and nothing has gone wrong yet.
    fn is_new(&self) -> bool {
        self.rules == Rules::Unknown && self.announced == Announced::No && self.status.is_none() && self.error.is_none()
    }

    fn towards_unenrolled(&self, now: Instant) -> Option<Step> {
        if !self.netns && self.rules != Rules::Clean {
            return Some(Step::FindNetns);
        }
        match self.rules {
            Rules::Unknown | Rules::Applied { .. } => return Some(Step::FlushRedirects),
            // Peers must stop sending HBONE before the last tunnels close, so the status goes early.
            _ if self.status.is_some() => return Some(Step::WriteStatus(None)),
            Rules::Flushed { until, .. } if until <= now => return Some(Step::RemoveRules),
            Rules::Flushed { count_at, .. } => return (count_at <= now).then_some(Step::CountFlows),
            Rules::Clean => {}
        }
        (self.announced != Announced::No).then_some(Step::Withdraw)
    }

    /// When [`State::next`] may answer differently although nothing happens.
    pub(super) fn wakes_at(&self) -> Option<Instant> {
        if self.in_flight.is_some() {
            return None;
        }
        let by_rules = match self.rules {
            Rules::Applied { recheck_at } if self.wanted == Wanted::Enrolled => Some(recheck_at),
            Rules::Flushed { until, count_at, .. } => Some(until.min(count_at)),
            _ => None,
        };
        // What failed is due at its retry, whatever else is due later.
        self.retry_at.or(by_rules)
    }

    pub(super) fn succeed(&mut self, step: Step, outcome: &Outcome, now: Instant, pace: &Pace) {
        if step == Step::WriteStatus(Some(Redirection::Pending)) {
            // Says that something failed, not that it succeeded.
            (self.status, self.owes_pending) = (Some(Redirection::Pending), false);
            return;
        }
        (self.failures, self.retry_at, self.error) = (0, None, None);
        match step {
            Step::FindNetns => self.netns = true,
            Step::ApplyRules => {
                self.rules = Rules::Applied { recheck_at: now + pace.recheck };
                // From now on the pod is part of every snapshot.
                self.announced = self.announced.max(Announced::Maybe);
            }
            Step::Announce => self.announced = Announced::Yes,
            Step::WriteStatus(status) => self.status = status,
            // Not counted at once: peers have to hear of it before the tunnel's port may close.
            Step::FlushRedirects => {
                self.rules = Rules::Flushed { until: now + pace.grace, count_at: now + pace.count_every, open: 0 };
            }
            Step::CountFlows => self.counted(outcome, now, pace),
            Step::RemoveRules => self.rules = Rules::Clean,
            Step::Withdraw => self.announced = Announced::No,
        }
    }

    fn counted(&mut self, outcome: &Outcome, now: Instant, pace: &Pace) {
        if let (Rules::Flushed { until, count_at, open }, Outcome::Flows(flows)) = (&mut self.rules, outcome) {
            (*count_at, *open) = (now + pace.count_every, *flows);
            if *flows == 0 {
                *until = now;
            }
        }
    }

    pub(super) fn fail(&mut self, step: Step, reason: String, now: Instant, pace: &Pace) {
        self.owes_pending = step == Step::Announce && self.status.is_none();
        self.failures = self.failures.saturating_add(1);
        let doubled = pace.first_retry.saturating_mul(1 << (self.failures - 1).min(16));
        self.retry_at = Some(now + doubled.min(pace.longest_retry));
        self.error = Some(reason);
    }
}
