//! What a watch has told, kept.

use std::collections::{BTreeMap, BTreeSet};

use crate::{apiserver::watch::Event, metrics::Metrics};

/// Objects by the name or namespace that tells them apart.
#[derive(Debug)]
pub(super) struct Listed<T> {
    pub(super) objects: BTreeMap<String, T>,
    /// Not named yet by the list under way.
    unlisted: Option<BTreeSet<String>>,
    /// Whether all of them were named once.
    pub(super) complete: bool,
}

impl<T> Default for Listed<T> {
    fn default() -> Self {
        Self { objects: BTreeMap::new(), unlisted: None, complete: false }
    }
}

impl<T> Listed<T> {
    pub(super) fn on(&mut self, event: Event<(String, T)>) {
        match event {
            Event::Listing => self.unlisted = Some(self.objects.keys().cloned().collect()),
            Event::Set((name, object)) => {
                if let Some(unlisted) = &mut self.unlisted {
                    unlisted.remove(&name);
                }
                self.objects.insert(name, object);
            }
            Event::Gone((name, _)) => drop(self.objects.remove(&name)),
            Event::Listed => {
                for name in self.unlisted.take().unwrap_or_default() {
                    self.objects.remove(&name);
                }
                self.complete = true;
            }
            Event::Unknown | Event::Failing(_) | Event::Recovered => {}
        }
    }
}

/// A watch's standing in the log and the metrics, which are those of a leader only.
pub(super) struct Standing {
    what: &'static str,
    metrics: Metrics,
}

impl Standing {
    pub(super) fn new(what: &'static str, metrics: &Metrics) -> Self {
        Self { what, metrics: metrics.clone() }
    }

    pub(super) fn note<T>(&self, event: &Event<T>) {
        match event {
            Event::Failing(why) => {
                let is_news = self.metrics.watch_failed(self.what);
                if is_news {
                    tracing::warn!(
                        why,
                        what = self.what,
                        "cannot be watched; what was published of the CA stays as it is"
                    );
                }
            }
            Event::Recovered | Event::Unknown => self.metrics.watch_recovered(self.what),
            _ => {}
        }
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        self.metrics.watch_recovered(self.what);
    }
}
