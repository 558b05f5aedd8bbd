//! The admin pages of a lab's programs.

use anyhow::{Context as _, ensure};
use lab::control::Lab;
use serde_json::Value;

/// A page in JSON, asked for from inside.
pub(crate) fn fetch(lab: &Lab, target: &str, port: u16, path: &str) -> anyhow::Result<Value> {
    let asked = lab.get(target, &format!("http://127.0.0.1:{port}{path}"));
    let (status, body) = asked.with_context(|| format!("{target} does not answer"))?;
    ensure!(status == 200, "{target} says {status}: {}", body.trim());
    serde_json::from_str(&body).with_context(|| format!("{target} does not answer in JSON"))
}
