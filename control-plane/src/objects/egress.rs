//! ServiceEntry and WorkloadEntry: what the mesh knows of the world outside it, and of machines that are no pods.
//!
//! Unknown fields reject the object, as with policies: a misspelt `resolution` would send traffic elsewhere.

use std::{net::IpAddr, sync::Arc};

use ipnet::IpNet;
use mesh_core::{addr::canonical_ip, service::AppProtocol, service::Visibility, workload::Locality};

use super::{
    Binding, Labels, NamedPorts,
    decode::{Meta, app_protocol},
    status,
};
use crate::fields::{Cursor, Fields, excerpt};

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ServiceEntry {
    pub(crate) labels: Labels,
    pub(crate) created: Arc<str>,
    pub(crate) native_tunnel: bool,
    /// Never empty, and none twice.
    pub(crate) hosts: Vec<Arc<str>>,
    /// Single addresses are ranges of one.
    pub(crate) addresses: Vec<IpNet>,
    /// Whether addresses are to be found for its hosts.
    pub(crate) allocates: bool,
    /// Those that its status says were found: host, address.
    pub(crate) assigned: Vec<(Arc<str>, IpAddr)>,
    /// Wants several addresses tried at once, which only a waypoint does.
    pub(crate) races: bool,
    pub(crate) ports: Vec<EntryPort>,
    pub(crate) resolution: Resolution,
    pub(crate) endpoints: Vec<Endpoint>,
    /// Empty when the entry has none.
    pub(crate) selector: Labels,
    pub(crate) subject_alt_names: Vec<Arc<str>>,
    /// `None`: for nobody.
    pub(crate) visibility: Option<Visibility>,
    pub(crate) traffic_distribution: Option<Arc<str>>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct EntryPort {
    pub(crate) name: Arc<str>,
    pub(crate) number: u16,
    pub(crate) target: Option<u16>,
    pub(crate) app_protocol: AppProtocol,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Resolution {
    Dns,
    /// To wherever the client was going.
    None,
    Static,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct WorkloadEntry {
    pub(crate) annotated_enrolled: bool,
    pub(crate) native_tunnel: bool,
    /// Its labels include those of the object.
    pub(crate) endpoint: Endpoint,
    pub(crate) workload_name: Arc<str>,
}

impl WorkloadEntry {
    /// What counts: the labels of its spec are its own as much as those of the object, whose binding is `outer`, and come before them.
    pub(crate) fn binding<'a>(&'a self, outer: &'a Binding) -> &'a Binding {
        let own = &self.endpoint.binding;
        if own.waypoint.is_some() { own } else { outer }
    }
}

/// The `spec` of a WorkloadEntry, and an endpoint of a ServiceEntry.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Endpoint {
    pub(crate) address: EndpointAddress,
    pub(crate) ports: NamedPorts,
    pub(crate) labels: Labels,
    /// What its labels say about waypoints.
    pub(crate) binding: Binding,
    pub(crate) network: Option<Arc<str>>,
    pub(crate) locality: Locality,
    /// 1 unless said otherwise.
    pub(crate) weight: u32,
    pub(crate) service_account: Option<Arc<str>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum EndpointAddress {
    Host(Arc<str>),
    Ip(IpAddr),
}

pub(super) fn service_entry(meta: &Meta, fields: &Fields<'_>) -> Option<ServiceEntry> {
    let spec = fields.required("spec")?.fields()?;
    let hosts = hosts(&spec);
    let resolution = resolution(&spec);
    let addresses = addresses(&spec, resolution);
    let ports = spec.get("ports").map(|l| l.items()).unwrap_or_default();
    let ports = ports.iter().filter_map(entry_port).collect();
    let endpoints = endpoints(&spec, resolution, &meta.key.namespace);
    let selector = workload_selector(&spec);
    let names = spec.get("subjectAltNames").map(|l| l.texts()).unwrap_or_default();
    let visibility = visibility(&spec, &meta.key.namespace);
    if let Some(location) = spec.get("location") {
        // Layer 4 treats both alike: what an endpoint speaks is said by the endpoint.
        location.one_of(&[("MESH_EXTERNAL", ()), ("MESH_INTERNAL", ())]);
    }
    spec.deny_unknown();
    let resolution = resolution?;
    check_endpoints(&spec, resolution, &hosts, &endpoints, &selector);
    let opted_out =
        meta.labels.get("networking.istio.io/enable-autoallocate-ip").is_some_and(|value| **value == *"false");
    let strategy = meta.annotations.get("istio.io/connect-strategy");
    Some(ServiceEntry {
        labels: meta.labels.clone(),
        created: meta.created.clone(),
        native_tunnel: meta.native_tunnel(),
        allocates: addresses.is_empty() && resolution != Resolution::None && !opted_out,
        assigned: status::assigned(fields),
        races: strategy.is_some_and(|value| **value == *"RACE_FIRST_TCP_CONNECT") && resolution == Resolution::Dns,
        hosts,
        addresses,
        ports,
        resolution,
        endpoints,
        selector,
        subject_alt_names: names.into_iter().map(|(_, name)| name.into()).collect(),
        visibility,
        traffic_distribution: meta.annotations.get("networking.istio.io/traffic-distribution").cloned(),
    })
}

fn hosts(spec: &Fields<'_>) -> Vec<Arc<str>> {
    let Some(list) = spec.required("hosts") else { return Vec::new() };
    let texts = list.texts();
    if texts.is_empty() {
        list.reject("the list is empty", "add the host name clients use, like `api.example.com`");
    }
    let mut hosts: Vec<Arc<str>> = Vec::new();
    for (cursor, text) in texts {
        let text = &*text.to_ascii_lowercase();
        if !is_host(text.strip_prefix("*.").unwrap_or(text)) {
            cursor.reject(
                format!("`{}` is not a host name", excerpt(text)),
                "expected a DNS name like api.example.com or *.example.com, without scheme and port",
            );
        } else if hosts.iter().any(|host| **host == *text) {
            cursor.reject(format!("`{text}` is given twice"), "remove one of the two");
        } else {
            hosts.push(text.into());
        }
    }
    hosts
}

/// A DNS name (RFC 1123 §2.1); underscores occur in practice.
fn is_host(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
    !text.is_empty()
        && text.len() <= 253
        && text.split('.').all(|label| (1..=63).contains(&label.len()) && label.bytes().all(plain))
        && text.parse::<IpAddr>().is_err()
}

fn resolution(spec: &Fields<'_>) -> Option<Resolution> {
    let Some(resolution) = spec.get("resolution") else { return Some(Resolution::None) };
    if resolution.text() == Some("DYNAMIC_DNS") {
        resolution.unsupported("DYNAMIC_DNS needs a waypoint, which looks each name up", "use NONE, STATIC or DNS");
        return None;
    }
    resolution.one_of(&[
        ("NONE", Resolution::None),
        ("STATIC", Resolution::Static),
        ("DNS", Resolution::Dns),
        ("DNS_ROUND_ROBIN", Resolution::Dns),
    ])
}

fn addresses(spec: &Fields<'_>, resolution: Option<Resolution>) -> Vec<IpNet> {
    let texts = spec.get("addresses").map(|l| l.texts()).unwrap_or_default();
    let read = |(cursor, text): &(Cursor<'_>, &str)| {
        let single = text.parse::<IpAddr>().map(|ip| IpNet::from(canonical_ip(ip)));
        let Ok(net) = single.or_else(|_| text.parse::<IpNet>().map(|net| net.trunc())) else {
            cursor.reject(
                format!("`{}` is not an address or range", excerpt(text)),
                "expected an IP address or CIDR range, like 203.0.113.7 or 203.0.113.0/24",
            );
            return None;
        };
        if net.prefix_len() < net.max_prefix_len() && resolution == Some(Resolution::Dns) {
            cursor.reject("a range cannot stand for what DNS resolves", "use single addresses, or resolution NONE");
        }
        Some(net)
    };
    texts.iter().filter_map(read).collect()
}

/// `None` for UDP, which the mesh does not carry.
fn entry_port(cursor: &Cursor<'_>) -> Option<EntryPort> {
    let fields = cursor.fields()?;
    let (number, name) = (fields.required("number"), fields.required("name"));
    let target = fields.get("targetPort");
    let protocol = fields.get("protocol");
    fields.deny_unknown();
    let (number, name) = (usable_port(&number?)?, name?.shared()?);
    let target = target.and_then(|t| usable_port(&t));
    let written = protocol.as_ref().and_then(|p| p.text()).map(str::to_ascii_lowercase);
    if let (Some(protocol), Some("udp")) = (protocol, written.as_deref()) {
        protocol
            .warn("the mesh does not carry UDP: this port is ignored", "remove it; clients reach it outside the mesh");
        return None;
    }
    let app_protocol = app_protocol(written.as_deref(), &name);
    Some(EntryPort { name, number, target, app_protocol })
}

fn usable_port(cursor: &Cursor<'_>) -> Option<u16> {
    let port = cursor.port()?;
    if port == 0 {
        cursor.reject("port 0 cannot be connected to", "expected a port number, 1 to 65535");
    }
    (port != 0).then_some(port)
}

fn endpoints(spec: &Fields<'_>, resolution: Option<Resolution>, namespace: &Arc<str>) -> Vec<Endpoint> {
    let items = spec.get("endpoints").map(|l| l.items()).unwrap_or_default();
    let mut endpoints: Vec<Endpoint> = Vec::new();
    for item in &items {
        let Some(fields) = item.fields() else { continue };
        let Some(endpoint) = endpoint(&fields, namespace) else { continue };
        let address = fields.get("address").unwrap_or_else(|| item.clone());
        if resolution == Some(Resolution::Static) && matches!(endpoint.address, EndpointAddress::Host(_)) {
            address.reject("a host name is not static", "write an IP address, or use resolution DNS");
        }
        if endpoints.iter().any(|other| other.address == endpoint.address) {
            address.reject("this address is given twice", "remove one of the two endpoints");
        }
        endpoints.push(endpoint);
    }
    endpoints
}

fn check_endpoints(
    spec: &Fields<'_>,
    resolution: Resolution,
    hosts: &[Arc<str>],
    endpoints: &[Endpoint],
    selector: &Labels,
) {
    let wildcard = hosts.iter().any(|host| host.starts_with('*'));
    let has_endpoints = !endpoints.is_empty();
    let told = |field, message, remedy| {
        if let Some(cursor) = spec.get(field) {
            cursor.reject(message, remedy);
        }
    };
    match resolution {
        _ if has_endpoints && !selector.is_empty() => {
            told("endpoints", "endpoints are given beside a workloadSelector", "remove one of the two");
        }
        Resolution::None if has_endpoints => told(
            "endpoints",
            "resolution NONE goes where the client was going, so it has no endpoints",
            "remove them, or set resolution: STATIC",
        ),
        Resolution::Dns if wildcard && !has_endpoints && selector.is_empty() => {
            told("hosts", "a wildcard cannot be looked up", "add endpoints, or use resolution NONE");
        }
        Resolution::Static if !has_endpoints && selector.is_empty() => {
            spec.cursor.warn("the entry has no endpoints, so nothing answers", "add endpoints or a workloadSelector");
        }
        _ => {}
    }
}

fn workload_selector(spec: &Fields<'_>) -> Labels {
    let Some(fields) = spec.get("workloadSelector").and_then(|s| s.fields()) else { return Labels::new() };
    let labels = fields.get("labels").map(|labels| labels.string_map()).unwrap_or_default();
    if labels.is_empty() {
        fields.cursor.reject("the selector has no labels", "add `labels:`, or remove the selector");
    }
    fields.deny_unknown();
    labels
}

/// The wire knows everybody, the own namespace, and nobody.
fn visibility(spec: &Fields<'_>, own: &str) -> Option<Visibility> {
    let Some(list) = spec.get("exportTo") else { return Some(Visibility::Public) };
    let mut visibility = None;
    for (cursor, text) in list.texts() {
        match text {
            "*" => visibility = Some(Visibility::Public),
            "~" => {}
            _ if text == "." || text == own => visibility = visibility.or(Some(Visibility::Namespace)),
            other => cursor.reject(
                format!("`{}` cannot be told to proxies apart from other namespaces", excerpt(other)),
                "expected `*` (everybody), `.` (this namespace) or `~` (nobody)",
            ),
        }
    }
    visibility
}

pub(super) fn workload_entry(meta: &Meta, fields: &Fields<'_>) -> Option<WorkloadEntry> {
    let spec = fields.required("spec")?.fields()?;
    let mut endpoint = endpoint(&spec, &meta.key.namespace)?;
    let labels = std::mem::take(&mut endpoint.labels);
    endpoint.labels = meta.labels.clone().into_iter().chain(labels).collect();
    Some(WorkloadEntry {
        annotated_enrolled: meta.annotated_enrolled(),
        native_tunnel: meta.native_tunnel(),
        endpoint,
        workload_name: meta.label("service.istio.io/workload-name").unwrap_or(&meta.key.name).clone(),
    })
}

fn endpoint(fields: &Fields<'_>, namespace: &Arc<str>) -> Option<Endpoint> {
    let address = fields.required("address");
    let ports = fields.get("ports").and_then(|p| p.fields());
    let labels = fields.get("labels");
    let binding =
        labels.as_ref().map(|l| Binding::read(l, &l.string_map(), &Labels::new(), namespace)).unwrap_or_default();
    let labels = labels.map(|l| l.string_map()).unwrap_or_default();
    let text = |name| fields.get(name).and_then(|f| f.shared()).filter(|text| !text.is_empty());
    let (network, locality, service_account) = (text("network"), text("locality"), text("serviceAccount"));
    let weight = fields.get("weight").and_then(|w| w.parse("a weight, 0 or more")).unwrap_or(0u32);
    fields.deny_unknown();
    let ports = ports.iter().flat_map(|p| p.each().collect::<Vec<_>>());
    let ports = ports.filter_map(|(name, port)| Some((name.into(), usable_port(&port)?))).collect();
    Some(Endpoint {
        address: endpoint_address(&address?)?,
        ports,
        labels,
        binding,
        network,
        locality: locality.map(|text| parse_locality(&text)).unwrap_or_default(),
        weight: weight.max(1),
        service_account,
    })
}

fn endpoint_address(cursor: &Cursor<'_>) -> Option<EndpointAddress> {
    let text = cursor.text()?;
    if let Ok(ip) = text.parse() {
        return Some(EndpointAddress::Ip(canonical_ip(ip)));
    }
    if !is_host(text) {
        cursor.reject(
            format!("`{}` is neither an IP address nor a host name", excerpt(text)),
            "expected one of the two, without port",
        );
        return None;
    }
    Some(EndpointAddress::Host(text.into()))
}

/// `region/zone/subzone`, the last ones optional.
fn parse_locality(text: &str) -> Locality {
    let mut parts = text.splitn(3, '/').map(Arc::from);
    let mut next = || parts.next().unwrap_or_default();
    Locality { region: next(), zone: next(), subzone: next() }
}
