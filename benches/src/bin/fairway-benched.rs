//! The multi-call binary, built beside the benchmarks as `fairway` itself is, so that they measure what they were built with.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    cli::main(std::env::args_os().collect())
}
