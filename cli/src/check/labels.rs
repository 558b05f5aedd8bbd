//! Labels by which namespaces are meant to be in the mesh, and are not.

use cni_plugin::eligibility::MODE;

use super::{Item, Level, evidence::Evidence, membership, some};

/// The values that mean something.
const VALUES: [&str; 2] = ["ambient", "none"];

pub(super) fn judge(evidence: &Evidence) -> Vec<Item> {
    let (mut meaningless, mut excluded) = (Vec::new(), Vec::new());
    for namespace in &evidence.namespaces {
        let name = namespace["metadata"]["name"].as_str().unwrap_or_default();
        let labels = membership::labels(namespace);
        match labels.get(MODE).map(String::as_str) {
            Some("ambient") if evidence.membership.is_excluded(name) => excluded.push(name.to_owned()),
            Some(value) if !VALUES.contains(&value) => meaningless.push(format!("{name} (`{value}`)")),
            _ => {}
        }
    }
    let mut items = Vec::new();
    if !meaningless.is_empty() {
        let says = format!("{MODE} has a value that means nothing in namespace {}", some(&meaningless));
        items.push(Item::new("labels", Level::Warning, says, "the value is `ambient`, in small letters"));
    }
    if !excluded.is_empty() {
        let says = format!("labelled for the mesh, but excluded: namespace {}", some(&excluded));
        let remedy = "remove the label; or take it out of EXCLUDE_NAMESPACES of ConfigMap fairway-node";
        items.push(Item::new("labels", Level::Warning, says, remedy));
    }
    if items.is_empty() {
        items.push(Item::fine("labels", "every namespace that is labelled for the mesh is meant to be in it"));
    }
    items
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_label_that_does_nothing_is_told() {
        let found = |name: &str, value: &str| {
            let namespaces = vec![json!({"metadata": {"name": name, "labels": {MODE: value}}})];
            let items = judge(&Evidence { namespaces, ..Evidence::default() });
            items.into_iter().map(|item| (item.level, item.finding)).collect::<Vec<_>>()
        };
        for (name, value, level, part) in [
            ("shop", "ambient", Level::Fine, "every"),
            ("shop", "none", Level::Fine, "every"),
            ("shop", "Ambient", Level::Warning, "shop (`Ambient`)"),
            ("kube-system", "ambient", Level::Warning, "excluded: namespace kube-system"),
        ] {
            let items = found(name, value);
            assert!(items.len() == 1 && items[0].0 == level && items[0].1.contains(part), "{name} {value}: {items:?}");
        }
    }
}
