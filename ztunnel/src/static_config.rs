//! Facts that the operator wrote down beside the proxy (`LOCAL_XDS_PATH`, `LOCAL_XDS`): the same model as discovery's, in YAML.
//!
//! They are in force from the start. Discovery replaces a fact by sending one of the same key, and cannot remove one that it never
//! sent ([`Provenance::Static`]). A file is read again when it changes: as a whole, or not at all.

use std::{
    collections::BTreeSet,
    fmt,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use mesh_core::index::{Delta, Provenance, Resource, ResourceKey};
use mesh_runtime::drain::DrainWatcher;
use tokio::time::MissedTickBehavior;

use crate::state::State;

mod file;

/// How often a file is looked at. Polling also notices the symlinks by which Kubernetes swaps mounted files.
const LOOK: Duration = Duration::from_secs(2);
/// Far more than anybody writes by hand.
const MAX_SIZE: u64 = 64 << 20;

/// Where the facts are written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// `LOCAL_XDS_PATH`: a file, followed.
    File(PathBuf),
    /// `LOCAL_XDS`: the text itself.
    Inline(String),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "LOCAL_XDS_PATH: {}", path.display()),
            Self::Inline(_) => write!(f, "LOCAL_XDS"),
        }
    }
}

/// Why the facts cannot be used; then none of them is.
#[derive(Debug, thiserror::Error)]
#[error("{source_name}: {problem}")]
pub struct Unusable {
    source_name: String,
    problem: String,
}

/// The workloads, services and policies of a text.
///
/// # Errors
/// The first thing that is wrong, with line, column and what would be right.
pub fn parse(text: &str) -> Result<Vec<Resource>, String> {
    let resources = file::parse(text)?;
    let mut keys = BTreeSet::new();
    match resources.iter().map(Resource::key).find(|key| !keys.insert(key.clone())) {
        None => Ok(resources),
        Some(ResourceKey::Address(key)) => {
            Err(format!("`{key}` is there twice: expected one workload or service of it"))
        }
        Some(ResourceKey::Policy(key)) => Err(format!("policy `{key}` is there twice: expected one")),
    }
}

/// What was written down, as last read whole. Clones share it.
#[derive(Clone, Debug)]
pub struct StaticConfig {
    source: Source,
    resources: Arc<Mutex<Arc<Vec<Resource>>>>,
}

impl StaticConfig {
    /// Reads the source and puts it into force.
    ///
    /// # Errors
    /// When it cannot be read or used: which source, where in it, and what would be right.
    pub fn load(source: Source, state: &State) -> Result<Self, Unusable> {
        let text = read(&source)?;
        let config = Self { source, resources: Arc::default() };
        config.replace(&text, state)?;
        Ok(config)
    }

    /// For the configuration dump.
    pub fn resources(&self) -> Arc<Vec<Resource>> {
        self.resources.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Follows a file until the drain; a version that cannot be used leaves the one before in force. Returns at once for inline text.
    pub async fn follow(self, state: State, drain: DrainWatcher) {
        if matches!(self.source, Source::Inline(_)) {
            return;
        }
        let stop = drain.signalled();
        tokio::pin!(stop);
        let mut ticks = tokio::time::interval(LOOK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // Seen last, and put into force or complained about last. A file that is written in place is met half-written: only what two looks
        // agree on counts.
        let (mut last, mut done) = (None, None);
        loop {
            tokio::select! {
                _ = &mut stop => return,
                _ = ticks.tick() => {}
            }
            let source = self.source.clone();
            let Ok(read) = tokio::task::spawn_blocking(move || read(&source)).await else { return };
            let seen = read.map_err(|unusable| unusable.to_string());
            if last.as_ref() == Some(&seen) && done.as_ref() != Some(&seen) {
                self.look(&seen, &state);
                done = Some(seen.clone());
            }
            last = Some(seen);
        }
    }

    fn look(&self, seen: &Result<String, String>, state: &State) {
        let done = seen.clone().and_then(|text| {
            if text.trim().is_empty() && !self.resources().is_empty() {
                return Err(format!("{}: it is empty: expected `policies: []` and the like to have none", self.source));
            }
            self.replace(&text, state).map_err(|unusable| unusable.to_string())
        });
        if let Err(problem) = done {
            tracing::error!(problem, "static configuration not reloaded; the last good one stays in force");
        }
    }

    /// All of it or nothing; what is no longer written goes.
    fn replace(&self, text: &str, state: &State) -> Result<(), Unusable> {
        let fresh = parse(text).map_err(|problem| unusable(&self.source, problem))?;
        let former = self.resources();
        if *former == fresh {
            return Ok(());
        }
        let removals = former.iter().map(Resource::key).collect();
        let (workloads, services, policies) = counts(&fresh);
        let delta = Delta { provenance: Provenance::Static, upserts: fresh.clone(), removals };
        state.update(|index| index.apply(delta));
        *self.resources.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(fresh);
        tracing::info!(source = %self.source, workloads, services, policies, "static configuration in force");
        Ok(())
    }
}

fn counts(resources: &[Resource]) -> (usize, usize, usize) {
    let count = |wanted: fn(&Resource) -> bool| resources.iter().filter(|r| wanted(r)).count();
    (
        count(|r| matches!(r, Resource::Workload(_))),
        count(|r| matches!(r, Resource::Service(_))),
        count(|r| matches!(r, Resource::Policy(_))),
    )
}

fn read(source: &Source) -> Result<String, Unusable> {
    let path = match source {
        Source::Inline(text) => return Ok(text.clone()),
        Source::File(path) => path,
    };
    let cannot = |error: std::io::Error| unusable(source, format!("cannot be read: {error}"));
    let found = std::fs::metadata(path).map_err(cannot)?;
    if !found.is_file() {
        // Others may never end, or never begin.
        return Err(unusable(source, "expected a regular file".to_owned()));
    }
    if found.len() > MAX_SIZE {
        return Err(unusable(source, format!("expected at most {} MiB", MAX_SIZE >> 20)));
    }
    std::fs::read_to_string(path).map_err(cannot)
}

fn unusable(source: &Source, problem: String) -> Unusable {
    Unusable { source_name: source.to_string(), problem }
}

#[cfg(test)]
mod tests;
