//! Two-step shutdown: *drain* (stop accepting, finish what is open, GOAWAY) and, at the deadline, *stop*.
//!
//! Holding a [`DrainGuard`] is what keeps shutdown waiting; dropping it, by finishing or by cancellation, is what releases it.

use std::time::Duration;

use tokio::sync::{mpsc, watch};

/// How to leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrainMode {
    /// Finish what is open within the deadline.
    Graceful,
    /// Cut at once.
    Immediate,
}

/// Starts the drain and waits for it. One per scope (process, pod).
#[derive(Debug)]
pub struct DrainTrigger {
    signal: watch::Sender<Option<DrainMode>>,
    finished: mpsc::Receiver<()>,
}

/// Told when to leave. Clone one into everything that must be waited for.
#[derive(Clone, Debug)]
pub struct DrainWatcher {
    signal: watch::Receiver<Option<DrainMode>>,
    // Never sent on: its last drop is the news.
    held: mpsc::Sender<()>,
}

/// Keeps the drain waiting while it lives.
#[derive(Clone, Debug)]
#[must_use = "dropping the guard lets shutdown proceed"]
pub struct DrainGuard(#[expect(dead_code, reason = "held for its drop")] mpsc::Sender<()>);

/// What came of a drain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    /// Everything finished by itself.
    Complete,
    /// The deadline passed first; the rest was told to stop.
    Forced,
}

pub fn channel() -> (DrainTrigger, DrainWatcher) {
    let (signal, watch_signal) = watch::channel(None);
    let (held, finished) = mpsc::channel(1);
    (DrainTrigger { signal, finished }, DrainWatcher { signal: watch_signal, held })
}

impl DrainTrigger {
    /// Asks everyone to leave gracefully, waits until all watchers and guards are gone or `deadline` has passed, then tells the
    /// rest to stop at once. The caller must have dropped its own watchers.
    pub async fn drain(mut self, deadline: Duration) -> Drained {
        self.signal.send_replace(Some(DrainMode::Graceful));
        match tokio::time::timeout(deadline, self.finished.recv()).await {
            Ok(_) => Drained::Complete,
            Err(_) => {
                self.signal.send_replace(Some(DrainMode::Immediate));
                Drained::Forced
            }
        }
    }

    /// Tells everyone to stop at once and waits until they have, at most `deadline`.
    pub async fn stop(mut self, deadline: Duration) -> Drained {
        self.signal.send_replace(Some(DrainMode::Immediate));
        match tokio::time::timeout(deadline, self.finished.recv()).await {
            Ok(_) => Drained::Complete,
            Err(_) => Drained::Forced,
        }
    }
}

impl DrainWatcher {
    /// Completes when the drain starts (or its trigger is dropped, which counts as [`DrainMode::Immediate`]); shutdown waits for
    /// the guard. Cancel safe.
    pub async fn signalled(&self) -> (DrainMode, DrainGuard) {
        let mut signal = self.signal.clone();
        let mode = match signal.wait_for(Option::is_some).await {
            Ok(mode) => mode.unwrap_or(DrainMode::Immediate),
            Err(_) => DrainMode::Immediate,
        };
        (mode, self.guard())
    }

    /// Completes when everything must stop at once. Cancel safe.
    pub async fn stopped(&self) {
        let mut signal = self.signal.clone();
        // An error means that the trigger is gone, which is a stop too.
        drop(signal.wait_for(|mode| *mode == Some(DrainMode::Immediate)).await);
    }

    pub fn mode(&self) -> Option<DrainMode> {
        *self.signal.borrow()
    }

    pub fn is_draining(&self) -> bool {
        self.mode().is_some()
    }

    /// Keeps shutdown waiting until dropped.
    pub fn guard(&self) -> DrainGuard {
        DrainGuard(self.held.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn waits_for_the_last_guard() {
        let (trigger, watcher) = channel();
        let worker = tokio::spawn(async move {
            let (mode, guard) = watcher.signalled().await;
            tokio::time::advance(Duration::from_secs(2)).await;
            drop(guard);
            mode
        });
        assert_eq!(trigger.drain(Duration::from_secs(10)).await, Drained::Complete);
        assert_eq!(worker.await.unwrap(), DrainMode::Graceful);
    }

    #[tokio::test(start_paused = true)]
    async fn forces_after_the_deadline() {
        let (trigger, watcher) = channel();
        let stuck = watcher.clone();
        let draining = tokio::spawn(trigger.drain(Duration::from_secs(5)));
        stuck.stopped().await;
        assert_eq!(stuck.mode(), Some(DrainMode::Immediate));
        drop((stuck, watcher));
        assert_eq!(draining.await.unwrap(), Drained::Forced);
    }

    #[tokio::test]
    async fn a_dropped_trigger_is_a_stop() {
        let (trigger, watcher) = channel();
        drop(trigger);
        assert_eq!(watcher.signalled().await.0, DrainMode::Immediate);
        watcher.stopped().await;
    }
}
