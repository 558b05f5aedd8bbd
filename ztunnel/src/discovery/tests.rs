use std::{net::SocketAddr, path::Path};

use mesh_core::{
    authorize::{Connection, authorize},
    policy::{Action, Policy, Rule, Scope},
    select::{NextHop, Request, select},
    service::Service,
    workload::{OutboundPolicy, Workload},
};
use mesh_identity::{CaClient, CaError, ca::BoxFuture};
use mesh_runtime::{drain, readiness::Readiness};
use mesh_xds::{
    convert::resource_to_wire,
    server::{Authenticate, Cache, Caller, Change, DeltaService, Lane},
};
use tonic::{
    Extensions, Status,
    transport::{Endpoint, Server},
};

use super::*;

struct NoCa;

impl CaClient for NoCa {
    fn sign(&self, _: &mesh_core::identity::Identity, _: String) -> BoxFuture<'_, Result<Vec<String>, CaError>> {
        Box::pin(std::future::pending())
    }
}

#[tokio::test]
async fn policies_are_complete_and_readiness_given_when_every_type_has_arrived() {
    let (config, state, readiness) =
        (Arc::new(Config::default_for_tests()), State::new("".into()), Readiness::default());
    let (identities, task) = mesh_identity::Manager::new(mesh_identity::Config::default(), Arc::new(NoCa));
    let manager = tokio::spawn(task);
    let local = Arc::new(Local::new(config, state.clone(), identities));
    let unsynced = Some(readiness.pending("state manager"));
    let mut handler = IntoState { state: state.clone(), local, on_demand: false, waiting: TYPES.to_vec(), unsynced };
    let workload = Arc::new(Workload::new("c//Pod/demo/a", "demo", "a"));
    handler.apply(Update { upserts: vec![Resource::Workload(workload)], removals: Vec::new() });
    handler.synced(ADDRESS_TYPE_URL);
    assert!(!state.snapshot().policies_complete() && !readiness.is_ready());
    handler.synced(AUTHORIZATION_TYPE_URL);
    assert!(state.snapshot().policies_complete() && readiness.is_ready());
    handler.apply(Update { upserts: Vec::new(), removals: vec![ResourceKey::Address("c//Pod/demo/a".into())] });
    assert_eq!(state.snapshot().workloads().count(), 0);
    manager.abort();
}

#[test]
fn introduces_itself_as_upstream_does() {
    let metadata = [("CLUSTER_ID".to_owned(), serde_json::json!({"a": [1, null]}))].into();
    let config = Config {
        pod_name: "zt-1".into(),
        pod_namespace: "istio-system".into(),
        node: "n1".into(),
        metadata,
        ..Config::default_for_tests()
    };
    let node = node(&config);
    assert_eq!(node.id, "ztunnel~1.1.1.1~zt-1.istio-system~istio-system.svc.cluster.local");
    let fields = node.metadata.unwrap().fields;
    assert_eq!(fields["NODE_NAME"], string("n1".to_owned()));
    assert!(matches!(fields["CLUSTER_ID"].kind, Some(Kind::StructValue(_))));
}

struct Anybody;

impl Authenticate for Anybody {
    fn authenticate<'a>(
        &'a self,
        _: &'a MetadataMap,
        _: &'a Extensions,
    ) -> Pin<Box<dyn Future<Output = Result<Caller, Status>> + Send + 'a>> {
        Box::pin(async {
            Ok(Caller { node: "n".into(), namespace: "n".into(), service_account: "s".into(), pod: "p".into() })
        })
    }
}

/// In clear text.
struct Dial(SocketAddr);

impl Transport for Dial {
    fn channel(&self) -> Pin<Box<dyn Future<Output = Result<Channel, BoxError>> + Send + '_>> {
        Box::pin(async move { Ok(Endpoint::new(format!("http://{}", self.0))?.connect().await?) })
    }

    fn metadata(&self) -> Result<MetadataMap, BoxError> {
        Ok(MetadataMap::new())
    }
}

/// `demo/a` and `demo/b`; `demo/b` is shielded from everybody.
pub(crate) fn resources() -> Vec<Resource> {
    let workload = |name: &str, ip: [u8; 4]| {
        let mut w = Workload::new(format!("c//Pod/demo/{name}"), "demo", name);
        w.addresses = vec![ip.into()];
        w.authorization_policies = if name == "b" { vec!["demo/shield".into()] } else { Vec::new() };
        Resource::Workload(Arc::new(w))
    };
    let shield = Policy {
        name: "shield".into(),
        namespace: "demo".into(),
        scope: Scope::WorkloadSelector,
        action: Action::Deny,
        rules: vec![Rule::default()],
        dry_run: false,
        origin: Default::default(),
    };
    vec![workload("a", [10, 0, 0, 1]), workload("b", [10, 0, 0, 2]), Resource::Policy(Arc::new(shield))]
}

