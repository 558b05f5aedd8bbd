//! Whether a pod belongs to the mesh: the one function that plugin, agent and decision file agree on.

use std::{collections::BTreeMap, fmt, net::IpAddr};

use serde::{Deserialize, Serialize};

pub type Labels = BTreeMap<String, String>;

/// What we keep of a Pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub node: String,
    pub service_account: String,
    pub labels: Labels,
    pub annotations: Labels,
    pub host_network: bool,
    /// `Succeeded` or `Failed`: its containers will not run again.
    pub terminal: bool,
    /// It has a deletion timestamp.
    pub terminating: bool,
    pub ips: Vec<IpAddr>,
}

/// Why a pod is not captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Exclusion {
    ExcludedNamespace,
    HostNetwork,
    Ztunnel,
    Sidecar,
    Terminal,
    LabelledOut,
    NotLabelled,
}

impl fmt::Display for Exclusion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ExcludedNamespace => "its namespace is excluded on this node",
            Self::HostNetwork => "it uses the host's network",
            Self::Ztunnel => "it is a ztunnel",
            Self::Sidecar => "it has a sidecar (annotation sidecar.istio.io/status)",
            Self::Terminal => "it has run to its end",
            Self::LabelledOut => "its label istio.io/dataplane-mode is none",
            Self::NotLabelled => "neither it nor its namespace has the label istio.io/dataplane-mode=ambient",
        })
    }
}

/// The label of a pod or its namespace that says whether it belongs to the mesh.
pub const MODE: &str = "istio.io/dataplane-mode";

/// What decides about a pod, for whoever has to change it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DecidedBy {
    /// `Pod demo/client`, `Namespace demo`, or this node's own configuration.
    pub object: String,
    pub field: String,
    /// What it says; none when it says nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
}

/// The field behind [`decide`]'s answer.
pub fn decided_by(pod: &Pod, namespace_labels: &Labels, verdict: Result<(), Exclusion>) -> DecidedBy {
    let on_pod = |field: &str, value: Option<&String>| DecidedBy {
        object: format!("Pod {}/{}", pod.namespace, pod.name),
        field: field.to_owned(),
        value: value.cloned(),
    };
    let on_namespace = || DecidedBy {
        object: format!("Namespace {}", pod.namespace),
        field: format!("metadata.labels[{MODE}]"),
        value: namespace_labels.get(MODE).cloned(),
    };
    let mode = format!("metadata.labels[{MODE}]");
    match verdict {
        Err(Exclusion::ExcludedNamespace) => DecidedBy {
            object: "the node agent".to_owned(),
            field: "EXCLUDE_NAMESPACES".to_owned(),
            value: Some(pod.namespace.clone()),
        },
        Err(Exclusion::HostNetwork) => on_pod("spec.hostNetwork", Some(&"true".to_owned())),
        Err(Exclusion::Ztunnel) => on_pod("metadata.labels[app]", pod.labels.get("app")),
        Err(Exclusion::Sidecar) => on_pod("metadata.annotations[sidecar.istio.io/status]", None),
        Err(Exclusion::Terminal) => on_pod("status.phase", None),
        Err(Exclusion::LabelledOut) => on_pod(&mode, pod.labels.get(MODE)),
        // A value that means nothing is where the mistake is.
        Ok(()) | Err(Exclusion::NotLabelled) if pod.labels.contains_key(MODE) => on_pod(&mode, pod.labels.get(MODE)),
        Ok(()) | Err(Exclusion::NotLabelled) => on_namespace(),
    }
}

/// `Ok` when the pod is to be captured.
pub fn decide(pod: &Pod, namespace_labels: &Labels, excluded: &[String]) -> Result<(), Exclusion> {
    let pod_mode = pod.labels.get(MODE).map(String::as_str);
    let namespace_mode = namespace_labels.get(MODE).map(String::as_str);
    let is_ztunnel = pod.labels.get("app").is_some_and(|app| app == "ztunnel");
    match () {
        () if excluded.contains(&pod.namespace) => Err(Exclusion::ExcludedNamespace),
        () if pod.host_network => Err(Exclusion::HostNetwork),
        () if is_ztunnel => Err(Exclusion::Ztunnel),
        () if pod.annotations.contains_key("sidecar.istio.io/status") => Err(Exclusion::Sidecar),
        () if pod.terminal => Err(Exclusion::Terminal),
        () if pod_mode == Some("none") => Err(Exclusion::LabelledOut),
        () if pod_mode == Some("ambient") || namespace_mode == Some("ambient") => Ok(()),
        () => Err(Exclusion::NotLabelled),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn the_field_to_change_is_named_with_what_it_says() {
        let named = |pod: &Pod, namespace: &Labels| {
            let by = decided_by(pod, namespace, decide(pod, namespace, &[]));
            (by.object, by.field, by.value)
        };
        let pod =
            |l: &[(&str, &str)]| Pod { namespace: "a".into(), name: "p".into(), labels: labels(l), ..Pod::default() };
        let field = "metadata.labels[istio.io/dataplane-mode]".to_owned();
        let typo = labels(&[(MODE, "ambiant")]);
        assert_eq!(named(&pod(&[]), &Labels::new()), ("Namespace a".to_owned(), field.clone(), None));
        assert_eq!(named(&pod(&[]), &typo), ("Namespace a".to_owned(), field.clone(), Some("ambiant".to_owned())));
        assert_eq!(named(&pod(&[(MODE, "none")]), &typo), ("Pod a/p".to_owned(), field, Some("none".to_owned())));
        let host = Pod { host_network: true, ..pod(&[]) };
        assert_eq!(named(&host, &typo).1, "spec.hostNetwork");
    }

    #[test]
    fn labels_of_pod_and_namespace_combine_and_exclusions_win() {
        let ambient = labels(&[(MODE, "ambient")]);
        let none = Labels::new();
        let pod = |l: &[(&str, &str)]| Pod { namespace: "a".into(), labels: labels(l), ..Pod::default() };
        let excluded = ["kube-system".to_owned()];
        let cases = [
            (pod(&[]), &ambient, Ok(())),
            (pod(&[]), &none, Err(Exclusion::NotLabelled)),
            (pod(&[(MODE, "ambient")]), &none, Ok(())),
            (pod(&[(MODE, "none")]), &ambient, Err(Exclusion::LabelledOut)),
            (pod(&[("app", "ztunnel")]), &ambient, Err(Exclusion::Ztunnel)),
            (Pod { host_network: true, ..pod(&[]) }, &ambient, Err(Exclusion::HostNetwork)),
            (Pod { terminal: true, ..pod(&[]) }, &ambient, Err(Exclusion::Terminal)),
            (Pod { namespace: "kube-system".into(), ..pod(&[]) }, &ambient, Err(Exclusion::ExcludedNamespace)),
            (
                Pod { annotations: labels(&[("sidecar.istio.io/status", "{}")]), ..pod(&[]) },
                &ambient,
                Err(Exclusion::Sidecar),
            ),
        ];
        for (pod, namespace, expected) in cases {
            assert_eq!(decide(&pod, namespace, &excluded), expected, "{pod:?}");
        }
    }
}
