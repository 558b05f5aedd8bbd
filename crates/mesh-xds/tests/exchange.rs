//! Client and server against each other over loopback.

use std::{future::Future, net::SocketAddr, pin::Pin, sync::Arc, time::Duration};

use mesh_core::{
    index::{Resource, ResourceKey},
    policy::{Action, Policy, Scope},
    workload::Workload,
};
use mesh_runtime::drain;
use mesh_xds::{
    client::{self, BoxError, Client, Handler, Transport, Update},
    convert::{Encoded, resource_to_wire},
    server::{Authenticate, Cache, Caller, Change, DeltaService, Event, Lane},
};
use proto::{
    ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL,
    core::Node,
    discovery::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse,
        aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
    },
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{
    Extensions, Status,
    metadata::MetadataMap,
    transport::{Channel, Endpoint, Server},
};

const DEADLINE: Duration = Duration::from_secs(20);

struct Token;

impl Authenticate for Token {
    fn authenticate<'a>(
        &'a self,
        metadata: &'a MetadataMap,
        _: &'a Extensions,
    ) -> Pin<Box<dyn Future<Output = Result<Caller, Status>> + Send + 'a>> {
        Box::pin(async move {
            match metadata.get("authorization").and_then(|v| v.to_str().ok()) {
                Some("Bearer good") => Ok(Caller {
                    node: "n1".into(),
                    namespace: "s".into(),
                    service_account: "z".into(),
                    pod: "p".into(),
                }),
                _ => Err(Status::unauthenticated("no")),
            }
        })
    }
}

struct Dial(SocketAddr);

impl Transport for Dial {
    fn channel(&self) -> Pin<Box<dyn Future<Output = Result<Channel, BoxError>> + Send + '_>> {
        Box::pin(async move { Ok(Endpoint::new(format!("http://{}", self.0))?.connect().await?) })
    }

    fn metadata(&self) -> Result<MetadataMap, BoxError> {
        let mut map = MetadataMap::new();
        map.insert("authorization", "Bearer good".parse()?);
        Ok(map)
    }
}

#[derive(Debug)]
enum Seen {
    Update(Update),
    Synced,
}

impl Drop for Mesh {
    fn drop(&mut self) {
        self.kill();
    }
}

struct Tell(mpsc::UnboundedSender<Seen>);

impl Handler for Tell {
    fn apply(&mut self, update: Update) {
        self.0.send(Seen::Update(update)).unwrap_or_default();
    }

    fn synced(&mut self, _: &'static str) {
        self.0.send(Seen::Synced).unwrap_or_default();
    }

    fn restore(&mut self, _: Vec<(&'static str, Update)>) {}
}

struct Mesh {
    cache: Arc<Cache>,
    address: SocketAddr,
    /// (resources, unchanged) of each initial answer for addresses.
    sent: mpsc::UnboundedReceiver<(usize, usize)>,
    server: Option<tokio::runtime::Runtime>,
}

impl Mesh {
    fn start(cache: Arc<Cache>) -> Self {
        Self::start_at(cache, "127.0.0.1:0".parse().unwrap())
    }

    /// The server has a runtime of its own, so that killing it cuts its connections too.
    fn start_at(cache: Arc<Cache>, address: SocketAddr) -> Self {
        let (tell, sent) = mpsc::unbounded_channel();
        let observer = Arc::new(move |event: Event<'_>| {
            if let Event::Sent { type_url: ADDRESS_TYPE_URL, resources, unchanged, initial: true, .. } = event {
                tell.send((resources, unchanged)).unwrap_or_default();
            }
        });
        let service = DeltaService::new(cache.clone(), Arc::new(Token), observer).into_server();
        // A killed server lets go of its port a moment later.
        let patience = std::time::Instant::now() + DEADLINE;
        let listener = loop {
            match std::net::TcpListener::bind(address) {
                Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
                    assert!(std::time::Instant::now() < patience, "{error}");
                    std::thread::sleep(Duration::from_millis(1));
                }
                bound => break bound.unwrap(),
            }
        };
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        server.spawn(async move {
            let incoming = TcpListenerStream::new(tokio::net::TcpListener::from_std(listener).unwrap());
            Server::builder().add_service(service).serve_with_incoming(incoming).await.unwrap();
        });
        Self { cache, address, sent, server: Some(server) }
    }

