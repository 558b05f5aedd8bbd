//! Who goes through which waypoint.
//!
//! An object's own label counts before its namespace's, and a label that cannot be followed binds nothing: it does not fall back. Traffic
//! then goes around the waypoint that was meant, so every such label is a [`Problem`] at its place.

use std::{collections::BTreeSet, sync::Arc};

use mesh_core::{
    addr::NetworkAddress,
    identity::Identity,
    policy::{Action, Clause, Match, Policy, Rule, Scope, StringMatch},
    select::HBONE_PORT,
    service::{Service, Visibility},
    workload::{ApplicationTunnel, GatewayAddress, GatewayDestination},
};

use super::{ClusterIndex, matches};
use crate::{
    objects::{AllowedFrom, Binding, FieldPlace, Gateway, GatewayHost, Kind, Labels, Object, ObjectKey, Spec, Wanted},
    problem::Problem,
};

/// Names the Gateway a pod is an instance of.
const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";
/// A waypoint that does not serve that kind of traffic.
const UNSUPPORTED: &str = "UnsupportedTrafficType";
/// Kinds that can be bound.
const BINDABLE: [Kind; 4] = [Kind::Pod, Kind::Service, Kind::ServiceEntry, Kind::WorkloadEntry];

/// Why a label binds nothing, what would help, and the reason's name in a condition.
struct Unbound(String, &'static str, &'static str);

