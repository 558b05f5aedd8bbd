//! What a watch has told, kept.

use std::collections::{BTreeMap, BTreeSet};

use crate::apiserver::watch::Event;

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
