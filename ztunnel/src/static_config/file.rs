//! The YAML of static configuration: upstream's keys and spellings, anything else refused. [`crate::admin::config_dump`] is the inverse.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use ipnet::IpNet;
use mesh_core::{
    addr::{NetworkAddress, canonical_ip},
    index::Resource,
    origin::Origin,
    policy::{Action, Clause, Match, Policy, Rule, Scope as PolicyScope, ServiceAccountMatch, StringMatch},
    service::{
        AppProtocol, HealthPolicy, IpFamilies, LoadBalancing, LoadBalancingMode, Scope, Service, ServicePort,
        Visibility,
    },
    workload::{
        ApplicationTunnel, GatewayAddress, GatewayDestination, Health, Locality, NetworkMode, PortMapping,
        TunnelProtocol, Workload, WorkloadType,
    },
};
use serde::{Deserialize, Deserializer, de::Error as _};

pub(super) fn parse(text: &str) -> Result<Vec<Resource>, String> {
    // An empty document is an empty configuration.
    let file: Option<File> = serde_saphyr::from_str(text).map_err(|error| error.to_string())?;
    let file = file.unwrap_or_default();
    let workloads = file.workloads.into_iter().map(|w| Resource::Workload(Arc::new(w.0)));
    let services = file.services.into_iter().map(|s| Resource::Service(Arc::new(s.0)));
    let policies = file.policies.into_iter().map(|p| Resource::Policy(Arc::new(p.into_model())));
    Ok(workloads.chain(services).chain(policies).collect())
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct File {
    workloads: Vec<Parsed<Workload>>,
    services: Vec<Parsed<Service>>,
    policies: Vec<PolicyEntry>,
}

/// Converted where it is read, so that a complaint names its line.
struct Parsed<T>(T);

impl<'de> Deserialize<'de> for Parsed<Workload> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        WorkloadEntry::deserialize(deserializer)?.into_model().map(Self).map_err(D::Error::custom)
    }
}

impl<'de> Deserialize<'de> for Parsed<Service> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self(ServiceEntry::deserialize(deserializer)?.into_model()))
    }
}

/// `network/ip`.
impl<'de> Deserialize<'de> for Parsed<NetworkAddress> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let address = network_address(&text);
        address.map(Self).ok_or_else(|| D::Error::custom(format!("`{text}`: expected network/ip, such as /10.0.0.1")))
    }
}

fn network_address(text: &str) -> Option<NetworkAddress> {
    let (network, ip) = text.split_once('/')?;
    Some(NetworkAddress::new(network, ip.parse().ok()?))
}

/// `network/ip` or `namespace/hostname`.
impl<'de> Deserialize<'de> for Parsed<GatewayDestination> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if let Some(address) = network_address(&text) {
            return Ok(Self(GatewayDestination::Address(address)));
        }
        match text.split_once('/') {
            Some((namespace, hostname)) if !namespace.is_empty() && !hostname.is_empty() && !hostname.contains('/') => {
                Ok(Self(GatewayDestination::Hostname { namespace: namespace.into(), hostname: hostname.into() }))
            }
            _ => Err(D::Error::custom(format!("`{text}`: expected network/ip or namespace/hostname"))),
        }
    }
}

/// `namespace/hostname`, as a key.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct ServiceKey(Arc<str>);

impl<'de> Deserialize<'de> for ServiceKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        match text.split_once('/') {
            Some((namespace, hostname)) if !namespace.is_empty() && !hostname.is_empty() => Ok(Self(text.into())),
            _ => Err(D::Error::custom(format!("`{text}`: expected namespace/hostname"))),
        }
    }
}

/// Service port to target port.
type Ports = BTreeMap<u16, u16>;

