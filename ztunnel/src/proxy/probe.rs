//! Trying a way without sending anything on it: for operators who ask why, on the path that connections take.

use std::{net::SocketAddr, rc::Rc, sync::Arc};

use mesh_core::{reason::Reason, select::Tunnel, workload::Workload};
use mesh_hbone::{Connector as _, TunnelKey};
use mesh_net::{NetNs, SocketOptions};
use mesh_runtime::workers::WorkerHandle;
use tokio::sync::oneshot;

use super::upstream::{Dialer, open};
use crate::{error::connect_reason, pods::Shared};

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
    /// Takes at most as long as a connection of the pod would wait. The other end sees a connection that says nothing and ends.
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
        let Self { shared, netns, sockets, .. } = self;
        match way {
            Way::Tcp(to) => match open(netns.as_ref(), shared.config.local_address, &sockets, to).await {
                Ok(_) => Ok(()),
                Err(error) => Err(Blocked {
                    reason: connect_reason(&error),
                    detail: format!("connection to {to} failed: {error}"),
                }),
            },
            Way::Tunnel(source, tunnel) => {
                let dialer = Rc::new(Dialer {
                    config: shared.config.clone(),
                    identities: shared.identities.clone(),
                    outcomes: shared.outcomes.clone(),
                    netns,
                    sockets,
                });
                let key = TunnelKey {
                    source_uid: source.uid.clone(),
                    source_ip: source.addresses.first().copied().unwrap_or_else(|| tunnel.address.ip()),
                    source_identity: source.identity(),
                    generation: 0,
                    destination: tunnel.address,
                    accepted: tunnel.accepted,
                    network: source.network.clone(),
                };
                match dialer.connect(&key).await {
                    Ok(_) => Ok(()),
                    Err(error) => {
                        let detail = mesh_runtime::telemetry::error_chain(&error);
                        Err(Blocked { reason: error.reason(), detail })
                    }
                }
            }
        }
    }
}
