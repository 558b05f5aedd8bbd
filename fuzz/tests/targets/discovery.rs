//! What a client of discovery sends, to the service that answers it.

use std::{
    future::{Future, ready},
    pin::Pin,
    sync::{Arc, Mutex},
};

use bytes::{Buf as _, Bytes};
use fuzz::target;
use http_body_util::{BodyExt as _, StreamBody, combinators::UnsyncBoxBody};
use mesh_core::{
    index::Resource,
    policy::{Action, Policy, Scope},
    workload::Workload,
};
use mesh_xds::{
    convert::resource_to_wire,
    server::{Authenticate, Cache, Caller, Change, DeltaService, Event, Lane},
};
use prost::Message as _;
use proto::{
    ADDRESS_TYPE_URL,
    discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse},
};
use tonic::{Extensions, Status, codegen::Service as _, metadata::MetadataMap};

/// Of a request, in bytes. Beyond it a request is refused unread.
const MOST: usize = 128 * 1024;

target!(
    /// The first byte is how many bytes arrive at a time, the others are requests in their frames, with what a client holds read apart.
    /// Whatever they are, the stream ends with them, its answers can be read, and its first request was understood as a reader that
    /// keeps nothing apart understands it.
    discovery_requests,
    runs = 500,
    |bytes: &[u8]| {
        let Some((piece, stream)) = bytes.split_first() else { return };
        let told = told_by(stream, usize::from(*piece).max(1));
        let Some(first) = first_message(stream) else { return assert_eq!(told.opened, None) };
        match DeltaDiscoveryRequest::decode(first) {
            Ok(request) => {
                assert_eq!(told.opened, Some(request.node.unwrap_or_default().id));
                let answers = || told.answers.iter().filter(|answer| answer.type_url == request.type_url);
                assert!(answers().count() > 0 || request.type_url.is_empty() || !request.response_nonce.is_empty());
            }
            // Only what is held may be what this reader does not take: it has to be text.
            Err(error) => assert!(told.opened.is_none() || error.to_string().contains("initial_resource_versions")),
        }
    }
);

/// The first message of a stream, if it is there as a whole and may be read.
fn first_message(mut stream: &[u8]) -> Option<&[u8]> {
    let compressed = stream.try_get_u8().ok()?;
    let length = usize::try_from(stream.try_get_u32().ok()?).ok()?;
    stream.get(..length).filter(|_| compressed == 0 && length <= MOST)
}

struct Told {
    /// The client's name for itself in its first request.
    opened: Option<String>,
    answers: Vec<DeltaDiscoveryResponse>,
}

/// What a server of two resources makes of a stream that comes in pieces.
fn told_by(stream: &[u8], piece: usize) -> Told {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let opened = Arc::new(Mutex::new(None));
    let told = opened.clone();
    let observer = Arc::new(move |event: Event<'_>| {
        if let Event::Opened { node_id, .. } = event {
            *told.lock().expect("nobody panics with it") = Some(node_id.to_owned());
        }
    });
    let body = runtime.expect("a runtime").block_on(async {
        let mut service = DeltaService::new(cache(), Arc::new(Anybody), observer).into_server();
        let pieces: Vec<Bytes> = stream.chunks(piece).map(Bytes::copy_from_slice).collect();
        let frames = pieces.into_iter().map(|piece| Ok::<_, Status>(http_body::Frame::data(piece)));
        let request = http::Request::post(METHOD).body(UnsyncBoxBody::new(StreamBody::new(tokio_stream::iter(frames))));
        let Ok(answer) = service.call(request.expect("a request")).await;
        answer.into_body().collect().await.expect("the stream ends as every stream").to_bytes()
    });
    let opened = opened.lock().expect("nobody panics with it").clone();
    Told { opened, answers: answers(body) }
}

const METHOD: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";

fn answers(mut body: Bytes) -> Vec<DeltaDiscoveryResponse> {
    std::iter::from_fn(|| {
        let compressed = body.try_get_u8().ok()?;
        let length = usize::try_from(body.get_u32()).expect("no longer than memory");
        assert_eq!(compressed, 0);
        Some(DeltaDiscoveryResponse::decode(body.split_to(length)).expect("an answer"))
    })
    .collect()
}

