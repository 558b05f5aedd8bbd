//! The mesh end to end, against plain TCP between the same two nodes, and against another ztunnel where one is given; and our tunnel
//! engine against the best that could be made of the `h2` crate, each in a bare proxy between two pods.
//!
//! Everything is measured round by round, one arm after the other (A B A B …), so that a machine that slows down slows all of them.
//! A figure is the median over the rounds; a ratio is the median of the rounds' ratios.

#![forbid(unsafe_code)]

mod idle;
mod loads;
mod mesh;
mod report;
mod stalled;

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context as _, ensure};
use benches::pair::{Engine, tls::Certificates};
use clap::{Parser, ValueEnum};

use crate::{
    loads::{LOADS, Sample},
    mesh::Arm,
};

/// Another ztunnel to be measured beside ours.
const PEER: &str = "FAIRWAY_PEER_ZTUNNEL";

/// Measure the mesh end to end. FAIRWAY_PEER_ZTUNNEL=PATH adds another ztunnel to compare with.
#[derive(Debug, Parser)]
struct Options {
    /// What to measure; by default all there is.
    #[arg(long, value_enum, value_delimiter = ',')]
    arms: Vec<Kind>,
    /// How often each load runs per arm.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Length of each timed load.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Idle connections to hold; 0 leaves that part out.
    #[arg(long, default_value_t = 10_000)]
    idle: usize,
    /// Only loads whose name contains this.
    #[arg(long, default_value = "")]
    only: String,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// TCP without a mesh.
    Plain,
    /// Our mesh.
    Mesh,
    /// A bare proxy on our engine.
    Engine,
    /// The same on the `h2` crate.
    H2,
    /// A mesh with the other ztunnel.
    Peer,
}

fn main() -> ExitCode {
    let options = Options::parse();
    if !options.bench {
        // `cargo test --all-targets` starts benchmarks too; minutes of load are no test.
        eprintln!("e2e: run it with `cargo bench -p benches --bench e2e`");
        return ExitCode::SUCCESS;
    }
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("e2e: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> anyhow::Result<()> {
    mesh::probe()?;
    let peer_binary = std::env::var_os(PEER).filter(|path| !path.is_empty()).map(PathBuf::from);
    let kinds = match &options.arms[..] {
        [] => Kind::value_variants().iter().copied().filter(|k| *k != Kind::Peer || peer_binary.is_some()).collect(),
        chosen => chosen.to_vec(),
    };
    let ours = mesh::start("ours", None)?;
    let peer = match &peer_binary {
        Some(binary) if kinds.contains(&Kind::Peer) => Some(mesh::start("peer", Some(binary))?),
        _ => None,
    };
    let certificates = tempfile::tempdir().context("no room for the certificates")?;
    Certificates::generate()?.write(certificates.path())?;

    let mut arms = Vec::new();
    for kind in kinds {
        let pair = |engine| mesh::add_pair(&ours.lab, engine, certificates.path());
        arms.push(match kind {
            Kind::Plain => Arm::plain(&ours.lab),
            Kind::Mesh => Arm::meshed("mesh", &ours.lab),
            Kind::Engine => pair(Engine::Engine)?,
            Kind::H2 => pair(Engine::H2)?,
            Kind::Peer => Arm::meshed("peer", &peer.as_ref().with_context(|| format!("{PEER} is not set"))?.lab),
        });
    }
    measure(options, &arms)
}

fn measure(options: &Options, arms: &[Arm<'_>]) -> anyhow::Result<()> {
    let proxied = || arms.iter().filter(|arm| arm.is_proxied());
    // First: what loads leave behind in a process, idle connections would fill.
    if options.idle > 0 {
        let idle = proxied().map(|arm| idle::measure(arm, options.idle)).collect::<anyhow::Result<Vec<_>>>()?;
        println!("{}", report::idle(&idle));
    }
    proxied().try_for_each(Arm::renew)?;
    let stalled = proxied().map(stalled::measure).collect::<anyhow::Result<Vec<_>>>()?;
    println!("{}", report::stalled(&stalled));
    proxied().try_for_each(Arm::renew)?;

    let loads: Vec<_> = LOADS.into_iter().filter(|load| load.name.contains(&options.only)).collect();
    ensure!(!loads.is_empty(), "no load is called {:?}", options.only);
    let mut samples = vec![vec![Vec::<Sample>::new(); arms.len()]; loads.len()];
    for round in 0..options.rounds {
        for (load, samples) in loads.iter().zip(&mut samples) {
            eprintln!("round {} of {}: {}", round + 1, options.rounds, load.name);
            for (arm, samples) in arms.iter().zip(samples) {
                samples.push(load.measure(arm, options.seconds)?);
            }
        }
    }
    println!("{}", report::loads(&loads, arms, &samples));
    Ok(())
}
