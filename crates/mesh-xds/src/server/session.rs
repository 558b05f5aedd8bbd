//! One client's stream: what it is owed, and when.

use std::{collections::BTreeMap, sync::Arc};

use proto::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL, discovery::DeltaDiscoveryRequest};
use tokio::sync::mpsc;
use tonic::Status;

use super::{
    Cache, Caller, Event, Lane, Observer,
    batch::{self, Batch},
    cache::Inner,
    outgoing::{Outgoing, Pieces},
    request::{Held, Incoming, Requests},
};
use crate::delta::{Asked, ServerType};

/// Unanswered responses beyond which even urgent changes wait.
const MAX_OUTSTANDING: usize = 16;
/// Changes that are sent at once; the next part follows the answer.
const PART: usize = 512;
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
    /// Removals up to this one have been sent: those of policies wait for the workloads that named them.
    seen_removals: u64,
}

/// The client's connection is gone.
struct Gone;

/// What a client may be owed of a type.
#[derive(Clone, Copy, Debug)]
enum Owed {
    /// What came or changed.
    Upserts,
    /// What went.
    Removals,
    /// Both, as much of it as goes at once.
    Part,
    /// Both, of what cannot wait.
    Urgent,
}

/// Whether a first request is for everything; see [`ServerType::on_request`].
fn wants_all(request: &DeltaDiscoveryRequest) -> bool {
    let has = |names: &[String]| names.iter().any(|name| name == "*");
    let subscribed = &request.resource_names_subscribe;
    (subscribed.is_empty() || has(subscribed)) && !has(&request.resource_names_unsubscribe)
}

impl Session {
    pub(super) fn new(
        cache: Arc<Cache>,
        observer: Observer,
        caller: Caller,
        responses: mpsc::Sender<Result<Outgoing, Status>>,
    ) -> Self {
        Self { cache, observer, caller, types: BTreeMap::new(), responses }
    }

    pub(super) async fn run(mut self, mut requests: Requests) {
        let mut changed = self.cache.changes();
        let mut opened = false;
        loop {
            let step = tokio::select! {
                request = requests.message() => match request {
                    Ok(Some(incoming)) => {
                        if !opened {
                            let node_id = incoming.request.node.as_ref().map_or("", |n| n.id.as_str());
                            (self.observer)(Event::Opened { caller: &self.caller, node_id });
                            opened = true;
                        }
                        self.on_request(incoming).await
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

    async fn on_request(&mut self, incoming: Incoming) -> Result<(), Gone> {
        let Incoming { mut request, held } = incoming;
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
        if !wants_all(&request) {
            // It goes by names: few.
            request.initial_resource_versions = held.to_map();
        }
        match subscription.protocol.on_request(request, first) {
            Asked::Respond { held: by_name, names } => self.respond(type_url, &held, &by_name, names).await,
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
        held: &Held,
        by_name: &BTreeMap<String, String>,
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
                batch::named(&self.cache, type_url, protocol, &names, by_name)
            };
            (subscription.seen, subscription.seen_urgent, subscription.seen_removals) = (seen, seen, seen);
            batch
        };
        self.send_batch(type_url, batch, true).await
    }

    /// Sends what changed since last time: policies that came, then workloads and services, then policies that went, so that no
    /// client ever holds a workload whose policy it lacks. Of much it is the first part, the next follows the answer: what becomes
    /// urgent meanwhile has no more than a part before it.
    async fn push(&mut self) -> Result<(), Gone> {
        // One answer outstanding holds back the bulk of every type: else a policy could go before the workload that drops it.
        let idle = self.types.values().all(|t| t.protocol.outstanding() == 0);
        // Of one moment, however long sending takes: else a workload could come before a policy that was made in between.
        let (arrived, urgent, addresses, gone) = {
            let cache = self.cache.clone();
            let mut inner = cache.lock();
            if idle {
                let arrived = self.collect(&mut inner, AUTHORIZATION_TYPE_URL, Owed::Upserts)?;
                let addresses = self.collect(&mut inner, ADDRESS_TYPE_URL, Owed::Part)?;
                let is_all = self.types.get(ADDRESS_TYPE_URL).is_none_or(|t| t.seen >= inner.sequence);
                let (urgent, gone) = match is_all {
                    true => (None, self.collect(&mut inner, AUTHORIZATION_TYPE_URL, Owed::Removals)?),
                    false => (self.collect(&mut inner, ADDRESS_TYPE_URL, Owed::Urgent)?, None),
                };
                (arrived, urgent, addresses, gone)
            } else {
                (None, self.collect(&mut inner, ADDRESS_TYPE_URL, Owed::Urgent)?, None, None)
            }
        };
        self.send_changes(AUTHORIZATION_TYPE_URL, arrived).await?;
        self.send_changes(ADDRESS_TYPE_URL, urgent).await?;
        self.send_changes(ADDRESS_TYPE_URL, addresses).await?;
        self.send_changes(AUTHORIZATION_TYPE_URL, gone).await
    }

    async fn send_changes(&mut self, type_url: &'static str, batch: Option<Batch>) -> Result<(), Gone> {
        match batch.filter(|batch| !batch.is_empty()) {
            Some(batch) => self.send_batch(type_url, batch, false).await,
            None => Ok(()),
        }
    }

    /// What is owed of a type, which then counts as sent.
    fn collect(&mut self, inner: &mut Inner, type_url: &'static str, owed: Owed) -> Result<Option<Batch>, Gone> {
        let now = inner.sequence;
        let Some(subscription) = self.types.get_mut(type_url) else { return Ok(None) };
        let cache = inner.types.entry(type_url).or_default();
        let Subscription { protocol, seen, seen_urgent, seen_removals } = subscription;
        if protocol.outstanding() >= MAX_OUTSTANDING {
            return Ok(None);
        }
        let (lane, since, most) = match owed {
            Owed::Upserts => (Lane::Bulk, *seen, usize::MAX),
            Owed::Removals => (Lane::Bulk, *seen_removals, usize::MAX),
            Owed::Part => (Lane::Bulk, *seen, PART),
            Owed::Urgent => (Lane::Urgent, (*seen).max(*seen_urgent), usize::MAX),
        };
        let changed = match protocol.wildcard {
            true => cache.difference(lane, since, now, most).map(|(made, until)| (Batch::from(made), until)),
            false => cache
                .changed(lane, since, now, most)
                .map(|(names, until)| (batch::followed(cache, protocol, &names), until)),
        };
        // Too far behind for the log, which also knew what was removed. On reconnecting, the client lists what it holds and gets
        // exactly the difference.
        let (batch, until) = changed.ok_or(Gone)?;
        Ok(Some(match owed {
            Owed::Upserts => {
                *seen = until;
                batch.split().0
            }
            Owed::Removals => {
                *seen_removals = until;
                batch.split().1
            }
            Owed::Part => {
                *seen = until;
                batch
            }
            Owed::Urgent => {
                *seen_urgent = until;
                batch
            }
        }))
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
