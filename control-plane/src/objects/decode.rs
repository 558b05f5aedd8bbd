//! Documents → objects.

use std::{net::IpAddr, sync::Arc};

use mesh_core::{
    addr::canonical_ip,
    service::AppProtocol,
    workload::{Locality, WorkloadType},
};

use super::{
    Binding, EndpointSlice, Kind, Labels, NamedPorts, Namespace, Object, ObjectKey, Pod, PodEnrolment, Service,
    ServicePort, Settings, SliceEndpoint, Spec, Status, TargetPort, egress, gateway, mesh_config, policy,
};
use crate::{
    fields::{Cursor, Document, Fields},
    problem::{Place, Problem},
    yaml::Node,
};

/// What a document said.
#[derive(Debug, Default)]
pub(crate) struct Read {
    pub(crate) objects: Vec<Object>,
    /// Objects that were recognised but are wrong, each with its stand-in if its kind has one.
    pub(crate) rejected: Vec<(ObjectKey, Option<Object>)>,
    /// What the API server has of the state of each object that was recognised.
    pub(crate) statuses: Vec<(ObjectKey, Status)>,
    /// Something was written that may be an object of ours, but not which.
    pub(crate) unidentified: bool,
    /// Something of it means nothing to anybody.
    pub(crate) wrong: bool,
    pub(crate) problems: Vec<Problem>,
}

/// Reads one document, written at `place`: an object, or a `List` of them.
pub(crate) fn read(place: &Place, node: &Node, settings: &Settings) -> Read {
    let mut read = Read::default();
    let document = Document::new(place.clone());
    let cursor = Cursor::root(&document, node);
    match list_items(&cursor) {
        Some(items) => items.iter().for_each(|item| read.add(place, item, settings)),
        None => read.add(place, &cursor, settings),
    }
    read.problems.extend(document.into_problems());
    read
}

fn list_items<'a>(cursor: &Cursor<'a>) -> Option<Vec<Cursor<'a>>> {
    let silent = Document::new(cursor.place());
    let is_list = cursor.reported_to(&silent).fields()?.get("kind")?.text() == Some("List");
    is_list.then(|| cursor.fields()?.get("items").map(|items| items.items()))?
}

impl Read {
    pub(crate) fn extend(&mut self, other: Self) {
        self.objects.extend(other.objects);
        self.rejected.extend(other.rejected);
        self.statuses.extend(other.statuses);
        self.unidentified |= other.unidentified;
        self.wrong |= other.wrong;
        self.problems.extend(other.problems);
    }

    fn add(&mut self, place: &Place, cursor: &Cursor<'_>, settings: &Settings) {
        let document = Document::new(place.clone());
        let cursor = cursor.reported_to(&document);
        let found = object(&cursor, settings);
        self.unidentified |= found.is_none() && !document.is_usable();
        self.wrong |= document.is_wrong();
        if let Some((meta, spec)) = found {
            if meta.key.kind.is_stated() && matches!(place, Place::Object { .. }) {
                self.statuses.push((meta.key.clone(), Status::read(&cursor)));
            }
            let object = |spec| {
                let (key, place) = (meta.key.clone(), cursor.place());
                let binding = (meta.binding != Binding::none()).then(|| Box::new(meta.binding.clone()));
                Object { key, place, binding, spec }
            };
            match spec.filter(|_| document.is_usable()) {
                Some(spec) => self.objects.push(object(spec)),
                None => {
                    let stand_in = document.first_problem().and_then(|problem| match meta.key.kind {
                        Kind::ConfigMap => mesh_config::stand_in(&cursor).map(Spec::MeshConfig),
                        _ => policy::stand_in(&meta, &cursor, &problem, settings),
                    });
                    self.rejected.push((meta.key.clone(), stand_in.map(object)));
                }
            }
        }
        self.problems.extend(document.into_problems());
    }
}

/// The metadata we use.
pub(super) struct Meta {
    pub(super) key: ObjectKey,
    pub(super) uid: Arc<str>,
    pub(super) labels: Labels,
    pub(super) annotations: Labels,
    pub(super) created: Arc<str>,
    pub(super) binding: Binding,
    deleting: bool,
    /// Kind and name of the controlling owner.
    owner: Option<(Arc<str>, Arc<str>)>,
}

