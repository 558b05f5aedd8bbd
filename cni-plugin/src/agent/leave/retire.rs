//! The end of all agents at once, while they still may clean up: what removes a release takes their account and roles away as soon as
//! their DaemonSet is marked, and an agent takes seconds to end.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use k8s_openapi::api::{apps::v1::DaemonSet, core::v1::Pod};
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, ListParams},
    core::PartialObjectMeta,
};
use tokio::time::{sleep, timeout};

use super::{ASK_AGAIN, ASK_LIMIT};

/// Deletes the agents' DaemonSet, and returns the names of those of its pods that have not ended within `limit`: those of nodes that are
/// down never do.
///
/// # Errors
/// When the DaemonSet cannot be deleted.
pub async fn retire(
    client: &Client,
    namespace: &str,
    daemon_set: &str,
    limit: Duration,
) -> anyhow::Result<Vec<String>> {
    let deadline = Instant::now() + limit;
    let what = || format!("DaemonSet {namespace}/{daemon_set}");
    let sets: Api<DaemonSet> = Api::namespaced(client.clone(), namespace);
    let found = timeout(ASK_LIMIT, sets.get_opt(daemon_set)).await.with_context(what)?.with_context(what)?;
    let Some(set) = found else { return Ok(Vec::new()) };
    let labels = set.spec.and_then(|spec| spec.selector.match_labels).unwrap_or_default();
    anyhow::ensure!(!labels.is_empty(), "{} does not say which pods are its own", what());
    // In the foreground: a DaemonSet that is still there, and marked, is what an agent knows its end by.
    let deleted = timeout(ASK_LIMIT, sets.delete(daemon_set, &DeleteParams::foreground())).await.with_context(what)?;
    match deleted {
        Err(kube::Error::Api(status)) if status.code == 404 => {}
        other => drop(other.with_context(what)?),
    }
    let selector: Vec<String> = labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let of_set = ListParams::default().labels(&selector.join(","));
    let pods: Api<PartialObjectMeta<Pod>> = Api::namespaced(client.clone(), namespace);
    loop {
        let left = match timeout(ASK_LIMIT, pods.list_metadata(&of_set)).await {
            Ok(Ok(list)) => list.items.iter().map(|pod| pod.name_any()).collect(),
            Ok(Err(error)) => vec![format!("unknown: {error}")],
            Err(_) => vec![format!("unknown: no answer within {ASK_LIMIT:?}")],
        };
        if left.is_empty() || Instant::now() >= deadline {
            return Ok(left);
        }
        sleep(ASK_AGAIN).await;
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use test_support::ApiServer;

    use super::*;

    const SETS: &str = "apis/apps/v1/daemonsets";
    const PODS: &str = "api/v1/pods";

    fn client(api: &ApiServer) -> Client {
        let mut config = kube::Config::new(api.url().parse().expect("an address"));
        config.default_retry = false;
        Client::try_from(config).expect("a client")
    }

    async fn with_an_agent() -> ApiServer {
        let api = ApiServer::start().await;
        let labels = json!({"k8s-app": "fairway-node"});
        let spec = json!({"selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}}});
        api.put(SETS, json!({"metadata": {"name": "fairway-node", "namespace": "m"}, "spec": spec}));
        api.put(PODS, json!({"metadata": {"name": "fairway-node-x", "namespace": "m", "labels": labels}}));
        api.put(PODS, json!({"metadata": {"name": "other", "namespace": "m", "labels": {"app": "ztunnel"}}}));
        api
    }

    #[tokio::test]
    async fn it_ends_when_the_last_agent_has_ended() {
        let api = with_an_agent().await;
        let (asked, mut questions) = tokio::sync::mpsc::unbounded_channel();
        api.refuse(move |question| {
            drop(asked.send(format!("{} {}", question.method, question.path)));
            None
        });
        let node = async {
            while questions.recv().await.expect("it asks") != "GET /api/v1/namespaces/m/pods" {}
            assert!(api.get(SETS, "m", "fairway-node").is_none(), "the DaemonSet goes first");
            api.delete(PODS, "m", "fairway-node-x");
        };
        let client = client(&api);
        let (left, ()) = tokio::join!(retire(&client, "m", "fairway-node", Duration::from_secs(60)), node);
        assert_eq!(left.expect("retired"), Vec::<String>::new());
        let again = retire(&client, "m", "fairway-node", Duration::from_secs(60)).await;
        assert_eq!(again.expect("nothing to do"), Vec::<String>::new());
    }

    #[tokio::test]
    async fn an_agent_that_does_not_end_is_named_and_holds_nobody_up() {
        let api = with_an_agent().await;
        let left = retire(&client(&api), "m", "fairway-node", Duration::ZERO).await;
        assert_eq!(left.expect("retired"), ["fairway-node-x"]);
    }

    #[tokio::test]
    async fn a_daemon_set_that_it_may_not_delete_is_an_error() {
        let api = with_an_agent().await;
        api.refuse(|question| question.is_change().then_some(403));
        let error = retire(&client(&api), "m", "fairway-node", Duration::ZERO).await.expect_err("refused");
        assert!(format!("{error:#}").contains("DaemonSet m/fairway-node"), "{error:#}");
    }
}