    fn kill(&mut self) {
        if let Some(server) = self.server.take() {
            server.shutdown_background();
        }
    }

    fn client(&self) -> (Client, mpsc::UnboundedReceiver<Seen>) {
        let (tell, seen) = mpsc::unbounded_channel();
        let types = [ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL];
        let client =
            Client::new(Arc::new(Dial(self.address)), Node::default(), &types, Box::new(Tell(tell)), Box::new(|_| {}));
        (client, seen)
    }
}

async fn next(seen: &mut mpsc::UnboundedReceiver<Seen>) -> Seen {
    tokio::time::timeout(DEADLINE, seen.recv()).await.unwrap().unwrap()
}

async fn until_synced(seen: &mut mpsc::UnboundedReceiver<Seen>) -> Vec<Update> {
    let (mut left, mut updates) = (2, Vec::new());
    while left > 0 {
        match next(seen).await {
            Seen::Update(update) => updates.push(update),
            Seen::Synced => left -= 1,
        }
    }
    updates
}

async fn next_change(seen: &mut mpsc::UnboundedReceiver<Seen>) -> Update {
    loop {
        if let Seen::Update(update) = next(seen).await
            && !(update.upserts.is_empty() && update.removals.is_empty())
        {
            return update;
        }
    }
}

fn workload(name: &str, node: &str) -> Encoded {
    let mut w = Workload::new(format!("Kubernetes//Pod/ns/{name}"), "ns", name);
    w.node = node.into();
    w.addresses = vec!["10.0.0.1".parse().unwrap()];
    resource_to_wire(&Resource::Workload(Arc::new(w)))
}

fn upsert(encoded: Encoded) -> Change {
    Change::Upsert { encoded, lane: Lane::Bulk }
}

fn policy(name: &str) -> Encoded {
    resource_to_wire(&Resource::Policy(Arc::new(Policy {
        name: name.into(),
        namespace: "ns".into(),
        scope: Scope::Namespace,
        action: Action::Deny,
        rules: Vec::new(),
        dry_run: false,
        origin: Default::default(),
    })))
}

fn filled(count: usize) -> Arc<Cache> {
    let cache = Arc::new(Cache::new());
    cache.publish((0..count).map(|i| upsert(workload(&format!("w{i}"), "n1"))));
    cache.set_ready();
    cache
}

#[tokio::test]
async fn a_client_gets_everything_then_exactly_what_changes() {
    let mesh = Mesh::start(filled(50));
    let (client, mut seen) = mesh.client();
    let (trigger, watcher) = drain::channel();
    let running = tokio::spawn(client.run(watcher));
    let total: usize = until_synced(&mut seen).await.iter().map(|u| u.upserts.len()).sum();
    assert_eq!(total, 50);

    assert_eq!(mesh.cache.publish([upsert(workload("w7", "n2")), upsert(workload("w8", "n1"))]), 1, "one is unchanged");
    let change = next_change(&mut seen).await;
    let Resource::Workload(changed) = &change.upserts[0] else { panic!("{change:?}") };
    assert_eq!((change.upserts.len(), &*changed.node), (1, "n2"));

    let name: Arc<str> = "Kubernetes//Pod/ns/w3".into();
    mesh.cache.publish([Change::Remove { type_url: ADDRESS_TYPE_URL, name: name.clone(), lane: Lane::Urgent }]);
    assert!(matches!(&next_change(&mut seen).await.removals[..], [ResourceKey::Address(gone)] if *gone == name));

    assert_eq!(trigger.drain(DEADLINE).await, drain::Drained::Complete);
    running.await.unwrap();
}

