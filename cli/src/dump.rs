//! `fairway dump`: what a program knows, as its own admin page says it.

use std::process::ExitCode;

use anyhow::{Context as _, bail};
use lab::{
    components::{AGENT_ADMIN_PORT, CONTROL_ADMIN_PORT, ZTUNNEL_ADMIN_PORT},
    control::Lab,
};
use serde_json::{Map, Value};

use crate::{args::Dump, pages::fetch};

pub(crate) fn run(query: &Dump) -> anyhow::Result<ExitCode> {
    let lab = Lab::find(&query.name)?;
    let whole = dump(&lab, &query.program)?;
    let shown = match &query.part {
        None => whole,
        Some(part) => whole.get(part).cloned().with_context(|| {
            let parts: Vec<&str> = whole.as_object().into_iter().flat_map(Map::keys).map(String::as_str).collect();
            format!("{} has no part `{part}`; it has {}", query.program, parts.join(", "))
        })?,
    };
    crate::output::say!("{}", serde_json::to_string_pretty(&shown)?);
    Ok(ExitCode::SUCCESS)
}

fn dump(lab: &Lab, program: &str) -> anyhow::Result<Value> {
    let page = |target: &str, port: u16, path: &str| fetch(lab, target, port, path);
    let pages = |target: &str, port: u16, parts: &[(&str, &str)]| {
        let one = |(name, path): &(&str, &str)| Ok(((*name).to_owned(), fetch(lab, target, port, path)?));
        parts.iter().map(one).collect::<anyhow::Result<Map<String, Value>>>().map(Value::Object)
    };
    match program.split_once('/') {
        Some(("ztunnel", _)) => page(program, ZTUNNEL_ADMIN_PORT, "/config_dump"),
        Some(("agent", _)) => pages(program, AGENT_ADMIN_PORT, &[("pods", "/debug/pods")]),
        None if program == "fairwayd" => {
            pages("control", CONTROL_ADMIN_PORT, &[("state", "/debug/state"), ("problems", "/debug/problems")])
        }
        _ => bail!("`{program}` is none of ztunnel/NODE, agent/NODE, fairwayd; `fairway lab status` lists them"),
    }
}
