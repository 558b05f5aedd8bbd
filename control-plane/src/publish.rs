//! Model changes → the discovery cache.

use std::sync::Arc;

use mesh_core::{
    index::{Resource, ResourceKey},
    workload::Health,
};
use mesh_xds::{
    convert::resource_to_wire,
    server::{Change, Lane},
};
use proto::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL};

use crate::index::ResourceChange;

/// New policies come before the workloads that name them, and old ones go after: at no point does a workload name a policy that is
/// not there.
pub(crate) fn cache_changes(changes: &[ResourceChange]) -> Vec<Change> {
    let mut ordered: Vec<&ResourceChange> = changes.iter().collect();
    ordered.sort_by_key(|change| match (&change.before, &change.after) {
        (_, Some(Resource::Policy(_))) => 0,
        (Some(Resource::Policy(_)), None) => 2,
        _ => 1,
    });
    ordered.into_iter().filter_map(cache_change).collect()
}

fn cache_change(change: &ResourceChange) -> Option<Change> {
    let lane = lane(change);
    if let Some(after) = &change.after {
        return Some(Change::Upsert { encoded: resource_to_wire(after), lane });
    }
    let (type_url, name): (_, Arc<str>) = match change.before.as_ref()?.key() {
        ResourceKey::Address(name) => (ADDRESS_TYPE_URL, name),
        ResourceKey::Policy(name) => (AUTHORIZATION_TYPE_URL, name),
    };
    Some(Change::Remove { type_url, name, lane })
}

/// An endpoint that stops taking traffic overtakes everything else: each moment more costs connections.
fn lane(change: &ResourceChange) -> Lane {
    let serves = |r: &Option<Resource>| matches!(r, Some(Resource::Workload(w)) if w.health == Health::Healthy);
    if serves(&change.before) && !serves(&change.after) { Lane::Urgent } else { Lane::Bulk }
}

#[cfg(test)]
mod tests {
    use mesh_core::{
        origin::Origin,
        policy::{Action, Policy, Scope},
        workload::Workload,
    };

    use super::*;

    fn workload(health: Health) -> Resource {
        Resource::Workload(Arc::new(Workload { health, ..Workload::new("c//Pod/demo/a", "demo", "a") }))
    }

    fn policy() -> Resource {
        let (name, namespace, origin) = ("p".into(), "demo".into(), Origin::default());
        let (scope, action) = (Scope::WorkloadSelector, Action::Deny);
        Resource::Policy(Arc::new(Policy { name, namespace, scope, action, rules: Vec::new(), dry_run: false, origin }))
    }

    #[test]
    fn policies_come_first_and_go_last() {
        let change = |before, after| ResourceChange { before, after };
        let changes =
            [change(Some(policy()), None), change(None, Some(workload(Health::Healthy))), change(None, Some(policy()))];
        let order: Vec<&str> = cache_changes(&changes)
            .iter()
            .map(|change| match change {
                Change::Upsert { encoded, .. } if encoded.type_url == AUTHORIZATION_TYPE_URL => "new policy",
                Change::Upsert { .. } => "workload",
                Change::Remove { .. } => "old policy",
            })
            .collect();
        assert_eq!(order, ["new policy", "workload", "old policy"]);
    }

    #[test]
    fn an_endpoint_that_stops_serving_is_urgent() {
        let (healthy, sick) = (|| Some(workload(Health::Healthy)), || Some(workload(Health::Unhealthy)));
        let table = [
            (healthy(), sick(), Lane::Urgent),
            (healthy(), None, Lane::Urgent),
            (sick(), None, Lane::Bulk),
            (sick(), healthy(), Lane::Bulk),
            (None, healthy(), Lane::Bulk),
        ];
        for (before, after, expected) in table {
            assert_eq!(lane(&ResourceChange { before, after }), expected);
        }
    }
}
