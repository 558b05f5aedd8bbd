//! Equal values, held once: a mesh says the same few thousand names a million times.

use std::{collections::HashSet, fmt, hash::Hash, sync::Arc};

use foldhash::fast::RandomState;

use crate::workload::{Memberships, Workload};

/// Below this many values it is not worth looking for those that nobody else holds any more.
const FEW: usize = 1024;

/// Values that others hold too. One that nobody else holds is forgotten after a while; at any time there are at most twice as many as
/// were held by somebody when it was last looked.
pub struct Pool<T: ?Sized> {
    held: HashSet<Arc<T>, RandomState>,
    look_at: usize,
}

impl<T: ?Sized> Default for Pool<T> {
    fn default() -> Self {
        Self { held: HashSet::default(), look_at: FEW }
    }
}

/// The size only.
impl<T: ?Sized> fmt::Debug for Pool<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("held", &self.held.len()).finish_non_exhaustive()
    }
}

impl<T: ?Sized + Eq + Hash> Pool<T> {
    /// Replaces the value by the equal one that is held, or else holds it from now on.
    pub fn share(&mut self, value: &mut Arc<T>) {
        if let Some(held) = self.held.get(&**value) {
            *value = held.clone();
            return;
        }
        if self.held.len() >= self.look_at {
            self.held.retain(|held| Arc::strong_count(held) > 1);
            self.look_at = FEW.max(2 * self.held.len());
        }
        self.held.insert(value.clone());
    }

    /// The equal value that is held, from now on at the latest.
    pub fn shared(&mut self, value: &Arc<T>) -> Arc<T> {
        let mut value = value.clone();
        self.share(&mut value);
        value
    }
}

impl Workload {
    /// Has it hold what equal texts of other workloads hold. Its own names are left alone: nobody else has them.
    pub fn share(&mut self, texts: &mut Pool<str>) {
        let Self { namespace, service_account, trust_domain, network, cluster_id, node, hostname, .. } = self;
        let own = [namespace, service_account, trust_domain, network, cluster_id, node, hostname];
        let told = [&mut self.canonical_name, &mut self.canonical_revision, &mut self.workload_name];
        let locality = [&mut self.locality.region, &mut self.locality.zone, &mut self.locality.subzone];
        let all = own.into_iter().chain(told).chain(locality).chain(&mut self.authorization_policies);
        all.for_each(|text| texts.share(text));
        let mut services = std::mem::take(&mut self.services).into_tuple_vec();
        services.iter_mut().for_each(|(key, _)| texts.share(key));
        services.shrink_to_fit();
        // The keys are what they were, and so in order.
        self.services = Memberships::from_sorted_store_unchecked(services);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_values_become_one() {
        let mut pool = Pool::<str>::default();
        let (mut first, mut second): (Arc<str>, Arc<str>) = ("web".into(), "web".into());
        pool.share(&mut first);
        pool.share(&mut second);
        assert!(Arc::ptr_eq(&first, &second) && Arc::ptr_eq(&first, &pool.shared(&"web".into())));
    }

    #[test]
    fn what_nobody_holds_any_more_is_forgotten() {
        let mut pool = Pool::<str>::default();
        let mut kept: Arc<str> = "kept".into();
        pool.share(&mut kept);
        for n in 0..100 * FEW {
            pool.share(&mut n.to_string().into());
            assert!(pool.held.len() <= FEW + 1, "{n}");
        }
        let mut again: Arc<str> = "kept".into();
        pool.share(&mut again);
        assert!(Arc::ptr_eq(&kept, &again));
    }

    #[test]
    fn workloads_that_share_are_what_they_were() {
        let make = |name: &str| {
            let mut workload = Workload::new(format!("c//Pod/demo/{name}"), "demo", name);
            workload.services = [("demo/web.demo.svc".into(), Default::default())].into_iter().collect();
            workload.authorization_policies = vec!["demo/p".into()];
            workload
        };
        let mut texts = Pool::default();
        let (mut a, mut b) = (make("a"), make("b"));
        a.share(&mut texts);
        b.share(&mut texts);
        assert_eq!((&a, &b), (&make("a"), &make("b")));
        assert!(Arc::ptr_eq(&a.namespace, &b.namespace));
        let key = |workload: &Workload| workload.services.keys().next().cloned().unwrap();
        assert!(Arc::ptr_eq(&key(&a), &key(&b)));
        assert!(Arc::ptr_eq(&a.authorization_policies[0], &b.authorization_policies[0]));
    }
}
