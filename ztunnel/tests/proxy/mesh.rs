//! A mesh in one process: the CA is a signing authority in memory, and the state is written by hand. On loopback every "pod" is a
//! dedicated proxy on an address of its own, entered through SOCKS5; in namespaces it is what it is on a node.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use mesh_core::{
    addr::NetworkAddress,
    identity::Identity,
    index::{Delta, Provenance, Resource, ResourceKey},
    origin::Origin,
    policy::{Action, Clause, Match, Policy, Rule, Scope, StringMatch},
    service::{AppProtocol, Service, ServicePort},
    workload::{PortMapping, TunnelProtocol, Workload},
};
use mesh_identity::{CaClient, CaError, Manager, Trust, authority::SigningAuthority};
use mesh_net::NetNs;
use mesh_runtime::{drain::DrainMode, metrics::Registry, workers::Workers};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};
use ztunnel::{
    config::{
        Config, Ports, ProxyMode,
        dns::{DNS_PORT, Dns},
    },
    error::StartError,
    inpod::WorkloadInfo,
    lookup::Lookups,
    outcome::Outcomes,
    pods::{self, Kind, PodHandle, Shared},
    state::State,
};

pub(crate) const HBONE_PORT: u16 = 15008;
const TTL: Duration = Duration::from_secs(3600);
/// An account whose certificates end within a test.
pub(crate) const BRIEF: &str = "brief";
pub(crate) const BRIEF_TTL: Duration = Duration::from_secs(3);
/// Generous: it only ends a test that would fail anyway.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Signs with the authority of the moment.
pub(crate) struct FakeCa(Mutex<Arc<SigningAuthority>>);

impl FakeCa {
    pub(crate) fn authority(&self) -> Arc<SigningAuthority> {
        self.0.lock().expect("lock").clone()
    }

    /// From now on another authority signs.
    pub(crate) fn replace(&self, authority: SigningAuthority) {
        *self.0.lock().expect("lock") = Arc::new(authority);
    }
}

impl CaClient for FakeCa {
    fn sign(
        &self,
        identity: &Identity,
        csr_pem: String,
    ) -> mesh_identity::ca::BoxFuture<'_, Result<Vec<String>, CaError>> {
        let ttl = if &*identity.service_account == BRIEF { BRIEF_TTL } else { TTL };
        let signed = self.authority().sign(&csr_pem, identity, ttl, SystemTime::now());
        Box::pin(std::future::ready(signed.map_err(|error| CaError::Refused(error.to_string()))))
    }
}

/// What all pods share, and the identity manager's task.
pub(crate) struct Mesh {
    pub(crate) state: State,
    pub(crate) identities: Manager,
    pub(crate) ca: Arc<FakeCa>,
    task: JoinHandle<()>,
}

impl Drop for Mesh {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A pod with its proxy.
pub(crate) struct Pod {
    pub(crate) ip: IpAddr,
    pub(crate) workload: Arc<Workload>,
    pub(crate) handle: PodHandle,
    pub(crate) registry: Registry,
    _workers: Workers,
}

pub(crate) fn identity(account: &str) -> Identity {
    Identity::new("cluster.local", "demo", account)
}

impl Mesh {
    /// Without policies, and known to be complete.
    pub(crate) fn new() -> Self {
        Self::trusting(Trust::default())
    }

    pub(crate) fn trusting(trust: Trust) -> Self {
        let authority = SigningAuthority::generate("cluster.local").expect("authority");
        let ca = Arc::new(FakeCa(Mutex::new(Arc::new(authority))));
        let config = mesh_identity::Config { trust: Arc::new(trust), ..mesh_identity::Config::default() };
        let (identities, task) = Manager::new(config, ca.clone());
        let state = State::new("".into());
        state.update(|index| index.set_policies_complete(true));
        Self { state, identities, ca, task: tokio::spawn(task) }
    }

    pub(crate) async fn pod(&self, name: &str) -> Pod {
        self.pod_with(name, |_| ()).await
    }

    /// A pod known to the mesh before its proxy starts.
    pub(crate) async fn pod_with(&self, name: &str, change: impl Fn(&mut Workload)) -> Pod {
        self.pod_of(name, change, |_| ()).await
    }

    /// A pod whose proxy is told something else than usual.
    pub(crate) async fn pod_configured(&self, name: &str, configure: impl Fn(&mut Config)) -> Pod {
        self.pod_of(name, |_| (), configure).await
    }

    async fn pod_of(&self, name: &str, change: impl Fn(&mut Workload), configure: impl Fn(&mut Config)) -> Pod {
        loop {
            let ip = some_loopback_address();
            let mut workload = workload(name, ip);
            change(&mut workload);
            let workload = Arc::new(workload);
            match self.start(ip, &workload, &configure).await {
                Ok(pod) => {
                    self.upsert([Resource::Workload(workload)]);
                    return pod;
                }
                Err(StartError::Listen { source, .. }) if source.kind() == std::io::ErrorKind::AddrInUse => {}
                Err(error) => panic!("{error}"),
            }
        }
    }

