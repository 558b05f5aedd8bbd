//! What is installed, written beside it.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::{INSTALL, MANAGED_BY};
use crate::cluster::{Cluster, MANAGER};

/// Of the ConfigMap.
pub(super) const NAME: &str = "fairway-install";

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Record {
    /// Of the `fairway` that installed it.
    pub(crate) version: String,
    pub(crate) platform: String,
    pub(crate) hub: String,
    pub(crate) tag: String,
    pub(crate) settings: BTreeMap<String, String>,
}

impl Record {
    /// `None` where nothing was installed by `fairway`.
    pub(crate) async fn read(cluster: &Cluster, namespace: &str) -> anyhow::Result<Option<Self>> {
        let there = super::one(cluster, "ConfigMap", Some(namespace), NAME).await?;
        Ok(there.map(|object| Self::of(&object["data"])))
    }

    fn of(data: &Value) -> Self {
        let text = |name: &str| data[name].as_str().unwrap_or_default().to_owned();
        let settings = text("settings");
        let settings = settings.lines().filter_map(|line| line.split_once('='));
        Self {
            version: text("version"),
            platform: text("platform"),
            hub: text("hub"),
            tag: text("tag"),
            settings: settings.map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
        }
    }

    pub(super) fn object(&self, namespace: &str) -> Value {
        let settings: Vec<String> = self.settings.iter().map(|(key, value)| format!("{key}={value}")).collect();
        json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "name": NAME,
                "namespace": namespace,
                "labels": { MANAGED_BY: MANAGER, INSTALL: namespace, "app.kubernetes.io/part-of": "fairway" },
            },
            "data": {
                "version": self.version, "platform": self.platform, "hub": self.hub, "tag": self.tag, "settings": settings.join("\n"),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let settings = [("a.b", "1"), ("c", "x=y")].map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        let text = |text: &str| text.to_owned();
        let record = Record { version: text("1"), platform: text("gke"), hub: text("h/i"), tag: text("t"), settings };
        assert_eq!(Record::of(&record.object("n")["data"]), record);
    }
}
