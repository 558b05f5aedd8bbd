//! Which tunnel takes the next stream. No I/O and no clock: time is a [`Duration`] since the pool's start.

use std::{collections::HashMap, hash::Hash, time::Duration};

/// How long a failed dial answers for the next ones.
pub(crate) const FAILURE_MEMORY: Duration = Duration::from_secs(1);

pub(crate) type TunnelId = u64;

/// Per key: its tunnels, a dial in progress, a recent failure. `K` is as many as there are flows' distinct keys; entries go when
/// empty.
#[derive(Debug)]
pub(crate) struct State<K, E> {
    keys: HashMap<K, Entry<E>>,
    max_streams: usize,
    next_id: TunnelId,
}

#[derive(Debug)]
struct Entry<E> {
    tunnels: Vec<Slot>,
    dialing: bool,
    failure: Option<(Duration, E)>,
}

#[derive(Debug)]
struct Slot {
    id: TunnelId,
    streams: usize,
    limit: usize,
    closing: bool,
    used: bool,
    idle_since: Duration,
}

/// What a flow that wants a stream has to do.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Checkout<E> {
    /// A stream on this tunnel is reserved.
    Use(TunnelId),
    /// Dial; everyone else waits for it.
    Dial,
    /// Wait for the dial in progress, then ask again.
    Wait,
    Failed(E),
}

impl<K: Eq + Hash + Clone, E: Clone> State<K, E> {
    /// No tunnel carries more than `max_streams`.
    pub(crate) fn new(max_streams: usize) -> Self {
        Self { keys: HashMap::new(), max_streams: max_streams.max(1), next_id: 0 }
    }

    pub(crate) fn checkout(&mut self, key: &K, now: Duration) -> Checkout<E> {
        let entry = self.keys.entry(key.clone()).or_insert_with(Entry::new);
        // The fullest that has room: the others get the chance to become idle.
        let usable = entry.tunnels.iter_mut().filter(|slot| !slot.closing && slot.streams < slot.limit);
        if let Some(slot) = usable.max_by_key(|slot| (slot.streams, std::cmp::Reverse(slot.id))) {
            slot.streams += 1;
            slot.used = true;
            return Checkout::Use(slot.id);
        }
        if entry.dialing {
            return Checkout::Wait;
        }
        if let Some((at, error)) = &entry.failure
            && now < *at + FAILURE_MEMORY
        {
            return Checkout::Failed(error.clone());
        }
        entry.dialing = true;
        entry.failure = None;
        Checkout::Dial
    }

    /// The dial succeeded; the tunnel takes streams from now on. `None` when the key was retired meanwhile.
    pub(crate) fn dialed(&mut self, key: &K, now: Duration) -> Option<TunnelId> {
        let entry = self.keys.get_mut(key).filter(|entry| entry.dialing)?;
        entry.dialing = false;
        self.next_id += 1;
        let slot = Slot {
            id: self.next_id,
            streams: 0,
            limit: self.max_streams,
            closing: false,
            used: false,
            idle_since: now,
        };
        entry.tunnels.push(slot);
        Some(self.next_id)
    }

    pub(crate) fn dial_failed(&mut self, key: &K, error: E, now: Duration) {
        if let Some(entry) = self.keys.get_mut(key) {
            entry.dialing = false;
            entry.failure = Some((now, error));
        }
        self.sweep(now);
    }

    /// Every tunnel of `key`.
    pub(crate) fn ids(&self, key: &K) -> Vec<TunnelId> {
        self.keys.get(key).map(|entry| entry.tunnels.iter().map(|slot| slot.id).collect()).unwrap_or_default()
    }

    /// The peer's current limit of concurrent streams.
    pub(crate) fn set_limit(&mut self, key: &K, id: TunnelId, limit: usize) {
        let max = self.max_streams;
        if let Some(slot) = self.slot(key, id) {
            slot.limit = limit.min(max);
        }
    }

    /// A reserved stream is over.
    pub(crate) fn release(&mut self, key: &K, id: TunnelId, now: Duration) {
        if let Some(slot) = self.slot(key, id) {
            slot.streams = slot.streams.saturating_sub(1);
            slot.idle_since = now;
        }
    }

    /// No new streams on this tunnel: GOAWAY, or it misbehaved.
    pub(crate) fn close(&mut self, key: &K, id: TunnelId) {
        if let Some(slot) = self.slot(key, id) {
            slot.closing = true;
        }
    }

    /// The peer ended the tunnel. If that was before its first stream, the dial was as good as failed: a peer that accepts and
    /// leaves at once must not be dialled in a loop.
    pub(crate) fn ended(&mut self, key: &K, id: TunnelId, error: E, now: Duration) {
        if self.slot(key, id).is_some_and(|slot| !slot.used)
            && let Some(entry) = self.keys.get_mut(key)
        {
            entry.failure = Some((now, error));
        }
    }

    /// The tunnel is gone.
    pub(crate) fn remove(&mut self, key: &K, id: TunnelId, now: Duration) {
        if let Some(entry) = self.keys.get_mut(key) {
            entry.tunnels.retain(|slot| slot.id != id);
        }
        self.sweep(now);
    }