fn cache() -> Arc<Cache> {
    let cache = Arc::new(Cache::new());
    let (name, namespace) = ("p".into(), "demo".into());
    let (scope, action, origin) = (Scope::WorkloadSelector, Action::Deny, Default::default());
    let policy = Policy { name, namespace, scope, action, rules: Vec::new(), dry_run: false, origin };
    let workload = Workload::new("c//Pod/demo/a", "demo", "a");
    let resources = [Resource::Policy(Arc::new(policy)), Resource::Workload(Arc::new(workload))];
    let upsert = |resource| Change::Upsert { encoded: resource_to_wire(resource), lane: Lane::Bulk };
    cache.publish(resources.iter().map(upsert));
    cache.set_ready();
    assert_eq!(cache.len(ADDRESS_TYPE_URL), 1);
    cache
}

/// Lets everybody in: what a client may send is the question, not who it is.
struct Anybody;

impl Authenticate for Anybody {
    fn authenticate<'a>(
        &'a self,
        _: &'a MetadataMap,
        _: &'a Extensions,
    ) -> Pin<Box<dyn Future<Output = Result<Caller, Status>> + Send + 'a>> {
        let [node, namespace, service_account, pod] = ["n1", "istio-system", "ztunnel", "z-1"].map(Arc::<str>::from);
        Box::pin(ready(Ok(Caller { node, namespace, service_account, pod })))
    }

    fn max_request(&self, _: &Caller) -> usize {
        MOST
    }
}

/// Writes the seeds, but for those that are there.
#[test]
#[ignore = "writes files"]
fn write_seeds() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus/discovery_requests");
    std::fs::create_dir_all(&folder).expect("a folder");
    let write_bytes = |name: &str, bytes: &[u8]| {
        if !folder.join(name).exists() {
            std::fs::write(folder.join(name), bytes).expect("a file");
        }
    };
    let write = |name: &str, piece: u8, messages: &[Vec<u8>]| {
        let framed = messages.iter().map(|message| {
            let length = u32::try_from(message.len()).expect("short").to_be_bytes();
            [&[0][..], &length, message].concat()
        });
        write_bytes(name, &[vec![piece], framed.collect::<Vec<_>>().concat()].concat());
    };
    let held = |names: &[&str]| names.iter().map(|name| ((*name).to_owned(), "0".repeat(32))).collect();
    let first = |type_url: &str, names: &[&str]| {
        DeltaDiscoveryRequest {
            node: Some(proto::core::Node { id: "ztunnel~10.0.0.1~z.istio-system~x".to_owned(), ..Default::default() }),
            type_url: type_url.to_owned(),
            initial_resource_versions: held(names),
            ..Default::default()
        }
        .encode_to_vec()
    };
    let more = |nonce: &str, subscribe: &[&str], unsubscribe: &[&str]| {
        let owned = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        DeltaDiscoveryRequest {
            type_url: ADDRESS_TYPE_URL.to_owned(),
            response_nonce: nonce.to_owned(),
            resource_names_subscribe: owned(subscribe),
            resource_names_unsubscribe: owned(unsubscribe),
            ..Default::default()
        }
        .encode_to_vec()
    };
    let policies = first(proto::AUTHORIZATION_TYPE_URL, &[]);
    let comes = first(ADDRESS_TYPE_URL, &[]);
    let returns = first(ADDRESS_TYPE_URL, &["c//Pod/demo/a", "c//Pod/demo/gone"]);
    write("comes", 0xff, &[comes.clone(), policies.clone(), more("1", &[], &[])]);
    write("returns", 7, &[returns.clone(), policies]);
    write("by_name", 1, &[more("", &["c//Pod/demo/a", "/10.0.0.1"], &["*"]), more("", &["demo/none"], &["/10.0.0.1"])]);
    write("unknown_type", 64, &[first("type.example/nothing", &["a"])]);
    // The name and the version of what is held are no text.
    write("held_in_no_text", 16, &[[&comes[..], &[0x2a, 6, 0x0a, 1, 0xff, 0x12, 1, 0xfe]].concat()]);
    // An entry that says it is longer than its field, and a field that is longer than its message.
    write("held_cut_off", 16, &[[&comes[..], &[0x2a, 3, 0x0a, 9, b'a']].concat(), [&comes[..], &[0x2a, 9]].concat()]);
    write("empty", 3, &[Vec::new(), Vec::new()]);
    // One that has to wait for its turn and does not come to its end; one that nobody waits for.
    write_bytes("large_cut_off", &[&[200, 0, 0, 1, 0x11, 0x70][..], &comes].concat());
    write_bytes("too_large", &[200, 0, 0x10, 0, 0, 0, 1]);
}
