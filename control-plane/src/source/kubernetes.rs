//! A Kubernetes API server as the source of objects.
//!
//! One watch for each kind; each object is trimmed where it arrives. [`Objects`] puts together what they tell, without I/O.

mod received;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use kube::{Api, Client, api::ApiResource};
use tokio::{sync::mpsc, task::JoinSet, time::Instant};

use super::{Catalogue, ObjectChange};
use crate::{
    apiserver::{
        listed::Unlisted,
        watch::{self, Event},
    },
    objects::{Kind, ObjectKey, Read, Settings, Status, mesh_config},
    problem::{Place, Problem},
};
pub(crate) use received::Received;

/// Events of each queue that wait to be looked at; watches pause beyond that.
const QUEUE: usize = 1024;

/// A kind, and where the API server has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Watched {
    pub(crate) kind: Kind,
    group: &'static str,
    version: &'static str,
    plural: &'static str,
}

/// Kinds without which pods are not reached come first. What a node agent has done for a pod is an annotation here, and accounts say
/// nothing that tokens do not.
const WATCHED: [Watched; 11] = [
    of(Kind::Pod, "", "v1", "pods"),
    of(Kind::EndpointSlice, "discovery.k8s.io", "v1", "endpointslices"),
    of(Kind::Service, "", "v1", "services"),
    of(Kind::Node, "", "v1", "nodes"),
    of(Kind::Namespace, "", "v1", "namespaces"),
    of(Kind::ConfigMap, "", "v1", "configmaps"),
    of(Kind::AuthorizationPolicy, "security.istio.io", "v1", "authorizationpolicies"),
    of(Kind::PeerAuthentication, "security.istio.io", "v1", "peerauthentications"),
    of(Kind::ServiceEntry, "networking.istio.io", "v1", "serviceentries"),
    of(Kind::WorkloadEntry, "networking.istio.io", "v1", "workloadentries"),
    of(Kind::Gateway, "gateway.networking.k8s.io", "v1", "gateways"),
];

const fn of(kind: Kind, group: &'static str, version: &'static str, plural: &'static str) -> Watched {
    Watched { kind, group, version, plural }
}

impl Watched {
    /// Of a kind that is watched.
    pub(crate) fn of(kind: Kind) -> Option<Self> {
        WATCHED.into_iter().find(|watched| watched.kind == kind)
    }

    /// By the names the API server has for it.
    pub(crate) fn named(group: &str, kind: &str) -> Option<Self> {
        WATCHED.into_iter().find(|watched| watched.group == group && watched.kind.name() == kind)
    }

    /// For requests about single objects.
    pub(crate) fn resource(&self) -> ApiResource {
        ApiResource {
            group: self.group.to_owned(),
            version: self.version.to_owned(),
            api_version: self.api_version(),
            kind: self.kind.name().to_owned(),
            plural: self.plural.to_owned(),
        }
    }

    fn api_version(&self) -> String {
        match self.group {
            "" => self.version.to_owned(),
            group => format!("{group}/{}", self.version),
        }
    }

    /// A pod that stops serving must not wait for anything else.
    fn is_urgent(&self) -> bool {
        matches!(self.kind, Kind::Pod | Kind::EndpointSlice)
    }
}

/// Without objects of it more would be allowed.
const fn is_policy(kind: Kind) -> bool {
    matches!(kind, Kind::AuthorizationPolicy | Kind::PeerAuthentication)
}

/// Without objects of it traffic would go around what it is to pass, or in clear: a waypoint, a registry, a tunnel.
const fn restricts(kind: Kind) -> bool {
    is_policy(kind) || matches!(kind, Kind::Gateway | Kind::ServiceEntry | Kind::WorkloadEntry)
}

/// What a watch told of a kind.
#[derive(Debug)]
pub(crate) struct Told {
    kind: Kind,
    news: News,
    pub(crate) at: Instant,
}

#[derive(Debug)]
enum News {
    Listing,
    /// By its name, like `Pod demo/client`.
    Set(Arc<str>, Read),
    Listed,
    Gone(Arc<str>),
    Unknown,
    Unserved(String),
    Failing(String),
    Recovered,
}