#[tokio::test]
async fn a_reconnect_resends_nothing_unchanged_and_names_what_is_gone() {
    let mut mesh = Mesh::start(filled(50));
    let (client, mut seen) = mesh.client();
    let (trigger, watcher) = drain::channel();
    let running = tokio::spawn(client.run(watcher));
    until_synced(&mut seen).await;
    assert_eq!(mesh.sent.recv().await, Some((50, 0)));

    // The control plane goes away and comes back on the same port, one workload poorer and one changed.
    mesh.kill();
    let cache = filled(49);
    cache.publish([upsert(workload("w0", "moved"))]);
    let mut again = Mesh::start_at(cache, mesh.address);
    assert_eq!(tokio::time::timeout(DEADLINE, again.sent.recv()).await.unwrap(), Some((1, 48)));
    let change = next_change(&mut seen).await;
    assert_eq!((change.upserts.len(), change.removals.len()), (1, 1));

    trigger.drain(DEADLINE).await;
    running.await.unwrap();
}

#[tokio::test]
async fn policies_come_before_workloads_and_leave_after_them() {
    let mesh = Mesh::start(filled(1));
    let (client, mut seen) = mesh.client();
    let (trigger, watcher) = drain::channel();
    let running = tokio::spawn(client.run(watcher));
    until_synced(&mut seen).await;
    mesh.cache.publish([upsert(workload("w0", "x")), upsert(policy("p"))]);
    assert!(matches!(next_change(&mut seen).await.upserts[..], [Resource::Policy(_)]));
    assert!(matches!(next_change(&mut seen).await.upserts[..], [Resource::Workload(_)]));
    let gone = Change::Remove { type_url: AUTHORIZATION_TYPE_URL, name: "ns/p".into(), lane: Lane::Bulk };
    mesh.cache.publish([gone, upsert(workload("w0", "y"))]);
    assert!(matches!(next_change(&mut seen).await.upserts[..], [Resource::Workload(_)]));
    assert!(matches!(next_change(&mut seen).await.removals[..], [ResourceKey::Policy(_)]));
    trigger.drain(DEADLINE).await;
    running.await.unwrap();
}

#[tokio::test]
async fn much_comes_in_parts_and_what_is_urgent_goes_between_them() {
    const MANY: usize = 1200;
    let mesh = Mesh::start(filled(MANY));
    let channel = Endpoint::new(format!("http://{}", mesh.address)).unwrap().connect().await.unwrap();
    let (requests, stream) = mpsc::channel(8);
    let request = |type_url: &str, response_nonce: String| DeltaDiscoveryRequest {
        type_url: type_url.to_owned(),
        response_nonce,
        ..DeltaDiscoveryRequest::default()
    };
    for type_url in [AUTHORIZATION_TYPE_URL, ADDRESS_TYPE_URL] {
        requests.send(request(type_url, String::new())).await.unwrap();
    }
    let mut call = tonic::Request::new(ReceiverStream::new(stream));
    call.metadata_mut().insert("authorization", "Bearer good".parse().unwrap());
    let mut responses =
        AggregatedDiscoveryServiceClient::new(channel).delta_aggregated_resources(call).await.unwrap().into_inner();
    let mut next = async || tokio::time::timeout(DEADLINE, responses.message()).await.unwrap().unwrap().unwrap();
    let answer = async |response: &DeltaDiscoveryResponse| {
        requests.send(request(&response.type_url, response.nonce.clone())).await.unwrap();
    };
    for expected in [0, MANY] {
        let initial = next().await;
        assert_eq!(initial.resources.len(), expected, "what is there comes at once: it is what readiness waits for");
        answer(&initial).await;
    }

    mesh.cache.publish([upsert(policy("p"))]);
    answer(&next().await).await;
    let gone = Change::Remove { type_url: AUTHORIZATION_TYPE_URL, name: "ns/p".into(), lane: Lane::Bulk };
    mesh.cache.publish((0..MANY).map(|n| upsert(workload(&format!("w{n}"), "moved"))).chain([gone]));
    let first = next().await;
    let dying = Change::Upsert { encoded: workload("w0", "dying"), lane: Lane::Urgent };
    mesh.cache.publish([dying]);
    let urgent = next().await;
    assert_eq!(urgent.resources.len(), 1, "it waits for no answer");
    let mut rest = first.resources.len();
    assert!(rest < MANY / 2);
    answer(&first).await;
    answer(&urgent).await;
    while rest < MANY {
        let part = next().await;
        assert_eq!(part.type_url, ADDRESS_TYPE_URL, "a policy goes after the last workload that may have named it");
        rest += part.resources.len();
        answer(&part).await;
    }
    let last = next().await;
    assert_eq!((last.type_url.as_str(), last.removed_resources), (AUTHORIZATION_TYPE_URL, vec!["ns/p".to_owned()]));
}

