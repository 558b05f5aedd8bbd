//! Who a host name belongs to, and which addresses stand for it.
//!
//! Several Services and ServiceEntries may claim one host. In each namespace one wins: a Service, else the oldest entry. Of these
//! winners one is canonical, the one that clients of other namespaces mean; but none whose addresses another namespace has the better
//! claim to, by the same order: else whoever may write an entry anywhere could put it before any Service. Every answer is a function of
//! the objects that are there, so a restart gives the same.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use ipnet::IpNet;
use mesh_core::service::Visibility;

use super::ClusterIndex;
use crate::objects::{Kind, Object, ObjectKey, ServiceEntry, Spec};

/// Hosts and single addresses to the Services and ServiceEntries that claim them.
#[derive(Clone, Debug, Default)]
pub(super) struct Claims {
    hosts: BTreeMap<Arc<str>, BTreeSet<ObjectKey>>,
    addresses: BTreeMap<IpAddr, BTreeSet<ObjectKey>>,
}

/// Automatic addresses, by entry and host: one of each family, or what was assigned before.
pub(super) type Allocation = BTreeMap<(ObjectKey, Arc<str>), Vec<IpAddr>>;

/// 240.240.0.0/16 has as many hosts; its first and last address stay unused.
const NUMBERS: u16 = u16::MAX - 1;

impl ClusterIndex {
    /// Keeps [`Claims`] in step with one object's change.
    pub(super) fn claim(&mut self, old: Option<&Object>, new: Option<&Object>) {
        if let Some(old) = old {
            let hosts = self.claimed(old);
            withdraw(&mut self.claims.hosts, hosts, &old.key);
            withdraw(&mut self.claims.addresses, claimed_addresses(old), &old.key);
        }
        if let Some(new) = new {
            for host in self.claimed(new) {
                self.claims.hosts.entry(host).or_default().insert(new.key.clone());
            }
            for address in claimed_addresses(new) {
                self.claims.addresses.entry(address).or_default().insert(new.key.clone());
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

    /// The others that claim a host or an address of this object.
    pub(super) fn rivals(&self, object: &Object) -> BTreeSet<ObjectKey> {
        let (hosts, addresses) = (self.claimed(object), claimed_addresses(object));
        let of_hosts = hosts.iter().filter_map(|host| self.claims.hosts.get(host));
        let of_addresses = addresses.iter().filter_map(|address| self.claims.addresses.get(address));
        let claimants = of_hosts.chain(of_addresses).flatten();
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
        let claimants = self.claims.hosts.get(host)?.iter().filter(|key| *key.namespace == *namespace);
        claimants.min_by_key(|key| self.rank(key))
    }

    /// What a service of the model, by its key `namespace/host`, was made of.
    pub(super) fn service_object(&self, service: &str) -> Option<&Object> {
        let (namespace, host) = service.split_once('/')?;
        self.objects.get(self.winner(host, namespace)?).map(|object| &**object)
    }

    /// Whom clients of other namespaces mean.
    pub(super) fn is_canonical(&self, key: &ObjectKey, host: &str) -> bool {
        let claimants = self.claims.hosts.get(host).into_iter().flatten();
        let public = claimants.filter(|key| self.is_public(key) && self.winner(host, &key.namespace) == Some(*key));
        public.min_by_key(|key| self.rank(key)) == Some(key) && !self.is_beaten(key)
    }

    /// Whether another namespace has the better claim to an address of an entry.
    fn is_beaten(&self, key: &ObjectKey) -> bool {
        let addresses = self.objects.get(key).map(|object| claimed_addresses(object)).unwrap_or_default();
        let claimants = addresses.iter().filter_map(|address| self.claims.addresses.get(address)).flatten();
        let mut foreign = claimants.filter(|other| other.namespace != key.namespace && self.is_public(other));
        foreign.any(|other| self.rank(other) < self.rank(key))
    }

    fn is_public(&self, key: &ObjectKey) -> bool {
        self.entry(key).is_none_or(|entry| entry.visibility == Some(Visibility::Public))
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
            fixed.map(move |host| Wanting {
                created: entry.created.clone(),
                key: key.clone(),
                host: host.clone(),
                assigned: entry.assigned.iter().filter(|(of, _)| of == host).map(|(_, address)| *address).collect(),
            })
        });
        let new = allocate(wanting.collect());
        let old = std::mem::replace(&mut self.allocation, new);
        let differs = |(of, addresses): (&(ObjectKey, Arc<str>), &Vec<IpAddr>), other: &Allocation| {
            (other.get(of) != Some(addresses)).then(|| of.0.clone())
        };
        let gone = old.iter().filter_map(|of| differs(of, &self.allocation));
        let come = self.allocation.iter().filter_map(|of| differs(of, &old));
        gone.chain(come).collect()
    }

    /// The automatic addresses of a host of an entry, where it has any.
    pub(crate) fn allocated(&self, key: &ObjectKey, host: &Arc<str>) -> Vec<IpAddr> {
        self.allocation.get(&(key.clone(), host.clone())).cloned().unwrap_or_default()
    }
}

/// But not those found for hosts, which nobody else has.
fn claimed_addresses(object: &Object) -> Vec<IpAddr> {
    match &object.spec {
        Spec::Service(service) if !service.external_name => service.addresses.clone(),
        Spec::ServiceEntry(entry) if entry.visibility.is_some() => {
            let single = entry.addresses.iter().filter(|net| net.prefix_len() == net.max_prefix_len());
            single.map(IpNet::addr).collect()
        }
        _ => Vec::new(),
    }
}

fn withdraw<K: Ord>(claims: &mut BTreeMap<K, BTreeSet<ObjectKey>>, of: Vec<K>, key: &ObjectKey) {
    for claimed in of {
        if let Some(claimants) = claims.get_mut(&claimed) {
            claimants.remove(key);
            if claimants.is_empty() {
                claims.remove(&claimed);
            }
        }
    }
}

/// A host that is to have automatic addresses; the oldest comes first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Wanting {
    created: Arc<str>,
    key: ObjectKey,
    host: Arc<str>,
    /// By its entry's status.
    assigned: Vec<IpAddr>,
}

