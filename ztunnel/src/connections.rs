//! What is open in one pod on one worker, and the inbound part of it asked again whenever the pod's policies change.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use foldhash::{HashMap, HashMapExt};
use mesh_core::{
    authorize::{Connection, Decision, PolicySet, authorize},
    identity::Identity,
};
use serde::Serialize;
use tokio::sync::oneshot;

/// Flows asked again before other tasks get their turn.
const BATCH: usize = 128;

/// How a connection is carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Protocol {
    #[serde(rename = "HBONE")]
    Hbone,
    #[serde(rename = "TCP")]
    Tcp,
}

/// An open inbound connection, in the form of the configuration dump.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct InboundConnection {
    pub src: SocketAddr,
    /// The service name the client used, if it said.
    pub original_dst: Option<String>,
    pub actual_dst: SocketAddr,
    pub protocol: Protocol,
}

/// An open outbound connection, in the form of the configuration dump.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct OutboundConnection {
    pub src: SocketAddr,
    pub original_dst: SocketAddr,
    pub actual_dst: SocketAddr,
    pub protocol: Protocol,
}

/// What is open in one pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ConnectionsDump {
    pub inbound: Vec<InboundConnection>,
    pub outbound: Vec<OutboundConnection>,
}

/// The live table. Locked for moments only, by its worker, and by whoever dumps it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Connections(Arc<Mutex<Table>>);

#[derive(Debug)]
struct Table {
    next: u64,
    inbound: HashMap<u64, Inbound>,
    outbound: HashMap<u64, OutboundConnection>,
}

impl Default for Table {
    fn default() -> Self {
        Self { next: 0, inbound: HashMap::new(), outbound: HashMap::new() }
    }
}

/// What the decision about an inbound connection depends on, besides policies.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    pub(crate) source_ip: IpAddr,
    pub(crate) source_identity: Option<Identity>,
    pub(crate) destination: SocketAddr,
}

impl Facts {
    pub(crate) fn ask(&self, policies: &PolicySet) -> Decision {
        let source_identity = self.source_identity.as_ref();
        authorize(policies, &Connection { source_ip: self.source_ip, source_identity, destination: self.destination })
    }
}

#[derive(Debug)]
struct Inbound {
    shown: InboundConnection,
    facts: Facts,
    /// Taken when the connection is cut.
    cut: Option<oneshot::Sender<Decision>>,
}

/// Keeps a connection in its table.
#[derive(Debug)]
pub(crate) struct Live {
    connections: Connections,
    id: u64,
}

/// Resolves, if ever, with the decision that ended the connection.
#[derive(Debug)]
pub(crate) struct Cut(oneshot::Receiver<Decision>);

impl Cut {
    pub(crate) async fn denied(&mut self) -> Decision {
        match (&mut self.0).await {
            Ok(decision) => decision,
            // The entry is gone without a verdict: nobody can cut this connection any more.
            Err(_) => std::future::pending().await,
        }
    }
}

impl Connections {
    /// Registers before the first decision, so that no policy change falls between the two.
    pub(crate) fn inbound(&self, shown: InboundConnection, facts: Facts) -> (Live, Cut) {
        let (cut, told) = oneshot::channel();
        let live = self.insert(|table, id| {
            table.inbound.insert(id, Inbound { shown, facts, cut: Some(cut) });
        });
        (live, Cut(told))
    }

    pub(crate) fn outbound(&self, shown: OutboundConnection) -> Live {
        self.insert(|table, id| {
            table.outbound.insert(id, shown);
        })
    }

    pub(crate) fn dump_into(&self, dump: &mut ConnectionsDump) {
        let table = self.table();
        dump.inbound.extend(table.inbound.values().map(|inbound| inbound.shown.clone()));
        dump.outbound.extend(table.outbound.values().cloned());
    }

    /// Cuts every inbound connection that `policies` deny; the others do not notice. Answers how many were cut.
    pub(crate) async fn reevaluate(&self, policies: &PolicySet) -> usize {
        let ids: Vec<u64> = self.table().inbound.keys().copied().collect();
        let mut cut = 0;
        for batch in ids.chunks(BATCH) {
            cut += batch.iter().filter(|id| self.cut_if_denied(**id, policies)).count();
            tokio::task::yield_now().await;
        }
        cut
    }

