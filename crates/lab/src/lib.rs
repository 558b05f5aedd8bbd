//! A cluster on one machine: nodes and pods are network namespaces, and this crate plays what surrounds a mesh on a real node:
//! kubelet, container runtime, service proxy and a minimal pod network. The mesh's own programs run as themselves, each in its own
//! process.
//!
//! ```text
//!  outside                      inside a user + network + mount + PID namespace
//!  fairway lab … ──unix──▶ supervisor ──▶ wire (bridge) ─┬─ control: fairwayd
//!                               │                        ├─ node1: ztunnel, fairway-node, pods
//!                               └── CNI ADD/DEL, exec    └─ node2: …
//! ```
//!
//! Nothing outlives the supervisor: it is the first child of the PID namespace's init, all state is on a private tmpfs, and its
//! control socket is abstract. Deliberately absent: scheduling, images, a cluster's DNS.

#![forbid(unsafe_code)]

mod applied;
pub mod apps;
pub mod cluster;
pub mod components;
pub mod control;
pub mod delay;
pub mod kubeproxy;
pub mod manifest;
pub mod plugin;
pub mod pods;
pub mod protocol;
pub mod supervisor;
pub mod topology;
pub mod wire;
