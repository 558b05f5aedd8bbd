//! Whether readers that stall stop those who share their tunnel.

use anyhow::Context as _;
use benches::pair::stalled::Outcome;

use crate::mesh::Arm;

/// How it went, and in how many tunnels: only where they share one does it say anything.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stalled {
    pub(crate) arm: &'static str,
    pub(crate) outcome: Outcome,
    pub(crate) tunnels: usize,
}

/// Before any load: what a pool has seen, it may act on.
pub(crate) fn measure(arm: &Arm<'_>) -> anyhow::Result<Stalled> {
    eprintln!("stalled readers: {}", arm.name);
    let command = ["fairway", "pair", "stalled", "--bulk", "server:9001", "--url", "http://server/bytes/64"];
    let text = arm.run_in_reader(&command)?;
    let outcome = serde_json::from_str(&text).with_context(|| format!("the client says {text:?}"))?;
    Ok(Stalled { arm: arm.name, outcome, tunnels: arm.tunnels_of_reader()? })
}
