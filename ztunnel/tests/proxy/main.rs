//! Two or three proxies in one process, over loopback: what applications see of the mesh. And with real capture, in namespaces.

mod captured;
mod dns;
mod hostile;
mod mesh;
mod networks;
mod policy;
mod routes;
mod strengths;
mod trust;

use std::net::IpAddr;

use mesh_core::{index::Resource, workload::ApplicationTunnel};
use mesh_runtime::drain::{DrainMode, Drained};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    join,
    time::timeout,
};
use ztunnel::pods::{Kind, Protocol};

use crate::mesh::{
    Mesh, PATIENCE, Pod, expect_reset, read_all, reset, samples, service, serving, some_loopback_address, workload,
};

/// A client pod, a server pod, one open connection between their applications.
async fn connected() -> (Mesh, Pod, Pod, tokio::net::TcpStream, tokio::net::TcpStream) {
    let mesh = Mesh::new();
    let (client, server) = (mesh.pod("client").await, mesh.pod("server").await);
    let (listener, address) = server.listen().await;
    let (near, accepted) = join!(client.dial(address), listener.accept());
    (mesh, client, server, near, accepted.expect("accept").0)
}

async fn ping_pong(near: &mut tokio::net::TcpStream, far: &mut tokio::net::TcpStream) {
    near.write_all(b"ping").await.expect("write");
    let mut four = [0; 4];
    far.read_exact(&mut four).await.expect("read");
    far.write_all(b"pong").await.expect("write");
    near.read_exact(&mut four).await.expect("read");
    assert_eq!(&four, b"pong");
}

