//! What a request is about.

use std::{collections::HashMap, fmt};

use hyper::{Method, Uri};
use serde_json::Value;

use super::store::Key;

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Asked {
    pub method: Method,
    pub path: String,
    pub query: String,
    pub body: String,
}

impl Asked {
    /// Whether it would change something.
    pub fn is_change(&self) -> bool {
        self.method != Method::GET && !self.query.contains("dryRun") && !self.path.ends_with("reviews")
    }
}

/// `PATCH /api/v1/… {…}`.
impl fmt::Display for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.method, self.path, self.body)
    }
}

pub(super) struct Target {
    pub(super) resource: String,
    pub(super) namespace: Option<String>,
    pub(super) name: Option<String>,
    pub(super) subresource: Option<String>,
    query: HashMap<String, String>,
}

impl Target {
    /// `None` for a path that is none of an object or a collection.
    pub(super) fn of(uri: &Uri) -> Option<Self> {
        let mut parts: Vec<&str> = uri.path().trim_matches('/').split('/').collect();
        let group = match parts[0] {
            "api" => 2,
            "apis" => 3,
            _ => return None,
        };
        if parts.len() <= group {
            return None;
        }
        let mut resource: Vec<&str> = parts.drain(..group).collect();
        let namespace = (parts.len() > 2 && parts[0] == "namespaces").then(|| {
            let taken: Vec<&str> = parts.drain(..2).collect();
            taken[1].to_owned()
        });
        resource.push(parts[0]);
        let own = |at: usize| parts.get(at).map(|part| (*part).to_owned());
        let pairs = uri.query().unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
        Some(Self {
            resource: resource.join("/"),
            namespace,
            name: own(1),
            subresource: own(2),
            query: pairs.map(|(name, value)| (name.to_owned(), decoded(value))).collect(),
        })
    }

    pub(super) fn key(&self) -> Key {
        let own = |text: &Option<String>| text.clone().unwrap_or_default();
        Key::new(&self.resource, &own(&self.namespace), &own(&self.name))
    }

    pub(super) fn parameter(&self, name: &str) -> Option<&str> {
        self.query.get(name).map(String::as_str).filter(|text| !text.is_empty())
    }

    pub(super) fn number(&self, name: &str) -> Option<u64> {
        self.parameter(name)?.parse().ok()
    }

    pub(super) fn is_watch(&self) -> bool {
        self.parameter("watch").is_some_and(|watch| watch != "false")
    }

    /// Whether this collection has an object; only what selectors say needs to look into it.
    pub(super) fn selects(&self, key: &Key, object: impl FnOnce() -> Value) -> bool {
        if self.namespace.as_ref().is_some_and(|namespace| *namespace != key.namespace) {
            return false;
        }
        let (fields, labels) = (self.terms("fieldSelector"), self.terms("labelSelector"));
        if fields.is_empty() && labels.is_empty() {
            return true;
        }
        let object = object();
        let field =
            |path: &str| &object[path.split('.').next().unwrap_or(path)][path.rsplit('.').next().unwrap_or(path)];
        fields.iter().all(|(path, value)| field(path) == value)
            && labels.iter().all(|(label, value)| object["metadata"]["labels"][label] == *value)
    }

    /// `a=b,c=d`. No other form is played, and what is none selects nothing.
    fn terms(&self, selector: &str) -> Vec<(&str, &str)> {
        let terms = self.parameter(selector).into_iter().flat_map(|text| text.split(','));
        terms.map(|term| term.split_once('=').unwrap_or((term, "\0"))).collect()
    }
}

fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, more)) = rest.split_first() {
        let escaped = (*first == b'%').then(|| more.get(..2)).flatten();
        let escaped = escaped.and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok());
        rest = if escaped.is_some() { &more[2..] } else { more };
        bytes.push(escaped.unwrap_or(if *first == b'+' { b' ' } else { *first }));
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
