//! Both ends' bookkeeping of the incremental protocol, without I/O.
//!
//! ```text
//! client                                   server
//!   initial(type, what it still holds) ──▶ ServerStream::on_request → Respond
//!   on_response ◀── resources, removals ── ServerStream::sent
//!   ack / nack (nonce) ──────────────────▶ ServerStream::on_request → Acked | Nacked
//! ```

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use proto::{
    core::Node,
    discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse},
    google::rpc::Status,
};

/// What a client knows of one resource type: names and the versions it holds. Kept across reconnects.
#[derive(Clone, Debug)]
pub struct ClientType {
    type_url: &'static str,
    versions: BTreeMap<String, String>,
    synced: bool,
    on_demand: bool,
}

impl ClientType {
    /// A wildcard subscription: everything of the type.
    pub fn new(type_url: &'static str) -> Self {
        Self { type_url, versions: BTreeMap::new(), synced: false, on_demand: false }
    }

    /// A subscription to nothing yet: resources are asked for by name.
    pub fn on_demand(type_url: &'static str) -> Self {
        Self { on_demand: true, ..Self::new(type_url) }
    }

    pub fn is_on_demand(&self) -> bool {
        self.on_demand
    }

    pub fn type_url(&self) -> &'static str {
        self.type_url
    }

    /// Whether a response was ever accepted.
    pub fn is_synced(&self) -> bool {
        self.synced
    }

    /// The first request of a stream: wildcard is an empty subscribe list, on demand the star subscribed and unsubscribed at once. What
    /// is held already is listed so that the server sends only what changed and names what is gone; names that were `asked` for and have
    /// no version are listed with an empty one, which renews their subscription.
    pub fn initial<'a>(&self, node: Node, asked: impl IntoIterator<Item = &'a Arc<str>>) -> DeltaDiscoveryRequest {
        let star: Vec<String> = self.on_demand.then(|| "*".to_owned()).into_iter().collect();
        let mut versions = self.versions.clone();
        for name in asked {
            versions.entry(name.to_string()).or_default();
        }
        DeltaDiscoveryRequest {
            node: Some(node),
            type_url: self.type_url.to_owned(),
            resource_names_subscribe: star.clone(),
            resource_names_unsubscribe: star,
            initial_resource_versions: versions,
            ..DeltaDiscoveryRequest::default()
        }
    }

    /// Asks for names, or says that they are not needed any more.
    pub fn change(&self, subscribe: Vec<String>, unsubscribe: Vec<String>) -> DeltaDiscoveryRequest {
        DeltaDiscoveryRequest {
            type_url: self.type_url.to_owned(),
            resource_names_subscribe: subscribe,
            resource_names_unsubscribe: unsubscribe,
            ..DeltaDiscoveryRequest::default()
        }
    }

    /// As [`Self::accepted`], of what was accepted before this process started.
    pub fn restored<'a>(&mut self, upserts: impl IntoIterator<Item = (&'a str, &'a str)>, removed: &[String]) {
        let synced = self.synced;
        self.accepted(upserts, removed);
        self.synced = synced;
    }

    /// Records what was accepted; a rejected resource is not recorded, so that it is sent again after a reconnect.
    pub fn accepted<'a>(&mut self, upserts: impl IntoIterator<Item = (&'a str, &'a str)>, removed: &[String]) {
        for (name, version) in upserts {
            self.versions.insert(name.to_owned(), version.to_owned());
        }
        for name in removed {
            self.versions.remove(name);
        }
        self.synced = true;
    }

    /// The answer to a response: ACK, or NACK naming each rejected resource.
    pub fn answer(&self, response: &DeltaDiscoveryResponse, rejections: &[Rejection]) -> DeltaDiscoveryRequest {
        let error_detail = (!rejections.is_empty()).then(|| {
            let reasons: Vec<String> = rejections.iter().map(|r| format!("{}: {}", r.name, r.reason)).collect();
            Status { code: 0, message: reasons.join("; "), details: Vec::new() }
        });
        DeltaDiscoveryRequest {
            type_url: self.type_url.to_owned(),
            response_nonce: response.nonce.clone(),
            error_detail,
            ..DeltaDiscoveryRequest::default()
        }
    }
}

