//! A datagram to a nameserver in the application's place, and the answer back.

use std::{
    io,
    net::SocketAddr,
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use mesh_net::sockets::udp_socket;
use tokio::{
    net::UdpSocket,
    time::{sleep, timeout},
};

use crate::{
    dns::{
        DEADLINE,
        message::{MAX_MESSAGE, answers, id},
        metrics::Labels,
    },
    pods::PodContext,
};

/// After this long without an answer the next nameserver is asked as well; the first answer counts.
const STAGGER: Duration = Duration::from_millis(1500);

/// Asks in the application's place and counts it.
///
/// # Errors
/// When no server could be asked, or none answered within [`DEADLINE`].
pub(super) async fn relay(
    pod: &PodContext,
    servers: Vec<SocketAddr>,
    query: &[u8],
    labels: &Labels,
) -> io::Result<Vec<u8>> {
    let metrics = pod.shared.outcomes.dns();
    metrics.relayed(labels);
    let since = Instant::now();
    let answered = timeout(DEADLINE, first_answer(pod, servers, query)).await;
    let answered = answered.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    match &answered {
        Ok(_) => metrics.answered(labels, since.elapsed()),
        Err(_) => metrics.failed(labels),
    }
    answered
}

async fn first_answer(pod: &PodContext, servers: Vec<SocketAddr>, query: &[u8]) -> io::Result<Vec<u8>> {
    let mut servers = servers.into_iter();
    let mut asked = FuturesUnordered::new();
    loop {
        asked.extend(servers.next().map(|server| ask(pod, server, query)));
        tokio::select! {
            answer = asked.next() => match answer {
                Some(Err(error)) if asked.is_empty() && servers.len() == 0 => return Err(error),
                Some(Err(_)) => {}
                Some(Ok(answer)) => return Ok(answer),
                None => return Err(io::Error::new(io::ErrorKind::NotFound, "no nameserver is known")),
            },
            () = sleep(STAGGER), if servers.len() > 0 => {}
        }
    }
}

/// The kernel lets only the server's own datagrams pass.
async fn ask(pod: &PodContext, server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let own = pod.shared.config.local_address.filter(|own| own.is_ipv4() == server.is_ipv4());
    let socket = udp_socket(pod.netns.as_ref(), own, server, &pod.sockets)?;
    let socket = UdpSocket::from_std(socket)?;
    socket.send(query).await?;
    let id = id(query).ok_or(io::ErrorKind::InvalidInput)?;
    loop {
        socket.readable().await?;
        // Taken only now: an idle relay costs no more than its query.
        let mut answer = Vec::with_capacity(MAX_MESSAGE);
        match socket.try_recv_buf(&mut answer) {
            Ok(_) if answers(&answer, id) => return Ok(answer),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}