impl Meta {
    pub(super) fn label(&self, name: &str) -> Option<&Arc<str>> {
        self.labels.get(name).filter(|value| !value.is_empty())
    }

    pub(super) fn annotated_enrolled(&self) -> bool {
        self.annotations.get("ambient.istio.io/redirection").is_some_and(|value| **value == *"enabled")
    }

    /// Whether it terminates HBONE itself.
    pub(super) fn native_tunnel(&self) -> bool {
        self.label("networking.istio.io/tunnel").is_some_and(|value| value.contains("http"))
    }
}

/// `None` when it cannot be told which object this is, or it is none of ours.
fn object(cursor: &Cursor<'_>, settings: &Settings) -> Option<(Meta, Option<Spec>)> {
    let fields = cursor.fields()?;
    let kind = kind(&fields)?;
    let meta = meta(kind, &fields.required("metadata")?)?;
    if kind == Kind::ConfigMap && !mesh_config::is_ours(&meta, settings) || !is_of_revision(&meta, settings) {
        return None;
    }
    let spec = match kind {
        Kind::AuthorizationPolicy => {
            policy::authorization(&meta, &fields, settings).map(Box::new).map(Spec::AuthorizationPolicy)
        }
        Kind::EndpointSlice => Some(Spec::EndpointSlice(endpoint_slice(&meta, &fields))),
        Kind::ConfigMap => mesh_config::mesh_config(&fields).map(Spec::MeshConfig),
        Kind::Gateway => gateway::gateway(&meta, &fields).map(Spec::Gateway),
        Kind::Namespace => Some(Spec::Namespace(namespace(&meta))),
        Kind::Node => Some(Spec::Node(locality(&meta))),
        Kind::PeerAuthentication => {
            policy::peer_authentication(&meta, &fields).map(Box::new).map(Spec::PeerAuthentication)
        }
        Kind::Pod => pod(&meta, &fields).map(|pod| Spec::Pod(Box::new(pod))),
        Kind::PodEnrolment => pod_enrolment(&fields).map(Spec::PodEnrolment),
        Kind::Service => service(&meta, &fields).map(|service| Spec::Service(Box::new(service))),
        Kind::ServiceAccount => Some(Spec::ServiceAccount),
        Kind::ServiceEntry => egress::service_entry(&meta, &fields).map(|e| Spec::ServiceEntry(Box::new(e))),
        Kind::WorkloadEntry => egress::workload_entry(&meta, &fields).map(|e| Spec::WorkloadEntry(Box::new(e))),
    };
    Some((meta, spec))
}

/// Configuration may belong to one revision of the control plane only; what runs belongs to all.
fn is_of_revision(meta: &Meta, settings: &Settings) -> bool {
    match meta.key.kind {
        Kind::AuthorizationPolicy
        | Kind::Gateway
        | Kind::PeerAuthentication
        | Kind::ServiceEntry
        | Kind::WorkloadEntry => meta.label("istio.io/rev").is_none_or(|revision| *revision == settings.revision),
        _ => true,
    }
}

/// Kind and the API group that defines it.
const KINDS: [(Kind, &str); 13] = [
    (Kind::AuthorizationPolicy, "security.istio.io"),
    (Kind::ConfigMap, ""),
    (Kind::EndpointSlice, "discovery.k8s.io"),
    (Kind::Gateway, "gateway.networking.k8s.io"),
    (Kind::Namespace, ""),
    (Kind::Node, ""),
    (Kind::PeerAuthentication, "security.istio.io"),
    (Kind::Pod, ""),
    (Kind::PodEnrolment, "fairway.dev"),
    (Kind::Service, ""),
    (Kind::ServiceAccount, ""),
    (Kind::ServiceEntry, "networking.istio.io"),
    (Kind::WorkloadEntry, "networking.istio.io"),
];

