//! ServiceEntry → services and the workloads behind them; WorkloadEntry → a workload.

use std::sync::Arc;

use ipnet::IpNet;
use mesh_core::{
    addr::NetworkAddress,
    service::{self, HealthPolicy, LoadBalancing, LoadBalancingMode, Service, ServicePort},
    workload::{Memberships, PortMapping, Ports, TunnelProtocol, Workload},
};

use super::{
    ClusterIndex,
    workload::{Member, canonical_labels},
};
use crate::objects::{
    Binding, Endpoint, EndpointAddress, EntryPort, ObjectKey, Resolution, ServiceEntry, WorkloadEntry,
};

impl ClusterIndex {
    /// One service for each host it has not lost to another claimant.
    pub(super) fn entry_services(&self, key: &ObjectKey, entry: &ServiceEntry) -> Vec<Service> {
        let Some(visibility) = entry.visibility else { return Vec::new() };
        let network = self.network();
        let service = |host: &Arc<str>| {
            let (single, ranges): (Vec<IpNet>, Vec<IpNet>) =
                entry.addresses.iter().partition(|net| net.prefix_len() == net.max_prefix_len());
            let written = single.iter().map(IpNet::addr);
            let vips = written.chain(self.allocated(key, host));
            let service = Service {
                vips: vips.map(|ip| NetworkAddress::new(network.clone(), ip)).collect(),
                cidr_vips: ranges.into_iter().map(|net| (network.clone(), net)).collect(),
                ports: entry.ports.iter().map(service_port).collect(),
                subject_alt_names: entry.subject_alt_names.clone(),
                load_balancing: self.entry_load_balancing(key, entry),
                canonical: self.is_canonical(key, host),
                visibility,
                ..Service::new(key.namespace.clone(), key.name.clone(), host.clone())
            };
            self.bind_service(key, service)
        };
        self.won(key, entry).map(service).collect()
    }

    fn entry_load_balancing(&self, key: &ObjectKey, entry: &ServiceEntry) -> Option<LoadBalancing> {
        if entry.resolution == Resolution::None {
            let (mode, health_policy) = (LoadBalancingMode::Passthrough, HealthPolicy::AllowAll);
            return Some(LoadBalancing { routing_preference: Vec::new(), mode, health_policy });
        }
        self.distribution(&key.namespace, entry.traffic_distribution.as_ref())
    }

    /// Its endpoints, or what stands for those that DNS knows. An entry that lost all its hosts has none.
    pub(super) fn entry_workloads(&self, key: &ObjectKey, entry: &ServiceEntry) -> Vec<Workload> {
        let hosts: Vec<&Arc<str>> = self.won(key, entry).collect();
        if hosts.is_empty() || entry.visibility.is_none() {
            return Vec::new();
        }
        if entry.resolution == Resolution::Dns && entry.endpoints.is_empty() && entry.selector.is_empty() {
            let implicit = |host: &Arc<str>| {
                let ports = entry.ports.iter().map(|port| mapping(port, None)).collect();
                let services = [(service::key(&key.namespace, host), ports)].into_iter().collect();
                let workload = Workload { hostname: host.clone(), services, ..self.entry_workload(key, entry, host) };
                self.bind_workload(key, &Binding::default(), &entry.labels, workload)
            };
            return hosts.into_iter().map(implicit).collect();
        }
        let explicit = |endpoint: &Endpoint| {
            let ports: Ports = entry.ports.iter().map(|p| mapping(p, endpoint.ports.get(&p.name))).collect();
            let services = hosts.iter().map(|host| (service::key(&key.namespace, host), ports.clone())).collect();
            let address = match &endpoint.address {
                EndpointAddress::Host(host) => host.to_string(),
                EndpointAddress::Ip(ip) => ip.to_string(),
            };
            let workload = Workload { services, ..placed(self.entry_workload(key, entry, &address), endpoint) };
            self.bind_workload(key, &endpoint.binding, &entry.labels, workload)
        };
        entry.endpoints.iter().map(explicit).collect()
    }

