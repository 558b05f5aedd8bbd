//! `kube-e2e`: Fairway, or for comparison another mesh, on the cluster that `kubectl` speaks to. Steps build on each other, in the order of a cluster's life with the
//! mesh; each prints what it counted. The exit status is 0 when every step is as promised and nothing is left behind.
//!
//! `cargo xtask e2e` builds the images, brings them onto the nodes, and runs this.

#![forbid(unsafe_code)]

mod cluster;
mod kubectl;
mod mesh;
mod report;
mod steps;

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;

use crate::{cluster::Cluster, mesh::Mesh, report::Report};

#[derive(Debug, Parser)]
struct Args {
    #[command(flatten)]
    mesh: Mesh,
    /// The `fairway` program that installs and uninstalls.
    #[arg(long, default_value = "fairway")]
    fairway: PathBuf,
    /// Where the mesh's images are.
    #[arg(long, default_value = "localhost")]
    hub: String,
    #[arg(long, default_value = "e2e")]
    tag: String,
    /// The image of the test's own programs: `fairway`, with a shell, `nsenter` and `nft`.
    #[arg(long, default_value = "localhost/fairway-tools:e2e")]
    image: String,
    /// Ranges that pods' addresses are from, to tell their traffic on a node's interface.
    #[arg(long, default_value = "10.244.0.0/16")]
    pods: String,
    /// The interface that nodes reach each other by.
    #[arg(long, default_value = "eth0")]
    interface: String,
    /// Run these steps only; what they build on must be there.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Leave everything as it is at the end.
    #[arg(long)]
    keep: bool,
    /// Write what the steps showed to this file as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
}

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    let cluster = Cluster {
        mesh: args.mesh,
        fairway: args.fairway,
        hub: args.hub,
        tag: args.tag,
        image: args.image,
        pods: args.pods,
        interface: args.interface,
    };
    let mut report = Report::default();
    steps::run(&cluster, &mut report, &args.only, args.keep);
    if let Some(path) = args.json {
        std::fs::write(path, report.to_json()?)?;
    }
    Ok(match report.failed() {
        0 => ExitCode::SUCCESS,
        failed => {
            println!("{failed} step(s) not as promised");
            ExitCode::FAILURE
        }
    })
}
