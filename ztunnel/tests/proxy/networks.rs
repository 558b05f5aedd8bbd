//! Destinations on another network: through its gateway, in a tunnel inside a tunnel.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

use mesh_core::{
    addr::NetworkAddress,
    index::Resource,
    service::Service,
    workload::{ApplicationTunnel, GatewayAddress, GatewayDestination, Workload},
};
use tokio::{
    io::copy_bidirectional,
    join,
    net::{TcpListener, TcpSocket, TcpStream},
    task::JoinSet,
};
use ztunnel::pods::Protocol;

use crate::{
    mesh::{HBONE_PORT, Mesh, Pod, expect_reset, identity, reset, samples, service, workload},
    ping_pong,
    trust::revoke,
};

const VIP: [u8; 4] = [240, 0, 0, 9];

/// A client here, a server there, and a gateway between: a pod whose application hands bytes on, unread, to the server's HBONE port.
struct Networks {
    mesh: Mesh,
    client: Pod,
    server: Pod,
    _gateway: Pod,
    /// What came through the gateway: one of these for each tunnel inside.
    passed: Arc<AtomicUsize>,
    forwarding: JoinSet<()>,
    listener: TcpListener,
}

impl Networks {
    /// The service vouches for its endpoints as `vouched`.
    async fn new(vouched: &[&str]) -> Self {
        let mesh = Mesh::new();
        let client = mesh.pod("client").await;
        let server = mesh.pod_with("server", |w| w.network = "there".into()).await;
        let door = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let port = door.local_addr().expect("address").port();
        let tunnel = ApplicationTunnel { proxy_protocol: true, port: Some(port) };
        // The PROXY header makes the gateway's proxy deliver on plain loopback; the forwarder below skips it.
        let gateway = mesh.pod_with("gateway", |w| w.application_tunnel = Some(tunnel.clone())).await;
        let passed = Arc::new(AtomicUsize::new(0));
        let mut forwarding = JoinSet::new();
        let way = (SocketAddr::new(gateway.ip, 0), SocketAddr::new(server.ip, HBONE_PORT));
        forwarding.spawn(forward(door, way, passed.clone()));
        let (listener, address) = server.listen().await;
        let Resource::Service(web) = service("web", VIP, address.port()) else { panic!("a service") };
        let subject_alt_names = vouched.iter().map(|account| identity(account).to_string().into()).collect();
        let way = GatewayDestination::Address(NetworkAddress::new("", gateway.ip));
        let remote = Workload {
            network_gateway: Some(GatewayAddress { destination: way, hbone_mtls_port: HBONE_PORT }),
            services: [("demo/web.demo.svc.cluster.local".into(), Default::default())].into_iter().collect(),
            ..(*server.workload).clone()
        };
        let web = Service { subject_alt_names, ..(*web).clone() };
        // Networks share addresses: over there, the gateway's is somebody else's.
        let namesake = Workload { network: "there".into(), ..workload("namesake", gateway.ip) };
        mesh.upsert([Resource::Workload(Arc::new(namesake))]);
        mesh.upsert([Resource::Service(Arc::new(web)), Resource::Workload(Arc::new(remote))]);
        Self { mesh, client, server, _gateway: gateway, passed, forwarding, listener }
    }

    async fn open(&self) -> (TcpStream, TcpStream) {
        let (near, accepted) = join!(self.client.dial((VIP, 80).into()), self.listener.accept());
        (near, accepted.expect("accept").0)
    }
}

/// From the gateway's own address: whoever looked the source up by it would find the gateway.
async fn forward(door: TcpListener, (own, to): (SocketAddr, SocketAddr), passed: Arc<AtomicUsize>) {
    let mut connections = JoinSet::new();
    while let Ok((mut from, _)) = door.accept().await {
        passed.fetch_add(1, SeqCst);
        connections.spawn(async move {
            skip_proxy_header(&mut from).await;
            let socket = TcpSocket::new_v4().expect("socket");
            socket.bind(own).expect("the gateway's address");
            let mut to = socket.connect(to).await.expect("the server's HBONE port");
            drop(copy_bidirectional(&mut from, &mut to).await);
        });
    }
}

async fn skip_proxy_header(stream: &mut TcpStream) {
    use tokio::io::AsyncReadExt as _;
    let mut head = [0; 16];
    stream.read_exact(&mut head).await.expect("header");
    let mut rest = vec![0; usize::from(u16::from_be_bytes([head[14], head[15]]))];
    stream.read_exact(&mut rest).await.expect("addresses");
}