#[tokio::test]
async fn one_bad_resource_is_rejected_alone() {
    let cache = filled(3);
    let bad =
        Encoded { name: "bad".into(), aliases: Vec::new(), body: vec![0xff, 0xff].into(), ..workload("bad", "n1") };
    cache.publish([upsert(bad)]);
    let mesh = Mesh::start(cache);
    let (client, mut seen) = mesh.client();
    let (trigger, watcher) = drain::channel();
    let running = tokio::spawn(client.run(watcher));
    let total: usize = until_synced(&mut seen).await.iter().map(|u| u.upserts.len()).sum();
    assert_eq!(total, 3);
    trigger.drain(DEADLINE).await;
    running.await.unwrap();
}

#[tokio::test]
async fn a_caller_without_a_token_is_refused() {
    let mesh = Mesh::start(filled(1));
    let channel = Endpoint::new(format!("http://{}", mesh.address)).unwrap().connect().await.unwrap();
    let requests = tokio_stream::iter([DeltaDiscoveryRequest::default()]);
    let refused = AggregatedDiscoveryServiceClient::new(channel).delta_aggregated_resources(requests).await;
    assert_eq!(refused.unwrap_err().code(), tonic::Code::Unauthenticated);
}

/// Takes the call and never comes to a decision.
struct Undecided(mpsc::UnboundedSender<()>);

impl Authenticate for Undecided {
    fn authenticate<'a>(
        &'a self,
        _: &'a MetadataMap,
        _: &'a Extensions,
    ) -> Pin<Box<dyn Future<Output = Result<Caller, Status>> + Send + 'a>> {
        self.0.send(()).unwrap_or_default();
        Box::pin(std::future::pending())
    }
}

