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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rules {
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
enum Announced {
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
    netns: bool,
    rules: Rules,
    announced: Announced,
    status: Option<Redirection>,
    in_flight: Option<Step>,
    failures: u32,
    /// The announcement failed and nobody has been told that the pod is pending.
    owes_pending: bool,
    retry_at: Option<Instant>,
    /// Why the last step failed; cleared by the next that succeeds.
    pub error: Option<String>,
}

impl State {
    fn new(wanted: Wanted, status: Option<Redirection>) -> Self {
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
    fn is_finished(&self) -> bool {
        let rules_matter = self.wanted == Wanted::Unenrolled;
        self.wanted != Wanted::Enrolled
            && self.announced == Announced::No
            && self.status.is_none()
            && (!rules_matter || self.rules == Rules::Clean)
    }

    fn next(&self, now: Instant) -> Option<Step> {
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
    fn wakes_at(&self) -> Option<Instant> {
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

    fn succeed(&mut self, step: Step, outcome: &Outcome, now: Instant, pace: &Pace) {
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

    fn fail(&mut self, step: Step, reason: String, now: Instant, pace: &Pace) {
        self.owes_pending = step == Step::Announce && self.status.is_none();
        self.failures = self.failures.saturating_add(1);
        let doubled = pace.first_retry.saturating_mul(1 << (self.failures - 1).min(16));
        self.retry_at = Some(now + doubled.min(pace.longest_retry));
        self.error = Some(reason);
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
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Event {
        Observe(usize, Wanted),
        Sandbox(usize),
        Connect,
        /// Ends the n-th step under way; it may fail.
        End(usize, bool),
        Pass(u64),
    }

    fn event() -> impl Strategy<Value = Event> {
        let wanted = prop_oneof![Just(Wanted::Enrolled), Just(Wanted::Unenrolled), Just(Wanted::Gone)];
        prop_oneof![
            2 => (0usize..3, wanted).prop_map(|(i, w)| Event::Observe(i, w)),
            1 => (0usize..3).prop_map(Event::Sandbox),
            1 => Just(Event::Connect),
            6 => (0usize..3, any::<bool>()).prop_map(|(i, ok)| Event::End(i, ok)),
            1 => (1u64..120_000).prop_map(Event::Pass),
        ]
    }

    /// The world as the steps change it; checks what must hold at every step.
    #[derive(Default)]
    struct World {
        running: Vec<(Uid, Step)>,
        rules: BTreeMap<Uid, bool>,
        redirects: BTreeMap<Uid, bool>,
        announced: BTreeMap<Uid, bool>,
        status: BTreeMap<Uid, Option<Redirection>>,
    }

    impl World {
        fn start(&mut self, machine: &mut Machine, now: Instant) {
            machine.forget_finished();
            for (uid, step) in machine.start_due(now) {
                assert!(!self.running.iter().any(|(u, _)| *u == uid), "two steps at once for {uid}");
                match step {
                    Step::Announce => {
                        let captured = self.status.get(&uid).copied().flatten().is_some();
                        assert!(!captured || self.rules[&uid], "a captured pod announced without rules");
                    }
                    Step::WriteStatus(Some(Redirection::Enabled)) => {
                        assert!(self.announced[&uid] && self.rules[&uid], "enabled too early");
                    }
                    Step::RemoveRules => assert!(!self.redirects[&uid], "removed while redirecting"),
                    _ => {}
                }
                self.running.push((uid, step));
            }
        }

        fn end(&mut self, index: usize, ok: bool, machine: &mut Machine, now: Instant) {
            if self.running.is_empty() {
                return;
            }
            let (uid, step) = self.running.remove(index % self.running.len());
            let outcome = match (ok, step) {
                (false, _) => Outcome::Failed("no".into()),
                (true, Step::CountFlows) => Outcome::Flows(0),
                (true, _) => Outcome::Done,
            };
            if ok {
                match step {
                    Step::ApplyRules => {
                        self.rules.insert(uid.clone(), true);
                        self.redirects.insert(uid.clone(), true);
                    }
                    Step::Announce => {
                        self.announced.insert(uid.clone(), true);
                    }
                    Step::Withdraw => {
                        self.announced.insert(uid.clone(), false);
                    }
                    Step::WriteStatus(status) => {
                        self.status.insert(uid.clone(), status);
                    }
                    Step::FlushRedirects => {
                        self.redirects.insert(uid.clone(), false);
                    }
                    Step::RemoveRules => {
                        self.rules.insert(uid.clone(), false);
                    }
                    Step::FindNetns | Step::CountFlows => {}
                }
            }
            machine.finish(&uid, step, &outcome, now);
            machine.forget_finished();
        }
    }

    fn uid(index: usize) -> Uid {
        ["a", "b", "c"][index].into()
    }

    proptest! {
        #[test]
        fn whatever_happens_the_order_holds_and_quiet_brings_convergence(
            events in prop::collection::vec(event(), 0..120),
            last in prop::collection::vec(any::<u8>(), 3),
        ) {
            let mut now = Instant::now();
            let (mut machine, mut world) = (Machine::new(Pace::default()), World::default());
            for event in events {
                match event {
                    Event::Observe(i, wanted) => machine.observe(&uid(i), wanted, None),
                    Event::Sandbox(i) => {
                        // A new sandbox has no rules; steps in the old one are over.
                        if !world.running.iter().any(|(u, _)| *u == uid(i)) {
                            machine.give_netns(&uid(i));
                            world.rules.insert(uid(i), false);
                        }
                    }
                    Event::Connect => machine.ztunnel_connected(),
                    Event::End(i, ok) => world.end(i, ok, &mut machine, now),
                    Event::Pass(ms) => now += Duration::from_millis(ms),
                }
                world.start(&mut machine, now);
            }
            let aims = last.iter().map(|b| [Wanted::Enrolled, Wanted::Unenrolled, Wanted::Gone][usize::from(b % 3)]);
            let aims: Vec<Wanted> = aims.collect();
            for (i, aim) in aims.iter().enumerate() {
                machine.observe(&uid(i), *aim, None);
            }
            for _ in 0..200 {
                world.start(&mut machine, now);
                while !world.running.is_empty() {
                    world.end(0, true, &mut machine, now);
                    world.start(&mut machine, now);
                }
                now += Duration::from_secs(20);
            }
            for (i, aim) in aims.iter().enumerate() {
                let state = machine.get(&uid(i));
                match aim {
                    Wanted::Enrolled => prop_assert!(state.is_some_and(State::is_enrolled), "{state:?}"),
                    _ => {
                        prop_assert!(state.is_none(), "{state:?}");
                        prop_assert!(!world.announced.get(&uid(i)).copied().unwrap_or(false));
                        prop_assert_eq!(world.status.get(&uid(i)).copied().flatten(), None);
                    }
                }
            }
        }
    }

    fn run(machine: &mut Machine, now: Instant, outcome: &Outcome) -> Vec<Step> {
        let due = machine.start_due(now);
        due.iter().for_each(|(uid, step)| machine.finish(uid, *step, outcome, now));
        due.into_iter().map(|(_, step)| step).collect()
    }

    #[test]
    fn without_a_ztunnel_a_pod_is_pending_and_a_connection_ends_the_wait() {
        let (now, mut machine, pod) = (Instant::now(), Machine::new(Pace::default()), uid(0));
        machine.observe(&pod, Wanted::Enrolled, None);
        machine.give_netns(&pod);
        assert_eq!(run(&mut machine, now, &Outcome::Failed("no ztunnel".into())), [Step::Announce]);
        assert!(machine.has_tried_everything());
        assert_eq!(run(&mut machine, now, &Outcome::Done), [Step::WriteStatus(Some(Redirection::Pending))]);
        let now = machine.wakes_at().expect("a retry is planned");
        assert_eq!(run(&mut machine, now, &Outcome::Done), [Step::ApplyRules]);
        machine.ztunnel_connected();
        assert_eq!(run(&mut machine, now, &Outcome::Done), [Step::Announce]);
        assert_eq!(run(&mut machine, now, &Outcome::Done), [Step::WriteStatus(Some(Redirection::Enabled))]);
        assert_eq!(run(&mut machine, now, &Outcome::Done), []);
        assert!(machine.get(&pod).is_some_and(State::is_enrolled));
    }

    #[test]
    fn a_pod_new_to_the_mesh_is_listened_for_before_its_connections_are_redirected() {
        let (now, mut machine, pod) = (Instant::now(), Machine::new(Pace::default()), uid(0));
        machine.observe(&pod, Wanted::Enrolled, None);
        machine.give_netns(&pod);
        for step in [Step::Announce, Step::ApplyRules, Step::WriteStatus(Some(Redirection::Enabled))] {
            assert_eq!(run(&mut machine, now, &Outcome::Done), [step]);
        }
    }

    #[test]
    fn a_status_that_cannot_be_written_is_not_tried_in_a_loop() {
        let (now, mut machine, pod) = (Instant::now(), Machine::new(Pace::default()), uid(0));
        machine.observe(&pod, Wanted::Enrolled, None);
        machine.give_netns(&pod);
        for step in [Step::Announce, Step::WriteStatus(Some(Redirection::Pending))] {
            assert_eq!(run(&mut machine, now, &Outcome::Failed("no".into())), [step]);
        }
        assert_eq!(run(&mut machine, now, &Outcome::Done), []);
        assert!(machine.wakes_at().is_some_and(|at| at > now));
    }

    #[test]
    fn a_captured_pod_whose_status_is_owed_is_captured_and_stays_so() {
        let (mut now, mut machine, pod) = (Instant::now(), Machine::new(Pace::default()), uid(0));
        machine.observe(&pod, Wanted::Enrolled, None);
        machine.give_netns(&pod);
        for step in [Step::Announce, Step::ApplyRules] {
            assert_eq!(run(&mut machine, now, &Outcome::Done), [step]);
        }
        let enabled = Step::WriteStatus(Some(Redirection::Enabled));
        for _ in 0..3 {
            assert_eq!(run(&mut machine, now, &Outcome::Failed("the API server is away".into())), [enabled]);
            assert!(machine.get(&pod).is_some_and(|s| s.is_captured() && !s.is_enrolled()));
            now = machine.wakes_at().expect("a retry is planned");
        }
        assert_eq!(run(&mut machine, now, &Outcome::Done), [enabled]);
        assert!(machine.get(&pod).is_some_and(State::is_enrolled));
    }

    #[test]
    fn a_status_that_somebody_removed_is_written_again() {
        let (now, mut machine, pod) = (Instant::now(), Machine::new(Pace::default()), uid(0));
        machine.observe(&pod, Wanted::Enrolled, None);
        machine.give_netns(&pod);
        for _ in 0..3 {
            run(&mut machine, now, &Outcome::Done);
        }
        machine.status_is(&pod, Some(Redirection::Enabled));
        assert_eq!(run(&mut machine, now, &Outcome::Done), []);
        machine.status_is(&pod, None);
        assert_eq!(run(&mut machine, now, &Outcome::Done), [Step::WriteStatus(Some(Redirection::Enabled))]);
        assert!(machine.get(&pod).is_some_and(State::is_enrolled));
    }

    #[test]
    fn retries_back_off_up_to_their_cap() {
        let (mut now, mut machine, pod) = (Instant::now(), Machine::new(Pace::default()), uid(0));
        machine.observe(&pod, Wanted::Enrolled, None);
        let mut waits = Vec::new();
        for _ in 0..12 {
            assert_eq!(run(&mut machine, now, &Outcome::Failed("absent".into())), [Step::FindNetns]);
            let next = machine.wakes_at().expect("a retry is planned");
            waits.push(next - now);
            now = next;
        }
        assert!(waits.windows(2).all(|w| w[0] <= w[1]));
        assert_eq!((waits[0], waits[11]), (Pace::default().first_retry, Pace::default().longest_retry));
    }

    #[test]
    fn leaving_waits_for_captured_flows_or_the_grace_period() {
        for flows in [0, 3] {
            let (mut now, mut machine, pod) = (Instant::now(), Machine::new(Pace::default()), uid(0));
            machine.observe(&pod, Wanted::Unenrolled, Some(Redirection::Enabled));
            for step in [Step::FindNetns, Step::FlushRedirects, Step::WriteStatus(None)] {
                assert_eq!(run(&mut machine, now, &Outcome::Done), [step]);
            }
            assert_eq!(run(&mut machine, now, &Outcome::Flows(flows)), []);
            now += Pace::default().count_every;
            assert_eq!(run(&mut machine, now, &Outcome::Flows(flows)), [Step::CountFlows]);
            if flows > 0 {
                assert_eq!(machine.get(&pod).and_then(State::captured_flows), Some(flows));
                assert_eq!(run(&mut machine, now, &Outcome::Flows(flows)), []);
                now += Pace::default().grace;
            }
            for step in [Step::RemoveRules, Step::Withdraw] {
                assert_eq!(run(&mut machine, now, &Outcome::Done), [step]);
            }
            assert_eq!(machine.forget_finished(), [pod]);
        }
    }

    #[test]
    fn coming_back_while_leaving_restores_the_rules() {
        let (now, mut machine, pod) = (Instant::now(), Machine::new(Pace::default()), uid(0));
        machine.observe(&pod, Wanted::Unenrolled, Some(Redirection::Enabled));
        for _ in 0..2 {
            run(&mut machine, now, &Outcome::Done);
        }
        machine.observe(&pod, Wanted::Enrolled, None);
        assert_eq!(run(&mut machine, now, &Outcome::Done), [Step::ApplyRules]);
    }
}
