//! The client: one stream for all types, kept alive with back-off. What it has learnt is kept while disconnected.

use mesh_runtime::telemetry::error_chain;
use std::{collections::BTreeSet, future::Future, pin::Pin, sync::Arc, time::Duration};

use mesh_core::index::{Resource, ResourceKey};
use mesh_runtime::drain::DrainWatcher;
use proto::{
    ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL,
    core::Node,
    discovery::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource as WireResource,
        aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
    },
};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming, metadata::MetadataMap, transport::Channel};
use tracing::Instrument as _;

use crate::{
    backoff::Backoff,
    convert,
    delta::{ClientType, Rejection},
    on_demand::{OnDemand, Wish},
};

/// Largest response accepted, as upstream: a full mesh in one message.
const MAX_MESSAGE: usize = 200 * 1024 * 1024;
/// The server opens a new stream and answers on it within this, or it is dialled again.
const FIRST_RESPONSE: Duration = Duration::from_secs(30);
/// How long a connection waits to learn about its destination.
const ANSWER: Duration = Duration::from_secs(5);
/// Wishes on their way to the client's task; beyond it they wait, within [`ANSWER`].
const WISHES: usize = 256;
/// A stream that lasted this long was in order: the next one is opened at once. A response alone proves nothing, as a control plane that
/// answers and then ends every stream would be asked again a hundred times a second.
const HEALTHY: Duration = Duration::from_secs(15);
/// Requests in flight: one answer per response, and the two initial ones.
const REQUEST_QUEUE: usize = 8;

pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// How the product reaches its control plane: a fresh, authenticated channel per attempt. Roots and tokens are re-read each time.
pub trait Transport: Send + Sync {
    fn channel(&self) -> Pin<Box<dyn Future<Output = Result<Channel, BoxError>> + Send + '_>>;

    /// Request metadata: the bearer token and whatever else the control plane wants.
    ///
    /// # Errors
    /// For instance an unreadable token file; the attempt is retried with back-off.
    fn metadata(&self) -> Result<MetadataMap, BoxError>;
}

/// What came of one response: already the model.
#[derive(Clone, Debug, Default)]
pub struct Update {
    pub upserts: Vec<Resource>,
    pub removals: Vec<ResourceKey>,
}

/// Receives the model. Called from the client's task, one call at a time; must not block.
pub trait Handler: Send {
    fn apply(&mut self, update: Update);

