//! `security.istio.io` PeerAuthentication.

use std::collections::BTreeMap;

use schemars::JsonSchema;

use super::common::WorkloadSelector;

/// Of several for the same workloads the oldest counts. One with a selector comes before that of its namespace, which comes before that
/// of the root namespace.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", extend("x-kubernetes-validations" = [{
    "rule": "!has(self.portLevelMtls) || has(self.selector) && has(self.selector.matchLabels) && self.selector.matchLabels.size() > 0",
    "message": "portLevelMtls needs a selector with labels",
}]))]
pub(super) struct PeerAuthenticationSpec {
    /// The workloads it is for; without it, all of the namespace, and in the root namespace all of the mesh.
    selector: Option<WorkloadSelector>,
    /// Whether mutual TLS is required; inherited when absent.
    mtls: Option<MutualTls>,
    /// Exceptions for single ports of the workload, by number.
    #[schemars(extend("minProperties" = 1, "x-kubernetes-validations" = [{
        "rule": "self.all(port, port.matches('^[0-9]{1,5}$') && 0 < int(port) && int(port) <= 65535)",
        "message": "a port is a number, 1 to 65535",
    }]))]
    port_level_mtls: Option<BTreeMap<String, MutualTls>>,
}

#[derive(JsonSchema)]
pub(super) struct MutualTls {
    /// STRICT refuses what is not mutual TLS; PERMISSIVE takes both, and so does DISABLE, which never refuses mutual TLS here; UNSET
    /// inherits.
    mode: Option<Mode>,
}

#[derive(JsonSchema)]
#[schemars(rename_all = "UPPERCASE")]
pub(super) enum Mode {
    Unset,
    Disable,
    Permissive,
    Strict,
}
