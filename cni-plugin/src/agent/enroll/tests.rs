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