/// What came of an object's wish for a waypoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bound {
    pub(crate) waypoint: ObjectKey,
    /// Reason and message.
    pub(crate) refused: Option<(&'static str, String)>,
    pub(crate) canary_refused: Option<(&'static str, String)>,
    pub(crate) ingress: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Traffic {
    Service,
    Workload,
}

impl ClusterIndex {
    /// Sets what the binding of a Service or ServiceEntry says.
    pub(super) fn bind_service(&self, key: &ObjectKey, service: Service) -> Service {
        let Some(object) = self.objects.get(key) else { return service };
        let of_namespace = self.namespace_binding(&key.namespace);
        let ingress = object.binding().ingress.or_else(|| of_namespace?.ingress).unwrap_or(false);
        let Some((waypoint, canary)) = self.service_waypoints(object) else {
            return Service { ingress_use_waypoint: ingress, ..service };
        };
        let weighted = canary.map(|(canary, weight)| vec![(waypoint.clone(), 100 - weight), (canary, weight)]);
        Service {
            waypoint: Some(waypoint),
            weighted_waypoints: weighted.unwrap_or_default(),
            ingress_use_waypoint: ingress,
            ..service
        }
    }

    fn service_waypoints(&self, object: &Object) -> Option<(GatewayAddress, Option<(GatewayAddress, u32)>)> {
        let level = self.service_level(object)?;
        let Some(Wanted::Gateway(wanted)) = &level.waypoint else { return None };
        let follow = |gateway: &ObjectKey| self.follow(gateway, object, Traffic::Service).ok();
        let waypoint = follow(wanted)?;
        Some((waypoint, level.canary.as_ref().and_then(|(gateway, weight)| Some((follow(gateway)?, *weight)))))
    }

    /// The labels that count for a service; a gateway's own has none.
    fn service_level<'a>(&'a self, object: &'a Object) -> Option<&'a Binding> {
        let own_gateway = ObjectKey { kind: Kind::Gateway, ..object.key.clone() };
        let is_gateway = matches!(&object.spec, Spec::Service(service) if service.is_gateway)
            || object.key.kind == Kind::Service && self.waypoint(&own_gateway).is_some();
        (!is_gateway).then(|| self.level(object.binding(), &object.key.namespace)).flatten()
    }

    fn level<'a>(&'a self, own: &'a Binding, namespace: &Arc<str>) -> Option<&'a Binding> {
        if own.waypoint.is_some() { Some(own) } else { self.namespace_binding(namespace) }
    }

    fn namespace_binding(&self, name: &Arc<str>) -> Option<&Binding> {
        Some(self.objects.get(&ObjectKey::new(Kind::Namespace, &"".into(), name))?.binding())
    }

    /// The waypoint for traffic addressed to a workload itself.
    pub(super) fn workload_waypoint(&self, key: &ObjectKey, own: &Binding, labels: &Labels) -> Option<GatewayAddress> {
        if self.instance_of(&key.namespace, labels).is_some_and(|gateway| self.waypoint(&gateway).is_some()) {
            return None;
        }
        let Some(Wanted::Gateway(wanted)) = &self.level(own, &key.namespace)?.waypoint else { return None };
        self.follow(wanted, self.objects.get(key)?, Traffic::Workload).ok()
    }

    /// How ztunnel hands connections to the proxy of a waypoint's own pods.
    pub(super) fn application_tunnel(&self, namespace: &Arc<str>, labels: &Labels) -> Option<ApplicationTunnel> {
        self.waypoint(&self.instance_of(namespace, labels)?)?.application_tunnel.clone()
    }

    pub(super) fn instance_of(&self, namespace: &Arc<str>, labels: &Labels) -> Option<ObjectKey> {
        labels.get(GATEWAY_NAME).map(|name| ObjectKey::new(Kind::Gateway, namespace, name))
    }

    fn waypoint(&self, key: &ObjectKey) -> Option<&Gateway> {
        match &self.objects.get(key)?.spec {
            Spec::Gateway(gateway) => Some(gateway).filter(|gateway| gateway.is_waypoint),
            _ => None,
        }
    }

    fn follow(&self, wanted: &ObjectKey, user: &Object, traffic: Traffic) -> Result<GatewayAddress, Unbound> {
        let gateway = self.reach(wanted, &user.key.namespace)?;
        let serves = match traffic {
            Traffic::Service => gateway.serves_services,
            Traffic::Workload => gateway.serves_workloads,
        };
        if !serves {
            let what = if traffic == Traffic::Service { "service" } else { "workload" };
            let told = format!("waypoint {}/{} does not serve {what} traffic", wanted.namespace, wanted.name);
            let remedy = "set its label istio.io/waypoint-for, or use another waypoint";
            return Err(Unbound(told, remedy, UNSUPPORTED));
        }
        let private = matches!(&user.spec, Spec::ServiceEntry(e) if e.visibility == Some(Visibility::Namespace));
        if private && wanted.namespace != user.key.namespace {
            let told = "an entry that is exported to its own namespace only cannot use another's waypoint".to_owned();
            let remedy = "export it, or use a waypoint of its namespace";
            return Err(Unbound(told, remedy, "CrossNamespaceWaypointForbidden"));
        }
        self.address(wanted, gateway).ok_or_else(|| missing(wanted, "has no Service of its name and no address"))
    }

    /// The waypoint, if there is one that lets objects of `namespace` use it.
    fn reach(&self, wanted: &ObjectKey, namespace: &Arc<str>) -> Result<&Gateway, Unbound> {
        let gateway = self.waypoint(wanted).ok_or_else(|| missing(wanted, "does not exist"))?;
        let admitted = match gateway.admits() {
            AllowedFrom::All => true,
            AllowedFrom::Same => wanted.namespace == *namespace,
            AllowedFrom::Selector(selector) => {
                let mut labels = self.namespace(namespace).map(|ns| ns.labels.clone()).unwrap_or_default();
                labels.insert("kubernetes.io/metadata.name".into(), namespace.clone());
                matches(selector, &labels)
            }
        };
        let told =
            || format!("waypoint {}/{} admits no objects of namespace {namespace}", wanted.namespace, wanted.name);
        let remedy = "widen allowedRoutes.namespaces of its listener, or use another waypoint";
        if admitted { Ok(gateway) } else { Err(Unbound(told(), remedy, "AttachmentDenied")) }
    }

    fn address(&self, key: &ObjectKey, gateway: &Gateway) -> Option<GatewayAddress> {
        let service = ObjectKey { kind: Kind::Service, ..key.clone() };
        let named = |hostname| GatewayDestination::Hostname { namespace: key.namespace.clone(), hostname };
        let destination = match &gateway.address {
            _ if self.objects.contains_key(&service) => named(self.hostname(&service).into()),
            Some(GatewayHost::Name(name)) => named(name.clone()),
            Some(GatewayHost::Ip(ip)) => GatewayDestination::Address(NetworkAddress::new(self.network(), *ip)),
            None => return None,
        };
        Some(GatewayAddress { destination, hbone_mtls_port: HBONE_PORT })
    }

    // --- what changes with what

    /// Everything that may come out different when a gateway, its Service or its pods change.
    pub(super) fn gateway_units(&self, gateway: &ObjectKey, units: &mut BTreeSet<ObjectKey>) {
        units.insert(gateway.clone());
        units.insert(ObjectKey { kind: Kind::Service, ..gateway.clone() });
        let instance = |o: &&Arc<Object>| {
            let labels = super::labels_of(o);
            labels.is_some_and(|labels| labels.get(GATEWAY_NAME) == Some(&gateway.name))
        };
        let within = |kind: &Kind| self.objects_of(*kind, Some(&gateway.namespace));
        units.extend(BINDABLE.iter().flat_map(within).filter(instance).map(|o| o.key.clone()));
        for object in self.objects_of(Kind::Namespace, None).filter(|o| o.binding().names(gateway)) {
            units.insert(object.key.clone());
            units.extend(BINDABLE.iter().flat_map(|kind| self.keys(*kind, Some(&object.key.name))));
        }
        for object in BINDABLE.iter().flat_map(|kind| self.objects_of(*kind, None)) {
            if bindings(object).iter().any(|(binding, _)| binding.names(gateway)) {
                units.insert(object.key.clone());
                self.members(object, units);
            }
        }
    }

    /// What came of the wish of a Service, ServiceEntry or WorkloadEntry; `None` if it has none, or none that is meant for it.
    pub(crate) fn bound(&self, unit: &ObjectKey) -> Option<Bound> {
        let object = self.objects.get(unit)?;
        let (own, level, traffic) = match &object.spec {
            Spec::Service(_) | Spec::ServiceEntry(_) => {
                (object.binding(), self.service_level(object)?, Traffic::Service)
            }
            Spec::WorkloadEntry(entry) => {
                let own = entry.binding(object.binding());
                (own, self.level(own, &unit.namespace)?, Traffic::Workload)
            }
            _ => return None,
        };
        let refused = |gateway: &ObjectKey| {
            let unbound = self.follow(gateway, object, traffic).err();
            unbound.map(|Unbound(message, remedy, reason)| (reason, format!("{message}; {remedy}")))
        };
        let waypoint = gateway_of(level)?.clone();
        let refusal = refused(&waypoint);
        // Which kinds of traffic a namespace has is not for its label to know.
        let inherited = own.waypoint.is_none() && traffic == Traffic::Workload;
        if inherited && refusal.as_ref().is_some_and(|(reason, _)| *reason == UNSUPPORTED) {
            return None;
        }
        let of_namespace = self.namespace_binding(&unit.namespace);
        let ingress = own.ingress.or_else(|| of_namespace?.ingress).unwrap_or(false);
        let canary_refused = level.canary.as_ref().and_then(|(canary, _)| refused(canary));
        Some(Bound { waypoint, refused: refusal, canary_refused, ingress })
    }

    /// Labels that bind nothing.
    pub(super) fn unbound(&self, unit: &ObjectKey) -> Vec<Problem> {
        let Some(object) = self.objects.get(unit) else { return Vec::new() };
        let mut all: Vec<(&FieldPlace, Unbound)> = Vec::new();
        for (binding, traffic) in bindings(object) {
            let Some(Wanted::Gateway(waypoint)) = &binding.waypoint else { continue };
            let canary = binding.canary.as_ref().map(|(canary, _)| (canary, &binding.canary_at));
            for (gateway, place) in std::iter::once((waypoint, &binding.waypoint_at)).chain(canary) {
                let bound = match traffic {
                    Some(traffic) => self.follow(gateway, object, traffic).map(drop),
                    None => self.reach(gateway, &object.key.name).and_then(|found| {
                        let address = self.address(gateway, found).map(drop);
                        address.ok_or_else(|| missing(gateway, "has no Service of its name and no address"))
                    }),
                };
                all.extend(bound.err().map(|unbound| (place, unbound)));
            }
        }
        let problem = |(place, Unbound(message, remedy, _)): (&FieldPlace, Unbound)| Problem {
            place: object.place.at(place.line),
            field: place.field.clone(),
            message,
            remedy: remedy.to_owned(),
        };
        all.into_iter().map(problem).collect()
    }

    // --- implicit policies

    /// Lets the waypoint, and nobody else, reach those who use it; see [`super::Settings::allow_from_waypoint`]. Without a running pod it
    /// lets nobody.
    pub(super) fn waypoint_policy(&self, key: &ObjectKey) -> Option<Policy> {
        self.waypoint(key).filter(|_| self.settings.allow_from_waypoint)?;
        let pods = self.objects_of(Kind::Pod, Some(&key.namespace)).filter_map(|o| match &o.spec {
            Spec::Pod(pod) if pod.labels.get(GATEWAY_NAME) == Some(&key.name) && !pod.terminal => Some(pod),
            _ => None,
        });
        let accounts: BTreeSet<&Arc<str>> = pods.map(|pod| &pod.service_account).collect();
        let (domain, namespace) = (&self.settings.trust_domain, &key.namespace);
        let principal = |account: &Arc<str>| {
            let identity = Identity::new(domain.clone(), namespace.clone(), account.clone());
            StringMatch::Exact(identity.principal().into())
        };
        let principals: Vec<StringMatch> = accounts.into_iter().map(principal).collect();
        let object = self.objects.get(key)?;
        let origin = object.place.origin(format!("{key} (--default-allow-from-waypoint)").into(), None);
        // A rule without principals would let everybody in.
        let rule = (!principals.is_empty()).then(|| {
            let matches = vec![Match { principals, ..Match::default() }];
            Rule { clauses: vec![Clause { matches }], origin: origin.clone() }
        });
        Some(Policy {
            name: format!("istio_allow_waypoint_{}_{}", key.namespace, key.name).into(),
            namespace: key.namespace.clone(),
            scope: Scope::WorkloadSelector,
            action: Action::Allow,
            rules: rule.into_iter().collect(),
            dry_run: false,
            origin,
        })
    }

    /// Keys of the implicit policies of the waypoints that a workload, or a service it is an endpoint of, goes through.
    pub(super) fn waypoint_policies<'a>(
        &self,
        key: &ObjectKey,
        own: &Binding,
        labels: &Labels,
        services: impl Iterator<Item = &'a Arc<str>>,
    ) -> BTreeSet<Arc<str>> {
        if !self.settings.allow_from_waypoint || self.instance_of(&key.namespace, labels).is_some() {
            return BTreeSet::new();
        }
        let mut gateways = BTreeSet::new();
        if self.workload_waypoint(key, own, labels).is_some() {
            gateways.extend(self.level(own, &key.namespace).and_then(gateway_of));
        }
        for object in services.filter_map(|service| self.service_object(service)) {
            if let Some((_, canary)) = self.service_waypoints(object) {
                let level = self.service_level(object);
                gateways.extend(level.and_then(gateway_of));
                gateways.extend(canary.and(level).and_then(|l| l.canary.as_ref()).map(|(gateway, _)| gateway));
            }
        }
        gateways.into_iter().filter_map(|gateway| self.waypoint_policy(gateway)).map(|policy| policy.key()).collect()
    }
}

/// What an object's labels bind, and for which traffic; `None` where that is not for its label to know.
fn bindings(object: &Object) -> Vec<(&Binding, Option<Traffic>)> {
    let own = object.binding();
    match &object.spec {
        Spec::Namespace(_) => vec![(own, None)],
        Spec::Pod(_) => vec![(own, Some(Traffic::Workload))],
        Spec::Service(_) => vec![(own, Some(Traffic::Service))],
        Spec::ServiceEntry(entry) => {
            let endpoints = entry.endpoints.iter().map(|endpoint| (&endpoint.binding, Some(Traffic::Workload)));
            std::iter::once((own, Some(Traffic::Service))).chain(endpoints).collect()
        }
        Spec::WorkloadEntry(entry) => vec![(entry.binding(own), Some(Traffic::Workload))],
        _ => Vec::new(),
    }
}

fn gateway_of(level: &Binding) -> Option<&ObjectKey> {
    match level.waypoint.as_ref()? {
        Wanted::Gateway(gateway) => Some(gateway),
        Wanted::Nothing => None,
    }
}

fn missing(wanted: &ObjectKey, what: &str) -> Unbound {
    let told = format!("waypoint {}/{} {what}, so nothing goes through it", wanted.namespace, wanted.name);
    let remedy = "create the Gateway (class istio-waypoint) and its Service, or correct the label";
    Unbound(told, remedy, "WaypointIsNotReady")
}