#[tokio::test]
async fn a_server_that_never_opens_the_stream_is_left() {
    let (asked, mut calls) = mpsc::unbounded_channel();
    let service = DeltaService::new(filled(1), Arc::new(Undecided(asked)), Arc::new(|_: Event<'_>| {})).into_server();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let incoming = TcpListenerStream::new(listener);
    let server = tokio::spawn(Server::builder().add_service(service).serve_with_incoming(incoming));
    let (tell, mut ends) = mpsc::unbounded_channel();
    let observer = move |event: client::Event<'_>| {
        if let client::Event::Terminated { reason } = event {
            tell.send(reason).unwrap_or_default();
        }
    };
    let (handler, _updates) = mpsc::unbounded_channel();
    let types = [ADDRESS_TYPE_URL];
    let handler = Box::new(Tell(handler));
    let client = Client::new(Arc::new(Dial(address)), Node::default(), &types, handler, Box::new(observer));
    let (trigger, watcher) = drain::channel();
    let running = tokio::spawn(client.run(watcher));
    tokio::time::timeout(DEADLINE, calls.recv()).await.unwrap().unwrap();
    // From here on, time passes whenever nothing else happens.
    tokio::time::pause();
    let left = tokio::time::timeout(Duration::from_secs(31), ends.recv()).await;
    assert_eq!(left.unwrap().unwrap(), "ConnectionError");
    trigger.drain(DEADLINE).await;
    running.await.unwrap();
    server.abort();
}

#[tokio::test]
async fn an_on_demand_client_learns_what_it_asks_for_and_follows_it() {
    let cache = filled(3);
    let mut service = mesh_core::service::Service::new("ns", "web", "web.ns.svc");
    service.vips = vec![mesh_core::addr::NetworkAddress::new("", "10.96.0.1".parse().unwrap())];
    let member = |name: &str, node: &str| {
        let mut w = Workload::new(format!("Kubernetes//Pod/ns/{name}"), "ns", name);
        w.node = node.into();
        w.services.insert("ns/web.ns.svc".into(), Default::default());
        upsert(resource_to_wire(&Resource::Workload(Arc::new(w))))
    };
    cache.publish([upsert(resource_to_wire(&Resource::Service(Arc::new(service)))), member("e0", "n1")]);
    let mut mesh = Mesh::start(cache);
    let (mut client, mut seen) = mesh.client();
    let demand = client.on_demand();
    let (trigger, watcher) = drain::channel();
    let running = tokio::spawn(client.run(watcher));
    let total: usize = until_synced(&mut seen).await.iter().map(|u| u.upserts.len()).sum();
    assert_eq!(total, 0, "nothing was asked for");

    // By alias: the answer has the primary name.
    demand.fetch("/10.96.0.1".into()).await.unwrap();
    assert_eq!(next_change(&mut seen).await.upserts.len(), 2, "the service with its endpoint");
    demand.fetch("/192.0.2.1".into()).await.unwrap();
    assert!(next_change(&mut seen).await.upserts.is_empty(), "there is no such address");
    mesh.cache.publish([upsert(workload("w0", "unwanted")), member("e1", "n1")]);
    let change = next_change(&mut seen).await;
    assert_eq!(change.upserts[0].key(), ResourceKey::Address("Kubernetes//Pod/ns/e1".into()), "a new endpoint");
    assert_eq!(change.upserts.len(), 1);

    // What came along can be asked for by its own name too.
    demand.fetch("ns/web.ns.svc".into()).await.unwrap();
    assert_eq!(next_change(&mut seen).await.upserts.len(), 3);
    demand.fetch("Kubernetes//Pod/ns/e0".into()).await.unwrap();
    assert_eq!(next_change(&mut seen).await.upserts.len(), 1);

    // An endpoint that leaves the service is still held, and so still followed.
    mesh.cache.publish([upsert(workload("e1", "n1"))]);
    let change = next_change(&mut seen).await;
    let [Resource::Workload(left)] = &change.upserts[..] else { panic!("{change:?}") };
    assert!(&*left.name == "e1" && left.services.is_empty());

    // A service that comes after its endpoints brings them along.
    demand.fetch("/10.96.0.2".into()).await.unwrap();
    assert!(next_change(&mut seen).await.upserts.is_empty(), "there is none yet");
    let mut early = Workload::new("Kubernetes//Pod/ns/early", "ns", "early");
    early.services.insert("ns/late.ns.svc".into(), Default::default());
    let early = resource_to_wire(&Resource::Workload(Arc::new(early)));
    let mut late = mesh_core::service::Service::new("ns", "late", "late.ns.svc");
    late.vips = vec![mesh_core::addr::NetworkAddress::new("", "10.96.0.2".parse().unwrap())];
    mesh.cache.publish([upsert(early)]);
    mesh.cache.publish([upsert(resource_to_wire(&Resource::Service(Arc::new(late))))]);
    assert_eq!(next_change(&mut seen).await.upserts.len(), 2, "the service with its endpoint");

    // A new server is told what is held and asked for; only what it does not know alike comes.
    mesh.kill();
    let cache = filled(0);
    cache.publish([member("e0", "n1"), member("e1", "n2")]);
    let _again = Mesh::start_at(cache, mesh.address);
    let change = next_change(&mut seen).await;
    assert_eq!(change.upserts.len(), 1);
    assert!(change.removals.contains(&ResourceKey::Address("ns/web.ns.svc".into())), "{change:?}");
    trigger.drain(DEADLINE).await;
    running.await.unwrap();
}