#[tokio::test]
async fn the_callers_identity_arrives_and_both_sides_report_the_flow() {
    let (_mesh, client, server, mut near, mut far) = connected().await;
    ping_pong(&mut near, &mut far).await;
    let (out, inn) = (client.handle.connections().outbound, server.handle.connections().inbound);
    assert_eq!((out.len(), inn.len()), (1, 1));
    assert_eq!((out[0].protocol, inn[0].protocol), (Protocol::Hbone, Protocol::Hbone));
    assert_eq!((out[0].actual_dst.port(), inn[0].src.ip()), (mesh::HBONE_PORT, client.ip));
    drop((near, far));
    let identity = r#"source_principal="spiffe://cluster.local/ns/demo/sa/client""#;
    let (client, server) = (client.finish().await, server.finish().await);
    for (metrics, reporter) in [(&client, r#"reporter="source""#), (&server, r#"reporter="destination""#)] {
        let labels = [reporter, identity, r#"connection_security_policy="mutual_tls""#, r#"response_flags="-""#];
        for family in ["istio_tcp_connections_opened_total", "istio_tcp_connections_closed_total"] {
            let found = samples(metrics, family, &labels);
            assert_eq!(found.len(), 1, "{family} {reporter} in {metrics}");
            assert!(found[0].ends_with(" 1"), "{found:?}");
        }
        for family in ["istio_tcp_received_bytes_total", "istio_tcp_sent_bytes_total"] {
            assert!(samples(metrics, family, &labels)[0].ends_with(" 4"), "{family} {reporter}");
        }
    }
}

#[tokio::test]
async fn a_half_close_passes_each_way_and_the_other_direction_goes_on() {
    for client_first in [true, false] {
        let (_mesh, _client, _server, near, far) = connected().await;
        let (mut early, mut late) = if client_first { (near, far) } else { (far, near) };
        early.write_all(b"question").await.expect("write");
        early.shutdown().await.expect("shut down");
        assert_eq!(read_all(&mut late).await, b"question");
        late.write_all(b"a longer answer").await.expect("write");
        late.shutdown().await.expect("shut down");
        assert_eq!(read_all(&mut early).await, b"a longer answer");
    }
}

#[tokio::test]
async fn a_reset_on_either_side_is_a_reset_on_the_other() {
    for client_resets in [true, false] {
        let (_mesh, _client, _server, mut near, mut far) = connected().await;
        ping_pong(&mut near, &mut far).await;
        let (rude, mut victim) = if client_resets { (near, far) } else { (far, near) };
        reset(rude);
        expect_reset(&mut victim).await;
    }
}

#[tokio::test]
async fn a_server_may_speak_first() {
    let (_mesh, _client, _server, mut near, mut far) = connected().await;
    far.write_all(b"220 welcome").await.expect("write");
    let mut banner = [0; 11];
    near.read_exact(&mut banner).await.expect("read");
    assert_eq!(&banner, b"220 welcome");
}

#[tokio::test]
async fn sixty_four_mebibytes_arrive_unchanged_both_ways() {
    const TOTAL: usize = 64 << 20;
    const CHUNK: usize = 1 << 18;
    let byte = |i: usize, salt: u64| ((i as u64 ^ salt).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8;
    let end = |stream: tokio::net::TcpStream, mine: u64, theirs: u64| async move {
        let (mut reader, mut writer) = stream.into_split();
        let send = async move {
            for start in (0..TOTAL).step_by(CHUNK) {
                let chunk: Vec<u8> = (start..start + CHUNK).map(|i| byte(i, mine)).collect();
                writer.write_all(&chunk).await.expect("write");
            }
            writer.shutdown().await.expect("shut down");
        };
        let receive = async move {
            let (mut buffer, mut at) = (vec![0; CHUNK], 0);
            loop {
                let length = reader.read(&mut buffer).await.expect("read");
                if length == 0 {
                    return at;
                }
                assert!(buffer[..length].iter().enumerate().all(|(i, b)| *b == byte(at + i, theirs)), "near {at}");
                at += length;
            }
        };
        join!(send, receive).1
    };
    let (_mesh, _client, _server, near, far) = connected().await;
    let received = join!(end(near, 1, 2), end(far, 2, 1));
    assert_eq!(received, (TOTAL, TOTAL));
}

#[tokio::test]
async fn many_flows_share_workers_and_tunnels_without_mixing_bytes() {
    const FLOWS: u32 = 100;
    let mesh = Mesh::new();
    let (client, server) = (mesh.pod("client").await, mesh.pod("server").await);
    let (listener, address) = server.listen().await;
    let echo = tokio::spawn(async move {
        let mut held = Vec::new();
        for _ in 0..FLOWS {
            let (mut stream, _) = listener.accept().await.expect("accept");
            held.push(tokio::spawn(async move {
                let mut word = [0; 4];
                stream.read_exact(&mut word).await.expect("read");
                stream.write_all(&word).await.expect("write");
                stream
            }));
        }
        held
    });
    let mut open = Vec::new();
    for i in 0..FLOWS {
        let mut stream = client.dial(address).await;
        stream.write_all(&i.to_be_bytes()).await.expect("write");
        open.push(stream);
    }
    for (i, stream) in (0..FLOWS).zip(&mut open) {
        let mut word = [0; 4];
        stream.read_exact(&mut word).await.expect("read");
        assert_eq!(u32::from_be_bytes(word), i);
    }
    drop((open, echo.await.expect("echo")));
}

#[tokio::test]
async fn a_service_is_reached_by_address_and_by_name_and_around_a_dead_endpoint() {
    let mesh = Mesh::new();
    let (client, server) = (mesh.pod("client").await, mesh.pod("server").await);
    let (listener, address) = server.listen().await;
    let dead = workload("dead", some_loopback_address());
    let vip = [240, 0, 0, 1];
    mesh.upsert([service("web", vip, address.port()), serving(&server.workload, "web"), serving(&dead, "web")]);
    for _ in 0..8 {
        let ((mut by_address, accepted), mut by_name, named) = {
            let (a, b) = join!(client.dial((vip, 80).into()), listener.accept());
            let (c, d) = join!(client.dial_name("web.demo.svc.cluster.local", 80), listener.accept());
            ((a, b), c, d)
        };
        ping_pong(&mut by_address, &mut accepted.expect("accept").0).await;
        ping_pong(&mut by_name, &mut named.expect("accept").0).await;
    }
    let metrics = client.finish().await;
    assert!(samples(&metrics, "fairway_connection_failures_total", &[]).iter().all(|line| line.ends_with(" 0")));
    let to_server = [r#"destination_workload="server""#, r#"response_flags="-""#];
    assert_eq!(samples(&metrics, "istio_tcp_connections_closed_total", &to_server).len(), 1, "{metrics}");
}

#[tokio::test]
async fn a_connection_that_cannot_be_made_is_reset_and_says_why() {
    let mesh = Mesh::new();
    let (client, server) = (mesh.pod("client").await, mesh.pod("server").await);
    let (listener, address) = server.listen().await;
    drop(listener);
    expect_reset(&mut client.dial(address).await).await;
    mesh.upsert([service("empty", [240, 0, 0, 2], 80)]);
    expect_reset(&mut client.dial(([240, 0, 0, 2], 80).into()).await).await;
    let (client, server) = (client.finish().await, server.finish().await);
    let failures = "fairway_connection_failures_total";
    assert_eq!(samples(&server, failures, &[r#"reason="connect""#]).len(), 1, "{server}");
    for reason in [r#"reason="tunnel""#, r#"reason="no_endpoint""#] {
        assert_eq!(samples(&client, failures, &[reason]).len(), 1, "{client}");
    }
}

#[tokio::test]
async fn destinations_outside_the_mesh_are_passed_through() {
    let mesh = Mesh::new();
    let client = mesh.pod("client").await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let (mut near, accepted) = join!(client.dial(listener.local_addr().expect("address")), listener.accept());
    let (mut far, from) = accepted.expect("accept");
    assert_eq!(from.ip(), client.ip, "as the pod itself");
    ping_pong(&mut near, &mut far).await;
    assert_eq!(client.handle.connections().outbound[0].protocol, Protocol::Tcp);
    reset(near);
    expect_reset(&mut far).await;
}

#[tokio::test]
async fn a_workload_that_is_a_proxy_is_told_who_calls_whom() {
    let mesh = Mesh::new();
    let client = mesh.pod("client").await;
    // On plain loopback, where it is reached whatever its own address.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let port = listener.local_addr().expect("address").port();
    let tunnel = ApplicationTunnel { proxy_protocol: true, port: Some(port) };
    let proxy = mesh.pod_with("proxy", |w| w.application_tunnel = Some(tunnel.clone())).await;
    let (mut near, accepted) = join!(client.dial((proxy.ip, 80).into()), listener.accept());
    let mut far = accepted.expect("accept").0;
    near.write_all(b"ping").await.expect("write");
    let identity = b"spiffe://cluster.local/ns/demo/sa/client";
    let mut header = vec![0; 16 + 12 + 3 + identity.len()];
    far.read_exact(&mut header).await.expect("header");
    let (IpAddr::V4(from), IpAddr::V4(to)) = (client.ip, proxy.ip) else { panic!("IPv4 only") };
    assert_eq!(
        (&header[16..20], &header[20..24], &header[26..28]),
        (&from.octets()[..], &to.octets()[..], &[0, 80][..])
    );
    assert!(header.ends_with(identity));
    let mut four = [0; 4];
    far.read_exact(&mut four).await.expect("payload");
    assert_eq!(&four, b"ping");
}

#[tokio::test]
async fn a_pod_ahead_of_its_own_record_waits_for_it() {
    let mesh = Mesh::new();
    let server = mesh.pod("server").await;
    let (listener, address) = server.listen().await;
    let client = mesh.pod("client").await;
    let key = mesh_core::index::ResourceKey::Address(client.workload.uid.clone());
    mesh.state.update(|index| {
        index.apply(mesh_core::index::Delta {
            provenance: mesh_core::index::Provenance::Xds,
            upserts: Vec::new(),
            removals: vec![key],
        });
    });
    let mut near = client.dial(address).await;
    mesh.upsert([Resource::Workload(client.workload.clone())]);
    let mut far = listener.accept().await.expect("accept").0;
    ping_pong(&mut near, &mut far).await;
}

#[tokio::test]
async fn a_graceful_stop_closes_the_doors_and_lets_open_flows_end() {
    let (_mesh, client, server, mut near, mut far) = connected().await;
    let door = server.port_of(Kind::Inbound);
    let stopping = tokio::spawn(server.handle.stop(DrainMode::Graceful, PATIENCE));
    // Refused once the listener is gone.
    timeout(PATIENCE, async { while tokio::net::TcpStream::connect(door).await.is_ok() {} }).await.expect("closed");
    ping_pong(&mut near, &mut far).await;
    drop((near, far));
    drop(client);
    assert_eq!(stopping.await.expect("stop"), Drained::Complete);
}

#[tokio::test]
async fn dropping_a_pod_resets_what_it_had_open() {
    let (_mesh, client, _server, mut near, mut far) = connected().await;
    ping_pong(&mut near, &mut far).await;
    drop(client.handle);
    expect_reset(&mut near).await;
    expect_reset(&mut far).await;
}

#[tokio::test]
async fn what_a_cut_flow_had_moved_is_counted() {
    let (_mesh, client, _server, mut near, mut far) = connected().await;
    ping_pong(&mut near, &mut far).await;
    let Pod { handle, registry, .. } = client;
    handle.stop(DrainMode::Immediate, PATIENCE).await;
    let metrics = registry.encode();
    let bytes = samples(&metrics, "istio_tcp_sent_bytes_total", &[r#"response_flags="-""#]);
    assert!(bytes.len() == 1 && bytes[0].ends_with(" 4"), "{metrics}");
    assert_eq!(samples(&metrics, "fairway_connection_failures_total", &[r#"reason="drain""#, " 1"]).len(), 1);
}