/// What the watches tell; each kind's events are in order.
pub(crate) struct Feed {
    pub(crate) urgent: mpsc::Receiver<Told>,
    pub(crate) other: mpsc::Receiver<Told>,
    /// Ends with the feed.
    _watches: JoinSet<()>,
}

impl Feed {
    /// Starts watching. Must be called within a tokio runtime.
    pub(crate) fn start(client: &Client, settings: &Settings) -> Self {
        let ((to_urgent, urgent), (to_other, other)) = (mpsc::channel(QUEUE), mpsc::channel(QUEUE));
        let mut watches = JoinSet::new();
        for watched in WATCHED {
            let sender = if watched.is_urgent() { &to_urgent } else { &to_other };
            watches.spawn(feed(client.clone(), watched, settings.clone(), sender.clone()));
        }
        Self { urgent, other, _watches: watches }
    }
}

async fn feed(client: Client, watched: Watched, settings: Settings, sender: mpsc::Sender<Told>) {
    let (api, fields) = match watched.kind {
        Kind::ConfigMap => (
            Api::namespaced_with(client, &settings.root_namespace, &watched),
            format!("metadata.name={}", mesh_config::NAME),
        ),
        _ => (Api::all_with(client, &watched), String::new()),
    };
    let tell = |event: Event<Received>| {
        let news = match event {
            Event::Listing => News::Listing,
            Event::Set(object) => {
                let name: Arc<str> = object.key(&watched).to_string().into();
                let read = object.read(&name, &watched, &settings);
                News::Set(name, read)
            }
            Event::Listed => News::Listed,
            Event::Gone(object) => News::Gone(object.key(&watched).to_string().into()),
            Event::Unknown => News::Unknown,
            Event::Unserved(why) => News::Unserved(why),
            Event::Failing(why) => News::Failing(why),
            Event::Recovered => News::Recovered,
        };
        Told { kind: watched.kind, news, at: Instant::now() }
    };
    let doubted = restricts(watched.kind).then(|| watched.resource());
    watch::watch(api, &fields, doubted, sender, tell).await;
}

/// What came of an event, for logs and metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    Failed(Kind, String),
    Recovered(Kind),
    /// For the first time in a row.
    Unknown(Kind),
}

/// Everything the watches told so far.
#[derive(Debug)]
pub(crate) struct Objects {
    catalogue: Catalogue,
    standings: BTreeMap<Kind, Standing>,
    /// By name.
    stated: BTreeMap<Arc<str>, Stated>,
    /// Of which something changed since they were last asked for.
    restated: BTreeSet<ObjectKey>,
}

/// An object that is told what came of it.
#[derive(Debug)]
pub(crate) struct Stated {
    key: ObjectKey,
    /// What it is told now.
    pub(crate) status: Status,
    /// As it is written, it is not in force.
    pub(crate) rejected: bool,
}

#[derive(Debug, Default)]
struct Standing {
    /// Was listed whole once, or is known not to exist.
    complete: bool,
    unknown: bool,
    unlisted: Unlisted<Arc<str>>,
    failing: Option<Problem>,
}

impl Objects {
    pub(crate) fn new(settings: Settings) -> Self {
        let standings = WATCHED.iter().map(|watched| (watched.kind, Standing::default())).collect();
        let (stated, restated) = Default::default();
        Self { catalogue: Catalogue::new(settings), standings, stated, restated }
    }

    pub(crate) fn on(&mut self, told: Told) -> Option<Turn> {
        let Told { kind, news, .. } = told;
        let Self { catalogue, standings, .. } = self;
        let standing = standings.entry(kind).or_default();
        match news {
            News::Listing => standing.unlisted.begin(names(catalogue, kind)),
            News::Set(name, read) => {
                standing.unlisted.named(&name);
                self.set(name, read);
            }
            News::Listed => {
                let gone = standing.unlisted.end();
                (standing.complete, standing.unknown) = (true, false);
                gone.iter().for_each(|name| self.remove(name));
            }
            News::Gone(name) => self.remove(&name),
            News::Unknown => {
                standing.unlisted = Unlisted::default();
                standing.complete = true;
                standing.failing = None;
                let is_news = !std::mem::replace(&mut standing.unknown, true);
                names(catalogue, kind).iter().for_each(|name| self.remove(name));
                return is_news.then_some(Turn::Unknown(kind));
            }
            News::Unserved(why) => {
                standing.failing = Some(unserved(kind, why.clone()));
                return Some(Turn::Failed(kind, why));
            }
            News::Failing(why) => {
                standing.failing = Some(unwatched(kind));
                return Some(Turn::Failed(kind, why));
            }
            News::Recovered => {
                standing.failing = None;
                return Some(Turn::Recovered(kind));
            }
        }
        None
    }

