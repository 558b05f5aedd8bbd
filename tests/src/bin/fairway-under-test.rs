//! The multi-call binary, built beside the tests so that they always run what they were built with.

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main(std::env::args_os().collect())
}
