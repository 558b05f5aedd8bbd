//! Our pool dials, Envoy terminates the CONNECTs. Its windows are 64 KiB, its frames 16 KiB, its limit 100 streams.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::ensure;
use http::StatusCode;
use mesh_hbone::{Error, PoolConfig, Settings};
use mesh_identity::peer_name;
use mesh_net::{End, Side};
use rustls::client::{ClientSessionMemoryCache, ClientSessionStore as _, Resumption};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
    time::sleep,
};
use tokio_rustls::TlsConnector;

use crate::{
    apps::{
        Target, echo, hold_and_release, is_reset, nobody, pattern, ping, read_end, reset, roundtrip, write_until_held,
    },
    identities::Identities,
    ours::{Client, brisk},
    programs::{ENVOY, Envoy, eventually},
};

struct Far {
    envoy: Envoy,
    client: Client,
    target: SocketAddr,
}

impl Far {
    async fn start(program: PathBuf, target: SocketAddr) -> Self {
        Self::start_with(program, target, ("30s", "20s"), Settings::default()).await
    }

    async fn start_with(program: PathBuf, target: SocketAddr, pings: (&str, &str), settings: Settings) -> Self {
        Self::start_for(program, "*", target, pings, settings).await
    }

    /// `places`: the addresses that a CONNECT may name.
    async fn start_for(
        program: PathBuf,
        places: &str,
        target: SocketAddr,
        pings: (&str, &str),
        settings: Settings,
    ) -> Self {
        let identities = Identities::generate();
        let config = include_str!("envoy_server.yaml")
            .replace("@PLACES@", places)
            .replace("@TARGET_PORT@", &target.port().to_string())
            .replace("@PING_INTERVAL@", pings.0)
            .replace("@PING_TIMEOUT@", pings.1);
        let envoy = Envoy::start(&program, &config, &identities, "server").await;
        // Whatever we would put into one tunnel, Envoy's limit is what decides.
        let config = PoolConfig { settings, max_streams: 1000, ..PoolConfig::default() };
        let client = Client::new(&identities, envoy.address, config);
        Self { envoy, client, target }
    }

    async fn app(&self) -> TcpStream {
        self.client.socket(self.target).await
    }
}

#[test]
fn bytes_of_every_size_come_back_unchanged() {
    ENVOY.run(async |program| {
        let far = Far::start(program, echo()).await;
        for (seed, length) in (1..).zip([0, 1, 16_383, 16_384, 16_385, 65_535, 65_537, 1 << 20, (5 << 20) + 1]) {
            roundtrip(far.app().await, seed, length).await;
        }
        assert_eq!(far.client.dialer.dials.get(), 1);
    });
}

/// A waypoint: whose address a client dialled is in the CONNECT, and what it may then reach is the waypoint's to say.
#[test]
fn a_waypoint_routes_by_the_service_address_and_refuses_what_is_not_its_own() {
    ENVOY.run(async |program| {
        let (vip, other): (SocketAddr, SocketAddr) = (([240, 0, 0, 1], 80).into(), ([240, 0, 0, 1], 81).into());
        let far = Far::start_for(program, "240.0.0.1:80", echo(), ("30s", "20s"), Settings::default()).await;
        roundtrip(far.client.socket(vip).await, 1, 1 << 20).await;
        let refused = far.client.app(other).await.err().expect("refused");
        assert!(matches!(refused, Error::Status(StatusCode::NOT_FOUND)), "{refused:?}");
        roundtrip(far.client.socket(vip).await, 2, 1 << 10).await;
        assert_eq!(far.client.dialer.dials.get(), 1, "refusals do not cost the tunnel");
    });
}

#[test]
fn a_half_close_of_the_client_leaves_the_other_direction_open() {
    ENVOY.run(async |program| {
        let target = Target::listen();
        let far = Far::start(program, target.address()).await;
        let mut flow = far.client.app(far.target).await.unwrap();
        flow.socket.write_all(b"question").await.unwrap();
        flow.socket.shutdown().await.unwrap();
        let mut server = target.accept().await;
        assert_eq!(read_end(&mut server).await.unwrap(), b"question");
        server.write_all(b"answer").await.unwrap();
        server.shutdown().await.unwrap();
        assert_eq!(read_end(&mut flow.socket).await.unwrap(), b"answer");
        assert!(matches!(flow.end.await.unwrap().end, End::Clean));
    });
}

