//! Every resource, encoded once as it is sent, and what changed when.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use proto::AUTHORIZATION_TYPE_URL;
use rpds::HashTrieMapSync;
use tokio::sync::watch;

use super::{
    Change, Lane,
    outgoing::{Entry, Pieces, WeakPieces},
    version_of,
};
use crate::convert::Encoded;

/// Changes remembered for incremental pushes; a client further behind is compared name by name.
const LOG: usize = 65_536;
/// A whole type that is still being sent to somebody serves those who come meanwhile, unless more has changed since.
const WHOLE_SERVES: u64 = 4096;

pub(super) type Resources = HashTrieMapSync<Arc<str>, Stored>;

#[derive(Clone, Debug)]
pub(super) struct Stored {
    pub(super) version: Arc<str>,
    pub(super) aliases: Arc<[Arc<str>]>,
    pub(super) member_of: Arc<[Arc<str>]>,
    /// As it stands in a response; ends with the body.
    pub(super) entry: Bytes,
    body: usize,
}

impl Stored {
    fn new(encoded: &Encoded) -> Self {
        let Encoded { type_url, name, aliases, member_of, body } = encoded;
        let version = version_of(body);
        let entry = Entry { type_url, name, version: &version, aliases, body }.encode();
        let (aliases, member_of) = (aliases.as_slice().into(), member_of.as_slice().into());
        Self { version, aliases, member_of, entry, body: body.len() }
    }

    fn body(&self) -> &[u8] {
        &self.entry[self.entry.len() - self.body..]
    }
}

#[derive(Clone, Debug)]
struct Logged {
    sequence: u64,
    name: Arc<str>,
    lane: Lane,
}

/// All resources of a type, encoded.
#[derive(Clone, Debug)]
pub(super) struct Whole<P = Pieces> {
    /// As of when.
    pub(super) sequence: u64,
    /// The last change of policies until then.
    policies: u64,
    pub(super) resources: usize,
    pub(super) pieces: P,
}

/// What changed between two sequence numbers, encoded.
#[derive(Clone, Debug)]
pub(super) struct Difference<P = Pieces> {
    since: u64,
    pub(super) until: u64,
    urgent_only: bool,
    pub(super) resources: usize,
    pub(super) removals: usize,
    pub(super) upserted: P,
    pub(super) removed: P,
}

#[derive(Debug, Default)]
pub(super) struct TypeCache {
    pub(super) resources: Resources,
    by_alias: HashMap<Arc<str>, BTreeSet<Arc<str>>>,
    /// Endpoints by the service's key.
    pub(super) members: HashMap<Arc<str>, BTreeSet<Arc<str>>>,
    log: VecDeque<Logged>,
    /// Changes up to here are no longer in the log.
    trimmed: u64,
    /// Of the last change.
    changed: u64,
    whole: Option<Whole<WeakPieces>>,
    /// The last one made: clients that keep up all need the same.
    difference: Option<Difference<WeakPieces>>,
}

#[derive(Debug, Default)]
pub(super) struct Inner {
    pub(super) types: HashMap<&'static str, TypeCache>,
    pub(super) sequence: u64,
}

/// Every resource there is, encoded. Share it by `Arc`.
#[derive(Debug)]
pub struct Cache {
    inner: Mutex<Inner>,
    changed: watch::Sender<u64>,
    ready: watch::Sender<bool>,
}

impl Default for Cache {
    fn default() -> Self {
        Self { inner: Mutex::default(), changed: watch::Sender::new(0), ready: watch::Sender::new(false) }
    }
}

impl Cache {
    pub fn new() -> Self {
        Self::default()
    }

    /// Applies changes as one step: no stream sees half of them. An upsert whose encoding is unchanged is no change. Returns how
    /// many were.
    pub fn publish(&self, changes: impl IntoIterator<Item = Change>) -> usize {
        let mut inner = self.lock();
        let count = changes.into_iter().filter(|change| inner.apply(change)).count();
        let sequence = inner.sequence;
        drop(inner);
        if count > 0 {
            self.changed.send_replace(sequence);
        }
        count
    }

    /// Streams are refused until the first full state has been published.
    pub fn set_ready(&self) {
        self.ready.send_replace(true);
    }

    pub fn is_ready(&self) -> bool {
        *self.ready.borrow()
    }

    /// Resources of a type.
    pub fn len(&self, type_url: &str) -> usize {
        self.lock().types.get(type_url).map_or(0, |t| t.resources.size())
    }

    pub fn is_empty(&self) -> bool {
        self.lock().types.values().all(|t| t.resources.is_empty())
    }

    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        // Each change is applied whole before the next, so a panic elsewhere leaves nothing torn.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All resources of a type, as they are or were a moment ago: whoever gets them has the changes since to come.
    pub(super) fn whole(&self, type_url: &'static str) -> Whole {
        let (resources, sequence, policies) = {
            let mut inner = self.lock();
            let (sequence, policies) = (inner.sequence, inner.policies());
            let cache = inner.types.entry(type_url).or_default();
            if let Some(whole) = cache.whole(policies) {
                return whole;
            }
            (cache.resources.clone(), sequence, policies)
        };
        // Nobody waits for the lock while this is put together.
        let pieces = Pieces::of(resources.values().map(|stored| &stored.entry));
        let whole = Whole { sequence, policies, resources: resources.size(), pieces: pieces.downgrade() };
        self.lock().types.entry(type_url).or_default().whole = Some(whole.clone());
        Whole { sequence, policies, resources: whole.resources, pieces }
    }
}

