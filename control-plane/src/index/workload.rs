//! Pods and bare endpoints → workloads.

use std::sync::Arc;

use mesh_core::{
    service,
    workload::{
        Health, Locality, Memberships, NetworkMode, OutboundPolicy, PortMapping, Ports, TunnelProtocol, Workload,
    },
};

use super::{ClusterIndex, matches};
use crate::objects::{
    Binding, EndpointSlice, Kind, Labels, NamedPorts, ObjectKey, Pod, Service, Spec, TargetPort, mesh_config,
};

/// What a selector looks at: a pod, or a workload entry.
pub(super) struct Member<'a> {
    pub(super) key: &'a ObjectKey,
    pub(super) labels: &'a Labels,
    /// Its named ports.
    pub(super) ports: &'a NamedPorts,
    /// `None` for a workload entry.
    pub(super) pod_uid: Option<&'a Arc<str>>,
}

impl ClusterIndex {
    /// `None` while the pod has no address or node, and once it has ended.
    pub(super) fn pod_workload(&self, key: &ObjectKey, pod: &Pod) -> Option<Workload> {
        if pod.terminal || pod.addresses.is_empty() || pod.node.is_empty() {
            return None;
        }
        let hbone = !pod.host_network && (pod.native_tunnel || self.is_enrolled(key, pod));
        let (canonical_name, canonical_revision) = canonical_labels(&pod.labels, &pod.workload_name);
        let member = Member { key, labels: &pod.labels, ports: &pod.named_ports, pod_uid: Some(&pod.uid) };
        let workload = Workload {
            service_account: pod.service_account.clone(),
            addresses: pod.addresses.clone(),
            node: pod.node.clone(),
            locality: self.locality(&pod.node),
            tunnel_protocol: if hbone { TunnelProtocol::Hbone } else { TunnelProtocol::None },
            native_tunnel: pod.native_tunnel && hbone,
            network_mode: if pod.host_network { NetworkMode::HostNetwork } else { NetworkMode::Standard },
            health: if pod.ready { Health::Healthy } else { Health::Unhealthy },
            canonical_name,
            canonical_revision,
            workload_type: pod.workload_type,
            workload_name: pod.workload_name.clone(),
            authorization_policies: self.policies_of(&key.namespace, &pod.labels),
            services: self.services_of(&member),
            outbound_policy: self.outbound_policy(),
            ..self.workload(&format!("{}//Pod/{}/{}", self.settings.cluster_id, key.namespace, key.name), key)
        };
        Some(self.bind_workload(key, self.objects.get(key)?.binding(), &pod.labels, workload))
    }

    /// Sets what follows from waypoints.
    pub(super) fn bind_workload(
        &self,
        key: &ObjectKey,
        own: &Binding,
        labels: &Labels,
        mut workload: Workload,
    ) -> Workload {
        workload.waypoint = self.workload_waypoint(key, own, labels);
        workload.application_tunnel = self.application_tunnel(&key.namespace, labels);
        let implicit = self.waypoint_policies(key, own, labels, workload.services.keys());
        workload.authorization_policies.extend(implicit);
        workload.authorization_policies.sort();
        workload
    }

    /// `None` leaves it to each proxy.
    fn outbound_policy(&self) -> Option<OutboundPolicy> {
        let key = ObjectKey::new(Kind::ConfigMap, &self.settings.root_namespace, &mesh_config::NAME.into());
        match &self.objects.get(&key)?.spec {
            Spec::MeshConfig(config) => config.registry_only.then_some(OutboundPolicy::RegistryOnly),
            _ => None,
        }
    }

    pub(super) fn workload(&self, uid: &str, key: &ObjectKey) -> Workload {
        Workload {
            trust_domain: self.settings.trust_domain.clone(),
            cluster_id: self.settings.cluster_id.clone(),
            network: self.network(),
            ..Workload::new(uid, key.namespace.clone(), key.name.clone())
        }
    }

    /// Only an agent's word that the pod is captured counts, be it the annotation or, from a folder, its enrolment.
    fn is_enrolled(&self, key: &ObjectKey, pod: &Pod) -> bool {
        let enrolment = self.objects.get(&ObjectKey { kind: Kind::PodEnrolment, ..key.clone() });
        pod.annotated_enrolled
            || enrolment.is_some_and(|o| match &o.spec {
                Spec::PodEnrolment(enrolment) => enrolment.enabled && enrolment.pod_uid == pod.uid,
                _ => false,
            })
    }

    fn locality(&self, node: &Arc<str>) -> Locality {
        match self.objects.get(&ObjectKey::new(Kind::Node, &"".into(), node)).map(|o| &o.spec) {
            Some(Spec::Node(locality)) => locality.clone(),
            _ => Locality::default(),
        }
    }

