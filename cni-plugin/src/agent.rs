//! The node agent.
use std::{ffi::OsString, process::ExitCode};
/// placeholder
pub fn agent_main(_: Vec<OsString>) -> ExitCode {
    ExitCode::FAILURE
}
