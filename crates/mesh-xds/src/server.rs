//! The server: a cache of encoded resources, and per client a stream of what changed.
//!
//! The cache keeps each resource once, encoded, whatever the number of clients. A stream remembers only the sequence number up to
//! which it has sent; what changed since comes from the change log, so memory per client does not grow with the mesh. A client
//! that lags gets the merged difference, never a queue of updates. Dying endpoints overtake bulk ([`Lane::Urgent`]).

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use proto::{
    ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL,
    discovery::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource as WireResource,
        aggregated_discovery_service_server::{AggregatedDiscoveryService, AggregatedDiscoveryServiceServer},
    },
};
use rpds::HashTrieMapSync;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, metadata::MetadataMap};

use crate::{
    convert::Encoded,
    delta::{Asked, ServerType},
};

/// Changes remembered for incremental pushes; a client further behind is compared name by name.
const LOG: usize = 65_536;
/// Responses queued to a client's connection before its stream waits.
const RESPONSE_QUEUE: usize = 2;
/// Unanswered responses beyond which even urgent changes wait.
const MAX_OUTSTANDING: usize = 16;
/// Policies before the workloads that name them; see [`Session::push`] for removals.
const TYPES: [&str; 2] = [AUTHORIZATION_TYPE_URL, ADDRESS_TYPE_URL];

/// How soon a change must reach clients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lane {
    #[default]
    Bulk,
    /// Sent ahead of bulk, even while a client has not answered the previous response.
    Urgent,
}

/// A change of one resource.
#[derive(Clone, Debug)]
pub enum Change {
    Upsert { encoded: Encoded, lane: Lane },
    Remove { type_url: &'static str, name: Arc<str>, lane: Lane },
}

#[derive(Clone, Debug)]
struct Stored {
    version: Arc<str>,
    aliases: Arc<[Arc<str>]>,
    member_of: Arc<[Arc<str>]>,
    body: Bytes,
}

#[derive(Clone, Debug)]
struct Logged {
    sequence: u64,
    name: Arc<str>,
    lane: Lane,
}

#[derive(Debug, Default)]
struct TypeCache {
    resources: HashTrieMapSync<Arc<str>, Stored>,
    by_alias: HashMap<Arc<str>, BTreeSet<Arc<str>>>,
    /// Endpoints by the service's key.
    members: HashMap<Arc<str>, BTreeSet<Arc<str>>>,
    log: VecDeque<Logged>,
    /// Changes up to here are no longer in the log.
    trimmed: u64,
}

#[derive(Debug, Default)]
struct Inner {
    types: HashMap<&'static str, TypeCache>,
    sequence: u64,
}

/// Every resource there is, encoded. Share it by `Arc`.
#[derive(Debug)]
pub struct Cache {
    inner: Mutex<Inner>,
    changed: watch::Sender<u64>,
    ready: watch::Sender<bool>,
}

impl Default for Cache {
    fn default() -> Self {
        Self { inner: Mutex::default(), changed: watch::Sender::new(0), ready: watch::Sender::new(false) }
    }
}

impl Cache {
    pub fn new() -> Self {
        Self::default()
    }

    /// Applies changes as one step: no stream sees half of them. An upsert whose encoding is unchanged is no change. Returns how
    /// many were.
    pub fn publish(&self, changes: impl IntoIterator<Item = Change>) -> usize {
        let mut inner = self.lock();
        let count = changes.into_iter().filter(|change| inner.apply(change)).count();
        let sequence = inner.sequence;
        drop(inner);
        if count > 0 {
            self.changed.send_replace(sequence);
        }
        count
    }

    /// Streams are refused until the first full state has been published.
    pub fn set_ready(&self) {
        self.ready.send_replace(true);
    }

    pub fn is_ready(&self) -> bool {
        *self.ready.borrow()
    }

    /// Resources of a type.
    pub fn len(&self, type_url: &str) -> usize {
        self.lock().types.get(type_url).map_or(0, |t| t.resources.size())
    }

