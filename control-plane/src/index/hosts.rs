//! Who a host name belongs to, and which addresses stand for it.
//!
//! Several Services and ServiceEntries may claim one host. In each namespace one wins: a Service, else the oldest entry. Of these
//! winners one is canonical, the one that clients of other namespaces mean. Every answer is a function of the objects that are there,
//! so a restart gives the same.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use mesh_core::service::Visibility;

use super::ClusterIndex;
use crate::objects::{Kind, Object, ObjectKey, ServiceEntry, Spec};

/// Host to the Services and ServiceEntries that claim it.
pub(super) type Claims = BTreeMap<Arc<str>, BTreeSet<ObjectKey>>;

/// Numbers of automatic addresses, by entry and host.
pub(super) type Allocation = BTreeMap<(ObjectKey, Arc<str>), u16>;

/// 240.240.0.0/16 has as many hosts; its first and last address stay unused.
const NUMBERS: u16 = u16::MAX - 1;

impl ClusterIndex {
    /// Keeps [`Claims`] in step with one object's change.
    pub(super) fn claim(&mut self, old: Option<&Object>, new: Option<&Object>) {
        if let Some(old) = old {
            for host in self.claimed(old) {
                let claimants = self.claims.entry(host.clone()).or_default();
                claimants.remove(&old.key);
                if claimants.is_empty() {
                    self.claims.remove(&host);
                }
            }
        }
        if let Some(new) = new {
            for host in self.claimed(new) {
                self.claims.entry(host).or_default().insert(new.key.clone());
            }
        }
    }

    fn claimed(&self, object: &Object) -> Vec<Arc<str>> {
        match &object.spec {
            Spec::Service(service) if !service.external_name => vec![self.hostname(&object.key).into()],
            Spec::ServiceEntry(entry) if entry.visibility.is_some() => entry.hosts.clone(),
            _ => Vec::new(),
        }
    }

    /// The others that claim a host of this object.
    pub(super) fn rivals(&self, object: &Object) -> BTreeSet<ObjectKey> {
        let hosts = self.claimed(object);
        let claimants = hosts.iter().filter_map(|host| self.claims.get(host)).flatten();
        claimants.filter(|key| **key != object.key).cloned().collect()
    }

    /// The hosts of an entry that no one in its namespace has a better claim to.
    pub(super) fn won<'a>(
        &'a self,
        key: &'a ObjectKey,
        entry: &'a ServiceEntry,
    ) -> impl Iterator<Item = &'a Arc<str>> + 'a {
        entry.hosts.iter().filter(move |host| self.winner(host, &key.namespace) == Some(key))
    }

    fn winner(&self, host: &str, namespace: &str) -> Option<&ObjectKey> {
        let claimants = self.claims.get(host)?.iter().filter(|key| *key.namespace == *namespace);
        claimants.min_by_key(|key| self.rank(key))
    }

    /// What a service of the model, by its key `namespace/host`, was made of.
    pub(super) fn service_object(&self, service: &str) -> Option<&Object> {
        let (namespace, host) = service.split_once('/')?;
        self.objects.get(self.winner(host, namespace)?).map(|object| &**object)
    }

    /// Whom clients of other namespaces mean.
    pub(super) fn is_canonical(&self, key: &ObjectKey, host: &str) -> bool {
        let claimants = self.claims.get(host).into_iter().flatten();
        let public = claimants.filter(|key| {
            self.entry(key).is_none_or(|entry| entry.visibility == Some(Visibility::Public))
                && self.winner(host, &key.namespace) == Some(*key)
        });
        public.min_by_key(|key| self.rank(key)) == Some(key)
    }

    /// Services first, then the oldest; RFC 3339 times in UTC sort as text.
    fn rank<'a>(&self, key: &'a ObjectKey) -> (bool, Arc<str>, &'a ObjectKey) {
        let created = self.entry(key).map(|entry| entry.created.clone()).unwrap_or_default();
        (key.kind != Kind::Service, created, key)
    }

    pub(super) fn entry(&self, key: &ObjectKey) -> Option<&ServiceEntry> {
        match &self.objects.get(key)?.spec {
            Spec::ServiceEntry(entry) => Some(entry),
            _ => None,
        }
    }

    /// Allocates anew; the entries some host of which got another address.
    pub(super) fn reallocate(&mut self) -> BTreeSet<ObjectKey> {
        let entries = self.objects_of(Kind::ServiceEntry, None).filter_map(|o| Some((&o.key, self.entry(&o.key)?)));
        let wanting = entries.filter(|(_, entry)| entry.allocates).flat_map(|(key, entry)| {
            let fixed = entry.hosts.iter().filter(|host| !host.starts_with('*'));
            fixed.map(move |host| (entry.created.clone(), key.clone(), host.clone()))
        });
        let new = allocate(wanting.collect());
        let old = std::mem::replace(&mut self.allocation, new);
        let differs = |(of, number): (&(ObjectKey, Arc<str>), &u16), other: &Allocation| {
            (other.get(of) != Some(number)).then(|| of.0.clone())
        };
        let gone = old.iter().filter_map(|of| differs(of, &self.allocation));
        let come = self.allocation.iter().filter_map(|of| differs(of, &old));
        gone.chain(come).collect()
    }

    /// One address of each family, where the host has any.
    pub(super) fn allocated(&self, key: &ObjectKey, host: &Arc<str>) -> Vec<IpAddr> {
        let number = self.allocation.get(&(key.clone(), host.clone())).copied();
        let addresses = |number: u16| {
            let [high, low] = number.to_be_bytes();
            [Ipv4Addr::new(240, 240, high, low).into(), Ipv6Addr::new(0x2001, 2, 0, 0, 0, 0, 0, number).into()]
        };
        number.map(addresses).into_iter().flatten().collect()
    }
}

