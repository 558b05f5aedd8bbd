//! Peers that do not keep to HBONE: each costs itself, and nobody else.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use mesh_core::headers::Authority;
use mesh_hbone::{Budget, ConnectRequest, Secured, Settings, client::connect_once, tls};
use mesh_identity::{Priority, client_config, peer_name};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::LocalSet,
    time::{sleep, timeout},
};
use tokio_rustls::{TlsConnector, client::TlsStream, rustls::ClientConfig};
use ztunnel::pods::Kind;

use crate::{
    connected,
    mesh::{BRIEF, BRIEF_TTL, Mesh, Pod, expect_reset, expect_reset_early, identity, samples},
    ping_pong,
};

pub(crate) async fn tls_as(mesh: &Mesh, account: &str, server: &Pod) -> Secured {
    let (tcp, config) = door(mesh, account, server).await;
    tls::connect(tcp, &config, peer_name()).await.expect("handshake")
}

/// A peer of ours for saying whatever one likes, by another implementation of TLS.
async fn raw_tls_as(mesh: &Mesh, account: &str, server: &Pod) -> TlsStream<TcpStream> {
    let (tcp, config) = door(mesh, account, server).await;
    TlsConnector::from(config).connect(peer_name(), tcp).await.expect("handshake")
}

async fn door(mesh: &Mesh, account: &str, server: &Pod) -> (TcpStream, Arc<ClientConfig>) {
    let certificate = mesh.identities.certificate(&identity(account), Priority::RealTime).await.expect("certificate");
    let accepted = Arc::from([server.workload.identity()]);
    let tcp = TcpStream::connect(server.port_of(Kind::Inbound)).await.expect("connect");
    (tcp, client_config(&certificate, &accepted))
}