    pub fn is_empty(&self) -> bool {
        self.lock().types.values().all(|t| t.resources.is_empty())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Each change is applied whole before the next, so a panic elsewhere leaves nothing torn.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn apply(&mut self, change: &Change) -> bool {
        let next = self.sequence + 1;
        let (changed, type_url, name, lane) = match change {
            Change::Upsert { encoded, lane } => {
                let cache = self.types.entry(encoded.type_url).or_default();
                (cache.upsert(encoded), encoded.type_url, &encoded.name, *lane)
            }
            Change::Remove { type_url, name, lane } => {
                (self.types.entry(type_url).or_default().remove(name), *type_url, name, *lane)
            }
        };
        if changed {
            self.sequence = next;
            if let Some(cache) = self.types.get_mut(type_url) {
                cache.record(Logged { sequence: next, name: name.clone(), lane });
            }
        }
        changed
    }
}

impl TypeCache {
    fn upsert(&mut self, encoded: &Encoded) -> bool {
        if let Some(old) = self.resources.get(&encoded.name) {
            if old.body == encoded.body {
                return false;
            }
            let old = old.clone();
            self.unlink(&encoded.name, &old);
        }
        for alias in &encoded.aliases {
            self.by_alias.entry(alias.clone()).or_default().insert(encoded.name.clone());
        }
        for service in &encoded.member_of {
            self.members.entry(service.clone()).or_default().insert(encoded.name.clone());
        }
        let stored = Stored {
            version: version_of(&encoded.body),
            aliases: encoded.aliases.as_slice().into(),
            member_of: encoded.member_of.as_slice().into(),
            body: encoded.body.clone(),
        };
        self.resources.insert_mut(encoded.name.clone(), stored);
        true
    }

    fn remove(&mut self, name: &Arc<str>) -> bool {
        let Some(old) = self.resources.get(name).cloned() else { return false };
        self.unlink(name, &old);
        self.resources.remove_mut(name)
    }

    fn unlink(&mut self, name: &Arc<str>, old: &Stored) {
        unlist(&mut self.by_alias, &old.aliases, name);
        unlist(&mut self.members, &old.member_of, name);
    }

    fn record(&mut self, entry: Logged) {
        self.log.push_back(entry);
        if self.log.len() > LOG
            && let Some(old) = self.log.pop_front()
        {
            self.trimmed = old.sequence;
        }
    }

    /// What a subscription by name means: a primary name, or every resource with that alias.
    fn resolve(&self, name: &str) -> Vec<Arc<str>> {
        if let Some((name, _)) = self.resources.get_key_value(name) {
            return vec![name.clone()];
        }
        self.by_alias.get(name).into_iter().flatten().cloned().collect()
    }
}

fn unlist(lists: &mut HashMap<Arc<str>, BTreeSet<Arc<str>>>, keys: &[Arc<str>], name: &Arc<str>) {
    for key in keys {
        if let Some(names) = lists.get_mut(key) {
            names.remove(name);
            if names.is_empty() {
                lists.remove(key);
            }
        }
    }
}

/// A content hash in 32 characters, so that a restarted server recognises what its clients already hold. Not against forgery.
pub fn version_of(body: &[u8]) -> Arc<str> {
    // FNV-1a over 128 bits: stable across builds and processes, which the standard hashers do not promise.
    let hash = body.iter().fold(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d_u128, |hash, byte| {
        (hash ^ u128::from(*byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b)
    });
    format!("{hash:032x}").into()
}

/// Who a client is, proved by its credentials; never taken from what it says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    pub node: Arc<str>,
    pub namespace: Arc<str>,
    pub service_account: Arc<str>,
    pub pod: Arc<str>,
}

/// Turns request metadata into a [`Caller`].
pub trait Authenticate: Send + Sync + 'static {
    /// # Errors
    /// The status to refuse the call with; `Unauthenticated` as a rule.
    fn authenticate<'a>(
        &'a self,
        metadata: &'a MetadataMap,
    ) -> Pin<Box<dyn Future<Output = Result<Caller, Status>> + Send + 'a>>;
}

