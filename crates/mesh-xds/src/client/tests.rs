mod brief;

use mesh_core::workload::Workload;

use super::*;

struct Nowhere;

impl Transport for Nowhere {
    fn channel(&self) -> Pin<Box<dyn Future<Output = Result<Channel, BoxError>> + Send + '_>> {
        Box::pin(async { Err("nowhere".into()) })
    }

    fn metadata(&self) -> Result<MetadataMap, BoxError> {
        Ok(MetadataMap::new())
    }
}

/// Tells what is restored.
struct Told(std::sync::mpsc::Sender<Update>);

impl Handler for Told {
    fn apply(&mut self, _: Update) {}

    fn synced(&mut self, _: &'static str) {}

    fn restore(&mut self, saved: Vec<(&'static str, Update)>) {
        saved.into_iter().for_each(|(_, update)| self.0.send(update).unwrap_or_default());
    }
}

fn client() -> Client {
    told().0
}

fn told() -> (Client, std::sync::mpsc::Receiver<Update>) {
    let (tell, told) = std::sync::mpsc::channel();
    let types = [ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL];
    (Client::new(Arc::new(Nowhere), Node::default(), &types, Box::new(Told(tell)), Box::new(|_| {})), told)
}

fn workload(name: &str) -> WireResource {
    let encoded = convert::resource_to_wire(&Resource::Workload(Arc::new(Workload::new(name, "ns", name))));
    let body = prost_types::Any { type_url: ADDRESS_TYPE_URL.to_owned(), value: encoded.body.to_vec() };
    WireResource {
        name: name.to_owned(),
        version: "1".to_owned(),
        resource: Some(body),
        aliases: vec![format!("/{name}")],
        ttl: None,
    }
}

fn broken(name: &str) -> WireResource {
    let body = prost_types::Any { type_url: String::new(), value: vec![0xff] };
    WireResource { name: name.to_owned(), resource: Some(body), ..WireResource::default() }
}

fn response(type_url: &str, resources: Vec<WireResource>) -> DeltaDiscoveryResponse {
    let (type_url, nonce) = (type_url.to_owned(), "n".to_owned());
    DeltaDiscoveryResponse { type_url, nonce, resources, ..DeltaDiscoveryResponse::default() }
}

#[test]
fn a_type_that_was_not_asked_for_is_acknowledged() {
    let answers = client().on_response(response("type.googleapis.com/other", Vec::new()));
    assert_eq!((answers.len(), &*answers[0].response_nonce), (1, "n"));
    assert!(answers[0].type_url.ends_with("other") && answers[0].error_detail.is_none());
}

#[test]
fn the_rest_of_a_partly_rejected_response_stays_and_the_rejected_are_named() {
    let mut client = client();
    let resources = vec![broken("x"), workload("a"), broken("y")];
    let answers = client.on_response(response(ADDRESS_TYPE_URL, resources));
    let error = answers[0].error_detail.as_ref().expect("a NACK");
    let parts: Vec<&str> = error.message.split("; ").collect();
    assert!(error.code == 0 && parts.len() == 2, "{error:?}");
    assert!(parts[0].starts_with("x: ") && parts[1].starts_with("y: "), "{error:?}");
    let held = client.types[0].initial(Node::default(), &[]).initial_resource_versions;
    assert_eq!(held.keys().collect::<Vec<_>>(), ["a"]);
}

#[test]
fn streams_end_for_upstreams_reasons() {
    let status = |code, text: &str| Ended::Status(Status::new(code, text)).reason();
    assert_eq!(status(Code::Unavailable, "transport is closing"), "Reconnect");
    assert_eq!(status(Code::Unavailable, "code: received prior goaway: max_age"), "Reconnect");
    assert_eq!(status(Code::Unavailable, "no capacity"), "Error");
    assert_eq!(status(Code::PermissionDenied, ""), "Error");
    for code in [Code::Unknown, Code::Cancelled, Code::DeadlineExceeded] {
        assert_eq!(status(code, ""), "Reconnect");
    }
    assert_eq!(Ended::Complete.reason(), "Complete");
    assert_eq!((Ended::Connect("x".into()).reason(), Ended::Local("x".into()).reason()), ("ConnectionError", "Error"));
}

#[tokio::test(start_paused = true)]
async fn a_wish_without_an_answer_ends_at_its_deadline_and_is_renewed_with_the_stream() {
    let mut client = client();
    let demand = client.on_demand();
    let waiting = tokio::spawn(async move { demand.fetch("/10.0.0.1".into()).await });
    let wanted = next_wish(&mut client.wishes).await.unwrap();
    let request = client.on_wish(wanted).expect("a request");
    assert_eq!(
        (request.resource_names_subscribe, &*request.type_url),
        (vec!["/10.0.0.1".to_owned()], ADDRESS_TYPE_URL)
    );
    assert_eq!(waiting.await.unwrap(), Err(Unanswered));
    let asked = client.wishes.iter().flat_map(|wishes| wishes.asked.names());
    assert_eq!(client.types[0].initial(Node::default(), asked).initial_resource_versions["/10.0.0.1"], "");
    let (done, gave_up) = oneshot::channel();
    drop(gave_up);
    assert_eq!(client.on_wish(Wanted { name: "/10.0.0.2".into(), done }), None, "nobody waits any more");
}

#[tokio::test(start_paused = true)]
async fn what_is_known_is_told_at_once_while_the_control_plane_is_away_however_much_is_not() {
    let mut client = client();
    let demand = client.on_demand();
    let (done, answered) = oneshot::channel();
    client.on_wish(Wanted { name: "/a".into(), done }).expect("a request");
    client.on_response(response(ADDRESS_TYPE_URL, vec![workload("a")]));
    answered.await.unwrap();
    let (trigger, watcher) = mesh_runtime::drain::channel();
    let running = tokio::spawn(client.run(watcher));
    let unknown = (0..2 * WISHES).map(|n| {
        let demand = demand.clone();
        tokio::spawn(async move { demand.fetch(format!("/{n}").into()).await })
    });
    let unknown: Vec<_> = unknown.collect();
    let began = Instant::now();
    assert_eq!(demand.fetch("/a".into()).await, Ok(()));
    assert!(began.elapsed() < ANSWER, "of the paused clock: no waiter gave up meanwhile");
    for waiting in unknown {
        assert_eq!(waiting.await.unwrap(), Err(Unanswered));
    }
    trigger.drain(Duration::from_secs(1)).await;
    running.await.unwrap();
}

struct Keep(std::sync::mpsc::Sender<DeltaDiscoveryResponse>);

impl Journal for Keep {
    fn record(&mut self, accepted: DeltaDiscoveryResponse) {
        self.0.send(accepted).unwrap_or_default();
    }
}

#[test]
fn what_was_recorded_resumes_the_versions_but_is_no_first_sync() {
    let mut client = client();
    let (keep, kept) = std::sync::mpsc::channel();
    client.journal(Box::new(Keep(keep)));
    client.on_response(response(ADDRESS_TYPE_URL, vec![workload("a"), broken("b")]));
    client.on_response(response(AUTHORIZATION_TYPE_URL, vec![broken("ns/p")]));
    let (mut next, told) = told();
    next.resume(&kept.try_iter().collect::<Vec<_>>());
    let updates: Vec<Update> = told.try_iter().collect();
    assert!(matches!(updates[0].upserts[..], [Resource::Workload(_)]));
    assert!(matches!(updates[1].upserts[..], [Resource::Policy(_)]), "an unreadable policy goes on denying");
    assert_eq!(next.types[0].initial(Node::default(), &[]).initial_resource_versions["a"], "1");
    assert!(next.types[1].initial(Node::default(), &[]).initial_resource_versions.is_empty());
    assert!(next.types.iter().all(|kind| !kind.is_synced()));
}

#[test]
fn what_a_response_both_gives_and_takes_is_gone() {
    let mut client = client();
    let (keep, kept) = std::sync::mpsc::channel();
    client.journal(Box::new(Keep(keep)));
    let mut both = response(ADDRESS_TYPE_URL, vec![workload("a"), workload("b")]);
    both.removed_resources.push("a".to_owned());
    client.on_response(both);
    let held = client.types[0].initial(Node::default(), &[]).initial_resource_versions;
    assert_eq!(held.keys().collect::<Vec<_>>(), ["b"]);
    assert_eq!(kept.recv().unwrap().resources.len(), 1);
}
