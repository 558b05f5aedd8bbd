//! When to ask the CA for which identity: priorities, renewal, back-off. No I/O and no clock; time is a [`Duration`] since the
//! manager's start, randomness a number the caller drew.

use std::{collections::HashMap, time::Duration};

use mesh_core::identity::Identity;

/// Requests in flight at once.
pub(crate) const MAX_IN_FLIGHT: usize = 8;
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
const MAX_BACKOFF: Duration = Duration::from_secs(150);
/// However long the back-off, a connection that waits gets a new attempt this long after the last one failed.
const REAL_TIME_FLOOR: Duration = Duration::from_secs(1);

/// How urgent a certificate is; the greater goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// Renewal.
    Background,
    /// A pod was enrolled.
    Warmup,
    /// A connection waits.
    RealTime,
}

/// Every identity that is wanted, and its next attempt.
#[derive(Debug, Default)]
pub(crate) struct Schedule {
    slots: HashMap<Identity, Slot>,
    in_flight: usize,
}

#[derive(Debug)]
struct Slot {
    priority: Priority,
    due: Duration,
    in_flight: bool,
    failures: u32,
    failed_at: Option<Duration>,
}

impl Schedule {
    /// Wants `identity` at least this urgently. A real-time request pulls a backed-off attempt forward, never below the floor.
    pub(crate) fn want(&mut self, identity: &Identity, priority: Priority, now: Duration) {
        let slot = self.slots.entry(identity.clone()).or_insert_with(|| Slot::new(now));
        slot.priority = slot.priority.max(priority);
        if priority == Priority::RealTime {
            let floor = slot.failed_at.map_or(now, |at| at + REAL_TIME_FLOOR);
            slot.due = slot.due.min(floor.max(now));
        }
    }

    pub(crate) fn forget(&mut self, identity: &Identity) {
        if self.slots.remove(identity).is_some_and(|slot| slot.in_flight) {
            self.in_flight -= 1;
        }
    }

    /// The most urgent identity that is due, now in flight; `None` when none is or enough are.
    pub(crate) fn start(&mut self, now: Duration) -> Option<Identity> {
        if self.in_flight >= MAX_IN_FLIGHT {
            return None;
        }
        let due = self.slots.iter_mut().filter(|(_, slot)| !slot.in_flight && slot.due <= now);
        let (identity, slot) = due.max_by_key(|(_, slot)| (slot.priority, std::cmp::Reverse(slot.due)))?;
        slot.in_flight = true;
        self.in_flight += 1;
        Some(identity.clone())
    }

    /// The attempt brought a certificate with `life` left: renew it at 50 to 80 % of that, by `random` in 0..1.
    /// Answers whether the attempt still counts.
    pub(crate) fn succeeded(&mut self, identity: &Identity, life: Duration, random: f64, now: Duration) -> bool {
        let Some(slot) = self.finish(identity) else { return false };
        slot.failures = 0;
        slot.failed_at = None;
        slot.priority = Priority::Background;
        slot.due = now + renewal(life, random);
        true
    }

    /// A certificate with `life` left came from elsewhere: to be renewed like one that was fetched.
    pub(crate) fn adopt(&mut self, identity: &Identity, life: Duration, random: f64, now: Duration) {
        self.slots.entry(identity.clone()).or_insert_with(|| Slot::new(now + renewal(life, random)));
    }

    /// The attempt failed; the next waits about 1 s, doubling to 150 s, but no later than half of what the held certificate has left.
    pub(crate) fn failed(&mut self, identity: &Identity, left: Option<Duration>, random: f64, now: Duration) -> bool {
        let Some(slot) = self.finish(identity) else { return false };
        let backoff =
            FIRST_BACKOFF.saturating_mul(1 << slot.failures.min(16)).min(MAX_BACKOFF).mul_f64(0.8 + 0.4 * random);
        slot.failures += 1;
        slot.failed_at = Some(now);
        slot.priority = Priority::Background;
        slot.due = now + left.map_or(backoff, |left| backoff.min((left / 2).max(REAL_TIME_FLOOR)));
        true
    }

    /// When [`Self::start`] next has something; `None` while nothing is planned or everything waits for answers.
    pub(crate) fn next_due(&self) -> Option<Duration> {
        if self.in_flight >= MAX_IN_FLIGHT {
            return None;
        }
        self.slots.values().filter(|slot| !slot.in_flight).map(|slot| slot.due).min()
    }

