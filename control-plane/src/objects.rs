//! The objects of a cluster, trimmed to what the mesh needs, as they were written.
//!
//! Reading an object gives one of three things: the object; nothing, for a kind that is none of our business; or, for a security policy
//! that is wrong but whose name could be read, a stand-in that denies (and for the mesh's configuration, one that keeps closed what it was
//! to close): a mistake must not open what its author meant to close.

mod decode;
mod egress;
mod gateway;
pub(crate) mod mesh_config;
mod policy;
mod sharing;
mod status;

use std::{collections::BTreeMap, fmt, net::IpAddr, sync::Arc};

use litemap::LiteMap;
use mesh_core::{
    origin::Origin,
    policy::Policy,
    service::AppProtocol,
    workload::{Locality, WorkloadType},
};

pub(crate) use decode::{Read, read};
pub(crate) use egress::{Endpoint, EndpointAddress, EntryPort, Resolution, ServiceEntry, WorkloadEntry};
pub(crate) use gateway::{AllowedFrom, Binding, FieldPlace, Gateway, GatewayHost, Wanted};
pub(crate) use mesh_config::MeshConfig;
pub(crate) use policy::Settings;
pub(crate) use sharing::Sharing;
pub(crate) use status::{ACCEPTED, BOUND, Condition, MISSING, Status};

use crate::problem::Place;

pub(crate) type Labels = LiteMap<Arc<str>, Arc<str>>;
/// Container ports that have a name.
pub(crate) type NamedPorts = LiteMap<Arc<str>, u16>;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Kind {
    AuthorizationPolicy,
    ConfigMap,
    EndpointSlice,
    Gateway,
    Namespace,
    Node,
    PeerAuthentication,
    Pod,
    PodEnrolment,
    Service,
    ServiceAccount,
    ServiceEntry,
    WorkloadEntry,
}

impl Kind {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::AuthorizationPolicy => "AuthorizationPolicy",
            Self::ConfigMap => "ConfigMap",
            Self::EndpointSlice => "EndpointSlice",
            Self::Gateway => "Gateway",
            Self::Namespace => "Namespace",
            Self::Node => "Node",
            Self::PeerAuthentication => "PeerAuthentication",
            Self::Pod => "Pod",
            Self::PodEnrolment => "PodEnrolment",
            Self::Service => "Service",
            Self::ServiceAccount => "ServiceAccount",
            Self::ServiceEntry => "ServiceEntry",
            Self::WorkloadEntry => "WorkloadEntry",
        }
    }

    /// Whether objects of this kind are told what came of them, in their status.
    pub(crate) const fn is_stated(self) -> bool {
        matches!(
            self,
            Self::AuthorizationPolicy
                | Self::PeerAuthentication
                | Self::Service
                | Self::ServiceEntry
                | Self::WorkloadEntry
        )
    }

    pub(crate) const fn is_namespaced(self) -> bool {
        !matches!(self, Self::Namespace | Self::Node)
    }
}

/// What identifies an object; `namespace` is empty for cluster-wide kinds.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ObjectKey {
    pub(crate) kind: Kind,
    pub(crate) namespace: Arc<str>,
    pub(crate) name: Arc<str>,
}

impl ObjectKey {
    pub(crate) fn new(kind: Kind, namespace: &Arc<str>, name: &Arc<str>) -> Self {
        Self { kind, namespace: namespace.clone(), name: name.clone() }
    }
}

/// `Pod demo/client`.
impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = self.kind.name();
        match self.kind.is_namespaced() {
            true => write!(f, "{kind} {}/{}", self.namespace, self.name),
            false => write!(f, "{kind} {}", self.name),
        }
    }
}

/// An object and where it was written.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Object {
    pub(crate) key: ObjectKey,
    pub(crate) place: Place,
    /// `None` if its labels say nothing about waypoints, as those of most objects.
    pub(crate) binding: Option<Box<Binding>>,
    pub(crate) spec: Spec,
}

impl Object {
    pub(crate) fn binding(&self) -> &Binding {
        self.binding.as_deref().unwrap_or(&UNBOUND)
    }
}

static UNBOUND: Binding = Binding::none();

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Spec {
    AuthorizationPolicy(Box<AuthorizationPolicy>),
    EndpointSlice(EndpointSlice),
    Gateway(Gateway),
    /// Of ConfigMaps, the only one there is.
    MeshConfig(MeshConfig),
    Namespace(Namespace),
    Node(Locality),
    PeerAuthentication(Box<PeerAuthentication>),
    Pod(Box<Pod>),
    PodEnrolment(PodEnrolment),
    Service(Box<Service>),
    ServiceAccount,
    ServiceEntry(Box<ServiceEntry>),
    WorkloadEntry(Box<WorkloadEntry>),
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct AuthorizationPolicy {
    /// `None` when the policy attaches to waypoints only.
    pub(crate) policy: Option<Policy>,
    /// Empty when the policy has none.
    pub(crate) selector: Labels,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct EndpointSlice {
    pub(crate) service: Option<Arc<str>>,
    /// TCP ports: name, number.
    pub(crate) ports: Vec<(Arc<str>, u16)>,
    pub(crate) endpoints: Vec<SliceEndpoint>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct SliceEndpoint {
    pub(crate) address: IpAddr,
    pub(crate) ready: bool,
    pub(crate) node: Option<Arc<str>>,
    /// Name and uid (if given) of the pod this stands for.
    pub(crate) pod: Option<(Arc<str>, Option<Arc<str>>)>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Namespace {
    pub(crate) labels: Labels,
    pub(crate) network: Option<Arc<str>>,
    pub(crate) traffic_distribution: Option<Arc<str>>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PeerAuthentication {
    pub(crate) created: Arc<str>,
    pub(crate) selector: Labels,
    /// `None` inherits.
    pub(crate) strict: Option<bool>,
    /// Port to strictness, with the place of the field.
    pub(crate) ports: BTreeMap<u16, (bool, Origin)>,
    pub(crate) origin: Origin,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Pod {
    pub(crate) uid: Arc<str>,
    pub(crate) labels: Arc<Labels>,
    pub(crate) annotated_enrolled: bool,
    /// Terminates HBONE itself.
    pub(crate) native_tunnel: bool,
    pub(crate) node: Arc<str>,
    pub(crate) service_account: Arc<str>,
    pub(crate) host_network: bool,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) ready: bool,
    /// Succeeded or failed: it will not run again.
    pub(crate) terminal: bool,
    pub(crate) workload_name: Arc<str>,
    pub(crate) workload_type: WorkloadType,
    /// TCP container ports that have a name.
    pub(crate) named_ports: Arc<NamedPorts>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PodEnrolment {
    pub(crate) pod_uid: Arc<str>,
    pub(crate) enabled: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Service {
    /// Stands for a waypoint or another gateway, which never has a waypoint itself.
    pub(crate) is_gateway: bool,
    pub(crate) selector: Labels,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) ports: Vec<ServicePort>,
    pub(crate) families: Vec<Arc<str>>,
    pub(crate) publish_not_ready: bool,
    pub(crate) internal_local: bool,
    pub(crate) traffic_distribution: Option<Arc<str>>,
    pub(crate) external_name: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ServicePort {
    pub(crate) name: Arc<str>,
    pub(crate) port: u16,
    pub(crate) target: TargetPort,
    pub(crate) app_protocol: AppProtocol,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum TargetPort {
    Name(Arc<str>),
    Number(u16),
}
