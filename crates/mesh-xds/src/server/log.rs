//! What changed, by name.

use std::{collections::VecDeque, sync::Arc};

/// Changes remembered for incremental pushes; a client further behind is compared name by name.
const LOG: usize = 65_536;

#[derive(Clone, Debug)]
pub(super) struct Logged {
    pub(super) sequence: u64,
    pub(super) name: Arc<str>,
}

/// What changed, oldest first.
#[derive(Debug, Default)]
pub(super) struct Log {
    entries: VecDeque<Logged>,
    /// Changes up to here are no longer in it.
    pub(super) trimmed: u64,
}

impl Log {
    pub(super) fn record(&mut self, entry: Logged) {
        self.entries.push_back(entry);
        if self.entries.len() > LOG
            && let Some(old) = self.entries.pop_front()
        {
            self.trimmed = old.sequence;
        }
    }

    /// No more than `most` entries behind `since`, and up to when they are everything.
    pub(super) fn after(&self, since: u64, most: usize, now: u64) -> (impl Iterator<Item = &Arc<str>>, u64) {
        let start = self.entries.partition_point(|entry| entry.sequence <= since);
        let end = start.saturating_add(most).min(self.entries.len());
        let until = if end < self.entries.len() { self.entries[end - 1].sequence } else { now };
        (self.entries.range(start..end).map(|entry| &entry.name), until)
    }
}
