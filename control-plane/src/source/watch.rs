//! When to look at the folder again.

use std::{path::Path, time::Duration};

use notify::{RecursiveMode, Watcher as _};
use tokio::{sync::mpsc, time::Instant};

/// Quiet time after a change before reading, so that a burst of writes is read once.
const DEBOUNCE: Duration = Duration::from_millis(50);
/// Reads at the latest this long after the first change of a burst.
const DEBOUNCE_LIMIT: Duration = Duration::from_millis(500);
/// Safety net for changes the kernel does not announce (some network and overlay file systems).
const POLL: Duration = Duration::from_secs(5);

/// Wakes when the folder may have changed.
pub(crate) struct Watch {
    events: mpsc::Receiver<()>,
    /// Held for its drop, which ends the watch. `None` leaves the poll only.
    _watcher: Option<notify::RecommendedWatcher>,
}

fn is_written(kind: &notify::EventKind) -> bool {
    use notify::event::{AccessKind, AccessMode};
    *kind == notify::EventKind::Access(AccessKind::Close(AccessMode::Write))
}

impl Watch {
    /// Never fails: without kernel notifications, polling remains.
    pub(crate) fn new(folder: &Path) -> Self {
        // One pending wake-up stands for any number of events.
        let (sender, events) = mpsc::channel(1);
        let wake = move |event: notify::Result<notify::Event>| {
            // Our own reading is an event too.
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
        Self { events, _watcher: watcher }
    }

    /// Completes when the folder may have changed and has been quiet for a moment, or at the next poll. Cancel safe.
    pub(crate) async fn changed(&mut self) {
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
            let quiet = (Instant::now() + DEBOUNCE).min(limit);
            match tokio::time::timeout_at(quiet, self.events.recv()).await {
                Ok(Some(())) if Instant::now() < limit => {}
                _ => return,
            }
        }
    }
}
