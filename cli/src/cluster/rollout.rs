//! Whether a Deployment or DaemonSet runs as it is written, and if not, what keeps it.

use std::collections::BTreeSet;

use serde_json::Value;

/// How far a rollout is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Rollout {
    Done,
    /// `1 of 2 available`.
    Under(String),
}

pub(crate) fn of(workload: &Value) -> Rollout {
    let status = &workload["status"];
    let count = |field: &str| status[field].as_u64().unwrap_or(0);
    if count("observedGeneration") < workload["metadata"]["generation"].as_u64().unwrap_or(0) {
        return Rollout::Under("not noticed yet".to_owned());
    }
    let (wanted, updated, available, surplus) = if workload["kind"] == "DaemonSet" {
        (count("desiredNumberScheduled"), count("updatedNumberScheduled"), count("numberAvailable"), 0)
    } else {
        let (wanted, updated) = (workload["spec"]["replicas"].as_u64().unwrap_or(1), count("updatedReplicas"));
        (wanted, updated, count("availableReplicas"), count("replicas").saturating_sub(updated))
    };
    if workload["kind"] == "DaemonSet" && wanted == 0 {
        return Rollout::Under("no node takes it".to_owned());
    }
    if updated < wanted {
        return Rollout::Under(format!("{updated} of {wanted} are of this version"));
    }
    if available < wanted {
        return Rollout::Under(format!("{available} of {wanted} are available"));
    }
    if surplus > 0 {
        return Rollout::Under(format!("{surplus} of the version before are ending"));
    }
    Rollout::Done
}

/// Of pods that are not ready: what they, the scheduler or the kubelet say.
pub(crate) fn trouble(pods: &[Value]) -> Vec<String> {
    pods.iter()
        .filter(|pod| !is_ready(pod))
        .map(|pod| {
            let name = pod["metadata"]["name"].as_str().unwrap_or_default();
            let node = pod["spec"]["nodeName"].as_str().map(|node| format!(" on {node}")).unwrap_or_default();
            format!("{name}{node}: {}", reason(pod))
        })
        .collect()
}

pub(crate) fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
    pod["metadata"]["deletionTimestamp"].is_null()
        && conditions.iter().any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
}

fn reason(pod: &Value) -> String {
    if !pod["metadata"]["deletionTimestamp"].is_null() {
        return "ending".to_owned();
    }
    let status = &pod["status"];
    let said = |value: &Value| {
        let parts = [value["reason"].as_str(), value["message"].as_str()];
        let parts: Vec<&str> = parts.into_iter().flatten().filter(|text| !text.is_empty()).collect();
        (!parts.is_empty()).then(|| parts.join(": "))
    };
    let containers = ["initContainerStatuses", "containerStatuses"];
    let mut containers = containers.iter().filter_map(|list| status[list].as_array()).flatten();
    let container = containers.find_map(|container| {
        let waiting = said(&container["state"]["waiting"])?;
        let before = &container["lastState"]["terminated"];
        let before = before["exitCode"].as_i64().map(|code| format!(" (ended with {code} before)")).unwrap_or_default();
        Some(waiting + &before)
    });
    let conditions = status["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
    let scheduled =
        conditions.iter().find(|condition| condition["type"] == "PodScheduled" && condition["status"] != "True");
    container.or_else(|| scheduled.and_then(said)).or_else(|| said(status)).unwrap_or_else(|| {
        match status["phase"].as_str() {
            Some("Running") => "runs, and does not report ready".to_owned(),
            other => other.unwrap_or("not started").to_owned(),
        }
    })
}

/// Images that nodes do not have and cannot pull.
pub(crate) fn unpulled(pods: &[Value]) -> Vec<String> {
    const REASONS: [&str; 5] =
        ["ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName", "RegistryUnavailable"];
    let containers = pods.iter().filter_map(|pod| pod["status"]["containerStatuses"].as_array()).flatten();
    let images = containers.filter_map(|container| {
        let reason = container["state"]["waiting"]["reason"].as_str()?;
        REASONS.contains(&reason).then(|| container["image"].as_str().map(str::to_owned)).flatten()
    });
    let images: BTreeSet<String> = images.collect();
    images.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_rollout_is_done_when_all_are_new_and_available_and_nothing_old_is_left() {
        let deployment = |generation: u64, updated: u64, available: u64, all: u64| {
            json!({"kind": "Deployment", "metadata": {"generation": 2}, "spec": {"replicas": 2}, "status": {
                "observedGeneration": generation, "updatedReplicas": updated, "availableReplicas": available, "replicas": all}})
        };
        let set = |wanted: u64, updated: u64, available: u64| {
            json!({"kind": "DaemonSet", "metadata": {"generation": 1}, "status": {"observedGeneration": 1,
                "desiredNumberScheduled": wanted, "updatedNumberScheduled": updated, "numberAvailable": available}})
        };
        for (workload, wanted) in [
            (deployment(2, 2, 2, 2), None),
            (deployment(1, 2, 2, 2), Some("not noticed yet")),
            (deployment(2, 1, 2, 3), Some("1 of 2 are of this version")),
            (deployment(2, 2, 1, 2), Some("1 of 2 are available")),
            (deployment(2, 2, 2, 3), Some("1 of the version before are ending")),
            (set(3, 3, 3), None),
            (set(0, 0, 0), Some("no node takes it")),
            (set(3, 1, 3), Some("1 of 3 are of this version")),
            (set(3, 3, 2), Some("2 of 3 are available")),
        ] {
            let wanted = wanted.map_or(Rollout::Done, |text| Rollout::Under(text.to_owned()));
            assert_eq!(of(&workload), wanted, "{workload}");
        }
    }

    #[test]
    fn the_first_thing_that_keeps_a_pod_is_told() {
        let ready = json!({"metadata": {"name": "a"}, "status": {"conditions": [{"type": "Ready", "status": "True"}]}});
        let pulling = json!({"metadata": {"name": "b"}, "spec": {"nodeName": "n1"}, "status": {"phase": "Pending",
            "containerStatuses": [{"state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}]}});
        let unschedulable = json!({"metadata": {"name": "c"}, "status": {"phase": "Pending", "conditions": [
            {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/2 nodes"}]}});
        let unready = json!({"metadata": {"name": "d"}, "status": {"phase": "Running"}});
        assert_eq!(
            trouble(&[ready, pulling, unschedulable, unready]),
            [
                "b on n1: ImagePullBackOff: no such image",
                "c: Unschedulable: 0/2 nodes",
                "d: runs, and does not report ready"
            ]
        );
    }

    #[test]
    fn each_image_that_cannot_be_pulled_is_named_once() {
        let pod = |reason: &str, image: &str| json!({"status": {"containerStatuses": [{"image": image, "state": {"waiting": {"reason": reason}}}]}});
        let running = json!({"status": {"containerStatuses": [{"image": "h/c:1", "state": {"running": {}}}]}});
        let pods = [
            pod("ImagePullBackOff", "h/a:1"),
            pod("ErrImagePull", "h/a:1"),
            pod("ContainerCreating", "h/b:1"),
            running,
            json!({}),
        ];
        assert_eq!(unpulled(&pods), ["h/a:1"]);
    }
}