/// One resource a client did not accept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    pub name: String,
    pub reason: String,
}

/// What a server knows of one client's interest in one type.
#[derive(Clone, Debug, Default)]
pub struct ServerType {
    /// Everything of the type, or only `names`.
    pub wildcard: bool,
    /// Names subscribed to one by one (uid, `namespace/hostname`, or the alias `network/ip`).
    pub names: BTreeSet<Arc<str>>,
    /// Primary names of what was sent for `names`. The client holds these, so it hears of every change, also when they are not what led to
    /// them any more. No more than there are resources.
    pub followed: BTreeSet<Arc<str>>,
    /// Responses sent and not yet answered, oldest first.
    outstanding: VecDeque<String>,
    next_nonce: u64,
}

/// What a request asks of the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Send what is subscribed, except what the client holds at the same version; `names` is what it added now.
    Respond {
        /// Name to version the client says it holds.
        held: BTreeMap<String, String>,
        /// `None`: everything subscribed.
        names: Option<Vec<Arc<str>>>,
    },
    /// A response was accepted.
    Acked,
    /// A response was (partly) rejected: log it; it is sent again when it changes.
    Nacked(String),
    /// An answer to a response that is not outstanding, or a request that changes nothing.
    Nothing,
}

impl ServerType {
    /// Takes one request of this type. `first` is whether it is the stream's first of the type.
    pub fn on_request(&mut self, request: DeltaDiscoveryRequest, first: bool) -> Asked {
        let added = self.subscribe(&request, first);
        if first {
            if !self.wildcard {
                self.names.extend(request.initial_resource_versions.keys().map(|name| name.as_str().into()));
            }
            return Asked::Respond { held: request.initial_resource_versions, names: None };
        }
        // Without a nonce there is none such.
        if let Some(at) = self.outstanding.iter().position(|n| *n == request.response_nonce) {
            // An answer to a later response covers the ones before it.
            self.outstanding.drain(..=at);
            if let Some(error) = request.error_detail {
                return Asked::Nacked(error.message);
            }
            if added.is_empty() {
                return Asked::Acked;
            }
        }
        if added.is_empty() {
            return Asked::Nothing;
        }
        Asked::Respond { held: BTreeMap::new(), names: Some(added) }
    }

    /// Subscription set = subscribed + held − unsubscribed; wildcard when it holds `*`, or when a first request names nothing. Answers the
    /// names asked for now, known or not: somebody waits for each.
    fn subscribe(&mut self, request: &DeltaDiscoveryRequest, first: bool) -> Vec<Arc<str>> {
        let mut added = Vec::new();
        if first && request.resource_names_subscribe.is_empty() {
            self.wildcard = true;
        }
        for name in &request.resource_names_subscribe {
            if name == "*" {
                self.wildcard = true;
            } else {
                let name: Arc<str> = name.as_str().into();
                self.names.insert(name.clone());
                added.push(name);
            }
        }
        for name in &request.resource_names_unsubscribe {
            if name == "*" {
                self.wildcard = false;
            } else {
                self.names.remove(name.as_str());
                self.followed.remove(name.as_str());
            }
        }
        added
    }

    /// The nonce for the next response, which is outstanding from now on.
    pub fn sent(&mut self) -> String {
        self.next_nonce += 1;
        let nonce = self.next_nonce.to_string();
        self.outstanding.push_back(nonce.clone());
        nonce
    }