#[tokio::test]
async fn a_service_on_another_network_is_reached_through_its_gateway_and_both_ends_know_each_other() {
    let networks = Networks::new(&["server"]).await;
    let (mut near, mut far) = networks.open().await;
    ping_pong(&mut near, &mut far).await;
    let open = networks.client.handle.connections().outbound;
    assert_eq!((open.len(), open[0].protocol), (1, Protocol::DoubleHbone));
    drop((near, far));
    let Networks { client, server, .. } = networks;
    let (client, server) = (client.finish().await, server.finish().await);
    let labels = [
        r#"reporter="source""#,
        r#"destination_workload="server""#,
        r#"destination_principal="spiffe://cluster.local/ns/demo/sa/server""#,
        r#"destination_service_name="web""#,
    ];
    for family in ["istio_tcp_connections_opened_total", "istio_tcp_connections_closed_total"] {
        assert_eq!(samples(&client, family, &labels).len(), 1, "{client}");
        assert!(samples(&client, family, &[r#"reporter="source""#]).iter().all(|l| l.ends_with(" 1")), "{client}");
    }
    // By its own word: the TCP peer is the gateway.
    let labels = [r#"source_workload="client""#, r#"source_principal="spiffe://cluster.local/ns/demo/sa/client""#];
    assert_eq!(samples(&server, "istio_tcp_connections_closed_total", &labels).len(), 1, "{server}");
}

#[tokio::test]
async fn each_connection_has_a_tunnel_of_its_own_so_that_the_gateway_can_spread_them() {
    let networks = Networks::new(&["server"]).await;
    let mut open = Vec::new();
    for _ in 0..3 {
        open.push(networks.open().await);
    }
    for (near, far) in &mut open {
        ping_pong(near, far).await;
    }
    assert_eq!(networks.passed.load(SeqCst), 3);
}

#[tokio::test]
async fn whoever_answers_beyond_the_gateway_must_be_whom_the_service_vouches_for() {
    let networks = Networks::new(&["somebody-else"]).await;
    expect_reset(&mut networks.client.dial((VIP, 80).into()).await).await;
    let metrics = networks.client.finish().await;
    assert_eq!(samples(&metrics, "fairway_connection_failures_total", &[r#"reason="tls""#]).len(), 1, "{metrics}");
    let failed = [r#"response_flags="TLS_FAILURE""#, " 1"];
    assert_eq!(samples(&metrics, "istio_tcp_connections_failed_total", &failed).len(), 1, "{metrics}");
}

#[tokio::test]
async fn a_service_that_vouches_for_nobody_is_not_reached() {
    let networks = Networks::new(&[]).await;
    expect_reset(&mut networks.client.dial((VIP, 80).into()).await).await;
    assert_eq!(networks.passed.load(SeqCst), 0);
    let metrics = networks.client.finish().await;
    assert_eq!(samples(&metrics, "fairway_connection_failures_total", &[r#"reason="no_route""#]).len(), 1);
}

#[tokio::test]
async fn a_reset_passes_both_tunnels() {
    for client_resets in [true, false] {
        let networks = Networks::new(&["server"]).await;
        let (mut near, mut far) = networks.open().await;
        ping_pong(&mut near, &mut far).await;
        let (rude, mut victim) = if client_resets { (near, far) } else { (far, near) };
        reset(rude);
        expect_reset(&mut victim).await;
    }
}

#[tokio::test]
async fn when_the_gateway_goes_both_applications_see_a_reset() {
    let mut networks = Networks::new(&["server"]).await;
    let (mut near, mut far) = networks.open().await;
    ping_pong(&mut near, &mut far).await;
    networks.forwarding.shutdown().await;
    expect_reset(&mut near).await;
    expect_reset(&mut far).await;
}

/// The server is known by the inner tunnel only, the gateway by the outer one.
#[tokio::test]
async fn a_flow_ends_when_either_tunnels_peer_is_revoked() {
    for account in ["server", "gateway"] {
        let networks = Networks::new(&["server"]).await;
        let (mut near, mut far) = networks.open().await;
        ping_pong(&mut near, &mut far).await;
        revoke(&networks.mesh, account);
        join!(expect_reset(&mut near), expect_reset(&mut far));
        let metrics = networks.client.finish().await;
        let flag = [r#"reporter="source""#, r#"response_flags="CERT_REVOKED""#];
        assert_eq!(samples(&metrics, "istio_tcp_connections_closed_total", &flag).len(), 1, "{account}: {metrics}");
    }
}

#[tokio::test]
async fn an_address_of_another_network_means_nothing_here_and_is_passed_through() {
    let networks = Networks::new(&["server"]).await;
    let address = networks.listener.local_addr().expect("address");
    // That this address is also a pod's, elsewhere, must not make it that pod: no tunnel, no identity.
    let (mut near, accepted) = join!(networks.client.dial(address), networks.listener.accept());
    ping_pong(&mut near, &mut accepted.expect("accept").0).await;
    let open = networks.client.handle.connections().outbound;
    assert_eq!((open.len(), open[0].protocol, open[0].actual_dst), (1, Protocol::Tcp, address));
    assert!(networks.mesh.state.snapshot().workload_by_address(&NetworkAddress::new("", address.ip())).is_none());
    assert_eq!(networks.passed.load(SeqCst), 0);
}
