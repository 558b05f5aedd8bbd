//! The CustomResourceDefinitions of the kinds users write, made from types.
//!
//! Names, versions and fields are Istio's, all of them, so that manifests and whole clusters move either way. A definition tells an API
//! server what is well-formed, and `kubectl explain` what there is to write; what an object means is decided by `objects` alone, and a
//! test holds the two to the same fields.

// What is written is read by `objects`; these types exist for their schemas.
#[expect(dead_code, reason = "described, never made")]
mod authorization_policy;
#[expect(dead_code, reason = "described, never made")]
mod common;
#[expect(dead_code, reason = "described, never made")]
mod peer_authentication;
#[expect(dead_code, reason = "described, never made")]
mod service_entry;
mod structural;
#[expect(dead_code, reason = "described, never made")]
mod workload_entry;

use schemars::JsonSchema;
use serde_json::{Value, json};

use self::{
    authorization_policy::AuthorizationPolicySpec,
    common::Status,
    peer_authentication::PeerAuthenticationSpec,
    service_entry::ServiceEntrySpec,
    structural::{schema_of, without_descriptions},
    workload_entry::WorkloadEntrySpec,
};

/// What a definition says beside the fields of its objects.
struct Kind {
    group: &'static str,
    name: &'static str,
    plural: &'static str,
    short_name: &'static str,
    category: &'static str,
    description: &'static str,
    /// An object without a spec means nothing.
    needs_spec: bool,
    /// Served beside v1, which is stored.
    older_versions: &'static [&'static str],
    columns: &'static [Column],
}

/// What `kubectl get` shows: name, type, place, description.
type Column = (&'static str, &'static str, &'static str, &'static str);

const AGE: Column = ("Age", "date", ".metadata.creationTimestamp", "When the object was made");

const AUTHORIZATION_POLICY: Kind = Kind {
    group: "security.istio.io",
    name: "AuthorizationPolicy",
    plural: "authorizationpolicies",
    short_name: "ap",
    category: "security-istio-io",
    description: "Who may connect to which workloads.",
    needs_spec: false,
    older_versions: &["v1beta1"],
    columns: &[("Action", "string", ".spec.action", "What happens to what matches"), AGE],
};

const PEER_AUTHENTICATION: Kind = Kind {
    group: "security.istio.io",
    name: "PeerAuthentication",
    plural: "peerauthentications",
    short_name: "pa",
    category: "security-istio-io",
    description: "Whether workloads accept connections without mutual TLS.",
    needs_spec: false,
    older_versions: &["v1beta1"],
    columns: &[("Mode", "string", ".spec.mtls.mode", "Whether mutual TLS is required"), AGE],
};

const SERVICE_ENTRY: Kind = Kind {
    group: "networking.istio.io",
    name: "ServiceEntry",
    plural: "serviceentries",
    short_name: "se",
    category: "networking-istio-io",
    description: "A service that Kubernetes does not know: its names, its ports and where it is.",
    needs_spec: true,
    older_versions: &["v1alpha3", "v1beta1"],
    columns: &[
        ("Hosts", "string", ".spec.hosts", "The names of the service"),
        ("Location", "string", ".spec.location", "Whether it is part of the mesh"),
        ("Resolution", "string", ".spec.resolution", "How its endpoints are found"),
        AGE,
    ],
};

const WORKLOAD_ENTRY: Kind = Kind {
    group: "networking.istio.io",
    name: "WorkloadEntry",
    plural: "workloadentries",
    short_name: "we",
    category: "networking-istio-io",
    description: "A workload that is no pod, a virtual machine for example.",
    needs_spec: true,
    older_versions: &["v1alpha3", "v1beta1"],
    columns: &[AGE, ("Address", "string", ".spec.address", "Where it is reached")],
};

/// Every definition, in the order of their names.
pub(crate) fn definitions() -> [Value; 4] {
    [
        AUTHORIZATION_POLICY.definition::<AuthorizationPolicySpec>(),
        PEER_AUTHENTICATION.definition::<PeerAuthenticationSpec>(),
        SERVICE_ENTRY.definition::<ServiceEntrySpec>(),
        WORKLOAD_ENTRY.definition::<WorkloadEntrySpec>(),
    ]
}

impl Kind {
    fn definition<Spec: JsonSchema>(&self) -> Value {
        let schema = self.schema::<Spec>();
        let mut versions = vec![self.version("v1", true, &schema)];
        // Descriptions are told once: `kubectl explain` asks for v1, and each is in every manifest we render.
        let bare = without_descriptions(&schema);
        versions.extend(self.older_versions.iter().map(|name| self.version(name, false, &bare)));
        json!({
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": format!("{}.{}", self.plural, self.group)},
            "spec": {
                "group": self.group,
                "names": {
                    "categories": ["istio-io", self.category],
                    "kind": self.name,
                    "listKind": format!("{}List", self.name),
                    "plural": self.plural,
                    "shortNames": [self.short_name],
                    "singular": self.name.to_ascii_lowercase(),
                },
                "scope": "Namespaced",
                "versions": versions,
            },
        })
    }

    /// Of a whole object; what every object has is the API server's.
    fn schema<Spec: JsonSchema>(&self) -> Value {
        let required: &[&str] = if self.needs_spec { &["spec"] } else { &[] };
        let mut schema = json!({
            "type": "object",
            "description": self.description,
            "properties": {"spec": schema_of::<Spec>(), "status": schema_of::<Status>()},
        });
        if !required.is_empty() {
            schema["required"] = json!(required);
        }
        schema
    }

    fn version(&self, name: &str, is_stored: bool, schema: &Value) -> Value {
        let column = |(name, kind, path, description): &Column| json!({"name": name, "type": kind, "jsonPath": path, "description": description});
        json!({
            "name": name,
            "served": true,
            "storage": is_stored,
            "schema": {"openAPIV3Schema": schema},
            "subresources": {"status": {}},
            "additionalPrinterColumns": self.columns.iter().map(column).collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests;
