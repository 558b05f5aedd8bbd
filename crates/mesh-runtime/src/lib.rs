//! How every program of the mesh starts, reports and stops: the same environment reading, logs, metrics, admin server, readiness,
//! drain and worker threads in all of them.
//!
//! Deliberately absent: anything that knows what the programs do.

#![forbid(unsafe_code)]

pub mod admin;
pub mod crowd;
pub mod drain;
pub mod env;
pub mod folder;
pub mod metrics;
pub mod private;
pub mod readiness;
pub mod signal;
pub mod telemetry;
pub mod whole_file;
pub mod workers;