/// Who was assigned addresses keeps them, of two the older. Everybody else takes the number its name hashes to, or the next free one; the
/// oldest choose first, so that a newcomer moves nobody older. Those without a creationTimestamp, as in files, choose before all others
/// and by name: a new one may move what sorts behind it.
fn allocate(mut wanting: Vec<Wanting>) -> Allocation {
    wanting.sort();
    let (mut taken, mut allocation) = (BTreeSet::new(), Allocation::new());
    let mut without = Vec::new();
    for Wanting { key, host, assigned, .. } in wanting {
        if assigned.is_empty() || assigned.iter().any(|address| taken.contains(address)) {
            without.push((key, host));
        } else {
            taken.extend(assigned.iter().copied());
            allocation.insert((key, host), assigned);
        }
    }
    for (key, host) in without {
        let first = hash(&format!("{}/{}/{host}", key.namespace, key.name)) % u64::from(NUMBERS);
        let addresses = (0..u64::from(NUMBERS))
            .filter_map(|step| u16::try_from(1 + (first + step) % u64::from(NUMBERS)).ok())
            .map(addresses)
            .find(|addresses| addresses.iter().all(|address| !taken.contains(address)));
        // With none left the host has no address, and its clients are passed through.
        let Some(addresses) = addresses else { break };
        taken.extend(addresses);
        allocation.insert((key, host), addresses.to_vec());
    }
    allocation
}

fn addresses(number: u16) -> [IpAddr; 2] {
    let [high, low] = number.to_be_bytes();
    [Ipv4Addr::new(240, 240, high, low).into(), Ipv6Addr::new(0x2001, 2, 0, 0, 0, 0, 0, number).into()]
}

/// FNV-1a, 64 bits: the same in every release, unlike the standard library's.
fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wants(created: &str, name: &str) -> Wanting {
        let key = ObjectKey::new(Kind::ServiceEntry, &"demo".into(), &name.into());
        Wanting { created: created.into(), key, host: "example.com".into(), assigned: Vec::new() }
    }

    fn of<'a>(allocation: &'a Allocation, name: &str) -> &'a [IpAddr] {
        let Wanting { key, host, .. } = wants("", name);
        &allocation[&(key, host)]
    }

    #[test]
    fn who_was_assigned_addresses_keeps_them_against_everybody_else() {
        // Another control plane may have numbered each family for itself.
        let foreign: Vec<IpAddr> = ["240.240.0.7", "2001:2::9"].map(|text| text.parse().unwrap()).into();
        let assigned = |created: &str, name: &str, addresses: &[IpAddr]| Wanting {
            assigned: addresses.to_vec(),
            ..wants(created, name)
        };
        let hashed = of(&allocate(vec![wants("2", "a")]), "a").to_vec();
        let allocation = allocate(vec![
            wants("1", "a"),
            assigned("2", "thief", &hashed),
            assigned("3", "b", &foreign),
            assigned("4", "c", &foreign[..1]),
        ]);
        assert_eq!(of(&allocation, "thief"), hashed);
        assert_ne!(of(&allocation, "a"), hashed, "who was assigned an address came first");
        assert_eq!(of(&allocation, "b"), foreign);
        assert_ne!(of(&allocation, "c"), &foreign[..1], "of two the older keeps it");
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
        assert!(before.iter().all(|(of, addresses)| after.get(of) == Some(addresses)));
        assert_eq!(after.values().flatten().collect::<BTreeSet<_>>().len(), 2 * 3000);
    }

    #[test]
    fn when_all_numbers_are_taken_the_youngest_go_without() {
        let many = (0..u32::from(NUMBERS) + 2).map(|i| wants(&format!("{i:06}"), &format!("e{i}")));
        let all = allocate(many.collect());
        assert_eq!(all.len(), usize::from(NUMBERS));
        assert_eq!(of(&all, "e0").len(), 2);
    }
}
