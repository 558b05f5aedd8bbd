//! Readiness: a list of what is still pending. Ready is when it is empty.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

/// Shared by everything that can hold a process back. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<Mutex<BTreeMap<String, usize>>>);

/// A reason not to be ready yet; gone when dropped.
#[derive(Debug)]
#[must_use = "dropping the reason declares it done"]
pub struct Pending {
    readiness: Readiness,
    name: String,
}

impl Readiness {
    /// Declares `name` pending until the returned value is dropped. The same name may be pending several times.
    pub fn pending(&self, name: impl Into<String>) -> Pending {
        let name = name.into();
        *self.lock().entry(name.clone()).or_default() += 1;
        Pending { readiness: self.clone(), name }
    }

    /// What is pending, sorted; empty means ready.
    pub fn list(&self) -> Vec<String> {
        self.lock().keys().cloned().collect()
    }

    pub fn is_ready(&self) -> bool {
        self.lock().is_empty()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, usize>> {
        // Counts cannot be left torn by a panic elsewhere.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        let mut map = self.readiness.lock();
        if let Some(count) = map.get_mut(&self.name) {
            *count -= 1;
            if *count == 0 {
                map.remove(&self.name);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_ready_when_the_last_reason_is_gone() {
        let readiness = Readiness::default();
        let (a, b) = (readiness.pending("xds"), readiness.pending("xds"));
        assert_eq!(readiness.list(), ["xds"]);
        drop(a);
        assert!(!readiness.is_ready());
        drop(b);
        assert!(readiness.is_ready());
    }
}
