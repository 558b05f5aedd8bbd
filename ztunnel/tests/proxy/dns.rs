//! Names: what a pod's applications are told by the proxy, and what only passes through it.

use std::net::{IpAddr, SocketAddr};

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{Name, RecordType},
};
use mesh_net::{
    NetNs, SocketOptions,
    sockets::{listen_udp, udp_socket},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    join,
    net::{TcpListener, TcpStream, UdpSocket},
    time::timeout,
};
use ztunnel::pods::Kind;

use crate::{
    mesh::{Mesh, PATIENCE, Pod, samples, service, serving, workload},
    ping_pong,
};

const WEB: &str = "web.demo.svc.cluster.local.";

fn query(id: u16, name: &str, kind: RecordType) -> Vec<u8> {
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).expect("name"), kind));
    let mut edns = Edns::new();
    edns.set_max_payload(1232).set_dnssec_ok(true);
    message.set_edns(edns);
    message.to_vec().expect("encodable")
}

fn addresses(answer: &[u8]) -> Vec<IpAddr> {
    let answer = Message::from_vec(answer).expect("a message");
    assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
    assert!(answer.metadata.authoritative && answer.metadata.recursion_available);
    answer.answers.iter().filter_map(|record| record.data.ip_addr()).collect()
}

fn code(answer: &[u8]) -> ResponseCode {
    Message::from_vec(answer).expect("a message").metadata.response_code
}

/// Asks over UDP.
async fn ask(server: SocketAddr, query: &[u8]) -> Vec<u8> {
    let socket = UdpSocket::bind("127.0.0.1:0").await.expect("bind");
    socket.send_to(query, server).await.expect("send");
    received(&socket, server).await
}

async fn received(socket: &UdpSocket, from: SocketAddr) -> Vec<u8> {
    let mut buffer = vec![0; 65_535];
    let (length, peer) = timeout(PATIENCE, socket.recv_from(&mut buffer)).await.expect("in time").expect("receive");
    assert_eq!(peer, from);
    buffer[..length].to_vec()
}

async fn write_message(stream: &mut TcpStream, message: &[u8]) {
    let length = u16::try_from(message.len()).expect("short").to_be_bytes();
    stream.write_all(&[&length, message].concat()).await.expect("write");
}

async fn read_message(stream: &mut TcpStream) -> Vec<u8> {
    let mut message = vec![0; usize::from(stream.read_u16().await.expect("length"))];
    stream.read_exact(&mut message).await.expect("message");
    message
}

/// A nameserver of UDP and TCP on one address.
async fn nameserver() -> (UdpSocket, TcpListener, SocketAddr) {
    loop {
        let udp = UdpSocket::bind("127.0.0.1:0").await.expect("bind");
        let address = udp.local_addr().expect("address");
        if let Ok(tcp) = TcpListener::bind(address).await {
            return (udp, tcp, address);
        }
    }
}

/// Bytes that only look like an answer: nobody may understand or change them.
fn oddity(query: &[u8]) -> Vec<u8> {
    [&query[..2], &[0x87, 0x0f, 0, 1, 0, 9, 0, 0, 0, 0], b"\xff\xfenot a name\0"].concat()
}

async fn pod_asking(mesh: &Mesh, servers: &[SocketAddr]) -> Pod {
    let pod = mesh.pod_configured("client", |config| config.dns.nameservers = servers.to_vec()).await;
    mesh.upsert([service("web", [240, 0, 0, 1], 80)]);
    pod
}

