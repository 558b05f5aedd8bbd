//! The loads, and what one run of one of them says.

use anyhow::{Context as _, ensure};
use lab::apps::{load::Report, stream::Outcome};

use crate::mesh::Arm;

const MIB: u64 = 1 << 20;

/// One thing to do between client and server.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    /// HTTP requests for bodies of so many bytes, in a closed loop.
    Requests { connections: usize, bytes: usize, new_connections: bool },
    /// Bytes from server to client, on each of so many connections.
    Bulk { flows: usize, mib: u64 },
}

/// In the order they run and are reported.
pub(crate) const LOADS: [Load; 8] = [
    requests("64 B, 64 connections", 64, 64, false),
    requests("1 KiB, 64 connections", 64, 1024, false),
    requests("64 B, 1 connection", 1, 64, false),
    requests("1 KiB, 1 connection", 1, 1024, false),
    requests("64 B, new connections, 1 at a time", 1, 64, true),
    requests("64 B, new connections, 16 at a time", 16, 64, true),
    Load { name: "bulk, 1 flow", kind: Kind::Bulk { flows: 1, mib: 768 } },
    Load { name: "bulk, 4 flows", kind: Kind::Bulk { flows: 4, mib: 256 } },
];

const fn requests(name: &'static str, connections: usize, bytes: usize, new_connections: bool) -> Load {
    Load { name, kind: Kind::Requests { connections, bytes, new_connections } }
}

/// One run. Units are requests, or MiB.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sample {
    pub(crate) per_second: f64,
    /// 0 where there are no requests.
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) errors: u64,
    /// Of both proxies together.
    pub(crate) cpu_us_per_unit: f64,
}

impl Load {
    pub(crate) const fn is_bulk(&self) -> bool {
        matches!(self.kind, Kind::Bulk { .. })
    }

    /// Runs once on an arm.
    pub(crate) fn measure(&self, arm: &Arm<'_>, seconds: f64) -> anyhow::Result<Sample> {
        let before = arm.cpu()?;
        let (units, sample) = match self.kind {
            Kind::Requests { connections, bytes, new_connections } => {
                request(arm, connections, bytes, new_connections, seconds)
            }
            Kind::Bulk { flows, mib } => bulk(arm, flows, mib),
        }
        .with_context(|| format!("{} on {}", self.name, arm.name))?;
        Ok(Sample { cpu_us_per_unit: (arm.cpu()? - before) * 1e6 / units, ..sample })
    }
}

fn request(arm: &Arm<'_>, connections: usize, bytes: usize, new: bool, seconds: f64) -> anyhow::Result<(f64, Sample)> {
    let (connections, path, seconds) = (connections.to_string(), format!("/bytes/{bytes}"), seconds.to_string());
    let mut command =
        vec!["fairway", "app", "load", "server", "--path", &path, "--connections", &connections, "--seconds", &seconds];
    if new {
        command.push("--new-connections");
    }
    let text = arm.run(&command)?;
    let report: Report = serde_json::from_str(&text).with_context(|| format!("the client says {text:?}"))?;
    let first_error = report.first_error.as_deref().unwrap_or_default();
    ensure!(report.requests > report.errors, "most requests failed: {first_error}");
    let sample = Sample {
        per_second: report.per_second(),
        p50_us: report.p50_us as f64,
        p99_us: report.p99_us as f64,
        errors: report.errors,
        cpu_us_per_unit: 0.0,
    };
    Ok((report.requests as f64, sample))
}

fn bulk(arm: &Arm<'_>, flows: usize, mib: u64) -> anyhow::Result<(f64, Sample)> {
    let (flows, bytes) = (flows.to_string(), (mib * MIB).to_string());
    let command = ["fairway", "app", "transfer", "bulk", "server:9001", "--connections", &flows, "--bytes", &bytes];
    let text = arm.run(&command)?;
    let outcome: Outcome = serde_json::from_str(&text).with_context(|| format!("the client says {text:?}"))?;
    let units = outcome.bytes as f64 / MIB as f64;
    Ok((units, Sample { per_second: units / outcome.seconds, ..Sample::default() }))
}
