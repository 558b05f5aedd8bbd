//! The CNI plugin.

#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    cni_plugin::plugin_main()
}
