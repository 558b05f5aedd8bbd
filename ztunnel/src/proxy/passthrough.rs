//! From a client that does not speak HBONE to an application of the pod: plaintext, so nobody is known to be behind it.

use std::{net::SocketAddr, rc::Rc, sync::Arc};

use mesh_core::workload::Workload;
use mesh_net::sockets::{configure_accepted, original_dst};
use tokio::net::TcpStream;

use crate::{
    connections::{InboundConnection, Protocol},
    error::ProxyError,
    outcome::{Direction, Flow},
    pods::PodContext,
    proxy::{
        authorize::admit,
        forward::{FlowSocket, relay},
        resolve,
        upstream::Upstream,
    },
};

/// A captured connection.
pub(crate) async fn serve(pod: Rc<PodContext>, client: TcpStream, peer: SocketAddr) {
    let client = FlowSocket::new(client);
    let deny = |destination, error: &ProxyError| {
        pod.shared.outcomes.early_deny(Direction::Inbound, peer, destination, error);
    };
    let destination = match configure_accepted(&client, &pod.sockets).and_then(|()| original_dst(&*client)) {
        Ok(destination) => destination,
        Err(source) => return deny(peer, &ProxyError::OriginalDestination(source)),
    };
    // Whatever the address: nothing was redirected here if the client dialled our port itself.
    if pod.is_own_port(destination.port()) {
        return deny(destination, &ProxyError::Loop);
    }
    match resolve::settled_workload(&pod).await {
        Ok(local) => carry(&pod, client, local, peer, destination).await,
        Err(error) => deny(destination, &error),
    }
}

async fn carry(pod: &PodContext, client: FlowSocket, local: Arc<Workload>, peer: SocketAddr, destination: SocketAddr) {
    let flow = pod.shared.outcomes.opened(describe(pod, &local, peer, destination));
    let shown = InboundConnection { src: peer, original_dst: None, actual_dst: destination, protocol: Protocol::Tcp };
    let mut admission = match admit(pod, &local, shown, None) {
        Ok(admission) => admission,
        Err(error) => return flow.finish(0, 0, Err(&error)),
    };
    match pod.connect_as(peer.ip(), destination).await {
        Ok(application) => relay(application, Upstream::Tcp(client), Some(&mut admission.cut), flow).await,
        Err(error) => flow.finish(0, 0, Err(&error)),
    }
}

fn describe(pod: &PodContext, local: &Arc<Workload>, peer: SocketAddr, destination: SocketAddr) -> Flow {
    let index = pod.shared.state.snapshot();
    let mut flow = Flow::new(Direction::Inbound, peer, destination);
    flow.source = resolve::source_by_address(&index, local, peer.ip());
    flow.service = resolve::inbound_service(&index, local, None, destination.port());
    flow.destination_identity = Some(local.identity());
    flow.destination_workload = Some(local.clone());
    flow
}