    fn entry_workload(&self, key: &ObjectKey, entry: &ServiceEntry, address: &str) -> Workload {
        let (cluster, ObjectKey { namespace, name, .. }) = (&self.settings.cluster_id, key);
        let uid = format!("{cluster}/networking.istio.io/ServiceEntry/{namespace}/{name}/{address}");
        let (canonical_name, canonical_revision) = canonical_labels(&entry.labels, name);
        Workload {
            canonical_name,
            canonical_revision,
            tunnel_protocol: if entry.native_tunnel { TunnelProtocol::Hbone } else { TunnelProtocol::None },
            native_tunnel: entry.native_tunnel,
            authorization_policies: self.policies_of(namespace, &entry.labels),
            ..self.workload(&uid, key)
        }
    }

    pub(super) fn workload_entry(&self, key: &ObjectKey, entry: &WorkloadEntry) -> Workload {
        let (cluster, ObjectKey { namespace, name, .. }) = (&self.settings.cluster_id, key);
        let uid = format!("{cluster}/networking.istio.io/WorkloadEntry/{namespace}/{name}");
        let Endpoint { labels, ports, .. } = &entry.endpoint;
        let hbone = entry.native_tunnel || entry.annotated_enrolled;
        let (canonical_name, canonical_revision) = canonical_labels(labels, &entry.workload_name);
        let workload = Workload {
            tunnel_protocol: if hbone { TunnelProtocol::Hbone } else { TunnelProtocol::None },
            native_tunnel: entry.native_tunnel,
            canonical_name,
            canonical_revision,
            workload_name: entry.workload_name.clone(),
            authorization_policies: self.policies_of(namespace, labels),
            services: self.services_of(&Member { key, labels, ports, pod_uid: None }),
            ..self.workload(&uid, key)
        };
        let outer = self.objects.get(key).map(|o| o.binding().clone()).unwrap_or_default();
        self.bind_workload(key, entry.binding(&outer), labels, placed(workload, &entry.endpoint))
    }

    /// The entries whose selector picks a pod or workload entry, as services of it.
    pub(super) fn entries_of(&self, member: &Member<'_>) -> Memberships {
        let entries = self.objects_of(crate::objects::Kind::ServiceEntry, Some(&member.key.namespace));
        let entries = entries.filter_map(|o| Some((&o.key, self.entry(&o.key)?)));
        let selecting = entries.filter(|(_, entry)| {
            entry.visibility.is_some() && !entry.selector.is_empty() && super::matches(&entry.selector, member.labels)
        });
        let of = |(key, entry): (&ObjectKey, &ServiceEntry)| {
            let own = |port: &EntryPort| {
                let named = member.ports.get(&port.name);
                // A pod's port names are its own business: they only count where the entry gives no number.
                mapping(port, named.filter(|_| member.pod_uid.is_none() || port.target.is_none()))
            };
            let ports: Ports = entry.ports.iter().map(own).collect();
            self.won(key, entry).map(|host| (service::key(&key.namespace, host), ports.clone())).collect::<Vec<_>>()
        };
        selecting.flat_map(of).collect()
    }
}

fn placed(workload: Workload, endpoint: &Endpoint) -> Workload {
    let (addresses, hostname) = match &endpoint.address {
        EndpointAddress::Host(host) => (Vec::new(), host.clone()),
        EndpointAddress::Ip(ip) => (vec![*ip], "".into()),
    };
    Workload {
        addresses,
        hostname,
        network: endpoint.network.clone().unwrap_or(workload.network),
        locality: endpoint.locality.clone(),
        capacity: endpoint.weight,
        service_account: endpoint.service_account.clone().unwrap_or(workload.service_account),
        ..workload
    }
}

fn mapping(port: &EntryPort, own: Option<&u16>) -> PortMapping {
    let target_port = own.copied().or(port.target).unwrap_or(port.number);
    PortMapping { service_port: port.number, target_port }
}

fn service_port(port: &EntryPort) -> ServicePort {
    ServicePort { mapping: mapping(port, None), app_protocol: port.app_protocol }
}
