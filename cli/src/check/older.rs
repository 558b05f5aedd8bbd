//! Connections that are older than the capture of their pod: they pass no ztunnel, STRICT does not end them, and they stay in clear.
//!
//! The node agents count them in the moment of capture, and nobody sees them end: only a new pod is known to have none.

use std::collections::BTreeMap;

use cni_plugin::agent::{
    enroll::Redirection,
    status::{REDIRECTION, redirection_named},
};
use serde::Serialize;
use serde_json::Value;

use super::membership;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Older {
    pub(super) connections: u64,
    pub(super) pods: Vec<String>,
    pub(super) remedy: String,
}

/// What the agents counted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Count {
    /// By workload: `deployment/web`.
    pub(super) workloads: BTreeMap<String, Older>,
    /// Captured pods of which no agent has a count: it was restarted since, or does not answer.
    pub(super) unknown: Vec<String>,
}

/// `reports`: every agent's list of pods.
pub(super) fn count(pods: &[Value], reports: &[Value]) -> Count {
    let mut count = Count::default();
    for object in pods.iter().filter(|pod| pod["status"]["phase"] == "Running") {
        let Some(pod) = membership::pod(object) else { continue };
        let report = reports.iter().find(|report| report["uid"] == *pod.uid);
        match report.and_then(|report| report["olderFlows"].as_u64()) {
            Some(0) => {}
            Some(flows) => {
                let (workload, remedy) = workload(object, &pod.namespace, &pod.name);
                let older = count.workloads.entry(workload).or_default();
                older.connections += flows;
                older.pods.push(pod.name);
                older.remedy = remedy;
            }
            None => {
                let told = pod.annotations.get(REDIRECTION).and_then(|text| redirection_named(text));
                if told == Some(Redirection::Enabled) {
                    count.unknown.push(pod.name);
                }
            }
        }
    }
    count
}

/// Its name, and how its pods are replaced.
fn workload(pod: &Value, namespace: &str, name: &str) -> (String, String) {
    let owners = pod["metadata"]["ownerReferences"].as_array().map(Vec::as_slice).unwrap_or_default();
    let owner = owners.iter().find(|owner| owner["controller"] == true);
    let text = |field: &str| owner.and_then(|owner| owner[field].as_str()).unwrap_or_default();
    let hash = pod["metadata"]["labels"]["pod-template-hash"].as_str().unwrap_or_default();
    let workload = match (text("kind"), text("name")) {
        ("ReplicaSet", set) => set.strip_suffix(&format!("-{hash}")).map(|name| format!("deployment/{name}")),
        ("DaemonSet", name) => Some(format!("daemonset/{name}")),
        ("StatefulSet", name) => Some(format!("statefulset/{name}")),
        _ => None,
    };
    match workload {
        Some(workload) => {
            let remedy = format!("kubectl -n {namespace} rollout restart {workload}");
            (workload, remedy)
        }
        None => (format!("pod/{name}"), format!("kubectl -n {namespace} delete pod {name}, and make it again")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn connections_older_than_the_capture_are_counted_by_workload_and_what_nobody_counted_is_unknown() {
        let pod = |uid: &str, owner: Value| {
            json!({"metadata": {"name": uid, "uid": uid, "namespace": "d", "labels": {"pod-template-hash": "7d9"},
                "annotations": {REDIRECTION: "enabled"}, "ownerReferences": [owner]},
                "spec": {"nodeName": "n"}, "status": {"phase": "Running"}})
        };
        let of_web = json!({"kind": "ReplicaSet", "name": "web-7d9", "controller": true});
        let of_db = json!({"kind": "StatefulSet", "name": "db", "controller": true});
        let pods = [
            pod("web-1", of_web.clone()),
            pod("web-2", of_web.clone()),
            pod("new", of_web.clone()),
            pod("db-0", of_db),
            pod("bare", json!({})),
            pod("forgotten", of_web),
        ];
        let report = |uid: &str, flows: u64| json!({"uid": uid, "olderFlows": flows});
        let reports = [
            report("web-1", 2),
            report("web-2", 1),
            report("new", 0),
            report("db-0", 4),
            report("bare", 1),
            json!({"uid": "forgotten"}),
            report("of another namespace", 9),
        ];
        let count = count(&pods, &reports);
        let told: Vec<(&str, u64, &str)> =
            count.workloads.iter().map(|(name, o)| (name.as_str(), o.connections, o.remedy.as_str())).collect();
        assert_eq!(
            told,
            [
                ("deployment/web", 3, "kubectl -n d rollout restart deployment/web"),
                ("pod/bare", 1, "kubectl -n d delete pod bare, and make it again"),
                ("statefulset/db", 4, "kubectl -n d rollout restart statefulset/db"),
            ]
        );
        assert_eq!(count.unknown, ["forgotten"]);
    }
}
