//! What tests and benchmarks of several crates share. No program depends on it.

#![forbid(unsafe_code)]

pub mod apiserver;

pub use apiserver::ApiServer;