    fn cut_if_denied(&self, id: u64, policies: &PolicySet) -> bool {
        let mut table = self.table();
        let Some(inbound) = table.inbound.get_mut(&id) else { return false };
        let decision = inbound.facts.ask(policies);
        if decision.is_allowed() {
            return false;
        }
        // A connection that ended by itself meanwhile does not listen any more.
        inbound.cut.take().is_some_and(|cut| cut.send(decision).is_ok())
    }

    fn insert(&self, put: impl FnOnce(&mut Table, u64)) -> Live {
        let mut table = self.table();
        let id = table.next;
        table.next += 1;
        put(&mut table, id);
        Live { connections: self.clone(), id }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        let mut table = self.connections.table();
        table.inbound.remove(&self.id);
        table.outbound.remove(&self.id);
    }
}

/// Whether two sets decide alike for certain, without comparing rules: the same objects in the same order.
pub(crate) fn same_policies(a: &PolicySet, b: &PolicySet) -> bool {
    let same_objects =
        a.policies.len() == b.policies.len() && a.policies.iter().zip(&b.policies).all(|(a, b)| Arc::ptr_eq(a, b));
    same_objects && a.missing == b.missing && a.complete == b.complete
}

#[cfg(test)]
mod tests {
    use mesh_core::{
        origin::Origin,
        policy::{Action, Clause, Match, Policy, Rule, Scope, StringMatch},
    };

    use super::*;

    fn facts(account: Option<&str>) -> Facts {
        Facts {
            source_ip: [10, 0, 0, 1].into(),
            source_identity: account.map(|sa| Identity::new("cluster.local", "demo", sa)),
            destination: ([10, 0, 0, 2], 80).into(),
        }
    }

    fn shown(facts: &Facts) -> InboundConnection {
        InboundConnection {
            src: SocketAddr::new(facts.source_ip, 4000),
            original_dst: None,
            actual_dst: facts.destination,
            protocol: Protocol::Hbone,
        }
    }

    /// Denies `account`; nobody when `None`.
    fn policies(account: Option<&str>) -> PolicySet {
        let deny = |account: &str| {
            let principals = vec![StringMatch::Exact(format!("cluster.local/ns/demo/sa/{account}").into())];
            let clauses = vec![Clause { matches: vec![Match { principals, ..Match::default() }] }];
            Arc::new(Policy {
                name: "deny".into(),
                namespace: "demo".into(),
                scope: Scope::Namespace,
                action: Action::Deny,
                rules: vec![Rule { clauses, origin: Origin::default() }],
                dry_run: false,
                origin: Origin::default(),
            })
        };
        PolicySet { policies: account.map(deny).into_iter().collect(), complete: true, ..PolicySet::default() }
    }

    #[tokio::test]
    async fn only_connections_whose_verdict_changed_are_cut_and_only_once() {
        let connections = Connections::default();
        let (web, other) = (facts(Some("web")), facts(Some("other")));
        let (_web, mut web_cut) = connections.inbound(shown(&web), web);
        let (_other, mut other_cut) = connections.inbound(shown(&other), other);
        assert_eq!(connections.reevaluate(&policies(None)).await, 0);
        assert_eq!(connections.reevaluate(&policies(Some("web"))).await, 1);
        assert_eq!(web_cut.denied().await.explanation, "explicitly denied by: demo/deny");
        assert_eq!(connections.reevaluate(&policies(Some("web"))).await, 0);
        tokio::select! {
            biased;
            decision = other_cut.denied() => panic!("cut without cause: {decision:?}"),
            () = std::future::ready(()) => {}
        }
    }

    #[tokio::test]
    async fn a_closed_connection_leaves_the_table() {
        let connections = Connections::default();
        let (live, _cut) = connections.inbound(shown(&facts(None)), facts(None));
        let mut dump = ConnectionsDump::default();
        connections.dump_into(&mut dump);
        assert_eq!(dump.inbound.len(), 1);
        drop(live);
        let mut dump = ConnectionsDump::default();
        connections.dump_into(&mut dump);
        assert_eq!(dump, ConnectionsDump::default());
    }

    #[test]
    fn sets_are_the_same_only_when_they_hold_the_same_objects() {
        let set = policies(Some("web"));
        assert!(same_policies(&set, &set.clone()));
        assert!(!same_policies(&set, &policies(Some("web"))), "equal rules, but another object: asked again");
        assert!(!same_policies(&set, &PolicySet { complete: false, ..set.clone() }));
    }
}
