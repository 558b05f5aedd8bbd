//! What is open in one pod on one worker, and the inbound part of it asked again whenever the pod's policies change.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use mesh_core::authorize::{Connection, Decision, PolicySet, authorize};
use serde::Serialize;

use crate::{
    dense::{Dense, Place, Placed},
    flow::{Direction, Flow},
};

/// Flows asked again before other tasks get their turn.
const BATCH: usize = 128;

/// How a connection is carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Protocol {
    /// In a tunnel inside a tunnel, through a network's gateway.
    #[serde(rename = "DOUBLEHBONE")]
    DoubleHbone,
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

impl ConnectionsDump {
    fn add(&mut self, flow: &Flow) {
        let protocol = match (flow.mutual_tls, &flow.beyond) {
            (_, Some(_)) => Protocol::DoubleHbone,
            (true, None) => Protocol::Hbone,
            (false, None) => Protocol::Tcp,
        };
        let src = flow.peer;
        match flow.direction {
            Direction::Inbound => {
                let original_dst = flow.host.as_deref().map(str::to_owned);
                self.inbound.push(InboundConnection { src, original_dst, actual_dst: flow.target, protocol });
            }
            Direction::Outbound => {
                let (original_dst, actual_dst) = (flow.target, flow.destination);
                self.outbound.push(OutboundConnection { src, original_dst, actual_dst, protocol });
            }
        }
    }
}

/// The live table. Locked for moments only, by its worker, and by whoever dumps it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Connections(Arc<Mutex<Dense<Arc<Entry>>>>);

/// A connection, and what policy has come to think of it. One per connection, shared by everyone who speaks of it.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) flow: Flow,
    verdict: Mutex<Verdict>,
    place: Place,
}

#[derive(Debug)]
enum Verdict {
    /// Nothing new. Whom to wake otherwise.
    Stands(Option<Waker>),
    /// Not told yet.
    Overturned(Box<Decision>),
    /// Nobody listens any more.
    Over,
}

impl Entry {
    pub(crate) fn new(flow: Flow) -> Arc<Self> {
        Arc::new(Self { flow, verdict: Mutex::new(Verdict::Stands(None)), place: Place::default() })
    }

    pub(crate) fn ask(&self, policies: &PolicySet) -> Decision {
        let connection = Connection {
            source_ip: self.flow.peer.ip(),
            source_identity: self.flow.peer_identity.as_deref(),
            destination: self.flow.target,
        };
        authorize(policies, &connection)
    }

    /// Whether the connection has to end now.
    fn cut_if_denied(&self, policies: &PolicySet) -> bool {
        let decision = self.ask(policies);
        if decision.is_allowed() {
            return false;
        }
        let mut verdict = self.verdict();
        match &mut *verdict {
            Verdict::Stands(waker) => {
                let waker = waker.take();
                *verdict = Verdict::Overturned(Box::new(decision));
                drop(verdict);
                waker.into_iter().for_each(Waker::wake);
                true
            }
            Verdict::Overturned(_) | Verdict::Over => false,
        }
    }

    fn verdict(&self) -> MutexGuard<'_, Verdict> {
        self.verdict.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Placed for Entry {
    fn place(&self) -> &Place {
        &self.place
    }
}

/// Keeps a connection in its table.
#[derive(Debug)]
pub(crate) struct Live {
    connections: Connections,
    entry: Arc<Entry>,
}

impl Live {
    /// Ready, once, with the decision that ended the connection.
    pub(crate) fn poll_denied(&self, cx: &Context<'_>) -> Poll<Box<Decision>> {
        // Nobody decides about what the pod's own applications do.
        if self.entry.flow.direction == Direction::Outbound {
            return Poll::Pending;
        }
        let mut verdict = self.entry.verdict();
        match std::mem::replace(&mut *verdict, Verdict::Over) {
            Verdict::Overturned(decision) => Poll::Ready(decision),
            Verdict::Over => Poll::Pending,
            Verdict::Stands(waker) => {
                let current = waker.filter(|waker| waker.will_wake(cx.waker()));
                *verdict = Verdict::Stands(Some(current.unwrap_or_else(|| cx.waker().clone())));
                Poll::Pending
            }
        }
    }

