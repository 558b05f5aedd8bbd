//! Which tunnel takes the next stream. No I/O and no clock: time is a [`Duration`] since the pool's start.

use std::{collections::HashMap, hash::Hash, time::Duration};

/// How long a failed dial answers for the next ones.
pub(crate) const FAILURE_MEMORY: Duration = Duration::from_secs(1);

/// Tunnels of one key that may exist because others are busy; more would only share the same wire.
const MAX_BUSY: usize = 4;
/// Tunnels of one key for elephants alone.
const MAX_ELEPHANTS: usize = 4;
/// After which an unused tunnel is closed when an older one of its key is there.
const SURPLUS_IDLE: Duration = Duration::from_secs(10);
/// How long a kind of destination is remembered to have elephants.
const ELEPHANT_MEMORY: Duration = Duration::from_secs(600);
/// Kinds remembered for one key.
const MAX_KINDS: usize = 16;

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
    /// Kinds of destination that had elephants, and until when that counts.
    kinds: Vec<(u64, Duration)>,
}

#[derive(Debug)]
struct Slot {
    id: TunnelId,
    streams: usize,
    limit: usize,
    closing: bool,
    used: bool,
    idle_since: Duration,
    /// More waits in it than newcomers should wait for.
    busy: bool,
    /// Carries a flow, or is meant for one, that leaves no room for others.
    exclusive: bool,
}

impl Slot {
    fn has_room(&self) -> bool {
        !self.closing && self.streams < self.limit
    }
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