/// A control plane with a runtime of its own, so that dropping it cuts its connections.
pub(crate) struct ControlPlaneOf {
    address: SocketAddr,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Drop for ControlPlaneOf {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

pub(crate) fn serve(resources: &[Resource]) -> ControlPlaneOf {
    let cache = Arc::new(Cache::new());
    cache.publish(resources.iter().map(|r| Change::Upsert { encoded: resource_to_wire(r), lane: Lane::Bulk }));
    cache.set_ready();
    let service = DeltaService::new(cache, Arc::new(Anybody), Arc::new(|_| {})).into_server();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    runtime.spawn(async move {
        let incoming =
            tokio_stream::wrappers::TcpListenerStream::new(tokio::net::TcpListener::from_std(listener).unwrap());
        Server::builder().add_service(service).serve_with_incoming(incoming).await.unwrap();
    });
    ControlPlaneOf { address, runtime: Some(runtime) }
}

impl ControlPlaneOf {
    /// Discovery into a state that there is.
    pub(crate) fn tells(&self, state: State, change: impl FnOnce(&mut Config)) -> Life {
        let mut config = Config::default_for_tests();
        change(&mut config);
        into(state, Arc::new(Dial(self.address)), config)
    }
}

/// One life of a proxy's discovery.
pub(crate) struct Life {
    state: State,
    readiness: Readiness,
    trigger: drain::DrainTrigger,
    running: tokio::task::JoinHandle<()>,
    manager: tokio::task::JoinHandle<()>,
}

fn live(address: SocketAddr, change: impl FnOnce(&mut Config)) -> Life {
    let mut config = Config::default_for_tests();
    change(&mut config);
    over(Arc::new(Dial(address)), config)
}

fn over(transport: Arc<dyn Transport>, config: Config) -> Life {
    into(State::new("".into()), transport, config)
}

fn into(state: State, transport: Arc<dyn Transport>, config: Config) -> Life {
    let (config, readiness) = (Arc::new(config), Readiness::default());
    let (identities, task) = mesh_identity::Manager::new(mesh_identity::Config::default(), Arc::new(NoCa));
    let manager = tokio::spawn(task);
    let local = Arc::new(Local::new(config.clone(), state.clone(), identities));
    let unsynced = readiness.pending("state manager");
    let observer = Box::new(|_: Event<'_>| {});
    let discovery = Discovery::over(transport, observer, &config, "the same", state.clone(), local, unsynced);
    let (trigger, watcher) = drain::channel();
    let running = tokio::spawn(discovery.run(watcher));
    Life { state, readiness, trigger, running, manager }
}

impl Life {
    async fn until(&self, what: impl Fn(&State) -> bool) {
        let mut versions = self.state.versions();
        let wait = async {
            while !what(&self.state) {
                versions.changed().await.unwrap();
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(20), wait).await.expect("in time");
    }

    pub(crate) async fn end(self) {
        self.trigger.drain(std::time::Duration::from_secs(20)).await;
        self.running.await.unwrap();
        self.manager.abort();
    }

    /// Whether `demo/a` gets through to `demo/b`'s address, and whether `demo/b` lets it in.
    fn decides(&self) -> (bool, bool) {
        let index = self.state.snapshot();
        let source = index.workload("c//Pod/demo/a").expect("the source");
        let request = Request {
            source,
            source_ip: [10, 0, 0, 1].into(),
            destination: ([10, 0, 0, 2], 80).into(),
            exclude: &[],
            outbound_policy: OutboundPolicy::RegistryOnly,
            lookups: &[],
        };
        let routed = !matches!(select(&index, &request, &mut rand::rng()).next_hop, NextHop::Reject { .. });
        let target = index.workload("c//Pod/demo/b").expect("the target");
        let identity = source.identity();
        let connection = Connection {
            source_ip: [10, 0, 0, 1].into(),
            source_identity: Some(&identity),
            destination: ([10, 0, 0, 2], 80).into(),
        };
        (routed, authorize(&index.policies_for(target), &connection).is_allowed())
    }
}

fn saved_in(directory: &Path) -> impl FnOnce(&mut Config) {
    let directory = directory.to_owned();
    move |config| config.state_dir = Some(directory)
}

#[tokio::test]
async fn a_restart_without_control_plane_serves_and_enforces_what_was_known_and_corrects_it_afterwards() {
    let directory = tempfile::tempdir().unwrap();
    let server = serve(&resources());
    let first = live(server.address, saved_in(directory.path()));
    first.until(|state| state.snapshot().policies().count() == 1 && state.snapshot().workloads().count() == 2).await;
    assert_eq!(first.decides(), (true, false));
    first.end().await;
    let gone = server.address;
    drop(server);

    let second = live(gone, saved_in(directory.path()));
    assert!(second.readiness.is_ready(), "listeners need not wait");
    assert_eq!(second.decides(), (true, false));
    second.end().await;

    let server = serve(&resources()[1..]);
    let third = live(server.address, saved_in(directory.path()));
    assert_eq!(third.state.snapshot().workloads().count(), 2);
    third.until(|state| state.snapshot().workload("c//Pod/demo/a").is_none()).await;
    assert!(third.state.snapshot().workload("c//Pod/demo/b").is_some(), "what is still there stays");
    third.end().await;
}

#[tokio::test]
async fn without_a_saved_state_the_control_plane_is_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let life = live("127.0.0.1:1".parse().unwrap(), saved_in(directory.path()));
    assert!(!life.readiness.is_ready());
    life.end().await;
}

#[tokio::test]
async fn on_demand_a_destination_is_asked_for_with_what_it_leads_to() {
    let mut resources = resources();
    let mut service = Service::new("demo", "web", "web.demo.svc");
    service.vips = vec![mesh_core::addr::NetworkAddress::new("", [10, 96, 0, 1].into())];
    service.waypoint = Some(mesh_core::workload::GatewayAddress {
        destination: mesh_core::workload::GatewayDestination::Hostname {
            namespace: "demo".into(),
            hostname: "gate.demo.svc".into(),
        },
        hbone_mtls_port: 15008,
    });
    resources.push(Resource::Service(Arc::new(service)));
    resources.push(Resource::Service(Arc::new(Service::new("demo", "gate", "gate.demo.svc"))));
    let server = serve(&resources);
    let life = live(server.address, |config| config.xds_on_demand = true);
    life.until(|state| state.snapshot().policies_complete()).await;
    assert!(life.readiness.is_ready());
    assert_eq!(life.state.snapshot().workloads().count(), 0);
    let source = Workload::new("c//Pod/demo/x", "demo", "x");
    on_demand::destination_known(&life.state, &source, [10, 96, 0, 1].into()).await.unwrap();
    on_demand::destination_known(&life.state, &source, [192, 0, 2, 1].into()).await.unwrap();
    let index = life.state.snapshot();
    let mut services: Vec<&str> = index.services().map(|s| &*s.name).collect();
    services.sort_unstable();
    assert_eq!(services, ["gate", "web"]);
    let info = crate::inpod::WorkloadInfo {
        uid: "1".into(),
        name: "a".into(),
        namespace: "demo".into(),
        service_account: "default".into(),
    };
    on_demand::own_record(&life.state, "c", &info).await;
    assert!(life.state.snapshot().workload("c//Pod/demo/a").is_some());
    life.end().await;
}

/// Lets in whoever brings the header and the token.
struct Guarded(tokio::sync::mpsc::UnboundedSender<bool>);

impl Authenticate for Guarded {
    fn authenticate<'a>(
        &'a self,
        metadata: &'a MetadataMap,
        extensions: &'a Extensions,
    ) -> Pin<Box<dyn Future<Output = Result<Caller, Status>> + Send + 'a>> {
        let is = |name: &str, value: &str| metadata.get(name).is_some_and(|v| v == value);
        let expected = is("x-tenant", "blue") && is("authorization", "Bearer t0ken") && is("clusterid", "c1");
        self.0.send(expected).unwrap_or_default();
        Anybody.authenticate(metadata, extensions)
    }
}

#[tokio::test]
async fn the_control_plane_is_trusted_by_its_root_and_alternative_name_and_told_the_headers() {
    use tokio_rustls::{TlsAcceptor, rustls::ServerConfig};
    let authority = mesh_identity::authority::SigningAuthority::generate("cluster.local").unwrap();
    let (hour, now) = (std::time::Duration::from_secs(3600), SystemTime::now());
    let certificate = authority.server_certificate(&["istiod.test".to_owned()], hour, now).unwrap();
    let tls = ServerConfig::builder_with_provider(mesh_identity::tls::provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(certificate.chain, certificate.key.clone_key())
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let incoming = futures_util::stream::unfold((listener, acceptor), |(listener, acceptor)| async move {
        let (tcp, _) = listener.accept().await.ok()?;
        // tonic knows no TLS streams of others, but it knows duplex ones.
        let (near, mut far) = tokio::io::duplex(1 << 16);
        let accepting = acceptor.accept(tcp);
        tokio::spawn(async move { tokio::io::copy_bidirectional(&mut accepting.await?, &mut far).await });
        Some((Ok::<_, std::io::Error>(near), (listener, acceptor)))
    });
    let cache = Arc::new(Cache::new());
    cache.set_ready();
    let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
    let service = DeltaService::new(cache, Arc::new(Guarded(tell)), Arc::new(|_| {})).into_server();
    let server = tokio::spawn(Server::builder().add_service(service).serve_with_incoming(incoming));

    let vars = [
        ("XDS_ADDRESS", address.to_string()),
        ("XDS_ROOT_CA", authority.root_pem().to_owned()),
        ("ALT_XDS_HOSTNAME", "istiod.test".to_owned()),
        ("XDS_HEADER_X-Tenant", "blue".to_owned()),
        ("AUTH_TOKEN", "t0ken".to_owned()),
        ("CLUSTER_ID", "c1".to_owned()),
    ];
    let vars: std::collections::HashMap<String, String> = vars.map(|(name, value)| (name.to_owned(), value)).into();
    let config = Config::from_env(&vars).unwrap();
    let life = over(Arc::new(Reach(config.xds.as_ref().unwrap().control_plane(config.trust.control_tls()))), config);
    life.until(|state| state.snapshot().policies_complete()).await;
    assert_eq!(told.recv().await, Some(true));
    life.end().await;
    server.abort();
}
