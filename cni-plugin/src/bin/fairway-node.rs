//! The node agent.

#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    cni_plugin::agent_main(std::env::args_os().skip(1).collect())
}