/// Envoy then ends the client's direction too, with RST_STREAM NO_ERROR: all that the server said arrives, and a clean end.
#[test]
fn a_half_close_of_the_server_is_a_clean_end_of_both() {
    ENVOY.run(async |program| {
        let target = Target::listen();
        let far = Far::start(program, target.address()).await;
        let mut flow = far.client.app(far.target).await.unwrap();
        let mut server = target.accept().await;
        let answer = pattern(1, 10_000);
        server.write_all(&answer).await.unwrap();
        server.shutdown().await.unwrap();
        assert!(read_end(&mut flow.socket).await.unwrap() == answer);
        assert!(matches!(flow.end.await.unwrap().end, End::Clean));
        eventually("the server to be let go", async || {
            let end = read_end(&mut server).await;
            ensure!(end.is_ok() || is_reset(&end), "{end:?}");
            Ok(())
        })
        .await;
    });
}

#[test]
fn a_hundred_and_fifty_flows_at_once_each_get_their_own_bytes() {
    ENVOY.run(async |program| {
        let far = Far::start(program, echo()).await;
        let mut flows = JoinSet::new();
        for seed in 0..150 {
            let (client, target) = (far.client.clone(), far.target);
            flows.spawn_local(async move { roundtrip(client.socket(target).await, seed, 100_000).await });
        }
        while let Some(flow) = flows.join_next().await {
            flow.unwrap();
        }
    });
}

#[test]
fn its_limit_of_streams_opens_a_second_tunnel() {
    ENVOY.run(async |program| {
        let far = Far::start(program, echo()).await;
        let mut held = Vec::new();
        for _ in 0..150 {
            held.push(far.app().await);
        }
        for (byte, app) in (0..).zip(&mut held) {
            ping(app, byte).await;
        }
        let tunnels = far.client.pool.snapshot();
        let mut streams: Vec<_> = tunnels.iter().map(|tunnel| tunnel.streams.len()).collect();
        streams.sort_unstable();
        assert_eq!(streams, [50, 100]);
        assert!(tunnels.iter().all(|tunnel| tunnel.peer_max_streams == Some(100)));
        assert!(far.client.dialer.failed.borrow().is_empty());
    });
}

#[test]
fn a_reader_that_stops_holds_its_sender_and_loses_nothing() {
    ENVOY.run(async |program| {
        let target = Target::listen();
        let far = Far::start(program, target.address()).await;
        let app = far.app().await;
        let server = target.accept().await;
        hold_and_release(app, server).await;
        let app = far.app().await;
        let server = target.accept().await;
        hold_and_release(server, app).await;
    });
}

/// When its server ends first and our window has no room, Envoy drops what it holds and resets with INTERNAL_ERROR. The application
/// then sees a RST, and never a clean end with bytes missing.
#[test]
fn a_clean_end_means_that_every_byte_has_come() {
    ENVOY.run(async |program| {
        let target = Target::listen();
        let far = Far::start(program, target.address()).await;
        let mut app = far.app().await;
        let (sent, writing) = write_until_held(target.accept().await, true).await;
        let received = read_end(&mut app).await;
        assert!(is_reset(&received) || received.is_ok_and(|received| received == sent));
        drop(writing.await.unwrap());
    });
}

/// CONNECT_ERROR (RFC 9113 §8.5) becomes a RST of TCP again.
#[test]
fn a_reset_of_the_server_reaches_the_client() {
    ENVOY.run(async |program| {
        let target = Target::listen();
        let far = Far::start(program, target.address()).await;
        let mut flow = far.client.app(far.target).await.unwrap();
        let mut server = target.accept().await;
        flow.socket.write_all(b"x").await.unwrap();
        server.read_exact(&mut [0]).await.unwrap();
        reset(server);
        assert!(is_reset(&read_end(&mut flow.socket).await));
        assert!(matches!(flow.end.await.unwrap().end, End::Reset(Side::Second)));
    });
}

/// Envoy's way: the server sees a clean end.
#[test]
fn a_reset_of_the_client_ends_the_server() {
    ENVOY.run(async |program| {
        let target = Target::listen();
        let far = Far::start(program, target.address()).await;
        let mut flow = far.client.app(far.target).await.unwrap();
        let mut server = target.accept().await;
        flow.socket.write_all(b"x").await.unwrap();
        server.read_exact(&mut [0]).await.unwrap();
        reset(flow.socket);
        assert_eq!(read_end(&mut server).await.unwrap(), b"");
        assert!(matches!(flow.end.await.unwrap().end, End::Reset(Side::First)));
    });
}

