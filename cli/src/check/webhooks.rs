//! Admission webhooks and API services: the API server calls them, and is not in the mesh.

use serde_json::Value;

use super::{Item, Level, evidence::Evidence, some};

pub(super) fn judge(evidence: &Evidence) -> Item {
    let (mut broken, mut endangered) = (Vec::new(), Vec::new());
    for configuration in &evidence.webhooks {
        let name = configuration["metadata"]["name"].as_str().unwrap_or_default();
        for service in services(configuration) {
            let namespace = service["namespace"].as_str().unwrap_or_default();
            if !evidence.is_enrolled(namespace) {
                continue;
            }
            let told = format!("{name} ({namespace}/{})", service["name"].as_str().unwrap_or_default());
            let list = if is_strict(evidence, namespace) { &mut broken } else { &mut endangered };
            if !list.contains(&told) {
                list.push(told);
            }
        }
    }
    let remedy = "label their pods istio.io/dataplane-mode=none, or make their port PERMISSIVE with portLevelMtls";
    if !broken.is_empty() {
        return Item::new("webhooks", Level::Fault, format!("the API server is refused by {}", some(&broken)), remedy);
    }
    if !endangered.is_empty() {
        let says = format!("the API server would be refused under STRICT by {}", some(&endangered));
        return Item::new("webhooks", Level::Warning, says, remedy);
    }
    Item::fine("webhooks", "none in a namespace of the mesh")
}

/// Of a webhook configuration's entries, or of an API service.
fn services(configuration: &Value) -> impl Iterator<Item = &Value> {
    let entries = configuration["webhooks"].as_array().into_iter().flatten();
    let of_entries = entries.map(|webhook| &webhook["clientConfig"]["service"]);
    of_entries.chain([&configuration["spec"]["service"]]).filter(|service| service.is_object())
}

/// The namespace's own word counts before the mesh's.
fn is_strict(evidence: &Evidence, namespace: &str) -> bool {
    let mode = |within: &str| {
        let of = |policy: &&Value| policy["metadata"]["namespace"] == within && !policy["spec"]["selector"].is_object();
        let found = evidence.peer_authentications.iter().find(of)?;
        found["spec"]["mtls"]["mode"].as_str().filter(|mode| *mode != "UNSET")
    };
    mode(namespace).or_else(|| mode(&evidence.namespace)) == Some("STRICT")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_webhook_in_a_strict_namespace_cannot_be_called() {
        let mode = |namespace: &str, mode: &str| json!({"metadata": {"namespace": namespace}, "spec": {"mtls": {"mode": mode}}});
        let evidence = |label: &str, modes: Vec<Value>| Evidence {
            namespace: "root".to_owned(),
            namespaces: vec![json!({"metadata": {"name": "w", "labels": {"istio.io/dataplane-mode": label}}})],
            webhooks: vec![
                json!({"metadata": {"name": "hook"}, "webhooks": [{"clientConfig": {"service": {"name": "s", "namespace": "w"}}}]}),
            ],
            peer_authentications: modes,
            ..Evidence::default()
        };
        for (label, modes, level) in [
            ("none", vec![mode("root", "STRICT")], Level::Fine),
            ("ambient", vec![], Level::Warning),
            ("ambient", vec![mode("root", "STRICT")], Level::Fault),
            ("ambient", vec![mode("root", "STRICT"), mode("w", "PERMISSIVE")], Level::Warning),
            ("ambient", vec![mode("w", "STRICT")], Level::Fault),
        ] {
            assert_eq!(judge(&evidence(label, modes.clone())).level, level, "{label} {modes:?}");
        }
    }
}
