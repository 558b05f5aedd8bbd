use std::{
    io,
    sync::{Mutex, MutexGuard},
};

use mesh_core::{authorize::Decision, headers::Baggage, service::Service, workload::TunnelProtocol};
use tracing::{Event, Level, Metadata, Subscriber, field::Field, field::Visit, span};

use super::*;
use crate::flow::Beyond;

/// Collects events of the access log as `level message k=v …`.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<String>>>);

impl Lines {
    fn lock(&self) -> MutexGuard<'_, Vec<String>> {
        self.0.lock().unwrap()
    }
}

struct Line(String);

impl Visit for Line {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.0 += &format!(" {}={value:?}", field.name());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.0 += &match field.name() {
            "message" => format!(" {value:?}:"),
            name => format!(" {name}={value:?}"),
        };
    }
}

impl Subscriber for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "access" && *metadata.level() <= Level::INFO
    }

    fn event(&self, event: &Event<'_>) {
        let mut line = Line(event.metadata().level().to_string());
        event.record(&mut line);
        self.lock().push(line.0);
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

fn workload(name: &str) -> Arc<Workload> {
    let mut w = Workload::new(format!("c//Pod/demo/{name}-1"), "demo", format!("{name}-1"));
    w.workload_name = name.into();
    w.canonical_name = name.into();
    w.service_account = name.into();
    w.tunnel_protocol = TunnelProtocol::Hbone;
    Arc::new(w)
}

fn tunnel_flow(direction: Direction) -> Arc<Entry> {
    tunnel_flow_to(direction, workload("web"))
}

fn tunnel_flow_to(direction: Direction, server: Arc<Workload>) -> Arc<Entry> {
    let client = workload("client");
    let service = Service::new("demo", "web", "web.demo.svc.cluster.local");
    Entry::new(Flow {
        authority: "10.0.0.2:80".parse().ok(),
        mutual_tls: true,
        peer_identity: (direction == Direction::Inbound).then(|| client.identity().into()),
        source: Some(client),
        destination_workload: Some(server),
        service: Some(Arc::new(service)),
        ..Flow::new(direction, "10.0.0.1:4000".parse().unwrap(), "10.0.0.2:15008".parse().unwrap())
    })
}

/// Moves these bytes, and ends.
fn finish(flow: OpenFlow, sent: u64, received: u64, result: Result<(), &ProxyError>) {
    flow.progress().sent.set(sent);
    flow.progress().received.set(received);
    flow.finish(result);
}

/// What was logged, with the duration masked, and the metrics afterwards.
fn report(run: impl FnOnce(&Outcomes)) -> (Vec<String>, String) {
    let (registry, lines) = (Registry::new(), Lines::default());
    let outcomes = Outcomes::new(&registry);
    tracing::subscriber::with_default(lines.clone(), || run(&outcomes));
    let masked = lines.lock().iter().map(|line| mask(line)).collect();
    (masked, registry.encode())
}

fn mask(line: &str) -> String {
    let Some((before, rest)) = line.split_once("duration=\"") else { return line.to_owned() };
    let (_, after) = rest.split_once("ms\"").expect("whole milliseconds");
    format!("{before}duration=_{after}")
}

fn denied() -> ProxyError {
    ProxyError::Denied(Box::new(Decision::deny(Reason::Denied, "explicitly denied by: demo/p", 7)))
}

#[test]
fn a_finished_connection_is_one_line_with_every_field_in_order() {
    let (lines, _) = report(|outcomes| {
        finish(outcomes.opened(tunnel_flow(Direction::Outbound)), 84, 175, Ok(()));
    });
    assert_eq!(
        lines,
        [concat!(
            "INFO connection complete: src.addr=10.0.0.1:4000 src.workload=\"client-1\" src.namespace=\"demo\" ",
            "src.identity=\"spiffe://cluster.local/ns/demo/sa/client\" src.cluster=\"Kubernetes\" ",
            "dst.addr=10.0.0.2:15008 dst.hbone_addr=10.0.0.2:80 dst.service=\"web.demo.svc.cluster.local\" ",
            "dst.workload=\"web-1\" dst.namespace=\"demo\" dst.identity=\"spiffe://cluster.local/ns/demo/sa/web\" ",
            "dst.cluster=\"Kubernetes\" direction=\"outbound\" bytes_sent=84 bytes_recv=175 duration=_"
        )]
    );
}

#[test]
fn an_inbound_tunnel_names_both_ends_and_swaps_the_byte_counts() {
    let (lines, _) = report(|outcomes| finish(outcomes.opened(tunnel_flow(Direction::Inbound)), 175, 84, Ok(())));
    assert_eq!(
        lines,
        [concat!(
            "INFO connection complete: src.addr=10.0.0.1:4000 src.workload=\"client-1\" src.namespace=\"demo\" ",
            "src.identity=\"spiffe://cluster.local/ns/demo/sa/client\" src.cluster=\"Kubernetes\" ",
            "dst.addr=10.0.0.2:15008 dst.hbone_addr=10.0.0.2:80 dst.service=\"web.demo.svc.cluster.local\" ",
            "dst.workload=\"web-1\" dst.namespace=\"demo\" dst.identity=\"spiffe://cluster.local/ns/demo/sa/web\" ",
            "dst.cluster=\"Kubernetes\" direction=\"inbound\" bytes_sent=175 bytes_recv=84 duration=_"
        )]
    );
}

#[test]
fn plain_text_has_no_identities_and_no_authority() {
    for direction in [Direction::Inbound, Direction::Outbound] {
        let (lines, _) = report(|outcomes| {
            let flow = Flow {
                source: Some(workload("client")),
                destination_workload: Some(workload("web")),
                ..Flow::new(direction, "10.0.0.1:4000".parse().unwrap(), "10.0.0.2:80".parse().unwrap())
            };
            finish(outcomes.opened(Entry::new(flow)), 4, 5, Ok(()));
        });
        let wanted = format!(
            "INFO connection complete: src.addr=10.0.0.1:4000 src.workload=\"client-1\" src.namespace=\"demo\" \
             src.cluster=\"Kubernetes\" dst.addr=10.0.0.2:80 dst.workload=\"web-1\" dst.namespace=\"demo\" \
             dst.cluster=\"Kubernetes\" direction=\"{}\" bytes_sent=4 bytes_recv=5 duration=_",
            direction.as_str()
        );
        assert_eq!(lines, [wanted]);
    }
}

#[test]
fn beyond_a_gateway_the_far_end_is_who_it_says_and_proves_to_be() {
    let (lines, _) = report(|outcomes| {
        let baggage = Baggage {
            workload_name: Some("web-far".to_owned()),
            namespace: Some("far".to_owned()),
            cluster: Some("other".to_owned()),
            ..Baggage::default()
        };
        let identity = Some(Identity::new("cluster.local", "far", "web"));
        let flow = Flow {
            authority: "web.demo.svc.cluster.local:80".parse().ok(),
            mutual_tls: true,
            source: Some(workload("client")),
            destination_workload: Some(workload("gateway")),
            beyond: Some(Box::new(Beyond { identity, baggage: Some(baggage) })),
            ..Flow::new(Direction::Outbound, "10.0.0.1:4000".parse().unwrap(), "192.0.2.9:15008".parse().unwrap())
        };
        finish(outcomes.opened(Entry::new(flow)), 4, 5, Ok(()));
    });
    assert_eq!(
        lines,
        [concat!(
            "INFO connection complete: src.addr=10.0.0.1:4000 src.workload=\"client-1\" src.namespace=\"demo\" ",
            "src.identity=\"spiffe://cluster.local/ns/demo/sa/client\" src.cluster=\"Kubernetes\" ",
            "dst.addr=192.0.2.9:15008 dst.hbone_addr=web.demo.svc.cluster.local:80 dst.workload=\"web-far\" ",
            "dst.namespace=\"far\" dst.identity=\"spiffe://cluster.local/ns/far/sa/web\" dst.cluster=\"other\" ",
            "direction=\"outbound\" bytes_sent=4 bytes_recv=5 duration=_"
        )]
    );
}

#[test]
fn an_unknown_workload_is_denied_early() {
    let (lines, _) = report(|outcomes| {
        let error = ProxyError::UnknownWorkload("demo/web".into());
        let (peer, destination) = ("10.0.0.1:1".parse().unwrap(), "10.0.0.2:80".parse().unwrap());
        outcomes.early_deny(Direction::Inbound, peer, destination, &error);
    });
    let start = "WARN connection failed: src.addr=10.0.0.1:1 dst.addr=10.0.0.2:80 direction=\"inbound\" error=\"";
    assert!(lines[0].starts_with(start) && lines[0].contains("demo/web"), "{}", lines[0]);
}

#[test]
fn what_is_not_known_is_left_out() {
    let (lines, _) = report(|outcomes| {
        let flow = Flow::new(Direction::Inbound, "10.0.0.1:4000".parse().unwrap(), "10.0.0.2:80".parse().unwrap());
        outcomes.opened(Entry::new(flow)).finish(Err(&denied()));
    });
    assert_eq!(
        lines,
        [concat!(
            "ERROR connection complete: src.addr=10.0.0.1:4000 dst.addr=10.0.0.2:80 direction=\"inbound\" ",
            "bytes_sent=0 bytes_recv=0 duration=_ ",
            "error=\"connection closed due to policy rejection: explicitly denied by: demo/p\""
        )]
    );
}

#[test]
fn a_dropped_connection_is_reported_as_drained_and_an_early_one_briefly() {
    let (lines, metrics) = report(|outcomes| {
        drop(outcomes.opened(tunnel_flow(Direction::Inbound)));
        let (peer, destination) = ("10.0.0.1:1".parse().unwrap(), "10.0.0.2:80".parse().unwrap());
        let error = ProxyError::Connect { to: destination, source: io::Error::from(io::ErrorKind::ConnectionRefused) };
        outcomes.early_deny(Direction::Outbound, peer, destination, &error);
    });
    assert!(lines[0].ends_with("error=\"connection closed due to connection drain\""), "{}", lines[0]);
    assert_eq!(
        lines[1],
        "WARN connection failed: src.addr=10.0.0.1:1 dst.addr=10.0.0.2:80 direction=\"outbound\" \
         error=\"connection to 10.0.0.2:80 failed: connection refused\""
    );
    for wanted in ["reason=\"connect\",reporter=\"source\"} 1", "reason=\"drain\",reporter=\"destination\"} 1"] {
        assert!(metrics.contains(wanted), "{wanted} missing from\n{metrics}");
    }
}

#[test]
fn bytes_are_counted_towards_client_and_server_from_either_side() {
    for (direction, to_server, to_client) in [(Direction::Outbound, 10, 20), (Direction::Inbound, 20, 10)] {
        let (_, metrics) = report(|outcomes| {
            let flow = outcomes.opened(tunnel_flow(direction));
            flow.progress().sent.set(4);
            flow.progress().received.set(5);
            flow.meter.count();
            finish(flow, 10, 20, Ok(()));
        });
        let value = |name: &str| {
            let line = metrics.lines().find(|line| line.starts_with(&format!("{name}{{"))).unwrap();
            line.rsplit_once(' ').unwrap().1.parse::<u64>().unwrap()
        };
        assert_eq!(value("istio_tcp_received_bytes_total"), to_server);
        assert_eq!(value("istio_tcp_sent_bytes_total"), to_client);
    }
}

#[test]
fn a_failure_closes_under_its_flag_and_a_tunnel_names_both_principals() {
    let (_, metrics) = report(|outcomes| {
        outcomes.opened(tunnel_flow(Direction::Inbound)).finish(Err(&denied()));
    });
    let closed =
        metrics.lines().find(|l| l.starts_with("istio_tcp_connections_closed_total") && l.ends_with(" 1")).unwrap();
    for wanted in [
        "reporter=\"destination\"",
        "source_principal=\"spiffe://cluster.local/ns/demo/sa/client\"",
        "destination_principal=\"spiffe://cluster.local/ns/demo/sa/web\"",
        "destination_service=\"web.demo.svc.cluster.local\",destination_service_namespace=\"demo\",destination_service_name=\"web\"",
        "source_app=\"client\"",
        "request_protocol=\"tcp\",response_flags=\"DENY\",connection_security_policy=\"mutual_tls\"",
    ] {
        assert!(closed.contains(wanted), "{wanted} missing from {closed}");
    }
    assert!(metrics.contains("istio_tcp_connections_failed_total{"));
}

#[test]
fn a_retried_connection_keeps_opens_and_closes_paired() {
    let (lines, metrics) = report(|outcomes| {
        let mut flow = outcomes.opened(tunnel_flow(Direction::Outbound));
        flow.retarget(tunnel_flow_to(Direction::Outbound, workload("other")));
        finish(flow, 1, 1, Ok(()));
    });
    assert_eq!(lines.len(), 1);
    for family in ["istio_tcp_connections_opened_total{", "istio_tcp_connections_closed_total{"] {
        let ones = metrics.lines().filter(|l| l.starts_with(family) && l.ends_with(" 1")).count();
        assert_eq!(ones, 2, "{family}");
    }
}

#[test]
fn sockets_are_counted_while_their_guard_lives() {
    let registry = Registry::new();
    let outcomes = Outcomes::new(&registry);
    let guard = outcomes.socket(Direction::Outbound);
    assert!(registry.encode().contains("istio_tcp_sockets_open{reporter=\"source\"} 1"));
    drop(guard);
    assert!(registry.encode().contains("istio_tcp_sockets_open{reporter=\"source\"} 0"));
}