#[tokio::test]
async fn garbage_instead_of_tls_ends_that_connection_only() {
    let (_mesh, _client, server, mut near, mut far) = connected().await;
    let door = server.port_of(Kind::Inbound);
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0x16, 3, 1, 0xff, 0xff], &[0; 4096]] {
        let mut stream = TcpStream::connect(door).await.expect("connect");
        stream.write_all(garbage).await.expect("write");
        stream.shutdown().await.expect("shut down");
        // An alert or nothing, closed or reset: but it ends.
        drop(stream.read_to_end(&mut Vec::new()).await);
    }
    ping_pong(&mut near, &mut far).await;
    drop((near, far));
    let metrics = server.finish().await;
    assert_eq!(
        samples(&metrics, "fairway_connection_failures_total", &[r#"reason="tls""#, " 3"]).len(),
        1,
        "{metrics}"
    );
}

#[tokio::test]
async fn a_connect_to_somebody_else_is_refused_with_400() {
    LocalSet::new()
        .run_until(async {
            let (mesh, _client, server, mut near, mut far) = connected().await;
            let elsewhere: SocketAddr = "10.1.2.3:80".parse().expect("address");
            let request = ConnectRequest { authority: Authority::Address(elsewhere), headers: Vec::new() };
            let stream = tls_as(&mesh, "client", &server).await;
            let error =
                connect_once(stream, &Settings::default(), Budget::default(), &request).await.expect_err("refused");
            assert_eq!(error.to_string(), "http status: 400 Bad Request");
            ping_pong(&mut near, &mut far).await;
        })
        .await;
}

#[tokio::test]
async fn a_connect_given_up_while_policies_are_awaited_is_not_carried_on() {
    LocalSet::new()
        .run_until(async {
            let mesh = Mesh::new();
            let server = mesh.pod("server").await;
            let (_listener, address) = server.listen().await;
            mesh.state.update(|index| index.set_policies_complete(false));
            let request = ConnectRequest { authority: Authority::Address(address), headers: Vec::new() };
            let stream = tls_as(&mesh, "client", &server).await;
            let settings = Settings::default();
            let opening = connect_once(stream, &settings, Budget::default(), &request);
            assert!(timeout(Duration::from_millis(500), opening).await.is_err(), "answered early");
            let metrics = server.finish().await;
            let failures = "fairway_connection_failures_total";
            assert_eq!(samples(&metrics, failures, &[r#"reason="reset""#, " 1"]).len(), 1, "{metrics}");
        })
        .await;
}

/// Hand-written frames: the HTTP/2 libraries refuse to send these.
#[tokio::test]
async fn requests_that_are_not_connects_are_refused_with_400_in_the_same_tunnel() {
    let (mesh, _client, server, mut near, mut far) = connected().await;
    let mut stream = raw_tls_as(&mesh, "client", &server).await;
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend(frame(SETTINGS, 0, 0, &[]));
    // RFC 7541 appendix A: 2 = GET, 4 = /, 7 = https; 1 = :authority with a literal value.
    let get = [&[0x82, 0x84, 0x87, 0x41, 3][..], b"web"].concat();
    // `:method` (2) with the literal CONNECT, and an authority without a port.
    let portless = [&[0x42, 7][..], b"CONNECT", &[0x41, 3], b"web"].concat();
    bytes.extend(frame(HEADERS, END_HEADERS | END_STREAM, 1, &get));
    bytes.extend(frame(HEADERS, END_HEADERS, 3, &portless));
    stream.write_all(&bytes).await.expect("write");
    for id in [1, 3] {
        // RFC 7541 appendix A: 12 = `:status` 400.
        assert_eq!(next_headers(&mut stream, id).await.first(), Some(&0x8c), "stream {id}");
    }
    ping_pong(&mut near, &mut far).await;
}

/// A client of ours would have gone elsewhere long before.
#[tokio::test]
async fn an_identity_does_not_outlive_its_certificate() {
    let mesh = Mesh::new();
    let server = mesh.pod("server").await;
    let (_listener, address) = server.listen().await;
    let authority = address.to_string();
    let length = u8::try_from(authority.len()).expect("short");
    let connect = [&[0x42, 7][..], b"CONNECT", &[0x41, length], authority.as_bytes()].concat();
    let mut stream = raw_tls_as(&mesh, BRIEF, &server).await;
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend(frame(SETTINGS, 0, 0, &[]));
    bytes.extend(frame(HEADERS, END_HEADERS, 1, &connect));
    stream.write_all(&bytes).await.expect("write");
    // RFC 7541 appendix A: 8 = `:status` 200.
    assert_eq!(next_headers(&mut stream, 1).await.first(), Some(&0x88));
    // Certificates go by the wall's clock, so this waits for one to expire.
    sleep(BRIEF_TTL).await;
    stream.write_all(&frame(HEADERS, END_HEADERS, 3, &connect)).await.expect("write");
    // RFC 9113 §8.7: REFUSED_STREAM, so that the client knows it was not processed.
    assert_eq!(next(&mut stream, RST_STREAM, 3).await, [0, 0, 0, 7]);
    drop(stream);
    let metrics = server.finish().await;
    let failures = "fairway_connection_failures_total";
    assert_eq!(samples(&metrics, failures, &[r#"reason="tls""#, " 1"]).len(), 1, "{metrics}");
}

#[tokio::test]
async fn flows_outlive_their_certificate_and_new_ones_go_by_its_successor() {
    let mesh = Mesh::new();
    let (client, server) = (mesh.pod(BRIEF).await, mesh.pod("server").await);
    let (listener, address) = server.listen().await;
    // A refused dial is a connection that never arrives.
    let open = async || within(async { tokio::join!(client.dial(address), listener.accept()) }).await;
    let (mut near, accepted) = open().await;
    let mut far = accepted.expect("accept").0;
    within(ping_pong(&mut near, &mut far)).await;
    // Certificates go by the wall's clock, so this waits for one to expire.
    sleep(BRIEF_TTL).await;
    let (mut later, accepted) = open().await;
    within(ping_pong(&mut later, &mut accepted.expect("accept").0)).await;
    within(ping_pong(&mut near, &mut far)).await;
}

async fn within<T>(step: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(10), step).await.expect("done in time")
}

#[tokio::test]
async fn dialling_a_proxys_own_port_does_not_loop() {
    let (_mesh, client, _server, mut near, mut far) = connected().await;
    for kind in [Kind::Outbound, Kind::Passthrough] {
        expect_reset_early(TcpStream::connect(client.port_of(kind)).await).await;
    }
    expect_reset(&mut client.dial(client.port_of(Kind::Inbound)).await).await;
    ping_pong(&mut near, &mut far).await;
}

const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// RFC 9113 §4.1.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("short").to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

async fn next_headers(stream: &mut TlsStream<TcpStream>, wanted: u32) -> Vec<u8> {
    let block = next(stream, HEADERS, wanted).await;
    // RFC 7541 §6.3: the first block may begin by giving the dynamic table up.
    block.strip_prefix(&[0x20]).unwrap_or(&block).to_vec()
}

/// The payload of the next frame of this kind for that stream.
async fn next(stream: &mut TlsStream<TcpStream>, kind: u8, wanted: u32) -> Vec<u8> {
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await.expect("a frame");
        let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        stream.read_exact(&mut payload).await.expect("its payload");
        if head[3] == kind && head[5..] == wanted.to_be_bytes() {
            return payload;
        }
    }
}