    /// Responses not yet answered. Bulk waits for zero, so that a slow client is sent merged changes rather than a queue of them.
    pub fn outstanding(&self) -> usize {
        self.outstanding.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(subscribe: &[&str], unsubscribe: &[&str], nonce: &str) -> DeltaDiscoveryRequest {
        let own = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        DeltaDiscoveryRequest {
            resource_names_subscribe: own(subscribe),
            resource_names_unsubscribe: own(unsubscribe),
            response_nonce: nonce.to_owned(),
            ..DeltaDiscoveryRequest::default()
        }
    }

    #[test]
    fn an_empty_first_request_is_a_wildcard() {
        let mut server = ServerType::default();
        assert!(matches!(server.on_request(request(&[], &[], ""), true), Asked::Respond { names: None, .. }));
        assert!(server.wildcard);
    }

    #[test]
    fn subscribing_and_unsubscribing_the_star_at_once_is_nothing_yet() {
        let mut server = ServerType::default();
        server.on_request(request(&["*"], &["*"], ""), true);
        assert!(!server.wildcard && server.names.is_empty());
        let asked = server.on_request(request(&["/10.0.0.1"], &[], ""), false);
        assert_eq!(asked, Asked::Respond { held: BTreeMap::new(), names: Some(vec!["/10.0.0.1".into()]) });
    }

    #[test]
    fn a_name_asked_for_again_is_answered_again_whatever_else_the_request_says() {
        let mut server = ServerType::default();
        server.on_request(request(&["*"], &["*"], ""), true);
        for nonce in ["", "", "stale"] {
            let asked = server.on_request(request(&["ns/host"], &[], nonce), false);
            assert_eq!(asked, Asked::Respond { held: BTreeMap::new(), names: Some(vec!["ns/host".into()]) });
        }
    }

    #[test]
    fn answers_count_only_while_outstanding() {
        let mut server = ServerType::default();
        server.on_request(request(&[], &[], ""), true);
        let (first, second) = (server.sent(), server.sent());
        assert_eq!(server.on_request(request(&[], &[], "stale"), false), Asked::Nothing);
        assert_eq!(server.on_request(request(&[], &[], &second), false), Asked::Acked);
        assert_eq!(server.outstanding(), 0);
        assert_eq!(server.on_request(request(&[], &[], &first), false), Asked::Nothing);
    }

    #[test]
    fn a_nack_names_every_rejected_resource_and_forgets_none_accepted() {
        let mut client = ClientType::new(proto::ADDRESS_TYPE_URL);
        client.accepted([("a", "1")], &[]);
        let response = DeltaDiscoveryResponse { nonce: "7".to_owned(), ..DeltaDiscoveryResponse::default() };
        let rejected = [Rejection { name: "b".to_owned(), reason: "uid: is empty".to_owned() }];
        let answer = client.answer(&response, &rejected);
        assert_eq!(answer.error_detail.unwrap().message, "b: uid: is empty");
        assert_eq!(answer.response_nonce, "7");
        let again = client.initial(Node::default(), &[]);
        assert_eq!(again.initial_resource_versions.into_iter().collect::<Vec<_>>(), [("a".to_owned(), "1".to_owned())]);
    }

    #[test]
    fn an_on_demand_stream_starts_with_nothing_but_what_was_asked_for_or_held() {
        let mut client = ClientType::on_demand(proto::ADDRESS_TYPE_URL);
        client.accepted([("uid", "1")], &[]);
        let initial = client.initial(Node::default(), &["/10.0.0.1".into(), "uid".into()]);
        assert_eq!(
            (&initial.resource_names_subscribe[..], &initial.resource_names_unsubscribe[..]),
            (&["*".to_owned()][..], &["*".to_owned()][..])
        );
        let versions: Vec<_> =
            initial.initial_resource_versions.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
        assert_eq!(versions, [("/10.0.0.1", ""), ("uid", "1")]);
        let mut server = ServerType::default();
        server.on_request(initial, true);
        assert!(!server.wildcard);
        assert_eq!(server.names.iter().map(|n| &**n).collect::<Vec<_>>(), ["/10.0.0.1", "uid"]);
    }
}
