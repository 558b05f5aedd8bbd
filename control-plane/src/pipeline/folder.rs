//! The pipeline of a folder of manifests.

use std::{collections::BTreeSet, path::PathBuf, sync::Arc, time::Duration};

use mesh_runtime::{drain::DrainWatcher, folder::Watch};
use tokio::{task::JoinError, time::Instant};

use super::Pipeline;
use crate::{
    app::TaskFailed,
    objects,
    problem::{Place, Problem},
    source::Folder,
};

/// Manifests must have been quiet for this long before they are read.
const QUIET: Duration = Duration::from_millis(50);
/// A start waits this long for files it cannot read to be corrected: policies in them may still be in force at the nodes.
const UNREAD_LIMIT: Duration = Duration::from_secs(30);

pub(crate) struct FolderPipeline {
    manifests: PathBuf,
    folder: Folder,
    pipeline: Pipeline,
    /// Files that could not be read at the start, and not since.
    unread: BTreeSet<Arc<str>>,
    /// When to start without those.
    unread_until: Option<Instant>,
}

impl FolderPipeline {
    pub(crate) fn new(manifests: PathBuf, settings: objects::Settings, pipeline: Pipeline) -> Self {
        let (unread, unread_until) = Default::default();
        let folder = Folder::new(manifests.clone(), settings);
        Self { manifests, folder, pipeline, unread, unread_until }
    }

    pub(crate) async fn run(self, drain: DrainWatcher) -> Result<(), TaskFailed> {
        let manifests = self.manifests.clone();
        let mut pipeline = self;
        let mut watch = Watch::new(&manifests, QUIET);
        loop {
            let was_readable = pipeline.folder.is_readable();
            let step = tokio::task::spawn_blocking(|| pipeline.step(Instant::now()));
            pipeline = step.await.map_err(TaskFailed::of::<JoinError>("the source"))?;
            if !was_readable && pipeline.folder.is_readable() {
                // What was not there could not be watched; and a folder that is removed takes its watch with it.
                watch = Watch::new(&manifests, QUIET);
                continue;
            }
            let unread_until = pipeline.unread_until.filter(|until| *until > Instant::now());
            let waited = async {
                match unread_until {
                    Some(until) => tokio::time::sleep_until(until).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = watch.changed() => {}
                () = waited => {}
                _ = drain.signalled() => return Ok(()),
            }
        }
    }

    /// Reads what changed and publishes what follows from it. Blocks.
    fn step(mut self, now: Instant) -> Self {
        let changes = self.folder.scan();
        let read = self.folder.is_readable();
        self.pipeline.apply(changes);
        let unread = self.folder.catalogue.unread();
        match self.pipeline.is_starting() {
            true => self.unread = unread,
            false => self.unread.retain(|file| unread.contains(file)),
        }
        let problems = self.folder.problems().into_iter().chain(self.unread.iter().map(unread_problem));
        self.pipeline.report(problems.collect(), Vec::new(), self.folder.versions().collect());
        // An unreadable folder must not look like an empty mesh to those who connect.
        if read && self.pipeline.is_starting() && !self.waits_for_unread(now) {
            self.pipeline.set_ready(self.folder.catalogue.len());
            self.unread_until = None;
        }
        self
    }

    /// Whether the start has to wait: nodes would drop the policies of files that cannot be read. Not for ever, for those of all other
    /// files count too.
    fn waits_for_unread(&mut self, now: Instant) -> bool {
        if self.unread.is_empty() {
            return false;
        }
        let files = self.unread.iter().map(|file| &**file).collect::<Vec<_>>().join(", ");
        let until = *self.unread_until.get_or_insert_with(|| {
            tracing::warn!(files, limit = ?UNREAD_LIMIT, "files cannot be read, waiting for them to be corrected or removed");
            now + UNREAD_LIMIT
        });
        let waits = now < until;
        if waits {
            self.pipeline.awaits(format!("manifests that cannot be read: {files}"));
        } else {
            tracing::error!(files, "starting without files that cannot be read: policies in them are not in force");
        }
        waits
    }
}

fn unread_problem(file: &Arc<str>) -> Problem {
    Problem {
        place: Place::file(file, 1),
        field: String::new(),
        message: "the file could not be read whole since the control plane started".to_owned(),
        remedy: "correct or remove it; until then policies that cannot be read from it are not in force".to_owned(),
    }
}

#[cfg(test)]
mod tests;
