//! `networking.istio.io` WorkloadEntry, and the endpoints of a ServiceEntry, which have the same fields.

use std::collections::BTreeMap;

use schemars::JsonSchema;

use super::common::Port;

/// Where the workload is, and who.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", extend("x-kubernetes-validations" = [
    {"rule": "has(self.address) || has(self.network)", "message": "an address is needed, or a network to reach it by"},
    {
        "rule": "!has(self.address) || !self.address.startsWith('unix://') || !has(self.ports)",
        "message": "a Unix socket has no ports",
    },
]))]
pub(super) struct WorkloadEntrySpec {
    /// An IP address, or a host name to look up; without port.
    #[schemars(length(max = 256), extend("x-kubernetes-validations" = [
        {
            "rule": "!self.startsWith('unix://') || self.substring(7).startsWith('/') || self.substring(7).startsWith('@')",
            "message": "the path of a Unix socket is absolute, or abstract (@name)",
        },
        {"rule": "!self.startsWith('unix://') || !self.endsWith('/')", "message": "a Unix socket is no folder"},
    ]))]
    address: Option<String>,
    /// Where ports of the service, by their names, are on this workload if not where the service has them.
    #[schemars(extend("maxProperties" = 128, "x-kubernetes-validations" = [{
        "rule": "self.all(name, name.size() < 63 && name.matches('^[a-zA-Z0-9]([-a-zA-Z0-9]*[a-zA-Z0-9])?$'))",
        "message": "a port's name has letters, digits and inner dashes, 62 at most",
    }]))]
    ports: Option<BTreeMap<String, Port>>,
    /// Labels of the workload, by which services and policies select it.
    #[schemars(extend("maxProperties" = 256))]
    labels: Option<BTreeMap<String, String>>,
    /// The network it is on; workloads of one network reach each other directly.
    #[schemars(length(max = 2048))]
    network: Option<String>,
    /// Where it is: region/zone/subzone, the last ones optional.
    #[schemars(length(max = 2048))]
    locality: Option<String>,
    /// Its share of the connections beside others; 1 when absent.
    #[schemars(range(max = 4_294_967_295_u32))]
    weight: Option<u32>,
    /// The service account it runs as, of the object's namespace.
    #[schemars(length(max = 253))]
    service_account: Option<String>,
}
