//! JSON Schema, as derived from types → structural schema, the part of it that an API server takes.
//!
//! Nothing may be defaulted by the API server: an object must stay as it was written.

use schemars::{JsonSchema, generate::SchemaSettings};
use serde_json::{Map, Value};

/// `$defs` are written out where they are used.
pub(super) fn schema_of<T: JsonSchema>() -> Value {
    let mut settings = SchemaSettings::draft2020_12();
    settings.inline_subschemas = true;
    structural(settings.into_generator().into_root_schema_for::<T>().to_value())
}

fn structural(schema: Value) -> Value {
    let Value::Object(mut schema) = schema else { return schema };
    for keyword in ["$schema", "title", "default"] {
        schema.remove(keyword);
    }
    // Of numbers these say what minimum and maximum say.
    if schema.get("format").is_some_and(|format| format != "date-time") {
        schema.remove("format");
    }
    // An absent field is absent; null is dropped by the API server.
    if let Some(Value::Array(types)) = schema.get_mut("type") {
        types.retain(|name| name != "null");
        if let [only] = &mut types[..] {
            let only = only.take();
            schema.insert("type".to_owned(), only);
        }
    }
    if let Some(Value::Array(words)) = schema.get_mut("enum") {
        words.retain(|word| !word.is_null());
    }
    if let Some(present) = present(&schema) {
        schema.remove("anyOf");
        present.into_iter().for_each(|(keyword, value)| _ = schema.entry(keyword).or_insert(value));
        return structural(Value::Object(schema));
    }
    if let Some(Value::String(description)) = schema.get_mut("description") {
        *description = description.replace('\n', " ");
    }
    for below in ["items", "additionalProperties"] {
        if let Some(value) = schema.get_mut(below) {
            *value = structural(value.take());
        }
    }
    if let Some(Value::Object(properties)) = schema.get_mut("properties") {
        properties.values_mut().for_each(|property| *property = structural(property.take()));
    }
    Value::Object(schema)
}

/// What is said of a value that may also be null.
fn present(schema: &Map<String, Value>) -> Option<Map<String, Value>> {
    let Some(Value::Array(alternatives)) = schema.get("anyOf") else { return None };
    let mut alternatives = alternatives.clone();
    let before = alternatives.len();
    alternatives.retain(|alternative| alternative["type"] != "null");
    match &mut alternatives[..] {
        [Value::Object(only)] if before == 2 => Some(std::mem::take(only)),
        _ => None,
    }
}

pub(super) fn without_descriptions(schema: &Value) -> Value {
    let Value::Object(schema) = schema else { return schema.clone() };
    let bare = |(keyword, value): (&String, &Value)| {
        let value = match (&**keyword, value) {
            ("description", _) => return None,
            ("properties", Value::Object(properties)) => {
                Value::Object(properties.iter().map(|(name, p)| (name.clone(), without_descriptions(p))).collect())
            }
            ("items" | "additionalProperties", value) => without_descriptions(value),
            (_, value) => value.clone(),
        };
        Some((keyword.clone(), value))
    };
    Value::Object(schema.iter().filter_map(bare).collect())
}
