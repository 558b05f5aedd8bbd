//! The state of an object, as the API server has it: what we told of it before.
//!
//! It is nobody's input but ours, so what cannot be read of it is nothing.

use std::{net::IpAddr, sync::Arc};

use crate::fields::{Cursor, Document, Fields};

/// Whether ztunnels enforce a policy as it is written.
pub(crate) const ACCEPTED: &str = "ZtunnelAccepted";
/// Whether who asks for a waypoint has it.
pub(crate) const BOUND: &str = "istio.io/WaypointBound";
/// That an entry asks for what only a waypoint does.
pub(crate) const MISSING: &str = "istio.io/WaypointMissing";
/// Conditions of these types are ours.
const TYPES: [&str; 3] = [ACCEPTED, BOUND, MISSING];

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Status {
    pub(crate) generation: Option<i64>,
    /// Of our types.
    pub(crate) conditions: Vec<Condition>,
    pub(crate) addresses: Vec<(Arc<str>, IpAddr)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Condition {
    pub(crate) kind: Arc<str>,
    pub(crate) is_true: bool,
    pub(crate) reason: Arc<str>,
    pub(crate) message: String,
    pub(crate) observed_generation: Option<i64>,
    /// When `is_true` last changed, in RFC 3339.
    pub(crate) since: Arc<str>,
}

impl Status {
    /// Of a whole object.
    pub(super) fn read(object: &Cursor<'_>) -> Self {
        let silent = Document::new(object.place());
        let object = object.reported_to(&silent);
        let Some(fields) = object.fields() else { return Self::default() };
        let generation = fields.get("metadata").and_then(|m| m.fields()).and_then(|m| number(&m, "generation"));
        let conditions = status(&fields).and_then(|status| status.get("conditions"));
        let conditions = conditions.map(|list| list.items()).unwrap_or_default();
        Self {
            generation,
            conditions: conditions.iter().filter_map(|item| condition(&item.fields()?)).collect(),
            addresses: assigned(&fields),
        }
    }
}

fn status<'a>(fields: &Fields<'a>) -> Option<Fields<'a>> {
    fields.get("status")?.fields()
}

fn number(fields: &Fields<'_>, name: &'static str) -> Option<i64> {
    fields.get(name)?.text()?.parse().ok()
}

fn condition(fields: &Fields<'_>) -> Option<Condition> {
    let text = |name| fields.get(name).and_then(|field| field.shared());
    let kind = text("type").filter(|kind| TYPES.contains(&&**kind))?;
    Some(Condition {
        kind,
        is_true: &*text("status")? == "True",
        reason: text("reason").unwrap_or_default(),
        message: text("message").map(|message| message.to_string()).unwrap_or_default(),
        observed_generation: number(fields, "observedGeneration"),
        since: text("lastTransitionTime").unwrap_or_default(),
    })
}

/// Host and address of what was allocated to a ServiceEntry.
pub(super) fn assigned(object: &Fields<'_>) -> Vec<(Arc<str>, IpAddr)> {
    let silent = Document::new(object.cursor.place());
    let Some(fields) = object.cursor.reported_to(&silent).fields() else { return Vec::new() };
    let addresses = status(&fields).and_then(|status| status.get("addresses"));
    let addresses = addresses.map(|list| list.items()).unwrap_or_default();
    let of = |item: &Cursor<'_>| {
        let fields = item.fields()?;
        Some((fields.get("host")?.shared()?, fields.get("value")?.text()?.parse().ok()?))
    };
    addresses.iter().filter_map(of).collect()
}
