//! The taint that keeps pods from a node until they can be captured there: taken away once, when the agent is ready.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Taint};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use mesh_runtime::{drain::DrainWatcher, readiness::Readiness, telemetry::error_chain};
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

const LOOK: Duration = Duration::from_millis(500);
const LIMIT: Duration = Duration::from_secs(5);
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(30);

/// Waits for readiness, removes the taint of that key from the node, and ends.
pub async fn run(client: Client, node: String, key: String, readiness: Readiness, drain: DrainWatcher) {
    let work = async {
        while !readiness.is_ready() {
            sleep(LOOK).await;
        }
        let mut pause = FIRST_RETRY;
        loop {
            match timeout(LIMIT, remove(&client, &node, &key)).await {
                Ok(Ok(removed)) => break tracing::info!(key, removed, "ready: the node no longer has the taint"),
                Ok(Err(error)) => tracing::warn!(key, error = error_chain(&error), "cannot remove the taint"),
                Err(_) => tracing::warn!(key, "cannot remove the taint: the API server does not answer"),
            }
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_RETRY);
        }
    };
    tokio::select! {
        _ = drain.signalled() => {}
        () = work => drop(drain.signalled().await),
    }
}

/// Whether there was any.
async fn remove(client: &Client, node: &str, key: &str) -> kube::Result<bool> {
    let nodes: Api<Node> = Api::all(client.clone());
    let taints = nodes.get(node).await?.spec.and_then(|spec| spec.taints).unwrap_or_default();
    let operations = operations(&taints, key);
    if operations.is_empty() {
        return Ok(false);
    }
    let patch = serde_json::from_value(Value::from(operations)).map_err(kube::Error::SerdeError)?;
    nodes.patch(node, &PatchParams::default(), &Patch::Json::<()>(patch)).await?;
    Ok(true)
}

/// Last first, so that the places before stay what they were; each is tested, since another may have changed the list meanwhile.
fn operations(taints: &[Taint], key: &str) -> Vec<Value> {
    let ours = taints.iter().enumerate().rev().filter(|(_, taint)| taint.key == key);
    ours.flat_map(|(index, taint)| {
        let path = format!("/spec/taints/{index}");
        [json!({"op": "test", "path": path, "value": taint}), json!({"op": "remove", "path": path})]
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_effect_of_the_key_goes_and_nothing_else() {
        let taint = |key: &str, effect: &str| Taint { key: key.into(), effect: effect.into(), ..Taint::default() };
        let taints = [taint("k", "NoSchedule"), taint("other", "NoSchedule"), taint("k", "NoExecute")];
        let operations = operations(&taints, "k");
        let shown: Vec<(&str, &str)> =
            operations.iter().map(|o| (o["op"].as_str().expect("op"), o["path"].as_str().expect("path"))).collect();
        let expected = [
            ("test", "/spec/taints/2"),
            ("remove", "/spec/taints/2"),
            ("test", "/spec/taints/0"),
            ("remove", "/spec/taints/0"),
        ];
        assert_eq!(shown, expected);
        assert_eq!(operations[0]["value"]["effect"], "NoExecute");
        assert_eq!(super::operations(&taints[1..2], "k"), Vec::<Value>::new());
    }
}