    /// Removes the tunnel if it is unused (closing) or has been for `idle`; otherwise answers when to look again.
    pub(crate) fn expire(&mut self, key: &K, id: TunnelId, idle: Duration, now: Duration) -> Option<Duration> {
        let slot = self.slot(key, id)?;
        let due = slot.idle_since + idle;
        let unused = slot.streams == 0 && (slot.closing || due <= now);
        if unused {
            self.remove(key, id, now);
            return None;
        }
        Some(if slot.streams > 0 { now + idle } else { due })
    }

    pub(crate) fn remove_where(&mut self, mut gone: impl FnMut(&K) -> bool) {
        self.keys.retain(|key, _| !gone(key));
    }

    pub(crate) fn is_closing(&self, key: &K, id: TunnelId) -> bool {
        self.keys.get(key).is_none_or(|entry| entry.tunnels.iter().all(|slot| slot.id != id || slot.closing))
    }

    #[cfg(test)]
    fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    fn slot(&mut self, key: &K, id: TunnelId) -> Option<&mut Slot> {
        self.keys.get_mut(key)?.tunnels.iter_mut().find(|slot| slot.id == id)
    }

    /// Drops entries that say nothing any more.
    fn sweep(&mut self, now: Duration) {
        self.keys.retain(|_, entry| {
            let remembers = entry.failure.as_ref().is_some_and(|(at, _)| now < *at + FAILURE_MEMORY);
            entry.dialing || remembers || !entry.tunnels.is_empty()
        });
    }
}

impl<E> Entry<E> {
    fn new() -> Self {
        Self { tunnels: Vec::new(), dialing: false, failure: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    type Pool = State<&'static str, &'static str>;

    fn with_tunnel(max: usize) -> (Pool, TunnelId) {
        let mut pool = Pool::new(max);
        assert_eq!(pool.checkout(&"k", at(0)), Checkout::Dial);
        let id = pool.dialed(&"k", at(0)).unwrap();
        (pool, id)
    }

    #[test]
    fn one_dials_and_the_others_wait() {
        let mut pool = Pool::new(100);
        assert_eq!(pool.checkout(&"k", at(0)), Checkout::Dial);
        assert_eq!(pool.checkout(&"k", at(0)), Checkout::Wait);
        assert_eq!(pool.checkout(&"other", at(0)), Checkout::Dial);
        let id = pool.dialed(&"k", at(1)).unwrap();
        assert_eq!(pool.checkout(&"k", at(1)), Checkout::Use(id));
    }

    #[test]
    fn a_failure_answers_for_a_second() {
        let mut pool = Pool::new(100);
        assert_eq!(pool.checkout(&"k", at(0)), Checkout::Dial);
        pool.dial_failed(&"k", "refused", at(5));
        assert_eq!(pool.checkout(&"k", at(5)), Checkout::Failed("refused"));
        assert_eq!(pool.checkout(&"k", at(6)), Checkout::Dial);
    }

    #[test]
    fn a_full_tunnel_is_joined_by_another_and_reused_when_streams_end() {
        let (mut pool, first) = with_tunnel(2);
        assert_eq!(pool.checkout(&"k", at(0)), Checkout::Use(first));
        assert_eq!(pool.checkout(&"k", at(0)), Checkout::Use(first));
        assert_eq!(pool.checkout(&"k", at(0)), Checkout::Dial);
        let second = pool.dialed(&"k", at(0)).unwrap();
        assert_eq!(pool.checkout(&"k", at(0)), Checkout::Use(second));
        pool.release(&"k", first, at(1));
        assert_eq!(pool.checkout(&"k", at(1)), Checkout::Use(first));
    }

    #[test]
    fn the_peers_limit_counts_when_it_is_lower() {
        let (mut pool, id) = with_tunnel(100);
        pool.set_limit(&"k", id, 1);
        assert_eq!(pool.checkout(&"k", at(0)), Checkout::Use(id));
        assert_eq!(pool.checkout(&"k", at(0)), Checkout::Dial);
    }

    #[test]
    fn a_closing_tunnel_is_not_reused_and_goes_with_its_last_stream() {
        let (mut pool, id) = with_tunnel(100);
        assert_eq!(pool.checkout(&"k", at(0)), Checkout::Use(id));
        pool.close(&"k", id);
        assert_eq!(pool.checkout(&"k", at(0)), Checkout::Dial);
        assert!(pool.expire(&"k", id, at(300), at(1)).is_some());
        pool.release(&"k", id, at(2));
        assert_eq!(pool.expire(&"k", id, at(300), at(2)), None);
    }

    #[test]
    fn an_unused_tunnel_and_its_entry_go_after_the_idle_time() {
        let (mut pool, id) = with_tunnel(100);
        assert_eq!(pool.checkout(&"k", at(0)), Checkout::Use(id));
        assert_eq!(pool.expire(&"k", id, at(300), at(1000)), Some(at(1300)));
        pool.release(&"k", id, at(1100));
        assert_eq!(pool.expire(&"k", id, at(300), at(1300)), Some(at(1400)));
        assert_eq!(pool.expire(&"k", id, at(300), at(1400)), None);
        assert!(pool.is_empty());
    }

    #[test]
    fn a_dial_for_a_retired_key_is_not_kept() {
        let mut pool = Pool::new(100);
        assert_eq!(pool.checkout(&"k", at(0)), Checkout::Dial);
        pool.remove_where(|key| *key == "k");
        assert_eq!(pool.dialed(&"k", at(1)), None);
    }
}
