use std::time::{Duration, Instant};

use anyhow::ensure;

use crate::{
    cluster::{Cluster, INSIDE, MODE, all_pods, sight},
    kubectl,
    report::{Evidence, took},
};

pub(super) fn run(cluster: &Cluster) -> Evidence {
    let clients = cluster.pods(INSIDE, "client")?;
    let client = &clients[0];
    let connections: Vec<u64> =
        clients.iter().map(|c| cluster.progress(&c.name).map(|p| p.connections)).collect::<Result<_, _>>()?;
    let clear = nonce_on_the_wire(cluster, client, "before")?;
    ensure!(clear.found > 0, "the capture sees nothing of what is sent in the clear: {clear:?}");
    let before = all_pods(INSIDE)?;

    let started = Instant::now();
    kubectl::run(&["label", "namespace", INSIDE, &format!("{MODE}=ambient"), "--overwrite"])?;
    let enrolled = cluster.all_enrolled(Duration::from_secs(60))?;
    let after = started.elapsed();

    let same = |pods: &[(_, crate::cluster::Pod)]| -> Vec<_> {
        pods.iter().map(|(_, p)| (p.name.clone(), p.uid.clone(), p.containers.clone())).collect()
    };
    let now = all_pods(INSIDE)?;
    ensure!(same(&now) == same(&before), "pods or containers changed");
    let host = now.iter().find(|(_, pod)| pod.host_network && pod.redirection.is_some());
    ensure!(host.is_none(), "a pod on the host's network was annotated");
    let kept: Vec<u64> =
        clients.iter().map(|c| cluster.progress(&c.name).map(|p| p.connections)).collect::<Result<_, _>>()?;
    ensure!(kept == connections, "open connections were cut: {connections:?} before, {kept:?} after");

    let tls = kubectl::eventually("traffic to be encrypted", Duration::from_secs(20), || {
        let seen = nonce_on_the_wire(cluster, client, "after")?;
        ensure!(seen.found == 0, "{} times in the clear: {:?}", seen.found, seen.excerpt);
        ensure!(seen.tls_bytes > 0, "nothing was sent over a tunnel: {seen:?}");
        ensure!(seen.lost == 0, "{} frames were not seen", seen.lost);
        Ok(seen)
    })?;
    Ok(vec![
        format!("{enrolled} pods captured {} after the label", took(after)),
        "same pod uids, container ids and start times; connections opened before go on".to_owned(),
        format!("before: the nonce crossed the link in the clear {} times", clear.found),
        format!("after: 0 times, {} bytes in TLS records of tunnels", tls.tls_bytes),
    ])
}

/// Sends a nonce from one node to servers of which one is on the other, and looks for it on the link.
fn nonce_on_the_wire(
    cluster: &Cluster,
    client: &crate::cluster::Pod,
    when: &str,
) -> anyhow::Result<lab::protocol::Sight> {
    let nonce = format!("nonce-{when}-{}", client.uid);
    let servers = cluster.pods(INSIDE, "server")?;
    let far: Vec<_> = servers.iter().filter(|server| server.node != client.node).collect();
    ensure!(!far.is_empty(), "all servers are on the client's node");
    let capture = cluster.start_capture(&client.node, &nonce, 4)?;
    // The capture says when it listens; what is sent before that is not seen, so it is sent several times.
    for _ in 0..10 {
        cluster.get(INSIDE, &client.name, &format!("http://{}:8080/{nonce}", far[0].address))?;
        cluster.get(INSIDE, &client.name, &format!("http://server/{nonce}"))?;
    }
    sight(capture)
}
