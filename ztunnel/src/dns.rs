//! DNS for a pod's applications: names of the mesh are answered here, everything else is relayed byte for byte to whom the application
//! asked, from inside the pod.
//!
//! In reading order: what a query is ([`message`]), what becomes of it (`decide`), who is asked instead of us ([`nameservers`], `relay`),
//! and the two transports (`datagrams`, `streams`). Nothing is cached: answers of the mesh are a lookup in memory, and what is relayed is
//! the nameserver's and the application's business.

use std::{
    cell::{Cell, RefCell},
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use mesh_core::{
    index::Index,
    names::{self, Answer, Family},
    workload::Workload,
};
use mesh_net::{NetNs, conntrack::Conntrack};

use crate::{config::Config, pods::PodContext};

pub mod message;
pub mod nameservers;

pub(crate) mod metrics;

mod decide;
mod relay;

pub(crate) mod datagrams;
pub(crate) mod streams;

/// What a query may take, whoever answers it; then it is answered SERVFAIL. Clients ask again after as long.
const DEADLINE: Duration = Duration::from_secs(5);
/// Of one pod on one worker, at once; more are refused. Queries that are relayed have a bound of their own, and so have TCP clients: a
/// nameserver that is dead, or clients that say nothing, must not keep names of the mesh from being answered.
const QUERIES: usize = 4096;
const RELAYS: usize = 512;
const CLIENTS: usize = 512;

/// What the queries of one pod on one worker share.
pub(crate) struct Desk {
    /// Where the pod's DNS is served: never to be relayed to.
    own: Arc<[SocketAddr]>,
    /// What the resolvers of the pod's applications append to names.
    search: Vec<Arc<str>>,
    queries: Cell<usize>,
    relays: Cell<usize>,
    clients: Cell<usize>,
    /// Knows where redirected datagrams were sent; only where they are received, in a namespace of the pod's own.
    tracked: RefCell<Option<Conntrack>>,
}

impl Desk {
    /// How many are taken, and how many there are.
    fn places(&self, place: Place) -> (&Cell<usize>, usize) {
        match place {
            Place::Client => (&self.clients, CLIENTS),
            Place::Query => (&self.queries, QUERIES),
            Place::Relay => (&self.relays, RELAYS),
        }
    }

    /// `netns`: where datagrams are received that may have been redirected.
    pub(crate) fn new(config: &Config, namespace: &str, netns: Option<&NetNs>, own: Arc<[SocketAddr]>) -> Self {
        let search = search_of(config, namespace);
        let tracked = netns.filter(|_| !own.is_empty()).and_then(|ns| {
            let opened = Conntrack::in_ns(ns);
            opened.inspect_err(|error| tracing::warn!(%error, "relayed queries go to this proxy's nameservers")).ok()
        });
        let (queries, relays, clients) = Default::default();
        Self { own, search, queries, relays, clients, tracked: RefCell::new(tracked) }
    }
}

/// What there is a bounded number of.
#[derive(Clone, Copy)]
enum Place {
    Client,
    Query,
    Relay,
}

/// One of them, taken.
struct Slot(Rc<PodContext>, Place);

impl Slot {
    fn take(pod: &Rc<PodContext>, place: Place) -> Option<Self> {
        let (taken, bound) = pod.dns.places(place);
        (taken.get() < bound).then(|| {
            taken.set(taken.get() + 1);
            Self(pod.clone(), place)
        })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let (taken, _) = self.0.dns.places(self.1);
        taken.set(taken.get() - 1);
    }
}

/// What the resolvers of a namespace's applications append to names.
pub(crate) fn search_of(config: &Config, namespace: &str) -> Vec<Arc<str>> {
    match config.is_shared() {
        true => names::kubernetes_search(namespace, &config.cluster_domain),
        false => config.dns.search.clone(),
    }
}

/// What the mesh says of a name an application of `workload` uses; `None` when it is not the mesh's. The name is lower case and without
/// the last dot.
pub(crate) fn resolve(pod: &PodContext, workload: &Workload, name: &str, family: Family) -> Option<Answer> {
    resolve_for(&pod.shared.config, &pod.shared.state.snapshot(), &pod.dns.search, workload, name, family)
}

/// [`resolve`] for a client whose resolver appends `search`.
pub(crate) fn resolve_for(
    config: &Config,
    index: &Index,
    search: &[Arc<str>],
    workload: &Workload,
    name: &str,
    family: Family,
) -> Option<Answer> {
    let client = names::Client {
        namespace: &workload.namespace,
        network: &workload.network,
        cluster_domain: &config.cluster_domain,
        search,
        preferred_namespace: config.dns.preferred_namespace.as_deref(),
    };
    let mut answer = names::resolve(index, &client, name, family)?;
    if family == Family::Ipv6 && !config.ipv6 {
        answer.addresses.clear();
    }
    Some(answer)
}

/// Whom to ask in place of us: whom the application meant to, or this proxy's nameservers. Never ourselves.
fn servers(pod: &PodContext, meant: Option<SocketAddr>) -> Vec<SocketAddr> {
    let foreign = |address: &SocketAddr| !pod.dns.own.contains(address);
    match meant.filter(foreign) {
        Some(meant) => vec![meant],
        None => pod.shared.config.dns.nameservers.iter().copied().filter(foreign).collect(),
    }
}
