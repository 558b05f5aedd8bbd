//! What the API server is, allows and demands.

use serde_json::Value;

use super::{Item, Level, evidence::Evidence, some};

/// The oldest minor version of Kubernetes 1 that we mean to run on, and the newest that was tried.
const MINOR: (u32, u32) = (29, 34);

pub(super) fn version(version: &Value) -> Item {
    let text = version["gitVersion"].as_str().unwrap_or("?");
    // `29+`, as some say it.
    let minor =
        version["minor"].as_str().map(|minor| minor.trim_end_matches('+')).and_then(|minor| minor.parse::<u32>().ok());
    match minor {
        Some(minor) if minor < MINOR.0 => {
            let remedy = format!("upgrade the cluster to 1.{} or newer", MINOR.0);
            Item::new("API server", Level::Fault, format!("{text} is too old"), remedy)
        }
        Some(minor) if minor > MINOR.1 => {
            Item::fine("API server", format!("{text}, newer than what was tried (1.{})", MINOR.1))
        }
        Some(_) => Item::fine("API server", text),
        None => Item::new("API server", Level::Unknown, format!("it calls itself {text}"), ""),
    }
}

pub(super) fn permissions(denied: &[String]) -> Item {
    if denied.is_empty() {
        return Item::fine("permissions", "everything an installation needs");
    }
    let only_forward = denied.iter().all(|what| what.ends_with("pods/portforward"));
    let (level, remedy) = match only_forward {
        true => (Level::Warning, "without it programs cannot be asked: status, why, top and dump need it"),
        false => (Level::Fault, "install as somebody with the role cluster-admin, or have these allowed"),
    };
    Item::new("permissions", level, format!("not allowed: {}", some(denied)), remedy)
}

pub(super) fn quotas(evidence: &Evidence) -> Vec<Item> {
    let mut items = Vec::new();
    let pods = 2 + 2 * evidence.nodes.len();
    for quota in &evidence.quotas {
        let name = quota["metadata"]["name"].as_str().unwrap_or_default();
        let Some(hard) = quota["spec"]["hard"].as_object() else { continue };
        let limit = hard.get("pods").and_then(Value::as_str).and_then(|text| text.parse::<usize>().ok());
        if let Some(limit) = limit.filter(|limit| *limit < pods) {
            let says = format!("{name} admits {limit} pods, the mesh needs {pods} and one more while it is upgraded");
            items.push(Item::new(
                "quotas",
                Level::Fault,
                says,
                format!("raise it in namespace {}", evidence.namespace),
            ));
        }
        let limits: Vec<&str> = hard.keys().map(String::as_str).filter(|key| key.starts_with("limits.")).collect();
        if !limits.is_empty() {
            let says = format!("{name} demands {} of every pod; the mesh's have none", limits.join(" and "));
            items.push(Item::new("quotas", Level::Fault, says, "remove it there, or add a LimitRange with defaults"));
        }
    }
    items
}

/// The node programs need host paths and capabilities.
pub(super) fn pod_security(evidence: &Evidence) -> Item {
    let namespace = &evidence.namespace;
    let there = evidence.namespaces.iter().find(|object| object["metadata"]["name"] == **namespace);
    let Some(there) = there else {
        return Item::fine("pod security", format!("namespace {namespace} is not there yet"));
    };
    match there["metadata"]["labels"]["pod-security.kubernetes.io/enforce"].as_str() {
        None | Some("privileged") => {
            Item::fine("pod security", format!("namespace {namespace} admits the node programs"))
        }
        Some(level) => {
            let remedy = format!(
                "kubectl label namespace {namespace} pod-security.kubernetes.io/enforce=privileged --overwrite"
            );
            Item::new("pod security", Level::Fault, format!("namespace {namespace} enforces `{level}`"), remedy)
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn old_servers_are_refused_and_new_ones_are_not() {
        for (minor, level) in [
            ("28", Level::Fault),
            ("29+", Level::Fine),
            ("34", Level::Fine),
            ("40", Level::Fine),
            ("x", Level::Unknown),
        ] {
            assert_eq!(version(&json!({"gitVersion": "v", "minor": minor})).level, level, "{minor}");
        }
    }

    #[test]
    fn what_would_keep_our_pods_out_is_a_fault() {
        let namespace =
            |label: &str| json!({"metadata": {"name": "m", "labels": {"pod-security.kubernetes.io/enforce": label}}});
        let evidence = |label: &str, hard: Value| Evidence {
            namespace: "m".to_owned(),
            nodes: vec![json!({}); 3],
            namespaces: vec![namespace(label)],
            quotas: vec![json!({"metadata": {"name": "q"}, "spec": {"hard": hard}})],
            ..Evidence::default()
        };
        assert_eq!(pod_security(&evidence("privileged", json!({}))).level, Level::Fine);
        assert_eq!(pod_security(&evidence("baseline", json!({}))).level, Level::Fault);
        assert!(quotas(&evidence("", json!({"pods": "8", "requests.cpu": "1"}))).is_empty());
        assert_eq!(quotas(&evidence("", json!({"pods": "7", "limits.cpu": "1"}))).len(), 2);
    }

    #[test]
    fn to_look_into_pods_is_not_needed_for_installing() {
        assert_eq!(permissions(&["create pods/portforward".to_owned()]).level, Level::Warning);
        assert_eq!(permissions(&["create clusterroles".to_owned()]).level, Level::Fault);
    }
}
