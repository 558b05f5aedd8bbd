//! Envoy makes a CONNECT of every connection, our server carries them on. Its windows are 64 KiB, its frames 16 KiB.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::ensure;
use mesh_hbone::{Error, Settings};
use mesh_net::{End, Side};
use mesh_runtime::drain::Drained;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
    time::sleep,
};

use crate::{
    apps::{Target, echo, hold_and_release, is_reset, nobody, pattern, ping, read_end, reset, roundtrip},
    identities::Identities,
    ours::{Server, brisk},
    programs::{ENVOY, Envoy, eventually},
};

struct Near {
    envoy: Envoy,
    server: Server,
}

impl Near {
    async fn start(program: PathBuf, target: SocketAddr) -> Self {
        Self::start_with(program, target, ("30s", "20s"), Settings::default()).await
    }

    async fn start_with(program: PathBuf, target: SocketAddr, pings: (&str, &str), settings: Settings) -> Self {
        let identities = Identities::generate();
        let server = Server::start(identities.issue("server"), settings).await;
        let config = include_str!("envoy_client.yaml")
            .replace("@TARGET@", &target.to_string())
            .replace("@SERVER_PORT@", &server.address.port().to_string())
            .replace("@PING_INTERVAL@", pings.0)
            .replace("@PING_TIMEOUT@", pings.1);
        let envoy = Envoy::start(&program, &config, &identities, "client").await;
        Self { envoy, server }
    }

    /// An application's connection, which Envoy takes.
    async fn app(&self) -> TcpStream {
        connect(self.envoy.address).await
    }

    /// The one flow's end, as our relay saw it.
    async fn end(&self) -> End {
        eventually("the flow to end", async || {
            self.server.seen().ends.borrow_mut().pop().ok_or_else(|| anyhow::anyhow!("not yet"))
        })
        .await
    }
}

async fn connect(address: SocketAddr) -> TcpStream {
    let app = TcpStream::connect(address).await.unwrap();
    app.set_nodelay(true).unwrap();
    app
}

#[test]
fn bytes_of_every_size_come_back_unchanged() {
    ENVOY.run(async |program| {
        let near = Near::start(program, echo()).await;
        for (seed, length) in (1..).zip([0, 1, 16_383, 16_384, 16_385, 65_535, 65_537, 1 << 20, (5 << 20) + 1]) {
            roundtrip(near.app().await, seed, length).await;
            assert!(matches!(near.end().await, End::Clean));
        }
        assert_eq!(near.server.seen().connections.get(), 1);
    });
}

#[test]
fn a_half_close_of_either_end_leaves_the_other_direction_open() {
    ENVOY.run(async |program| {
        for client_first in [true, false] {
            let target = Target::listen();
            let near = Near::start(program.clone(), target.address()).await;
            let (client, server) = (near.app().await, target.accept().await);
            let (mut early, mut late) = if client_first { (client, server) } else { (server, client) };
            let question = pattern(1, 1 << 20);
            early.write_all(&question).await.unwrap();
            early.shutdown().await.unwrap();
            assert!(read_end(&mut late).await.unwrap() == question);
            late.write_all(b"answer").await.unwrap();
            late.shutdown().await.unwrap();
            assert_eq!(read_end(&mut early).await.unwrap(), b"answer", "client first: {client_first}");
            assert!(matches!(near.end().await, End::Clean));
        }
    });
}

#[test]
fn a_hundred_and_fifty_flows_at_once_each_get_their_own_bytes() {
    ENVOY.run(async |program| {
        let near = Near::start(program, echo()).await;
        let mut flows = JoinSet::new();
        for seed in 0..150 {
            let address = near.envoy.address;
            flows.spawn_local(async move { roundtrip(connect(address).await, seed, 100_000).await });
        }
        while let Some(flow) = flows.join_next().await {
            flow.unwrap();
        }
        assert!(near.server.seen().failed.borrow().is_empty());
    });
}

#[test]
fn our_limit_of_streams_opens_further_tunnels() {
    ENVOY.run(async |program| {
        for (max_streams, flows, tunnels) in [(100, 150, 2), (1, 4, 4)] {
            let settings = Settings { max_streams, ..Settings::default() };
            let near = Near::start_with(program.clone(), echo(), ("30s", "20s"), settings).await;
            let mut held = Vec::new();
            for byte in 0..flows {
                let mut app = near.app().await;
                ping(&mut app, byte).await;
                held.push(app);
            }
            assert_eq!(near.server.seen().connections.get(), tunnels);
            for (byte, app) in (0..).zip(&mut held) {
                ping(app, byte).await;
            }
        }
    });
}

