//! The labels of Istio's TCP metrics.

use std::sync::Arc;

use mesh_core::{headers::Baggage, identity::Identity, service::Service, workload::Workload};
use prometheus::proto::LabelPair;

use crate::flow::{Direction, Flow};

pub(crate) const UNKNOWN: &str = "unknown";

/// Who talks to whom, as whom, and how it ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrafficLabels {
    reporter: &'static str,
    pub source: Party,
    pub destination: Party,
    /// Hostname, namespace, name.
    service: [Arc<str>; 3],
    /// `-` while all is well.
    flags: &'static str,
    mutual_tls: bool,
}

/// One side. Values that are not known are empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Party {
    pub workload: Arc<str>,
    canonical_service: Arc<str>,
    canonical_revision: Arc<str>,
    namespace: Arc<str>,
    principal: Option<Identity>,
    app: Arc<str>,
    cluster: Arc<str>,
    region: Arc<str>,
    zone: Arc<str>,
}

impl Party {
    fn of(workload: &Workload) -> Self {
        Self {
            workload: workload.workload_name.clone(),
            canonical_service: workload.canonical_name.clone(),
            canonical_revision: workload.canonical_revision.clone(),
            namespace: workload.namespace.clone(),
            principal: None,
            app: workload.canonical_name.clone(),
            cluster: workload.cluster_id.clone(),
            region: workload.locality.region.clone(),
            zone: workload.locality.zone.clone(),
        }
    }

    fn from_baggage(baggage: &Baggage) -> Self {
        let text = |value: &Option<String>| Arc::from(value.as_deref().unwrap_or_default());
        Self {
            workload: text(&baggage.workload_name),
            canonical_service: text(&baggage.canonical_name),
            canonical_revision: text(&baggage.canonical_revision),
            namespace: text(&baggage.namespace),
            principal: None,
            // As upstream: what a peer says of itself yields the workload's name here.
            app: text(&baggage.workload_name),
            cluster: text(&baggage.cluster),
            region: text(&baggage.region),
            zone: text(&baggage.zone),
        }
    }

    fn push(&self, side: &str, out: &mut Vec<LabelPair>) {
        let principal = self.principal.as_ref().map(ToString::to_string).unwrap_or_default();
        out.extend(self.values(&principal).iter().map(|(name, value)| pair(&format!("{side}_{name}"), value)));
    }

    fn values<'a>(&'a self, principal: &'a str) -> [(&'static str, &'a str); 8] {
        [
            ("workload", &self.workload),
            ("canonical_service", &self.canonical_service),
            ("canonical_revision", &self.canonical_revision),
            ("workload_namespace", &self.namespace),
            ("principal", principal),
            ("app", &self.app),
            ("version", &self.canonical_revision),
            ("cluster", &self.cluster),
        ]
    }
}

/// The labels of a look-up on behalf of a workload, in upstream's order.
pub(crate) const LOOKUP: [&str; 9] = [
    "source_workload",
    "source_canonical_service",
    "source_canonical_revision",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_cluster",
    "hostname",
];

/// The values of [`LOOKUP`].
pub(crate) fn lookup(source: &Workload, hostname: &str) -> [String; 9] {
    let (party, principal) = (Party::of(source), source.identity().to_string());
    let [a, b, c, d, e, f, g, h] =
        party.values(&principal).map(|(_, value)| if value.is_empty() { UNKNOWN } else { value }.to_owned());
    [a, b, c, d, e, f, g, h, hostname.to_owned()]
}

impl TrafficLabels {
    pub fn of(flow: &Flow) -> Self {
        let mut labels = Self::unknown(flow.direction);
        labels.source = match (&flow.source, &flow.source_baggage) {
            (Some(workload), _) => Party::of(workload),
            (None, Some(baggage)) => Party::from_baggage(baggage),
            (None, None) => Party::default(),
        };
        labels.source.principal = flow.source_identity();
        let told = flow.beyond.as_deref().and_then(|beyond| beyond.baggage.as_ref());
        labels.destination = match (told, &flow.destination_workload) {
            (Some(baggage), _) => Party::from_baggage(baggage),
            (None, Some(workload)) => Party::of(workload),
            (None, None) => Party::default(),
        };
        labels.destination.principal = flow.destination_identity();
        if let Some(Service { hostname, namespace, name, .. }) = flow.service.as_deref() {
            labels.service = [hostname.clone(), namespace.clone(), name.clone()];
        }
        labels.mutual_tls = flow.mutual_tls;
        labels
    }

    pub fn unknown(direction: Direction) -> Self {
        Self {
            reporter: direction.reporter(),
            source: Party::default(),
            destination: Party::default(),
            service: Default::default(),
            flags: "-",
            mutual_tls: false,
        }
    }

    #[must_use]
    pub fn with_flags(mut self, flags: &'static str) -> Self {
        self.flags = flags;
        self
    }

    /// Where series beyond the cap are counted together.
    #[must_use]
    pub fn overflow(&self) -> Self {
        let all: Arc<str> = "overflow".into();
        let party = Party { workload: all.clone(), namespace: all, ..Party::default() };
        Self { source: party.clone(), destination: party, service: Default::default(), ..self.clone() }
    }

    /// In upstream's order; localities only where one is known.
    pub fn pairs(&self) -> Vec<LabelPair> {
        let mut out = vec![pair("reporter", self.reporter)];
        self.source.push("source", &mut out);
        let [hostname, namespace, name] = &self.service;
        out.push(pair("destination_service", hostname));
        out.push(pair("destination_service_namespace", namespace));
        out.push(pair("destination_service_name", name));
        self.destination.push("destination", &mut out);
        out.push(pair("request_protocol", "tcp"));
        out.push(pair("response_flags", self.flags));
        out.push(pair("connection_security_policy", if self.mutual_tls { "mutual_tls" } else { UNKNOWN }));
        let localities: [(&str, &str); 4] = [
            ("source_region", &self.source.region),
            ("source_zone", &self.source.zone),
            ("destination_region", &self.destination.region),
            ("destination_zone", &self.destination.zone),
        ];
        if localities.iter().any(|(_, value)| !value.is_empty()) {
            out.extend(localities.iter().map(|(name, value)| pair(name, value)));
        }
        out
    }
}

fn pair(name: &str, value: &str) -> LabelPair {
    let mut pair = LabelPair::default();
    pair.set_name(name.to_owned());
    pair.set_value(if value.is_empty() { UNKNOWN } else { value }.to_owned());
    pair
}
