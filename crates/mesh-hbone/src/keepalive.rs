//! PINGs, so that a peer that vanished without a word is noticed on idle tunnels too.

use h2::{Ping, PingPong};
use tokio::time::{sleep, timeout};

use crate::config::KeepAlive;

/// Resolves when the peer failed to answer in time, or the tunnel is over. The connection must be polled meanwhile.
pub(crate) async fn watch(ping_pong: Option<PingPong>, config: KeepAlive) {
    let Some(mut ping_pong) = ping_pong else { return std::future::pending().await };
    loop {
        sleep(config.interval).await;
        if !matches!(timeout(config.timeout, ping_pong.ping(Ping::opaque())).await, Ok(Ok(_))) {
            return;
        }
    }
}
