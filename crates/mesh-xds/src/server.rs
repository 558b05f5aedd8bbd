//! The server: a cache of encoded resources, and per client a stream of what changed.
//!
//! The cache keeps each resource once, encoded, whatever the number of clients. A stream remembers only the sequence number up to
//! which it has sent; what changed since comes from the change log, so memory per client does not grow with the mesh. A client
//! that lags gets the merged difference, never a queue of updates. Dying endpoints overtake bulk ([`Lane::Urgent`]).

mod batch;
mod cache;
mod log;
mod outgoing;
mod request;
mod session;

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::Body;
use tokio::sync::{Semaphore, mpsc};
use tonic::{
    Extensions, Status,
    codegen::{BoxFuture, Service, StdError, http},
    metadata::MetadataMap,
    server::NamedService,
};

pub use cache::Cache;

use crate::convert::Encoded;
use outgoing::Responses;
use request::Requests;
use session::Session;

/// Responses queued to a client's connection before its stream waits.
const RESPONSE_QUEUE: usize = 2;
/// Requests are small, but for those of reconnecting clients: they list what they hold. This is as much as any may be.
pub const MAX_REQUEST: usize = 64 * 1024 * 1024;
/// Large requests that are taken in at once.
const TURNS: usize = 4;
const METHOD: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";

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

/// How long versions are.
const VERSION_LENGTH: usize = 32;

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

/// Turns request metadata into a [`Caller`]; the extensions say what the server knows of the connection.
pub trait Authenticate: Send + Sync + 'static {
    /// # Errors
    /// The status to refuse the call with; `Unauthenticated` as a rule.
    fn authenticate<'a>(
        &'a self,
        metadata: &'a MetadataMap,
        extensions: &'a Extensions,
    ) -> Pin<Box<dyn Future<Output = Result<Caller, Status>> + Send + 'a>>;

    /// How long a request of this caller may be, in bytes: it is held as a whole, several times over once it has been read.
    fn max_request(&self, _caller: &Caller) -> usize {
        MAX_REQUEST
    }
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
    turns: Arc<Semaphore>,
}

impl std::fmt::Debug for DeltaService {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DeltaService").field("cache", &self.cache).finish_non_exhaustive()
    }
}

impl DeltaService {
    pub fn new(cache: Arc<Cache>, authenticate: Arc<dyn Authenticate>, observer: Observer) -> Self {
        Self { cache, authenticate, observer, turns: Arc::new(Semaphore::new(TURNS)) }
    }

    /// As a service for a router.
    pub fn into_server(self) -> DeltaServer {
        DeltaServer(self)
    }

    async fn open(
        self,
        metadata: MetadataMap,
        extensions: Extensions,
        body: tonic::body::Body,
    ) -> Result<Responses, Status> {
        if !self.cache.is_ready() {
            return Err(Status::unavailable("the first full state is still being built"));
        }
        let caller = self.authenticate.authenticate(&metadata, &extensions).await?;
        let requests = Requests::new(body, self.turns.clone(), self.authenticate.max_request(&caller));
        let (responses, queue) = mpsc::channel(RESPONSE_QUEUE);
        let session = Session::new(self.cache, self.observer, caller, responses);
        // Owned by the call: it ends when the client's request stream or its response stream does.
        tokio::spawn(session.run(requests));
        Ok(Responses::new(queue))
    }
}

/// The gRPC service. Not the generated one: that one writes each response as a whole, for each client, before a byte of it is sent.
#[derive(Clone, Debug)]
pub struct DeltaServer(DeltaService);

impl NamedService for DeltaServer {
    const NAME: &'static str = "envoy.service.discovery.v3.AggregatedDiscoveryService";
}

type Answer = http::Response<tonic::body::Body>;

impl<B> Service<http::Request<B>> for DeltaServer
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<StdError>,
{
    type Response = Answer;
    type Error = Infallible;
    type Future = BoxFuture<Answer, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let service = self.0.clone();
        let (parts, body) = request.into_parts();
        Box::pin(async move {
            if parts.uri.path() != METHOD {
                return Ok(Status::unimplemented("only delta discovery is served").into_http());
            }
            let body = tonic::body::Body::new(body);
            Ok(match service.open(MetadataMap::from_headers(parts.headers), parts.extensions, body).await {
                Ok(responses) => {
                    let mut answer = Answer::new(tonic::body::Body::new(responses));
                    let grpc = http::HeaderValue::from_static("application/grpc");
                    answer.headers_mut().insert(http::header::CONTENT_TYPE, grpc);
                    answer
                }
                Err(status) => status.into_http(),
            })
        })
    }
}
