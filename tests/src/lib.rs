//! System tests, sorted by what they need: `tests/layers.rs` nothing, `tests/lab.rs` user namespaces and nf_tables.
#![forbid(unsafe_code)]
