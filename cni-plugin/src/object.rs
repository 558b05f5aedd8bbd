//! What we read of the objects of the Kubernetes API, whichever way they come.

use serde::{Deserialize, de::IgnoredAny};

use crate::eligibility::{Labels, Pod};

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Metadata {
    pub name: String,
    pub namespace: Option<String>,
    pub uid: Option<String>,
    pub labels: Option<Labels>,
    pub annotations: Option<Labels>,
    pub deletion_timestamp: Option<IgnoredAny>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Spec {
    pub node_name: Option<String>,
    pub service_account_name: Option<String>,
    pub host_network: Option<bool>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Status {
    pub phase: Option<String>,
    #[serde(rename = "podIP")]
    pub pod_ip: Option<String>,
    #[serde(rename = "podIPs")]
    pub pod_ips: Option<Vec<PodIp>>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct PodIp {
    pub ip: String,
}

/// A pod without uid or node does not run anywhere yet.
pub fn pod(metadata: Metadata, spec: Option<Spec>, status: Option<Status>) -> Option<Pod> {
    let (spec, status) = (spec.unwrap_or_default(), status.unwrap_or_default());
    let listed = status.pod_ips.unwrap_or_default().into_iter().map(|p| p.ip);
    let ips = listed.chain(status.pod_ip).filter_map(|ip| ip.parse().ok());
    let mut ips: Vec<_> = ips.collect();
    ips.sort_unstable();
    ips.dedup();
    Some(Pod {
        namespace: metadata.namespace.unwrap_or_else(|| "default".into()),
        name: metadata.name,
        uid: metadata.uid?,
        node: spec.node_name?,
        service_account: spec.service_account_name.unwrap_or_else(|| "default".into()),
        labels: metadata.labels.unwrap_or_default(),
        annotations: metadata.annotations.unwrap_or_default(),
        host_network: spec.host_network.unwrap_or(false),
        terminal: matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")),
        terminating: metadata.deletion_timestamp.is_some(),
        ips,
    })
}
