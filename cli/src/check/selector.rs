//! Label selectors of Kubernetes.

use cni_plugin::eligibility::Labels;
use serde_json::Value;

/// Whether labels are selected. An operator that is not known selects: better one warning too many.
pub(super) fn selects(selector: &Value, labels: &Labels) -> bool {
    let label = |key: &str| labels.get(key).map(String::as_str);
    let exact = selector["matchLabels"].as_object();
    let exact = exact.into_iter().flatten().all(|(key, value)| label(key) == value.as_str());
    let expressions = selector["matchExpressions"].as_array();
    exact
        && expressions.into_iter().flatten().all(|expression| {
            let key = expression["key"].as_str().unwrap_or_default();
            let values = expression["values"].as_array().map(Vec::as_slice).unwrap_or_default();
            let listed = label(key).is_some_and(|value| values.iter().any(|v| v == value));
            match expression["operator"].as_str() {
                Some("In") => listed,
                Some("NotIn") => !listed,
                Some("Exists") => label(key).is_some(),
                Some("DoesNotExist") => label(key).is_none(),
                _ => true,
            }
        })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn labels_and_expressions_must_all_hold() {
        let expression =
            |operator: &str| json!({"matchExpressions": [{"key": "a", "operator": operator, "values": ["1"]}]});
        for (selector, labels, wanted) in [
            (json!({}), json!({}), true),
            (json!({"matchLabels": {"a": "1"}}), json!({"a": "1", "b": "2"}), true),
            (json!({"matchLabels": {"a": "1", "b": "3"}}), json!({"a": "1", "b": "2"}), false),
            (expression("In"), json!({"a": "1"}), true),
            (expression("In"), json!({}), false),
            (expression("NotIn"), json!({}), true),
            (expression("NotIn"), json!({"a": "1"}), false),
            (expression("Exists"), json!({"a": "2"}), true),
            (expression("DoesNotExist"), json!({"a": "2"}), false),
        ] {
            let read: Labels = serde_json::from_value(labels.clone()).unwrap();
            assert_eq!(selects(&selector, &read), wanted, "{selector} {labels}");
        }
    }
}
