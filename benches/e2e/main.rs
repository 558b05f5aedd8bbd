//! The mesh end to end, against plain TCP between the same two nodes, and against another ztunnel where one is given.
//!
//! Everything is measured round by round, one arm after the other (A B A B …), so that a machine that slows down slows all of them.
//! A figure is the median over the rounds; a ratio is the median of the rounds' ratios.

#![forbid(unsafe_code)]

mod idle;
mod loads;
mod mesh;
mod report;

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;

use crate::{
    loads::{LOADS, Sample},
    mesh::Arm,
};

/// Another ztunnel to be measured beside ours.
const PEER: &str = "FAIRWAY_PEER_ZTUNNEL";

/// Measure the mesh end to end. FAIRWAY_PEER_ZTUNNEL=PATH adds another ztunnel to compare with.
#[derive(Debug, Parser)]
struct Options {
    /// How often each load runs per arm.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Length of each timed load.
    #[arg(long, default_value_t = 1.5)]
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
    let ours = mesh::start("ours", None)?;
    let peer_binary = std::env::var_os(PEER).filter(|path| !path.is_empty()).map(PathBuf::from);
    let peer = peer_binary.as_deref().map(|binary| mesh::start("peer", Some(binary))).transpose()?;

    let mut arms = vec![Arm::plain(&ours.lab), Arm::meshed("mesh", &ours.lab)];
    arms.extend(peer.as_ref().map(|peer| Arm::meshed("peer", &peer.lab)));
    let loads: Vec<_> = LOADS.into_iter().filter(|load| load.name.contains(&options.only)).collect();
    let mut samples = vec![vec![Vec::<Sample>::new(); arms.len()]; loads.len()];
    for round in 0..options.rounds {
        for (load, samples) in loads.iter().zip(&mut samples) {
            eprintln!("round {} of {}: {}", round + 1, options.rounds, load.name);
            for (arm, samples) in arms.iter().zip(samples) {
                samples.push(load.measure(arm, options.seconds)?);
            }
        }
    }
    println!("{}", report::loads(&loads, &arms, &samples));
    if options.idle > 0 {
        let meshed = arms.iter().filter(|arm| arm.meshed);
        let idle = meshed.map(|arm| idle::measure(arm, options.idle)).collect::<anyhow::Result<Vec<_>>>()?;
        println!("{}", report::idle(&idle));
    }
    Ok(())
}
