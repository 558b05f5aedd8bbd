//! Services: names and virtual addresses in front of workloads.

use std::{net::IpAddr, sync::Arc};

use ipnet::IpNet;

use crate::{
    addr::NetworkAddress,
    workload::{GatewayAddress, Health, PortMapping},
};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    /// `<name>.<namespace>.svc.<domain>`, or the host of a ServiceEntry (may start with `*.`).
    pub hostname: Arc<str>,
    pub vips: Vec<NetworkAddress>,
    /// Virtual address ranges, (network, prefix).
    pub cidr_vips: Vec<(Arc<str>, IpNet)>,
    pub ports: Vec<ServicePort>,
    /// Further identities accepted from its endpoints, as written.
    pub subject_alt_names: Vec<Arc<str>>,
    pub waypoint: Option<GatewayAddress>,
    pub weighted_waypoints: Vec<(GatewayAddress, u32)>,
    pub load_balancing: Option<LoadBalancing>,
    pub ip_families: IpFamilies,
    pub canonical: bool,
    pub ingress_use_waypoint: bool,
    pub visibility: Visibility,
}

impl Service {
    /// See [`key`].
    pub fn key(&self) -> Arc<str> {
        key(&self.namespace, &self.hostname)
    }

    /// Whether clients of this namespace are told of it.
    pub fn is_visible_to(&self, namespace: &str) -> bool {
        self.visibility == Visibility::Public || *self.namespace == *namespace
    }

    /// Among the visible services of one name or address, a client of `namespace` means the one of the least rank: its own namespace's,
    /// then the canonical one.
    pub fn rank_for(&self, namespace: &str) -> (bool, bool) {
        (*self.namespace != *namespace, !self.canonical)
    }

    /// Which endpoints may serve.
    pub fn health_policy(&self) -> HealthPolicy {
        self.load_balancing.as_ref().map_or(HealthPolicy::OnlyHealthy, |lb| lb.health_policy)
    }

    pub fn new(namespace: impl Into<Arc<str>>, name: impl Into<Arc<str>>, hostname: impl Into<Arc<str>>) -> Self {
        Self {
            name: name.into(),
            namespace: namespace.into(),
            hostname: hostname.into(),
            vips: Vec::new(),
            cidr_vips: Vec::new(),
            ports: Vec::new(),
            subject_alt_names: Vec::new(),
            waypoint: None,
            weighted_waypoints: Vec::new(),
            load_balancing: None,
            ip_families: IpFamilies::Automatic,
            canonical: true,
            ingress_use_waypoint: false,
            visibility: Visibility::Public,
        }
    }
}

/// The primary key of a service.
pub fn key(namespace: &str, hostname: &str) -> Arc<str> {
    format!("{namespace}/{hostname}").into()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ServicePort {
    pub mapping: PortMapping,
    pub app_protocol: AppProtocol,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AppProtocol {
    Grpc,
    Http11,
    Http2,
    Tcp,
    Tls,
    Unknown,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LoadBalancing {
    /// Most significant first.
    pub routing_preference: Vec<Scope>,
    pub mode: LoadBalancingMode,
    pub health_policy: HealthPolicy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    Cluster,
    Network,
    Node,
    Region,
    Subzone,
    Zone,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LoadBalancingMode {
    Failover,
    Passthrough,
    Standard,
    Strict,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HealthPolicy {
    AllowAll,
    OnlyHealthy,
}

impl HealthPolicy {
    pub fn takes(self, health: Health) -> bool {
        self == Self::AllowAll || health == Health::Healthy
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IpFamilies {
    Automatic,
    Dual,
    Ipv4Only,
    Ipv6Only,
}

impl IpFamilies {
    /// Whether the service is served on such an address.
    pub fn allow(self, ip: IpAddr) -> bool {
        match self {
            Self::Automatic | Self::Dual => true,
            Self::Ipv4Only => ip.is_ipv4(),
            Self::Ipv6Only => ip.is_ipv6(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Visibility {
    /// Only clients of the service's own namespace resolve it.
    Namespace,
    Public,
}
