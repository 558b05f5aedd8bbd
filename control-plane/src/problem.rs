//! What is wrong with a user's input, said so that it can be put right: what, where, and what would be right.

use std::{fmt, sync::Arc};

use mesh_core::origin::Origin;
use serde::Serialize;

/// One thing wrong with a manifest.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Problem {
    #[serde(flatten)]
    pub place: Place,
    /// Path within the document: `spec.rules[0].from`; empty for the document as a whole.
    pub field: String,
    pub message: String,
    /// What would be right, and what happens meanwhile.
    pub remedy: String,
}

/// Where something is written.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(untagged)]
pub enum Place {
    File {
        /// Relative to the manifest folder.
        file: Arc<str>,
        /// 1-based.
        line: u32,
    },
    /// In the cluster, where there are no lines.
    Object {
        /// `AuthorizationPolicy demo/x`.
        object: Arc<str>,
    },
}

impl Place {
    pub(crate) fn file(file: &Arc<str>, line: u32) -> Self {
        Self::File { file: file.clone(), line }
    }

    pub(crate) fn object(object: &Arc<str>) -> Self {
        Self::Object { object: object.clone() }
    }

    /// Another line of the same document.
    pub(crate) fn at(&self, line: u32) -> Self {
        match self {
            Self::File { file, .. } => Self::file(file, line),
            Self::Object { .. } => self.clone(),
        }
    }

    /// What decides because of what is written here, told as being of `object`.
    pub(crate) fn origin(&self, object: Arc<str>, field: Option<Arc<str>>) -> Origin {
        let (file, line) = match self {
            Self::File { file, line } => (Some(file.clone()), Some(*line)),
            Self::Object { .. } => (None, None),
        };
        Origin { object, file, line, field }
    }
}

/// `policies.yaml:12`, or `AuthorizationPolicy demo/x`.
impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { file, line } => write!(f, "{file}:{line}"),
            Self::Object { object } => f.write_str(object),
        }
    }
}

impl Problem {
    /// `spec.rules[0].form: unknown field; did you mean `from`?`, for who knows where.
    pub(crate) fn without_place(&self) -> String {
        let Self { field, message, remedy, .. } = self;
        match field.is_empty() {
            true => format!("{message}; {remedy}"),
            false => format!("{field}: {message}; {remedy}"),
        }
    }
}

/// `policies.yaml:12: spec.rules[0].form: unknown field; did you mean `from`?`
impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.without_place())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_a_line_of_a_file_or_an_object() {
        let told = |place| Problem { place, field: "spec".into(), message: "m".into(), remedy: "r".into() };
        let (file, object) = ("p.yaml".into(), "AuthorizationPolicy demo/x".into());
        let (file, object) = (told(Place::file(&file, 3)), told(Place::object(&object).at(3)));
        assert_eq!(file.to_string(), "p.yaml:3: spec: m; r");
        assert_eq!(object.to_string(), "AuthorizationPolicy demo/x: spec: m; r");
        let json = |problem| serde_json::to_value::<Problem>(problem).unwrap();
        assert_eq!(
            json(file),
            serde_json::json!({"file": "p.yaml", "line": 3, "field": "spec", "message": "m", "remedy": "r"})
        );
        assert_eq!(
            json(object),
            serde_json::json!({"object": "AuthorizationPolicy demo/x", "field": "spec", "message": "m", "remedy": "r"})
        );
    }
}
