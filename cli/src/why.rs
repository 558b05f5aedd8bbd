//! `fairway why`: asks the live programs on both ends what they would do with a connection, has them try the way, and says what decides.
//!
//! Nothing is re-implemented here: each end answers with the same functions, on the same state, that decide real connections. `facts` asks,
//! `findings` puts what was answered into the order of a connection.

mod facts;
mod findings;
mod names;

use std::process::ExitCode;

use serde_json::{Value, json};

use self::{facts::Facts, findings::Finding};
use crate::{
    args::Why,
    mesh::{self, Mesh},
    output,
};

/// Exit status for "it cannot": not an error of this program.
const CANNOT: u8 = 3;

/// What both ends said, and what follows from it.
#[derive(Debug)]
pub(crate) struct Explanation {
    facts: Facts,
    findings: Vec<Finding>,
}

pub(crate) fn run(query: &Why) -> anyhow::Result<ExitCode> {
    let mesh = mesh::find(&query.place)?;
    mesh.installed()?;
    let source = match &query.namespace {
        Some(namespace) if !query.source.contains('/') => format!("{namespace}/{}", query.source),
        _ => query.source.clone(),
    };
    let explanation = explain(&*mesh, &source, &query.destination)?;
    crate::output::say!("{}", query.output.render(&explanation.json(), || explanation.text())?);
    Ok(match explanation.allowed() {
        Some(true) => ExitCode::SUCCESS,
        Some(false) => ExitCode::from(CANNOT),
        None => ExitCode::from(output::NOTHING_KNOWN),
    })
}

/// Asks both ends.
///
/// # Errors
/// When a pod, service or port does not exist, or the question cannot be put.
pub(crate) fn explain(mesh: &dyn Mesh, source: &str, destination: &str) -> anyhow::Result<Explanation> {
    let facts = facts::gather(mesh, source, destination)?;
    let findings = findings::of(&facts);
    Ok(Explanation { facts, findings })
}

impl Explanation {
    /// `None`: nothing is known of it.
    pub(crate) fn allowed(&self) -> Option<bool> {
        match self.findings.iter().any(|finding| finding.blocks) {
            true => Some(false),
            false => (!self.facts.is_outside()).then_some(true),
        }
    }

    pub(crate) fn json(&self) -> Value {
        json!({
            "source": self.facts.source.name,
            "destination": self.facts.destination,
            "allowed": self.allowed(),
            "findings": self.findings,
            "outbound": self.facts.outbound,
            "inbound": self.facts.inbound,
        })
    }

    /// The verdict first, then what decides, then what else is worth knowing, then how the connection travels.
    pub(crate) fn text(&self) -> String {
        let verdict = match self.allowed() {
            Some(true) => output::good("can reach"),
            Some(false) => output::bad("cannot reach"),
            None => output::dim("may or may not reach"),
        };
        let mut lines = vec![format!("{} {verdict} {}", self.facts.source.name, self.facts.destination)];
        let (blocking, notes): (Vec<&Finding>, Vec<&Finding>) = self.findings.iter().partition(|f| f.blocks);
        for finding in blocking.into_iter().chain(notes) {
            lines.push(format!("{}: {}", finding.end, finding.says));
            if let Some(decided_by) = finding.decided_by() {
                lines.push(format!("  decided by {decided_by}"));
            }
            if !finding.remedy.is_empty() {
                lines.push(format!("  remedy: {}", finding.remedy));
            }
        }
        lines.push(format!("way: {}", self.facts.way()));
        lines.join("\n")
    }
}
