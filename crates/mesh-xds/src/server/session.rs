//! One client's stream: what it is owed, and when.

use std::{collections::BTreeMap, sync::Arc};

use proto::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL, discovery::DeltaDiscoveryRequest};
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use super::{
    Cache, Caller, Event, Observer,
    batch::{self, Batch},
    cache::Inner,
    outgoing::{Outgoing, Pieces},
};
use crate::delta::{Asked, ServerType};

/// Unanswered responses beyond which even urgent changes wait.
const MAX_OUTSTANDING: usize = 16;
/// Policies before the workloads that name them; see [`Session::push`] for removals.
const TYPES: [&str; 2] = [AUTHORIZATION_TYPE_URL, ADDRESS_TYPE_URL];

pub(super) struct Session {
    cache: Arc<Cache>,
    observer: Observer,
    caller: Caller,
    types: BTreeMap<&'static str, Subscription>,
    responses: mpsc::Sender<Result<Outgoing, Status>>,
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
    pub(super) fn new(
        cache: Arc<Cache>,
        observer: Observer,
        caller: Caller,
        responses: mpsc::Sender<Result<Outgoing, Status>>,
    ) -> Self {
        Self { cache, observer, caller, types: BTreeMap::new(), responses }
    }

    pub(super) async fn run(mut self, mut requests: Streaming<DeltaDiscoveryRequest>) {
        let mut changed = self.cache.changes();
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
            let nothing = || [Pieces::of([]), Pieces::of([])];
            return match request.response_nonce.is_empty() {
                true => self.send(Outgoing::new(0, &request.type_url, "0", nothing())).await,
                false => Ok(()),
            };
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
        let protocol = &mut subscription.protocol;
        let batch = if let Some(names) = names {
            batch::named(&self.cache, type_url, protocol, &names, &BTreeMap::new()).0
        } else {
            let (batch, seen) = if protocol.wildcard {
                batch::everything(&self.cache, type_url, held)
            } else {
                let names: Vec<Arc<str>> = protocol.names.iter().cloned().collect();
                batch::named(&self.cache, type_url, protocol, &names, held)
            };
            (subscription.seen, subscription.seen_urgent) = (seen, seen);
            batch
        };
        self.send_batch(type_url, batch, true).await
    }

    /// Sends what changed since last time: policies that came, then workloads and services, then policies that went, so that no
    /// client ever holds a workload whose policy it lacks.
    async fn push(&mut self) -> Result<(), Gone> {
        // One answer outstanding holds back the bulk of every type: else a policy could go before the workload that drops it.
        let idle = self.types.values().all(|t| t.protocol.outstanding() == 0);
        // Of one moment, however long sending takes: else a workload could come before a policy that was made in between.
        let (policies, addresses) = {
            let cache = self.cache.clone();
            let mut inner = cache.lock();
            (self.collect(&mut inner, AUTHORIZATION_TYPE_URL, idle)?, self.collect(&mut inner, ADDRESS_TYPE_URL, idle)?)
        };
        let (arrived, gone) = policies.map(Batch::split).unzip();
        self.send_changes(AUTHORIZATION_TYPE_URL, arrived).await?;
        self.send_changes(ADDRESS_TYPE_URL, addresses).await?;
        self.send_changes(AUTHORIZATION_TYPE_URL, gone).await
    }

    async fn send_changes(&mut self, type_url: &'static str, batch: Option<Batch>) -> Result<(), Gone> {
        match batch.filter(|batch| !batch.is_empty()) {
            Some(batch) => self.send_batch(type_url, batch, false).await,
            None => Ok(()),
        }
    }

    /// What to send of a type now: everything that changed if the client has answered, else only what is urgent.
    fn collect(&mut self, inner: &mut Inner, type_url: &'static str, idle: bool) -> Result<Option<Batch>, Gone> {
        let Some(subscription) = self.types.get_mut(type_url) else { return Ok(None) };
        if !idle && subscription.protocol.outstanding() >= MAX_OUTSTANDING {
            return Ok(None);
        }
        let until = inner.sequence;
        let Some(cache) = inner.types.get_mut(type_url) else { return Ok(None) };
        let since = if idle { subscription.seen } else { subscription.seen_urgent.max(subscription.seen) };
        let batch = match subscription.protocol.wildcard {
            true => cache.difference(since, until, !idle).map(Batch::from),
            false => {
                cache.changed(since, !idle).map(|names| batch::followed(cache, &mut subscription.protocol, &names))
            }
        };
        // Too far behind for the log, which also knew what was removed. On reconnecting, the client lists what it holds and gets
        // exactly the difference.
        let batch = batch.ok_or(Gone)?;
        subscription.seen_urgent = until;
        if idle {
            subscription.seen = until;
        }
        Ok(Some(batch))
    }

    async fn send_batch(&mut self, type_url: &'static str, batch: Batch, initial: bool) -> Result<(), Gone> {
        let Some(subscription) = self.types.get_mut(type_url) else { return Ok(()) };
        let Batch { upserted, removed, resources, removals, unchanged } = batch;
        (self.observer)(Event::Sent { caller: &self.caller, type_url, resources, removals, initial, unchanged });
        let nonce = subscription.protocol.sent();
        let response = Outgoing::new(subscription.seen, type_url, &nonce, [removed, upserted]);
        self.send(response).await
    }

    /// Waits for room: HTTP/2 flow control and a short queue are the back-pressure.
    async fn send(&self, response: Result<Outgoing, Status>) -> Result<(), Gone> {
        self.responses.send(response).await.map_err(|_| Gone)
    }
}
