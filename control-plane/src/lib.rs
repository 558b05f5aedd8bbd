//! The control plane: a folder of manifests in, discovery and workload certificates out.
//!
//! ```text
//! source ── objects, with origins ──▶ index ── changed resources ──▶ publish ──▶ discovery cache ──▶ every node
//!    └──── problems ──▶ log, /debug/problems, `fairwayd check`   └──▶ ca: who runs where, as whom
//! ```
//! Stateless but for its keys: everything is rebuilt from the manifests. Deliberately absent: decisions about connections, which are
//! `mesh-core`'s, and the configuration of waypoints themselves: only who goes through which is known here.

#![forbid(unsafe_code)]

pub mod app;
mod ca;
mod cli;
mod fields;
mod index;
mod metrics;
mod objects;
mod pages;
pub mod problem;
mod publish;
mod source;
mod state;
mod tls;
pub mod token;
mod yaml;

pub use cli::main;
