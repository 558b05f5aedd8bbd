//! What idle connections cost the proxies, and whether they give it back.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use lab::apps::hold::Held;

use crate::mesh::{Arm, Usage};

/// How long the connections are held: long enough for what opening them cost to be given back.
const HELD: Duration = Duration::from_secs(5);
/// After the last connection, before the memory is looked at again.
const SETTLE: Duration = Duration::from_secs(5);

/// Memory of the proxy of the clients' node and of the servers' node.
#[derive(Clone, Debug)]
pub(crate) struct Idle {
    pub(crate) arm: &'static str,
    pub(crate) wanted: usize,
    pub(crate) held: Held,
    pub(crate) before: [f64; 2],
    pub(crate) during: [f64; 2],
    pub(crate) after: [f64; 2],
}

impl Idle {
    /// Bytes that each held connection costs each of the two.
    pub(crate) fn per_connection(&self) -> [f64; 2] {
        let one = |node: usize| (self.during[node] - self.before[node]) / self.held.open as f64;
        [one(0), one(1)]
    }
}

/// Holds `connections`, and looks at the proxies before, meanwhile and afterwards.
pub(crate) fn measure(arm: &Arm<'_>, connections: usize) -> anyhow::Result<Idle> {
    eprintln!("{connections} idle connections: {}", arm.name);
    let before = resident(arm)?;
    let (held, during) = thread::scope(|scope| {
        let holding = scope.spawn(|| hold(arm, connections));
        // The command ends `HELD` after the last connection was opened; so the last look but a few falls into that time.
        let mut looks = Vec::new();
        while !holding.is_finished() {
            looks.push((Instant::now(), resident(arm)?));
            thread::sleep(Duration::from_millis(200));
        }
        let ended = Instant::now();
        let held = holding.join().map_err(|_| anyhow::anyhow!("the holder panicked"))??;
        let settled = looks.iter().rev().find(|(at, _)| ended - *at > HELD / 4).map(|(_, sizes)| *sizes);
        anyhow::Ok((held, settled.context("the connections ended at once")?))
    })?;
    ensure!(held.open > 0, "no connection was opened: {}", held.first_error.unwrap_or_default());
    thread::sleep(SETTLE);
    Ok(Idle { arm: arm.name, wanted: connections, held, before, during, after: resident(arm)? })
}

fn hold(arm: &Arm<'_>, connections: usize) -> anyhow::Result<Held> {
    let (connections, seconds) = (connections.to_string(), HELD.as_secs().to_string());
    let command = ["fairway", "app", "idlers", "server:9003", "--connections", &connections, "--seconds", &seconds];
    let text = arm.run(&command)?;
    serde_json::from_str(&text).with_context(|| format!("the client says {text:?}"))
}

fn resident(arm: &Arm<'_>) -> anyhow::Result<[f64; 2]> {
    Ok(arm.usage()?.map(|Usage { resident_bytes, .. }| resident_bytes))
}
