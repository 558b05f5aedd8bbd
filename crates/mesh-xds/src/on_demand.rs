//! What an on-demand client has asked for by name, who waits for it, and what it got; without I/O.
//!
//! A name is an address (`network/ip`), a uid or `namespace/hostname`. The server answers under the primary name and lists the one asked
//! for among the aliases, or names it as removed when there is no such thing; either way the name stays subscribed, so that later
//! changes come unasked. At most [`MAX_NAMES`] answered names are kept: beyond, one is unsubscribed and what only it led to is
//! forgotten, to be asked for again at need. Names that lead to nothing give way first, since forgetting those changes no decision.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use proto::discovery::DeltaDiscoveryResponse;

/// Answered names kept subscribed. A node talks to far fewer peers; scans of foreign addresses are what fills it.
pub const MAX_NAMES: usize = 16_384;
/// Names asked for and not answered. More are refused rather than queued.
pub const MAX_PENDING: usize = 1_024;

/// `W` is whatever is woken by an answer.
#[derive(Debug)]
pub struct OnDemand<W> {
    names: HashMap<Arc<str>, Name<W>>,
    /// Primary name to the names asked for that led to it.
    led_by: HashMap<Arc<str>, BTreeSet<Arc<str>>>,
    /// Answered names in the order in which they give way.
    answered: BTreeSet<Rank>,
    /// Answers so far.
    answers: u64,
    max_names: usize,
}

#[derive(Debug)]
struct Name<W> {
    /// Which answer the first one to it was; `None` while there is none.
    answer: Option<u64>,
    waiters: Vec<W>,
    /// Primary names of the resources held by this name.
    leads_to: BTreeSet<Arc<str>>,
}

/// Scans of addresses that nobody has must not push out a pod's own record, which live connections are judged by: what leads to nothing
/// comes first, then the oldest.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    leads: bool,
    answer: u64,
    name: Arc<str>,
}

impl<W> Name<W> {
    fn rank(&self, name: &Arc<str>) -> Option<Rank> {
        Some(Rank { leads: !self.leads_to.is_empty(), answer: self.answer?, name: name.clone() })
    }
}

/// What to do about a wish.
#[derive(Debug, PartialEq, Eq)]
pub enum Wish<W> {
    /// The answer is here already.
    Known(W),
    /// Somebody asked before; woken together.
    Joined,
    /// To be sent as `resource_names_subscribe`.
    Subscribe,
    /// Too many names are waiting for an answer.
    Refused(W),
}

/// What an answer changes.
#[derive(Debug)]
pub struct Settled<W> {
    pub woken: Vec<W>,
    /// Names that give way, for `resource_names_unsubscribe`.
    pub unsubscribe: Vec<Arc<str>>,
    /// Resources that no name leads to any more, by primary name.
    pub forgotten: Vec<Arc<str>>,
}

impl<W> Default for OnDemand<W> {
    fn default() -> Self {
        Self::bounded(MAX_NAMES)
    }
}

impl<W> OnDemand<W> {
    fn bounded(max_names: usize) -> Self {
        Self { names: HashMap::new(), led_by: HashMap::new(), answered: BTreeSet::new(), answers: 0, max_names }
    }

    /// Somebody needs `name`. `is_gone` tells waiters that have given up, so that a server that never answers collects none.
    pub fn want(&mut self, name: Arc<str>, waiter: W, is_gone: impl Fn(&W) -> bool) -> Wish<W> {
        if let Some(known) = self.names.get_mut(&name) {
            if known.answer.is_some() {
                return Wish::Known(waiter);
            }
            known.waiters.retain(|waiter| !is_gone(waiter));
            known.waiters.push(waiter);
            return Wish::Joined;
        }
        if self.names.len() - self.answered.len() >= MAX_PENDING {
            return Wish::Refused(waiter);
        }
        self.names.insert(name, Name { answer: None, waiters: vec![waiter], leads_to: BTreeSet::new() });
        Wish::Subscribe
    }

    /// Every name asked for, for a new stream to subscribe to.
    pub fn names(&self) -> impl Iterator<Item = &Arc<str>> {
        self.names.keys()
    }

    /// Takes a response that has been applied.
    pub fn settle(&mut self, response: &DeltaDiscoveryResponse) -> Settled<W> {
        let mut settled = Settled { woken: Vec::new(), unsubscribe: Vec::new(), forgotten: Vec::new() };
        for resource in &response.resources {
            let primary: Arc<str> = resource.name.as_str().into();
            for asked in std::iter::once(&resource.name).chain(&resource.aliases) {
                self.answer(asked, Some(&primary), &mut settled);
            }
        }
        for removed in &response.removed_resources {
            for name in self.led_by.remove(removed.as_str()).into_iter().flatten() {
                self.change(&name, |name| name.leads_to.retain(|primary| **primary != *removed.as_str()));
            }
            self.answer(removed, None, &mut settled);
        }
        while self.answered.len() > self.max_names {
            self.give_way(&mut settled);
        }
        settled
    }

    fn answer(&mut self, asked: &str, primary: Option<&Arc<str>>, settled: &mut Settled<W>) {
        let Some((key, _)) = self.names.get_key_value(asked) else { return };
        let (key, answer) = (key.clone(), self.answers);
        if let Some(primary) = primary {
            self.led_by.entry(primary.clone()).or_default().insert(key.clone());
        }
        self.change(&key, |name| {
            settled.woken.append(&mut name.waiters);
            name.leads_to.extend(primary.cloned());
            name.answer.get_or_insert(answer);
        });
        self.answers += 1;
    }

