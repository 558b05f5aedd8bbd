//! Where a connection gets to: what a service's definition means to the applications that dial it.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use mesh_core::{
    addr::NetworkAddress,
    headers::Authority,
    index::Resource,
    policy::Action,
    service::{HealthPolicy, LoadBalancing, LoadBalancingMode, Scope, Service},
    workload::{ApplicationTunnel, Health, OutboundPolicy, TunnelProtocol, Workload},
};
use mesh_hbone::{Budget, ConnectRequest, Settings, client::connect_once};
use tokio::{
    join,
    net::{TcpListener, TcpStream},
    task::LocalSet,
    time::timeout,
};
use ztunnel::pods::{Kind, Protocol};

use crate::{
    hostile::tls_as,
    mesh::{HBONE_PORT, Mesh, PATIENCE, Pod, expect_reset, service, serving, some_loopback_address},
    ping_pong,
};

const VIP: [u8; 4] = [240, 0, 0, 7];

async fn open(client: &Pod, to: SocketAddr, listener: &TcpListener) -> (TcpStream, TcpStream) {
    let both = async { join!(client.dial(to), listener.accept()) };
    let (near, accepted) = timeout(PATIENCE, both).await.expect("connected");
    (near, accepted.expect("accept").0)
}

async fn reaches(client: &Pod, to: SocketAddr, listener: &TcpListener) {
    let (mut near, mut far) = open(client, to, listener).await;
    ping_pong(&mut near, &mut far).await;
}

/// The service `web` at [`VIP`], whose endpoints all have an application on `port`.
fn web(port: u16, change: impl FnOnce(&mut Service)) -> Resource {
    let Resource::Service(web) = service("web", VIP, port) else { panic!("a service") };
    let mut web = (*web).clone();
    change(&mut web);
    Resource::Service(Arc::new(web))
}

fn balanced(mode: LoadBalancingMode, routing_preference: &[Scope], health_policy: HealthPolicy) -> LoadBalancing {
    LoadBalancing { routing_preference: routing_preference.to_vec(), mode, health_policy }
}

fn in_zone(zone: &str) -> impl Fn(&mut Workload) {
    move |workload| workload.locality.zone = zone.into()
}

/// Applications of two pods on the same port.
async fn twins(first: &Pod, second: &Pod) -> (TcpListener, TcpListener, u16) {
    loop {
        let (listener, address) = first.listen().await;
        if let Ok(twin) = TcpListener::bind((second.ip, address.port())).await {
            return (listener, twin, address.port());
        }
    }
}

#[tokio::test]
async fn clients_are_served_from_their_own_zone_and_from_another_once_that_has_nobody() {
    let mesh = Mesh::new();
    let client = mesh.pod_with("client", in_zone("a")).await;
    let (near, far) = (mesh.pod_with("near", in_zone("a")).await, mesh.pod_with("far", in_zone("b")).await);
    let (here, there, port) = twins(&near, &far).await;
    let failover = balanced(LoadBalancingMode::Failover, &[Scope::Zone], HealthPolicy::OnlyHealthy);
    let web = web(port, |web| web.load_balancing = Some(failover));
    mesh.upsert([web, serving(&near.workload, "web"), serving(&far.workload, "web")]);
    for _ in 0..8 {
        reaches(&client, (VIP, 80).into(), &here).await;
    }
    let sick = Workload { health: Health::Unhealthy, ..(*near.workload).clone() };
    mesh.upsert([serving(&sick, "web")]);
    reaches(&client, (VIP, 80).into(), &there).await;
}

#[tokio::test]
async fn a_service_confined_to_the_node_is_never_served_from_another() {
    let mesh = Mesh::new();
    let client = mesh.pod_with("client", |w| w.node = "here".into()).await;
    let server = mesh.pod_with("server", |w| w.node = "there".into()).await;
    let (listener, address) = server.listen().await;
    let strict = balanced(LoadBalancingMode::Strict, &[Scope::Node], HealthPolicy::OnlyHealthy);
    let confined = web(address.port(), |web| web.load_balancing = Some(strict));
    mesh.upsert([confined, serving(&server.workload, "web")]);
    expect_reset(&mut client.dial((VIP, 80).into()).await).await;
    mesh.upsert([web(address.port(), |_| ())]);
    reaches(&client, (VIP, 80).into(), &listener).await;
}

