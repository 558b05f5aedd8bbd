//! What patches do to objects.

use serde_json::{Value, json};

/// Server-side apply, as far as fields go: lists whose items have a type are merged by it.
pub(super) fn apply(into: &mut Value, from: &Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (field, value) in from {
                apply(into.entry(field).or_insert(Value::Null), value);
            }
        }
        (Value::Array(into), Value::Array(from)) if from.iter().all(|item| item["type"].is_string()) => {
            for item in from {
                match into.iter_mut().find(|other| other["type"] == item["type"]) {
                    Some(other) => *other = item.clone(),
                    None => into.push(item.clone()),
                }
            }
        }
        (into, from) => *into = from.clone(),
    }
}

/// Takes what was applied before and is not any more out of an object.
pub(super) fn prune(object: &mut Value, before: &Value, now: &Value) {
    match (object, before) {
        (Value::Object(object), Value::Object(before)) => {
            for (field, value) in before {
                match (object.get_mut(field), now.get(field)) {
                    (Some(inner), Some(now)) => prune(inner, value, now),
                    (Some(inner), None) if inner.is_object() || inner.is_array() => prune(inner, value, &Value::Null),
                    (Some(_), None) => drop(object.remove(field)),
                    (None, _) => {}
                }
            }
        }
        (Value::Array(object), Value::Array(before)) => {
            let kept = |item: &Value| now.as_array().is_some_and(|now| now.iter().any(|n| n["type"] == item["type"]));
            object.retain(|item| kept(item) || !before.iter().any(|b| b["type"] == item["type"]));
        }
        _ => {}
    }
}

/// RFC 7396.
pub(super) fn merge(target: &mut Value, patch: &Value) {
    let Some(fields) = patch.as_object() else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    let Some(into) = target.as_object_mut() else { return };
    for (name, value) in fields {
        if value.is_null() {
            into.remove(name);
        } else {
            merge(into.entry(name).or_insert(Value::Null), value);
        }
    }
}

/// `test`, `replace` and `remove` of RFC 6902; `None` when one of them fails.
pub(super) fn operate(target: &mut Value, operations: &[Value]) -> Option<()> {
    for operation in operations {
        let path = operation["path"].as_str()?;
        let found = target.pointer(path)?;
        match operation["op"].as_str()? {
            "test" if *found == operation["value"] => {}
            "replace" => *target.pointer_mut(path)? = operation["value"].clone(),
            "remove" => {
                let (parent, last) = path.rsplit_once('/')?;
                match target.pointer_mut(parent)? {
                    Value::Array(items) => drop(items.remove(last.parse().ok()?)),
                    Value::Object(fields) => drop(fields.remove(last)),
                    _ => return None,
                }
            }
            _ => return None,
        }
    }
    Some(())
}
