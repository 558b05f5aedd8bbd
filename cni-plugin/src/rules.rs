//! What capture means inside a pod's namespace, and in that of the node.

pub mod flows;
pub mod host;
pub mod istio;
pub mod model;
pub mod reconcile;

pub use model::Options;
pub use reconcile::{
    RulesError, apply, captured_flows, flush_redirects, is_ours, older_flows, remove, verify, verify_installed,
};
