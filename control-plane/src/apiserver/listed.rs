//! What a watch has told, kept; and what a new list says by not naming it.

use std::collections::{BTreeMap, BTreeSet};

use super::watch::Event;

/// What was known when a list began and the list has not named yet. Nothing while there is no list.
#[derive(Debug)]
pub(crate) struct Unlisted<N>(Option<BTreeSet<N>>);

impl<N> Default for Unlisted<N> {
    fn default() -> Self {
        Self(None)
    }
}

impl<N: Ord> Unlisted<N> {
    /// A list begins, also where an earlier one broke off.
    pub(crate) fn begin(&mut self, known: impl IntoIterator<Item = N>) {
        self.0 = Some(known.into_iter().collect());
    }

    pub(crate) fn named(&mut self, name: &N) {
        if let Some(unlisted) = &mut self.0 {
            unlisted.remove(name);
        }
    }

    /// The list is whole: whatever it did not name is gone. Nothing where none was begun.
    pub(crate) fn end(&mut self) -> BTreeSet<N> {
        self.0.take().unwrap_or_default()
    }
}

/// Objects by the name or namespace that tells them apart.
#[derive(Debug)]
pub(crate) struct Listed<T> {
    pub(crate) objects: BTreeMap<String, T>,
    unlisted: Unlisted<String>,
    /// Whether all of them were named once.
    pub(crate) complete: bool,
}

impl<T> Default for Listed<T> {
    fn default() -> Self {
        Self { objects: BTreeMap::new(), unlisted: Unlisted::default(), complete: false }
    }
}

impl<T> Listed<T> {
    pub(crate) fn on(&mut self, event: Event<(String, T)>) {
        match event {
            Event::Listing => self.unlisted.begin(self.objects.keys().cloned()),
            Event::Set((name, object)) => {
                self.unlisted.named(&name);
                self.objects.insert(name, object);
            }
            Event::Gone((name, _)) => drop(self.objects.remove(&name)),
            Event::Listed => {
                for name in self.unlisted.end() {
                    self.objects.remove(&name);
                }
                self.complete = true;
            }
            Event::Unknown | Event::Unserved(_) | Event::Failing(_) | Event::Recovered => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_whole_list_does_not_name_is_gone_and_one_that_breaks_off_takes_nothing() {
        let mut listed = Listed::default();
        let mut names = |events: &[&str]| {
            for event in events {
                listed.on(match *event {
                    "listing" => Event::Listing,
                    "listed" => Event::Listed,
                    "failing" => Event::Failing("cut".to_owned()),
                    name => Event::Set((name.to_owned(), ())),
                });
            }
            (listed.objects.keys().cloned().collect::<String>(), listed.complete)
        };
        assert_eq!(names(&["listing", "a", "b"]), ("ab".to_owned(), false));
        assert_eq!(names(&["listed"]), ("ab".to_owned(), true));
        assert_eq!(names(&["listing", "a", "failing"]), ("ab".to_owned(), true));
        assert_eq!(names(&["listing", "b", "c", "listed"]), ("bc".to_owned(), true));
        assert_eq!(names(&["listed"]), ("bc".to_owned(), true), "no list was begun");
    }
}
