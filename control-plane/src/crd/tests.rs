use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::{
    objects::{Settings, read},
    problem::{Place, Problem},
    yaml,
};

/// Fields whose inside is read by nobody at layer 4.
const UNREAD: [&str; 3] = ["spec.provider", "spec.targetRef", "spec.targetRefs[0]"];
/// No kind has this field, nor one that is nearly called so.
const UNKNOWN: &str = "somethingElseAltogether";
/// A key of maps whose keys are the user's; of some of them, ports.
const KEY: &str = "8080";

fn name(definition: &Value) -> &str {
    definition["metadata"]["name"].as_str().expect("a name")
}

fn versions(definition: &Value) -> &Vec<Value> {
    definition["spec"]["versions"].as_array().expect("versions")
}

fn schema(version: &Value) -> &Value {
    &version["schema"]["openAPIV3Schema"]
}

/// Every schema below one, with its path as problems tell it.
fn walk<'a>(path: &str, schema: &'a Value, visit: &mut impl FnMut(&str, &'a Value)) {
    visit(path, schema);
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        let below = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        walk(&below, property, visit);
    }
    if schema["items"].is_object() {
        walk(&format!("{path}[0]"), &schema["items"], visit);
    }
    if schema["additionalProperties"].is_object() {
        walk(&format!("{path}.{KEY}"), &schema["additionalProperties"], visit);
    }
}

/// A value with every field there is, and in each group of fields one that does not exist.
fn filled(schema: &Value) -> Value {
    match schema["type"].as_str().expect("a type") {
        "object" if schema["additionalProperties"].is_object() => json!({KEY: filled(&schema["additionalProperties"])}),
        "object" => {
            let properties = schema["properties"].as_object().expect("fields");
            let fields = properties.iter().map(|(name, property)| (name.clone(), filled(property)));
            Value::Object(fields.chain([(UNKNOWN.to_owned(), json!("x"))]).collect())
        }
        "array" => json!([filled(&schema["items"])]),
        "integer" => json!(1),
        _ => schema["enum"].get(0).cloned().unwrap_or_else(|| json!("x")),
    }
}

fn problems(definition: &Value, spec: &Value) -> Vec<Problem> {
    let spec_of = &definition["spec"];
    let object = json!({
        "apiVersion": format!("{}/v1", spec_of["group"].as_str().expect("a group")),
        "kind": spec_of["names"]["kind"],
        "metadata": {"namespace": "demo", "name": "x"},
        "spec": spec,
    });
    let node = yaml::documents(&object.to_string()).next().expect("a document").expect("JSON is YAML");
    let settings = Settings { root_namespace: "istio-system".into(), revision: "default".into() };
    read(&Place::object(&"x".into()), &node, &settings).problems
}

/// The names of fields, by the path of what they are fields of.
type Known = BTreeMap<String, BTreeSet<String>>;

/// What the reader asks for: it tells so where it meets a field that does not exist.
fn known_to_reader(definition: &Value, spec: &Value) -> Known {
    let mut known = Known::new();
    for problem in problems(definition, &filled(spec)) {
        let Some(path) = problem.field.strip_suffix(&format!(".{UNKNOWN}")) else {
            assert_ne!(problem.message, "unknown field", "{problem}");
            continue;
        };
        let names = problem.remedy.strip_prefix("known here: ").expect("the names of those that do");
        known.insert(path.to_owned(), names.split(", ").map(str::to_owned).collect());
    }
    known
}

fn known_to_schema(spec: &Value) -> Known {
    let mut known = Known::new();
    walk("spec", spec, &mut |path, schema| {
        if let Some(properties) = schema["properties"].as_object().filter(|_| !UNREAD.contains(&path)) {
            known.insert(path.to_owned(), properties.keys().cloned().collect());
        }
    });
    known
}

#[test]
fn definitions_and_the_reader_know_the_same_fields() {
    for definition in definitions() {
        let spec = &schema(&versions(&definition)[0])["properties"]["spec"];
        assert_eq!(known_to_reader(&definition, spec), known_to_schema(spec), "{}", name(&definition));
    }
}

#[test]
fn schemas_are_structural_and_change_nothing() {
    let keywords: BTreeSet<&str> = "additionalProperties anyOf description enum format items maxItems maxLength \
        maxProperties maximum minItems minLength minProperties minimum pattern properties required type \
        x-kubernetes-int-or-string x-kubernetes-list-map-keys x-kubernetes-list-type \
        x-kubernetes-preserve-unknown-fields x-kubernetes-validations"
        .split_whitespace()
        .collect();
    for definition in definitions() {
        for version in versions(&definition) {
            walk("", schema(version), &mut |path, schema| {
                let place = format!("{} {path}", name(&definition));
                let fields = schema.as_object().expect("a schema");
                let foreign: Vec<&String> = fields.keys().filter(|k| !keywords.contains(&***k)).collect();
                assert!(foreign.is_empty(), "{place}: {foreign:?}");
                let is_either = schema["x-kubernetes-int-or-string"] == true;
                assert_ne!(schema["type"].is_string(), is_either, "{place}");
                assert_eq!(schema["anyOf"].is_array(), is_either, "{place}");
                let takes_all = fields.contains_key("x-kubernetes-preserve-unknown-fields");
                assert_eq!(takes_all, path == "status", "{place}");
                for required in schema["required"].as_array().into_iter().flatten() {
                    let required = required.as_str().expect("a name");
                    assert!(schema["properties"][required].is_object(), "{place}: {required}");
                }
            });
        }
    }
}

#[test]
fn every_field_is_described_where_people_look() {
    for definition in definitions() {
        walk("", schema(&versions(&definition)[0]), &mut |path, schema| {
            for (field, property) in schema["properties"].as_object().into_iter().flatten() {
                assert!(property["description"].is_string(), "{} {path}.{field}", name(&definition));
            }
        });
    }
}

#[test]
fn older_versions_are_served_with_the_same_fields_and_v1_is_stored() {
    for definition in definitions() {
        let versions = versions(&definition);
        for version in versions {
            assert_eq!(version["served"], true);
            assert_eq!(version["storage"], version["name"] == "v1", "{}", name(&definition));
            assert_eq!(without_descriptions(schema(version)), without_descriptions(schema(&versions[0])));
        }
        assert!(versions.iter().any(|version| version["name"] == "v1beta1"), "{}", name(&definition));
    }
}
