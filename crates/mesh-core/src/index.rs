//! What the mesh is known to hold, found by every key a connection brings.
//!
//! An [`Index`] is a value: `Clone` is O(1) and shares structure, [`Index::apply`] costs O(delta). A writer applies to its own copy and
//! publishes clones; readers never lock. Contents depend only on the surviving resources, never on the order they arrived in, so ties
//! that the field leaves to "first seen" go to the smaller key here.
//!
//! ```text
//! (network, ip) ──▶ workloads        uid ──▶ workload ◀── namespace/name
//! (network, ip) ──▶ services         key ──▶ service  ◀── hostname, CIDR
//! service key ──▶ endpoints          (also of services not yet known: they wait here)
//! namespace | "" ──▶ policies        key ──▶ policy
//! (node, identity) ──▶ number of workloads
//! ```

use std::{borrow::Borrow, collections::BTreeMap, fmt, hash::Hash, sync::Arc};

use foldhash::fast::RandomState;
use ipnet::IpNet;
use prefix_trie::joint::JointPrefixMap;
use rpds::{HashTrieMapSync, RedBlackTreeMapSync};
use smallvec::SmallVec;

use crate::{
    addr::NetworkAddress,
    authorize::PolicySet,
    identity::Identity,
    policy::{Policy, Scope},
    service::Service,
    workload::{NetworkMode, TunnelProtocol, Workload},
};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resource {
    Policy(Arc<Policy>),
    Service(Arc<Service>),
    Workload(Arc<Workload>),
}

impl Resource {
    pub fn key(&self) -> ResourceKey {
        match self {
            Self::Policy(policy) => ResourceKey::Policy(policy.key()),
            Self::Service(service) => ResourceKey::Address(service.key()),
            Self::Workload(workload) => ResourceKey::Address(workload.uid.clone()),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ResourceKey {
    /// A workload's uid, or a service's `namespace/hostname`.
    Address(Arc<str>),
    /// `namespace/name`.
    Policy(Arc<str>),
}

/// Where a fact comes from, least authoritative first. A fact never replaces or removes one of higher standing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Provenance {
    /// Seen on this node; says nothing about policies, so such a workload denies inbound connections.
    Local,
    /// Written down by the operator beside this proxy. Discovery may replace it, but cannot remove what it never gave.
    Static,
    /// What discovery said before the last restart.
    Disk,
    Xds,
}

/// A change, applied as a whole.
#[derive(Clone, Debug)]
pub struct Delta {
    pub provenance: Provenance,
    pub upserts: Vec<Resource>,
    /// Applied before the upserts.
    pub removals: Vec<ResourceKey>,
}

type Map<K, V> = HashTrieMapSync<K, V, RandomState>;
type Sorted<V> = RedBlackTreeMapSync<Arc<str>, Arc<V>>;
/// The few that share a key, best first.
type Bucket<V> = SmallVec<[Arc<V>; 1]>;
type CidrTrie = JointPrefixMap<IpNet, Bucket<Service>>;

/// See the module's documentation.
#[derive(Clone)]
pub struct Index {
    version: u64,
    policies_complete: bool,
    /// Of everything that did not come from [`Provenance::Xds`].
    provisional: Map<ResourceKey, Provenance>,

    workloads: Map<Arc<str>, Arc<Workload>>,
    workloads_by_address: Map<NetworkAddress, Bucket<Workload>>,
    /// By `namespace/name`, as the node agent names pods.
    workloads_by_name: Map<Arc<str>, Bucket<Workload>>,
    /// By `namespace/hostname`, of those that have a hostname.
    workloads_by_hostname: Map<Arc<str>, Bucket<Workload>>,
    identities: Map<(Arc<str>, Identity), usize>,
    /// By service key, then uid.
    endpoints: Map<Arc<str>, Sorted<Workload>>,

    services: Map<Arc<str>, Arc<Service>>,
    services_by_vip: Map<NetworkAddress, Bucket<Service>>,
    services_by_hostname: Map<Arc<str>, Bucket<Service>>,
    cidr_services: Sorted<Service>,
    /// By network; rebuilt when one of `cidr_services` changes, which is rare.
    cidrs: Map<Arc<str>, Arc<CidrTrie>>,

    policies: Map<Arc<str>, Arc<Policy>>,
    /// By namespace, "" for global ones; those of selector scope are only found by key.
    policies_by_scope: Map<Arc<str>, Sorted<Policy>>,
}

/// Sizes only: the contents have pages of their own.
impl fmt::Debug for Index {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Index")
            .field("version", &self.version)
            .field("policies_complete", &self.policies_complete)
            .field("workloads", &self.workloads.size())
            .field("services", &self.services.size())
            .field("policies", &self.policies.size())
            .finish_non_exhaustive()
    }
}

impl Default for Index {
    fn default() -> Self {
        Self {
            version: 0,
            policies_complete: false,
            provisional: map(),
            workloads: map(),
            workloads_by_address: map(),
            workloads_by_name: map(),
            workloads_by_hostname: map(),
            identities: map(),
            endpoints: map(),
            services: map(),
            services_by_vip: map(),
            services_by_hostname: map(),
            cidr_services: Sorted::new_sync(),
            cidrs: map(),
            policies: map(),
            policies_by_scope: map(),
        }
    }
}

impl Index {
    /// Applies `delta` and advances the version by one.
    pub fn apply(&mut self, delta: Delta) {
        let mut cidrs_changed = false;
        for key in &delta.removals {
            if self.removable(key, delta.provenance) {
                cidrs_changed |= self.remove(key);
            }
        }
        for resource in delta.upserts {
            let key = resource.key();
            if self.outranked(&key, delta.provenance) {
                cidrs_changed |= self.remove(&key);
                cidrs_changed |= self.insert(resource);
                if delta.provenance != Provenance::Xds {
                    self.provisional.insert_mut(key, delta.provenance);
                }
            }
        }
        if cidrs_changed {
            self.cidrs = cidr_tries(&self.cidr_services);
        }
        self.version += 1;
    }

