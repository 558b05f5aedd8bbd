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

/// Where the control plane listens for the API server's questions, somebody has to tell the API server to ask.
pub(super) fn admission(evidence: &Evidence) -> Option<Item> {
    let containers = evidence.fairwayd.as_ref()?["spec"]["template"]["spec"]["containers"].as_array()?;
    let arguments = containers.iter().filter_map(|container| container["args"].as_array()).flatten();
    if !arguments.filter_map(Value::as_str).any(|argument| argument.starts_with("--webhook")) {
        return None;
    }
    // What could not be listed is not missing.
    if evidence.unknown.iter().any(|(what, _)| *what == "admission") {
        return None;
    }
    let wanted = format!("fairway-{}", evidence.namespace);
    let is_there = evidence.webhooks.iter().any(|configuration| configuration["metadata"]["name"] == *wanted);
    Some(match is_there {
        true => Item::fine("admission", "policies are looked at before they are taken"),
        false => {
            let says = format!("ValidatingWebhookConfiguration {wanted} is missing: policies with mistakes are taken");
            Item::new("admission", Level::Warning, says, "`fairway install` makes it again")
        }
    })
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
    fn a_control_plane_that_listens_for_questions_that_nobody_asks_is_told() {
        let found = |argument: &str, name: &str| {
            let fairwayd = json!({"spec": {"template": {"spec": {"containers": [{"args": ["run", argument]}]}}}});
            let webhooks = vec![json!({"metadata": {"name": name}})];
            let evidence =
                Evidence { namespace: "m".to_owned(), fairwayd: Some(fairwayd), webhooks, ..Evidence::default() };
            admission(&evidence).map(|item| item.level)
        };
        assert_eq!(found("--webhook=0.0.0.0:15017", "fairway-m"), Some(Level::Fine));
        assert_eq!(found("--webhook=0.0.0.0:15017", "another"), Some(Level::Warning));
        assert_eq!(found("--kubernetes", "another"), None);
        assert_eq!(admission(&Evidence::default()), None);
    }

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
