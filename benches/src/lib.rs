//! Benchmarks: `e2e` measures the mesh against plain TCP, and our tunnel engine against the best we could make of the `h2` crate;
//! `micro` measures decisions, codecs and the engine's parts on their own. See README.md.
//!
//! [`pair`] is a proxy in two halves with either engine and nothing else in it; [`control`] is its `h2` side.

#![forbid(unsafe_code)]

pub mod control;
pub mod pair;