    /// Changes a name and keeps its rank in step.
    fn change(&mut self, key: &Arc<str>, change: impl FnOnce(&mut Name<W>)) {
        let Some(name) = self.names.get_mut(key) else { return };
        if let Some(rank) = name.rank(key) {
            self.answered.remove(&rank);
        }
        change(name);
        self.answered.extend(name.rank(key));
    }

    fn give_way(&mut self, settled: &mut Settled<W>) {
        let Some(Rank { name: oldest, .. }) = self.answered.pop_first() else { return };
        let Some(name) = self.names.remove(&oldest) else { return };
        for primary in name.leads_to {
            let Some(names) = self.led_by.get_mut(&primary) else { continue };
            names.remove(&oldest);
            if names.is_empty() {
                self.led_by.remove(&primary);
                settled.forgotten.push(primary);
            }
        }
        settled.unsubscribe.push(oldest);
    }
}

#[cfg(test)]
mod tests {
    use proto::discovery::Resource;

    use super::*;

    fn answer(resources: &[(&str, &[&str])], removed: &[&str]) -> DeltaDiscoveryResponse {
        let own = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        let resource = |(name, aliases): &(&str, &[&str])| Resource {
            name: (*name).to_owned(),
            aliases: own(aliases),
            ..Resource::default()
        };
        DeltaDiscoveryResponse {
            resources: resources.iter().map(resource).collect(),
            removed_resources: own(removed),
            ..DeltaDiscoveryResponse::default()
        }
    }

    fn want(demand: &mut OnDemand<u32>, name: &str, waiter: u32) -> Wish<u32> {
        demand.want(name.into(), waiter, |_| false)
    }

    #[test]
    fn waiters_of_a_name_share_one_request_and_are_woken_by_its_alias() {
        let mut demand = OnDemand::default();
        assert_eq!(want(&mut demand, "/10.0.0.1", 1), Wish::Subscribe);
        assert_eq!(want(&mut demand, "/10.0.0.1", 2), Wish::Joined);
        assert!(demand.settle(&answer(&[("other", &["/10.0.0.2"])], &[])).woken.is_empty());
        assert_eq!(demand.settle(&answer(&[("uid", &["/10.0.0.1"])], &[])).woken, [1, 2]);
        assert_eq!(want(&mut demand, "/10.0.0.1", 3), Wish::Known(3));
    }

    #[test]
    fn a_removal_is_an_answer_too() {
        let mut demand = OnDemand::default();
        want(&mut demand, "ns/host", 1);
        assert_eq!(demand.settle(&answer(&[], &["ns/host"])).woken, [1]);
        assert_eq!(want(&mut demand, "ns/host", 2), Wish::Known(2));
    }

    #[test]
    fn who_gave_up_is_not_kept_and_too_many_names_are_refused() {
        let mut demand = OnDemand::default();
        for name in 0..MAX_PENDING {
            assert_eq!(want(&mut demand, &name.to_string(), 0), Wish::Subscribe);
        }
        assert_eq!(want(&mut demand, "one more", 7), Wish::Refused(7));
        assert_eq!(demand.want("0".into(), 9, |_| true), Wish::Joined);
        assert_eq!(demand.settle(&answer(&[("0", &[])], &[])).woken, [9]);
        assert_eq!(want(&mut demand, "one more", 7), Wish::Subscribe);
    }

    #[test]
    fn names_that_lead_to_nothing_give_way_before_any_that_decides() {
        let mut demand = OnDemand::bounded(2);
        let mut ask = |name: &str, answer: DeltaDiscoveryResponse| {
            want(&mut demand, name, 0);
            let Settled { unsubscribe, forgotten, .. } = demand.settle(&answer);
            (unsubscribe.iter().map(|n| n.to_string()).collect::<Vec<_>>(), forgotten.len())
        };
        assert_eq!(ask("own", answer(&[("own", &[])], &[])), (vec![], 0));
        assert_eq!(ask("/1", answer(&[], &["/1"])), (vec![], 0));
        assert_eq!(ask("/2", answer(&[], &["/2"])), (vec!["/1".to_owned()], 0));
        assert_eq!(ask("peer", answer(&[("peer", &[])], &[])), (vec!["/2".to_owned()], 0));
        assert_eq!(
            ask("/3", answer(&[], &["/3"])),
            (vec!["/3".to_owned()], 0),
            "rather not followed than in its place"
        );
        // Once its resource is gone, a name leads to nothing as well.
        assert_eq!(ask("/4", answer(&[("four", &["/4"])], &["peer"])), (vec!["peer".to_owned()], 0));
    }

    #[test]
    fn the_oldest_name_gives_way_and_takes_along_what_only_it_led_to() {
        let mut demand = OnDemand::bounded(2);
        for name in ["/1", "/2", "/3"] {
            want(&mut demand, name, 0);
        }
        demand.settle(&answer(&[("shared", &["/1", "/2"]), ("own", &["/1"])], &[]));
        let settled = demand.settle(&answer(&[("third", &["/3"])], &[]));
        assert_eq!((settled.unsubscribe, settled.forgotten), (vec!["/1".into()], vec!["own".into()]));
        let mut names: Vec<&str> = demand.names().map(|n| &**n).collect();
        names.sort_unstable();
        assert_eq!(names, ["/2", "/3"]);
    }
}