    async fn start(
        &self,
        ip: IpAddr,
        workload: &Arc<Workload>,
        configure: impl Fn(&mut Config),
    ) -> Result<Pod, StartError> {
        let ports =
            Ports { outbound: 0, inbound: HBONE_PORT, passthrough: 0, socks5: 0, admin: 0, stats: 0, readiness: 0 };
        let network = workload.network.clone();
        let mut config =
            Config { ports, network, local_address: Some(ip), socks5: true, ..Config::default_for_tests() };
        configure(&mut config);
        self.start_with(config, None, ip, workload).await
    }

    /// A pod with a namespace of its own, served as on a node: usual ports, marked, transparent.
    pub(crate) async fn pod_in(&self, netns: &NetNs, name: &str, addresses: &[IpAddr]) -> Pod {
        let workload = Workload { addresses: addresses.to_vec(), ..workload(name, addresses[0]) };
        let workload = Arc::new(workload);
        let base = Config::default_for_tests();
        let config = Config {
            mode: ProxyMode::Shared,
            packet_mark: Some(1337),
            reuse_port: true,
            ipv6: true,
            local_address: None,
            ports: Ports::default(),
            dns: Dns { port: DNS_PORT, ..base.dns.clone() },
            ..base
        };
        let started = self.start_with(config, Some(netns.clone()), addresses[0], &workload).await;
        self.upsert([Resource::Workload(workload)]);
        started.expect("listeners")
    }

    /// The proxy's own workload, of which only the HBONE port is served.
    pub(crate) async fn proxy_itself(&self, name: &str) -> Pod {
        let ip = some_loopback_address();
        let workload = Arc::new(workload(name, ip));
        let ports = Ports { inbound: HBONE_PORT, ..Ports::default() };
        let config = Config { ports, local_address: Some(ip), ..Config::default_for_tests() };
        let served = Served::new(self, config);
        let handle = pods::start_self_listener(&served.shared, info(&workload)).await.expect("listener");
        self.upsert([Resource::Workload(workload.clone())]);
        served.pod(ip, workload, handle)
    }

    async fn start_with(
        &self,
        config: Config,
        netns: Option<NetNs>,
        ip: IpAddr,
        workload: &Arc<Workload>,
    ) -> Result<Pod, StartError> {
        let served = Served::new(self, config);
        let handle = pods::start(&served.shared, info(workload), netns).await?;
        Ok(served.pod(ip, workload.clone(), handle))
    }

    pub(crate) fn upsert(&self, resources: impl IntoIterator<Item = Resource>) {
        let delta =
            Delta { provenance: Provenance::Xds, upserts: resources.into_iter().collect(), removals: Vec::new() };
        self.state.update(|index| index.apply(delta));
    }

    pub(crate) fn remove_policy(&self, key: &str) {
        let removals = vec![ResourceKey::Policy(key.into())];
        self.state.update(|index| index.apply(Delta { provenance: Provenance::Xds, upserts: Vec::new(), removals }));
    }

    /// A namespace policy about callers of these accounts.
    pub(crate) fn policy(&self, name: &str, action: Action, accounts: &[&str]) {
        self.upsert([Resource::Policy(Arc::new(policy(name, action, accounts)))]);
    }
}

/// What a proxy of one pod runs on.
struct Served {
    shared: Arc<Shared>,
    registry: Registry,
    workers: Workers,
}

impl Served {
    fn new(mesh: &Mesh, config: Config) -> Self {
        let workers = Workers::spawn(2, "proxy").expect("workers");
        let registry = Registry::new();
        let shared = Shared {
            config: Arc::new(config),
            state: mesh.state.clone(),
            identities: mesh.identities.clone(),
            outcomes: Outcomes::new(&registry),
            lookups: Lookups::new(false),
            memory: mesh_hbone::Process::default(),
            workers: workers.handles().to_vec(),
        };
        Self { shared: Arc::new(shared), registry, workers }
    }

