//! `fairway dump`: what a program knows, as its own admin page says it.

use std::process::ExitCode;

use anyhow::{Context as _, bail};
use serde_json::{Map, Value};

use crate::{
    args::Dump,
    mesh::{self, Mesh, Program},
};

pub(crate) fn run(query: &Dump) -> anyhow::Result<ExitCode> {
    let mesh = mesh::find(&query.place)?;
    let whole = dump(&*mesh, &query.program, query.part.as_deref())?;
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

fn dump(mesh: &dyn Mesh, program: &str, part: Option<&str>) -> anyhow::Result<Value> {
    let pages = |program: &Program, parts: &[(&str, &str)]| {
        let one = |(name, path): &(&str, &str)| Ok(((*name).to_owned(), mesh.fetch(program, path)?));
        parts.iter().map(one).collect::<anyhow::Result<Map<String, Value>>>().map(Value::Object)
    };
    match program.split_once('/') {
        Some(("ztunnel", node)) => {
            let program = Program::Ztunnel(node.to_owned());
            // Another implementation answers with everything; so is asked for when there is no such part.
            let only = part.filter(|part| part.bytes().all(|b| b.is_ascii_alphanumeric()));
            let only = only.and_then(|part| mesh.fetch(&program, &format!("/config_dump?part={part}")).ok());
            only.map_or_else(|| mesh.fetch(&program, "/config_dump"), Ok)
        }
        Some(("agent", node)) => pages(&Program::Agent(node.to_owned()), &[("pods", "/debug/pods")]),
        None if program == "fairwayd" => {
            pages(&Program::ControlPlane, &[("state", "/debug/state"), ("problems", "/debug/problems")])
        }
        _ => bail!("`{program}` is none of ztunnel/NODE, agent/NODE, fairwayd; `{}` lists nodes", mesh.lister("nodes")),
    }
}
