//! The client: one stream for all types, kept alive with back-off. What it has learnt is kept while disconnected.

use mesh_runtime::telemetry::error_chain;
use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use mesh_core::index::{Resource, ResourceKey};
use mesh_runtime::drain::DrainWatcher;
use proto::{
    AUTHORIZATION_TYPE_URL,
    core::Node,
    discovery::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource as WireResource,
        aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
    },
};
use tokio::{sync::mpsc, time::Instant};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming, metadata::MetadataMap, transport::Channel};
use tracing::Instrument as _;

use crate::{
    backoff::Backoff,
    convert,
    delta::{ClientType, Rejection},
};

/// Largest response accepted, as upstream: a full mesh in one message.
const MAX_MESSAGE: usize = 200 * 1024 * 1024;
/// The server opens a new stream and answers on it within this, or it is dialled again.
const FIRST_RESPONSE: Duration = Duration::from_secs(30);
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

    /// The first response of this type has been applied, ever. An empty one counts.
    fn synced(&mut self, type_url: &'static str);
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

/// See [`Client::run`].
pub struct Client {
    transport: Arc<dyn Transport>,
    node: Node,
    types: Vec<ClientType>,
    handler: Box<dyn Handler>,
    observer: Box<dyn Fn(Event<'_>) + Send>,
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
        Self { transport, node, types: types.iter().copied().map(ClientType::new).collect(), handler, observer }
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
                Ended::Connect(error) => {
                    tracing::warn!(error = error_chain(error.as_ref()), ?delay, "cannot reach the control plane");
                }
                Ended::Status(status) => {
                    tracing::warn!(code = ?status.code(), message = status.message(), ?delay, "discovery stream failed");
                }
            });
            tokio::select! {
                _ = &mut stop => return,
                () = tokio::time::sleep(delay) => {}
            }
        }
    }

    async fn session(&mut self) -> Ended {
        // Dialling has limits of its own.
        let channel = match self.transport.channel().await {
            Ok(channel) => channel,
            Err(error) => return Ended::Connect(error),
        };
        let (requests, mut responses, first) = match tokio::time::timeout(FIRST_RESPONSE, self.open(channel)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(ended)) => return ended,
            Err(_) => return Ended::Connect("no response within 30 s of asking for the stream".into()),
        };
        let mut next = Ok(Some(first));
        loop {
            let response = match next {
                Ok(Some(response)) => response,
                Ok(None) => return Ended::Complete,
                Err(status) => return Ended::Status(status),
            };
            if let Some(answer) = self.on_response(&response)
                && requests.send(answer).await.is_err()
            {
                return Ended::Complete;
            }
            next = responses.message().await;
        }
    }

    /// Opens the stream and waits for its first response.
    async fn open(&mut self, channel: Channel) -> Result<Opened, Ended> {
        let metadata = self.transport.metadata().map_err(Ended::Connect)?;
        let (requests, queue) = mpsc::channel(REQUEST_QUEUE.max(self.types.len()));
        for kind in &self.types {
            // Room for every initial request by construction.
            drop(requests.try_send(kind.initial(self.node.clone())));
        }
        let mut request = tonic::Request::new(ReceiverStream::new(queue));
        *request.metadata_mut() = metadata;
        let mut client = AggregatedDiscoveryServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
        let response = client.delta_aggregated_resources(request).await.map_err(Ended::Status)?;
        (self.observer)(Event::Connected);
        let mut responses = response.into_inner();
        let first = responses.message().await.map_err(Ended::Status)?.ok_or(Ended::Complete)?;
        Ok((requests, responses, first))
    }

    /// Applies first, then records versions, then answers: an ACK means that the state is in force.
    fn on_response(&mut self, response: &DeltaDiscoveryResponse) -> Option<DeltaDiscoveryRequest> {
        let Some(kind) = self.types.iter_mut().find(|t| t.type_url() == response.type_url) else {
            tracing::debug!(type_url = response.type_url, "response of a type that was not asked for");
            return None;
        };
        (self.observer)(Event::Received {
            type_url: kind.type_url(),
            bytes: response.resources.iter().filter_map(|r| r.resource.as_ref()).map(|a| a.value.len()).sum(),
            resources: response.resources.len(),
            removals: response.removed_resources.len(),
        });
        let decoded = decode(kind.type_url(), &response.resources);
        let removals = response.removed_resources.iter().map(|n| convert::key_from_name(kind.type_url(), n)).collect();
        self.handler.apply(Update { upserts: decoded.resources, removals });
        let first = !kind.is_synced();
        kind.accepted(decoded.accepted, &response.removed_resources);
        if first {
            self.handler.synced(kind.type_url());
        }
        for rejection in &decoded.rejections {
            tracing::warn!(name = rejection.name, reason = rejection.reason, "resource rejected");
        }
        Some(kind.answer(response, &decoded.rejections))
    }
}

/// Where answers go, where responses come from, and the first of them.
type Opened = (mpsc::Sender<DeltaDiscoveryRequest>, Streaming<DeltaDiscoveryResponse>, DeltaDiscoveryResponse);

/// The accepted and rejected parts of a response.
struct Decoded<'a> {
    resources: Vec<Resource>,
    accepted: Vec<(&'a str, &'a str)>,
    rejections: Vec<Rejection>,
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
    Status(Status),
}

impl Ended {
    fn reason(&self) -> &'static str {
        match self {
            Self::Complete => "Complete",
            Self::Connect(_) => "ConnectionError",
            Self::Status(status) => match status.code() {
                Code::Unknown | Code::Cancelled | Code::DeadlineExceeded | Code::Unavailable => "Reconnect",
                _ => "Error",
            },
        }
    }
}

#[cfg(test)]
mod tests;
