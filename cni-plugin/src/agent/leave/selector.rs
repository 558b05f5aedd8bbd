//! Whether a pod template may run on a node, as far as its selector and its required affinity say.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{NodeSelectorRequirement, NodeSelectorTerm, PodSpec};

pub(super) fn selects(pods: &PodSpec, node: &str, labels: &BTreeMap<String, String>) -> bool {
    let selected = pods.node_selector.iter().flatten().all(|(key, value)| labels.get(key) == Some(value));
    let affinity = pods.affinity.as_ref().and_then(|a| a.node_affinity.as_ref());
    let required = affinity.and_then(|a| a.required_during_scheduling_ignored_during_execution.as_ref());
    // The terms are alternatives; none at all matches nothing.
    selected && required.is_none_or(|r| r.node_selector_terms.iter().any(|term| matches(term, node, labels)))
}

fn matches(term: &NodeSelectorTerm, node: &str, labels: &BTreeMap<String, String>) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    let label = |r: &NodeSelectorRequirement| holds(r, labels.get(&r.key).map(String::as_str));
    let field = |r: &NodeSelectorRequirement| holds(r, (r.key == "metadata.name").then_some(node));
    !(expressions.is_empty() && fields.is_empty()) && expressions.iter().all(label) && fields.iter().all(field)
}

fn holds(requirement: &NodeSelectorRequirement, value: Option<&str>) -> bool {
    let values = requirement.values.as_deref().unwrap_or_default();
    let listed = value.is_some_and(|value| values.iter().any(|v| v == value));
    let compared = || Some((value?.parse::<i64>().ok()?, values.first()?.parse::<i64>().ok()?));
    match requirement.operator.as_str() {
        "In" => listed,
        "NotIn" => !listed,
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => compared().is_some_and(|(value, bound)| value > bound),
        "Lt" => compared().is_some_and(|(value, bound)| value < bound),
        // An operator of the future: we were scheduled here, so it held.
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn selectors_and_required_affinity_count_as_the_scheduler_counts_them() {
        let labels: BTreeMap<String, String> =
            [("os", "linux"), ("cores", "8")].map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        let term = |key: &str, operator: &str, values: &[&str]| json!({"matchExpressions": [{"key": key, "operator": operator, "values": values}]});
        let affinity = |terms: serde_json::Value| json!({"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}});
        let name = json!([{"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n1"]}]}]);
        let cases = [
            (json!({}), true),
            (json!({"nodeSelector": {"os": "linux"}}), true),
            (json!({"nodeSelector": {"os": "windows"}}), false),
            (affinity(json!([term("os", "In", &["linux", "x"])])), true),
            (affinity(json!([term("os", "NotIn", &["linux"])])), false),
            (affinity(json!([term("gone", "DoesNotExist", &[])])), true),
            (affinity(json!([term("gone", "Exists", &[])])), false),
            (affinity(json!([term("cores", "Gt", &["4"])])), true),
            (affinity(json!([term("cores", "Lt", &["4"])])), false),
            (affinity(json!([term("gone", "Exists", &[]), term("os", "Exists", &[])])), true),
            (affinity(name), true),
            (affinity(json!([{}])), false),
            (affinity(json!([])), false),
        ];
        for (mut spec, expected) in cases {
            spec["containers"] = json!([]);
            let pods: PodSpec = serde_json::from_value(spec.clone()).expect("a pod spec");
            assert_eq!(selects(&pods, "n1", &labels), expected, "{spec}");
        }
    }
}