    /// Sorted keys of the selector policies in force for a workload.
    pub(super) fn policies_of(&self, namespace: &Arc<str>, labels: &Labels) -> Vec<Arc<str>> {
        let root = &self.settings.root_namespace;
        let namespaces = std::iter::once(namespace).chain((namespace != root).then_some(root));
        let policies = namespaces.flat_map(|ns| self.objects_of(Kind::AuthorizationPolicy, Some(ns)));
        let selecting = policies.filter_map(|o| match &o.spec {
            Spec::AuthorizationPolicy(p) if !p.selector.is_empty() && matches(&p.selector, labels) => p.policy.as_ref(),
            _ => None,
        });
        let mut keys: Vec<Arc<str>> = selecting.map(|policy| policy.key()).collect();
        keys.extend(self.strict_policy(namespace, labels));
        keys.sort();
        keys
    }

    pub(super) fn services_of(&self, member: &Member<'_>) -> Memberships {
        let of = |(service_key, service): (&ObjectKey, &Service)| {
            let ports = match service.selector.is_empty() {
                _ if service.external_name => return None,
                false => matches(&service.selector, member.labels).then(|| selected_ports(service, member)),
                true => self.sliced_ports(service_key, service, member),
            }?;
            Some((self.service_key(service_key), ports))
        };
        // Where a Service and an entry claim the same host, only the Service is left among the winners.
        let entries = self.entries_of(member);
        entries.into_iter().chain(self.services(&member.key.namespace).filter_map(of)).collect()
    }

    fn service_key(&self, key: &ObjectKey) -> Arc<str> {
        service::key(&key.namespace, &self.hostname(key))
    }

    /// The ports of a service without selector that a slice gives this very pod; addresses alone never link the two.
    fn sliced_ports(&self, service_key: &ObjectKey, service: &Service, member: &Member<'_>) -> Option<Ports> {
        let uid = member.pod_uid?;
        let is_pod = |target: &(Arc<str>, Option<Arc<str>>)| {
            target.0 == member.key.name && target.1.as_ref().is_none_or(|named| named == uid)
        };
        let own =
            self.slices(&member.key.namespace).filter(|(_, slice)| slice.service.as_ref() == Some(&service_key.name));
        let mut naming =
            own.filter(|(_, slice)| slice.endpoints.iter().filter_map(|e| e.pod.as_ref()).any(is_pod)).peekable();
        naming.peek()?;
        Some(naming.flat_map(|(_, slice)| joined_ports(service, slice)).collect())
    }

    /// Endpoints of a slice that are no pods.
    pub(super) fn slice_workloads(&self, key: &ObjectKey, slice: &EndpointSlice) -> impl Iterator<Item = Workload> {
        let service_key = slice.service.as_ref().map(|name| ObjectKey::new(Kind::Service, &key.namespace, name));
        let service = service_key.and_then(|key| match &self.objects.get(&key)?.spec {
            Spec::Service(service) if !service.external_name => Some((self.service_key(&key), &**service)),
            _ => None,
        });
        let services: Memberships =
            service.map(|(key, service)| (key, joined_ports(service, slice))).into_iter().collect();
        let bare = slice.endpoints.iter().filter(|e| e.pod.is_none() && slice.service.is_some());
        bare.map(move |endpoint| {
            let ObjectKey { namespace, name, .. } = key;
            let cluster = &self.settings.cluster_id;
            let uid = format!("{cluster}/discovery.k8s.io/EndpointSlice/{namespace}/{name}/{}", endpoint.address);
            Workload {
                addresses: vec![endpoint.address],
                node: endpoint.node.clone().unwrap_or_default(),
                network_mode: NetworkMode::HostNetwork,
                health: if endpoint.ready { Health::Healthy } else { Health::Unhealthy },
                services: services.clone(),
                ..self.workload(&uid, key)
            }
        })
    }
}

/// The names telemetry knows a workload by.
pub(super) fn canonical_labels(labels: &Labels, workload_name: &Arc<str>) -> (Arc<str>, Arc<str>) {
    let label = |names: [&str; 3]| names.iter().find_map(|name| labels.get(*name)).filter(|v| !v.is_empty()).cloned();
    let name = label(["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"]);
    let revision = label(["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"]);
    (name.unwrap_or_else(|| workload_name.clone()), revision.unwrap_or_else(|| "latest".into()))
}

/// A named port that the member does not have is left out: it is no endpoint for it.
fn selected_ports(service: &Service, member: &Member<'_>) -> Ports {
    let target = |target: &TargetPort| match target {
        TargetPort::Number(number) => Some(*number),
        TargetPort::Name(name) => member.ports.get(name).copied(),
    };
    let mapping = |service_port, target_port| PortMapping { service_port, target_port };
    service.ports.iter().filter_map(|port| Some(mapping(port.port, target(&port.target)?))).collect()
}

/// Joined by name, as the two objects are.
fn joined_ports(service: &Service, slice: &EndpointSlice) -> Ports {
    let target = |name: &Arc<str>| slice.ports.iter().find(|(n, _)| n == name).map(|(_, number)| *number);
    let mapping = |service_port, target_port| PortMapping { service_port, target_port };
    service.ports.iter().filter_map(|port| Some(mapping(port.port, target(&port.name)?))).collect()
}
