//! A node's proxy, as far as discovery goes: TLS, a token, delta discovery of everything; it acknowledges, keeps versions and counts.

use std::{
    collections::{BTreeMap, HashMap},
    hash::BuildHasher as _,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use bytes::Bytes;
use foldhash::fast::FixedState;
use h2::client;
use http::{Request, header};
use proto::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL, core::Node as WireNode, discovery::DeltaDiscoveryRequest};
use rustls_pki_types::ServerName;
use tokio::{
    net::TcpSocket,
    sync::{Notify, watch},
};
use tokio_rustls::TlsConnector;

use crate::grpc::{Part, Reader, framed};

const PATH: &str = "https://fairwayd.istio-system.svc:15012/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
const TYPES: [&str; 2] = [ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL];
/// As tonic's clients have them, which real proxies are.
const STREAM_WINDOW: u32 = 2 << 20;
const CONNECTION_WINDOW: u32 = 5 << 20;

fn hash(bytes: &[u8]) -> u64 {
    FixedState::with_seed(0).hash_one(bytes)
}

/// What a node knows of a type: hashes of names to hashes of versions, and what tells two such sets apart.
#[derive(Clone, Debug, Default)]
pub(crate) struct Known {
    versions: HashMap<u64, u64, FixedState>,
    digest: u64,
}

impl Known {
    fn mix(name: u64, version: u64) -> u64 {
        FixedState::with_seed(1).hash_one((name, version))
    }

    fn set(&mut self, name: u64, version: u64) {
        let before = self.versions.insert(name, version).map_or(0, |old| Self::mix(name, old));
        self.digest = self.digest.wrapping_sub(before).wrapping_add(Self::mix(name, version));
    }

    fn remove(&mut self, name: u64) {
        let before = self.versions.remove(&name).map_or(0, |old| Self::mix(name, old));
        self.digest = self.digest.wrapping_sub(before);
    }
}

/// By type and name.
type Versions = BTreeMap<&'static str, BTreeMap<String, String>>;

/// A change that is waited for.
#[derive(Debug)]
struct Awaited {
    number: u64,
    name: u64,
    began: Instant,
    left: usize,
    latencies: Vec<Duration>,
}

/// What all nodes share.
pub(crate) struct Fleet {
    pub(crate) address: SocketAddr,
    pub(crate) tls: TlsConnector,
    pub(crate) nodes: Vec<Node>,
    awaited: Mutex<Option<Awaited>>,
    /// The name of what is awaited and its number, so that a resource costs a comparison.
    awaited_name: AtomicU64,
    awaited_number: AtomicU64,
    arrived: Notify,
    served: watch::Sender<usize>,
    failure: Mutex<Option<String>>,
}

#[derive(Debug, Default)]
pub(crate) struct Node {
    pub(crate) token: String,
    pub(crate) bytes: AtomicU64,
    pub(crate) responses: AtomicU64,
    pub(crate) resources: AtomicU64,
    pub(crate) removals: AtomicU64,
    /// By type.
    known: Mutex<BTreeMap<&'static str, Known>>,
    /// Names and versions themselves, of the one node that keeps them.
    recorded: Option<Mutex<Versions>>,
    /// Reads nothing any more.
    pub(crate) stalled: AtomicBool,
}

/// Sums over all nodes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) bytes: u64,
    pub(crate) responses: u64,
    pub(crate) resources: u64,
    pub(crate) removals: u64,
}

impl Counts {
    pub(crate) fn since(self, before: Self) -> Self {
        Self {
            bytes: self.bytes - before.bytes,
            responses: self.responses - before.responses,
            resources: self.resources - before.resources,
            removals: self.removals - before.removals,
        }
    }
}

/// What nodes send when they come back.
#[derive(Clone, Debug)]
pub(crate) enum Held {
    Nothing,
    /// The first request of each type, with the versions that every node has; shared, since it is large.
    Versions(Arc<[Bytes; 2]>),
}

impl Fleet {
    pub(crate) fn new(address: SocketAddr, tls: TlsConnector, tokens: Vec<String>) -> Arc<Self> {
        let mut nodes: Vec<Node> = tokens.into_iter().map(|token| Node { token, ..Node::default() }).collect();
        nodes.iter_mut().take(1).for_each(|first| first.recorded = Some(Mutex::default()));
        Arc::new(Self {
            address,
            tls,
            nodes,
            awaited: Mutex::default(),
            awaited_name: AtomicU64::new(0),
            awaited_number: AtomicU64::new(0),
            arrived: Notify::new(),
            served: watch::Sender::new(0),
            failure: Mutex::default(),
        })
    }

    pub(crate) fn counts(&self) -> Counts {
        let sum = |of: fn(&Node) -> &AtomicU64| self.nodes.iter().map(|node| of(node).load(Ordering::Relaxed)).sum();
        Counts {
            bytes: sum(|node| &node.bytes),
            responses: sum(|node| &node.responses),
            resources: sum(|node| &node.resources),
            removals: sum(|node| &node.removals),
        }
    }

