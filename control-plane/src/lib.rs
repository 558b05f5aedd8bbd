//! The control plane: the objects of a cluster in, discovery and workload certificates out.
//!
//! ```text
//! source ── objects, with origins ──▶ index ── changed resources ──▶ publish ──▶ discovery cache ──▶ every node
//!    │  └──▶ placement: who runs where, as whom ──▶ callers, ca
//!    └──── problems ──▶ log, /debug/problems, `fairwayd check`
//! ```
//! The source is a folder of manifests or an API server. Stateless but for its keys: everything is rebuilt from the objects. Deliberately absent: decisions about connections, which are
//! `mesh-core`'s, and the configuration of waypoints themselves: only who goes through which is known here.

#![forbid(unsafe_code)]

mod admission;
mod apiserver;
pub mod app;
mod ca;
mod callers;
mod cli;
mod crd;
mod fields;
mod guests;
mod index;
mod keeper;
mod lease;
mod metrics;
mod objects;
mod pages;
mod pipeline;
mod placement;
pub mod problem;
mod publish;
mod review;
mod source;
mod state;
mod status;
mod tls;
pub mod token;
mod yaml;

pub use cli::main;
