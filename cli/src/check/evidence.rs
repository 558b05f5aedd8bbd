//! What is fetched for a check.

use std::{collections::BTreeMap, time::SystemTime};

use cni_plugin::eligibility::{Labels, Pod};
use futures_util::{StreamExt as _, stream};
use serde_json::{Value, json};

use super::membership::{self, Membership};
use crate::cluster::{Cluster, KINDS, Kind, Refused};

#[derive(Debug, Default)]
pub(super) struct Evidence {
    /// Where the mesh is, or shall be.
    pub(super) namespace: String,
    pub(super) version: Value,
    /// The API server's clock, and ours when it was read.
    pub(super) clocks: Option<(SystemTime, SystemTime)>,
    /// `create clusterroles`, for each thing that is not allowed.
    pub(super) denied: Vec<String>,
    pub(super) nodes: Vec<Value>,
    /// The nodes' heartbeats.
    pub(super) leases: Vec<Value>,
    pub(super) daemon_sets: Vec<Value>,
    /// Of control planes of meshes.
    pub(super) control_planes: Vec<Value>,
    pub(super) cilium: Option<Value>,
    pub(super) felix: Option<Value>,
    pub(super) namespaces: Vec<Value>,
    pub(super) policies: Vec<Value>,
    pub(super) membership: Membership,
    /// The pods of namespaces with policies.
    pub(super) pods: BTreeMap<String, Vec<Pod>>,
    pub(super) quotas: Vec<Value>,
    /// The control plane's Deployment, where one is installed.
    pub(super) fairwayd: Option<Value>,
    /// Of both kinds, and API services.
    pub(super) webhooks: Vec<Value>,
    pub(super) peer_authentications: Vec<Value>,
    /// What could not be fetched, and why.
    pub(super) unknown: Vec<(&'static str, String)>,
}

/// Who asks where an applicable label or exclusion stands.
const MEMBERSHIP: [&str; 3] = ["labels", "network policies", "webhooks"];

impl Evidence {
    /// # Errors
    /// When the server does not answer at all.
    pub(super) async fn gather(cluster: &Cluster, namespace: &str) -> anyhow::Result<Self> {
        let (version, server_time) = cluster.version().await?;
        let mut evidence = Self {
            namespace: namespace.to_owned(),
            version,
            clocks: server_time.map(|server| (server, SystemTime::now())),
            ..Self::default()
        };
        let denied = reviews(namespace).into_iter().map(|review| async move { denied(cluster, review).await });
        let denied: Vec<_> = stream::iter(denied).buffered(8).collect().await;
        let mut errors = Vec::new();
        for answer in denied {
            match answer {
                Ok(denied) => evidence.denied.extend(denied),
                Err(error) => errors.push(brief(&error)),
            }
        }
        // Who may not ask for one may not ask for any.
        evidence.unknown.extend(errors.pop().map(|error| ("permissions", error)));
        evidence.nodes = evidence.list(cluster, &["nodes", "quotas", "clocks"], "/api/v1/nodes", "").await;
        let leases = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases";
        evidence.leases = evidence.list(cluster, &["clocks"], leases, "").await;
        evidence.daemon_sets =
            evidence.list(cluster, &["network", "other meshes"], "/apis/apps/v1/daemonsets", "").await;
        evidence.control_planes =
            evidence.list(cluster, &["other meshes"], "/apis/apps/v1/deployments", "labelSelector=app%3Distiod").await;
        evidence.cilium =
            evidence.get(cluster, "network", "/api/v1/namespaces/kube-system/configmaps/cilium-config").await;
        evidence.felix =
            evidence.get(cluster, "network", "/apis/crd.projectcalico.org/v1/felixconfigurations/default").await;
        evidence.namespaces = evidence
            .list(cluster, &["pod security", MEMBERSHIP[0], MEMBERSHIP[1], MEMBERSHIP[2]], "/api/v1/namespaces", "")
            .await;
        match Membership::read(cluster, namespace).await {
            Ok(membership) => evidence.membership = membership,
            Err(error) => evidence.missing(&MEMBERSHIP, &error),
        }
        let policies = "/apis/networking.k8s.io/v1/networkpolicies";
        evidence.policies = evidence.list(cluster, &["network policies"], policies, "").await;
        for policy in evidence.policies.clone() {
            let Some(within) = policy["metadata"]["namespace"].as_str() else { continue };
            if !evidence.pods.contains_key(within) {
                let path = format!("/api/v1/namespaces/{within}/pods");
                let pods = evidence.list(cluster, &["network policies"], &path, "").await;
                evidence.pods.insert(within.to_owned(), pods.iter().filter_map(membership::pod).collect());
            }
        }
        let quotas = format!("/api/v1/namespaces/{namespace}/resourcequotas");
        evidence.quotas = evidence.list(cluster, &["quotas"], &quotas, "").await;
        let fairwayd = format!("/apis/apps/v1/namespaces/{namespace}/deployments/fairwayd");
        evidence.fairwayd = evidence.get(cluster, "admission", &fairwayd).await;
        for kind in ["mutatingwebhookconfigurations", "validatingwebhookconfigurations"] {
            let path = format!("/apis/admissionregistration.k8s.io/v1/{kind}");
            let mut found = evidence.list(cluster, &["webhooks", "admission"], &path, "").await;
            evidence.webhooks.append(&mut found);
        }
        let services = "/apis/apiregistration.k8s.io/v1/apiservices";
        let mut services = evidence.list(cluster, &["webhooks"], services, "").await;
        evidence.webhooks.append(&mut services);
        let authentications = "/apis/security.istio.io/v1/peerauthentications";
        evidence.peer_authentications = evidence.list(cluster, &["webhooks"], authentications, "").await;
        Ok(evidence)
    }

