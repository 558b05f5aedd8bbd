//! Trying a way without sending anything on it: for operators who ask why, on the path that connections take.

use std::{net::SocketAddr, rc::Rc, sync::Arc, time::Duration};

use mesh_core::{reason::Reason, select::Tunnel, workload::Workload};
use mesh_hbone::{Connector as _, TunnelKey};
use mesh_net::{NetNs, SocketOptions};
use mesh_runtime::workers::WorkerHandle;
use tokio::{sync::oneshot, time::timeout};

use super::upstream::{Dialer, open};
use crate::{error::connect_reason, pods::Shared, tunnels::Tunnels};

/// Shorter than connections wait: somebody is looking at a terminal.
const CONNECT: Duration = Duration::from_secs(3);
const HANDSHAKE: Duration = Duration::from_secs(5);

/// Connects from where a pod's connections start, and hangs up. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Prober {
    pub(crate) shared: Arc<Shared>,
    pub(crate) netns: Option<NetNs>,
    pub(crate) sockets: SocketOptions,
    pub(crate) worker: WorkerHandle,
}

/// What to try.
#[derive(Clone, Debug)]
pub enum Way {
    /// A TCP connection.
    Tcp(SocketAddr),
    /// A TCP connection and the handshakes of mutual TLS, as the workload given.
    Tunnel(Arc<Workload>, Tunnel),
}

/// Why a way is not open.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct Blocked {
    pub reason: Reason,
    /// The failure and its causes.
    pub detail: String,
}

impl Prober {
    /// The other end sees a connection that says nothing and ends.
    ///
    /// # Errors
    /// What a connection on that way would fail with.
    pub async fn probe(&self, way: Way) -> Result<(), Blocked> {
        let (answer, answered) = oneshot::channel();
        let prober = self.clone();
        // Tunnels are opened on workers, by the very code that opens them for connections.
        let asked = self.worker.spawn(move || async move { drop(answer.send(prober.try_way(way).await)) }).await;
        let gone = || Blocked { reason: Reason::Drain, detail: "the proxy is shutting down".to_owned() };
        asked.map_err(|_| gone())?;
        answered.await.unwrap_or_else(|_| Err(gone()))
    }

    async fn try_way(self, way: Way) -> Result<(), Blocked> {
        let (source, tunnel) = match way {
            Way::Tcp(to) => return self.knock(to).await,
            Way::Tunnel(source, tunnel) => (source, tunnel),
        };
        let to = tunnel.address;
        self.knock(to).await.map_err(|blocked| match blocked.reason {
            Reason::ConnectTimeout => {
                let detail = format!("no answer from {to}, maybe a NetworkPolicy is blocking port {}", to.port());
                Blocked { reason: Reason::NetworkPolicy, detail }
            }
            _ => blocked,
        })?;
        let key = TunnelKey {
            source_uid: source.uid.clone(),
            source_ip: source.addresses.first().copied().unwrap_or_else(|| to.ip()),
            source_identity: source.identity(),
            generation: 0,
            destination: to,
            accepted: tunnel.accepted,
            network: source.network.clone(),
        };
        let (identities, outcomes) = (self.shared.identities.clone(), self.shared.outcomes.clone());
        let dialer = Dialer {
            // Given up after the handshake: nobody needs to watch over it.
            tunnels: Rc::new(Tunnels::new(identities.clone(), outcomes.clone())),
            config: self.shared.config.clone(),
            identities,
            outcomes,
            netns: self.netns,
            sockets: self.sockets,
        };
        match timeout(HANDSHAKE, dialer.connect(&key)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => {
                let detail = mesh_runtime::telemetry::error_chain(&error);
                Err(Blocked { reason: error.reason(), detail })
            }
            Err(_) => {
                let detail = format!("{to} accepts connections, but finished no handshake within {HANDSHAKE:?}");
                Err(Blocked { reason: Reason::Tls, detail })
            }
        }
    }

    async fn knock(&self, to: SocketAddr) -> Result<(), Blocked> {
        let own = self.shared.config.local_address;
        let (reason, why) = match timeout(CONNECT, open(self.netns.as_ref(), own, &self.sockets, to)).await {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(error)) => (connect_reason(&error), error.to_string()),
            Err(_) => (Reason::ConnectTimeout, format!("no answer within {CONNECT:?}")),
        };
        Err(Blocked { reason, detail: format!("connection to {to} failed: {why}") })
    }
}
