//! Objects in, model out: a pure function, evaluated incrementally.
//!
//! Each object is a *unit* that yields some resources. A change marks the units that depend on it; only those are computed again, and
//! only resources that came out different are reported. That equals computing everything from scratch, which the tests hold it to.
//!
//! ```text
//! Pod ◀── PodEnrolment, Node, Service (selector), EndpointSlice (targetRef), AuthorizationPolicy (selector), PeerAuthentication
//! WorkloadEntry ◀── as a Pod, but by selectors only; and both ◀── ServiceEntry (selector)
//! ServiceEntry ◀── Namespace, policies, and others that claim its hosts or addresses
//! all of these ◀── Gateway (by the labels that name it), Namespace (label), ConfigMap (pods only)
//! Service ◀── Namespace        EndpointSlice ◀── Service        PeerAuthentication ◀── PeerAuthentication of wider scope
//! everything with an address ◀── the root Namespace (network)
//! ```

mod egress;
mod hosts;
mod mtls;
mod service;
mod waypoint;
mod workload;

pub(crate) use waypoint::Bound;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use mesh_core::{
    index::{Resource, ResourceKey},
    pool::Pool,
};
use smallvec::SmallVec;

use crate::{
    objects::{EndpointSlice, Kind, Labels, Object, ObjectKey, PeerAuthentication, Service, Spec},
    problem::Problem,
    source::ObjectChange,
};

/// What the model depends on besides objects.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// Its policies apply to the whole mesh, its network label names the cluster's network.
    pub(crate) root_namespace: Arc<str>,
    pub(crate) trust_domain: Arc<str>,
    pub(crate) cluster_id: Arc<str>,
    /// The `cluster.local` of `web.demo.svc.cluster.local`.
    pub(crate) cluster_domain: Arc<str>,
    /// Whether who uses a waypoint can be reached through it only.
    pub(crate) allow_from_waypoint: bool,
}

/// Kinds that have addresses, and so a network.
const ADDRESSED: [Kind; 5] = [Kind::EndpointSlice, Kind::Pod, Kind::Service, Kind::ServiceEntry, Kind::WorkloadEntry];
/// Kinds that policies select by label.
const LABELLED: [Kind; 3] = [Kind::Pod, Kind::ServiceEntry, Kind::WorkloadEntry];

/// A resource that came out different.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ResourceChange {
    pub(crate) before: Option<Resource>,
    pub(crate) after: Option<Resource>,
}

/// Mostly one.
type Yield = SmallVec<[Resource; 1]>;

/// See the module's documentation.
pub(crate) struct ClusterIndex {
    settings: Settings,
    objects: BTreeMap<ObjectKey, Arc<Object>>,
    pods_by_node: BTreeMap<Arc<str>, BTreeSet<ObjectKey>>,
    claims: hosts::Claims,
    allocation: hosts::Allocation,
    /// What each unit yields now.
    yields: BTreeMap<ObjectKey, Yield>,
    texts: Pool<str>,
    /// Of each unit; what single objects cannot know.
    problems: BTreeMap<ObjectKey, Vec<Problem>>,
    /// Since they were last asked for.
    evaluated: BTreeSet<ObjectKey>,
}

impl ClusterIndex {
    pub(crate) fn new(settings: Settings) -> Self {
        let (objects, pods_by_node, claims, allocation, yields, texts, problems, evaluated) = Default::default();
        Self { settings, objects, pods_by_node, claims, allocation, yields, texts, problems, evaluated }
    }