fn kind(fields: &Fields<'_>) -> Option<Kind> {
    let (version, kind) = (fields.required("apiVersion"), fields.required("kind"));
    let (version, kind) = (version?, kind?);
    let (version_text, kind_text) = (version.text()?, kind.text()?);
    let group = version_text.split_once('/').map_or("", |(group, _)| group);
    let named = KINDS.iter().find(|(k, _)| k.name() == kind_text);
    match named {
        Some((kind, home)) if *home == group => return Some(*kind),
        // Other groups may have kinds of the same name (a Knative Service, say).
        Some((
            Kind::AuthorizationPolicy
            | Kind::PeerAuthentication
            | Kind::PodEnrolment
            | Kind::ServiceEntry
            | Kind::WorkloadEntry,
            home,
        )) => version.reject(
            format!("{kind_text} is not of `{version_text}`"),
            format!("expected apiVersion {home}/…; ignored until then"),
        ),
        _ if group == "security.istio.io" || group == "fairway.dev" => {
            let known: Vec<&str> = KINDS.iter().filter(|(_, home)| *home == group).map(|(k, _)| k.name()).collect();
            kind.reject(
                format!("{kind_text} has no effect here"),
                format!("known kinds of {group}: {}", known.join(", ")),
            );
        }
        _ => {}
    }
    None
}

fn meta(kind: Kind, cursor: &Cursor<'_>) -> Option<Meta> {
    let fields = cursor.fields()?;
    let (name, namespace) = (fields.required("name"), fields.get("namespace"));
    let namespace = match (kind.is_namespaced(), namespace) {
        (false, _) => "".into(),
        (true, Some(namespace)) => object_name(&namespace)?,
        (true, None) => "default".into(),
    };
    let name = object_name(&name?)?;
    let text = |name| fields.get(name).and_then(|f| f.shared()).unwrap_or_default();
    let map = |cursor: &Option<Cursor<'_>>| cursor.as_ref().map(|f| f.string_map()).unwrap_or_default();
    let (labels_at, labels) = (fields.get("labels"), map(&fields.get("labels")));
    let annotations = map(&fields.get("annotations"));
    let home = if kind == Kind::Namespace { &name } else { &namespace };
    Some(Meta {
        uid: text("uid"),
        binding: labels_at.as_ref().map(|at| Binding::read(at, &labels, &annotations, home)).unwrap_or_default(),
        key: ObjectKey { kind, namespace, name },
        labels,
        annotations,
        created: text("creationTimestamp"),
        deleting: fields.get("deletionTimestamp").is_some(),
        owner: fields.get("ownerReferences").and_then(|owners| controller(&owners)),
    })
}

/// RFC 1123 names, as Kubernetes demands: they become part of identities and resource names.
fn object_name(cursor: &Cursor<'_>) -> Option<Arc<str>> {
    let text = cursor.text()?;
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.');
    if text.is_empty() || text.len() > 253 || !text.bytes().all(plain) {
        cursor.reject("not a valid name", "expected lower-case letters, digits, `-` and `.`, at most 253");
        return None;
    }
    Some(text.into())
}

fn controller(owners: &Cursor<'_>) -> Option<(Arc<str>, Arc<str>)> {
    let owners = owners.items();
    let is_controller = |f: &Fields<'_>| f.get("controller").and_then(|c| c.bool()).unwrap_or(false);
    let owner = owners.iter().filter_map(Cursor::fields).find(is_controller)?;
    Some((owner.required("kind")?.shared()?, owner.required("name")?.shared()?))
}

fn namespace(meta: &Meta) -> Namespace {
    Namespace {
        labels: meta.labels.clone(),
        network: meta.label("topology.istio.io/network").cloned(),
        traffic_distribution: meta.annotations.get("networking.istio.io/traffic-distribution").cloned(),
    }
}

fn locality(meta: &Meta) -> Locality {
    let label = |name| meta.label(name).cloned().unwrap_or_default();
    Locality {
        region: label("topology.kubernetes.io/region"),
        zone: label("topology.kubernetes.io/zone"),
        subzone: label("topology.istio.io/subzone"),
    }
}

fn pod_enrolment(fields: &Fields<'_>) -> Option<PodEnrolment> {
    let spec = fields.required("spec")?.fields()?;
    let (pod_uid, enabled) = (spec.required("podUid"), spec.required("redirection"));
    spec.deny_unknown();
    let enabled = enabled?.one_of(&[("enabled", true), ("pending", false)])?;
    Some(PodEnrolment { pod_uid: pod_uid?.shared()?, enabled })
}