    /// `readers`: the items that cannot be judged without.
    async fn list(&mut self, cluster: &Cluster, readers: &[&'static str], path: &str, query: &str) -> Vec<Value> {
        match cluster.list(path, query).await {
            Ok(items) => items,
            Err(error) => {
                self.missing(readers, &error);
                Vec::new()
            }
        }
    }

    async fn get(&mut self, cluster: &Cluster, reader: &'static str, path: &str) -> Option<Value> {
        match cluster.get(path).await {
            Ok(object) => object,
            Err(error) => {
                self.missing(&[reader], &error);
                None
            }
        }
    }

    fn missing(&mut self, readers: &[&'static str], error: &anyhow::Error) {
        self.unknown.extend(readers.iter().map(|what| (*what, brief(error))));
    }

    /// Whether a pod there that says nothing of itself is, or will be, in the mesh.
    pub(super) fn is_enrolled(&self, namespace: &str) -> bool {
        self.belongs(&Pod { namespace: namespace.to_owned(), ..Pod::default() })
    }

    pub(super) fn belongs(&self, pod: &Pod) -> bool {
        let there = self.namespaces.iter().find(|object| object["metadata"]["name"] == *pod.namespace);
        self.membership.belongs(pod, &there.map_or_else(Labels::new, membership::labels))
    }
}

/// The whole would fill a table's cell several times over.
fn brief(error: &anyhow::Error) -> String {
    error.downcast_ref::<Refused>().map_or_else(|| format!("{error:#}"), Refused::briefly)
}

/// What an installation needs: to apply every kind it is made of, and to look into its pods.
fn reviews(namespace: &str) -> Vec<Value> {
    // Made only where their definitions are.
    let optional = [
        "k8s.cni.cncf.io",
        "monitoring.coreos.com",
        "gateway.networking.k8s.io",
        "admissionregistration.k8s.io",
        "scheduling.k8s.io",
    ];
    let kinds = KINDS.iter().filter(|kind| !optional.contains(&kind.group()));
    let mut reviews: Vec<Value> = kinds
        .flat_map(|kind: &Kind| {
            let within = if kind.namespaced { namespace } else { "" };
            ["create", "patch"].map(
                |verb| json!({ "group": kind.group(), "resource": kind.plural(), "verb": verb, "namespace": within }),
            )
        })
        .collect();
    reviews.push(json!({ "group": "", "resource": "pods", "subresource": "portforward", "verb": "create", "namespace": namespace }));
    reviews
}

async fn denied(cluster: &Cluster, attributes: Value) -> anyhow::Result<Option<String>> {
    let text = |field: &str| attributes[field].as_str().unwrap_or_default().to_owned();
    let resource = [text("resource"), text("subresource")]
        .into_iter()
        .filter(|part| !part.is_empty())
        .collect::<Vec<_>>()
        .join("/");
    let what = format!("{} {resource}", text("verb"));
    let review = json!({ "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview", "spec": { "resourceAttributes": attributes } });
    let answer = cluster.create("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review).await?;
    Ok((answer["status"]["allowed"] != true).then_some(what))
}
