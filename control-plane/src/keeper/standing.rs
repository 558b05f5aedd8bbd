//! How a leader's watch stands.

use crate::{apiserver::watch::Event, metrics::Metrics};

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