    fn set(&mut self, name: Arc<str>, mut read: Read) {
        for (key, status) in std::mem::take(&mut read.statuses) {
            let rejected = read.rejected.iter().any(|(other, _)| *other == key);
            self.restated.insert(key.clone());
            self.stated.insert(name.clone(), Stated { key, status, rejected });
        }
        self.catalogue.set(&name, read);
    }

    fn remove(&mut self, name: &Arc<str>) {
        self.catalogue.remove(name);
        self.restated.extend(self.stated.remove(name).map(|stated| stated.key));
    }

    /// Objects that were told, or say, something else since the last call.
    pub(crate) fn take_restated(&mut self) -> BTreeSet<ObjectKey> {
        std::mem::take(&mut self.restated)
    }

    /// What an object is told now, and what is wrong with it.
    pub(crate) fn stated(&self, key: &ObjectKey) -> Option<(&Stated, &[Problem])> {
        let name = key.to_string();
        Some((self.stated.get(&*name)?, self.catalogue.problems_of(&name)))
    }

    /// What changed since the last call.
    pub(crate) fn changes(&mut self) -> Vec<ObjectChange> {
        self.catalogue.changes()
    }

    /// Kinds that have not been listed whole yet.
    pub(crate) fn awaited(&self) -> impl Iterator<Item = Kind> {
        self.standings.iter().filter(|(_, standing)| !standing.complete).map(|(kind, _)| *kind)
    }

    /// What is wrong with the configuration.
    pub(crate) fn problems(&self) -> Vec<Problem> {
        let unknown = self.standings.iter().filter(|(kind, standing)| standing.unknown && is_policy(**kind));
        let mut problems: Vec<Problem> = unknown.map(|(kind, _)| undefined(*kind)).collect();
        problems.extend(self.catalogue.problems());
        problems
    }

    /// What is wrong with the way to it.
    pub(crate) fn watch_problems(&self) -> Vec<Problem> {
        self.standings.values().filter_map(|standing| standing.failing.clone()).collect()
    }

    pub(crate) fn len(&self) -> usize {
        self.catalogue.len()
    }
}

/// Of all documents of a kind.
fn names(catalogue: &Catalogue, kind: Kind) -> BTreeSet<Arc<str>> {
    catalogue.documents_of(&format!("{} ", kind.name())).cloned().collect()
}

fn unwatched(kind: Kind) -> Problem {
    let message = "the API server cannot be watched".to_owned();
    of_all(kind, message, "see the log for why; what was last read stays in force")
}

fn unserved(kind: Kind, message: String) -> Problem {
    of_all(kind, message, "until then what was last read stays in force, and a start waits")
}

fn undefined(kind: Kind) -> Problem {
    let message = "the API server does not know this kind: no such policy can be in force".to_owned();
    of_all(kind, message, "install its definition (`crds.enabled` of the chart, or `fairwayd definitions`)")
}

fn of_all(kind: Kind, message: String, remedy: &str) -> Problem {
    let place = Place::object(&format!("{} (all)", kind.name()).into());
    Problem { place, field: String::new(), message, remedy: remedy.to_owned() }
}

/// An object as a watch tells of it, for tests.
#[cfg(test)]
pub(crate) fn received(object: serde_json::Value, settings: &Settings) -> Told {
    let watched =
        WATCHED.into_iter().find(|watched| object["kind"] == watched.kind.name()).expect("a kind that is watched");
    let received: Received = serde_json::from_value(object).expect("an object");
    let name: Arc<str> = received.key(&watched).to_string().into();
    let read = received.read(&name, &watched, settings);
    Told { kind: watched.kind, news: News::Set(name, read), at: Instant::now() }
}

#[cfg(test)]
mod tests;