    /// Counts the deltas applied.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Says whether all policies have arrived; until then, initially, [`crate::authorize::authorize`] denies. Advances the version
    /// when it changes something.
    pub fn set_policies_complete(&mut self, complete: bool) {
        if self.policies_complete != complete {
            self.policies_complete = complete;
            self.version += 1;
        }
    }

    pub fn policies_complete(&self) -> bool {
        self.policies_complete
    }

    pub fn workload(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }

    /// Of several that share an address: pods first, then those that speak HBONE. Host-network workloads are never found here, since
    /// their address is the node's.
    pub fn workload_by_address(&self, address: &NetworkAddress) -> Option<&Arc<Workload>> {
        self.workloads_by_address.get(address)?.first()
    }

    pub fn workload_by_hostname(&self, namespace: &str, hostname: &str) -> Option<&Arc<Workload>> {
        self.workloads_by_hostname.get(&*key(namespace, hostname))?.first()
    }

    /// The workload a node's agent means; an empty `node` stands for any.
    pub fn local_workload(
        &self,
        node: &str,
        namespace: &str,
        name: &str,
        service_account: &str,
    ) -> Option<&Arc<Workload>> {
        let here = |w: &&Arc<Workload>| (node.is_empty() || *w.node == *node) && *w.service_account == *service_account;
        self.workloads_by_name.get(&*key(namespace, name))?.iter().find(here)
    }

    /// How many workloads of `node` run as `identity`.
    pub fn identity_count(&self, node: &str, identity: &Identity) -> usize {
        self.identities.get(&(node.into(), identity.clone())).copied().unwrap_or(0)
    }

    pub fn service(&self, key: &str) -> Option<&Arc<Service>> {
        self.services.get(key)
    }

