//! The cluster: objects in the shapes and sizes in which an API server sends them.

use std::net::Ipv4Addr;

use serde_json::{Value, json};
use test_support::ApiServer;

use crate::objects;

pub(crate) const PODS: &str = "api/v1/pods";
const SLICES: &str = "apis/discovery.k8s.io/v1/endpointslices";
const SERVICES: &str = "api/v1/services";
const NODES: &str = "api/v1/nodes";
const NAMESPACES: &str = "api/v1/namespaces";
const POLICIES: &str = "apis/security.istio.io/v1/authorizationpolicies";
const PEERS: &str = "apis/security.istio.io/v1/peerauthentications";
/// Kinds of which this cluster has none.
const ABSENT: [&str; 3] = [
    "apis/networking.istio.io/v1/serviceentries",
    "apis/networking.istio.io/v1/workloadentries",
    "apis/gateway.networking.k8s.io/v1/gateways",
];

pub(crate) const PODS_PER_NODE: usize = 250;
const PODS_PER_SERVICE: usize = 10;
const PODS_PER_NAMESPACE: usize = 500;
/// The share of pods that live in the namespace whose policy is changed as bulk: one of these.
const BULK_SHARE: usize = 10;
pub(crate) const BULK: &str = "bulk";

/// What of a pod changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Life {
    Ready,
    NotReady,
    /// It was deleted, and finishes.
    Terminating,
}

/// How many there are of each kind.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) pods: usize,
    pub(crate) nodes: usize,
}

/// One of the cluster's pods; the same number is the same pod.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pod {
    number: usize,
    shape: Shape,
}

impl Shape {
    pub(crate) fn new(pods: usize, nodes: usize) -> Self {
        Self { pods, nodes: nodes.max(pods.div_ceil(PODS_PER_NODE)).max(1) }
    }

    /// Numbers from [`Shape::pods`] on are of pods that are not there yet.
    pub(crate) fn pod(self, number: usize) -> Pod {
        Pod { number, shape: self }
    }

    /// Pods in the namespace that changes as a whole.
    pub(crate) fn bulk(self) -> usize {
        (0..self.pods).filter(|number| self.pod(*number).namespace() == BULK).count()
    }

    fn services(self) -> usize {
        self.pods.div_ceil(PODS_PER_SERVICE)
    }

    /// Of one tenth of a service's pods each.
    pub(crate) fn fill(self, api: &ApiServer) {
        for resource in ABSENT {
            api.know(resource, false);
        }
        for namespace in self.namespaces() {
            api.put(NAMESPACES, objects::namespace(&namespace));
        }
        for node in 0..self.nodes {
            api.put(NODES, objects::node(&node_name(node)));
            api.put(PODS, objects::ztunnel(&node_name(node), &node_address(node).to_string()));
        }
        for service in 0..self.services() {
            let first = self.pod(service * PODS_PER_SERVICE);
            let members = (0..PODS_PER_SERVICE).map(|at| self.pod(service * PODS_PER_SERVICE + at));
            let members = members.filter(|pod| pod.number < self.pods);
            let (namespace, app) = (first.namespace(), first.app());
            let address = Ipv4Addr::from_bits(Ipv4Addr::new(10, 192, 0, 0).to_bits() + bits(service));
            api.put(SERVICES, objects::service(&namespace, &app, &address.to_string()));
            let endpoints = members.map(|pod| objects::Endpoint {
                name: pod.name(),
                address: pod.address(),
                node: pod.node(),
                uid: pod.uid(),
            });
            api.put(SLICES, objects::slice(&namespace, &app, &endpoints.collect::<Vec<_>>()));
        }
        for number in 0..self.pods {
            api.put(PODS, self.pod(number).object(Life::Ready));
        }
        for namespace in self.namespaces().skip(1) {
            api.put(POLICIES, objects::policy(&namespace));
        }
    }

