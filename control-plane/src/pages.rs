//! What the admin port shows: metrics, readiness, the problems of the manifests, and what is published.

use std::{sync::Arc, time::Duration};

use mesh_runtime::{
    admin::{self, AdminServer},
    metrics::Registry,
    readiness::Readiness,
};
use mesh_xds::server::Cache;
use tokio::sync::watch;

use crate::{pipeline::Snapshot, problem::Problem, source::Version, state};

/// Who asks for the problems of a version of a file waits this long for it to be read.
const READ_WITHIN: Duration = Duration::from_secs(4);

pub(crate) fn server(
    registry: &Registry,
    readiness: &Readiness,
    state: watch::Receiver<Snapshot>,
    published: Arc<Cache>,
    of_ca: watch::Receiver<Option<Problem>>,
) -> AdminServer {
    AdminServer::new()
        .metrics(registry)
        .readiness("/healthz/ready", readiness)
        .route("/debug/problems", move |request| {
            problems_page(state.clone(), of_ca.borrow().clone(), request, READ_WITHIN)
        })
        .route("/debug/state", move |_| {
            let described = state::describe(&published);
            std::future::ready(admin::json(http::StatusCode::OK, described.to_string()))
        })
}

/// With `?version=<inode>-<seconds>-<nanoseconds>`, the change time of a manifest: not before that version of it has been read.
async fn problems_page(
    mut state: watch::Receiver<Snapshot>,
    of_ca: Option<Problem>,
    request: admin::Request,
    within: Duration,
) -> admin::Response {
    if let Some(text) = request.query("version") {
        let Some(version) = version(text) else {
            let told = "`version` is <inode>-<seconds>-<nanoseconds> of a manifest's last change\n";
            return admin::text(http::StatusCode::BAD_REQUEST, told);
        };
        let read = state.wait_for(|snapshot| snapshot.versions.contains(&version));
        if !matches!(tokio::time::timeout(within, read).await, Ok(Ok(_))) {
            let told = format!("no manifest of that version was read within {within:?}\n");
            return admin::text(http::StatusCode::GATEWAY_TIMEOUT, told);
        }
    }
    let problems: Arc<[Problem]> = state.borrow().problems.clone();
    let all: Vec<&Problem> = of_ca.iter().chain(&*problems).collect();
    admin::json(http::StatusCode::OK, serde_json::json!(all).to_string())
}

fn version(text: &str) -> Option<Version> {
    let mut parts = text.splitn(3, '-');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn snapshot(versions: &[Version]) -> Snapshot {
        let versions: HashSet<Version> = versions.iter().copied().collect();
        Snapshot { versions: Arc::new(versions), ..Snapshot::default() }
    }

    #[tokio::test]
    async fn problems_of_a_version_are_told_once_it_has_been_read() {
        let sender = watch::Sender::new(snapshot(&[(1, 2, 3)]));
        let ask = |version: &str, within: Duration| {
            let query = [("version".to_owned(), version.to_owned())].into();
            let (method, path) = (http::Method::GET, "/debug/problems".to_owned());
            let request = admin::Request { method, path, query, headers: http::HeaderMap::default() };
            problems_page(sender.subscribe(), None, request, within)
        };
        assert_eq!(ask("12", READ_WITHIN).await.status(), 400);
        assert_eq!(ask("1-2-3", Duration::ZERO).await.status(), 200);
        assert_eq!(ask("1-2-4", Duration::ZERO).await.status(), 504, "nobody has read it");
        let answer = tokio::spawn(ask("1-2-4", READ_WITHIN));
        sender.send_replace(snapshot(&[(1, 2, 4)]));
        assert_eq!(answer.await.unwrap().status(), 200);
    }
}
