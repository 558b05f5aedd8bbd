use std::time::Instant;

use anyhow::ensure;

use crate::{
    cluster::{Cluster, INSIDE, SYSTEM, counted, told},
    kubectl,
    report::{Evidence, took},
};

const LOAD_SECONDS: u32 = 45;

pub(super) fn application(cluster: &Cluster) -> Evidence {
    let clients = cluster.pods(INSIDE, "client")?;
    let keep_alive = cluster.start_load(&clients[0].name, "server", LOAD_SECONDS, false)?;
    let fresh = cluster.start_load(&clients[clients.len() - 1].name, "server", LOAD_SECONDS, true)?;
    let started = Instant::now();
    kubectl::run(&["-n", INSIDE, "rollout", "restart", "deployment/server"])?;
    kubectl::rolled_out(INSIDE, "deployment/server")?;
    let rolled = started.elapsed();
    let (keep_alive, fresh) = (counted(keep_alive)?, counted(fresh)?);
    ensure!(rolled.as_secs() < LOAD_SECONDS.into(), "the load ended before the rollout, after {}", took(rolled));
    let lines = vec![
        format!("4 servers replaced one by one in {}", took(rolled)),
        format!("kept connections: {}", told(&keep_alive)),
        format!("a connection each: {}", told(&fresh)),
    ];
    ensure!(keep_alive.connect_errors + fresh.connect_errors == 0, "{}", lines.join("\n"));
    Ok(lines)
}

/// Live connections through the old ztunnel end with it, today; connecting must not fail.
pub(super) fn ztunnel(cluster: &Cluster) -> Evidence {
    let clients = cluster.pods(INSIDE, "client")?;
    let before: Vec<_> = clients.iter().map(|c| cluster.progress(&c.name)).collect::<Result<_, _>>()?;
    let keep_alive = cluster.start_load(&clients[0].name, "server", LOAD_SECONDS, false)?;
    let fresh = cluster.start_load(&clients[clients.len() - 1].name, "server", LOAD_SECONDS, true)?;
    let started = Instant::now();
    kubectl::run(&["-n", SYSTEM, "rollout", "restart", "daemonset/ztunnel"])?;
    kubectl::rolled_out(SYSTEM, "daemonset/ztunnel")?;
    let rolled = started.elapsed();
    let (keep_alive, fresh) = (counted(keep_alive)?, counted(fresh)?);
    let after: Vec<_> = clients.iter().map(|c| cluster.progress(&c.name)).collect::<Result<_, _>>()?;
    let reset: u64 = before.iter().zip(&after).map(|(b, a)| a.connections - b.connections).sum();
    let lines = vec![
        format!("rolled over {} nodes in {}", clients.len(), took(rolled)),
        format!("kept connections: {}", told(&keep_alive)),
        format!("a connection each: {}", told(&fresh)),
        format!("{reset} long connections of {} clients had to be opened again", clients.len()),
    ];
    ensure!(keep_alive.connect_errors + fresh.connect_errors == 0, "{}", lines.join("\n"));
    Ok(lines)
}