    fn finish(&mut self, identity: &Identity) -> Option<&mut Slot> {
        let slot = self.slots.get_mut(identity).filter(|slot| slot.in_flight)?;
        slot.in_flight = false;
        self.in_flight -= 1;
        Some(slot)
    }
}

fn renewal(life: Duration, random: f64) -> Duration {
    life.mul_f64(0.5 + 0.3 * random)
}

impl Slot {
    fn new(due: Duration) -> Self {
        Self { priority: Priority::Background, due, in_flight: false, failures: 0, failed_at: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn identity(name: &str) -> Identity {
        Identity::new("cluster.local", "demo", name)
    }

    #[test]
    fn a_waiting_connection_goes_before_a_new_pod_before_a_renewal() {
        let mut schedule = Schedule::default();
        schedule.want(&identity("renewal"), Priority::Background, at(0));
        schedule.want(&identity("pod"), Priority::Warmup, at(1));
        schedule.want(&identity("connection"), Priority::RealTime, at(2));
        let order: Vec<_> = std::iter::from_fn(|| schedule.start(at(3))).collect();
        assert_eq!(order, [identity("connection"), identity("pod"), identity("renewal")]);
    }

    #[test]
    fn at_most_eight_are_in_flight() {
        let mut schedule = Schedule::default();
        (0..20).for_each(|i| schedule.want(&identity(&i.to_string()), Priority::Warmup, at(0)));
        let started: Vec<_> = std::iter::from_fn(|| schedule.start(at(0))).collect();
        assert_eq!(started.len(), MAX_IN_FLIGHT);
        assert_eq!(schedule.next_due(), None);
        assert!(schedule.succeeded(&started[0], at(10), 0.0, at(1)));
        assert!(schedule.start(at(1)).is_some());
        assert!(schedule.start(at(1)).is_none());
    }

    #[test]
    fn renewal_falls_between_half_and_four_fifths_of_life() {
        for (random, due) in [(0.0, 5.0), (1.0, 8.0)] {
            let mut schedule = Schedule::default();
            schedule.want(&identity("a"), Priority::Warmup, at(0));
            schedule.start(at(0)).unwrap();
            schedule.succeeded(&identity("a"), at(10), random, at(0));
            assert_eq!(schedule.next_due(), Some(Duration::from_secs_f64(due)));
        }
    }

    #[test]
    fn back_off_doubles_and_a_waiting_connection_shortens_it_to_a_second() {
        let mut schedule = Schedule::default();
        schedule.want(&identity("a"), Priority::Warmup, at(0));
        let mut now = at(0);
        for wait in [1, 2, 4, 8, 16, 32, 64, 128, 150, 150] {
            schedule.start(now).unwrap();
            schedule.failed(&identity("a"), None, 0.5, now);
            assert_eq!(schedule.next_due(), Some(now + at(wait)));
            now += at(wait);
        }
        schedule.start(now).unwrap();
        schedule.failed(&identity("a"), None, 0.5, now);
        schedule.want(&identity("a"), Priority::RealTime, now);
        assert_eq!(schedule.next_due(), Some(now + REAL_TIME_FLOOR));
        schedule.want(&identity("a"), Priority::RealTime, now + at(5));
        assert_eq!(schedule.next_due(), Some(now + REAL_TIME_FLOOR));
    }

    #[test]
    fn a_failed_renewal_is_tried_again_before_the_certificate_expires() {
        let mut schedule = Schedule::default();
        schedule.want(&identity("a"), Priority::Warmup, at(0));
        for _ in 0..10 {
            let due = schedule.next_due().unwrap();
            schedule.start(due).unwrap();
            schedule.failed(&identity("a"), Some(at(20)), 0.5, at(0));
        }
        assert_eq!(schedule.next_due(), Some(at(10)));
    }

    #[test]
    fn an_answer_for_a_forgotten_identity_does_not_count() {
        let mut schedule = Schedule::default();
        schedule.want(&identity("a"), Priority::Warmup, at(0));
        schedule.start(at(0)).unwrap();
        schedule.forget(&identity("a"));
        assert!(!schedule.succeeded(&identity("a"), at(10), 0.0, at(1)));
        assert_eq!((schedule.in_flight, schedule.next_due()), (0, None));
    }
}