    /// `kind` is that of the flow's destination.
    pub(crate) fn checkout(&mut self, key: &K, kind: u64, now: Duration) -> Checkout<E> {
        let entry = self.keys.entry(key.clone()).or_insert_with(Entry::new);
        let elephant = entry.expects_elephant(kind, now);
        if let Some(slot) = entry.best(elephant) {
            slot.streams += 1;
            slot.used = true;
            slot.exclusive |= elephant;
            return Checkout::Use(slot.id);
        }
        if entry.dialing {
            return Checkout::Wait;
        }
        let failed = entry.failure.as_ref().filter(|(at, _)| now < *at + FAILURE_MEMORY);
        if let Some((_, error)) = failed {
            let error = error.clone();
            // Better a tunnel with company than none.
            return match entry.any() {
                Some(slot) => {
                    slot.streams += 1;
                    slot.used = true;
                    Checkout::Use(slot.id)
                }
                None => Checkout::Failed(error),
            };
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
            busy: false,
            exclusive: false,
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

    /// The peer's current limit of concurrent streams, and whether much waits in the tunnel.
    pub(crate) fn set_limit(&mut self, key: &K, id: TunnelId, limit: usize, busy: bool) {
        let max = self.max_streams;
        if let Some(slot) = self.slot(key, id) {
            slot.limit = limit.min(max);
            slot.busy = busy;
        }
    }

    /// A flow of this tunnel turned out to be an elephant: nobody else joins it, and the next flow to its kind of destination starts
    /// with a tunnel to itself.
    pub(crate) fn elephant(&mut self, key: &K, id: TunnelId, kind: u64, now: Duration) {
        if let Some(slot) = self.slot(key, id) {
            slot.exclusive = true;
        }
        if let Some(entry) = self.keys.get_mut(key) {
            entry.kinds.retain(|(known, until)| *known != kind && *until > now);
            if entry.kinds.len() == MAX_KINDS {
                entry.kinds.remove(0);
            }
            entry.kinds.push((kind, now + ELEPHANT_MEMORY));
        }
    }

    /// A reserved stream is over.
    pub(crate) fn release(&mut self, key: &K, id: TunnelId, now: Duration) {
        if let Some(slot) = self.slot(key, id) {
            slot.streams = slot.streams.saturating_sub(1);
            slot.idle_since = now;
            slot.exclusive &= slot.streams > 0;
        }
    }

    /// No new streams on this tunnel: GOAWAY, or it misbehaved.
    pub(crate) fn close(&mut self, key: &K, id: TunnelId) {
        if let Some(slot) = self.slot(key, id) {
            slot.closing = true;
        }
    }

    /// The tunnel takes no more streams, though it is still there; see [`Self::ended`].
    pub(crate) fn lost(&mut self, key: &K, id: TunnelId, error: E, now: Duration) {
        if self.slot(key, id).is_some_and(|slot| !slot.closing) {
            self.ended(key, id, error, now);
            self.close(key, id);
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

    /// Removes the tunnel if it is unused (closing) or has been for `idle`, or for less when it is one more than needed; otherwise
    /// answers when to look again.
    pub(crate) fn expire(&mut self, key: &K, id: TunnelId, idle: Duration, now: Duration) -> Option<Duration> {
        let tunnels = &self.keys.get(key)?.tunnels;
        let surplus = tunnels.iter().any(|other| other.id < id && other.has_room());
        let idle = if surplus { idle.min(SURPLUS_IDLE) } else { idle };
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
        Self { tunnels: Vec::new(), dialing: false, failure: None, kinds: Vec::new() }
    }

    fn expects_elephant(&self, kind: u64, now: Duration) -> bool {
        self.kinds.iter().any(|(known, until)| *known == kind && now < *until)
    }

    /// The tunnel for the next flow; none when it should have a new one.
    fn best(&mut self, elephant: bool) -> Option<&mut Slot> {
        if elephant {
            let alone = self.tunnels.iter().position(|slot| slot.has_room() && slot.streams == 0);
            let elephants = self.tunnels.iter().filter(|slot| slot.exclusive && !slot.closing).count();
            return match alone {
                Some(index) => self.tunnels.get_mut(index),
                None if elephants < MAX_ELEPHANTS => None,
                None => self.any(),
            };
        }
        // The fullest that has room: the others get the chance to become idle.
        let open = |slot: &Slot| slot.has_room() && !slot.exclusive;
        let quiet = self.tunnels.iter().enumerate().filter(|(_, slot)| open(slot) && !slot.busy);
        let fullest = quiet.max_by_key(|(_, slot)| (slot.streams, std::cmp::Reverse(slot.id))).map(|(index, _)| index);
        if fullest.is_some() {
            return fullest.and_then(|index| self.tunnels.get_mut(index));
        }
        let shared = self.tunnels.iter().filter(|slot| open(slot)).count();
        if shared >= MAX_BUSY {
            self.tunnels.iter_mut().filter(|slot| open(slot)).min_by_key(|slot| slot.streams)
        } else {
            None
        }
    }

    /// Any that takes another stream; the emptiest.
    fn any(&mut self) -> Option<&mut Slot> {
        self.tunnels.iter_mut().filter(|slot| slot.has_room()).min_by_key(|slot| slot.streams)
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
        assert_eq!(pool.checkout(&"k", 0, at(0)), Checkout::Dial);
        let id = pool.dialed(&"k", at(0)).unwrap();
        (pool, id)
    }

    #[test]
    fn one_dials_and_the_others_wait() {
        let mut pool = Pool::new(100);
        assert_eq!(pool.checkout(&"k", 0, at(0)), Checkout::Dial);
        assert_eq!(pool.checkout(&"k", 0, at(0)), Checkout::Wait);
        assert_eq!(pool.checkout(&"other", 0, at(0)), Checkout::Dial);
        let id = pool.dialed(&"k", at(1)).unwrap();
        assert_eq!(pool.checkout(&"k", 0, at(1)), Checkout::Use(id));
    }

    #[test]
    fn a_failure_answers_for_a_second() {
        let mut pool = Pool::new(100);
        assert_eq!(pool.checkout(&"k", 0, at(0)), Checkout::Dial);
        pool.dial_failed(&"k", "refused", at(5));
        assert_eq!(pool.checkout(&"k", 0, at(5)), Checkout::Failed("refused"));
        assert_eq!(pool.checkout(&"k", 0, at(6)), Checkout::Dial);
    }

    #[test]
    fn a_full_tunnel_is_joined_by_another_and_reused_when_streams_end() {
        let (mut pool, first) = with_tunnel(2);
        assert_eq!(pool.checkout(&"k", 0, at(0)), Checkout::Use(first));
        assert_eq!(pool.checkout(&"k", 0, at(0)), Checkout::Use(first));
        assert_eq!(pool.checkout(&"k", 0, at(0)), Checkout::Dial);
        let second = pool.dialed(&"k", at(0)).unwrap();
        assert_eq!(pool.checkout(&"k", 0, at(0)), Checkout::Use(second));
        pool.release(&"k", first, at(1));
        assert_eq!(pool.checkout(&"k", 0, at(1)), Checkout::Use(first));
    }

    #[test]
    fn the_peers_limit_counts_when_it_is_lower() {
        let (mut pool, id) = with_tunnel(100);
        pool.set_limit(&"k", id, 1, false);
        assert_eq!(pool.checkout(&"k", 0, at(0)), Checkout::Use(id));
        assert_eq!(pool.checkout(&"k", 0, at(0)), Checkout::Dial);
    }

    #[test]
    fn a_closing_tunnel_is_not_reused_and_goes_with_its_last_stream() {
        let (mut pool, id) = with_tunnel(100);
        assert_eq!(pool.checkout(&"k", 0, at(0)), Checkout::Use(id));
        pool.close(&"k", id);
        assert_eq!(pool.checkout(&"k", 0, at(0)), Checkout::Dial);
        assert!(pool.expire(&"k", id, at(300), at(1)).is_some());
        pool.release(&"k", id, at(2));
        assert_eq!(pool.expire(&"k", id, at(300), at(2)), None);
    }

    #[test]
    fn an_unused_tunnel_and_its_entry_go_after_the_idle_time() {
        let (mut pool, id) = with_tunnel(100);
        assert_eq!(pool.checkout(&"k", 0, at(0)), Checkout::Use(id));
        assert_eq!(pool.expire(&"k", id, at(300), at(1000)), Some(at(1300)));
        pool.release(&"k", id, at(1100));
        assert_eq!(pool.expire(&"k", id, at(300), at(1300)), Some(at(1400)));
        assert_eq!(pool.expire(&"k", id, at(300), at(1400)), None);
        assert!(pool.is_empty());
    }

    #[test]
    fn a_tunnel_lost_before_its_first_stream_is_a_failed_dial() {
        let (mut pool, id) = with_tunnel(100);
        pool.lost(&"k", id, "going away", at(5));
        assert_eq!(pool.checkout(&"k", 0, at(5)), Checkout::Failed("going away"));
        pool.lost(&"k", id, "going away", at(6));
        assert_eq!(pool.checkout(&"k", 0, at(6)), Checkout::Dial, "it is remembered once");
    }

    #[test]
    fn of_several_unused_tunnels_the_oldest_stays() {
        let (mut pool, first) = with_tunnel(1);
        assert_eq!(pool.checkout(&"k", 0, at(0)), Checkout::Use(first));
        assert_eq!(pool.checkout(&"k", 0, at(0)), Checkout::Dial);
        let second = pool.dialed(&"k", at(0)).unwrap();
        pool.release(&"k", first, at(1));
        assert_eq!(pool.expire(&"k", second, at(300), at(10)), None);
        assert_eq!(pool.expire(&"k", first, at(300), at(10)), Some(at(301)));
    }

    #[test]
    fn a_dial_for_a_retired_key_is_not_kept() {
        let mut pool = Pool::new(100);
        assert_eq!(pool.checkout(&"k", 0, at(0)), Checkout::Dial);
        pool.remove_where(|key| *key == "k");
        assert_eq!(pool.dialed(&"k", at(1)), None);
    }

    #[test]
    fn a_busy_tunnel_is_joined_by_another_up_to_a_limit() {
        let (mut pool, first) = with_tunnel(100);
        let mut ids = vec![first];
        for _ in 1..MAX_BUSY {
            ids.iter().for_each(|id| pool.set_limit(&"k", *id, 100, true));
            assert_eq!(pool.checkout(&"k", 0, at(0)), Checkout::Dial);
            ids.push(pool.dialed(&"k", at(0)).unwrap());
        }
        ids.iter().for_each(|id| pool.set_limit(&"k", *id, 100, true));
        assert!(matches!(pool.checkout(&"k", 0, at(0)), Checkout::Use(_)));
    }

    #[test]
    fn a_busy_tunnel_is_shared_when_another_cannot_be_had() {
        let (mut pool, id) = with_tunnel(100);
        pool.set_limit(&"k", id, 100, true);
        assert_eq!(pool.checkout(&"k", 0, at(0)), Checkout::Dial);
        pool.dial_failed(&"k", "refused", at(0));
        assert_eq!(pool.checkout(&"k", 0, at(0)), Checkout::Use(id));
    }

    #[test]
    fn nobody_joins_an_elephant_and_its_kind_gets_tunnels_of_its_own() {
        let (mut pool, first) = with_tunnel(100);
        assert_eq!(pool.checkout(&"k", 7, at(0)), Checkout::Use(first));
        pool.elephant(&"k", first, 7, at(1));
        // A mouse goes elsewhere.
        assert_eq!(pool.checkout(&"k", 1, at(2)), Checkout::Dial);
        let second = pool.dialed(&"k", at(2)).unwrap();
        assert_eq!(pool.checkout(&"k", 1, at(2)), Checkout::Use(second));
        // The next of the elephant's kind shares with neither.
        assert_eq!(pool.checkout(&"k", 7, at(3)), Checkout::Dial);
        let third = pool.dialed(&"k", at(3)).unwrap();
        assert_eq!(pool.checkout(&"k", 7, at(3)), Checkout::Use(third));
        assert_eq!(pool.checkout(&"k", 1, at(3)), Checkout::Use(second));
        // When it is over its tunnel is anybody's, and after a while the kind is forgotten.
        pool.release(&"k", first, at(4));
        pool.set_limit(&"k", second, 0, false);
        assert_eq!(pool.checkout(&"k", 1, at(4)), Checkout::Use(first));
        pool.set_limit(&"k", second, 100, false);
        assert!(matches!(pool.checkout(&"k", 7, at(1000)), Checkout::Use(id) if id != third));
    }
}
