//! DNS over UDP: one task receives, each query is a task of its own.

use std::{net::SocketAddr, rc::Rc, time::Duration};

use hickory_proto::op::ResponseCode;
use mesh_net::sockets::canonical;
use tokio::{
    net::UdpSocket,
    task::JoinSet,
    time::{Instant, sleep, sleep_until},
};

use crate::{
    dns::{
        Place, Slot,
        decide::{Verdict, decide},
        message::{MAX_MESSAGE, refusal},
        metrics::Transport,
        relay::relay,
        servers,
    },
    pods::{PodContext, report_panic},
};

/// After a failed receive, which is no client's fault.
const PAUSE: Duration = Duration::from_millis(50);
/// How long a leaving socket goes on while queries are at work: a successor has its own by then, but the kernel still shares out the
/// datagrams.
const LINGER: Duration = Duration::from_secs(1);

/// Serves until the drain.
pub(crate) async fn serve(pod: Rc<PodContext>, socket: std::net::UdpSocket) {
    let socket = match UdpSocket::from_std(socket) {
        Ok(socket) => Rc::new(socket),
        Err(error) => return tracing::error!(%error, "cannot register the DNS socket"),
    };
    let mut queries = JoinSet::new();
    let mut buffer = vec![0; MAX_MESSAGE];
    let (mut leaving, mut guard) = (None, None);
    while leaving.is_none_or(|end| !queries.is_empty() && Instant::now() < end) {
        tokio::select! {
            received = socket.recv_from(&mut buffer) => match received {
                Ok((length, peer)) => take(&pod, &socket, &buffer[..length], peer, &mut queries),
                Err(error) => {
                    tracing::warn!(%error, "cannot receive DNS queries");
                    sleep(PAUSE).await;
                }
            },
            Some(done) = queries.join_next(), if !queries.is_empty() => report_panic(done),
            (_, held) = pod.drain.signalled(), if leaving.is_none() => {
                (leaving, guard) = (Some(Instant::now() + LINGER), Some(held));
            }
            () = sleep_until(leaving.unwrap_or_else(Instant::now)), if leaving.is_some() => {}
        }
    }
    drop(socket);
    while let Some(done) = queries.join_next().await {
        report_panic(done);
    }
    drop(guard);
}

fn take(pod: &Rc<PodContext>, socket: &Rc<UdpSocket>, query: &[u8], peer: SocketAddr, queries: &mut JoinSet<()>) {
    // Our own words would be answered without end.
    if pod.dns.own.contains(&canonical(peer)) {
        return;
    }
    let Some(slot) = Slot::take(pod, Place::Query) else {
        // As far as the socket takes it: a flood is not waited for.
        let refusal = refusal(query, ResponseCode::ServFail);
        if !refusal.is_empty() {
            drop(socket.try_send_to(&refusal, peer));
        }
        return;
    };
    let (pod, socket, query) = (pod.clone(), socket.clone(), query.to_vec());
    queries.spawn_local(async move {
        let _slot = slot;
        let Some(reply) = reply(&pod, &socket, &query, peer).await else { return };
        if let Err(error) = socket.send_to(&reply, peer).await {
            tracing::debug!(%error, %peer, "cannot answer a DNS query");
        }
    });
}

async fn reply(pod: &Rc<PodContext>, socket: &UdpSocket, query: &[u8], peer: SocketAddr) -> Option<Vec<u8>> {
    match decide(pod, query, Transport::Udp).await {
        Verdict::Ignore => None,
        Verdict::Reply(reply) => Some(reply),
        Verdict::Relay(labels) => {
            let Some(_relay) = Slot::take(pod, Place::Relay) else {
                return Some(refusal(query, ResponseCode::ServFail));
            };
            let servers = servers(pod, meant(pod, socket, peer));
            let answer = relay(pod, servers, query, &labels).await;
            Some(answer.unwrap_or_else(|error| {
                tracing::debug!(target: "dns", %error, "cannot relay a query");
                refusal(query, ResponseCode::ServFail)
            }))
        }
    }
}

/// Where the application sent its datagram before it was redirected here.
fn meant(pod: &PodContext, socket: &UdpSocket, peer: SocketAddr) -> Option<SocketAddr> {
    let local = socket.local_addr().ok()?;
    let mut tracked = pod.dns.tracked.borrow_mut();
    let found = tracked.as_mut()?.udp_destination(peer, local);
    found.inspect_err(|error| tracing::debug!(%error, %peer, "whom a query was for is not known")).ok()?.map(canonical)
}
