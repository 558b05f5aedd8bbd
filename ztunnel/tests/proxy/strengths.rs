//! What users get here that they do not get elsewhere: situations in which other node proxies hang, leak, stall or let through.

use std::{
    env,
    net::{IpAddr, SocketAddr},
    process::Command,
    sync::Arc,
    time::Duration,
};

use mesh_core::{
    index::Resource,
    policy::{Action, Scope},
    workload::Workload,
};
use nix::sys::resource::{Resource as Limit, getrlimit, setrlimit};
use tokio::{
    io::AsyncWriteExt,
    join,
    net::{TcpListener, TcpSocket, TcpStream},
    time::timeout,
};
use ztunnel::pods::Kind;

use crate::{
    mesh::{
        HBONE_PORT, Mesh, PATIENCE, expect_reset, policy, samples, service, serving, some_loopback_address, workload,
    },
    ping_pong,
};

/// Far below any connect timeout, far above what a connection takes.
const PROMPTLY: Duration = Duration::from_secs(5);
const FAILURES: &str = "fairway_connection_failures_total";

/// An address whose HBONE port swallows what is sent to it, like a node that went without a word; as long as the guard lives.
async fn black_hole() -> (IpAddr, impl Sized) {
    loop {
        let ip = some_loopback_address();
        let socket = TcpSocket::new_v4().expect("socket");
        if socket.bind(SocketAddr::new(ip, HBONE_PORT)).is_err() {
            continue;
        }
        let listener = socket.listen(0).expect("listen");
        // A full backlog: the kernel drops further SYNs.
        let mut filling = Vec::new();
        while let Ok(Ok(stream)) =
            timeout(Duration::from_millis(200), TcpStream::connect(SocketAddr::new(ip, HBONE_PORT))).await
        {
            filling.push(stream);
        }
        return (ip, (listener, filling));
    }
}

#[tokio::test]
async fn an_endpoint_that_went_without_a_word_costs_no_timeout() {
    let mesh = Mesh::new();
    let (client, server) = (mesh.pod("client").await, mesh.pod("server").await);
    let (listener, address) = server.listen().await;
    let (ip, _hole) = black_hole().await;
    let gone = workload("gone", ip);
    let vip = [240, 0, 0, 3];
    mesh.upsert([service("web", vip, address.port()), serving(&server.workload, "web"), serving(&gone, "web")]);
    for _ in 0..6 {
        let both = async { join!(client.dial((vip, 80).into()), listener.accept()) };
        let (mut near, accepted) = timeout(PROMPTLY, both).await.expect("the other endpoint");
        ping_pong(&mut near, &mut accepted.expect("accept").0).await;
    }
}