#[test]
fn a_reader_that_stops_holds_its_sender_and_loses_nothing() {
    ENVOY.run(async |program| {
        let target = Target::listen();
        let near = Near::start(program, target.address()).await;
        let (client, server) = (near.app().await, target.accept().await);
        hold_and_release(client, server).await;
        let (client, server) = (near.app().await, target.accept().await);
        hold_and_release(server, client).await;
    });
}

#[test]
fn a_reset_of_the_client_reaches_the_server() {
    ENVOY.run(async |program| {
        let target = Target::listen();
        let near = Near::start(program, target.address()).await;
        let (mut client, mut server) = (near.app().await, target.accept().await);
        client.write_all(b"x").await.unwrap();
        server.read_exact(&mut [0]).await.unwrap();
        reset(client);
        assert!(is_reset(&read_end(&mut server).await));
        assert!(matches!(near.end().await, End::Reset(Side::Second)));
    });
}

/// Envoy makes a clean end of our CONNECT_ERROR, though it sends it itself where it means a RST.
#[test]
fn a_reset_of_the_server_is_a_clean_end_for_the_client() {
    ENVOY.run(async |program| {
        let target = Target::listen();
        let near = Near::start(program, target.address()).await;
        let (mut client, mut server) = (near.app().await, target.accept().await);
        client.write_all(b"x").await.unwrap();
        server.read_exact(&mut [0]).await.unwrap();
        reset(server);
        assert_eq!(read_end(&mut client).await.unwrap(), b"");
        assert!(matches!(near.end().await, End::Reset(Side::First)));
    });
}

#[test]
fn a_target_that_cannot_be_reached_is_a_clean_end_for_the_client() {
    ENVOY.run(async |program| {
        let (address, _reserved) = nobody();
        let near = Near::start(program, address).await;
        for _ in 0..2 {
            assert_eq!(read_end(&mut near.app().await).await.unwrap(), b"");
        }
        assert_eq!(near.server.seen().connections.get(), 1);
        assert_eq!(near.server.seen().refused.get(), 2);
    });
}

#[test]
fn after_our_goaway_new_flows_take_a_new_tunnel_and_old_ones_go_on() {
    ENVOY.run(async |program| {
        let near = Near::start(program, echo()).await;
        let mut held = Vec::new();
        for byte in 0..20 {
            let mut app = near.app().await;
            ping(&mut app, byte).await;
            held.push(app);
        }
        // New ones come all the time.
        let mut flows = JoinSet::new();
        let mut draining = None;
        for seed in 0..40 {
            let address = near.envoy.address;
            flows.spawn_local(async move { roundtrip(connect(address).await, seed, 50_000).await });
            if seed == 20 {
                draining = Some(near.server.drain());
            }
            tokio::task::yield_now().await;
        }
        while let Some(flow) = flows.join_next().await {
            flow.unwrap();
        }
        let mut new = near.app().await;
        ping(&mut new, 1).await;
        assert_eq!(near.server.seen().connections.get(), 2);
        for (seed, mut app) in (0..).zip(held) {
            ping(&mut app, 9).await;
            roundtrip(app, seed, 100_000).await;
        }
        assert_eq!(draining.unwrap().await.unwrap(), Drained::Complete);
        ping(&mut new, 2).await;
        assert!(near.server.seen().failed.borrow().is_empty());
        assert_eq!(near.envoy.stat("cluster.tunnels.upstream_rq_rx_reset").await, 0);
    });
}

#[test]
fn an_idle_tunnel_is_kept_alive_by_both() {
    ENVOY.run(async |program| {
        let near = Near::start_with(program, echo(), ("0.2s", "2s"), brisk()).await;
        let mut app = near.app().await;
        ping(&mut app, 1).await;
        // Whoever left one unanswered would be given up by now.
        sleep(Duration::from_secs(5)).await;
        ping(&mut app, 2).await;
        assert_eq!(near.server.seen().connections.get(), 1);
        assert!(near.server.seen().failed.borrow().is_empty());
        assert_eq!(near.envoy.stat("cluster.tunnels.http2.keepalive_timeout").await, 0);
    });
}

#[test]
fn an_envoy_that_fell_silent_is_noticed() {
    ENVOY.run(async |program| {
        let target = Target::listen();
        let near = Near::start_with(program, target.address(), ("30s", "20s"), brisk()).await;
        let (mut client, mut server) = (near.app().await, target.accept().await);
        client.write_all(b"x").await.unwrap();
        server.read_exact(&mut [0]).await.unwrap();
        near.envoy.freeze();
        assert!(is_reset(&read_end(&mut server).await));
        assert!(matches!(near.end().await, End::Reset(Side::Second)));
        eventually("the tunnel's end to be told", async || {
            let failed = near.server.seen().failed.borrow();
            ensure!(matches!(failed[..], [Error::Silent(_)]), "{failed:?}");
            Ok(())
        })
        .await;
    });
}
