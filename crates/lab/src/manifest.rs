//! Users' manifests, as the lab's kubelet reads them: it takes Pods, Services and Namespaces out (it has to fill in what an API
//! server would) and leaves every other document in place, on its own lines, for the control plane to read.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

/// One file, taken apart.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Split {
    /// The file with the documents below blanked out, so that line numbers still hold.
    pub rest: String,
    pub namespaces: Vec<Value>,
    pub pods: Vec<Value>,
    pub services: Vec<Value>,
    /// The line each of these starts on, by kind, namespace and name.
    pub lines: BTreeMap<(String, String, String), usize>,
}

/// Why a manifest was not taken; nothing of its file is applied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{file}:{line}: {message}")]
pub struct ManifestError {
    pub file: String,
    /// 1-based.
    pub line: usize,
    pub message: String,
}

/// # Errors
/// The first document that is not YAML, has no kind or name, or is a Pod that cannot run here.
pub fn split(file: &str, text: &str) -> Result<Split, ManifestError> {
    let mut out = Split::default();
    for document in documents(text) {
        let fail = |message: String| ManifestError { file: file.to_owned(), line: document.line, message };
        let value: Value = serde_saphyr::from_str(&document.text).map_err(|e| fail(first_line(&e.to_string())))?;
        if value.is_null() {
            out.rest.push_str(&document.blank());
            continue;
        }
        let kind = value["kind"].as_str().ok_or_else(|| fail("`kind` is missing".to_owned()))?.to_owned();
        check_name(&value["metadata"]["name"], "metadata.name").map_err(&fail)?;
        if !value["metadata"]["namespace"].is_null() {
            check_name(&value["metadata"]["namespace"], "metadata.namespace").map_err(&fail)?;
        }
        let list = match &*kind {
            "Namespace" => &mut out.namespaces,
            "Pod" => {
                check_pod(&value).map_err(&fail)?;
                &mut out.pods
            }
            "Service" => &mut out.services,
            "CronJob" | "DaemonSet" | "Deployment" | "Job" | "ReplicaSet" | "StatefulSet" => {
                return Err(fail(format!("the lab runs Pods only; write this {kind}'s template as `kind: Pod`")));
            }
            _ => {
                out.rest.push_str(&document.raw);
                continue;
            }
        };
        let value = with_defaults(value);
        let (namespace, name) = key(&value);
        out.lines.insert((kind, namespace, name), document.line);
        list.push(value);
        out.rest.push_str(&document.blank());
    }
    Ok(out)
}

/// A YAML document and where it starts.
struct Document {
    line: usize,
    /// As written, separator lines included.
    raw: String,
    /// Without separators.
    text: String,
}

impl Document {
    fn blank(&self) -> String {
        // Separators stay: they keep neighbours apart.
        self.raw.lines().map(|l| if l.starts_with("---") { "---\n" } else { "\n" }).collect()
    }
}

fn documents(text: &str) -> Vec<Document> {
    let mut out = vec![Document { line: 1, raw: String::new(), text: String::new() }];
    for (index, line) in text.lines().enumerate() {
        if line.starts_with("---") {
            out.push(Document { line: index + 1, raw: String::new(), text: String::new() });
        }
        if let Some(current) = out.last_mut() {
            current.raw.push_str(line);
            current.raw.push('\n');
            current.text.push_str(line.strip_prefix("---").unwrap_or(line));
            current.text.push('\n');
        }
    }
    out
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

/// A DNS subdomain (RFC 1123), as Kubernetes demands; it also becomes part of file names and tables.
fn check_name(value: &Value, field: &str) -> Result<(), String> {
    let name = match value {
        Value::Null => return Err(format!("`{field}` is missing")),
        Value::String(name) => name,
        other => return Err(format!("`{field}` is {other}, which is not a string; quote it")),
    };
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let valid = name.len() <= 253
        && name.split('.').all(|label| {
            label.starts_with(inner) && label.ends_with(inner) && label.chars().all(|c| inner(c) || c == '-')
        });
    if valid {
        return Ok(());
    }
    Err(format!("`{field}` {name:?} is not a valid name; use lower-case letters, digits, `-` and `.`, at most 253"))
}

fn check_pod(pod: &Value) -> Result<(), String> {
    let containers = pod["spec"]["containers"].as_array().filter(|c| !c.is_empty());
    let containers = containers.ok_or("`spec.containers` is missing or empty")?;
    for (i, container) in containers.iter().enumerate() {
        if container["command"].as_array().is_none_or(Vec::is_empty) {
            return Err(format!(
                "`spec.containers[{i}].command` is missing; the lab has no images, so it must say what to run on this machine"
            ));
        }
    }
    Ok(())
}

fn with_defaults(mut value: Value) -> Value {
    let kind = value["kind"].as_str().unwrap_or_default().to_owned();
    let metadata = value["metadata"].as_object_mut().map(std::mem::take).unwrap_or_default();
    let mut metadata: Map<String, Value> = metadata;
    if kind != "Namespace" {
        metadata.entry("namespace").or_insert_with(|| json!("default"));
    }
    value["metadata"] = Value::Object(metadata);
    value
}

/// `namespace/name` of a namespaced object.
pub fn key(value: &Value) -> (String, String) {
    let text = |field: &str| value["metadata"][field].as_str().unwrap_or_default().to_owned();
    (text("namespace"), text("name"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "\
# a comment
apiVersion: v1
kind: Pod
metadata: {name: a, namespace: demo}
spec:
  containers:
  - {name: c, command: [sleep, inf]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: p
  namespace: demo
---
apiVersion: v1
kind: Service
metadata: {name: s}
";

    #[test]
    fn what_remains_keeps_its_lines() {
        let split = split("f.yaml", FILE).unwrap();
        assert_eq!((split.pods.len(), split.services.len()), (1, 1));
        assert_eq!(key(&split.services[0]), ("default".to_owned(), "s".to_owned()));
        let lines: Vec<(&str, usize)> = split.lines.iter().map(|((kind, ..), line)| (&**kind, *line)).collect();
        assert_eq!(lines, [("Pod", 1), ("Service", 14)]);
        let line = split.rest.lines().position(|l| l.contains("AuthorizationPolicy")).unwrap();
        assert_eq!(FILE.lines().nth(line).unwrap(), "kind: AuthorizationPolicy");
        assert!(!split.rest.contains("kind: Pod") && !split.rest.contains("Service"));
    }

    #[test]
    fn says_where_and_what_instead() {
        let error = |text: &str| split("my.yaml", text).unwrap_err().to_string();
        assert!(error("a: 1\n---\nkind: Pod\nmetadata: {name: x}\n").contains("my.yaml:1: `kind` is missing"));
        assert!(
            error("kind: Pod\nmetadata: {name: x}\nspec: {containers: [{name: c}]}\n")
                .contains("containers[0].command")
        );
        assert!(
            error("kind: Deployment\nmetadata: {name: x}\n")
                .contains("write this Deployment's template as `kind: Pod`")
        );
        assert!(
            error("kind: Service\nmetadata: {name: \"a\\nb\"}\n")
                .contains("`metadata.name` \"a\\nb\" is not a valid name")
        );
        assert!(
            error("kind: Service\nmetadata: {name: 12}\n").contains("`metadata.name` is 12, which is not a string")
        );
        assert!(error("kind: Pod\nmetadata: {name: [\n").starts_with("my.yaml:1:"));
    }
}