    fn pod(self, ip: IpAddr, workload: Arc<Workload>, handle: PodHandle) -> Pod {
        Pod { ip, workload, handle, registry: self.registry, _workers: self.workers }
    }
}

fn info(workload: &Workload) -> WorkloadInfo {
    WorkloadInfo {
        uid: workload.uid.clone(),
        name: workload.name.clone(),
        namespace: workload.namespace.clone(),
        service_account: workload.service_account.clone(),
    }
}

pub(crate) fn policy(name: &str, action: Action, accounts: &[&str]) -> Policy {
    let principals = accounts.iter().map(|a| StringMatch::Exact(identity(a).principal().into())).collect();
    let clauses = vec![Clause { matches: vec![Match { principals, ..Match::default() }] }];
    Policy {
        name: name.into(),
        namespace: "demo".into(),
        scope: Scope::Namespace,
        action,
        rules: vec![Rule { clauses, origin: Origin::default() }],
        dry_run: false,
        origin: Origin::default(),
    }
}

pub(crate) fn workload(name: &str, ip: IpAddr) -> Workload {
    Workload {
        addresses: vec![ip],
        service_account: name.into(),
        tunnel_protocol: TunnelProtocol::Hbone,
        ..Workload::new(format!("Kubernetes//Pod/demo/{name}"), "demo", name)
    }
}

/// A service at `vip` whose port 80 leads to `target`; workloads join it by [`serving`].
pub(crate) fn service(name: &str, vip: [u8; 4], target: u16) -> Resource {
    let mapping = PortMapping { service_port: 80, target_port: target };
    Resource::Service(Arc::new(Service {
        vips: vec![NetworkAddress::new("", vip.into())],
        ports: vec![ServicePort { mapping, app_protocol: AppProtocol::Unknown }],
        ..Service::new("demo", name, format!("{name}.demo.svc.cluster.local"))
    }))
}

pub(crate) fn serving(workload: &Workload, service: &str) -> Resource {
    let services =
        [(format!("demo/{service}.demo.svc.cluster.local").into(), Default::default())].into_iter().collect();
    Resource::Workload(Arc::new(Workload { services, ..workload.clone() }))
}

/// Random, so that tests running at once, in whichever process, rarely meet.
pub(crate) fn some_loopback_address() -> IpAddr {
    let [a, b, c] = [rand::random_range(1..255), rand::random_range(0..=255), rand::random_range(1..255)];
    Ipv4Addr::new(127, a, b, c).into()
}

impl Pod {
    pub(crate) fn port_of(&self, kind: Kind) -> SocketAddr {
        let found = self.handle.listening().iter().find(|(k, _)| *k == kind);
        found.expect("every kind is listening").1
    }

    /// An application of this pod, listening.
    pub(crate) async fn listen(&self) -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind((self.ip, 0)).await.expect("bind");
        let address = listener.local_addr().expect("address");
        (listener, address)
    }

    /// A connection of an application of this pod.
    pub(crate) async fn dial(&self, destination: SocketAddr) -> TcpStream {
        let request = match destination.ip() {
            IpAddr::V4(ip) => [&[1][..], &ip.octets()].concat(),
            IpAddr::V6(ip) => [&[4][..], &ip.octets()].concat(),
        };
        self.socks(&request, destination.port()).await
    }

    /// By the name of a service.
    pub(crate) async fn dial_name(&self, host: &str, port: u16) -> TcpStream {
        let mut request = vec![3, u8::try_from(host.len()).expect("short")];
        request.extend(host.bytes());
        self.socks(&request, port).await
    }

    async fn socks(&self, address: &[u8], port: u16) -> TcpStream {
        let mut stream = TcpStream::connect(self.port_of(Kind::Socks5)).await.expect("SOCKS port");
        stream.write_all(&[5, 1, 0]).await.expect("greeting");
        stream.read_exact(&mut [0; 2]).await.expect("method");
        let request = [&[5, 1, 0], address, &port.to_be_bytes()].concat();
        stream.write_all(&request).await.expect("request");
        let mut reply = [0; 10];
        stream.read_exact(&mut reply).await.expect("reply");
        assert_eq!(reply[..2], [5, 0], "SOCKS reply");
        stream
    }

    /// Lets everything of the pod end, then answers what it counted.
    pub(crate) async fn finish(self) -> String {
        self.handle.stop(DrainMode::Graceful, PATIENCE).await;
        self.registry.encode()
    }
}

/// The lines of a family that hold all of `parts`, with their values.
pub(crate) fn samples<'a>(metrics: &'a str, family: &str, parts: &[&str]) -> Vec<&'a str> {
    metrics.lines().filter(|line| line.starts_with(family) && parts.iter().all(|part| line.contains(part))).collect()
}

pub(crate) async fn read_all(stream: &mut TcpStream) -> Vec<u8> {
    let mut all = Vec::new();
    stream.read_to_end(&mut all).await.expect("read to the end");
    all
}

pub(crate) fn reset(stream: TcpStream) {
    mesh_net::sockets::reset_on_close(&stream).expect("linger");
    drop(stream);
}

pub(crate) async fn expect_reset(stream: &mut TcpStream) {
    let error = stream.read(&mut [0; 16]).await.expect_err("a reset");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

/// A connection that was accepted and reset at once: the reset may be there before the connect is noticed.
pub(crate) async fn expect_reset_early(connected: std::io::Result<TcpStream>) {
    match connected {
        Ok(mut stream) => expect_reset(&mut stream).await,
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
    }
}
