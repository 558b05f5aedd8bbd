//! Service → the model's service.

use std::{net::IpAddr, sync::Arc};

use mesh_core::{
    addr::NetworkAddress,
    service::{HealthPolicy, IpFamilies, LoadBalancing, LoadBalancingMode, Scope, Service, ServicePort},
    workload::PortMapping,
};

use super::ClusterIndex;
use crate::objects::{self, ObjectKey, TargetPort};

const NEAR: [Scope; 3] = [Scope::Network, Scope::Region, Scope::Zone];
const NEAREST: [Scope; 5] = [Scope::Network, Scope::Region, Scope::Zone, Scope::Subzone, Scope::Node];

impl ClusterIndex {
    /// `None` for what only aliases a name elsewhere.
    pub(super) fn service(&self, key: &ObjectKey, service: &objects::Service) -> Option<Service> {
        let network = self.network();
        let vip = |ip: &IpAddr| NetworkAddress::new(network.clone(), *ip);
        let made = (!service.external_name).then(|| Service {
            vips: service.addresses.iter().map(vip).collect(),
            ports: service.ports.iter().map(port).collect(),
            load_balancing: self.load_balancing(key, service),
            ip_families: families(&service.families),
            ..Service::new(key.namespace.clone(), key.name.clone(), self.hostname(key))
        });
        made.map(|service| self.bind_service(key, service))
    }

    pub(super) fn hostname(&self, key: &ObjectKey) -> String {
        format!("{}.{}.svc.{}", key.name, key.namespace, self.settings.cluster_domain)
    }

    fn load_balancing(&self, key: &ObjectKey, service: &objects::Service) -> Option<LoadBalancing> {
        let spread = match service.internal_local {
            true => Some(balanced(LoadBalancingMode::Strict, &[Scope::Node])),
            false => self.distribution(&key.namespace, service.traffic_distribution.as_ref()),
        };
        if !service.publish_not_ready {
            return spread;
        }
        let spread = spread.unwrap_or_else(|| balanced(LoadBalancingMode::Standard, &[]));
        Some(LoadBalancing { health_policy: HealthPolicy::AllowAll, ..spread })
    }

    /// What the object says, else its namespace.
    pub(super) fn distribution(&self, namespace: &Arc<str>, own: Option<&Arc<str>>) -> Option<LoadBalancing> {
        let of_namespace = || self.namespace(namespace)?.traffic_distribution.as_ref();
        match &**own.or_else(of_namespace)? {
            "PreferClose" | "PreferSameZone" => Some(balanced(LoadBalancingMode::Failover, &NEAR)),
            "PreferSameNode" => Some(balanced(LoadBalancingMode::Failover, &NEAREST)),
            _ => None,
        }
    }
}

fn balanced(mode: LoadBalancingMode, preference: &[Scope]) -> LoadBalancing {
    LoadBalancing { routing_preference: preference.to_vec(), mode, health_policy: HealthPolicy::OnlyHealthy }
}

fn port(port: &objects::ServicePort) -> ServicePort {
    let target_port = match port.target {
        TargetPort::Number(number) => number,
        TargetPort::Name(_) => 0,
    };
    ServicePort { mapping: PortMapping { service_port: port.port, target_port }, app_protocol: port.app_protocol }
}

fn families(families: &[Arc<str>]) -> IpFamilies {
    let has = |name: &str| families.iter().any(|family| **family == *name);
    match (has("IPv4"), has("IPv6")) {
        (true, true) => IpFamilies::Dual,
        (true, false) => IpFamilies::Ipv4Only,
        (false, true) => IpFamilies::Ipv6Only,
        (false, false) => IpFamilies::Automatic,
    }
}