    /// What is wrong between objects that are each right.
    pub(crate) fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.problems.values().flatten()
    }

    /// Objects of whose state something may have changed since the last call.
    pub(crate) fn take_evaluated(&mut self) -> BTreeSet<ObjectKey> {
        std::mem::take(&mut self.evaluated)
    }

    pub(crate) fn object(&self, key: &ObjectKey) -> Option<&Object> {
        self.objects.get(key).map(|object| &**object)
    }

    /// The resources as proxies see them.
    #[cfg(test)]
    pub(crate) fn model(&self) -> mesh_core::index::Index {
        let mut model = mesh_core::index::Index::default();
        model.set_policies_complete(true);
        let upserts = self.yields.values().flatten().cloned().collect();
        let provenance = mesh_core::index::Provenance::Xds;
        model.apply(mesh_core::index::Delta { provenance, upserts, removals: Vec::new() });
        model
    }

    pub(crate) fn apply(&mut self, changes: Vec<ObjectChange>) -> Vec<ResourceChange> {
        let mut units = BTreeSet::new();
        let entries_change = changes.iter().any(|(key, _)| key.kind == Kind::ServiceEntry);
        for (key, new) in changes {
            let old = self.replace(&key, new.clone());
            let versions: Vec<Arc<Object>> = [old, new].into_iter().flatten().collect();
            for object in &versions {
                self.dependents(object, &mut units);
            }
            units.insert(key);
        }
        if entries_change {
            units.extend(self.reallocate());
        }
        let changes: Vec<ResourceChange> = units.iter().flat_map(|unit| self.recompute(unit)).collect();
        self.evaluated.extend(units.into_iter().filter(|unit| unit.kind.is_stated()));
        changes
    }

    fn replace(&mut self, key: &ObjectKey, new: Option<Arc<Object>>) -> Option<Arc<Object>> {
        if let Some(node) = new.as_deref().and_then(node_of) {
            self.pods_by_node.entry(node.clone()).or_default().insert(key.clone());
        }
        let old = match new.clone() {
            Some(object) => self.objects.insert(key.clone(), object),
            None => self.objects.remove(key),
        };
        self.claim(old.as_deref(), new.as_deref());
        let (before, after) = (old.as_deref().and_then(node_of), new.as_deref().and_then(node_of));
        if let Some(node) = before.filter(|node| Some(*node) != after)
            && let Some(pods) = self.pods_by_node.get_mut(node)
        {
            pods.remove(key);
            if pods.is_empty() {
                self.pods_by_node.remove(node);
            }
        }
        old
    }

    /// Units other than the object itself that a change of this version of it may concern.
    fn dependents(&self, object: &Object, units: &mut BTreeSet<ObjectKey>) {
        let ObjectKey { namespace, name, .. } = &object.key;
        let is_root = *namespace == self.settings.root_namespace;
        match &object.spec {
            Spec::Pod(_) | Spec::WorkloadEntry(_) => {
                let gateway = labels_of(object).and_then(|labels| self.instance_of(namespace, labels));
                if let Some(gateway) = gateway.filter(|_| self.settings.allow_from_waypoint) {
                    self.gateway_units(&gateway, units);
                }
            }
            Spec::ServiceAccount => {}
            Spec::Gateway(_) => self.gateway_units(&object.key, units),
            Spec::MeshConfig(_) => units.extend(self.keys(Kind::Pod, None)),
            Spec::PodEnrolment(_) => drop(units.insert(ObjectKey::new(Kind::Pod, namespace, name))),
            Spec::Node(_) => units.extend(self.pods_by_node.get(name).into_iter().flatten().cloned()),
            Spec::Namespace(_) if *name == self.settings.root_namespace => {
                units.extend(ADDRESSED.iter().flat_map(|kind| self.keys(*kind, None)));
            }
            Spec::Namespace(_) => units.extend(ADDRESSED.iter().flat_map(|kind| self.keys(*kind, Some(name)))),
            Spec::ServiceEntry(_) => {
                self.members(object, units);
                self.rivals_of(object, units);
            }
            Spec::Service(_) => {
                self.members(object, units);
                self.rivals_of(object, units);
                let gateway = ObjectKey { kind: Kind::Gateway, ..object.key.clone() };
                if self.objects.contains_key(&gateway) {
                    self.gateway_units(&gateway, units);
                }
            }
            Spec::EndpointSlice(slice) => targets(namespace, slice, units),
            Spec::AuthorizationPolicy(policy) => {
                self.selected(&policy.selector, (!is_root).then_some(namespace), units);
            }
            Spec::PeerAuthentication(_) => {
                let within = (!is_root).then_some(namespace);
                let kinds = LABELLED.iter().chain([&Kind::PeerAuthentication]);
                units.extend(kinds.flat_map(|kind| self.keys(*kind, within)));
            }
        }
    }

    /// Others that claim a host or an address of this object, and what they select: who wins may have changed.
    fn rivals_of(&self, object: &Object, units: &mut BTreeSet<ObjectKey>) {
        for rival in self.rivals(object) {
            if let Some(object) = self.objects.get(&rival) {
                self.members(object, units);
            }
            units.insert(rival);
        }
    }

    /// The endpoints of a Service or ServiceEntry that are objects of their own.
    fn members(&self, object: &Object, units: &mut BTreeSet<ObjectKey>) {
        let ObjectKey { namespace, name, .. } = &object.key;
        match &object.spec {
            Spec::Service(service) => {
                self.selected(&service.selector, Some(namespace), units);
                for (key, slice) in self.slices(namespace).filter(|(_, slice)| slice.service.as_ref() == Some(name)) {
                    units.insert(key.clone());
                    targets(namespace, slice, units);
                }
            }
            Spec::ServiceEntry(entry) => self.selected(&entry.selector, Some(namespace), units),
            _ => {}
        }
    }

    /// What a non-empty selector matches.
    fn selected(&self, selector: &Labels, namespace: Option<&Arc<str>>, units: &mut BTreeSet<ObjectKey>) {
        if selector.is_empty() {
            return;
        }
        let all = LABELLED.iter().flat_map(|kind| self.objects_of(*kind, namespace));
        let matching = all.filter(|o| labels_of(o).is_some_and(|labels| matches(selector, labels)));
        units.extend(matching.map(|o| o.key.clone()));
    }

    fn recompute(&mut self, unit: &ObjectKey) -> Vec<ResourceChange> {
        let mut after = self.evaluate(unit);
        for resource in after.values_mut() {
            if let Resource::Workload(workload) = resource {
                Arc::make_mut(workload).share(&mut self.texts);
            }
        }
        let before: BTreeMap<ResourceKey, Resource> =
            self.yields.remove(unit).unwrap_or_default().into_iter().map(|r| (r.key(), r)).collect();
        let mut changes = Vec::new();
        for (key, old) in &before {
            if !after.contains_key(key) {
                changes.push(ResourceChange { before: Some(old.clone()), after: None });
            }
        }
        for (key, new) in &after {
            if before.get(key) != Some(new) {
                changes.push(ResourceChange { before: before.get(key).cloned(), after: Some(new.clone()) });
            }
        }
        if !after.is_empty() {
            self.yields.insert(unit.clone(), after.into_values().collect());
        }
        match self.unbound(unit) {
            problems if problems.is_empty() => drop(self.problems.remove(unit)),
            problems => drop(self.problems.insert(unit.clone(), problems)),
        }
        changes
    }

    fn evaluate(&self, unit: &ObjectKey) -> BTreeMap<ResourceKey, Resource> {
        let Some(object) = self.objects.get(unit) else { return BTreeMap::new() };
        let resources: Vec<Resource> = match &object.spec {
            Spec::AuthorizationPolicy(authorization) => {
                authorization.policy.iter().cloned().map(|p| Resource::Policy(Arc::new(p))).collect()
            }
            Spec::EndpointSlice(slice) => {
                self.slice_workloads(unit, slice).map(|w| Resource::Workload(Arc::new(w))).collect()
            }
            Spec::PeerAuthentication(peer) => {
                self.converted(unit, peer).map(|p| Resource::Policy(Arc::new(p))).into_iter().collect()
            }
            Spec::Pod(pod) => {
                self.pod_workload(unit, pod).map(|w| Resource::Workload(Arc::new(w))).into_iter().collect()
            }
            Spec::Service(service) => {
                self.service(unit, service).map(|s| Resource::Service(Arc::new(s))).into_iter().collect()
            }
            Spec::ServiceEntry(entry) => {
                let services = self.entry_services(unit, entry).into_iter().map(|s| Resource::Service(Arc::new(s)));
                let workloads = self.entry_workloads(unit, entry).into_iter();
                services.chain(workloads.map(|w| Resource::Workload(Arc::new(w)))).collect()
            }
            Spec::WorkloadEntry(entry) => {
                vec![Resource::Workload(Arc::new(self.workload_entry(unit, entry)))]
            }
            Spec::Gateway(_) => self.waypoint_policy(unit).map(|p| Resource::Policy(Arc::new(p))).into_iter().collect(),
            Spec::MeshConfig(_) | Spec::Namespace(_) | Spec::Node(_) | Spec::PodEnrolment(_) | Spec::ServiceAccount => {
                Vec::new()
            }
        };
        resources.into_iter().map(|r| (r.key(), r)).collect()
    }

    /// Objects of a kind, in one namespace or in all, by name.
    fn objects_of(&self, kind: Kind, namespace: Option<&Arc<str>>) -> impl Iterator<Item = &Arc<Object>> {
        let first = ObjectKey { kind, namespace: namespace.cloned().unwrap_or_default(), name: "".into() };
        let namespace = namespace.cloned();
        let within =
            move |key: &ObjectKey| key.kind == kind && namespace.as_ref().is_none_or(|ns| key.namespace == *ns);
        self.objects.range(first..).take_while(move |(key, _)| within(key)).map(|(_, object)| object)
    }

    fn keys(&self, kind: Kind, namespace: Option<&Arc<str>>) -> impl Iterator<Item = ObjectKey> {
        self.objects_of(kind, namespace).map(|o| o.key.clone())
    }

    fn services(&self, namespace: &Arc<str>) -> impl Iterator<Item = (&ObjectKey, &Service)> {
        self.objects_of(Kind::Service, Some(namespace)).filter_map(|o| match &o.spec {
            Spec::Service(service) => Some((&o.key, &**service)),
            _ => None,
        })
    }

    fn slices(&self, namespace: &Arc<str>) -> impl Iterator<Item = (&ObjectKey, &EndpointSlice)> {
        self.objects_of(Kind::EndpointSlice, Some(namespace)).filter_map(|o| match &o.spec {
            Spec::EndpointSlice(slice) => Some((&o.key, slice)),
            _ => None,
        })
    }

    fn peer_authentications(&self, namespace: &Arc<str>) -> impl Iterator<Item = (&ObjectKey, &PeerAuthentication)> {
        self.objects_of(Kind::PeerAuthentication, Some(namespace)).filter_map(|o| match &o.spec {
            Spec::PeerAuthentication(peer) => Some((&o.key, &**peer)),
            _ => None,
        })
    }

    fn namespace(&self, name: &Arc<str>) -> Option<&crate::objects::Namespace> {
        match &self.objects.get(&ObjectKey::new(Kind::Namespace, &"".into(), name))?.spec {
            Spec::Namespace(namespace) => Some(namespace),
            _ => None,
        }
    }

    fn network(&self) -> Arc<str> {
        self.namespace(&self.settings.root_namespace).and_then(|ns| ns.network.clone()).unwrap_or_default()
    }
}

/// Whether every label of a selector is there.
fn matches(selector: &Labels, labels: &Labels) -> bool {
    selector.iter().all(|(name, value)| labels.get(name) == Some(value))
}

fn labels_of(object: &Object) -> Option<&Labels> {
    match &object.spec {
        Spec::Pod(pod) => Some(&pod.labels),
        Spec::ServiceEntry(entry) => Some(&entry.labels),
        Spec::WorkloadEntry(entry) => Some(&entry.endpoint.labels),
        _ => None,
    }
}

fn node_of(object: &Object) -> Option<&Arc<str>> {
    match &object.spec {
        Spec::Pod(pod) => Some(&pod.node),
        _ => None,
    }
}

fn targets(namespace: &Arc<str>, slice: &EndpointSlice, units: &mut BTreeSet<ObjectKey>) {
    let pods = slice.endpoints.iter().filter_map(|e| e.pod.as_ref());
    units.extend(pods.map(|(name, _)| ObjectKey::new(Kind::Pod, namespace, name)));
}

#[cfg(test)]
mod tests;