    /// The service a client in `client_namespace` reaches at `address`: an exact VIP before any range; then the client's own namespace,
    /// then the longer range, then the canonical one.
    pub fn service_by_vip(&self, address: &NetworkAddress, client_namespace: &str) -> Option<&Arc<Service>> {
        let exact = self.services_by_vip.get(address).and_then(|bucket| best(bucket, client_namespace));
        exact.or_else(|| self.service_by_cidr(address, client_namespace))
    }

    fn service_by_cidr(&self, address: &NetworkAddress, client_namespace: &str) -> Option<&Arc<Service>> {
        let trie = self.cidrs.get(&address.network)?;
        let ranges = trie.cover(&IpNet::from(address.ip));
        let visible = ranges.filter_map(|(range, bucket)| Some((range.prefix_len(), best(bucket, client_namespace)?)));
        visible
            .max_by_key(|(length, service)| (*service.namespace == *client_namespace, *length))
            .map(|(_, service)| service)
    }

    pub fn service_by_hostname(&self, hostname: &str, client_namespace: &str) -> Option<&Arc<Service>> {
        best(self.services_by_hostname.get(hostname)?, client_namespace)
    }

    /// All services of a host name by key, whoever may see them.
    pub fn services_by_hostname(&self, hostname: &str) -> &[Arc<Service>] {
        self.services_by_hostname.get(hostname).map_or(&[], |bucket| bucket)
    }

    /// All of a service's endpoints by uid, healthy or not, also when the service itself is not known yet.
    pub fn endpoints<'a>(&'a self, service_key: &str) -> impl Iterator<Item = &'a Arc<Workload>> + use<'a> {
        self.endpoints.get(service_key).into_iter().flat_map(|endpoints| endpoints.values())
    }

    pub fn policy(&self, key: &str) -> Option<&Arc<Policy>> {
        self.policies.get(key)
    }

    /// What [`crate::authorize::authorize`] needs to decide about connections to `workload`.
    pub fn policies_for(&self, workload: &Workload) -> PolicySet {
        let scoped = |scope: &str| self.policies_by_scope.get(scope).into_iter().flat_map(|policies| policies.values());
        let mut policies: Vec<Arc<Policy>> = scoped("").chain(scoped(&workload.namespace)).cloned().collect();
        let mut missing = Vec::new();
        for key in &workload.authorization_policies {
            match self.policies.get(key) {
                // Policies of the other scopes are in force already, or not meant for this workload.
                Some(policy) if policy.scope == Scope::WorkloadSelector => policies.push(policy.clone()),
                Some(_) => {}
                None => missing.push(key.clone()),
            }
        }
        let uid = ResourceKey::Address(workload.uid.clone());
        let complete = self.policies_complete && self.provisional.get(&uid) != Some(&Provenance::Local);
        PolicySet { policies, missing, complete, version: self.version }
    }

    /// Services that workloads say they belong to, but that are not known: their endpoints wait.
    pub fn staged_services(&self) -> impl Iterator<Item = &Arc<str>> {
        self.endpoints.keys().filter(|key| !self.services.contains_key(*key))
    }

    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    pub fn policies(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.policies.values()
    }

    /// Whether a fact of `provenance` may replace or remove what is held under `key`.
    fn outranked(&self, key: &ResourceKey, provenance: Provenance) -> bool {
        let held = match key {
            ResourceKey::Address(key) => self.workloads.contains_key(key) || self.services.contains_key(key),
            ResourceKey::Policy(key) => self.policies.contains_key(key),
        };
        !held || self.provisional.get(key).copied().unwrap_or(Provenance::Xds) <= provenance
    }

    fn removable(&self, key: &ResourceKey, provenance: Provenance) -> bool {
        let is_static = self.provisional.get(key) == Some(&Provenance::Static);
        self.outranked(key, provenance) && (!is_static || provenance == Provenance::Static)
    }

