//! `networking.istio.io` ServiceEntry.

use std::collections::BTreeMap;

use schemars::JsonSchema;

use super::{
    common::{LabelValue, Port},
    workload_entry::WorkloadEntrySpec,
};

/// What the service is called, and where connections to it go.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", extend("x-kubernetes-validations" = [
    {"rule": "!has(self.workloadSelector) || !has(self.endpoints)", "message": "of workloadSelector and endpoints only one can be given"},
    {
        "rule": "!has(self.addresses) || !self.addresses.exists(a, a.contains('/')) || !has(self.resolution) || self.resolution in ['NONE', 'STATIC']",
        "message": "ranges of addresses go with resolution NONE or STATIC",
    },
    {
        "rule": "!has(self.endpoints) || has(self.resolution) && self.resolution != 'NONE'",
        "message": "resolution NONE goes where the client was going, so it has no endpoints",
    },
    {
        "rule": "!has(self.endpoints) || !has(self.resolution) || self.resolution != 'DNS_ROUND_ROBIN' || self.endpoints.size() <= 1",
        "message": "DNS_ROUND_ROBIN has one endpoint at most",
    },
]))]
pub(super) struct ServiceEntrySpec {
    /// The names clients use, like api.example.com or *.example.com.
    #[schemars(length(min = 1, max = 256))]
    hosts: Vec<Host>,
    /// Addresses, or ranges of them, that stand for the service. Without any, and with a resolution other than NONE, addresses are found
    /// for it, which DNS of captured pods answers.
    #[schemars(length(max = 256), inner(length(max = 64)))]
    addresses: Option<Vec<String>>,
    /// The ports of the service.
    #[schemars(length(max = 256), extend(
        "x-kubernetes-list-type" = "map",
        "x-kubernetes-list-map-keys" = ["name"],
        "x-kubernetes-validations" = [{
            "rule": "self.all(p, self.exists_one(other, other.number == p.number))",
            "message": "a port number can be given once only",
        }],
    ))]
    ports: Option<Vec<ServicePort>>,
    /// Whether the service is part of the mesh. What an endpoint speaks is told by the endpoint.
    location: Option<Location>,
    /// How its endpoints are found. NONE goes to wherever the client was going; STATIC to the endpoints given; DNS looks up their names,
    /// or those of the service; DNS_ROUND_ROBIN does so for one; DYNAMIC_DNS is for waypoints. NONE when absent.
    resolution: Option<Resolution>,
    /// Where the service is.
    #[schemars(length(max = 4096))]
    endpoints: Option<Vec<WorkloadEntrySpec>>,
    /// Pods and WorkloadEntries of the namespace that are its endpoints; in place of `endpoints`.
    workload_selector: Option<EntrySelector>,
    /// Who may know of it: `*` everybody, `.` its own namespace, `~` nobody. Everybody when absent.
    export_to: Option<Vec<String>>,
    /// Identities its endpoints may have beside their own.
    subject_alt_names: Option<Vec<String>>,
}

#[derive(JsonSchema)]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "self != '*'", "message": "a service cannot have every name: write *.example.com"},
]))]
pub(super) struct Host(String);

#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase")]
pub(super) struct ServicePort {
    /// The port clients use.
    number: Port,
    /// Its name, once per service.
    #[schemars(length(max = 256))]
    name: String,
    /// HTTP, HTTPS, HTTP2, GRPC, MONGO, TCP or TLS. UDP is not carried.
    #[schemars(length(max = 256))]
    protocol: Option<String>,
    /// The port of the endpoints, if not the same.
    target_port: Option<Port>,
}

#[derive(JsonSchema)]
#[schemars(rename_all = "SCREAMING_SNAKE_CASE")]
pub(super) enum Location {
    MeshExternal,
    MeshInternal,
}

#[derive(JsonSchema)]
#[schemars(rename_all = "SCREAMING_SNAKE_CASE")]
pub(super) enum Resolution {
    None,
    Static,
    Dns,
    DnsRoundRobin,
    DynamicDns,
}

/// Which workloads are meant.
#[derive(JsonSchema)]
pub(super) struct EntrySelector {
    /// Labels that a workload must have, all of them.
    #[schemars(extend("maxProperties" = 256))]
    labels: Option<BTreeMap<String, LabelValue>>,
}
