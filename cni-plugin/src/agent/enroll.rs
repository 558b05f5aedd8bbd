//! Enrolment as a level-triggered state machine: for each pod, what should be and what is; the next step follows from the two.
//!
//! No I/O and no clock: the driver carries the steps out and reports what became of them. A restart, a missed event or a failure
//! needs no case of its own, because every step is safe to repeat and nothing depends on how a state was reached.
//!
//! The order is the contract: a pod new to the mesh is announced to ztunnel first, so that no connection is redirected before someone
//! listens for it; where no ztunnel answers, and for a pod that was captured before, the rules come first, so that nothing passes
//! uncaptured meanwhile. With both it is captured, which is what a starting pod waits for. Only then is it written down, since peers
//! send it HBONE from then on; while that is owed (an API server that is away), they speak plaintext to it. Leaving, redirects stop
//! first and the rules that carry open flows go last.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

mod state;

pub use self::state::State;
use self::state::{Announced, Rules};

/// A pod's uid.
pub type Uid = Arc<str>;

/// What should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    Enrolled,
    /// The pod runs on, outside the mesh.
    Unenrolled,
    /// The pod has ended; its namespace is going or gone.
    Gone,
}

/// What the control plane is told about a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Redirection {
    Enabled,
    /// The rules are in place, ztunnel does not have the pod yet.
    Pending,
}

/// Something for the driver to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Find and open the namespace of the running pod.
    FindNetns,
    /// Make the rules what they should be (also: look whether they still are).
    ApplyRules,
    /// Send the pod to ztunnel and wait for its acknowledgement.
    Announce,
    /// Write down the redirection, or remove what was written.
    WriteStatus(Option<Redirection>),
    /// New connections pass uncaptured; open ones go on.
    FlushRedirects,
    /// Count the open captured flows.
    CountFlows,
    /// Remove rules and routing without trace.
    RemoveRules,
    /// Tell every ztunnel to let go of the pod.
    Withdraw,
}

/// What became of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Done,
    /// Of [`Step::CountFlows`].
    Flows(usize),
    Failed(String),
    /// The pod got another sandbox meanwhile: whatever happened says nothing about it.
    Outdated,
}

/// Delays, so that tests can choose them.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    pub first_retry: Duration,
    pub longest_retry: Duration,
    /// How often the rules of an enrolled pod are looked at.
    pub recheck: Duration,
    /// How long captured flows may go on after a pod left the mesh.
    pub grace: Duration,
    pub count_every: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            first_retry: Duration::from_millis(100),
            longest_retry: Duration::from_secs(15),
            recheck: Duration::from_secs(60),
            grace: Duration::from_secs(60),
            count_every: Duration::from_secs(1),
        }
    }
}

/// All pods the agent has to do with.
#[derive(Debug, Default)]
pub struct Machine {
    pods: BTreeMap<Uid, State>,
    pace: Pace,
}

impl Machine {
    pub fn new(pace: Pace) -> Self {
        Self { pods: BTreeMap::new(), pace }
    }

    /// What the source says now. `status` counts only for a pod that is not known yet (after a restart).
    pub fn observe(&mut self, uid: &Uid, wanted: Wanted, status: Option<Redirection>) {
        if let Some(state) = self.pods.get_mut(uid) {
            if state.wanted != wanted {
                // A new aim deserves a try at once.
                (state.wanted, state.retry_at, state.failures) = (wanted, None, 0);
                if wanted == Wanted::Enrolled && !state.has_rules() {
                    state.rules = Rules::Unknown;
                }
            }
        } else if wanted == Wanted::Enrolled || status.is_some() {
            self.pods.insert(uid.clone(), State::new(wanted, status));
        }
    }

    /// What is written down is not what we wrote: somebody else has changed it.
    pub fn status_is(&mut self, uid: &Uid, status: Option<Redirection>) {
        if let Some(state) = self.pods.get_mut(uid) {
            state.status = status;
        }
    }

    /// The runtime has told the namespace of a pod's new sandbox.
    pub fn give_netns(&mut self, uid: &Uid) {
        if let Some(state) = self.pods.get_mut(uid) {
            (state.netns, state.rules, state.announced) = (true, Rules::Unknown, state.announced.min(Announced::Maybe));
            (state.retry_at, state.failures, state.error) = (None, 0, None);
        }
    }

    /// A ztunnel has connected: pods that wait for one need not wait longer.
    pub fn ztunnel_connected(&mut self) {
        for state in self.pods.values_mut().filter(|s| s.has_rules() && !s.is_announced()) {
            state.retry_at = None;
        }
    }

    /// The steps that can start now; each pod has one at a time.
    pub fn start_due(&mut self, now: Instant) -> Vec<(Uid, Step)> {
        let mut due = Vec::new();
        for (uid, state) in &mut self.pods {
            if let Some(step) = state.next(now) {
                state.in_flight = Some(step);
                due.push((uid.clone(), step));
            }
        }
        due
    }

    /// A step has ended.
    pub fn finish(&mut self, uid: &Uid, step: Step, outcome: &Outcome, now: Instant) {
        let Some(state) = self.pods.get_mut(uid) else { return };
        state.in_flight = None;
        match outcome {
            Outcome::Outdated => {}
            // The runtime was faster than the search.
            Outcome::Failed(_) if step == Step::FindNetns && state.netns => {}
            Outcome::Failed(reason) => state.fail(step, reason.clone(), now, &self.pace),
            done => state.succeed(step, done, now, &self.pace),
        }
    }

    /// Drops the pods for which nothing is left to do, and names them.
    pub fn forget_finished(&mut self) -> Vec<Uid> {
        let finished = |state: &State| state.in_flight.is_none() && state.is_finished();
        let gone: Vec<Uid> = self.pods.iter().filter(|(_, s)| finished(s)).map(|(uid, _)| uid.clone()).collect();
        gone.iter().for_each(|uid| drop(self.pods.remove(uid)));
        gone
    }

    /// When to call [`Machine::start_due`] again if nothing happens before.
    pub fn wakes_at(&self) -> Option<Instant> {
        self.pods.values().filter_map(State::wakes_at).min()
    }

    /// Every pod that should be enrolled has its rules, or has failed once: ztunnel may be given the whole picture.
    pub fn has_tried_everything(&self) -> bool {
        self.pods.values().all(|s| s.wanted != Wanted::Enrolled || s.has_rules() || s.error.is_some())
    }

    pub fn get(&self, uid: &str) -> Option<&State> {
        self.pods.get(uid)
    }
}

#[cfg(test)]
mod tests;
