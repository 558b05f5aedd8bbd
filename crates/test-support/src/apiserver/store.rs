//! Objects, their versions, and what happened to them. Objects are kept as text, as they are sent: there may be many.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Bound,
    sync::Arc,
};

use serde_json::{Value, json};

use super::patch;

/// Where an object is.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) resource: String,
    pub(super) namespace: String,
    pub(super) name: String,
}

impl Key {
    pub(super) fn new(resource: &str, namespace: &str, name: &str) -> Self {
        Self { resource: resource.to_owned(), namespace: namespace.to_owned(), name: name.to_owned() }
    }

    pub(super) fn path(&self) -> String {
        let Self { resource, namespace, name } = self;
        match (namespace.as_str(), resource.rsplit_once('/')) {
            ("", _) | (_, None) => format!("/{resource}/{name}"),
            (namespace, Some((group, plural))) => format!("/{group}/namespaces/{namespace}/{plural}/{name}"),
        }
    }
}

/// An object in JSON. Items of lists do not say what they are, everything else does.
#[derive(Clone, Debug)]
pub(super) struct Text {
    /// `"apiVersion":"v1","kind":"Pod",`
    what: Arc<str>,
    /// Without that.
    rest: Arc<str>,
}

impl Text {
    fn of(mut object: Value) -> Self {
        let mut what = String::new();
        for field in ["apiVersion", "kind"] {
            if let Some(value) = object.as_object_mut().and_then(|fields| fields.remove(field)) {
                what += &format!("{}:{value},", json!(field));
            }
        }
        Self { what: what.into(), rest: object.to_string().into() }
    }

    pub(super) fn item(&self) -> &str {
        &self.rest
    }

    pub(super) fn whole(&self) -> String {
        format!("{{{}{}", self.what, &self.rest[1..])
    }

    pub(super) fn value(&self) -> Value {
        serde_json::from_str(&self.whole()).unwrap_or_default()
    }
}

#[derive(Debug)]
pub(super) struct Logged {
    pub(super) version: u64,
    pub(super) change: &'static str,
    pub(super) key: Key,
    pub(super) text: Text,
}

#[derive(Debug)]
pub(super) struct Store {
    objects: BTreeMap<Key, Text>,
    pub(super) version: u64,
    /// By resource, oldest first.
    log: HashMap<String, Vec<Logged>>,
    /// Watches from before this are gone.
    pub(super) forgotten: u64,
    unknown: BTreeSet<String>,
    /// By token.
    pub(super) reviews: HashMap<String, Value>,
    /// What each field manager last applied.
    applied: HashMap<(Key, String), Value>,
}

impl Default for Store {
    fn default() -> Self {
        let (objects, log, unknown, reviews, applied) = Default::default();
        Self { objects, version: 1, log, forgotten: 0, unknown, reviews, applied }
    }
}

fn text(object: &Value, field: &str) -> String {
    object["metadata"][field].as_str().unwrap_or_default().to_owned()
}

impl Store {
    pub(super) fn put(&mut self, resource: &str, mut object: Value) -> Value {
        self.version += 1;
        if text(&object, "name").is_empty() && !text(&object, "generateName").is_empty() {
            object["metadata"]["name"] = json!(format!("{}{}", text(&object, "generateName"), self.version));
        }
        let key = Key::new(resource, &text(&object, "namespace"), &text(&object, "name"));
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        if object["metadata"]["uid"].is_null() {
            let uid = self.get(&key).map_or_else(|| format!("uid-{}", self.version), |old| text(&old, "uid"));
            object["metadata"]["uid"] = json!(uid);
        }
        let stored = Text::of(object.clone());
        let change = match self.objects.insert(key.clone(), stored.clone()) {
            Some(_) => "MODIFIED",
            None => "ADDED",
        };
        self.record(change, key, stored);
        object
    }

    /// As clients delete: what has finalizers is there, marked, until somebody deletes it for good.
    pub(super) fn end(&mut self, key: &Key) -> Option<Value> {
        let mut object = self.get(key)?;
        if object["metadata"]["finalizers"].as_array().is_none_or(Vec::is_empty) {
            return self.delete(key);
        }
        object["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        Some(self.put(&key.resource, object))
    }

    pub(super) fn delete(&mut self, key: &Key) -> Option<Value> {
        let mut object = self.objects.remove(key)?.value();
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.record("DELETED", key.clone(), Text::of(object.clone()));
        Some(object)
    }

    fn record(&mut self, change: &'static str, key: Key, text: Text) {
        let log = self.log.entry(key.resource.clone()).or_default();
        log.push(Logged { version: self.version, change, key, text });
    }

    pub(super) fn get(&self, key: &Key) -> Option<Value> {
        self.objects.get(key).map(Text::value)
    }

    pub(super) fn contains(&self, key: &Key) -> bool {
        self.objects.contains_key(key)
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = &Key> {
        self.objects.keys()
    }

    /// Of a resource, those behind `after`.
    pub(super) fn objects_after<'a>(&'a self, after: &'a Key) -> impl Iterator<Item = (&'a Key, &'a Text)> {
        let range = self.objects.range((Bound::Excluded(after), Bound::Unbounded));
        range.take_while(|(key, _)| key.resource == after.resource)
    }

    /// What happened to objects of a resource after a version.
    pub(super) fn log_after(&self, resource: &str, version: u64) -> &[Logged] {
        let log = self.log.get(resource).map_or(&[][..], Vec::as_slice);
        &log[log.partition_point(|logged| logged.version <= version)..]
    }

    pub(super) fn forget(&mut self) {
        self.version += 1;
        self.forgotten = self.version;
        self.log.clear();
    }

    pub(super) fn know(&mut self, resource: &str, known: bool) {
        match known {
            true => self.unknown.remove(resource),
            false => self.unknown.insert(resource.to_owned()),
        };
    }

    pub(super) fn knows(&self, resource: &str) -> bool {
        !self.unknown.contains(resource)
    }

    /// The version an object is at.
    pub(super) fn version_of(&self, key: &Key) -> Option<String> {
        self.get(key).map(|object| text(&object, "resourceVersion"))
    }

    /// Merges what a manager applies, and takes back what it applied before and does not any more. Creates what is missing.
    pub(super) fn apply(&mut self, key: &Key, manager: &str, applied: Value, dry: bool) -> Value {
        let mut object = self.get(key).unwrap_or_else(|| json!({"metadata": {}}));
        if let Some(before) = self.applied.get(&(key.clone(), manager.to_owned())) {
            patch::prune(&mut object, before, &applied);
        }
        patch::apply(&mut object, &applied);
        object["metadata"]["name"] = json!(key.name);
        if !key.namespace.is_empty() {
            object["metadata"]["namespace"] = json!(key.namespace);
        }
        if key.resource.ends_with("/customresourcedefinitions") {
            object["status"]["conditions"] = json!([{"type": "Established", "status": "True"}]);
        }
        if dry {
            return object;
        }
        self.applied.insert((key.clone(), manager.to_owned()), applied);
        self.put(&key.resource, object)
    }
}