/// Events an operator counts and logs.
#[derive(Clone, Debug)]
pub enum Event<'a> {
    Opened { caller: &'a Caller, node_id: &'a str },
    Sent { caller: &'a Caller, type_url: &'a str, resources: usize, removals: usize, initial: bool, unchanged: usize },
    Nacked { caller: &'a Caller, type_url: &'a str, message: &'a str },
    Closed { caller: &'a Caller },
}

type Observer = Arc<dyn Fn(Event<'_>) + Send + Sync>;

/// The discovery service over a [`Cache`].
#[derive(Clone)]
pub struct DeltaService {
    cache: Arc<Cache>,
    authenticate: Arc<dyn Authenticate>,
    observer: Observer,
}

impl std::fmt::Debug for DeltaService {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DeltaService").field("cache", &self.cache).finish_non_exhaustive()
    }
}

impl DeltaService {
    pub fn new(cache: Arc<Cache>, authenticate: Arc<dyn Authenticate>, observer: Observer) -> Self {
        Self { cache, authenticate, observer }
    }

    /// As a tonic service. Requests are small, so the default decoding limit of 4 MiB holds; large initial version maps of
    /// reconnecting clients are why it is raised.
    pub fn into_server(self) -> AggregatedDiscoveryServiceServer<Self> {
        AggregatedDiscoveryServiceServer::new(self).max_decoding_message_size(64 * 1024 * 1024)
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for DeltaService {
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        if !self.cache.is_ready() {
            return Err(Status::unavailable("the first full state is still being built"));
        }
        let caller = self.authenticate.authenticate(request.metadata()).await?;
        let (responses, stream) = mpsc::channel(RESPONSE_QUEUE);
        let session = Session {
            cache: self.cache.clone(),
            observer: self.observer.clone(),
            caller,
            types: BTreeMap::new(),
            responses,
        };
        // Owned by the call: it ends when the client's request stream or its response stream does.
        tokio::spawn(session.run(request.into_inner()));
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// One client's stream.
struct Session {
    cache: Arc<Cache>,
    observer: Observer,
    caller: Caller,
    types: BTreeMap<&'static str, Subscription>,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
}

#[derive(Default)]
struct Subscription {
    protocol: ServerType,
    /// Everything up to this sequence number has been sent.
    seen: u64,
    /// Urgent changes up to this one have been sent (again with the bulk, harmlessly).
    seen_urgent: u64,
}

/// The client's connection is gone.
struct Gone;

impl Session {
    async fn run(mut self, mut requests: Streaming<DeltaDiscoveryRequest>) {
        let mut changed = self.cache.changed.subscribe();
        let mut opened = false;
        loop {
            let step = tokio::select! {
                request = requests.message() => match request {
                    Ok(Some(request)) => {
                        if !opened {
                            let node_id = request.node.as_ref().map_or("", |n| n.id.as_str());
                            (self.observer)(Event::Opened { caller: &self.caller, node_id });
                            opened = true;
                        }
                        self.on_request(request).await
                    }
                    Ok(None) | Err(_) => Err(Gone),
                },
                // The cache outlives its streams, so this cannot fail.
                _ = changed.changed() => self.push().await,
                () = self.responses.closed() => Err(Gone),
            };
            if step.is_err() {
                break;
            }
        }
        if opened {
            (self.observer)(Event::Closed { caller: &self.caller });
        }
    }

    async fn on_request(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Gone> {
        let Some(type_url) = TYPES.into_iter().find(|t| *t == request.type_url) else {
            // An unknown type is answered with nothing of it, so that its client becomes ready.
            let response =
                DeltaDiscoveryResponse { type_url: request.type_url, nonce: "0".to_owned(), ..Default::default() };
            return if request.response_nonce.is_empty() { self.send(response).await } else { Ok(()) };
        };
        let first = !self.types.contains_key(type_url);
        let subscription = self.types.entry(type_url).or_default();
        match subscription.protocol.on_request(request, first) {
            Asked::Respond { held, names } => self.respond(type_url, &held, names).await,
            Asked::Nacked(message) => {
                (self.observer)(Event::Nacked { caller: &self.caller, type_url, message: &message });
                self.push().await
            }
            // Room for what has changed meanwhile.
            Asked::Acked => self.push().await,
            Asked::Nothing => Ok(()),
        }
    }

    /// The answer to a subscription: everything asked for that the client does not hold already. Sent even when empty, since a
    /// client's readiness waits for it.
    async fn respond(
        &mut self,
        type_url: &'static str,
        held: &BTreeMap<String, String>,
        names: Option<Vec<Arc<str>>>,
    ) -> Result<(), Gone> {
        let Some(subscription) = self.types.get_mut(type_url) else { return Ok(()) };
        let mut batch = Batch::default();
        {
            let mut inner = self.cache.lock();
            let sequence = inner.sequence;
            let cache = inner.types.entry(type_url).or_default();
            if let Some(names) = names {
                let held = BTreeMap::new();
                names.iter().for_each(|name| batch.add_subscribed(cache, &mut subscription.protocol, name, &held));
            } else {
                if subscription.protocol.wildcard {
                    cache.resources.iter().for_each(|(name, stored)| batch.add_unless_held(name, stored, held));
                } else {
                    let names = subscription.protocol.names.clone();
                    names.iter().for_each(|name| batch.add_subscribed(cache, &mut subscription.protocol, name, held));
                }
                // Of an on-demand client the loop above has answered every name.
                let gone = |n: &&String| subscription.protocol.wildcard && !cache.resources.contains_key(n.as_str());
                batch.removed.extend(held.keys().filter(gone).cloned());
                (subscription.seen, subscription.seen_urgent) = (sequence, sequence);
            }
        }
        let unchanged = batch.unchanged;
        self.send_batch(type_url, batch, true, unchanged).await
    }

    /// Sends what changed since last time: policies that came, then workloads and services, then policies that went, so that no
    /// client ever holds a workload whose policy it lacks.
    async fn push(&mut self) -> Result<(), Gone> {
        // One answer outstanding holds back the bulk of every type: else a policy could go before the workload that drops it.
        let idle = self.types.values().all(|t| t.protocol.outstanding() == 0);
        let policies = self.collect(AUTHORIZATION_TYPE_URL, idle)?;
        let (mut arrived, mut gone) = (Batch::default(), Batch::default());
        if let Some(policies) = policies {
            (arrived.resources, gone.removed) = (policies.resources, policies.removed);
        }
        self.send_changes(AUTHORIZATION_TYPE_URL, arrived).await?;
        if let Some(addresses) = self.collect(ADDRESS_TYPE_URL, idle)? {
            self.send_changes(ADDRESS_TYPE_URL, addresses).await?;
        }
        self.send_changes(AUTHORIZATION_TYPE_URL, gone).await
    }

    async fn send_changes(&mut self, type_url: &'static str, batch: Batch) -> Result<(), Gone> {
        if batch.resources.is_empty() && batch.removed.is_empty() {
            return Ok(());
        }
        self.send_batch(type_url, batch, false, 0).await
    }

    /// What to send of a type now: everything that changed if the client has answered, else only what is urgent.
    fn collect(&mut self, type_url: &'static str, idle: bool) -> Result<Option<Batch>, Gone> {
        let Some(subscription) = self.types.get_mut(type_url) else { return Ok(None) };
        let inner = self.cache.lock();
        let Some(cache) = inner.types.get(type_url) else { return Ok(None) };
        if !idle && subscription.protocol.outstanding() >= MAX_OUTSTANDING {
            return Ok(None);
        }
        let since = if idle { subscription.seen } else { subscription.seen_urgent.max(subscription.seen) };
        if since < cache.trimmed {
            // Too far behind for the log, which also knew what was removed. On reconnecting, the client lists what it holds and gets
            // exactly the difference.
            return Err(Gone);
        }
        let changed = cache.log.iter().rev().take_while(|entry| entry.sequence > since);
        let names: BTreeSet<Arc<str>> =
            changed.filter(|entry| idle || entry.lane == Lane::Urgent).map(|entry| entry.name.clone()).collect();
        subscription.seen_urgent = inner.sequence;
        if idle {
            subscription.seen = inner.sequence;
        }
        let mut batch = Batch::default();
        let protocol = &mut subscription.protocol;
        for name in names {
            match cache.resources.get(&name) {
                Some(stored) if protocol.wildcard => batch.add(&name, stored),
                Some(stored) if wants(protocol, &name, stored) => batch.add_changed(cache, protocol, &name, stored),
                Some(_) => {}
                None => {
                    protocol.followed.remove(&name);
                    batch.removed.push(name.to_string());
                }
            }
        }
        Ok(Some(batch))
    }

    async fn send_batch(
        &mut self,
        type_url: &'static str,
        batch: Batch,
        initial: bool,
        unchanged: usize,
    ) -> Result<(), Gone> {
        let Some(subscription) = self.types.get_mut(type_url) else { return Ok(()) };
        (self.observer)(Event::Sent {
            caller: &self.caller,
            type_url,
            resources: batch.resources.len(),
            removals: batch.removed.len(),
            initial,
            unchanged,
        });
        let response = DeltaDiscoveryResponse {
            system_version_info: subscription.seen.to_string(),
            resources: batch.resources.into_iter().map(|r| r.into_wire(type_url)).collect(),
            type_url: type_url.to_owned(),
            nonce: subscription.protocol.sent(),
            removed_resources: batch.removed,
        };
        self.send(response).await
    }

    /// Waits for room: HTTP/2 flow control and a short queue are the back-pressure.
    async fn send(&self, response: DeltaDiscoveryResponse) -> Result<(), Gone> {
        self.responses.send(Ok(response)).await.map_err(|_| Gone)
    }
}

/// Of a client that is not sent everything.
fn wants(protocol: &ServerType, name: &Arc<str>, stored: &Stored) -> bool {
    let mut names = std::iter::once(name).chain(&*stored.aliases).chain(&*stored.member_of);
    names.any(|name| protocol.names.contains(name) || protocol.followed.contains(name))
}

#[derive(Default)]
struct Batch {
    resources: Vec<Outgoing>,
    removed: Vec<String>,
    unchanged: usize,
    /// Of what is followed: names may lead to the same resource.
    added: BTreeSet<Arc<str>>,
}

struct Outgoing {
    name: Arc<str>,
    stored: Stored,
}

impl Batch {
    fn add(&mut self, name: &Arc<str>, stored: &Stored) {
        self.resources.push(Outgoing { name: name.clone(), stored: stored.clone() });
    }

    fn add_unless_held(&mut self, name: &Arc<str>, stored: &Stored, held: &BTreeMap<String, String>) {
        if held.get(&**name).is_some_and(|version| **version == *stored.version) {
            self.unchanged += 1;
        } else {
            self.add(name, stored);
        }
    }

    /// An unknown name is answered as removed, so that the asker need not wait for it.
    fn add_subscribed(
        &mut self,
        cache: &TypeCache,
        protocol: &mut ServerType,
        name: &str,
        held: &BTreeMap<String, String>,
    ) {
        let found = cache.resolve(name);
        if found.is_empty() {
            self.removed.push(name.to_owned());
        }
        found.iter().for_each(|name| self.add_followed(cache, protocol, name, held));
    }

    /// What is followed already comes alone.
    fn add_changed(&mut self, cache: &TypeCache, protocol: &mut ServerType, name: &Arc<str>, stored: &Stored) {
        if !protocol.followed.contains(name) {
            self.add_followed(cache, protocol, name, &BTreeMap::new());
        } else if self.added.insert(name.clone()) {
            self.add(name, stored);
        }
    }

    /// A service brings its endpoints, as with Istio's control plane.
    fn add_followed(
        &mut self,
        cache: &TypeCache,
        protocol: &mut ServerType,
        name: &Arc<str>,
        held: &BTreeMap<String, String>,
    ) {
        let members = cache.members.get(name).into_iter().flatten();
        for name in std::iter::once(name).chain(members) {
            if let Some(stored) = cache.resources.get(name)
                && self.added.insert(name.clone())
            {
                protocol.followed.insert(name.clone());
                self.add_unless_held(name, stored, held);
            }
        }
    }
}

impl Outgoing {
    fn into_wire(self, type_url: &str) -> WireResource {
        WireResource {
            version: self.stored.version.to_string(),
            resource: Some(prost_types::Any { type_url: type_url.to_owned(), value: self.stored.body.to_vec() }),
            name: self.name.to_string(),
            aliases: self.stored.aliases.iter().map(ToString::to_string).collect(),
            ttl: None,
        }
    }
}
