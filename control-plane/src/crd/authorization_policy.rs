//! `security.istio.io` AuthorizationPolicy.

use schemars::JsonSchema;

use super::common::WorkloadSelector;

type Texts = Option<Vec<String>>;

/// What matches a DENY policy is refused. Of workloads with ALLOW policies only what matches one of them is let in; a policy without rules
/// matches nothing.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", extend("x-kubernetes-validations" = [{
    "rule": "[has(self.selector), has(self.targetRef), has(self.targetRefs)].filter(given, given).size() <= 1",
    "message": "of selector, targetRef and targetRefs only one can be given",
}]))]
pub(super) struct AuthorizationPolicySpec {
    /// The workloads it is for; without it, all of the namespace, and in the root namespace all of the mesh.
    selector: Option<WorkloadSelector>,
    /// As `targetRefs`, for one.
    target_ref: Option<TargetReference>,
    /// What it is attached to: Gateways, GatewayClasses, Services or ServiceEntries. Their waypoints enforce it, and nobody else.
    #[schemars(length(max = 16))]
    target_refs: Option<Vec<TargetReference>>,
    /// What matches: any of these.
    #[schemars(length(max = 512))]
    rules: Option<Vec<Rule>>,
    /// ALLOW when absent. AUDIT has no effect at layer 4, and CUSTOM is refused there.
    action: Option<Action>,
    /// Who decides for CUSTOM.
    provider: Option<Provider>,
}

#[derive(JsonSchema)]
#[schemars(rename_all = "UPPERCASE")]
pub(super) enum Action {
    Allow,
    Deny,
    Audit,
    Custom,
}

#[derive(JsonSchema)]
pub(super) struct Provider {
    /// As named in the mesh configuration.
    name: Option<String>,
}

#[derive(JsonSchema)]
pub(super) struct TargetReference {
    /// Empty for core kinds.
    #[schemars(length(max = 253), extend("pattern" = r"^$|^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"))]
    group: Option<String>,
    /// Gateway, GatewayClass, Service or ServiceEntry.
    #[schemars(length(min = 1, max = 63), extend("pattern" = "^[a-zA-Z]([-a-zA-Z0-9]*[a-zA-Z0-9])?$"))]
    kind: String,
    /// Of the target.
    #[schemars(length(min = 1, max = 253))]
    name: String,
    /// Always empty: the target is in the policy's namespace.
    #[schemars(extend("x-kubernetes-validations" = [
        {"rule": "self.size() == 0", "message": "a target is in the policy's own namespace: remove `namespace`"},
    ]))]
    namespace: Option<String>,
}

/// Matches when all of the three do; absent ones do.
#[derive(JsonSchema)]
pub(super) struct Rule {
    /// Who connects: any of these.
    #[schemars(length(max = 512))]
    from: Option<Vec<FromItem>>,
    /// What is asked for: any of these.
    to: Option<Vec<ToItem>>,
    /// Further conditions: all of these.
    when: Option<Vec<Condition>>,
}

#[derive(JsonSchema)]
pub(super) struct FromItem {
    /// Who connects; all that is given must match. A `*` may stand alone, at the start or at the end of a text.
    source: Option<Source>,
}

#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", extend("x-kubernetes-validations" = [{
    "rule": "!has(self.serviceAccounts) && !has(self.notServiceAccounts) || !has(self.principals) && !has(self.notPrincipals) && !has(self.namespaces) && !has(self.notNamespaces)",
    "message": "service accounts cannot be combined with principals or namespaces",
}]))]
pub(super) struct Source {
    /// Identities of callers, like cluster.local/ns/demo/sa/client.
    principals: Texts,
    /// Any identity but these.
    not_principals: Texts,
    /// Identities of end users, from their tokens. Needs a waypoint.
    request_principals: Texts,
    /// Any but these. Needs a waypoint.
    not_request_principals: Texts,
    /// Namespaces of callers.
    namespaces: Texts,
    /// Any namespace but these.
    not_namespaces: Texts,
    /// Service accounts of callers: namespace/name, or a name in the policy's namespace. No wildcards.
    #[schemars(length(max = 16), inner(length(max = 320)))]
    service_accounts: Texts,
    /// Any service account but these.
    #[schemars(length(max = 16), inner(length(max = 320)))]
    not_service_accounts: Texts,
    /// Addresses, or ranges of them, that connections come from.
    ip_blocks: Texts,
    /// Any address but these.
    not_ip_blocks: Texts,
    /// Addresses of clients, as told by proxies before us. Needs a waypoint.
    remote_ip_blocks: Texts,
    /// Any but these. Needs a waypoint.
    not_remote_ip_blocks: Texts,
    /// Trust domains of callers.
    trust_domains: Texts,
    /// Any trust domain but these.
    not_trust_domains: Texts,
}

#[derive(JsonSchema)]
pub(super) struct ToItem {
    /// What is asked for; all that is given must match. All but the ports needs a waypoint.
    operation: Option<Operation>,
}

#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase")]
pub(super) struct Operation {
    /// Hosts of requests.
    hosts: Texts,
    /// Any host but these.
    not_hosts: Texts,
    /// Ports of the workload.
    ports: Texts,
    /// Any port but these.
    not_ports: Texts,
    /// Methods of requests.
    methods: Texts,
    /// Any method but these.
    not_methods: Texts,
    /// Paths of requests.
    paths: Texts,
    /// Any path but these.
    not_paths: Texts,
}

#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase")]
pub(super) struct Condition {
    /// What is looked at: source.ip, source.namespace, source.principal, destination.ip or destination.port; others need a waypoint.
    key: String,
    /// It is one of these.
    values: Texts,
    /// It is none of these.
    not_values: Texts,
}
