//! An object as the API server sends it, for the one way in which objects are read.

use std::{borrow::Cow, fmt, sync::Arc};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{Resource, core::DynamicResourceScope};
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor},
};

use super::Watched;
use crate::{
    objects::{self, ObjectKey, Read, Settings},
    problem::Place,
    yaml::{Entry, MAX_DEPTH, Node, Value},
};

/// Short-lived: [`Received::read`] turns it into what is kept.
#[derive(Clone, Debug)]
pub(crate) struct Received {
    /// Name, namespace and version.
    meta: ObjectMeta,
    fields: Vec<Entry>,
}

impl Received {
    pub(crate) fn key(&self, watched: &Watched) -> ObjectKey {
        let text = |text: &Option<String>| -> Arc<str> { text.as_deref().unwrap_or_default().into() };
        ObjectKey::new(watched.kind, &text(&self.meta.namespace), &text(&self.meta.name))
    }

    /// Named `name`, it is read like a document of that kind: items of lists do not say what they are.
    pub(crate) fn read(self, name: &Arc<str>, watched: &Watched, settings: &Settings) -> Read {
        let mut fields = self.fields;
        fields.retain(|entry| entry.key != "apiVersion" && entry.key != "kind");
        fields.push(entry("apiVersion".to_owned(), text(&*watched.api_version())));
        fields.push(entry("kind".to_owned(), text(watched.kind.name())));
        objects::read(&Place::object(name), &node(Value::Map(fields)), settings)
    }
}

impl Received {
    /// Gives an object that is being made the name it will have, but for its end.
    pub(crate) fn named(mut self) -> Self {
        let metadata = self.fields.iter_mut().find(|entry| entry.key == "metadata").map(|entry| &mut entry.value.value);
        if let (None, Some(Value::Map(metadata))) = (&self.meta.name, metadata)
            && let Some(Value::Text(start)) = metadata.iter().find(|e| e.key == "generateName").map(|e| &e.value.value)
        {
            let name = format!("{start}00000");
            metadata.push(entry("name".to_owned(), text(&name)));
            self.meta.name = Some(name);
        }
        self
    }

    pub(crate) fn is_going(&self) -> bool {
        let metadata = self.fields.iter().find(|entry| entry.key == "metadata").map(|entry| &entry.value.value);
        let is_time = |entry: &Entry| entry.key == "deletionTimestamp" && entry.value.value != Value::Null;
        matches!(metadata, Some(Value::Map(metadata)) if metadata.iter().any(is_time))
    }

    /// Whether what users ask for is the same in both; who they are and what came of them may differ.
    pub(crate) fn asks_the_same(&self, other: &Self) -> bool {
        let asked = |of: &Self| -> Vec<Entry> {
            let rest =
                of.fields.iter().filter(|entry| !["metadata", "status", "apiVersion", "kind"].contains(&&*entry.key));
            rest.cloned().collect()
        };
        asked(self) == asked(other)
    }
}

fn node(value: Value) -> Node {
    Node { line: 1, value }
}

fn text(text: impl ToString) -> Node {
    node(Value::Text(text.to_string()))
}

fn entry(key: String, value: Node) -> Entry {
    Entry { key, line: 1, value }
}

impl<'de> Deserialize<'de> for Received {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let node = Json { within: MAX_DEPTH }.deserialize(deserializer)?;
        let Value::Map(fields) = node.value else { return Err(serde::de::Error::custom("an object must have fields")) };
        let metadata = fields.iter().find(|entry| entry.key == "metadata").map(|entry| &entry.value.value);
        let of = |name: &str| match metadata {
            Some(Value::Map(metadata)) => metadata.iter().find(|e| e.key == name).and_then(|e| match &e.value.value {
                Value::Text(text) => Some(text.clone()),
                _ => None,
            }),
            _ => None,
        };
        let (name, namespace, resource_version) = (of("name"), of("namespace"), of("resourceVersion"));
        Ok(Self { meta: ObjectMeta { name, namespace, resource_version, ..ObjectMeta::default() }, fields })
    }
}

/// JSON as the tree that manifests are read from. What is nested deeper than those may be is nothing there, below a field that nobody
/// knows. Were it read on, an object of somebody who writes what he likes into such a field would be deeper than `serde_json` reads, and
/// with it the list of all of its kind lost.
#[derive(Clone, Copy)]
struct Json {
    within: usize,
}

impl<'de> DeserializeSeed<'de> for Json {
    type Value = Node;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        match self.within.checked_sub(1) {
            Some(within) => deserializer.deserialize_any(Tree(Self { within })).map(node),
            None => deserializer.deserialize_ignored_any(IgnoredAny).map(|_| node(Value::Null)),
        }
    }
}

/// With what is to become of what is in it.
struct Tree(Json);

impl<'de> Visitor<'de> for Tree {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Text(value.to_string()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Text(value.to_string()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Text(value.to_string()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Text(value.to_string()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Text(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::Text(value))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(self.0)? {
            list.push(item);
        }
        Ok(Value::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = fields.next_key::<String>()? {
            if IGNORED.contains(&&*key) {
                fields.next_value::<IgnoredAny>()?;
            } else {
                entries.push(entry(key, fields.next_value_seed(self.0)?));
            }
        }
        Ok(Value::Map(entries))
    }
}

/// Often half of an object, and nothing to us.
const IGNORED: [&str; 2] = ["managedFields", "kubectl.kubernetes.io/last-applied-configuration"];

impl Resource for Received {
    type DynamicType = Watched;
    type Scope = DynamicResourceScope;

    fn kind(watched: &Watched) -> Cow<'_, str> {
        watched.kind.name().into()
    }

    fn group(watched: &Watched) -> Cow<'_, str> {
        watched.group.into()
    }

    fn version(watched: &Watched) -> Cow<'_, str> {
        watched.version.into()
    }

    fn plural(watched: &Watched) -> Cow<'_, str> {
        watched.plural.into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.meta
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.meta
    }
}