fn mappings(ports: Ports) -> impl Iterator<Item = PortMapping> {
    ports.into_iter().map(|(service_port, target_port)| PortMapping { service_port, target_port })
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WorkloadEntry {
    workload_ips: Vec<IpAddr>,
    namespace: Arc<str>,
    waypoint: Option<Gateway>,
    network_gateway: Option<Gateway>,
    #[serde(default)]
    protocol: Protocol,
    #[serde(default)]
    network_mode: Network,
    #[serde(default)]
    uid: Arc<str>,
    #[serde(default)]
    name: Arc<str>,
    #[serde(default)]
    trust_domain: Arc<str>,
    #[serde(default)]
    service_account: Arc<str>,
    #[serde(default)]
    network: Arc<str>,
    #[serde(default)]
    workload_name: Arc<str>,
    #[serde(default)]
    workload_type: Kind,
    #[serde(default)]
    canonical_name: Arc<str>,
    #[serde(default)]
    canonical_revision: Arc<str>,
    #[serde(default)]
    hostname: Arc<str>,
    #[serde(default)]
    node: Arc<str>,
    #[serde(default)]
    native_tunnel: bool,
    application_tunnel: Option<Tunnel>,
    #[serde(default)]
    authorization_policies: Vec<Arc<str>>,
    #[serde(default)]
    status: Status,
    #[serde(default)]
    cluster_id: Arc<str>,
    #[serde(default)]
    locality: Place,
    #[serde(default = "one")]
    capacity: u32,
    #[serde(default)]
    services: BTreeMap<ServiceKey, Ports>,
}

fn one() -> u32 {
    1
}

impl WorkloadEntry {
    fn into_model(self) -> Result<Workload, &'static str> {
        let uid = match (&*self.uid, &*self.name) {
            ("", "") => return Err("a workload without uid and name: expected one of them"),
            ("", name) => format!("{}//Pod/{}/{name}", self.cluster_id, self.namespace).into(),
            _ => self.uid,
        };
        let mut authorization_policies = self.authorization_policies;
        authorization_policies.sort_unstable();
        authorization_policies.dedup();
        Ok(Workload {
            uid,
            name: self.name,
            namespace: self.namespace,
            service_account: self.service_account,
            trust_domain: self.trust_domain,
            addresses: self.workload_ips.into_iter().map(canonical_ip).collect(),
            network: self.network,
            cluster_id: self.cluster_id,
            node: self.node,
            locality: self.locality.into(),
            tunnel_protocol: self.protocol.into(),
            native_tunnel: self.native_tunnel,
            network_mode: self.network_mode.into(),
            health: self.status.into(),
            waypoint: self.waypoint.map(Into::into),
            network_gateway: self.network_gateway.map(Into::into),
            application_tunnel: self.application_tunnel.map(Into::into),
            hostname: self.hostname,
            canonical_name: self.canonical_name,
            canonical_revision: self.canonical_revision,
            workload_type: self.workload_type.into(),
            workload_name: self.workload_name,
            authorization_policies,
            services: self.services.into_iter().map(|(key, ports)| (key.0, mappings(ports).collect())).collect(),
            capacity: self.capacity,
            outbound_policy: None,
        })
    }
}