    /// The first response of this type has been applied in this process. An empty one counts.
    fn synced(&mut self, type_url: &'static str);

    /// What an earlier process had applied, by type, in its order. Called by [`Client::resume`] only.
    fn restore(&mut self, saved: Vec<(&'static str, Update)>);
}

/// Keeps what was accepted, as it came, for the next start. Called from the client's task; must not block.
pub trait Journal: Send {
    /// `accepted` holds no address that was rejected. Rejected policies are in it: they deny until they can be read, also after a restart.
    fn record(&mut self, accepted: DeltaDiscoveryResponse);
}

/// Asks for resources of a type that the client does not hold as a whole. Cheap to clone, usable from any runtime.
#[derive(Clone, Debug)]
pub struct Demand(mpsc::Sender<Wanted>);

/// No answer came in time, or too many were waited for already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the control plane did not say within 5 s")]
pub struct Unanswered;

impl Demand {
    /// Returns when the state holds what there is under `name`: `network/ip`, a uid, or `namespace/hostname`. At once when that was answered
    /// before, also while the control plane is away. Cancel safe: others keep waiting.
    ///
    /// # Errors
    /// After 5 s, or at once when too many names wait.
    pub async fn fetch(&self, name: Arc<str>) -> Result<(), Unanswered> {
        let answer = async {
            let (done, answered) = oneshot::channel();
            self.0.send(Wanted { name, done }).await.ok()?;
            answered.await.ok()
        };
        tokio::time::timeout(ANSWER, answer).await.ok().flatten().ok_or(Unanswered)
    }
}

#[derive(Debug)]
struct Wanted {
    name: Arc<str>,
    done: oneshot::Sender<()>,
}

/// The receiving end of [`Demand`].
struct Wishes {
    queue: mpsc::Receiver<Wanted>,
    asked: OnDemand<oneshot::Sender<()>>,
}

impl Wishes {
    /// Takes a wish and those queued behind it; the names that nobody asked for before.
    fn take(&mut self, first: Wanted) -> Vec<String> {
        let mut unknown = Vec::new();
        let mut next = Some(first);
        while let Some(Wanted { name, done }) = next {
            // Whoever waits may have given up.
            if !done.is_closed() {
                match self.asked.want(name.clone(), done, oneshot::Sender::is_closed) {
                    Wish::Known(done) => done.send(()).unwrap_or_default(),
                    Wish::Subscribe => unknown.push(name.to_string()),
                    // Refused ones learn it by losing their sender.
                    Wish::Joined | Wish::Refused(_) => {}
                }
            }
            next = self.queue.try_recv().ok();
        }
        unknown
    }
}

/// Events an operator counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    Connected,
    /// `reason` is upstream's label: ConnectionError, Error, Reconnect or Complete.
    Terminated {
        reason: &'static str,
    },
    Received {
        type_url: &'a str,
        bytes: usize,
        resources: usize,
        removals: usize,
    },
}

type Observer = Box<dyn Fn(Event<'_>) + Send>;

/// See [`Client::run`].
pub struct Client {
    transport: Arc<dyn Transport>,
    node: Node,
    types: Vec<ClientType>,
    handler: Box<dyn Handler>,
    observer: Observer,
    wishes: Option<Wishes>,
    journal: Option<Box<dyn Journal>>,
}

impl Client {
    /// Subscribes to everything of `types`, in this order.
    pub fn new(
        transport: Arc<dyn Transport>,
        node: Node,
        types: &[&'static str],
        handler: Box<dyn Handler>,
        observer: Box<dyn Fn(Event<'_>) + Send>,
    ) -> Self {
        let types = types.iter().copied().map(ClientType::new).collect();
        Self { transport, node, types, handler, observer, wishes: None, journal: None }
    }

    /// Holds addresses only as far as they are asked for, instead of all. Before [`Self::run`].
    pub fn on_demand(&mut self) -> Demand {
        for kind in self.types.iter_mut().filter(|kind| kind.type_url() == ADDRESS_TYPE_URL) {
            *kind = ClientType::on_demand(ADDRESS_TYPE_URL);
        }
        let (demand, queue) = mpsc::channel(WISHES);
        self.wishes = Some(Wishes { queue, asked: OnDemand::default() });
        Demand(demand)
    }

    /// Tells `journal` what is accepted from now on. Before [`Self::run`].
    pub fn journal(&mut self, journal: Box<dyn Journal>) {
        self.journal = Some(journal);
    }

    /// Takes what a [`Journal`] recorded in an earlier life, in its order, and hands it to the handler at once; the server then sends only
    /// what has changed since. Before [`Self::run`].
    pub fn resume(&mut self, recorded: &[DeltaDiscoveryResponse]) {
        let mut saved = Vec::new();
        for response in recorded {
            let Some(kind) = self.types.iter_mut().find(|kind| kind.type_url() == response.type_url) else { continue };
            let decoded = decode(kind.type_url(), &response.resources);
            kind.restored(decoded.accepted, &response.removed_resources);
            saved.push((kind.type_url(), Update { upserts: decoded.resources, removals: removals(response) }));
        }
        self.handler.restore(saved);
    }

    /// Keeps the stream up until the drain starts. Never returns before.
    pub async fn run(mut self, drain: DrainWatcher) {
        let stop = drain.signalled();
        tokio::pin!(stop);
        let mut backoff = Backoff::default();
        for id in 1_u64.. {
            let span = tracing::info_span!("xds", id);
            let began = Instant::now();
            let ended = tokio::select! {
                _ = &mut stop => return,
                ended = self.session().instrument(span.clone()) => ended,
            };
            if began.elapsed() >= HEALTHY && !matches!(ended, Ended::Connect(_)) {
                backoff.reset();
            }
            (self.observer)(Event::Terminated { reason: ended.reason() });
            let delay = backoff.next_delay(&mut rand::rng());
            span.in_scope(|| match &ended {
                Ended::Complete => tracing::debug!("discovery stream ended, reconnecting"),
                Ended::Local(error) => {
                    tracing::warn!(error = error_chain(error.as_ref()), ?delay, "cannot ask the control plane");
                }
                Ended::Connect(error) => {
                    tracing::warn!(error = error_chain(error.as_ref()), ?delay, "cannot reach the control plane");
                }
                Ended::Status(status) => {
                    tracing::warn!(code = ?status.code(), message = status.message(), ?delay, "discovery stream failed");
                }
            });
            tokio::select! {
                _ = &mut stop => return,
                // The next stream asks for everything that was wished for.
                _ = meanwhile(&mut self.wishes, tokio::time::sleep(delay)) => {}
            }
        }
    }

    async fn session(&mut self) -> Ended {
        // Dialling has limits of its own. What is wished for until then is in the first request.
        let (channel, _) = meanwhile(&mut self.wishes, self.transport.channel()).await;
        let channel = match channel {
            Ok(channel) => channel,
            Err(error) => return Ended::Connect(error),
        };
        let (requests, request) = match self.first_requests() {
            Ok(asked) => asked,
            Err(error) => return Ended::Local(error),
        };
        let opening = tokio::time::timeout(FIRST_RESPONSE, open(channel, request, &mut self.observer));
        let (opened, late) = meanwhile(&mut self.wishes, opening).await;
        let (mut responses, first) = match opened {
            Ok(Ok(stream)) => stream,
            Ok(Err(ended)) => return ended,
            Err(_) => return Ended::Connect("no response within 30 s of asking for the stream".into()),
        };
        let mut answers: Vec<DeltaDiscoveryRequest> = self.subscription(late).into_iter().collect();
        let mut next = Next::Response(Ok(Some(first)));
        loop {
            match next {
                Next::Response(Ok(Some(response))) => answers.extend(self.on_response(response)),
                Next::Response(Ok(None)) => return Ended::Complete,
                Next::Response(Err(status)) => return Ended::Status(status),
                Next::Wish(wanted) => answers.extend(self.on_wish(wanted)),
            }
            for answer in answers.drain(..) {
                match tokio::time::timeout(FIRST_RESPONSE, requests.send(answer)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) => return Ended::Complete,
                    Err(_) => return Ended::Connect("the control plane reads nothing any more".into()),
                }
            }
            next = tokio::select! {
                response = responses.message() => Next::Response(response),
                Some(wanted) = next_wish(&mut self.wishes) => Next::Wish(wanted),
            };
        }
    }

    /// Turns a wish, and those queued behind it, into one request.
    fn on_wish(&mut self, first: Wanted) -> Option<DeltaDiscoveryRequest> {
        let unknown = self.wishes.as_mut()?.take(first);
        self.subscription(unknown)
    }

    fn subscription(&self, names: Vec<String>) -> Option<DeltaDiscoveryRequest> {
        let kind = self.types.iter().find(|kind| kind.is_on_demand())?;
        (!names.is_empty()).then(|| kind.change(names, Vec::new()))
    }

    /// A stream of requests that begins with one for each type, and where further ones go.
    fn first_requests(&self) -> Result<(mpsc::Sender<DeltaDiscoveryRequest>, Requests), BoxError> {
        let metadata = self.transport.metadata()?;
        let (requests, queue) = mpsc::channel(REQUEST_QUEUE.max(self.types.len()));
        for kind in &self.types {
            // Room for every initial request by construction.
            let asked = self.wishes.iter().filter(|_| kind.is_on_demand()).flat_map(|wishes| wishes.asked.names());
            drop(requests.try_send(kind.initial(self.node.clone(), asked)));
        }
        let mut request = tonic::Request::new(ReceiverStream::new(queue));
        *request.metadata_mut() = metadata;
        Ok((requests, request))
    }

    /// Applies first, then records versions, then answers: an ACK means that the state is in force.
    fn on_response(&mut self, mut response: DeltaDiscoveryResponse) -> Vec<DeltaDiscoveryRequest> {
        let Some(kind) = self.types.iter_mut().find(|t| t.type_url() == response.type_url) else {
            tracing::debug!(type_url = response.type_url, "response of a type that was not asked for");
            // Not to answer would hold back a server that waits for it.
            let (type_url, response_nonce) = (response.type_url, response.nonce);
            return vec![DeltaDiscoveryRequest { type_url, response_nonce, ..DeltaDiscoveryRequest::default() }];
        };
        (self.observer)(Event::Received {
            type_url: kind.type_url(),
            bytes: response.resources.iter().filter_map(|r| r.resource.as_ref()).map(|a| a.value.len()).sum(),
            resources: response.resources.len(),
            removals: response.removed_resources.len(),
        });
        drop_removed(&mut response);
        let decoded = decode(kind.type_url(), &response.resources);
        self.handler.apply(Update { upserts: decoded.resources, removals: removals(&response) });
        let first = !kind.is_synced();
        kind.accepted(decoded.accepted, &response.removed_resources);
        if first {
            self.handler.synced(kind.type_url());
        }
        for rejection in &decoded.rejections {
            tracing::warn!(name = rejection.name, reason = rejection.reason, "resource rejected");
        }
        let mut answers = vec![kind.answer(&response, &decoded.rejections)];
        if let Some(wishes) = self.wishes.as_mut().filter(|_| kind.is_on_demand()) {
            let settled = wishes.asked.settle(&response);
            let names = |names: &[Arc<str>]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
            if !settled.unsubscribe.is_empty() {
                let forgotten = names(&settled.forgotten);
                kind.accepted([], &forgotten);
                let removals = settled.forgotten.into_iter().map(ResourceKey::Address).collect();
                self.handler.apply(Update { upserts: Vec::new(), removals });
                answers.push(kind.change(Vec::new(), [names(&settled.unsubscribe), forgotten.clone()].concat()));
                response.removed_resources.extend(forgotten);
            }
            settled.woken.into_iter().for_each(|done| done.send(()).unwrap_or_default());
        }
        if let Some(journal) = &mut self.journal {
            if kind.type_url() == ADDRESS_TYPE_URL {
                response.resources.retain(|r| decoded.rejections.iter().all(|rejection| rejection.name != r.name));
            }
            journal.record(response);
        }
        answers
    }
}

/// What a session reacts to.
enum Next {
    Response(Result<Option<DeltaDiscoveryResponse>, Status>),
    Wish(Wanted),
}

/// Waits for ever where nothing is asked for on demand. Cancel safe.
async fn next_wish(wishes: &mut Option<Wishes>) -> Option<Wanted> {
    match wishes {
        Some(wishes) => wishes.queue.recv().await,
        None => std::future::pending().await,
    }
}

/// Waits for `event` and takes wishes meanwhile, so that what is known is told whatever the stream does. Answers with the names to ask for.
async fn meanwhile<T>(wishes: &mut Option<Wishes>, event: impl Future<Output = T>) -> (T, Vec<String>) {
    let mut unknown = Vec::new();
    tokio::pin!(event);
    loop {
        let wanted = tokio::select! {
            happened = &mut event => return (happened, unknown),
            Some(wanted) = next_wish(wishes) => wanted,
        };
        unknown.extend(wishes.as_mut().map(|wishes| wishes.take(wanted)).unwrap_or_default());
    }
}

type Requests = tonic::Request<ReceiverStream<DeltaDiscoveryRequest>>;
/// Where responses come from, and the first of them.
type Opened = (Streaming<DeltaDiscoveryResponse>, DeltaDiscoveryResponse);

/// Opens the stream and waits for its first response.
async fn open(channel: Channel, request: Requests, observer: &mut Observer) -> Result<Opened, Ended> {
    let mut client = AggregatedDiscoveryServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
    let response = client.delta_aggregated_resources(request).await.map_err(Ended::Status)?;
    observer(Event::Connected);
    let mut responses = response.into_inner();
    let first = responses.message().await.map_err(Ended::Status)?.ok_or(Ended::Complete)?;
    Ok((responses, first))
}

/// The accepted and rejected parts of a response.
struct Decoded<'a> {
    resources: Vec<Resource>,
    /// Names and versions.
    accepted: Vec<(&'a str, &'a str)>,
    rejections: Vec<Rejection>,
}

/// A response's removals come after its resources (upstream's order): what it both gives and takes is gone.
fn drop_removed(response: &mut DeltaDiscoveryResponse) {
    if !response.removed_resources.is_empty() {
        let removed: BTreeSet<&str> = response.removed_resources.iter().map(String::as_str).collect();
        response.resources.retain(|resource| !removed.contains(&*resource.name));
    }
}

fn removals(response: &DeltaDiscoveryResponse) -> Vec<ResourceKey> {
    response.removed_resources.iter().map(|name| convert::key_from_name(&response.type_url, name)).collect()
}

fn decode<'a>(type_url: &'static str, resources: &'a [WireResource]) -> Decoded<'a> {
    let mut out =
        Decoded { resources: Vec::with_capacity(resources.len()), accepted: Vec::new(), rejections: Vec::new() };
    for resource in resources {
        let body = resource.resource.as_ref().map_or(&[][..], |any| &any.value);
        match convert::resource_from_wire(type_url, body) {
            Ok(decoded) => {
                out.resources.push(decoded);
                out.accepted.push((&resource.name, &resource.version));
            }
            Err(problem) => {
                if type_url == AUTHORIZATION_TYPE_URL {
                    // A policy that cannot be read must not stop protecting: it denies until it can be.
                    let stand_in = convert::unreadable_policy(&resource.name, body, &problem);
                    out.resources.push(Resource::Policy(Arc::new(stand_in)));
                }
                out.rejections.push(Rejection { name: resource.name.clone(), reason: problem.to_string() });
            }
        }
    }
    out
}

enum Ended {
    Complete,
    Connect(BoxError),
    /// Nothing that the network could mend, for instance an unreadable token.
    Local(BoxError),
    Status(Status),
}

impl Ended {
    /// Upstream's label.
    fn reason(&self) -> &'static str {
        match self {
            Self::Complete => "Complete",
            Self::Connect(_) => "ConnectionError",
            Self::Local(_) => "Error",
            Self::Status(status) if is_ordinary(status) => "Reconnect",
            Self::Status(_) => "Error",
        }
    }
}

/// How streams end that were not refused: age, a restart, a connection that went.
fn is_ordinary(status: &Status) -> bool {
    match status.code() {
        Code::Unknown | Code::Cancelled | Code::DeadlineExceeded => true,
        Code::Unavailable => {
            ["transport is closing", "received prior goaway"].iter().any(|text| status.message().contains(text))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests;
