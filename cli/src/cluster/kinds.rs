//! The kinds of objects an installation consists of.

use std::fmt;

use serde_json::Value;

/// A kind, and where the API server keeps its objects.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Kind {
    api_version: &'static str,
    pub(crate) name: &'static str,
    plural: &'static str,
    pub(crate) namespaced: bool,
}

const fn kind(api_version: &'static str, name: &'static str, plural: &'static str, namespaced: bool) -> Kind {
    Kind { api_version, name, plural, namespaced }
}

/// In the order in which they are needed.
pub(crate) const KINDS: [Kind; 21] = [
    kind("v1", "Namespace", "namespaces", false),
    kind("apiextensions.k8s.io/v1", "CustomResourceDefinition", "customresourcedefinitions", false),
    kind("scheduling.k8s.io/v1", "PriorityClass", "priorityclasses", false),
    kind("v1", "ResourceQuota", "resourcequotas", true),
    kind("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies", true),
    kind("v1", "ServiceAccount", "serviceaccounts", true),
    kind("rbac.authorization.k8s.io/v1", "ClusterRole", "clusterroles", false),
    kind("rbac.authorization.k8s.io/v1", "ClusterRoleBinding", "clusterrolebindings", false),
    kind("rbac.authorization.k8s.io/v1", "Role", "roles", true),
    kind("rbac.authorization.k8s.io/v1", "RoleBinding", "rolebindings", true),
    kind("v1", "ConfigMap", "configmaps", true),
    kind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets", true),
    kind("v1", "Service", "services", true),
    kind("gateway.networking.k8s.io/v1", "GatewayClass", "gatewayclasses", false),
    kind("k8s.cni.cncf.io/v1", "NetworkAttachmentDefinition", "network-attachment-definitions", true),
    kind("monitoring.coreos.com/v1", "PodMonitor", "podmonitors", true),
    kind("monitoring.coreos.com/v1", "PrometheusRule", "prometheusrules", true),
    kind("apps/v1", "Deployment", "deployments", true),
    kind("apps/v1", "DaemonSet", "daemonsets", true),
    // Last, because from here on the API server asks what was just started.
    kind("admissionregistration.k8s.io/v1", "MutatingWebhookConfiguration", "mutatingwebhookconfigurations", false),
    kind("admissionregistration.k8s.io/v1", "ValidatingWebhookConfiguration", "validatingwebhookconfigurations", false),
];

impl Kind {
    pub(crate) fn of(object: &Value) -> Option<&'static Self> {
        KINDS.iter().find(|kind| object["apiVersion"] == kind.api_version && object["kind"] == kind.name)
    }

    pub(crate) fn named(name: &str) -> Option<&'static Self> {
        KINDS.iter().find(|kind| kind.name == name)
    }

    /// Of all objects of the kind, in a namespace or everywhere.
    pub(crate) fn path(&self, namespace: Option<&str>) -> String {
        let root = if self.api_version == "v1" { "/api/v1".to_owned() } else { format!("/apis/{}", self.api_version) };
        match namespace.filter(|_| self.namespaced) {
            Some(namespace) => format!("{root}/namespaces/{namespace}/{}", self.plural),
            None => format!("{root}/{}", self.plural),
        }
    }

    /// `apps`; empty for the core.
    pub(crate) fn group(&self) -> &'static str {
        self.api_version.split_once('/').map_or("", |(group, _)| group)
    }

    pub(crate) fn plural(&self) -> &'static str {
        self.plural
    }

    pub(crate) fn rank(&self) -> usize {
        KINDS.iter().position(|kind| kind == self).unwrap_or(KINDS.len())
    }
}

/// One object.
#[derive(Clone, Debug)]
pub(crate) struct Object {
    pub(crate) kind: &'static Kind,
    pub(crate) value: Value,
}

impl Object {
    /// `None` for an object of no known kind, or without a name.
    pub(crate) fn new(value: Value) -> Option<Self> {
        let kind = Kind::of(&value)?;
        value["metadata"]["name"].is_string().then_some(Self { kind, value })
    }

    /// Items of lists do not say what they are.
    pub(crate) fn listed(kind: &'static Kind, mut value: Value) -> Option<Self> {
        value["apiVersion"] = kind.api_version.into();
        value["kind"] = kind.name.into();
        Self::new(value)
    }

    pub(crate) fn name(&self) -> &str {
        self.value["metadata"]["name"].as_str().unwrap_or_default()
    }

    pub(crate) fn namespace(&self) -> Option<&str> {
        self.value["metadata"]["namespace"].as_str()
    }

    #[cfg(test)]
    pub(crate) fn label(&self, name: &str) -> Option<&str> {
        self.value["metadata"]["labels"][name].as_str()
    }

    pub(crate) fn path(&self) -> String {
        format!("{}/{}", self.kind.path(self.namespace()), self.name())
    }

    pub(crate) fn is(&self, kind: &str, name: &str) -> bool {
        self.kind.name == kind && self.name() == name
    }
}

/// `DaemonSet istio-system/ztunnel`.
impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, name) = (self.kind.name, self.name());
        match self.namespace() {
            Some(namespace) => write!(f, "{kind} {namespace}/{name}"),
            None => write!(f, "{kind} {name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn objects_are_found_where_the_api_server_keeps_them() {
        let path = |value| Object::new(value).unwrap().path();
        let deployment =
            json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d", "namespace": "n"}});
        assert_eq!(path(deployment), "/apis/apps/v1/namespaces/n/deployments/d");
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "n"}});
        assert_eq!(path(namespace), "/api/v1/namespaces/n");
    }
}
