//! The multi-call binary, built beside the benchmarks as `fairway` itself is, so that they measure what they were built with; and the
//! bare proxies (`pair`) that tunnels are compared in.

use std::{ffi::OsString, process::ExitCode};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    if arguments.get(1).is_some_and(|first| first == "pair") {
        return benches::pair::main(arguments[1..].to_vec());
    }
    cli::main(arguments)
}
