//! Workloads: what runs, where, as whom.

use std::{net::IpAddr, sync::Arc};

use litemap::LiteMap;
use smallvec::SmallVec;

use crate::{addr::NetworkAddress, identity::Identity};

/// A pod (or VM, or external endpoint) as the mesh sees it. Strings are canonical: wire defaults (`cluster.local`, `default`,
/// `Kubernetes`) are already filled in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Primary key: `<cluster>//Pod/<namespace>/<name>`.
    pub uid: Arc<str>,
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    pub service_account: Arc<str>,
    pub trust_domain: Arc<str>,
    /// Canonical; empty for a workload known by hostname or only through a gateway.
    pub addresses: Vec<IpAddr>,
    pub network: Arc<str>,
    pub cluster_id: Arc<str>,
    pub node: Arc<str>,
    pub locality: Locality,
    pub tunnel_protocol: TunnelProtocol,
    pub native_tunnel: bool,
    pub network_mode: NetworkMode,
    pub health: Health,
    /// Waypoint for traffic addressed to the workload itself.
    pub waypoint: Option<GatewayAddress>,
    pub network_gateway: Option<GatewayAddress>,
    pub application_tunnel: Option<ApplicationTunnel>,
    pub hostname: Arc<str>,
    pub canonical_name: Arc<str>,
    pub canonical_revision: Arc<str>,
    pub workload_type: WorkloadType,
    pub workload_name: Arc<str>,
    /// `namespace/name` of each selector-scoped policy in force here, sorted.
    pub authorization_policies: Vec<Arc<str>>,
    /// `namespace/hostname` of each service this is an endpoint of, to its ports.
    pub services: Memberships,
    /// Load-balancing weight, 1 unless said otherwise.
    pub capacity: u32,
    /// What it may call beyond the registry; `None` leaves it to its proxy's configuration.
    pub outbound_policy: Option<OutboundPolicy>,
}

impl Workload {
    pub fn identity(&self) -> Identity {
        Identity {
            trust_domain: self.trust_domain.clone(),
            namespace: self.namespace.clone(),
            service_account: self.service_account.clone(),
        }
    }

    /// A healthy plain-TCP pod on the default network with the wire's defaults; callers fill in the rest.
    pub fn new(uid: impl Into<Arc<str>>, namespace: impl Into<Arc<str>>, name: impl Into<Arc<str>>) -> Self {
        let empty: Arc<str> = "".into();
        let name = name.into();
        Self {
            uid: uid.into(),
            name: name.clone(),
            namespace: namespace.into(),
            service_account: "default".into(),
            trust_domain: crate::identity::DEFAULT_TRUST_DOMAIN.into(),
            addresses: Vec::new(),
            network: empty.clone(),
            cluster_id: "Kubernetes".into(),
            node: empty.clone(),
            locality: Locality::default(),
            tunnel_protocol: TunnelProtocol::None,
            native_tunnel: false,
            network_mode: NetworkMode::Standard,
            health: Health::Healthy,
            waypoint: None,
            network_gateway: None,
            application_tunnel: None,
            hostname: empty.clone(),
            canonical_name: empty.clone(),
            canonical_revision: empty,
            workload_type: WorkloadType::Pod,
            workload_name: name,
            authorization_policies: Vec::new(),
            services: Memberships::new(),
            capacity: 1,
            outbound_policy: None,
        }
    }
}

/// By the services' keys. There is one of these for each workload of the mesh in every proxy, so it is kept small.
pub type Memberships = LiteMap<Arc<str>, Ports>;

pub type Ports = SmallVec<[PortMapping; 4]>;

/// Where a workload's connections may go (`outboundTrafficPolicy` of Istio's MeshConfig and Sidecar).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum OutboundPolicy {
    /// Anywhere; what the registry does not hold is passed through.
    #[default]
    AllowAny,
    /// To what the registry holds, and nowhere else.
    RegistryOnly,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TunnelProtocol {
    /// Plain TCP.
    None,
    Hbone,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NetworkMode {
    Standard,
    /// Shares its node's address, so it is never found by address.
    HostNetwork,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Health {
    Healthy,
    Unhealthy,
}

/// For telemetry only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WorkloadType {
    CronJob,
    Deployment,
    Job,
    Pod,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Locality {
    pub region: Arc<str>,
    pub zone: Arc<str>,
    pub subzone: Arc<str>,
}

/// A port of a service; `target_port` 0 stands for a named port, which each endpoint maps itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortMapping {
    pub service_port: u16,
    pub target_port: u16,
}

/// How to reach a waypoint or network gateway.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct GatewayAddress {
    pub destination: GatewayDestination,
    pub hbone_mtls_port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum GatewayDestination {
    Address(NetworkAddress),
    Hostname { namespace: Arc<str>, hostname: Arc<str> },
}

/// A workload that is itself a proxy and wants the tunnel's payload on one port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ApplicationTunnel {
    /// Precede the payload with a PROXY protocol v2 header.
    pub proxy_protocol: bool,
    /// `None`: the port the client asked for.
    pub port: Option<u16>,
}