#[tokio::test]
async fn endpoints_without_weight_get_nothing() {
    let mesh = Mesh::new();
    let client = mesh.pod("client").await;
    let (all, none) = (mesh.pod("all").await, mesh.pod_with("none", |w| w.capacity = 0).await);
    let (listener, _unused, port) = twins(&all, &none).await;
    mesh.upsert([web(port, |_| ()), serving(&all.workload, "web"), serving(&none.workload, "web")]);
    for _ in 0..8 {
        reaches(&client, (VIP, 80).into(), &listener).await;
    }
}

#[tokio::test]
async fn endpoints_that_were_not_ready_serve_as_soon_as_the_service_takes_them_as_they_are() {
    let mesh = Mesh::new();
    let client = mesh.pod("client").await;
    let server = mesh.pod_with("server", |w| w.health = Health::Unhealthy).await;
    let (listener, address) = server.listen().await;
    mesh.upsert([web(address.port(), |_| ()), serving(&server.workload, "web")]);
    expect_reset(&mut client.dial((VIP, 80).into()).await).await;
    let any = balanced(LoadBalancingMode::Standard, &[], HealthPolicy::AllowAll);
    mesh.upsert([web(address.port(), |web| web.load_balancing = Some(any))]);
    reaches(&client, (VIP, 80).into(), &listener).await;
}

#[tokio::test]
async fn a_headless_service_leads_to_its_pods_by_name_and_by_their_addresses() {
    let mesh = Mesh::new();
    let (client, server) = (mesh.pod("client").await, mesh.pod("server").await);
    let (listener, address) = server.listen().await;
    mesh.upsert([web(address.port(), |web| web.vips.clear()), serving(&server.workload, "web")]);
    for name in ["web.demo.svc.cluster.local", "server.web.demo.svc.cluster.local"] {
        let (mut near, accepted) = join!(client.dial_name(name, address.port()), listener.accept());
        ping_pong(&mut near, &mut accepted.expect("accept").0).await;
    }
    let (_near, _far) = open(&client, address, &listener).await;
    let open = client.handle.connections().outbound;
    assert!(open.iter().all(|connection| connection.protocol == Protocol::Hbone), "{open:?}");
}

#[tokio::test]
async fn addresses_in_a_range_that_is_passed_through_are_reached_as_dialled_also_by_confined_clients() {
    let mesh = Mesh::new();
    let confined = |w: &mut Workload| w.outbound_policy = Some(OutboundPolicy::RegistryOnly);
    let client = mesh.pod_with("client", confined).await;
    let outside = TcpListener::bind((some_loopback_address(), 0)).await.expect("bind");
    let address = outside.local_addr().expect("address");
    expect_reset(&mut client.dial(address).await).await;
    let passed = balanced(LoadBalancingMode::Passthrough, &[], HealthPolicy::AllowAll);
    mesh.upsert([web(80, |web| {
        web.vips.clear();
        web.cidr_vips = vec![("".into(), format!("{}/31", address.ip()).parse().expect("range"))];
        web.load_balancing = Some(passed);
    })]);
    let (mut near, mut far) = open(&client, address, &outside).await;
    ping_pong(&mut near, &mut far).await;
    assert_eq!(client.handle.connections().outbound[0].protocol, Protocol::Tcp);
}

#[tokio::test]
async fn a_workload_that_does_not_speak_hbone_is_reached_in_plain_text() {
    let mesh = Mesh::new();
    let client = mesh.pod("client").await;
    let server = mesh.pod_with("server", |w| w.tunnel_protocol = TunnelProtocol::None).await;
    let (listener, address) = server.listen().await;
    mesh.upsert([web(address.port(), |_| ()), serving(&server.workload, "web")]);
    let (mut near, mut far) = open(&client, (VIP, 80).into(), &listener).await;
    ping_pong(&mut near, &mut far).await;
    let open = client.handle.connections().outbound;
    assert_eq!((open[0].protocol, open[0].actual_dst), (Protocol::Tcp, address));
}

