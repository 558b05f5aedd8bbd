//! What a leader's watch has told, kept; and how the watch stands.

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
            Event::Unknown | Event::Unserved(_) | Event::Failing(_) | Event::Recovered => {}
        }
    }
}

/// A watch's standing in logs and metrics, which are those of a leader only.
pub(super) struct Standing {
    /// Its name in the metrics, of no other watch.
    kind: &'static str,
    metrics: Metrics,
}

impl Standing {
    pub(super) fn new(kind: &'static str, metrics: &Metrics) -> Self {
        Self { kind, metrics: metrics.clone() }
    }

    pub(super) fn note<T>(&self, event: &Event<T>) {
        match event {
            Event::Failing(why) | Event::Unserved(why) => match self.metrics.watch_failed(self.kind) {
                true => tracing::warn!(kind = self.kind, why, "the watch failed; what is written stays as it is"),
                false => tracing::debug!(kind = self.kind, why, "the watch failed again"),
            },
            Event::Recovered | Event::Unknown => self.metrics.watch_recovered(self.kind),
            Event::Listing | Event::Set(_) | Event::Listed | Event::Gone(_) => {}
        }
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        self.metrics.watch_recovered(self.kind);
    }
}

#[cfg(test)]
mod tests {
    use mesh_runtime::metrics::Registry;

    use super::*;

    #[test]
    fn a_watch_that_fails_shows_until_it_goes_on_or_the_lead_is_lost() {
        let registry = Registry::new();
        let metrics = Metrics::register(&registry);
        let fails = || metrics.watch_is_failing("Kind of test");
        let standing = Standing::new("Kind of test", &metrics);
        let failing = || Event::<()>::Failing("refused".to_owned());
        standing.note(&failing());
        assert!(fails());
        standing.note(&Event::<()>::Recovered);
        assert!(!fails());
        standing.note(&failing());
        standing.note(&failing());
        assert!(fails());
        drop(standing);
        assert!(!fails(), "another leads, and watches");
    }
}
