//! Bytes of other proxies.

use std::net::SocketAddr;

use fuzz::target;
use mesh_core::{
    headers::{Authority, Baggage, TraceParent, encode_baggage, encode_forwarded, parse_baggage, parse_forwarded_host},
    identity::Identity,
    workload::{Workload, WorkloadType},
};
use mesh_net::capture;
use rustls_pki_types::CertificateDer;

use crate::text;

target!(authority, |bytes: &[u8]| {
    if let Ok(authority) = text(bytes).parse::<Authority>() {
        assert_eq!(authority.to_string().parse::<Authority>(), Ok(authority));
    }
});

target!(identity, |bytes: &[u8]| {
    if let Ok(identity) = text(bytes).parse::<Identity>() {
        assert_eq!(identity.to_string().parse::<Identity>(), Ok(identity));
    }
});

target!(traceparent, |bytes: &[u8]| {
    if let Ok(traceparent) = text(bytes).parse::<TraceParent>() {
        assert_eq!(traceparent.to_string().parse::<TraceParent>(), Ok(traceparent));
    }
});

target!(
    /// What cannot be sent is left out; what is sent is read back.
    baggage,
    |bytes: &[u8]| {
        let sent = parse_baggage(&encode_baggage(&workload(&parse_baggage(&text(bytes)))));
        assert_eq!(parse_baggage(&encode_baggage(&workload(&sent))), sent);
    }
);

fn workload(baggage: &Baggage) -> Workload {
    let value = |field: &Option<String>| field.as_deref().unwrap_or_default().into();
    let mut workload = Workload::new("uid", value(&baggage.namespace), value(&baggage.workload_name));
    workload.cluster_id = value(&baggage.cluster);
    workload.workload_type = baggage.workload_type.unwrap_or(WorkloadType::Pod);
    workload.canonical_name = value(&baggage.canonical_name);
    workload.canonical_revision = value(&baggage.canonical_revision);
    workload.locality.region = value(&baggage.region);
    workload.locality.zone = value(&baggage.zone);
    workload
}

target!(forwarded, |bytes: &[u8]| {
    let client = SocketAddr::from(([10, 0, 0, 1], 4000));
    if let Some(host) = parse_forwarded_host(&text(bytes)) {
        assert_eq!(parse_forwarded_host(&encode_forwarded(client, Some(&host))), Some(host));
    }
});

target!(certificate, |bytes: &[u8]| {
    let certificate = CertificateDer::from(bytes);
    mesh_identity::svid::validity(&certificate);
    if let Some(identity) = mesh_identity::verify::peer_identity(&[certificate]) {
        assert_eq!(identity.to_string().parse::<Identity>(), Ok(identity));
    }
});

target!(crl, |bytes: &[u8]| {
    if let Ok(crls) = mesh_identity::crl::Crls::parse(bytes) {
        assert!(crls.overdue(std::time::SystemTime::now()).count() <= crls.len());
    }
});

target!(kept_certificate, |bytes: &[u8]| {
    if let Some(kept) = mesh_identity::store::decode(bytes) {
        assert_eq!(mesh_identity::store::encode(&kept), bytes);
    }
});

target!(frame, |bytes: &[u8]| {
    if let Some(packet) = capture::parse(bytes) {
        assert!(bytes.len() >= packet.payload.len() + 14 + 20, "more payload than frame");
        assert_eq!(packet.endpoints().is_some(), packet.tcp.is_some());
    }
});
