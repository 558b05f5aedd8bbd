//! When to look at a watched folder again.

use std::{path::Path, time::Duration};

use notify::{RecursiveMode, Watcher as _};
use tokio::{sync::mpsc, time::Instant};

/// Reads at the latest this long after the first change of a burst.
const DEBOUNCE_LIMIT: Duration = Duration::from_millis(500);
/// Safety net for changes the kernel does not announce (some network and overlay file systems).
const POLL: Duration = Duration::from_secs(5);

/// Wakes when a folder, or a folder in it, may have changed. Kernel notifications where there are any; a slow poll always.
#[derive(Debug)]
pub struct Watch {
    events: mpsc::Receiver<()>,
    quiet: Duration,
    /// Held for its drop, which ends the watch. `None` leaves the poll only.
    watcher: Option<notify::RecommendedWatcher>,
}

fn is_written(kind: &notify::EventKind) -> bool {
    use notify::event::{AccessKind, AccessMode};
    *kind == notify::EventKind::Access(AccessKind::Close(AccessMode::Write))
}

impl Watch {
    /// `quiet` is how long nothing must happen after a change before it is told, so that a burst of writes is read once. Never
    /// fails: without kernel notifications, polling remains.
    pub fn new(folder: &Path, quiet: Duration) -> Self {
        // One pending wake-up stands for any number of events.
        let (sender, events) = mpsc::channel(1);
        let wake = move |event: notify::Result<notify::Event>| {
            // Reading is an event too: two readers of one folder would wake each other for ever.
            if !event.is_ok_and(|e| e.kind.is_access() && !is_written(&e.kind)) {
                sender.try_send(()).unwrap_or_default();
            }
        };
        let watcher = notify::recommended_watcher(wake).and_then(|mut watcher| {
            watcher.watch(folder, RecursiveMode::Recursive)?;
            Ok(watcher)
        });
        let watcher = watcher
            .inspect_err(
                |error| tracing::warn!(%error, folder = %folder.display(), "no file notifications; polling only"),
            )
            .ok();
        Self { events, quiet, watcher }
    }

    /// Whether the kernel notifies; otherwise make a new one once the folder exists.
    pub fn is_notified(&self) -> bool {
        self.watcher.is_some()
    }

    /// Completes when the folder may have changed and has been quiet for a moment, or at the next poll. Cancel safe.
    pub async fn changed(&mut self) {
        let poll = tokio::time::sleep(POLL);
        tokio::pin!(poll);
        tokio::select! {
            () = &mut poll => return,
            event = self.events.recv() => if event.is_none() {
                return poll.await; // the watcher failed to start
            },
        }
        let limit = Instant::now() + DEBOUNCE_LIMIT;
        loop {
            let quiet = (Instant::now() + self.quiet).min(limit);
            match tokio::time::timeout_at(quiet, self.events.recv()).await {
                Ok(Some(())) if Instant::now() < limit => {}
                _ => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    async fn wakes(watch: &mut Watch) -> bool {
        tokio::time::timeout(Duration::from_secs(2), watch.changed()).await.is_ok()
    }

    #[tokio::test]
    async fn writing_wakes_and_reading_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.yaml");
        let mut watch = Watch::new(dir.path(), Duration::from_millis(5));
        assert!(watch.is_notified());
        fs::write(&file, "a").unwrap();
        assert!(wakes(&mut watch).await);
        for _ in 0..10 {
            fs::read_to_string(&file).unwrap();
            fs::read_dir(dir.path()).unwrap().count();
        }
        assert!(!wakes(&mut watch).await, "reading woke the watcher");
        fs::rename(&file, dir.path().join("b.yaml")).unwrap();
        assert!(wakes(&mut watch).await);
    }
}
