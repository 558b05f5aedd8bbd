//! What a response says, put together from the cache.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::Arc,
};

use bytes::Bytes;

use super::{
    cache::{Cache, Difference, Stored, TypeCache, Whole},
    outgoing::Pieces,
    request::Held,
};
use crate::delta::ServerType;

pub(super) struct Batch {
    pub(super) upserted: Pieces,
    pub(super) removed: Pieces,
    pub(super) resources: usize,
    pub(super) removals: usize,
    /// What the client held already.
    pub(super) unchanged: usize,
}

impl Batch {
    pub(super) fn is_empty(&self) -> bool {
        self.resources == 0 && self.removals == 0
    }

    /// What came, and what went.
    pub(super) fn split(self) -> (Self, Self) {
        let none = || Pieces::of([]);
        let gone =
            Self { upserted: none(), removed: self.removed, resources: 0, removals: self.removals, unchanged: 0 };
        (Self { removed: none(), removals: 0, ..self }, gone)
    }
}

impl From<Difference> for Batch {
    fn from(difference: Difference) -> Self {
        let Difference { upserted, removed, resources, removals, .. } = difference;
        Self { upserted, removed, resources, removals, unchanged: 0 }
    }
}

/// Everything of a type that a client does not hold, and as of when.
pub(super) fn everything(cache: &Cache, type_url: &'static str, held: &Held) -> (Batch, u64) {
    if held.is_empty() {
        return whole(cache, type_url, Gathered::default());
    }
    let (resources, sequence) = {
        let mut inner = cache.lock();
        let sequence = inner.sequence;
        (inner.types.entry(type_url).or_default().resources.clone(), sequence)
    };
    // Nobody waits for the lock while the two are compared.
    let mut gathered = Gathered::default();
    for (name, version) in held.iter() {
        match resources.get(name) {
            Some(stored) => gathered.add_unless(stored.is_version(version), stored),
            None => gathered.removed.push(name.to_owned()),
        }
    }
    if gathered.unchanged + gathered.upserted.len() < resources.size() {
        let held: HashSet<&str> = held.iter().map(|(name, _)| name).collect();
        let new = resources.iter().filter(|(name, _)| !held.contains(&***name));
        new.for_each(|(_, stored)| gathered.add_unless(false, stored));
    }
    // After a new release, say, which writes everything a little differently: what everybody shares costs less than what each lacks.
    if gathered.upserted.len() > resources.size() / 2 {
        return whole(cache, type_url, gathered);
    }
    (gathered.into(), sequence)
}

fn whole(cache: &Cache, type_url: &'static str, gathered: Gathered) -> (Batch, u64) {
    let Whole { sequence, resources, pieces, .. } = cache.whole(type_url);
    let rest = Gathered { removed: gathered.removed, ..Gathered::default() };
    (Batch { upserted: pieces, resources, ..rest.into() }, sequence)
}

/// What names stand for, and as of when. An unknown name is answered as removed, so that the asker need not wait for it.
pub(super) fn named(
    cache: &Cache,
    type_url: &'static str,
    protocol: &mut ServerType,
    names: &[Arc<str>],
    held: &BTreeMap<String, String>,
) -> (Batch, u64) {
    let mut inner = cache.lock();
    let sequence = inner.sequence;
    let cache = inner.types.entry(type_url).or_default();
    let mut gathered = Gathered::default();
    for name in names {
        let found = cache.resolve(name);
        if found.is_empty() {
            gathered.removed.push(name.to_string());
        }
        found.iter().for_each(|name| gathered.add_followed(cache, protocol, name, held));
    }
    (gathered.into(), sequence)
}

/// What of some changes concerns a client that is not sent everything.
pub(super) fn followed(cache: &TypeCache, protocol: &mut ServerType, names: &BTreeSet<Arc<str>>) -> Batch {
    let mut gathered = Gathered::default();
    for name in names {
        match cache.resources.get(name) {
            Some(stored) if wants(protocol, name, stored) => gathered.add_changed(cache, protocol, name, stored),
            Some(_) => {}
            None => {
                protocol.followed.remove(name);
                gathered.removed.push(name.to_string());
            }
        }
    }
    gathered.into()
}

fn wants(protocol: &ServerType, name: &Arc<str>, stored: &Stored) -> bool {
    let mut names = std::iter::once(name).chain(&*stored.aliases).chain(&*stored.member_of);
    names.any(|name| protocol.names.contains(name) || protocol.followed.contains(name))
}

/// A batch for one client alone.
#[derive(Default)]
struct Gathered {
    upserted: Vec<Bytes>,
    removed: Vec<String>,
    unchanged: usize,
    /// Of what is followed: names may lead to the same resource.
    added: BTreeSet<Arc<str>>,
}

impl From<Gathered> for Batch {
    fn from(gathered: Gathered) -> Self {
        let Gathered { upserted, removed, unchanged, .. } = gathered;
        Self {
            resources: upserted.len(),
            removals: removed.len(),
            unchanged,
            upserted: Pieces::of(&upserted),
            removed: Pieces::removals(removed.iter().map(String::as_str)),
        }
    }
}

impl Gathered {
    fn add_unless(&mut self, held: bool, stored: &Stored) {
        match held {
            true => self.unchanged += 1,
            false => self.upserted.push(stored.entry.clone()),
        }
    }

    /// What is followed already comes alone.
    fn add_changed(&mut self, cache: &TypeCache, protocol: &mut ServerType, name: &Arc<str>, stored: &Stored) {
        if !protocol.followed.contains(name) {
            self.add_followed(cache, protocol, name, &BTreeMap::new());
        } else if self.added.insert(name.clone()) {
            self.add_unless(false, stored);
        }
    }

    /// A service brings its endpoints, as with Istio's control plane.
    fn add_followed(
        &mut self,
        cache: &TypeCache,
        protocol: &mut ServerType,
        name: &Arc<str>,
        held: &BTreeMap<String, String>,
    ) {
        let members = cache.members.get(name).into_iter().flatten();
        for name in std::iter::once(name).chain(members) {
            if let Some(stored) = cache.resources.get(name)
                && self.added.insert(name.clone())
            {
                protocol.followed.insert(name.clone());
                self.add_unless(held.get(&**name).is_some_and(|version| stored.is_version(version)), stored);
            }
        }
    }
}
