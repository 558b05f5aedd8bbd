//! What came of objects, told where they are written: in their status, as `kubectl` shows it.
//!
//! What an object is to be told is a function of the objects and the model; what differs from what it says already waits in the
//! [`Sink`] for the leader, whose own writes come back by the watches and find nothing left to do.

mod pace;
mod sink;

use std::net::IpAddr;

use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    index::{Bound, ClusterIndex},
    objects::{ACCEPTED, AuthorizationPolicy, BOUND, Condition, Kind, MISSING, ObjectKey, ServiceEntry, Spec, Status},
    problem::Problem,
    source::kubernetes::Stated,
};

pub(crate) use sink::Sink;

const UNSUPPORTED: &str = "UnsupportedValue";
/// Longer messages are cut: a condition is read by people.
const MAX_MESSAGE: usize = 2048;

/// What an object is to be told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    conditions: Vec<Told>,
    /// Host and address that were allocated; `None` leaves alone whatever is there.
    addresses: Option<Vec<(String, IpAddr)>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Told {
    kind: &'static str,
    is_true: bool,
    reason: &'static str,
    message: String,
    observed_generation: Option<i64>,
}

/// The time as conditions have it.
pub(crate) fn now() -> String {
    Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// What an object is to be told; `problems` are those of its own text.
pub(crate) fn wanted(key: &ObjectKey, stated: &Stated, problems: &[Problem], index: &ClusterIndex) -> Wanted {
    match key.kind {
        Kind::AuthorizationPolicy | Kind::PeerAuthentication => {
            Wanted { conditions: policy(key, stated, problems, index).into_iter().collect(), addresses: None }
        }
        Kind::Service | Kind::WorkloadEntry => {
            Wanted { conditions: index.bound(key).map(|b| bound(&b)).into_iter().collect(), addresses: None }
        }
        Kind::ServiceEntry => {
            let asked = index.bound(key);
            let conditions =
                asked.as_ref().map(bound).into_iter().chain(missing(key, stated, problems, asked.is_some(), index));
            Wanted { conditions: conditions.collect(), addresses: addresses(key, index) }
        }
        _ => Wanted::default(),
    }
}

/// What ztunnels make of a policy, as its condition says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Acceptance {
    pub(crate) is_true: bool,
    reason: &'static str,
    pub(crate) message: String,
}

/// Whether ztunnels enforce a policy as it is written, if that is for them to say; `written` is an AuthorizationPolicy as it was read.
pub(crate) fn acceptance(
    rejected: bool,
    problems: &[Problem],
    written: Option<&AuthorizationPolicy>,
) -> Option<Acceptance> {
    let of = |is_true, reason, message: String| {
        Some(Acceptance { is_true, reason, message: message.chars().take(MAX_MESSAGE).collect() })
    };
    let all = || problems.iter().map(Problem::without_place).collect::<Vec<_>>().join("; ");
    if rejected {
        return of(
            false,
            UNSUPPORTED,
            format!("rejected, the last good version stays in force, or else what it selects is denied: {}", all()),
        );
    }
    match &written?.policy {
        Some(_) if problems.is_empty() => of(true, "Accepted", "accepted by ztunnel".to_owned()),
        Some(_) => of(true, UNSUPPORTED, format!("accepted, but not all of it: {}", all())),
        // Either its action enforces nothing at layer 4, or it is for waypoints, which is not for ztunnel to say anything of.
        None => problems.iter().any(|p| p.field == "spec.action").then(|| of(false, UNSUPPORTED, all()))?,
    }
}

fn policy(key: &ObjectKey, stated: &Stated, problems: &[Problem], index: &ClusterIndex) -> Option<Told> {
    let written = index.object(key).and_then(|object| match &object.spec {
        Spec::AuthorizationPolicy(policy) => Some(&**policy),
        _ => None,
    });
    let Acceptance { is_true, reason, message } = acceptance(stated.rejected, problems, written)?;
    Some(Told { kind: ACCEPTED, is_true, reason, message, observed_generation: stated.status.generation })
}