#[tokio::test]
async fn an_ipv4_address_written_as_ipv6_is_the_same_destination() {
    let mesh = Mesh::new();
    let (client, server) = (mesh.pod("client").await, mesh.pod("server").await);
    let (listener, address) = server.listen().await;
    let IpAddr::V4(ip) = server.ip else { panic!("IPv4 only") };
    let mapped = SocketAddr::new(ip.to_ipv6_mapped().into(), address.port());
    let (mut near, mut far) = open(&client, mapped, &listener).await;
    ping_pong(&mut near, &mut far).await;
    let open = client.handle.connections().outbound;
    assert_eq!((open[0].protocol, open[0].original_dst), (Protocol::Hbone, address));
}

#[tokio::test]
async fn a_dual_stack_service_is_reached_at_either_of_its_addresses() {
    let mesh = Mesh::new();
    let (client, server) = (mesh.pod("client").await, mesh.pod("server").await);
    let (listener, address) = server.listen().await;
    let six: IpAddr = "fd00::7".parse().expect("address");
    let both = web(address.port(), |web| web.vips.push(NetworkAddress::new("", six)));
    mesh.upsert([both, serving(&server.workload, "web")]);
    for vip in [IpAddr::from(VIP), six] {
        reaches(&client, SocketAddr::new(vip, 80), &listener).await;
    }
}

#[tokio::test]
async fn an_application_tunnel_without_proxy_protocol_gets_the_clients_bytes_alone() {
    let mesh = Mesh::new();
    let client = mesh.pod("client").await;
    let application = TcpListener::bind((some_loopback_address(), 0)).await.expect("bind");
    let port = application.local_addr().expect("address").port();
    let tunnel = ApplicationTunnel { proxy_protocol: false, port: Some(port) };
    let server = mesh.pod_with("server", |w| w.application_tunnel = Some(tunnel.clone())).await;
    let listener = TcpListener::bind((server.ip, port)).await.expect("bind");
    reaches(&client, SocketAddr::new(server.ip, 80), &listener).await;
}

#[tokio::test]
async fn a_connect_to_the_proxys_own_port_is_refused_with_503() {
    LocalSet::new()
        .run_until(async {
            let mesh = Mesh::new();
            let server = mesh.pod("server").await;
            for kind in [Kind::Inbound, Kind::Outbound, Kind::Passthrough] {
                let authority = Authority::Address(SocketAddr::new(server.ip, server.port_of(kind).port()));
                let request = ConnectRequest { authority, headers: Vec::new() };
                let stream = tls_as(&mesh, "client", &server).await;
                let answer = connect_once(stream, &Settings::default(), Budget::default(), &request).await;
                let error = answer.expect_err("refused");
                assert_eq!(error.to_string(), "http status: 503 Service Unavailable");
            }
        })
        .await;
}

#[tokio::test]
async fn what_the_proxy_itself_serves_is_reached_through_hbone_by_whom_policy_allows() {
    let mesh = Mesh::new();
    let (scraper, stranger) = (mesh.pod("scraper").await, mesh.pod("stranger").await);
    let proxy = mesh.proxy_itself("ztunnel").await;
    mesh.policy("scrapers", Action::Allow, &["scraper"]);
    let stats = TcpListener::bind((proxy.ip, 0)).await.expect("bind");
    let address = stats.local_addr().expect("address");
    let (mut near, mut far) = open(&scraper, address, &stats).await;
    ping_pong(&mut near, &mut far).await;
    assert_ne!(far.peer_addr().expect("peer").ip(), scraper.ip, "as itself: nothing leads back to a borrowed address");
    assert_eq!(scraper.handle.connections().outbound[0].actual_dst, SocketAddr::new(proxy.ip, HBONE_PORT));
    expect_reset(&mut stranger.dial(address).await).await;
    assert_eq!(proxy.handle.listening().len(), 1);
}