    /// Connects the nodes of `which`; each task ends with its connection.
    pub(crate) fn connect(self: &Arc<Self>, which: std::ops::Range<usize>, held: &Held) -> tokio::task::JoinSet<()> {
        self.served.send_replace(0);
        let mut tasks = tokio::task::JoinSet::new();
        for at in which {
            let (fleet, held) = (self.clone(), held.clone());
            tasks.spawn(async move {
                if let Err(error) = fleet.serve(at, held).await {
                    *fleet.failure.lock().unwrap_or_else(PoisonError::into_inner) =
                        Some(format!("node {at}: {error:#}"));
                    fleet.served.send_modify(|_| {});
                    fleet.arrived.notify_waiters();
                }
            });
        }
        tasks
    }

    /// Until so many nodes have both types' first answers.
    pub(crate) async fn served(&self, count: usize) -> anyhow::Result<()> {
        let mut served = self.served.subscribe();
        drop(served.wait_for(|served| *served >= count || self.failed().is_some()).await?);
        self.failed().map_or(Ok(()), |why| Err(anyhow::anyhow!(why)))
    }

    fn failed(&self) -> Option<String> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for a change of one resource to arrive at every reading node; from `began`, how long it took each of them.
    pub(crate) async fn arrival(&self, name: &str, change: impl FnOnce()) -> anyhow::Result<Vec<Duration>> {
        let name = hash(name.as_bytes());
        let number = self.awaited_number.load(Ordering::Relaxed) + 1;
        let left = self.nodes.iter().filter(|node| !node.stalled.load(Ordering::Relaxed)).count();
        let began = Instant::now();
        *lock(&self.awaited) = Some(Awaited { number, name, began, left, latencies: Vec::with_capacity(left) });
        self.awaited_name.store(name, Ordering::Relaxed);
        self.awaited_number.store(number, Ordering::Release);
        change();
        loop {
            let notified = self.arrived.notified();
            if let Some(why) = self.failed() {
                anyhow::bail!(why);
            }
            if lock(&self.awaited).as_ref().is_some_and(|awaited| awaited.left == 0) {
                let awaited = lock(&self.awaited).take();
                self.awaited_name.store(0, Ordering::Relaxed);
                return Ok(awaited.map(|awaited| awaited.latencies).unwrap_or_default());
            }
            let waited = tokio::time::timeout(crate::fairwayd::PATIENCE, notified).await;
            waited.context("a change does not arrive")?;
        }
    }

    fn note(&self, name: u64, last: &mut u64) {
        if self.awaited_name.load(Ordering::Relaxed) != name {
            return;
        }
        let mut awaited = lock(&self.awaited);
        let Some(awaited) = awaited.as_mut().filter(|a| a.name == name && a.number != *last) else { return };
        *last = awaited.number;
        awaited.latencies.push(awaited.began.elapsed());
        awaited.left -= 1;
        if awaited.left == 0 {
            self.arrived.notify_waiters();
        }
    }

    /// How many resources of each type every node of `which` holds.
    ///
    /// # Errors
    /// When they do not all hold the same.
    pub(crate) fn agreed(&self, which: std::ops::Range<usize>) -> anyhow::Result<[usize; 2]> {
        let of =
            |node: &Node| TYPES.map(|url| lock(&node.known).get(url).map_or((0, 0), |k| (k.digest, k.versions.len())));
        let all: Vec<[(u64, usize); 2]> = self.nodes[which].iter().map(of).collect();
        let first = *all.first().context("there are no nodes")?;
        let odd = all.iter().filter(|other| **other != first).count();
        anyhow::ensure!(odd == 0, "{odd} nodes hold something else than the first: {:?}", first.map(|(_, size)| size));
        Ok(first.map(|(_, size)| size))
    }

    /// What a node that has been here says when it comes back: the same for each, as they all hold the same.
    pub(crate) fn held(&self) -> anyhow::Result<Held> {
        let recorded = self.nodes.first().and_then(|node| node.recorded.as_ref()).context("no node records")?;
        Ok(Held::Versions(Arc::new(initial(&lock(recorded))?)))
    }

