//! Every resource, encoded once as it is sent, and what changed when.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use proto::AUTHORIZATION_TYPE_URL;
use rpds::HashTrieMapSync;
use smallvec::SmallVec;
use tokio::sync::watch;

use super::{
    Change, Lane, VERSION_LENGTH,
    log::{Log, Logged},
    outgoing::{Encoding, Entry, Pieces, WeakPieces},
    version_of,
};
use crate::convert::Encoded;

/// A whole type that is still being sent to somebody serves those who come meanwhile, unless more has changed since.
const WHOLE_SERVES: u64 = 4096;
/// Differences that are remembered.
const DIFFERENCES: usize = 32;

pub(super) type Resources = HashTrieMapSync<Arc<str>, Stored>;

#[derive(Clone, Debug)]
pub(super) struct Stored {
    /// As it stands in a response.
    pub(super) entry: Bytes,
    /// Where in it they begin.
    version: u32,
    body: u32,
    pub(super) aliases: Names,
    pub(super) member_of: Names,
}

/// Mostly one.
type Names = SmallVec<[Arc<str>; 1]>;

impl Stored {
    fn new(encoded: &Encoded) -> Self {
        let Encoded { type_url, name, aliases, member_of, body } = encoded;
        let version = version_of(body);
        let Encoding { bytes, version, body } = Entry { type_url, name, version: &version, aliases, body }.encode();
        // An object of a cluster is a few megabytes at most.
        let at = |position: usize| u32::try_from(position).unwrap_or(u32::MAX);
        let (aliases, member_of) = (Names::from(&**aliases), Names::from(&**member_of));
        Self { entry: bytes, version: at(version), body: at(body), aliases, member_of }
    }

    pub(super) fn is_version(&self, version: &str) -> bool {
        let from = self.version as usize;
        self.entry.get(from..from + VERSION_LENGTH) == Some(version.as_bytes())
    }

    fn body(&self) -> &[u8] {
        self.entry.get(self.body as usize..).unwrap_or_default()
    }
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
    lane: Lane,
    since: u64,
    until: u64,
    pub(super) resources: usize,
    pub(super) removals: usize,
    pub(super) upserted: P,
    pub(super) removed: P,
}

#[derive(Debug, Default)]
pub(super) struct TypeCache {
    pub(super) resources: Resources,
    by_alias: HashMap<Arc<str>, Names>,
    /// Endpoints by the service's key.
    pub(super) members: HashMap<Arc<str>, BTreeSet<Arc<str>>>,
    log: Log,
    /// Of these, the urgent ones.
    urgent: Log,
    /// Of the last change.
    changed: u64,
    whole: Option<Whole<WeakPieces>>,
    /// The last ones made, latest first: clients that keep up need the same.
    differences: VecDeque<Difference<WeakPieces>>,
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

    /// Counts the resources' changes.
    pub fn version(&self) -> u64 {
        self.lock().sequence
    }

    /// Resources of a type.
    pub fn len(&self, type_url: &str) -> usize {
        self.lock().types.get(type_url).map_or(0, |t| t.resources.size())
    }

    /// Shows every resource of a type, as the message that clients are sent.
    pub fn visit(&self, type_url: &str, mut visitor: impl FnMut(&[u8])) {
        let resources = self.lock().types.get(type_url).map(|t| t.resources.clone()).unwrap_or_default();
        resources.values().for_each(|stored| visitor(stored.body()));
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
                cache.record(&Logged { sequence: next, name: name.clone() }, lane);
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
            let names = self.by_alias.entry(alias.clone()).or_default();
            if let Err(position) = names.binary_search(&encoded.name) {
                names.insert(position, encoded.name.clone());
            }
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
        for alias in &old.aliases {
            if let Some(names) = self.by_alias.get_mut(alias) {
                names.retain(|other| other != name);
                if names.is_empty() {
                    self.by_alias.remove(alias);
                }
            }
        }
        for service in &old.member_of {
            if let Some(names) = self.members.get_mut(service) {
                names.remove(name);
                if names.is_empty() {
                    self.members.remove(service);
                }
            }
        }
    }

    fn record(&mut self, entry: &Logged, lane: Lane) {
        self.changed = entry.sequence;
        self.log.record(entry.clone());
        if lane == Lane::Urgent {
            self.urgent.record(entry.clone());
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
                && whole.sequence >= self.log.trimmed
                && self.changed.saturating_sub(whole.sequence) <= WHOLE_SERVES
        })?;
        let Whole { sequence, policies, resources, .. } = *whole;
        Some(Whole { sequence, policies, resources, pieces: whole.pieces.upgrade()? })
    }

    /// Names of what changed since, in a lane, and until when: of much, the first part. `None` if the log does not go back so far.
    pub(super) fn changed(&self, lane: Lane, since: u64, now: u64, most: usize) -> Option<(BTreeSet<Arc<str>>, u64)> {
        let log = match lane {
            Lane::Bulk => &self.log,
            Lane::Urgent => &self.urgent,
        };
        let (names, until) = log.after(since, most, now);
        (since >= self.log.trimmed).then(|| (names.cloned().collect(), until))
    }

    /// As [`Self::changed`], encoded.
    pub(super) fn difference(&mut self, lane: Lane, since: u64, now: u64, most: usize) -> Option<(Difference, u64)> {
        if since < self.log.trimmed {
            return None;
        }
        let log = if lane == Lane::Urgent { &self.urgent } else { &self.log };
        let until = log.after(since, most, now).1;
        let is_it = |made: &&Difference<WeakPieces>| (made.lane, made.since, made.until) == (lane, since, until);
        if let Some(made) = self.differences.iter().find(is_it).and_then(Difference::upgrade) {
            return Some((made, until));
        }
        let (names, _) = self.changed(lane, since, now, most)?;
        let (mut upserted, mut removed) = (Vec::new(), Vec::new());
        for name in &names {
            match self.resources.get(name) {
                Some(stored) => upserted.push(&stored.entry),
                None => removed.push(&**name),
            }
        }
        let (resources, removals) = (upserted.len(), removed.len());
        let (upserted, removed) = (Pieces::of(upserted), Pieces::removals(removed));
        let made = Difference { lane, since, until, resources, removals, upserted, removed };
        self.differences.push_front(made.downgrade());
        self.differences.truncate(DIFFERENCES);
        Some((made, until))
    }
}

impl Difference {
    fn downgrade(&self) -> Difference<WeakPieces> {
        let (upserted, removed) = (self.upserted.downgrade(), self.removed.downgrade());
        let Self { lane, since, until, resources, removals, .. } = *self;
        Difference { lane, since, until, resources, removals, upserted, removed }
    }
}

impl Difference<WeakPieces> {
    fn upgrade(&self) -> Option<Difference> {
        let (upserted, removed) = (self.upserted.upgrade()?, self.removed.upgrade()?);
        let Self { lane, since, until, resources, removals, .. } = *self;
        Some(Difference { lane, since, until, resources, removals, upserted, removed })
    }
}