fn pod(meta: &Meta, fields: &Fields<'_>) -> Option<Pod> {
    let spec = fields.required("spec")?.fields()?;
    let status = fields.get("status").and_then(|s| s.fields());
    let phase = status.as_ref().and_then(|s| s.get("phase")).and_then(|p| p.text()).unwrap_or_default();
    let (workload_name, workload_type) = owner(meta);
    let text = |name| spec.get(name).and_then(|f| f.shared());
    Some(Pod {
        uid: meta.uid.clone(),
        labels: Arc::new(meta.labels.clone()),
        annotated_enrolled: meta.annotated_enrolled(),
        native_tunnel: meta.native_tunnel(),
        node: text("nodeName").unwrap_or_default(),
        service_account: text("serviceAccountName").unwrap_or_else(|| "default".into()),
        host_network: spec.get("hostNetwork").and_then(|h| h.bool()).unwrap_or(false),
        addresses: status.as_ref().map(pod_addresses).unwrap_or_default(),
        ready: !meta.deleting && status.as_ref().is_some_and(is_ready),
        terminal: matches!(phase, "Succeeded" | "Failed"),
        workload_name,
        workload_type,
        named_ports: Arc::new(named_ports(&spec)),
    })
}

fn pod_addresses(status: &Fields<'_>) -> Vec<IpAddr> {
    let all = status.get("podIPs").map(|ips| ips.items()).unwrap_or_default();
    let all: Vec<IpAddr> = all.iter().filter_map(|ip| address(&ip.fields()?.required("ip")?)).collect();
    if all.is_empty() { status.get("podIP").and_then(|ip| address(&ip)).into_iter().collect() } else { all }
}

fn address(cursor: &Cursor<'_>) -> Option<IpAddr> {
    cursor.parse("an IP address").map(canonical_ip)
}

fn is_ready(status: &Fields<'_>) -> bool {
    let conditions = status.get("conditions").map(|c| c.items()).unwrap_or_default();
    let is = |f: &Fields<'_>, name, value| f.get(name).and_then(|v| v.text()) == Some(value);
    conditions.iter().filter_map(Cursor::fields).any(|c| is(&c, "type", "Ready") && is(&c, "status", "True"))
}

/// The name people know a pod's workload by, from its controlling owner.
fn owner(meta: &Meta) -> (Arc<str>, WorkloadType) {
    let (name, workload_type) = match &meta.owner {
        None => (meta.key.name.clone(), WorkloadType::Pod),
        Some((kind, name)) => match &**kind {
            "ReplicaSet" => {
                match meta.label("pod-template-hash").and_then(|hash| name.strip_suffix(&format!("-{hash}"))) {
                    Some(deployment) => (deployment.into(), WorkloadType::Deployment),
                    None => (name.clone(), WorkloadType::Pod),
                }
            }
            "Job" => match name.rsplit_once('-') {
                // A CronJob's jobs end in the scheduled minute since the epoch.
                Some((cron, minute)) if minute.len() >= 8 && minute.bytes().all(|b| b.is_ascii_digit()) => {
                    (cron.into(), WorkloadType::CronJob)
                }
                _ => (name.clone(), WorkloadType::Job),
            },
            _ => (name.clone(), WorkloadType::Pod),
        },
    };
    (meta.label("service.istio.io/workload-name").cloned().unwrap_or(name), workload_type)
}

fn named_ports(spec: &Fields<'_>) -> NamedPorts {
    let list = |name| spec.get(name).map(|c| c.items()).unwrap_or_default();
    let containers = list("containers").into_iter().filter_map(|c| c.fields());
    let restarts = |c: &Fields<'_>| c.get("restartPolicy").and_then(|p| p.text()) == Some("Always");
    let sidecars = list("initContainers").into_iter().filter_map(|c| c.fields()).filter(restarts);
    let ports = containers.chain(sidecars).filter_map(|c| c.get("ports")).flat_map(|ports| ports.items());
    let named = ports.filter_map(|port| {
        let port = port.fields().filter(is_tcp)?;
        Some((port.get("name")?.shared()?, port.required("containerPort")?.port()?))
    });
    named.collect()
}

fn is_tcp(port: &Fields<'_>) -> bool {
    port.get("protocol").and_then(|p| p.text()).is_none_or(|protocol| protocol == "TCP")
}