    async fn serve(&self, at: usize, held: Held) -> anyhow::Result<()> {
        let node = &self.nodes[at];
        // As every node has an address of its own.
        let [.., high, low] = u32::try_from(at)?.to_be_bytes();
        let socket = TcpSocket::new_v4()?;
        socket.bind((Ipv4Addr::new(127, 1, high, low), 0).into())?;
        let stream = socket.connect(self.address).await?;
        stream.set_nodelay(true)?;
        let stream = self.tls.connect(ServerName::try_from("fairwayd.istio-system.svc")?, stream).await?;
        let (mut sender, connection) = client::Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .handshake::<_, Bytes>(stream)
            .await?;
        // Ends with this task, which alone uses it.
        let mut driver = tokio::task::JoinSet::new();
        driver.spawn(connection);
        let request = Request::post(PATH)
            .header(header::CONTENT_TYPE, "application/grpc")
            .header(header::TE, "trailers")
            .header(header::AUTHORIZATION, format!("Bearer {}", node.token))
            .body(())?;
        std::future::poll_fn(|cx| sender.poll_ready(cx)).await?;
        let (response, mut requests) = sender.send_request(request, false)?;
        let initial = match held {
            Held::Nothing => {
                lock(&node.known).clear();
                node.recorded.iter().for_each(|recorded| lock(recorded).clear());
                initial(&Versions::new())?
            }
            Held::Versions(requests) => (*requests).clone(),
        };
        for request in initial {
            requests.send_data(request, false)?;
        }
        let response = response.await?;
        anyhow::ensure!(response.headers().get("grpc-status").is_none(), "refused: {:?}", response.headers());
        let mut body = response.into_body();
        let (mut reader, mut last) = (Reader::default(), 0);
        let mut current = Current::default();
        let mut answered = BTreeMap::new();
        while let Some(data) = body.data().await {
            let data = data?;
            while node.stalled.load(Ordering::Relaxed) {
                std::future::pending::<()>().await;
            }
            node.bytes.fetch_add(data.len() as u64, Ordering::Relaxed);
            let mut acknowledged = Vec::new();
            reader.read(&data, |part| match part {
                Part::Resource { name, version } => {
                    let id = hash(name);
                    current.upserts.push((id, hash(version)));
                    if node.recorded.is_some() {
                        current.names.push([name, version].map(text));
                    }
                }
                Part::Removed(name) => {
                    let id = hash(name);
                    current.removals.push(id);
                    if node.recorded.is_some() {
                        current.removed_names.push(text(name));
                    }
                }
                Part::Type(url) => current.type_url = TYPES.into_iter().find(|known| known.as_bytes() == url),
                Part::Nonce(nonce) => current.nonce = String::from_utf8_lossy(nonce).into_owned(),
                Part::End => acknowledged.push(std::mem::take(&mut current)),
            })?;
            body.flow_control().release_capacity(data.len())?;
            for response in acknowledged {
                let type_url = response.type_url.context("a response of another type")?;
                node.take(type_url, &response);
                let changed = response.upserts.iter().map(|(name, _)| *name).chain(response.removals.iter().copied());
                changed.for_each(|name| self.note(name, &mut last));
                let answer = DeltaDiscoveryRequest {
                    type_url: type_url.to_owned(),
                    response_nonce: response.nonce,
                    ..DeltaDiscoveryRequest::default()
                };
                requests.send_data(framed(&answer)?, false)?;
                if answered.insert(type_url, ()).is_none() && answered.len() == TYPES.len() {
                    self.served.send_modify(|served| *served += 1);
                }
            }
        }
        anyhow::bail!("fairwayd ended the stream: {:?}", body.trailers().await)
    }
}

/// The response under way.
#[derive(Debug, Default)]
struct Current {
    type_url: Option<&'static str>,
    nonce: String,
    upserts: Vec<(u64, u64)>,
    removals: Vec<u64>,
    /// Of the node that records them: names with their versions, and names.
    names: Vec<[String; 2]>,
    removed_names: Vec<String>,
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

impl Node {
    fn take(&self, type_url: &'static str, response: &Current) {
        self.responses.fetch_add(1, Ordering::Relaxed);
        self.resources.fetch_add(response.upserts.len() as u64, Ordering::Relaxed);
        self.removals.fetch_add(response.removals.len() as u64, Ordering::Relaxed);
        let mut known = lock(&self.known);
        let known = known.entry(type_url).or_default();
        response.upserts.iter().for_each(|(name, version)| known.set(*name, *version));
        response.removals.iter().for_each(|name| known.remove(*name));
        if let Some(recorded) = &self.recorded {
            let mut recorded = lock(recorded);
            let recorded = recorded.entry(type_url).or_default();
            recorded.extend(response.names.iter().cloned().map(|[name, version]| (name, version)));
            response.removed_names.iter().for_each(|name| drop(recorded.remove(name)));
        }
    }
}

fn lock<T>(of: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The first request of each type.
fn initial(versions: &Versions) -> anyhow::Result<[Bytes; 2]> {
    let request = |type_url: &'static str| {
        framed(&DeltaDiscoveryRequest {
            node: Some(WireNode {
                id: "ztunnel~10.0.0.1~ztunnel.istio-system~istio-system.svc.cluster.local".to_owned(),
                ..WireNode::default()
            }),
            type_url: type_url.to_owned(),
            initial_resource_versions: versions.get(type_url).cloned().unwrap_or_default(),
            ..DeltaDiscoveryRequest::default()
        })
    };
    Ok([request(TYPES[0])?, request(TYPES[1])?])
}
