//! The node proxy's process: the allocator is chosen here, everything else is in the library.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    ztunnel::main(std::env::args_os().skip(1).collect())
}