    /// True when a service with ranges changed.
    fn insert(&mut self, resource: Resource) -> bool {
        match resource {
            Resource::Policy(policy) => self.insert_policy(policy),
            Resource::Service(service) => return self.insert_service(service),
            Resource::Workload(workload) => self.insert_workload(workload),
        }
        false
    }

    fn remove(&mut self, key: &ResourceKey) -> bool {
        self.provisional.remove_mut(key);
        match key {
            ResourceKey::Policy(key) => self.remove_policy(key),
            ResourceKey::Address(key) if self.workloads.contains_key(key) => self.remove_workload(key),
            ResourceKey::Address(key) => return self.remove_service(key),
        }
        false
    }

    fn insert_workload(&mut self, workload: Arc<Workload>) {
        if workload.network_mode != NetworkMode::HostNetwork {
            for address in addresses(&workload) {
                add(&mut self.workloads_by_address, address, &workload, address_rank);
            }
        }
        add(&mut self.workloads_by_name, key(&workload.namespace, &workload.name), &workload, uid);
        if !workload.hostname.is_empty() {
            add(&mut self.workloads_by_hostname, key(&workload.namespace, &workload.hostname), &workload, uid);
        }
        for service in workload.services.keys() {
            sorted_insert(&mut self.endpoints, service, workload.uid.clone(), &workload);
        }
        self.count_identity(&workload, 1);
        self.workloads.insert_mut(workload.uid.clone(), workload);
    }

    fn remove_workload(&mut self, uid: &str) {
        let Some(workload) = self.workloads.get(uid).cloned() else { return };
        for address in addresses(&workload) {
            discard(&mut self.workloads_by_address, &address, &workload);
        }
        discard(&mut self.workloads_by_name, &key(&workload.namespace, &workload.name), &workload);
        discard(&mut self.workloads_by_hostname, &key(&workload.namespace, &workload.hostname), &workload);
        for service in workload.services.keys() {
            sorted_remove(&mut self.endpoints, service, uid);
        }
        self.count_identity(&workload, -1);
        self.workloads.remove_mut(uid);
    }

    fn count_identity(&mut self, workload: &Workload, change: isize) {
        let key = (workload.node.clone(), workload.identity());
        match self.identities.get(&key).copied().unwrap_or(0).saturating_add_signed(change) {
            0 => drop(self.identities.remove_mut(&key)),
            count => self.identities.insert_mut(key, count),
        }
    }

    fn insert_service(&mut self, service: Arc<Service>) -> bool {
        let key = service.key();
        for vip in &service.vips {
            add(&mut self.services_by_vip, vip.clone(), &service, Service::key);
        }
        add(&mut self.services_by_hostname, service.hostname.clone(), &service, Service::key);
        let has_ranges = !service.cidr_vips.is_empty();
        if has_ranges {
            self.cidr_services.insert_mut(key.clone(), service.clone());
        }
        self.services.insert_mut(key, service);
        has_ranges
    }

    fn remove_service(&mut self, key: &str) -> bool {
        let Some(service) = self.services.get(key).cloned() else { return false };
        for vip in &service.vips {
            discard(&mut self.services_by_vip, vip, &service);
        }
        discard(&mut self.services_by_hostname, &service.hostname, &service);
        self.services.remove_mut(key);
        self.cidr_services.remove_mut(key)
    }

    fn insert_policy(&mut self, policy: Arc<Policy>) {
        let key = policy.key();
        if let Some(scope) = scope_key(&policy) {
            sorted_insert(&mut self.policies_by_scope, &scope, key.clone(), &policy);
        }
        self.policies.insert_mut(key, policy);
    }

    fn remove_policy(&mut self, key: &str) {
        let Some(policy) = self.policies.get(key).cloned() else { return };
        if let Some(scope) = scope_key(&policy) {
            sorted_remove(&mut self.policies_by_scope, &scope, key);
        }
        self.policies.remove_mut(key);
    }
}