fn bound(bound: &Bound) -> Told {
    let Bound { waypoint, refused, canary_refused, ingress } = bound;
    let (is_true, reason, mut message) = match refused {
        Some((reason, message)) => (false, *reason, message.clone()),
        None => {
            let through = if *ingress { ", and ingress gateways go through it" } else { "" };
            let message = format!("bound to waypoint {}/{}{through}", waypoint.namespace, waypoint.name);
            (true, "WaypointAccepted", message)
        }
    };
    if let Some((reason, told)) = canary_refused {
        message = format!("{message}. The canary gets nothing: {reason}: {told}");
    }
    let message = message.chars().take(MAX_MESSAGE).collect();
    Told { kind: BOUND, is_true, reason, message, observed_generation: None }
}

/// What an entry asks for that only a waypoint does.
fn missing(
    key: &ObjectKey,
    stated: &Stated,
    problems: &[Problem],
    has_waypoint: bool,
    index: &ClusterIndex,
) -> Option<Told> {
    let dynamic = problems.iter().find(|p| p.field == "spec.resolution" && p.message.starts_with("DYNAMIC_DNS"));
    let (reason, message) = match (dynamic.filter(|_| stated.rejected), entry(key, index)) {
        (Some(problem), _) => ("NoWaypointForWildcardService", problem.without_place()),
        (None, Some(entry)) if entry.races && !has_waypoint => (
            "NoWaypointForRacingConnectStrategy",
            "only a waypoint races connections; label the entry istio.io/use-waypoint".to_owned(),
        ),
        _ => return None,
    };
    Some(Told { kind: MISSING, is_true: true, reason, message, observed_generation: None })
}

fn entry<'a>(key: &ObjectKey, index: &'a ClusterIndex) -> Option<&'a ServiceEntry> {
    match &index.object(key)?.spec {
        Spec::ServiceEntry(entry) => Some(entry),
        _ => None,
    }
}

fn addresses(key: &ObjectKey, index: &ClusterIndex) -> Option<Vec<(String, IpAddr)>> {
    let entry = entry(key, index).filter(|entry| entry.allocates)?;
    let of = |host| index.allocated(key, host).into_iter().map(move |address| (host.to_string(), address));
    Some(entry.hosts.iter().flat_map(of).collect())
}

/// The status to write, if it differs from what there is.
pub(crate) fn difference(wanted: &Wanted, status: &Status, now: &str) -> Option<Value> {
    let held = |told: &Told| status.conditions.iter().find(|condition| *condition.kind == *told.kind);
    let is_same = |told: &Told, held: &Condition| {
        held.is_true == told.is_true
            && *held.reason == *told.reason
            && held.message == told.message
            && held.observed_generation == told.observed_generation
    };
    let conditions_hold = status.conditions.len() == wanted.conditions.len()
        && wanted.conditions.iter().all(|told| held(told).is_some_and(|held| is_same(told, held)));
    let addresses_hold = wanted.addresses.as_ref().is_none_or(|wanted| {
        let has = |(host, address): &(String, IpAddr)| {
            status.addresses.iter().any(|(held, at)| **held == **host && at == address)
        };
        wanted.len() == status.addresses.len() && wanted.iter().all(has)
    });
    if conditions_hold && addresses_hold {
        return None;
    }
    let condition = |told: &Told| {
        let since = held(told).filter(|held| held.is_true == told.is_true && !held.since.is_empty());
        let mut condition = json!({
            "type": told.kind,
            "status": if told.is_true { "True" } else { "False" },
            "reason": told.reason,
            "message": told.message,
            "lastTransitionTime": since.map_or(now, |held| &held.since),
        });
        if let Some(generation) = told.observed_generation {
            condition["observedGeneration"] = json!(generation);
        }
        condition
    };
    let mut written = json!({"conditions": wanted.conditions.iter().map(condition).collect::<Vec<_>>()});
    if let Some(addresses) = &wanted.addresses {
        let address = |(host, address): &(String, IpAddr)| json!({"host": host, "value": address.to_string()});
        written["addresses"] = addresses.iter().map(address).collect();
    }
    Some(written)
}

#[cfg(test)]
mod tests;