    /// `istio-system` is the first.
    fn namespaces(self) -> impl Iterator<Item = String> {
        let own = (0..self.pods.div_ceil(PODS_PER_NAMESPACE)).map(|n| format!("team-{n:03}"));
        ["istio-system".to_owned(), BULK.to_owned()].into_iter().chain(own)
    }
}

/// Whether plain traffic to the namespace that changes as a whole is refused: that is a policy which all its workloads name.
pub(crate) fn set_bulk(api: &ApiServer, strict: bool) {
    match strict {
        true => api.put(PEERS, objects::strict(BULK)),
        false => api.delete(PEERS, BULK, "default"),
    }
}

impl Pod {
    fn service(self) -> usize {
        self.number / PODS_PER_SERVICE
    }

    pub(crate) fn namespace(self) -> String {
        match self.service().is_multiple_of(BULK_SHARE) && self.number < self.shape.pods {
            true => BULK.to_owned(),
            false => format!("team-{:03}", self.service() / (PODS_PER_NAMESPACE / PODS_PER_SERVICE)),
        }
    }

    fn app(self) -> String {
        format!("checkout-api-{}", self.service())
    }

    fn uid(self) -> String {
        format!("7d3f9a52-1c4e-4b8a-9f06-{:012x}", self.number)
    }

    pub(crate) fn name(self) -> String {
        format!("{}-6f5b8c9d4f-{:05x}", self.app(), self.number)
    }

    /// Its name in discovery.
    pub(crate) fn workload(self) -> String {
        format!("Kubernetes//Pod/{}/{}", self.namespace(), self.name())
    }

    fn address(self) -> String {
        Ipv4Addr::from_bits(Ipv4Addr::new(10, 64, 0, 1).to_bits() + bits(self.number)).to_string()
    }

    fn node(self) -> String {
        node_name(self.number % self.shape.nodes)
    }

    pub(crate) fn object(self, life: Life) -> Value {
        objects::pod(&objects::PodFacts {
            namespace: &self.namespace(),
            name: &self.name(),
            app: &self.app(),
            uid: &self.uid(),
            node: &self.node(),
            host_address: &node_address(self.number % self.shape.nodes).to_string(),
            address: &self.address(),
            life,
        })
    }

    pub(crate) fn put(self, api: &ApiServer, life: Life) {
        api.put(PODS, self.object(life));
    }

    pub(crate) fn delete(self, api: &ApiServer) {
        api.delete(PODS, &self.namespace(), &self.name());
    }
}

pub(crate) fn node_name(node: usize) -> String {
    format!("ip-172-20-{}-{}.eu-central-1.compute.internal", node / 250, node % 250 + 1)
}

fn node_address(node: usize) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(172, 20, 0, 1).to_bits() + bits(node))
}

fn bits(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// Lets the proxy of a node in; its token.
pub(crate) fn admit(api: &ApiServer, node: usize) -> anyhow::Result<String> {
    let key = jsonwebtoken::EncodingKey::from_secret(b"the API server believes it, nobody else looks");
    let name = node_name(node);
    let claims = json!({
        "aud": ["istio-ca"], "exp": 4_102_444_800_u64, "sub": "system:serviceaccount:istio-system:ztunnel",
        "kubernetes.io": {
            "namespace": "istio-system", "serviceaccount": {"name": "ztunnel"},
            "pod": {"name": objects::ztunnel_name(&name), "uid": objects::ztunnel_uid(&name)},
        },
    });
    let token = jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key)?;
    let user = json!({
        "username": "system:serviceaccount:istio-system:ztunnel",
        "extra": {
            "authentication.kubernetes.io/pod-name": [objects::ztunnel_name(&name)],
            "authentication.kubernetes.io/pod-uid": [objects::ztunnel_uid(&name)],
        },
    });
    api.review(&token, json!({"authenticated": true, "audiences": ["istio-ca"], "user": user}));
    Ok(token)
}
