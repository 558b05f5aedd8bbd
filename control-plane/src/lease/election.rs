//! Observe, acquire, renew, hold, lose: an election over one record, as a function of what was seen and when.
//!
//! Clocks of others are not believed: a record has expired when *we* have seen it unchanged for as long as it claims to last.

use std::time::Duration;

use tokio::time::Instant;

/// How long a record lasts without being renewed.
pub(super) const LASTS: Duration = Duration::from_secs(15);
/// A holder writes no more when it has not renewed for so long: earlier than anybody else may take over.
const HOLDS: Duration = Duration::from_secs(10);
/// Between two renewals, and two looks at another's.
const PERIOD: Duration = Duration::from_secs(3);

/// The record, as the API server has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Record {
    /// Empty when it was let go.
    pub(super) holder: String,
    /// Of every change of it.
    pub(super) version: String,
    pub(super) lasts: Duration,
    /// How often it changed hands.
    pub(super) transitions: i32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Write ourselves into the record as it was seen last.
    Acquire,
    Renew,
    Wait(Duration),
}

#[derive(Debug)]
pub(super) struct Election {
    identity: String,
    /// What was seen last, and since when it has been like that.
    seen: Option<(Record, Instant)>,
    /// When the last renewal that succeeded was begun.
    renewed: Option<Instant>,
}

impl Election {
    pub(super) fn new(identity: String) -> Self {
        Self { identity, seen: None, renewed: None }
    }

    pub(super) fn identity(&self) -> &str {
        &self.identity
    }

    /// Takes in the record as it is; `None` if there is none.
    pub(super) fn observe(&mut self, record: Option<Record>, now: Instant) {
        match (record, &self.seen) {
            (Some(record), Some((seen, _))) if record.version == seen.version => {}
            (Some(record), _) => {
                if record.holder != self.identity {
                    self.renewed = None;
                }
                self.seen = Some((record, now));
            }
            (None, _) => (self.seen, self.renewed) = (None, None),
        }
    }

    pub(super) fn next(&self, now: Instant) -> Next {
        let Some((record, since)) = &self.seen else { return Next::Acquire };
        if record.holder == self.identity {
            // Of our own name, but not written by this process: that of a predecessor.
            let Some(renewed) = self.renewed else { return Next::Acquire };
            return match (renewed + PERIOD).saturating_duration_since(now) {
                Duration::ZERO => Next::Renew,
                left => Next::Wait(left),
            };
        }
        if record.holder.is_empty() {
            return Next::Acquire;
        }
        match (*since + record.lasts).saturating_duration_since(now) {
            Duration::ZERO => Next::Acquire,
            left => Next::Wait(left.min(PERIOD)),
        }
    }

    /// The record that was written became this; `begun` is when the request was sent.
    pub(super) fn written(&mut self, record: Record, begun: Instant) {
        self.seen = Some((record, begun));
        self.renewed = Some(begun);
    }

    /// How often the record has changed hands once it is ours.
    pub(super) fn transitions(&self) -> i32 {
        match &self.seen {
            Some((record, _)) if record.holder == self.identity => record.transitions,
            Some((record, _)) => record.transitions.saturating_add(1),
            None => 0,
        }
    }

    pub(super) fn leads(&self, now: Instant) -> bool {
        self.ends().is_some_and(|ends| now < ends)
    }

    /// When we lead no more unless we renew.
    pub(super) fn ends(&self) -> Option<Instant> {
        self.renewed.map(|renewed| renewed + HOLDS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(holder: &str, version: u64) -> Record {
        Record { holder: holder.to_owned(), version: version.to_string(), lasts: LASTS, transitions: 3 }
    }

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_free_record_is_taken_at_once_and_anothers_once_it_was_unchanged_for_its_time() {
        let start = Instant::now();
        for free in [None, Some(record("", 1)), Some(record("me", 1))] {
            let mut election = Election::new("me".to_owned());
            election.observe(free.clone(), start);
            assert_eq!(election.next(start), Next::Acquire, "{free:?}");
            assert!(!election.leads(start), "not before it is written");
        }
        let mut election = Election::new("me".to_owned());
        election.observe(Some(record("other", 1)), start);
        assert_eq!(election.next(start), Next::Wait(PERIOD));
        // Renewed meanwhile, by whatever clock: the time begins anew.
        election.observe(Some(record("other", 2)), start + seconds(14));
        election.observe(Some(record("other", 2)), start + seconds(20));
        assert_eq!(election.next(start + seconds(28)), Next::Wait(seconds(1)));
        assert_eq!(election.next(start + seconds(29)), Next::Acquire);
        assert_eq!(election.transitions(), 4);
    }

    #[test]
    fn who_holds_renews_in_time_or_stops_before_another_may_take_over() {
        let start = Instant::now();
        let mut election = Election::new("me".to_owned());
        election.written(record("me", 1), start);
        assert_eq!(election.next(start), Next::Wait(PERIOD));
        assert_eq!(election.next(start + PERIOD), Next::Renew);
        assert_eq!(election.transitions(), 3);
        assert!(election.leads(start + HOLDS - seconds(1)) && !election.leads(start + HOLDS));
        election.written(record("me", 2), start + PERIOD);
        assert!(election.leads(start + HOLDS));
        assert!(HOLDS < LASTS);
    }

    #[test]
    fn who_sees_another_in_the_record_has_lost() {
        let start = Instant::now();
        for seen in [Some(record("other", 2)), None] {
            let mut election = Election::new("me".to_owned());
            election.written(record("me", 1), start);
            election.observe(Some(record("me", 1)), start + seconds(1));
            assert!(election.leads(start + seconds(1)));
            election.observe(seen, start + seconds(2));
            assert!(!election.leads(start + seconds(2)));
        }
    }
}
