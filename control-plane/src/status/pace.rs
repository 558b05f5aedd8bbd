//! How often an object is told: somebody else who keeps changing it back is not outrun.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use serde_json::Value;
use tokio::time::Instant;

use crate::objects::ObjectKey;

/// Between two writes of an object at least. Doubled each time the same is to be told again, up to [`LONGEST`].
const SHORTEST: Duration = Duration::from_secs(2);
const LONGEST: Duration = Duration::from_secs(60);
/// An object that was told nothing for so long has no rival.
const QUIET: Duration = Duration::from_secs(120);

/// What objects were told of late.
#[derive(Debug, Default)]
pub(super) struct Pace(BTreeMap<ObjectKey, Told>);

#[derive(Debug)]
struct Told {
    status: Arc<Value>,
    at: Instant,
    /// Before the same is told again.
    pause: Duration,
}

impl Pace {
    /// When an object may be told `status`; `None` if it was told nothing of late.
    pub(super) fn earliest(&self, key: &ObjectKey, status: &Value) -> Option<Instant> {
        let told = self.0.get(key)?;
        Some(told.at + if is_same(&told.status, status) { told.pause } else { SHORTEST })
    }

    /// An object was told `status`.
    pub(super) fn told(&mut self, key: ObjectKey, status: Arc<Value>, now: Instant) {
        let before = self.0.get(&key).filter(|told| now < told.at + QUIET && is_same(&told.status, &status));
        let pause = before.map_or(SHORTEST, |told| (told.pause * 2).min(LONGEST));
        self.0.insert(key, Told { status, at: now, pause });
    }

    /// Forgets objects that have been left alone.
    pub(super) fn forget(&mut self, now: Instant) {
        self.0.retain(|_, told| now < told.at + QUIET);
    }

    pub(super) fn forget_all(&mut self) {
        self.0.clear();
    }
}

/// Whether two statuses say the same, whenever they began to.
pub(super) fn is_same(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Object(one), Value::Object(other)) => {
            let says = |(field, value): (&String, &Value)| {
                field == "lastTransitionTime" || other.get(field).is_some_and(|other| is_same(value, other))
            };
            one.len() == other.len() && one.iter().all(says)
        }
        (Value::Array(one), Value::Array(other)) => {
            one.len() == other.len() && one.iter().zip(other).all(|(one, other)| is_same(one, other))
        }
        _ => one == other,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn statuses_are_the_same_but_for_their_times() {
        let status = |reason: &str, time: &str| json!({"conditions": [{"reason": reason, "lastTransitionTime": time}]});
        assert!(is_same(&status("a", "1"), &status("a", "2")));
        for other in [status("b", "1"), json!({"conditions": []}), json!({}), json!({"conditions": [{"reason": "a"}]})]
        {
            assert!(!is_same(&status("a", "1"), &other) && !is_same(&other, &status("a", "1")), "{other}");
        }
    }
}
