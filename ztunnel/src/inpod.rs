//! Pods arrive: the node agent announces each with its network namespace over a unix socket (ZDS), and leaves with it.
//!
//! [`protocol`] understands messages and knows what a session has seen, without I/O; [`manager`] owns the pods.

use std::sync::Arc;

use serde::Serialize;

pub mod manager;
pub mod protocol;

/// Which pod, as its node's agent names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadInfo {
    /// The pod's UID, unique in time.
    #[serde(skip)]
    pub uid: Arc<str>,
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    pub service_account: Arc<str>,
}
