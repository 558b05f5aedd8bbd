//! PeerAuthentication → policies that deny peers without an identity.
//!
//! Levels: mesh (root namespace, no selector), namespace (no selector), workload (selector; not in the root namespace). At each level
//! the oldest one counts; an unset mode inherits. Every strict PeerAuthentication becomes a policy of its own, so that a denial names
//! the object that caused it. A workload lists exactly one of them: two could not express an exception.

use std::sync::Arc;

use mesh_core::{
    origin::Origin,
    policy::{Action, Clause, Match, Policy, Rule, Scope, StringMatch},
};

use super::{ClusterIndex, matches};
use crate::objects::{Labels, ObjectKey, PeerAuthentication};

impl ClusterIndex {
    /// The policy a PeerAuthentication converts to, if there is anything to deny.
    pub(super) fn converted(&self, key: &ObjectKey, peer: &PeerAuthentication) -> Option<Policy> {
        let rules = match (peer.selector.is_empty(), key.namespace == self.settings.root_namespace) {
            (true, _) => self.simple(peer),
            (false, true) => Vec::new(),
            (false, false) => self.with_ports(key, peer),
        };
        (!rules.is_empty()).then(|| Policy {
            // The underscore keeps clear of users' own names.
            name: format!("converted_peer_authentication_{}", key.name).into(),
            namespace: key.namespace.clone(),
            scope: Scope::WorkloadSelector,
            action: Action::Deny,
            rules,
            dry_run: false,
            origin: peer.origin.clone(),
        })
    }

    fn simple(&self, peer: &PeerAuthentication) -> Vec<Rule> {
        (peer.strict == Some(true)).then(|| rule(Vec::new(), &peer.origin)).into_iter().collect()
    }

    fn with_ports(&self, key: &ObjectKey, peer: &PeerAuthentication) -> Vec<Rule> {
        let strict = peer.strict.unwrap_or_else(|| self.inherited(&key.namespace).is_some());
        let different: Vec<(u16, &Origin)> = peer
            .ports
            .iter()
            .filter(|(_, (port_strict, _))| *port_strict != strict)
            .map(|(p, (_, o))| (*p, o))
            .collect();
        match (strict, different.is_empty()) {
            (true, true) => self.simple(peer),
            (true, false) => {
                let except = |(port, _)| Match { not_destination_ports: vec![port], ..Match::default() };
                vec![rule(different.into_iter().map(except).collect(), &peer.origin)]
            }
            (false, _) => {
                let only = |port| Match { destination_ports: vec![port], ..Match::default() };
                different.into_iter().map(|(port, origin)| rule(vec![only(port)], origin)).collect()
            }
        }
    }

    /// Key of the policy that enforces strict mode for a workload, if any does.
    pub(super) fn strict_policy(&self, namespace: &Arc<str>, labels: &Labels) -> Option<Arc<str>> {
        let is_root = *namespace == self.settings.root_namespace;
        let own =
            self.oldest(namespace, |peer| !is_root && !peer.selector.is_empty() && matches(&peer.selector, labels));
        let Some((key, peer)) = own else { return self.inherited(namespace) };
        match self.converted(key, peer) {
            Some(policy) => Some(policy.key()),
            None => self.inherited(namespace).filter(|_| peer.strict.is_none()),
        }
    }

    /// Key of the policy that makes a namespace strict as a whole.
    fn inherited(&self, namespace: &Arc<str>) -> Option<Arc<str>> {
        let levels = [namespace, &self.settings.root_namespace];
        let (key, peer) = levels
            .iter()
            .filter_map(|level| self.oldest(level, |peer| peer.selector.is_empty()))
            .find(|(_, peer)| peer.strict.is_some())?;
        self.converted(key, peer).map(|policy| policy.key())
    }

    fn oldest(
        &self,
        namespace: &Arc<str>,
        applies: impl Fn(&PeerAuthentication) -> bool,
    ) -> Option<(&ObjectKey, &PeerAuthentication)> {
        let applying = self.peer_authentications(namespace).filter(|(_, peer)| applies(peer));
        // RFC 3339 times in UTC sort as text; without a time the name decides.
        applying.min_by_key(|(key, peer)| (peer.created.clone(), key.name.clone()))
    }
}

/// Denies a peer without identity where all of `also` hold.
fn rule(also: Vec<Match>, origin: &Origin) -> Rule {
    let plaintext = Match { not_principals: vec![StringMatch::Presence], ..Match::default() };
    let clauses = std::iter::once(plaintext).chain(also).map(|m| Clause { matches: vec![m] }).collect();
    Rule { clauses, origin: origin.clone() }
}
