//! A mesh on Kubernetes: objects from the API server, pages through forwarded ports.

use std::{net::IpAddr, sync::OnceLock};

use anyhow::Context as _;
use cni_plugin::agent::status::REDIRECTION;
use futures_util::{StreamExt as _, stream};
use lab::protocol::{NodeStatus, PodStatus};
use serde_json::Value;
use tokio::runtime::Runtime;

use super::{Mesh, Page, Program, Service};
use crate::{
    args::Place,
    cluster::{Cluster, escape, rollout},
    component::{self, COMPONENTS},
};

/// Pods asked at a time.
const ASKED: usize = 16;

pub(super) struct OnCluster {
    runtime: Runtime,
    cluster: Cluster,
    /// Where the mesh is installed.
    system: String,
    /// Its own pods, listed when the first of them is asked.
    programs: OnceLock<Vec<Value>>,
}

impl OnCluster {
    pub(super) fn open(place: &Place) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let cluster = runtime.block_on(place.connection.open())?;
        Ok(Self { runtime, cluster, system: place.mesh_namespace.clone(), programs: OnceLock::new() })
    }

    fn get(&self, path: &str) -> anyhow::Result<Option<Value>> {
        self.runtime.block_on(self.cluster.get(path))
    }

    fn programs(&self) -> anyhow::Result<&[Value]> {
        if let Some(pods) = self.programs.get() {
            return Ok(pods);
        }
        let listed = self.runtime.block_on(async {
            let mut all = Vec::new();
            for component in &COMPONENTS {
                all.extend(component.pods(&self.cluster, &self.system).await?);
            }
            anyhow::Ok(all)
        })?;
        Ok(self.programs.get_or_init(|| listed))
    }

    /// The pod of a program; while it is being replaced, the one that is ready.
    fn pod_of(&self, program: &Program) -> anyhow::Result<String> {
        let (component, node) = match program {
            Program::ControlPlane => (&component::CONTROL_PLANE, None),
            Program::Agent(node) => (&component::AGENT, Some(node)),
            Program::Ztunnel(node) => (&component::ZTUNNEL, Some(node)),
        };
        let (key, value) = component.selector.split_once('=').unwrap_or_default();
        let is_it = |pod: &&Value| {
            let there = node.is_none_or(|node| pod["spec"]["nodeName"] == **node);
            pod["metadata"]["labels"][key] == value && there && pod["status"]["phase"] == "Running"
        };
        let pods: Vec<&Value> = self.programs()?.iter().filter(is_it).collect();
        let pod = pods.iter().find(|pod| rollout::is_ready(pod)).or_else(|| pods.first());
        let name = pod.and_then(|pod| pod["metadata"]["name"].as_str()).map(str::to_owned);
        name.with_context(|| {
            format!("{program}: no such pod runs in namespace {} of {}", self.system, self.cluster.server)
        })
    }

    async fn page(
        &self,
        pod: anyhow::Result<String>,
        program: &Program,
        page: Page<'_>,
    ) -> anyhow::Result<(i32, String)> {
        let (port, path) = page.port_and_path(program);
        let (status, body) = self.cluster.page(&self.system, &pod?, port, path).await?;
        Ok((status.into(), body))
    }
}

impl Mesh for OnCluster {
    fn pod(&self, namespace: &str, name: &str) -> anyhow::Result<Option<PodStatus>> {
        Ok(self.get(&format!("/api/v1/namespaces/{namespace}/pods/{name}"))?.as_ref().map(pod))
    }

    fn pod_at(&self, address: IpAddr) -> anyhow::Result<Option<PodStatus>> {
        let selector = escape(&format!("status.podIP={address},status.phase=Running"));
        let list = self.get(&format!("/api/v1/pods?fieldSelector={selector}"))?.unwrap_or_default();
        let items = list["items"].as_array().map(Vec::as_slice).unwrap_or_default();
        Ok(items.iter().find(|pod| pod["spec"]["hostNetwork"] != true).map(pod))
    }