fn map<K: Eq + Hash, V>() -> Map<K, V> {
    Map::new_with_hasher_and_ptr_kind(RandomState::default())
}

fn key(namespace: &str, name: &str) -> Arc<str> {
    format!("{namespace}/{name}").into()
}

fn uid(workload: &Workload) -> Arc<str> {
    workload.uid.clone()
}

/// Orders the workloads of one address.
fn address_rank(workload: &Workload) -> (bool, bool, Arc<str>) {
    (!workload.uid.contains("//Pod/"), workload.tunnel_protocol != TunnelProtocol::Hbone, workload.uid.clone())
}

fn addresses(workload: &Workload) -> impl Iterator<Item = NetworkAddress> {
    workload.addresses.iter().map(|&ip| NetworkAddress::new(workload.network.clone(), ip))
}

/// Among the services of one key that the client may see: its own namespace's, then the canonical, then the smallest key.
fn best<'a>(services: &'a [Arc<Service>], client_namespace: &str) -> Option<&'a Arc<Service>> {
    let visible = services.iter().filter(|s| s.is_visible_to(client_namespace));
    visible.min_by_key(|s| s.rank_for(client_namespace))
}

fn scope_key(policy: &Policy) -> Option<Arc<str>> {
    match policy.scope {
        Scope::Global => Some("".into()),
        Scope::Namespace => Some(policy.namespace.clone()),
        Scope::WorkloadSelector => None,
    }
}

fn add<K: Eq + Hash + Clone, V, R: Ord>(map: &mut Map<K, Bucket<V>>, key: K, item: &Arc<V>, rank: fn(&V) -> R) {
    let mut bucket = map.get(&key).cloned().unwrap_or_default();
    if bucket.iter().any(|other| Arc::ptr_eq(other, item)) {
        return; // the key is listed twice
    }
    let position = bucket.partition_point(|other| rank(other) <= rank(item));
    bucket.insert(position, item.clone());
    map.insert_mut(key, bucket);
}

fn discard<K, Q, V>(map: &mut Map<K, Bucket<V>>, key: &Q, item: &Arc<V>)
where
    K: Eq + Hash + Clone + Borrow<Q>,
    Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
{
    let Some(mut bucket) = map.get(key).cloned() else { return };
    bucket.retain(|other| !Arc::ptr_eq(other, item));
    if bucket.is_empty() {
        map.remove_mut(key);
    } else {
        map.insert_mut(key.to_owned(), bucket);
    }
}

fn sorted_insert<V>(map: &mut Map<Arc<str>, Sorted<V>>, outer: &Arc<str>, inner: Arc<str>, item: &Arc<V>) {
    let mut sorted = map.get(outer).cloned().unwrap_or_else(Sorted::new_sync);
    sorted.insert_mut(inner, item.clone());
    map.insert_mut(outer.clone(), sorted);
}

fn sorted_remove<V>(map: &mut Map<Arc<str>, Sorted<V>>, outer: &Arc<str>, inner: &str) {
    let Some(mut sorted) = map.get(outer).cloned() else { return };
    sorted.remove_mut(inner);
    if sorted.is_empty() {
        map.remove_mut(outer);
    } else {
        map.insert_mut(outer.clone(), sorted);
    }
}

fn cidr_tries(services: &Sorted<Service>) -> Map<Arc<str>, Arc<CidrTrie>> {
    let mut tries: BTreeMap<Arc<str>, CidrTrie> = BTreeMap::new();
    for service in services.values() {
        for (network, range) in &service.cidr_vips {
            let trie = tries.entry(network.clone()).or_default();
            let bucket = trie.entry(range.trunc()).or_default();
            if !bucket.iter().any(|other| Arc::ptr_eq(other, service)) {
                bucket.push(service.clone());
            }
        }
    }
    let mut shared = map();
    for (network, trie) in tries {
        shared.insert_mut(network, Arc::new(trie));
    }
    shared
}

#[cfg(test)]
mod tests;