#[tokio::test]
async fn names_of_the_mesh_are_answered_without_asking_anybody() {
    let mesh = Mesh::new();
    let pod = pod_asking(&mesh, &[]).await;
    mesh.upsert([service("db", [240, 0, 0, 9], 80), serving(&workload("web-0", [127, 9, 9, 9].into()), "web")]);
    let udp = pod.port_of(Kind::DnsDatagrams);
    assert_eq!(addresses(&ask(udp, &query(1, WEB, RecordType::A)).await), [IpAddr::from([240, 0, 0, 1])]);
    assert_eq!(addresses(&ask(udp, &query(2, "WEB.demo.", RecordType::A)).await), [IpAddr::from([240, 0, 0, 1])]);
    assert_eq!(addresses(&ask(udp, &query(3, WEB, RecordType::AAAA)).await), [] as [IpAddr; 0]);
    let mut stream = TcpStream::connect(pod.port_of(Kind::Dns)).await.expect("connect");
    for id in 4..6 {
        write_message(&mut stream, &query(id, WEB, RecordType::A)).await;
    }
    for id in 4..6u16 {
        let answer = read_message(&mut stream).await;
        assert_eq!(answer[..2], id.to_be_bytes());
        assert_eq!(addresses(&answer), [IpAddr::from([240, 0, 0, 1])]);
    }
    drop(stream);
    let metrics = pod.finish().await;
    let labels = [r#"request_protocol="udp""#, r#"request_query_type="A""#, r#"source_canonical_service="unknown""#];
    assert!(samples(&metrics, "istio_dns_requests_total", &labels)[0].ends_with(" 2"), "{metrics}");
    assert!(!metrics.contains("istio_dns_upstream_requests_total"));
}

#[tokio::test]
async fn other_names_and_other_questions_pass_unchanged_both_ways_over_udp() {
    let mesh = Mesh::new();
    let (server, _tcp, address) = nameserver().await;
    let pod = pod_asking(&mesh, &[address]).await;
    let queries = [query(7, "example.com.", RecordType::A), query(8, WEB, RecordType::SRV), {
        // Bytes after the message are the client's business.
        [query(9, "example.com.", RecordType::TXT), b"tail".to_vec()].concat()
    }];
    for query in queries {
        let answering = async {
            let mut buffer = vec![0; 65_535];
            let (length, peer) = server.recv_from(&mut buffer).await.expect("receive");
            assert_eq!(buffer[..length], query);
            // Another identifier answers nobody.
            server.send_to(&oddity(&[0xee, 0xee]), peer).await.expect("send");
            server.send_to(&oddity(&query), peer).await.expect("send");
        };
        let (answer, ()) = join!(ask(pod.port_of(Kind::DnsDatagrams), &query), answering);
        assert_eq!(answer, oddity(&query));
    }
    let metrics = pod.finish().await;
    let srv = [r#"request_query_type="SRV""#, r#"request_protocol="udp""#];
    assert!(samples(&metrics, "istio_dns_upstream_requests_total", &srv)[0].ends_with(" 1"), "{metrics}");
    assert!(samples(&metrics, "istio_dns_upstream_request_duration_seconds_count", &srv)[0].ends_with(" 1"));
}

#[tokio::test]
async fn over_tcp_answers_of_ours_and_of_others_come_back_on_one_connection() {
    let mesh = Mesh::new();
    let (_udp, server, address) = nameserver().await;
    let pod = pod_asking(&mesh, &[address]).await;
    let mut client = TcpStream::connect(pod.port_of(Kind::Dns)).await.expect("connect");
    let transfer = query(10, "example.com.", RecordType::AXFR);
    write_message(&mut client, &transfer).await;
    let mut far = server.accept().await.expect("accept").0;
    assert_eq!(read_message(&mut far).await, transfer);
    write_message(&mut client, &query(11, WEB, RecordType::A)).await;
    assert_eq!(read_message(&mut client).await[..2], [0, 11], "what is ours does not wait for others");
    for _ in 0..3 {
        write_message(&mut far, &oddity(&transfer)).await;
        assert_eq!(read_message(&mut client).await, oddity(&transfer), "each message of a zone");
    }
    let next = query(12, "example.com.", RecordType::A);
    write_message(&mut client, &next).await;
    assert_eq!(read_message(&mut far).await, next, "on the same connection");
    drop(far);
    assert_eq!(code(&read_message(&mut client).await), ResponseCode::ServFail);
    client.shutdown().await.expect("shut down");
    assert_eq!(client.read(&mut [0; 1]).await.expect("end"), 0);
    let metrics = pod.finish().await;
    assert_eq!(samples(&metrics, "istio_dns_upstream_failures_total", &[r#"request_protocol="tcp""#, " 1"]).len(), 1);
}

#[tokio::test]
async fn a_dead_nameserver_costs_one_query_nothing_but_time_and_none_costs_it_the_answer() {
    let mesh = Mesh::new();
    let (server, _tcp, address) = nameserver().await;
    let dead = nameserver().await.2;
    let pod = pod_asking(&mesh, &[dead, address]).await;
    let wanted = query(13, "example.com.", RecordType::A);
    let answering = async {
        let mut buffer = vec![0; 65_535];
        let (_, peer) = server.recv_from(&mut buffer).await.expect("receive");
        server.send_to(&oddity(&wanted), peer).await.expect("send");
    };
    assert_eq!(join!(ask(pod.port_of(Kind::DnsDatagrams), &wanted), answering).0, oddity(&wanted));
    let alone = mesh.pod_configured("alone", |config| config.dns.nameservers.clear()).await;
    assert_eq!(code(&ask(alone.port_of(Kind::DnsDatagrams), &wanted).await), ResponseCode::ServFail);
    let own = alone.port_of(Kind::DnsDatagrams);
    let looping = mesh.pod_configured("looping", |config| config.dns.nameservers = vec![own]).await;
    assert_eq!(code(&ask(looping.port_of(Kind::DnsDatagrams), &wanted).await), ResponseCode::ServFail);
}

#[tokio::test]
async fn what_is_no_query_is_told_so_and_nothing_makes_the_server_fall() {
    let mesh = Mesh::new();
    let pod = pod_asking(&mesh, &[]).await;
    let udp = pod.port_of(Kind::DnsDatagrams);
    let good = query(14, WEB, RecordType::A);
    let with = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        bytes
    };
    assert_eq!(code(&ask(udp, &with(2, 0x28)).await), ResponseCode::NotImp);
    assert_eq!(code(&ask(udp, &good[..20]).await), ResponseCode::FormErr);
    let socket = UdpSocket::bind("127.0.0.1:0").await.expect("bind");
    for stub in [&b""[..], b"x", &good[..11]] {
        socket.send_to(stub, udp).await.expect("send");
    }
    socket.send_to(&good, udp).await.expect("send");
    assert_eq!(addresses(&received(&socket, udp).await).len(), 1);
    let mut cut = TcpStream::connect(pod.port_of(Kind::Dns)).await.expect("connect");
    cut.write_all(b"\0\x05abc").await.expect("write");
    cut.shutdown().await.expect("shut down");
    assert_eq!(cut.read(&mut [0; 1]).await.expect("end"), 0);
}

#[tokio::test]
async fn socks_clients_may_use_any_name_the_pod_could_ask_for() {
    let mesh = Mesh::new();
    let (client, server) = (mesh.pod("client").await, mesh.pod("server").await);
    let (listener, address) = server.listen().await;
    mesh.upsert([service("web", [240, 0, 0, 1], address.port()), serving(&server.workload, "web")]);
    for name in ["web", "WEB.demo.svc", "web.demo.svc.cluster.local."] {
        let (mut near, accepted) = join!(client.dial_name(name, 80), listener.accept());
        ping_pong(&mut near, &mut accepted.expect("accept").0).await;
    }
    let outside = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let port = outside.local_addr().expect("address").port();
    let (mut near, accepted) = join!(client.dial_name("localhost", port), outside.accept());
    ping_pong(&mut near, &mut accepted.expect("accept").0).await;
    drop(near);
    let metrics = client.finish().await;
    assert!(!metrics.contains("istio_on_demand_dns_total"), "no series for names of the client's choice");
}

#[tokio::test]
async fn an_endpoint_known_by_name_is_looked_up_and_a_name_without_address_fails_as_such() {
    let mesh = Mesh::new();
    let client = mesh.pod("client").await;
    let outside = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let port = outside.local_addr().expect("address").port();
    for (name, vip, host) in [("named", [240, 0, 0, 2], "localhost"), ("nowhere", [240, 0, 0, 3], "name.invalid")] {
        let mut endpoint = workload(name, [0, 0, 0, 0].into());
        endpoint.addresses.clear();
        endpoint.hostname = host.into();
        endpoint.tunnel_protocol = mesh_core::workload::TunnelProtocol::None;
        mesh.upsert([service(name, vip, port), serving(&endpoint, name)]);
    }
    let (mut near, accepted) = join!(client.dial(([240, 0, 0, 2], 80).into()), outside.accept());
    ping_pong(&mut near, &mut accepted.expect("accept").0).await;
    drop(near);
    crate::mesh::expect_reset(&mut client.dial(([240, 0, 0, 3], 80).into()).await).await;
    let metrics = client.finish().await;
    let failed = samples(&metrics, "fairway_connection_failures_total", &[r#"reason="lookup""#, " 1"]);
    assert_eq!(failed.len(), 1, "{metrics}");
    assert_eq!(samples(&metrics, "istio_on_demand_dns_total", &[r#"hostname="localhost""#, " 1"]).len(), 1);
}

/// An application's queries from inside a captured pod, and a nameserver at the far end, which is asked by the address returned.
pub(crate) async fn captured(client: &NetNs, server: &NetNs, at: IpAddr) -> IpAddr {
    let nameserver = listen_udp(Some(server), SocketAddr::new(at, 53), &SocketOptions::default());
    let nameserver = UdpSocket::from_std(nameserver.expect("listen")).expect("register");
    let application = udp_socket(Some(client), None, SocketAddr::new(at, 53), &SocketOptions::default());
    let application = UdpSocket::from_std(application.expect("socket")).expect("register");
    let mut buffer = vec![0; 65_535];
    application.send(&query(1, WEB, RecordType::A)).await.expect("send");
    let length = timeout(PATIENCE, application.recv(&mut buffer)).await.expect("in time").expect("receive");
    assert_eq!(addresses(&buffer[..length]), [IpAddr::from([240, 0, 0, 1])]);
    let other = query(2, "example.com.", RecordType::A);
    application.send(&other).await.expect("send");
    let mut asked = vec![0; 65_535];
    let (length, peer) = timeout(PATIENCE, nameserver.recv_from(&mut asked)).await.expect("in time").expect("receive");
    assert_eq!(asked[..length], other, "to whom the application asked");
    nameserver.send_to(&oddity(&other), peer).await.expect("send");
    let length = timeout(PATIENCE, application.recv(&mut buffer)).await.expect("in time").expect("receive");
    assert_eq!(buffer[..length], oddity(&other));
    peer.ip()
}
