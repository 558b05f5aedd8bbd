//! `cargo xtask COMMAND`: what the project does to itself. One module per command.

#![forbid(unsafe_code)]

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Parser, Subcommand};

mod archive;
mod crds;
mod e2e;
mod generated;
mod images;
mod render;
mod tar;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 120)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Write `deploy/crds/` from the types of the control plane.
    Crds(crds::Crds),
    /// Install, break and remove Fairway on a real cluster, and count what its users would notice.
    E2e(e2e::E2e),
    /// Write `deploy/rendered/` from the chart; needs `helm`.
    Render(render::Render),
    /// Build the images, as archives that any engine or `ctr` can load; needs no engine.
    Images(images::Images),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Crds(command) => command.run(&root()),
        Command::E2e(command) => command.run(&root()),
        Command::Render(command) => command.run(&root()),
        Command::Images(command) => command.run(&root()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The checkout.
fn root() -> PathBuf {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask).to_owned()
}
