//! Steps and what they showed: on the terminal, and as JSON for the record.

use std::time::{Duration, Instant};

use serde::Serialize;

/// What one step showed, a line each.
pub(crate) type Evidence = anyhow::Result<Vec<String>>;

#[derive(Debug, Serialize)]
struct Step {
    name: &'static str,
    title: &'static str,
    ok: bool,
    seconds: f64,
    evidence: Vec<String>,
}

/// Prints steps as they end, and keeps them.
#[derive(Debug, Default)]
pub(crate) struct Report {
    steps: Vec<Step>,
}

impl Report {
    /// Runs a step; a failed one does not stop the run. Returns whether it was as promised.
    pub(crate) fn step(&mut self, name: &'static str, title: &'static str, run: impl FnOnce() -> Evidence) -> bool {
        let started = Instant::now();
        let outcome = run();
        let seconds = started.elapsed().as_secs_f64();
        let ok = outcome.is_ok();
        let evidence = outcome.unwrap_or_else(|error| vec![format!("{error:#}")]);
        println!("{:<10} {title}  {} ({seconds:.1} s)", name, if ok { "ok" } else { "NOT AS PROMISED" });
        evidence.iter().flat_map(|line| line.lines()).for_each(|line| println!("             {line}"));
        self.steps.push(Step { name, title, ok, seconds, evidence });
        ok
    }

    pub(crate) fn failed(&self) -> usize {
        self.steps.iter().filter(|step| !step.ok).count()
    }

    pub(crate) fn to_json(&self) -> anyhow::Result<String> {
        Ok(serde_json::to_string_pretty(&self.steps)?)
    }
}

/// `1.3 s`.
pub(crate) fn took(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}