/// An enumeration of the file and the model's: one spelling each, and nothing else.
macro_rules! spelled {
    ($name:ident($default:ident) => $model:ident { $($variant:ident = $text:literal => $to:ident),+ $(,)? }) => {
        #[derive(Clone, Copy, Default, Deserialize)]
        enum $name {
            $(#[serde(rename = $text)] $variant,)+
            #[default]
            #[serde(skip)]
            Unset,
        }

        impl From<$name> for $model {
            fn from(value: $name) -> Self {
                match value {
                    $($name::$variant => Self::$to,)+
                    $name::Unset => Self::$default,
                }
            }
        }
    };
}

spelled!(Protocol(None) => TunnelProtocol { Tcp = "TCP" => None, Hbone = "HBONE" => Hbone });
spelled!(Network(Standard) => NetworkMode { Standard = "Standard" => Standard, Host = "HostNetwork" => HostNetwork });
spelled!(Status(Healthy) => Health { Healthy = "Healthy" => Healthy, Unhealthy = "Unhealthy" => Unhealthy });
spelled!(Kind(Pod) => WorkloadType {
    Deployment = "deployment" => Deployment, CronJob = "cronjob" => CronJob, Pod = "pod" => Pod, Job = "job" => Job,
});
spelled!(Families(Automatic) => IpFamilies { Dual = "Dual" => Dual, Four = "IPv4" => Ipv4Only, Six = "IPv6" => Ipv6Only });
spelled!(Visible(Public) => Visibility { Public = "Public" => Public, Namespace = "Namespace" => Namespace });
spelled!(Mode(Standard) => LoadBalancingMode {
    Standard = "Standard" => Standard, Strict = "Strict" => Strict, Failover = "Failover" => Failover,
    Passthrough = "Passthrough" => Passthrough,
});
spelled!(HealthRule(OnlyHealthy) => HealthPolicy { OnlyHealthy = "OnlyHealthy" => OnlyHealthy, AllowAll = "AllowAll" => AllowAll });

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Gateway {
    destination: Parsed<GatewayDestination>,
    hbone_mtls_port: u16,
}

impl From<Gateway> for GatewayAddress {
    fn from(gateway: Gateway) -> Self {
        Self { destination: gateway.destination.0, hbone_mtls_port: gateway.hbone_mtls_port }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Tunnel {
    protocol: TunnelHeader,
    port: Option<u16>,
}

#[derive(Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum TunnelHeader {
    None,
    Proxy,
}

impl From<Tunnel> for ApplicationTunnel {
    fn from(tunnel: Tunnel) -> Self {
        Self { proxy_protocol: matches!(tunnel.protocol, TunnelHeader::Proxy), port: tunnel.port }
    }
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Place {
    region: Arc<str>,
    zone: Arc<str>,
    subzone: Arc<str>,
}

impl From<Place> for Locality {
    fn from(place: Place) -> Self {
        Self { region: place.region, zone: place.zone, subzone: place.subzone }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ServiceEntry {
    name: Arc<str>,
    namespace: Arc<str>,
    hostname: Arc<str>,
    vips: Vec<Parsed<NetworkAddress>>,
    ports: Ports,
    #[serde(default)]
    cidr_vips: Vec<CidrVip>,
    /// Read for the sake of files made from a dump; the workloads say the same.
    #[serde(default, rename = "endpoints")]
    _endpoints: BTreeMap<String, EndpointEntry>,
    #[serde(default)]
    subject_alt_names: Vec<Arc<str>>,
    waypoint: Option<Gateway>,
    #[serde(default)]
    weighted_waypoints: Vec<WeightedWaypoint>,
    load_balancer: Option<LoadBalancer>,
    #[serde(default)]
    ip_families: Families,
    #[serde(default)]
    canonical: bool,
    #[serde(default)]
    visibility: Visible,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct EndpointEntry {
    #[serde(rename = "workloadUid")]
    _workload_uid: String,
    #[serde(rename = "port")]
    _port: Ports,
    #[serde(default, rename = "status")]
    _status: Status,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CidrVip {
    #[serde(default)]
    network: Arc<str>,
    cidr: IpNet,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WeightedWaypoint {
    destination: Gateway,
    weight: u32,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct LoadBalancer {
    #[serde(default)]
    routing_preferences: Vec<Preference>,
    #[serde(default)]
    mode: Mode,
    #[serde(default)]
    health_policy: HealthRule,
}

#[derive(Deserialize)]
enum Preference {
    Region,
    Zone,
    Subzone,
    Node,
    Cluster,
    Network,
}

impl ServiceEntry {
    fn into_model(self) -> Service {
        let port = |mapping| ServicePort { mapping, app_protocol: AppProtocol::Unknown };
        Service {
            vips: self.vips.into_iter().map(|vip| vip.0).collect(),
            cidr_vips: self.cidr_vips.into_iter().map(|vip| (vip.network, vip.cidr)).collect(),
            ports: mappings(self.ports).map(port).collect(),
            subject_alt_names: self.subject_alt_names,
            waypoint: self.waypoint.map(Into::into),
            weighted_waypoints: self.weighted_waypoints.into_iter().map(|w| (w.destination.into(), w.weight)).collect(),
            load_balancing: self.load_balancer.map(Into::into),
            ip_families: self.ip_families.into(),
            canonical: self.canonical,
            visibility: self.visibility.into(),
            ..Service::new(self.namespace, self.name, self.hostname)
        }
    }
}

impl From<LoadBalancer> for LoadBalancing {
    fn from(lb: LoadBalancer) -> Self {
        Self {
            routing_preference: lb.routing_preferences.into_iter().map(Into::into).collect(),
            mode: lb.mode.into(),
            health_policy: lb.health_policy.into(),
        }
    }
}

impl From<Preference> for Scope {
    fn from(preference: Preference) -> Self {
        match preference {
            Preference::Region => Self::Region,
            Preference::Zone => Self::Zone,
            Preference::Subzone => Self::Subzone,
            Preference::Node => Self::Node,
            Preference::Cluster => Self::Cluster,
            Preference::Network => Self::Network,
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct PolicyEntry {
    name: Arc<str>,
    namespace: Arc<str>,
    scope: PolicyReach,
    action: Effect,
    dry_run: bool,
    /// Alternatives of clauses that must all hold, each of alternative matches.
    rules: Vec<Vec<Vec<MatchEntry>>>,
}

#[derive(Deserialize)]
enum PolicyReach {
    Global,
    Namespace,
    WorkloadSelector,
}

#[derive(Deserialize)]
enum Effect {
    Allow,
    Deny,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
struct MatchEntry {
    namespaces: Vec<Text>,
    not_namespaces: Vec<Text>,
    principals: Vec<Text>,
    not_principals: Vec<Text>,
    source_ips: Vec<IpNet>,
    not_source_ips: Vec<IpNet>,
    destination_ips: Vec<IpNet>,
    not_destination_ips: Vec<IpNet>,
    destination_ports: Vec<u16>,
    not_destination_ports: Vec<u16>,
    service_accounts: Vec<Account>,
    not_service_accounts: Vec<Account>,
}

#[derive(Deserialize)]
enum Text {
    Exact(Arc<str>),
    Prefix(Arc<str>),
    Suffix(Arc<str>),
    /// `Presence: []`.
    Presence([(); 0]),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Account {
    namespace: Arc<str>,
    service_account: Arc<str>,
}

impl PolicyEntry {
    fn into_model(self) -> Policy {
        let clause = |matches: Vec<MatchEntry>| Clause { matches: matches.into_iter().map(Into::into).collect() };
        let rule = |clauses: Vec<Vec<MatchEntry>>| Rule {
            clauses: clauses.into_iter().map(clause).collect(),
            ..Rule::default()
        };
        let object = format!("static policy {}/{}", self.namespace, self.name).into();
        Policy {
            name: self.name,
            namespace: self.namespace,
            scope: match self.scope {
                PolicyReach::Global => PolicyScope::Global,
                PolicyReach::Namespace => PolicyScope::Namespace,
                PolicyReach::WorkloadSelector => PolicyScope::WorkloadSelector,
            },
            action: match self.action {
                Effect::Allow => Action::Allow,
                Effect::Deny => Action::Deny,
            },
            dry_run: self.dry_run,
            rules: self.rules.into_iter().map(rule).collect(),
            origin: Origin { object, ..Origin::default() },
        }
    }
}

impl From<MatchEntry> for Match {
    fn from(m: MatchEntry) -> Self {
        let texts = |list: Vec<Text>| list.into_iter().map(StringMatch::from).collect();
        let accounts = |list: Vec<Account>| list.into_iter().map(ServiceAccountMatch::from).collect();
        Self {
            namespaces: texts(m.namespaces),
            not_namespaces: texts(m.not_namespaces),
            principals: texts(m.principals),
            not_principals: texts(m.not_principals),
            source_ips: m.source_ips,
            not_source_ips: m.not_source_ips,
            destination_ips: m.destination_ips,
            not_destination_ips: m.not_destination_ips,
            destination_ports: m.destination_ports,
            not_destination_ports: m.not_destination_ports,
            service_accounts: accounts(m.service_accounts),
            not_service_accounts: accounts(m.not_service_accounts),
        }
    }
}

impl From<Text> for StringMatch {
    fn from(text: Text) -> Self {
        match text {
            Text::Exact(text) => Self::Exact(text),
            Text::Prefix(text) => Self::Prefix(text),
            Text::Suffix(text) => Self::Suffix(text),
            Text::Presence([]) => Self::Presence,
        }
    }
}

impl From<Account> for ServiceAccountMatch {
    fn from(account: Account) -> Self {
        Self { namespace: account.namespace, service_account: account.service_account }
    }
}