    fn any_pod(&self) -> anyhow::Result<Option<PodStatus>> {
        let list = self.get("/api/v1/pods?limit=100&fieldSelector=status.phase%3DRunning")?.unwrap_or_default();
        let items = list["items"].as_array().map(Vec::as_slice).unwrap_or_default();
        Ok(items.iter().find(|pod| pod["spec"]["hostNetwork"] != true).map(pod))
    }

    fn service(&self, namespace: &str, name: &str) -> anyhow::Result<Option<Service>> {
        let service = self.get(&format!("/api/v1/namespaces/{namespace}/services/{name}"))?;
        Ok(service.as_ref().map(of_service))
    }

    fn pods(&self, namespace: &str, selector: &str) -> anyhow::Result<Vec<PodStatus>> {
        let path = format!("/api/v1/namespaces/{namespace}/pods");
        let query = format!("labelSelector={}&fieldSelector=status.phase%3DRunning", escape(selector));
        let mut pods = self.runtime.block_on(self.cluster.list(&path, &query))?;
        pods.retain(|pod| pod["spec"]["hostNetwork"] != true);
        pods.sort_by_key(|pod| !rollout::is_ready(pod));
        Ok(pods.iter().map(pod).collect())
    }

    fn deployment(&self, namespace: &str, name: &str) -> anyhow::Result<Option<String>> {
        let found = self.get(&format!("/apis/apps/v1/namespaces/{namespace}/deployments/{name}"))?;
        Ok(found.map(|deployment| selector(&deployment["spec"]["selector"]["matchLabels"])))
    }

    fn has_namespace(&self, name: &str) -> anyhow::Result<bool> {
        Ok(self.get(&format!("/api/v1/namespaces/{name}"))?.is_some())
    }

    fn strict_authentications(&self, namespace: &str) -> anyhow::Result<Vec<String>> {
        let path = format!("/apis/security.istio.io/v1/namespaces/{namespace}/peerauthentications");
        let listed = self.runtime.block_on(self.cluster.list(&path, ""))?;
        let whole =
            listed.iter().filter(|p| p["spec"]["mtls"]["mode"] == "STRICT" && !p["spec"]["selector"].is_object());
        let name = |p: &Value| p["metadata"]["name"].as_str().map(|name| format!("{namespace}/{name}"));
        Ok(whole.filter_map(name).collect())
    }

    fn installed(&self) -> anyhow::Result<()> {
        anyhow::ensure!(
            !self.programs()?.is_empty(),
            "no mesh runs in {} of {}; `fairway install` makes one, --mesh-namespace names another place",
            self.system,
            self.cluster.server
        );
        Ok(())
    }

    fn nodes(&self) -> anyhow::Result<Vec<NodeStatus>> {
        let nodes = self.runtime.block_on(self.cluster.list("/api/v1/nodes", ""))?;
        Ok(nodes.iter().map(node).collect())
    }

    fn ask(&self, program: &Program, page: Page<'_>) -> anyhow::Result<(i32, String)> {
        let pod = self.pod_of(program);
        self.runtime.block_on(self.page(pod, program, page))
    }

    fn ask_all(&self, programs: &[Program], page: Page<'_>) -> Vec<anyhow::Result<(i32, String)>> {
        let pods: Vec<_> = programs.iter().map(|program| (self.pod_of(program), program)).collect();
        let asked = pods.into_iter().map(|(pod, program)| self.page(pod, program, page));
        self.runtime.block_on(stream::iter(asked).buffered(ASKED).collect())
    }

    fn namespace(&self) -> &str {
        &self.cluster.namespace
    }

    fn system(&self) -> &str {
        &self.system
    }

    fn lister(&self, what: &str) -> String {
        format!("kubectl get {what}{}", if what == "pods" { " -A" } else { "" })
    }
}

fn pod(object: &Value) -> PodStatus {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (metadata, status) = (&object["metadata"], &object["status"]);
    let addresses = status["podIPs"].as_array().into_iter().flatten().map(|ip| text(&ip["ip"])).collect();
    PodStatus {
        namespace: text(&metadata["namespace"]),
        name: text(&metadata["name"]),
        uid: text(&metadata["uid"]),
        node: text(&object["spec"]["nodeName"]),
        service_account: text(&object["spec"]["serviceAccountName"]),
        addresses,
        enrolment: text(&metadata["annotations"][REDIRECTION]),
        ..PodStatus::default()
    }
}

