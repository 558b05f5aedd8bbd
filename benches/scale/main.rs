//! How the control plane scales: the real `fairwayd` against an API server with the pods of a large cluster, and the proxies of its nodes.
//!
//! Whatever is counted is also checked, at any size: run as a test, it is small, and only that is looked at.

#![forbid(unsafe_code)]

mod cluster;
mod fairwayd;
mod grpc;
mod measure;
mod node;
mod objects;
mod report;

use std::process::ExitCode;

use clap::Parser;

use crate::cluster::Shape;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Measure how the control plane scales.
#[derive(Debug, Parser)]
struct Options {
    /// Pods of the clusters whose objects are loaded, one after the other; 0 leaves that part out.
    #[arg(long, value_delimiter = ',', default_values_t = [500, 2000])]
    sizes: Vec<usize>,
    /// Pods of the cluster in which things change; 0 leaves that part out.
    #[arg(long, default_value_t = 2000)]
    pods: usize,
    /// Proxies that are told of it.
    #[arg(long, default_value_t = 20)]
    nodes: usize,
    /// Changes of each kind.
    #[arg(long, default_value_t = 20)]
    changes: usize,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

const SMALL: [&str; 9] = ["scale", "--sizes", "60", "--pods", "120", "--nodes", "3", "--changes", "2"];

fn main() -> ExitCode {
    let mut options = Options::parse();
    if !options.bench {
        options = Options::parse_from(SMALL);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    match runtime.map_err(anyhow::Error::from).and_then(|runtime| runtime.block_on(run(&options))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("scale: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(options: &Options) -> anyhow::Result<()> {
    let mut loaded = Vec::new();
    for pods in options.sizes.iter().copied().filter(|pods| *pods > 0) {
        eprintln!("{pods} pods are loaded");
        loaded.push(measure::load(Shape::new(pods, 1)).await?);
    }
    println!("{}", report::loaded(&loaded));
    if options.pods > 0 {
        measure::changes(Shape::new(options.pods, options.nodes), options.nodes, options.changes).await?;
    }
    Ok(())
}
