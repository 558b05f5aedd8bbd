//! Bytes of other proxies.

use std::{net::SocketAddr, rc::Rc, time::Duration};

use fuzz::target;
use http::HeaderMap;
use mesh_core::{
    headers::{Authority, Baggage, TraceParent, encode_baggage, encode_forwarded, parse_baggage, parse_forwarded_host},
    identity::Identity,
    workload::{Workload, WorkloadType},
};
use mesh_hbone::{
    LocalBoxFuture, Settings,
    server::{self, Handler, Malformed, Request, Responder},
};
use mesh_net::capture;
use mesh_runtime::drain;
use rustls_pki_types::CertificateDer;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    task::LocalSet,
    time::timeout,
};

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

target!(frame, |bytes: &[u8]| {
    if let Some(packet) = capture::parse(bytes) {
        assert!(bytes.len() >= packet.payload.len() + 14 + 20, "more payload than frame");
        assert_eq!(packet.endpoints().is_some(), packet.tcp.is_some());
    }
});

target!(
    /// A tunnel whose peer opens HTTP/2 and then sends anything at all: it ends, by itself or at a deadline, without a panic.
    hbone_server,
    |bytes: &[u8]| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
        let runtime = runtime.expect("a runtime");
        LocalSet::new().block_on(&runtime, serve(bytes));
    }
);

/// RFC 9113 §3.4: the preface, and empty SETTINGS.
const OPENING: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

async fn serve(bytes: &[u8]) {
    let (mut peer, io) = tokio::io::duplex(1 << 20);
    let (_trigger, watcher) = drain::channel();
    let settings = Settings::default();
    let serving = server::serve(io, &settings, watcher, Rc::new(Refusing));
    let talking = async {
        // The tunnel may be gone before everything is said.
        drop(peer.write_all(&[OPENING, bytes].concat()).await);
        // An end too early would hide the requests behind it.
        drop(timeout(Duration::from_secs(1), peer.read_to_end(&mut Vec::new())).await);
        drop(peer);
    };
    // Virtual time: only a tunnel that waits for ever would reach it.
    let both = async { tokio::join!(serving, talking) };
    drop(timeout(Duration::from_secs(120), both).await.expect("the tunnel ends"));
}

/// Accepts what is for port 80 and refuses the rest.
struct Refusing;

impl Handler for Refusing {
    fn connect(self: Rc<Self>, request: Request, responder: Responder) -> LocalBoxFuture<'static, ()> {
        Box::pin(async move {
            match request.authority.port() {
                80 => drop(responder.accept(HeaderMap::new())),
                _ => responder.reject(http::StatusCode::FORBIDDEN),
            }
        })
    }

    fn malformed(&self, malformed: &Malformed) {
        assert!(malformed.status.is_client_error());
    }
}