#[test]
fn a_target_that_cannot_be_reached_is_a_503() {
    ENVOY.run(async |program| {
        let (address, _reserved) = nobody();
        let far = Far::start(program, address).await;
        for _ in 0..2 {
            let refused = far.client.app(address).await.err().unwrap();
            assert!(matches!(refused, Error::Status(StatusCode::SERVICE_UNAVAILABLE)), "{refused:?}");
        }
        // It says nothing about the tunnel.
        assert_eq!(far.client.dialer.dials.get(), 1);
    });
}

/// It sends them with its first application data, so they come between the handshake and SETTINGS.
#[test]
fn session_tickets_are_skipped_and_never_used() {
    ENVOY.run(async |program| {
        let far = Far::start(program, echo()).await;
        let tickets = Arc::new(ClientSessionMemoryCache::new(8));
        let mut config = (*far.client.dialer.tls).clone();
        config.resumption = Resumption::store(tickets.clone());
        let tcp = TcpStream::connect(far.envoy.address).await.unwrap();
        let mut remembering = TlsConnector::from(Arc::new(config)).connect(peer_name(), tcp).await.unwrap();
        remembering.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
        remembering.read_u8().await.unwrap();
        assert!(tickets.take_tls13_ticket(&peer_name()).is_some(), "it sends none, so this test shows nothing");

        // Enough flows for a second tunnel.
        let mut held = Vec::new();
        for byte in 0..101 {
            let mut app = far.app().await;
            ping(&mut app, byte).await;
            held.push(app);
        }
        assert_eq!(far.client.dialer.dials.get(), 2);
        assert_eq!(far.envoy.stat("listener.*.ssl.handshake").await, 3);
        assert_eq!(far.envoy.stat("listener.*.ssl.session_reused").await, 0);
    });
}

#[test]
fn after_its_goaway_new_flows_take_a_new_tunnel_and_old_ones_go_on() {
    ENVOY.run(async |program| {
        let far = Far::start(program, echo()).await;
        let mut old = far.app().await;
        ping(&mut old, 1).await;
        // From now on it sends a GOAWAY with each answer.
        far.envoy.post("/healthcheck/fail").await;
        let mut last = far.app().await;
        eventually("a flow with a tunnel of its own", async || {
            let mut app = far.app().await;
            ping(&mut app, 2).await;
            ensure!(far.client.dialer.dials.get() >= 2, "not yet");
            Ok(())
        })
        .await;
        far.envoy.post("/healthcheck/ok").await;
        let mut new = far.app().await;
        ping(&mut new, 3).await;
        eventually("the GOAWAY that names its last stream", async || {
            ensure!(far.envoy.stat("http2.goaway_sent").await >= 1, "only the warning");
            Ok(())
        })
        .await;
        ping(&mut old, 4).await;
        ping(&mut last, 5).await;
        roundtrip(old, 6, 1 << 20).await;
        roundtrip(last, 7, 1 << 20).await;
        eventually("the first tunnel to end with its last flow", async || {
            let tunnels = far.client.pool.snapshot();
            ensure!(tunnels.iter().all(|tunnel| tunnel.id != 1), "still there");
            Ok(())
        })
        .await;
        ping(&mut new, 8).await;
        assert!(far.client.dialer.failed.borrow().is_empty());
    });
}

#[test]
fn an_idle_tunnel_is_kept_alive_by_both() {
    ENVOY.run(async |program| {
        let far = Far::start_with(program, echo(), ("0.2s", "2s"), brisk()).await;
        let mut app = far.app().await;
        ping(&mut app, 1).await;
        // Whoever left one unanswered would be given up by now.
        sleep(Duration::from_secs(5)).await;
        ping(&mut app, 2).await;
        assert_eq!(far.client.dialer.dials.get(), 1);
        assert!(far.client.dialer.failed.borrow().is_empty());
        assert_eq!(far.envoy.stat("http2.keepalive_timeout").await, 0);
    });
}

#[test]
fn an_envoy_that_fell_silent_is_noticed() {
    ENVOY.run(async |program| {
        let far = Far::start_with(program, echo(), ("30s", "20s"), brisk()).await;
        let mut flow = far.client.app(far.target).await.unwrap();
        ping(&mut flow.socket, 1).await;
        far.envoy.freeze();
        assert!(is_reset(&read_end(&mut flow.socket).await));
        assert!(matches!(flow.end.await.unwrap().end, End::Reset(Side::Second)));
        eventually("the tunnel's end to be told", async || {
            let failed = far.client.dialer.failed.borrow();
            ensure!(matches!(failed[..], [Error::Silent(_)]), "{failed:?}");
            Ok(())
        })
        .await;
    });
}
