//! From a client that does not speak HBONE to an application of the pod: plaintext, so nobody is known to be behind it.

use std::{net::SocketAddr, sync::Arc};

use mesh_core::workload::Workload;
use mesh_net::sockets::{configure_accepted, original_dst};
use tokio::net::TcpStream;

use crate::{
    connections::Entry,
    error::ProxyError,
    flow::{Direction, Flow},
    pods::PodContext,
    proxy::{
        authorize::admit,
        forward::{Carried, FlowSocket},
        resolve,
        upstream::Upstream,
    },
};

/// A captured connection.
pub(crate) async fn open(pod: &PodContext, client: TcpStream, peer: SocketAddr) -> Option<Carried> {
    let client = FlowSocket::new(client);
    let accepted = configure_accepted(&client, &pod.sockets).and_then(|()| original_dst(&*client));
    let (destination, error) = match accepted {
        // Whatever the address: nothing was redirected here if the client dialled our port itself.
        Ok(destination) if pod.is_own_port(destination.port()) => (destination, ProxyError::Loop),
        Ok(destination) => match resolve::settled_workload(pod).await {
            Ok(local) => return carry(pod, client, &local, peer, destination).await,
            Err(error) => (destination, error),
        },
        Err(source) => (peer, ProxyError::OriginalDestination(source)),
    };
    pod.shared.outcomes.early_deny(Direction::Inbound, peer, destination, &error);
    None
}

async fn carry(
    pod: &PodContext,
    client: FlowSocket,
    local: &Arc<Workload>,
    peer: SocketAddr,
    destination: SocketAddr,
) -> Option<Carried> {
    let flow = pod.shared.outcomes.opened(describe(pod, local, peer, destination));
    let opened = match admit(pod, local, flow.entry()) {
        Ok(live) => pod.connect_as(peer.ip(), destination).await.map(|application| (application, live)),
        Err(error) => Err(error),
    };
    match opened {
        Ok((application, live)) => Some(Carried::new(application, Upstream::Tcp(client), flow, live)),
        Err(error) => {
            flow.finish(Err(&error));
            None
        }
    }
}

fn describe(pod: &PodContext, local: &Arc<Workload>, peer: SocketAddr, destination: SocketAddr) -> Arc<Entry> {
    let index = pod.shared.state.snapshot();
    let mut flow = Flow::new(Direction::Inbound, peer, destination);
    flow.source = resolve::source_by_address(&index, local, peer.ip());
    flow.service = resolve::inbound_service(&index, local, None, destination.port());
    flow.destination_workload = Some(local.clone());
    Entry::new(flow)
}
