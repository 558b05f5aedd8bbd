//! The API server of tests, as this program speaks of objects.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use kube::{Client, Config};
use serde_json::Value;
use test_support::ApiServer;

use super::{Cluster, Object};

#[derive(Debug)]
pub(crate) struct FakeApi {
    pub(crate) server: ApiServer,
    /// Requests that were looked at.
    seen: AtomicUsize,
}

impl FakeApi {
    pub(crate) async fn start() -> Self {
        Self { server: ApiServer::start().await, seen: AtomicUsize::new(0) }
    }

    pub(crate) fn cluster(&self) -> Cluster {
        let mut config = Config::new(self.server.url().parse().unwrap());
        config.default_retry = false;
        let (server, namespace) = (format!("{} (context fake)", self.server.url()), "default".to_owned());
        Cluster { client: Client::try_from(config).unwrap(), server, namespace }
    }

    pub(crate) fn put(&self, object: Value) {
        let resource = Object::new(object.clone()).unwrap().kind.path(None);
        self.server.put(resource.trim_start_matches('/'), object);
    }

    pub(crate) fn forbid(&self, path: &str) {
        let path: Arc<str> = path.into();
        self.server.refuse(move |asked| (*asked.path == *path).then_some(403));
    }

    /// What was changed since the last time.
    pub(crate) fn changes(&self) -> Vec<String> {
        let asked = self.server.asked();
        let new = &asked[self.seen.swap(asked.len(), Ordering::Relaxed)..];
        new.iter().filter(|asked| asked.is_change()).map(|asked| format!("{} {}", asked.method, asked.path)).collect()
    }
}