fn of_service(object: &Value) -> Service {
    let spec = &object["spec"];
    let mut addresses = texts(&spec["clusterIPs"]);
    if addresses.is_empty() {
        addresses.extend(spec["clusterIP"].as_str().map(str::to_owned));
    }
    let is_headless = addresses.iter().any(|address| address == "None");
    addresses.retain(|address| address != "None");
    let ports = spec["ports"].as_array().into_iter().flatten().filter_map(|port| {
        let number = port["port"].as_u64().and_then(|number| u16::try_from(number).ok())?;
        Some((port["name"].as_str().unwrap_or_default().to_owned(), number))
    });
    Service { addresses, ports: ports.collect(), headless: is_headless.then(|| selector(&spec["selector"])) }
}

/// `a=b,c=d`.
fn selector(labels: &Value) -> String {
    let labels = labels.as_object().into_iter().flatten();
    labels.map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default())).collect::<Vec<_>>().join(",")
}

fn node(object: &Value) -> NodeStatus {
    let addresses = object["status"]["addresses"].as_array().into_iter().flatten();
    let internal = addresses.filter(|address| address["type"] == "InternalIP");
    NodeStatus {
        name: object["metadata"]["name"].as_str().unwrap_or_default().to_owned(),
        addresses: internal.filter_map(|address| address["address"].as_str().map(str::to_owned)).collect(),
    }
}

fn texts(list: &Value) -> Vec<String> {
    list.as_array().into_iter().flatten().filter_map(|item| item.as_str().map(str::to_owned)).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::cluster::fake::FakeApi;

    fn pod_of(name: &str, node: &str, labels: Value, ready: &str) -> Value {
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "m", "labels": labels, "uid": name},
            "spec": {"nodeName": node},
            "status": {"phase": "Running", "podIPs": [{"ip": "10.0.0.1"}], "conditions": [{"type": "Ready", "status": ready}]}})
    }

    #[test]
    fn programs_are_found_by_their_node_and_objects_by_their_names() {
        // The server has threads of its own: what is tested waits for it.
        let server = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let api = server.block_on(FakeApi::start());
        let z = |name: &str, node: &str, ready: &str| {
            api.server.put("api/v1/pods", pod_of(name, node, json!({"app": "ztunnel"}), ready));
        };
        z("z-old", "n1", "False");
        z("z-new", "n1", "True");
        z("z-other", "n2", "True");
        let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s", "namespace": "d"},
            "spec": {"clusterIPs": ["10.1.0.1", "fd00::1"]}});
        api.put(service);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let cluster = runtime.block_on(async { api.cluster() });
        let mesh = OnCluster { runtime, cluster, system: "m".to_owned(), programs: OnceLock::new() };
        let found = |node: &str| mesh.pod_of(&Program::Ztunnel(node.to_owned()));
        assert_eq!((found("n1").unwrap().as_str(), found("n2").unwrap().as_str()), ("z-new", "z-other"));
        let error = format!("{:#}", found("n3").unwrap_err());
        assert!(error.contains("ztunnel/n3") && error.contains("namespace m"), "{error}");
        let found = mesh.service("d", "s").unwrap().unwrap();
        assert_eq!((found.addresses, found.headless), (vec!["10.1.0.1".to_owned(), "fd00::1".to_owned()], None));
        let headless = json!({"spec": {"clusterIPs": ["None"], "selector": {"app": "db"}, "ports": [{"name": "sql", "port": 5432}]}});
        assert_eq!(
            of_service(&headless),
            Service {
                headless: Some("app=db".to_owned()),
                ports: vec![("sql".to_owned(), 5432)],
                ..Service::default()
            }
        );
        assert!(mesh.installed().is_ok());
        assert_eq!(mesh.service("d", "t").unwrap(), None);
        let pod = mesh.pod("m", "z-new").unwrap().unwrap();
        assert_eq!((pod.node.as_str(), pod.addresses), ("n1", vec!["10.0.0.1".to_owned()]));
    }
}
