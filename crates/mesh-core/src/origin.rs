//! Where a user wrote the thing that decided.

use std::{fmt, sync::Arc};

/// The object behind a decision, and its place as precisely as its source knew it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct Origin {
    /// `AuthorizationPolicy demo/allow-client`; empty when nobody wrote it (built in).
    pub object: Arc<str>,
    /// The file it was read from, when it was a file.
    pub file: Option<Arc<str>>,
    /// 1-based line in that file.
    pub line: Option<u32>,
    /// Path of the deciding field: `spec.rules[0]`.
    pub field: Option<Arc<str>>,
}

impl Origin {
    /// `policies.yaml:12`, when it was a file.
    pub fn place(&self) -> Option<String> {
        match (&self.file, self.line) {
            (Some(file), Some(line)) => Some(format!("{file}:{line}")),
            (Some(file), None) => Some(file.to_string()),
            (None, _) => None,
        }
    }
}

/// `AuthorizationPolicy demo/allow-client (policies.yaml:12, spec.rules[0])`.
impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.object.is_empty() { "built-in" } else { &self.object })?;
        match (self.place(), &self.field) {
            (Some(place), Some(field)) => write!(f, " ({place}, {field})"),
            (Some(place), None) => write!(f, " ({place})"),
            (None, Some(field)) => write!(f, " ({field})"),
            (None, None) => Ok(()),
        }
    }
}
