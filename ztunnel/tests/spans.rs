//! What ties the logs of two proxies together. In a process of its own: it listens to everything that is traced.

#[path = "proxy/mesh.rs"]
#[allow(dead_code, unreachable_pub, reason = "other tests use more of it")]
mod mesh;

use std::sync::{Arc, Mutex};

use tokio::join;
use tracing::{Id, Metadata, Subscriber, field::Field, field::Visit, span::Attributes};
use tracing_subscriber::{
    layer::{Context, Layer, SubscriberExt as _},
    registry::LookupSpan,
};

/// Spans as `parent:name{field=value …}`, and the spans around each line of the access log.
#[derive(Clone, Default)]
struct Seen {
    spans: Arc<Mutex<Vec<String>>>,
    around_access: Arc<Mutex<Vec<usize>>>,
}

struct Fields(String);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.0 += &format!(" {}={value:?}", field.name());
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Seen {
    fn enabled(&self, metadata: &Metadata<'_>, _: Context<'_, S>) -> bool {
        metadata.target().starts_with("ztunnel") || metadata.target() == "access"
    }

    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields(String::new());
        attributes.record(&mut fields);
        let parent = context.span(id).and_then(|span| span.parent()).map_or("", |parent| parent.name());
        let span = format!("{parent}:{}{{{}}}", attributes.metadata().name(), fields.0.trim_start());
        self.spans.lock().expect("lock").push(span);
    }

    fn on_event(&self, event: &tracing::Event<'_>, context: Context<'_, S>) {
        if event.metadata().target() == "access" {
            self.around_access.lock().expect("lock").push(context.event_scope(event).map_or(0, Iterator::count));
        }
    }
}

#[tokio::test]
async fn both_proxies_know_a_connection_by_one_number() {
    let seen = Seen::default();
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(seen.clone())).expect("only here");
    let mesh = mesh::Mesh::new();
    let (client, server) = (mesh.pod("client").await, mesh.pod("server").await);
    let (listener, address) = server.listen().await;
    let (near, far) = join!(client.dial(address), listener.accept());
    drop((near, far.expect("accept")));
    let source = client.ip;
    client.finish().await;
    server.finish().await;

    let spans = seen.spans.lock().expect("lock").clone();
    let of =
        |start: &str| spans.iter().find_map(|span| span.strip_prefix(start)).unwrap_or_else(|| panic!("{spans:?}"));
    assert!(spans.contains(&":proxy{wl=demo/client}".to_owned()), "{spans:?}");
    let sent = of("proxy:outbound{id=").trim_end_matches('}');
    assert!(sent.len() == 32 && sent.bytes().all(|b| b.is_ascii_hexdigit()), "{sent}");
    let (received, peer) = of("proxy:inbound{id=").split_once(' ').expect("two fields");
    assert_eq!(received, sent);
    assert!(peer.starts_with(&format!("peer={source}:")), "{peer}");
    assert!(spans.iter().any(|span| span.starts_with("proxy:socks5{")));
    let around = seen.around_access.lock().expect("lock").clone();
    assert!(around.len() >= 4 && around.iter().all(|spans| *spans == 0), "the access log stands alone: {around:?}");
}
