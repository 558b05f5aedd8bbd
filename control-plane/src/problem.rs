//! What is wrong with a user's input, said so that it can be put right: what, where, and what would be right.

use std::{fmt, sync::Arc};

use serde::Serialize;

/// One thing wrong with a manifest.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Problem {
    /// Relative to the manifest folder.
    pub file: Arc<str>,
    /// 1-based.
    pub line: u32,
    /// Path within the document: `spec.rules[0].from`; empty for the document as a whole.
    pub field: String,
    pub message: String,
    /// What would be right, and what happens meanwhile.
    pub remedy: String,
}

/// `policies.yaml:12: spec.rules[0].form: unknown field; did you mean `from`?`
impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, line, field, message, remedy } = self;
        write!(f, "{file}:{line}: ")?;
        if !field.is_empty() {
            write!(f, "{field}: ")?;
        }
        write!(f, "{message}; {remedy}")
    }
}
