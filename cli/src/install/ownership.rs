//! Whose an object is.

use serde_json::Value;

use super::INSTALL;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// It is not there.
    Nobody,
    Us,
    /// A Helm release, another installation, or whoever wrote it.
    Other(String),
}

pub(super) fn of(there: Option<&Value>, namespace: &str) -> Owner {
    let Some(metadata) = there.map(|object| &object["metadata"]) else { return Owner::Nobody };
    match metadata["labels"][INSTALL].as_str() {
        Some(installation) if installation == namespace => return Owner::Us,
        Some(other) => return Owner::Other(format!("the installation in namespace {other}")),
        None => {}
    }
    if let Some((release, within)) = release(metadata) {
        let within = within.map(|namespace| format!(" of namespace {namespace}")).unwrap_or_default();
        return Owner::Other(format!("the Helm release {release}{within}"));
    }
    let managers = metadata["managedFields"].as_array().map(Vec::as_slice).unwrap_or_default();
    let manager = managers.iter().find_map(|entry| entry["manager"].as_str());
    Owner::Other(manager.unwrap_or("an unknown writer").to_owned())
}

/// The Helm release an object belongs to, by its metadata, and the release's namespace.
pub(super) fn release(metadata: &Value) -> Option<(&str, Option<&str>)> {
    let annotation = |name: &str| metadata["annotations"][format!("meta.helm.sh/{name}")].as_str();
    annotation("release-name").map(|release| (release, annotation("release-namespace")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_object_is_ours_by_the_label_of_this_installation_only() {
        let other = |text: &str| Owner::Other(text.to_owned());
        for (metadata, wanted) in [
            (json!({"labels": {INSTALL: "a"}}), Owner::Us),
            (json!({"labels": {INSTALL: "b"}}), other("the installation in namespace b")),
            (
                json!({"annotations": {"meta.helm.sh/release-name": "r", "meta.helm.sh/release-namespace": "n"}}),
                other("the Helm release r of namespace n"),
            ),
            (json!({"managedFields": [{"manager": "istioctl"}]}), other("istioctl")),
            (json!({}), other("an unknown writer")),
        ] {
            assert_eq!(of(Some(&json!({"metadata": metadata})), "a"), wanted, "{metadata}");
        }
        assert_eq!(of(None, "a"), Owner::Nobody);
    }
}