impl Inner {
    fn apply(&mut self, change: &Change) -> bool {
        let next = self.sequence + 1;
        let (changed, type_url, name, lane) = match change {
            Change::Upsert { encoded, lane } => {
                let cache = self.types.entry(encoded.type_url).or_default();
                (cache.upsert(encoded), encoded.type_url, &encoded.name, *lane)
            }
            Change::Remove { type_url, name, lane } => {
                (self.types.entry(type_url).or_default().remove(name), *type_url, name, *lane)
            }
        };
        if changed {
            self.sequence = next;
            if let Some(cache) = self.types.get_mut(type_url) {
                cache.record(Logged { sequence: next, name: name.clone(), lane });
            }
        }
        changed
    }

    fn policies(&self) -> u64 {
        self.types.get(AUTHORIZATION_TYPE_URL).map_or(0, |policies| policies.changed)
    }
}

impl TypeCache {
    fn upsert(&mut self, encoded: &Encoded) -> bool {
        if let Some(old) = self.resources.get(&encoded.name) {
            if old.body() == encoded.body {
                return false;
            }
            let old = old.clone();
            self.unlink(&encoded.name, &old);
        }
        for alias in &encoded.aliases {
            self.by_alias.entry(alias.clone()).or_default().insert(encoded.name.clone());
        }
        for service in &encoded.member_of {
            self.members.entry(service.clone()).or_default().insert(encoded.name.clone());
        }
        self.resources.insert_mut(encoded.name.clone(), Stored::new(encoded));
        true
    }

    fn remove(&mut self, name: &Arc<str>) -> bool {
        let Some(old) = self.resources.get(name).cloned() else { return false };
        self.unlink(name, &old);
        self.resources.remove_mut(name)
    }

    fn unlink(&mut self, name: &Arc<str>, old: &Stored) {
        unlist(&mut self.by_alias, &old.aliases, name);
        unlist(&mut self.members, &old.member_of, name);
    }

    fn record(&mut self, entry: Logged) {
        self.changed = entry.sequence;
        self.log.push_back(entry);
        if self.log.len() > LOG
            && let Some(old) = self.log.pop_front()
        {
            self.trimmed = old.sequence;
        }
    }

    /// What a subscription by name means: a primary name, or every resource with that alias.
    pub(super) fn resolve(&self, name: &str) -> Vec<Arc<str>> {
        if let Some((name, _)) = self.resources.get_key_value(name) {
            return vec![name.clone()];
        }
        self.by_alias.get(name).into_iter().flatten().cloned().collect()
    }

    /// One that somebody is still being sent. Not if policies have changed since: its workloads could name one that is gone.
    fn whole(&self, policies: u64) -> Option<Whole> {
        let whole = self.whole.as_ref().filter(|whole| {
            whole.policies == policies
                && whole.sequence >= self.trimmed
                && self.changed.saturating_sub(whole.sequence) <= WHOLE_SERVES
        })?;
        let Whole { sequence, policies, resources, .. } = *whole;
        Some(Whole { sequence, policies, resources, pieces: whole.pieces.upgrade()? })
    }

    /// Names of what changed since, of that lane or of both; `None` if the log does not go back so far.
    pub(super) fn changed(&self, since: u64, urgent_only: bool) -> Option<BTreeSet<Arc<str>>> {
        if since < self.trimmed {
            return None;
        }
        let changed = self.log.iter().rev().take_while(|entry| entry.sequence > since);
        let changed = changed.filter(|entry| !urgent_only || entry.lane == Lane::Urgent);
        Some(changed.map(|entry| entry.name.clone()).collect())
    }

    /// What changed since, encoded; `None` as for [`Self::changed`].
    pub(super) fn difference(&mut self, since: u64, until: u64, urgent_only: bool) -> Option<Difference> {
        let made = self.difference.as_ref();
        let made = made.filter(|made| (made.since, made.until, made.urgent_only) == (since, until, urgent_only));
        if let Some(made) = made
            && let (Some(upserted), Some(removed)) = (made.upserted.upgrade(), made.removed.upgrade())
        {
            let Difference { resources, removals, .. } = *made;
            return Some(Difference { since, until, urgent_only, resources, removals, upserted, removed });
        }
        let names = self.changed(since, urgent_only)?;
        let (mut upserted, mut removed) = (Vec::new(), Vec::new());
        for name in &names {
            match self.resources.get(name) {
                Some(stored) => upserted.push(&stored.entry),
                None => removed.push(&**name),
            }
        }
        let (resources, removals) = (upserted.len(), removed.len());
        let (upserted, removed) = (Pieces::of(upserted), Pieces::removals(removed));
        let shared = Difference {
            since,
            until,
            urgent_only,
            resources,
            removals,
            upserted: upserted.downgrade(),
            removed: removed.downgrade(),
        };
        self.difference = Some(shared);
        Some(Difference { since, until, urgent_only, resources, removals, upserted, removed })
    }
}

fn unlist(lists: &mut HashMap<Arc<str>, BTreeSet<Arc<str>>>, keys: &[Arc<str>], name: &Arc<str>) {
    for key in keys {
        if let Some(names) = lists.get_mut(key) {
            names.remove(name);
            if names.is_empty() {
                lists.remove(key);
            }
        }
    }
}
