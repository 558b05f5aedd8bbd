//! Capture of pod traffic: the CNI plugin and the node agent.
//!
//! In the order a pod meets it: the container runtime runs the [`plugin`] ([`spec`] is what it speaks), which finds out whether the
//! pod belongs to the mesh ([`eligibility`], [`decision`]; [`lookup`] while the agent is away) and asks the [`agent`] ([`request`] is the
//! question) to capture it. The agent puts [`rules`] into the pod's namespace, announces the pod to ztunnel, and writes down that it did.

#![forbid(unsafe_code)]

pub mod plugin;
pub mod spec;

pub mod base64;
pub mod decision;
pub mod eligibility;
pub mod lookup;
pub mod object;
pub mod request;

pub mod agent;
pub mod rules;

pub use agent::agent_main;
pub use plugin::plugin_main;