fn service(meta: &Meta, fields: &Fields<'_>) -> Option<Service> {
    let spec = fields.required("spec")?.fields()?;
    let list = |name| spec.get(name).map(|l| l.items()).unwrap_or_default();
    let is = |name, value| spec.get(name).and_then(|f| f.text()) == Some(value);
    let annotated = meta.annotations.get("networking.istio.io/traffic-distribution").cloned();
    Some(Service {
        is_gateway: meta.label("gateway.istio.io/managed").is_some(),
        selector: spec.get("selector").map(|s| s.string_map()).unwrap_or_default(),
        addresses: cluster_ips(&spec),
        ports: list("ports")
            .iter()
            .filter_map(Cursor::fields)
            .filter(is_tcp)
            .filter_map(|p| service_port(&p))
            .collect(),
        families: list("ipFamilies").iter().filter_map(Cursor::shared).collect(),
        publish_not_ready: spec.get("publishNotReadyAddresses").and_then(|p| p.bool()).unwrap_or(false),
        internal_local: is("internalTrafficPolicy", "Local"),
        traffic_distribution: spec.get("trafficDistribution").and_then(|t| t.shared()).or(annotated),
        external_name: is("type", "ExternalName"),
    })
}

fn cluster_ips(spec: &Fields<'_>) -> Vec<IpAddr> {
    let listed = spec.get("clusterIPs").map(|ips| ips.items()).unwrap_or_default();
    let all = if listed.is_empty() { spec.get("clusterIP").into_iter().collect() } else { listed };
    all.iter().filter(|ip| !matches!(ip.text(), Some("None" | "") | None)).filter_map(address).collect()
}

fn service_port(fields: &Fields<'_>) -> Option<ServicePort> {
    let port = fields.required("port")?.port()?;
    let name = fields.get("name").and_then(|n| n.shared()).unwrap_or_default();
    let protocol = fields.get("appProtocol").and_then(|p| p.shared());
    let target = match fields.get("targetPort") {
        None => TargetPort::Number(port),
        Some(target) if target.text()?.bytes().all(|b| b.is_ascii_digit()) => TargetPort::Number(target.port()?),
        Some(target) => TargetPort::Name(target.shared()?),
    };
    let app_protocol = app_protocol(protocol.as_deref(), &name);
    Some(ServicePort { name, port, target, app_protocol })
}

/// `appProtocol`, else the convention `protocol[-suffix]` of port names.
pub(super) fn app_protocol(explicit: Option<&str>, name: &str) -> AppProtocol {
    let name = explicit.unwrap_or_else(|| name.split('-').next().unwrap_or_default());
    match name {
        "grpc" | "grpc-web" | "kubernetes.io/grpc" => AppProtocol::Grpc,
        "http" | "kubernetes.io/ws" => AppProtocol::Http11,
        "http2" | "kubernetes.io/h2c" => AppProtocol::Http2,
        "https" | "tls" | "kubernetes.io/wss" => AppProtocol::Tls,
        "tcp" => AppProtocol::Tcp,
        _ => AppProtocol::Unknown,
    }
}

fn endpoint_slice(meta: &Meta, fields: &Fields<'_>) -> EndpointSlice {
    let list = |name| fields.get(name).map(|l| l.items()).unwrap_or_default();
    let is_fqdn = fields.get("addressType").and_then(|t| t.text()) == Some("FQDN");
    let ports = list("ports").into_iter().filter_map(|p| p.fields().filter(is_tcp));
    let endpoints = list("endpoints").into_iter().filter(|_| !is_fqdn);
    EndpointSlice {
        service: meta.label("kubernetes.io/service-name").cloned(),
        ports: ports
            .filter_map(|p| Some((p.get("name").and_then(|n| n.shared()).unwrap_or_default(), p.get("port")?.port()?)))
            .collect(),
        endpoints: endpoints.filter_map(|e| slice_endpoint(&e.fields()?)).collect(),
    }
}

fn slice_endpoint(fields: &Fields<'_>) -> Option<SliceEndpoint> {
    let addresses = fields.required("addresses")?.items();
    let address = address(addresses.first()?)?;
    let conditions = fields.get("conditions").and_then(|c| c.fields());
    let ready = conditions.and_then(|c| c.get("ready")).and_then(|r| r.bool()).unwrap_or(true);
    let pod = fields.get("targetRef").and_then(|t| {
        let target = t.fields()?;
        let is_pod = target.required("kind")?.text()? == "Pod";
        let uid = target.get("uid").and_then(|uid| uid.shared());
        is_pod.then(|| Some((target.required("name")?.shared()?, uid)))?
    });
    Some(SliceEndpoint { address, ready, node: fields.get("nodeName").and_then(|n| n.shared()), pod })
}