#[tokio::test]
async fn a_policy_that_is_referenced_but_not_here_denies_until_it_is() {
    let mesh = Mesh::new();
    let client = mesh.pod("client").await;
    let server = mesh.pod_with("server", |w| w.authorization_policies = vec!["demo/late".into()]).await;
    let (listener, address) = server.listen().await;
    expect_reset(&mut client.dial(address).await).await;
    let late =
        mesh_core::policy::Policy { scope: Scope::WorkloadSelector, ..policy("late", Action::Allow, &["client"]) };
    mesh.upsert([Resource::Policy(Arc::new(late))]);
    let (mut near, accepted) = join!(client.dial(address), listener.accept());
    ping_pong(&mut near, &mut accepted.expect("accept").0).await;
    drop(near);
    let metrics = server.finish().await;
    assert_eq!(samples(&metrics, FAILURES, &[r#"reason="policy_unknown""#, " 1"]).len(), 1, "{metrics}");
}

#[tokio::test]
async fn a_canary_waypoint_takes_what_is_bound_to_it_by_weight() {
    use mesh_core::{
        addr::NetworkAddress,
        service::Service,
        workload::{GatewayAddress, GatewayDestination},
    };
    let mesh = Mesh::new();
    let (client, canary) = (mesh.pod("client").await, mesh.pod("canary").await);
    let (listener, address) = canary.listen().await;
    let vip = [240, 0, 0, 4];
    let Resource::Service(web) = service("web", vip, address.port()) else { panic!("a service") };
    let destination = GatewayDestination::Address(NetworkAddress::new("", canary.ip));
    let waypoint = GatewayAddress { destination, hbone_mtls_port: HBONE_PORT };
    // The service's own port: no application tunnel tells the canary to take it, only the binding does.
    let ports = web.ports.iter().map(|port| mesh_core::service::ServicePort {
        mapping: mesh_core::workload::PortMapping { service_port: address.port(), ..port.mapping },
        ..*port
    });
    let bound = Service { weighted_waypoints: vec![(waypoint, 1)], ports: ports.collect(), ..(*web).clone() };
    mesh.upsert([Resource::Service(Arc::new(bound))]);
    let (mut near, accepted) = join!(client.dial((vip, address.port()).into()), listener.accept());
    ping_pong(&mut near, &mut accepted.expect("accept").0).await;
}

#[tokio::test]
async fn a_peer_that_never_finishes_its_handshake_keeps_nobody_else_out() {
    let mesh = Mesh::new();
    let (client, server) = (mesh.pod("client").await, mesh.pod("server").await);
    let (listener, address) = server.listen().await;
    let mut slow = Vec::new();
    for _ in 0..300 {
        let mut stream = TcpStream::connect(server.port_of(Kind::Inbound)).await.expect("connect");
        // A record that is announced and never comes: all the bytes a slow-loris sends.
        drop(stream.write_all(&[22, 3, 1]).await);
        slow.push(stream);
    }
    let (mut near, accepted) = join!(client.dial(address), listener.accept());
    ping_pong(&mut near, &mut accepted.expect("accept").0).await;
    drop((near, slow));
    let metrics = server.finish().await;
    assert_eq!(
        samples(&metrics, FAILURES, &[r#"reason="bad_request""#]).len(),
        1,
        "beyond an address's share: {metrics}"
    );
}

/// Runs `body` in a process of its own, whose limits it may change. `name` is the test's full name.
fn alone(name: &str, body: impl Future<Output = ()>) {
    const STAGE: &str = "FAIRWAY_TEST_ALONE";
    if env::var(STAGE).is_ok() {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime");
        return runtime.block_on(body);
    }
    let mut command = Command::new(env::current_exe().expect("this test binary"));
    let status = command.args([name, "--exact", "--nocapture"]).env(STAGE, "1").status().expect("run");
    assert!(status.success(), "see above");
}

fn open_descriptors() -> u64 {
    let listed = std::fs::read_dir("/proc/self/fd").expect("descriptors").count();
    // The listing had one of its own.
    listed as u64 - 1
}

#[test]
fn running_out_of_descriptors_costs_new_connections_only_and_passes() {
    alone("strengths::running_out_of_descriptors_costs_new_connections_only_and_passes", async {
        let mesh = Mesh::new();
        let (client, server) = (mesh.pod("client").await, mesh.pod("server").await);
        let (listener, address) = server.listen().await;
        let (mut near, accepted) = join!(client.dial(address), listener.accept());
        let mut far = accepted.expect("accept").0;
        ping_pong(&mut near, &mut far).await;
        let (soft, hard) = getrlimit(Limit::RLIMIT_NOFILE).expect("limit");
        // Room for clients to connect, not for the proxies to accept what they connect to.
        let waiting: Vec<_> = (0..8).map(|_| std::net::TcpStream::connect(client.port_of(Kind::Socks5))).collect();
        setrlimit(Limit::RLIMIT_NOFILE, open_descriptors(), hard).expect("lower the limit");
        ping_pong(&mut near, &mut far).await;
        setrlimit(Limit::RLIMIT_NOFILE, soft, hard).expect("raise it again");
        drop(waiting);
        ping_pong(&mut near, &mut far).await;
        let both = async { join!(client.dial(address), listener.accept()) };
        let (mut near, accepted) = timeout(PATIENCE, both).await.expect("accepted again");
        ping_pong(&mut near, &mut accepted.expect("accept").0).await;
    });
}

#[tokio::test]
async fn connections_of_the_same_addresses_are_told_apart() {
    let mesh = Mesh::new();
    let client = mesh.pod("client").await;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    let mut open = Vec::new();
    for _ in 0..3 {
        let (near, accepted) = join!(client.dial(address), listener.accept());
        open.push((near, accepted.expect("accept").0));
    }
    assert_eq!(client.handle.connections().outbound.len(), 3);
    let (mut near, mut far) = open.pop().expect("three");
    drop(open);
    ping_pong(&mut near, &mut far).await;
    timeout(PATIENCE, async {
        while client.handle.connections().outbound.len() != 1 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("the others are gone, this one is not");
}

#[tokio::test]
async fn a_workload_that_may_call_the_registry_only_gets_nowhere_else() {
    use mesh_core::workload::OutboundPolicy;
    let mesh = Mesh::new();
    let client = mesh.pod_with("client", |w| w.outbound_policy = Some(OutboundPolicy::RegistryOnly)).await;
    let server = mesh.pod("server").await;
    let (listener, address) = server.listen().await;
    let (mut near, accepted) = join!(client.dial(address), listener.accept());
    ping_pong(&mut near, &mut accepted.expect("accept").0).await;
    drop(near);
    let outside = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    expect_reset(&mut client.dial(outside.local_addr().expect("address")).await).await;
    let free = Workload { outbound_policy: None, ..(*client.workload).clone() };
    mesh.upsert([Resource::Workload(Arc::new(free))]);
    let (mut near, accepted) = join!(client.dial(outside.local_addr().expect("address")), outside.accept());
    ping_pong(&mut near, &mut accepted.expect("accept").0).await;
    drop(near);
    let metrics = client.finish().await;
    assert_eq!(samples(&metrics, FAILURES, &[r#"reason="not_in_registry""#, " 1"]).len(), 1, "{metrics}");
}