    /// The connection goes elsewhere.
    pub(crate) fn retarget(&mut self, entry: Arc<Entry>) {
        self.connections.table().replace(&self.entry, entry.clone());
        self.entry = entry;
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.connections.table().remove(&self.entry);
        *self.entry.verdict() = Verdict::Over;
    }
}

impl Connections {
    /// Register before the first decision, so that no policy change falls between the two.
    pub(crate) fn add(&self, entry: Arc<Entry>) -> Live {
        self.table().add(entry.clone());
        Live { connections: self.clone(), entry }
    }

    pub(crate) fn dump_into(&self, dump: &mut ConnectionsDump) {
        self.table().iter().for_each(|entry| dump.add(&entry.flow));
    }

    /// Cuts every inbound connection that `policies` deny; the others do not notice. Answers how many were cut.
    pub(crate) async fn reevaluate(&self, policies: &PolicySet) -> usize {
        let inbound = |entry: &&Arc<Entry>| entry.flow.direction == Direction::Inbound;
        let open: Vec<Arc<Entry>> = self.table().iter().filter(inbound).cloned().collect();
        let mut cut = 0;
        for batch in open.chunks(BATCH) {
            cut += batch.iter().filter(|entry| entry.cut_if_denied(policies)).count();
            tokio::task::yield_now().await;
        }
        cut
    }

    fn table(&self) -> MutexGuard<'_, Dense<Arc<Entry>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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
    use std::future::poll_fn;

    use mesh_core::{
        identity::Identity,
        origin::Origin,
        policy::{Action, Clause, Match, Policy, Rule, Scope, StringMatch},
    };

    use super::*;

    fn from(account: Option<&str>) -> Arc<Entry> {
        let flow = Flow::new(Direction::Inbound, ([10, 0, 0, 1], 4000).into(), ([10, 0, 0, 2], 80).into());
        let peer_identity = account.map(|sa| Identity::new("cluster.local", "demo", sa).into());
        Entry::new(Flow { peer_identity, ..flow })
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
        let (web, other) = (connections.add(from(Some("web"))), connections.add(from(Some("other"))));
        assert_eq!(connections.reevaluate(&policies(None)).await, 0);
        assert_eq!(connections.reevaluate(&policies(Some("web"))).await, 1);
        let decision = poll_fn(|cx| web.poll_denied(cx)).await;
        assert_eq!(decision.explanation, "explicitly denied by: demo/deny");
        assert_eq!(connections.reevaluate(&policies(Some("web"))).await, 0);
        for live in [&web, &other] {
            let cx = Context::from_waker(Waker::noop());
            assert!(live.poll_denied(&cx).is_pending(), "cut without cause, or twice");
        }
    }

    #[tokio::test]
    async fn whoever_waits_is_woken_by_a_cut() {
        let connections = Connections::default();
        let live = connections.add(from(Some("web")));
        let (decision, cut) = tokio::join!(poll_fn(|cx| live.poll_denied(cx)), async {
            connections.reevaluate(&policies(Some("web"))).await
        });
        assert_eq!((decision.is_allowed(), cut), (false, 1));
    }

    #[tokio::test]
    async fn one_that_ended_meanwhile_is_not_cut() {
        let connections = Connections::default();
        let (ended, entry) = (connections.add(from(Some("web"))), from(Some("web")));
        let gone = connections.add(entry.clone());
        drop(gone);
        assert!(!entry.cut_if_denied(&policies(Some("web"))));
        assert_eq!(connections.reevaluate(&policies(Some("web"))).await, 1);
        drop(ended);
    }

    #[test]
    fn a_connection_is_shown_where_it_goes_now_until_it_is_closed() {
        let (peer, dialled) = (([10, 0, 0, 1], 4000).into(), ([10, 96, 0, 1], 80).into());
        let to = |last| {
            let flow = Flow::new(Direction::Outbound, peer, ([10, 0, 0, last], 15008).into());
            Entry::new(Flow { target: dialled, mutual_tls: true, ..flow })
        };
        let connections = Connections::default();
        let mut live = connections.add(to(2));
        live.retarget(to(3));
        let mut dump = ConnectionsDump::default();
        connections.dump_into(&mut dump);
        let actual_dst = ([10, 0, 0, 3], 15008).into();
        let shown = OutboundConnection { src: peer, original_dst: dialled, actual_dst, protocol: Protocol::Hbone };
        assert_eq!(dump, ConnectionsDump { outbound: vec![shown], inbound: Vec::new() });
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