/// Each takes the number its name hashes to, or the next free one; the oldest choose first, so that a newcomer moves nobody older. Those
/// without a creationTimestamp, as in files, choose before all others and by name: a new one may move what sorts behind it.
fn allocate(mut wanting: Vec<(Arc<str>, ObjectKey, Arc<str>)>) -> Allocation {
    wanting.sort();
    let (mut taken, mut allocation) = (BTreeSet::new(), Allocation::new());
    for (_, key, host) in wanting {
        let first = hash(&format!("{}/{}/{host}", key.namespace, key.name)) % u64::from(NUMBERS);
        let number = (0..u64::from(NUMBERS))
            .filter_map(|step| u16::try_from(1 + (first + step) % u64::from(NUMBERS)).ok())
            .find(|number| taken.insert(*number));
        // With none left the host has no address, and its clients are passed through.
        let Some(number) = number else { break };
        allocation.insert((key, host), number);
    }
    allocation
}

/// FNV-1a, 64 bits: the same in every release, unlike the standard library's.
fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wants(created: &str, name: &str) -> (Arc<str>, ObjectKey, Arc<str>) {
        let key = ObjectKey::new(Kind::ServiceEntry, &"demo".into(), &name.into());
        (created.into(), key, "example.com".into())
    }

    #[test]
    fn the_hash_is_the_published_one() {
        assert_eq!((hash(""), hash("foobar")), (0xcbf2_9ce4_8422_2325, 0x8594_4171_f739_67e8));
    }

    #[test]
    fn numbers_are_distinct_and_a_newcomer_moves_nobody() {
        let many: Vec<_> = (0..3000).map(|i| wants(&format!("{i:05}"), &format!("e{i}"))).collect();
        let before = allocate(many[..2999].to_vec());
        let after = allocate(many);
        assert!(before.iter().all(|(of, number)| after.get(of) == Some(number)));
        assert_eq!(after.values().collect::<BTreeSet<_>>().len(), 3000);
        assert!(after.values().all(|number| (1..=NUMBERS).contains(number)));
    }

    #[test]
    fn when_all_numbers_are_taken_the_youngest_go_without() {
        let many = (0..u32::from(NUMBERS) + 2).map(|i| wants(&format!("{i:06}"), &format!("e{i}")));
        let all = allocate(many.collect());
        assert_eq!(all.len(), usize::from(NUMBERS));
        assert!(all.contains_key(&(wants("", "e0").1, "example.com".into())));
    }
}
