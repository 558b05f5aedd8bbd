//! `fairway status`: every program of the mesh, and how it is.

use std::{
    collections::BTreeMap,
    process::ExitCode,
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use futures_util::{StreamExt as _, stream};
use serde::Serialize;
use serde_json::Value;

use crate::{
    args::ClusterStatus,
    cluster::{self, Cluster, rollout},
    component::{COMPONENTS, Component},
    counters::{self, Sample},
    install::Record,
    output::{self, bad, dim, good},
};

/// Pods asked at a time.
const ASKED: usize = 8;

pub(crate) fn run(query: &ClusterStatus) -> anyhow::Result<ExitCode> {
    let overview = cluster::block_on(async {
        let (cluster, namespace) = (query.connection.open().await?, &query.namespace);
        let found = Overview::of(&cluster, namespace).await?;
        found.with_context(|| {
            format!("no pod of the mesh runs in namespace {namespace} of {}; another --namespace?", cluster.server)
        })
    })?;
    crate::output::say!("{}", query.output.render(&overview, || overview.text(SystemTime::now()))?);
    Ok(if overview.complaints().is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Everything at one moment.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Overview {
    server: String,
    namespace: String,
    /// Of `fairway install`; absent where something else installed the mesh.
    #[serde(skip_serializing_if = "Option::is_none")]
    installed: Option<String>,
    /// Components that should have a pod and have none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    absent: Vec<&'static str>,
    pub(crate) programs: Vec<Program>,
}

/// One pod of the mesh.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Program {
    pub(crate) program: String,
    pub(crate) pod: String,
    pub(crate) node: String,
    /// The image's tag.
    pub(crate) version: String,
    pub(crate) ready: bool,
    pub(crate) restarts: u64,
    /// What keeps it from being ready, or from being asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) problem: Option<String>,
    #[serde(flatten)]
    pub(crate) facts: Facts,
}

/// What it says of itself; each program says something else.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", untagged)]
pub(crate) enum Facts {
    #[default]
    Silent,
    ControlPlane {
        leader: Option<bool>,
        clients: f64,
        workloads: Option<f64>,
        problems: Option<f64>,
    },
    Agent {
        captured: usize,
        /// `namespace/name: why`.
        uncaptured: Vec<String>,
        ztunnels: f64,
        /// Connections of its captured pods that were open when these were captured, and are in clear while they last.
        older_flows: u64,
    },
    Ztunnel {
        /// Of the discovery stream; none where the ztunnel does not say.
        connected: Option<bool>,
        #[serde(skip_serializing_if = "Option::is_none")]
        last_message_unix_seconds: Option<f64>,
        /// That it serves, its own among them.
        pods: f64,
        pending: f64,
        certificates: usize,
        /// `identity: what`.
        unavailable: Vec<String>,
        #[serde(skip_serializing_if = "Option::is_none")]
        next_expiry_unix_seconds: Option<u64>,
    },
}

impl Overview {
    /// `None` where nothing of the mesh runs.
    pub(crate) async fn of(cluster: &Cluster, namespace: &str) -> anyhow::Result<Option<Self>> {
        let record = Record::read(cluster, namespace).await?;
        let mut all = Vec::new();
        for component in &COMPONENTS {
            all.extend(component.pods(cluster, namespace).await?.into_iter().map(|pod| (component, pod)));
        }
        if all.is_empty() {
            return Ok(None);
        }
        let mut absent = Vec::new();
        for component in COMPONENTS.iter().filter(|component| !all.iter().any(|(of, _)| of.name == component.name)) {
            // Beside another implementation, not every component is ours.
            if record.is_some() || component.is_wanted(cluster, namespace).await? {
                absent.push(component.name);
            }
        }
        let asked = all.iter().map(|(component, pod)| Program::ask(cluster, namespace, component, pod));
        let mut programs: Vec<Program> = stream::iter(asked).buffered(ASKED).collect().await;
        programs.sort_by(|a, b| (rank(&a.program), &a.node, &a.pod).cmp(&(rank(&b.program), &b.node, &b.pod)));
        let installed = record.map(|r| format!("{}/…:{} by fairway {} for {}", r.hub, r.tag, r.version, r.platform));
        Ok(Some(Self { server: cluster.server.clone(), namespace: namespace.to_owned(), installed, absent, programs }))
    }

    fn text(&self, now: SystemTime) -> String {
        let mut lines = vec![format!("{}, namespace {}", self.server, self.namespace)];
        lines.extend(self.installed.clone());
        for (component, headings) in [("fairwayd", CONTROL_PLANE), ("fairway-node", AGENT), ("ztunnel", ZTUNNEL)] {
            let rows = self.programs.iter().filter(|p| p.program == component).map(|program| program.row(now));
            lines.push(format!("\n{}", output::table(headings, rows)));
        }
        lines.extend(self.complaints().iter().map(|line| format!("{} {line}", bad("!"))));
        lines.join("\n")
    }

    pub(crate) fn complaints(&self) -> Vec<String> {
        let absent = self.absent.iter().map(|name| {
            let means = match *name {
                "fairwayd" => "what is captured goes on as it was, but no change arrives and certificates run out",
                "fairway-node" => "no pod is captured anew, and pods of the mesh do not start",
                _ => "what is captured goes nowhere",
            };
            format!("no pod of {name} is there: {means}")
        });
        absent.chain(self.programs.iter().flat_map(Program::complaints)).collect()
    }
}

const CONTROL_PLANE: &[&str] =
    &["CONTROL PLANE", "NODE", "VERSION", "READY", "RESTARTS", "LEADER", "PROXIES", "WORKLOADS", "PROBLEMS"];
const AGENT: &[&str] =
    &["NODE AGENT", "NODE", "VERSION", "READY", "RESTARTS", "CAPTURED", "UNCAPTURED", "ZTUNNELS", "OLDER FLOWS"];
const ZTUNNEL: &[&str] = &[
    "ZTUNNEL",
    "NODE",
    "VERSION",
    "READY",
    "RESTARTS",
    "DISCOVERY",
    "LAST CHANGE",
    "PODS+SELF",
    "CERTIFICATES",
    "NEXT EXPIRY",
];

fn rank(program: &str) -> Option<usize> {
    COMPONENTS.iter().position(|component| component.name == program)
}

impl Program {
    async fn ask(cluster: &Cluster, namespace: &str, component: &Component, pod: &Value) -> Self {
        let mut program = Self::of(component.name, pod);
        if pod["status"]["phase"] != "Running" {
            return program;
        }
        let page = |port: u16, path: &'static str| {
            let name = program.pod.clone();
            async move {
                let (status, body) = cluster.page(namespace, &name, port, path).await?;
                anyhow::ensure!(status == 200, "{name} says {status} at {path}: {}", body.trim());
                anyhow::Ok(body)
            }
        };
        let facts = async {
            Ok(match component.name {
                "fairwayd" => control_plane(&page(15014, "/metrics").await?),
                "fairway-node" => agent(&page(15014, "/metrics").await?, &page(15014, "/debug/pods").await?)?,
                _ => ztunnel(&page(15020, "/metrics").await?, &page(15000, "/config_dump?part=certificates").await?)?,
            })
        };
        let facts: anyhow::Result<Facts> = facts.await;
        match facts {
            Ok(facts) => program.facts = facts,
            Err(error) => program.problem = Some(format!("{error:#}")),
        }
        program
    }

    fn of(component: &str, pod: &Value) -> Self {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let containers = pod["status"]["containerStatuses"].as_array().map(Vec::as_slice).unwrap_or_default();
        let image = text(&pod["spec"]["containers"][0]["image"]);
        let tag = image.rsplit('/').next().unwrap_or_default();
        Self {
            program: component.to_owned(),
            pod: text(&pod["metadata"]["name"]),
            node: text(&pod["spec"]["nodeName"]),
            version: tag.split_once(':').map_or(tag, |(_, tag)| tag).to_owned(),
            ready: rollout::is_ready(pod),
            restarts: containers.iter().filter_map(|container| container["restartCount"].as_u64()).sum(),
            problem: rollout::trouble(std::slice::from_ref(pod)).pop(),
            facts: Facts::Silent,
        }
    }

    /// None of one that is ready and connected, and has captured what it should have.
    fn complaints(&self) -> Vec<String> {
        let mut told: Vec<String> = self.problem.clone().into_iter().collect();
        if !self.ready && told.is_empty() {
            told.push(format!("{} is not ready", self.pod));
        }
        match &self.facts {
            Facts::Agent { uncaptured, ztunnels, .. } => {
                told.extend(uncaptured.iter().map(|pod| format!("{pod} (on {}) is not captured", self.node)));
                if *ztunnels == 0.0 {
                    told.push(format!("no ztunnel is connected to the agent on {}", self.node));
                }
            }
            Facts::Ztunnel { connected, unavailable, pending, .. } => {
                if *connected == Some(false) {
                    told.push(format!(
                        "{} (on {}) is not connected to the control plane: it serves what it knows",
                        self.pod, self.node
                    ));
                }
                if *pending > 0.0 {
                    told.push(format!("{} (on {}) cannot serve {pending} pods", self.pod, self.node));
                }
                told.extend(
                    unavailable.iter().map(|what| format!("{} (on {}): no certificate of {what}", self.pod, self.node)),
                );
            }
            Facts::ControlPlane { problems: Some(count), .. } if *count > 0.0 => {
                told.push(format!("{count} problems with objects: `fairway dump fairwayd problems`"));
            }
            Facts::ControlPlane { .. } | Facts::Silent => {}
        }
        told
    }

    fn row(&self, now: SystemTime) -> Vec<String> {
        let ready = if self.ready { good("yes") } else { bad("no") };
        let restarts = self.restarts.to_string();
        let mut row = vec![self.pod.clone(), self.node.clone(), self.version.clone(), ready, restarts];
        let count = |value: f64| format!("{value:.0}");
        let known = |value: Option<f64>| value.map_or_else(|| dim("?"), count);
        match &self.facts {
            Facts::Silent => {}
            Facts::ControlPlane { leader, clients, workloads, problems } => row.extend([
                leader.map_or_else(|| dim("?"), |leader| if leader { "yes" } else { "no" }.to_owned()),
                count(*clients),
                known(*workloads),
                known(*problems),
            ]),
            Facts::Agent { captured, uncaptured, ztunnels, older_flows } => {
                let uncaptured = uncaptured.len().to_string();
                row.extend([captured.to_string(), uncaptured, count(*ztunnels), older_flows.to_string()]);
            }
            Facts::Ztunnel {
                connected,
                last_message_unix_seconds,
                pods,
                certificates,
                next_expiry_unix_seconds,
                ..
            } => {
                let at = |seconds: f64| SystemTime::UNIX_EPOCH + Duration::from_secs_f64(seconds.clamp(0.0, 1e12));
                let ago = |seconds: f64| now.duration_since(at(seconds)).map(|ago| format!("{} ago", rough(ago)));
                let until =
                    |seconds: u64| match (SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)).duration_since(now) {
                        Ok(left) => format!("in {}", rough(left)),
                        Err(_) => bad("expired"),
                    };
                row.extend([
                    connected.map_or_else(|| dim("?"), |up| if up { good("connected") } else { bad("away") }),
                    last_message_unix_seconds
                        .filter(|at| *at > 0.0)
                        .and_then(|at| ago(at).ok())
                        .unwrap_or_else(|| dim("?")),
                    count(*pods),
                    certificates.to_string(),
                    next_expiry_unix_seconds.map_or_else(|| "-".to_owned(), until),
                ]);
            }
        }
        row
    }
}

/// `42s`, `5m`, `3h`, `2d`.
fn rough(duration: Duration) -> String {
    match duration.as_secs() {
        seconds @ 0..120 => format!("{seconds}s"),
        seconds @ 120..7200 => format!("{}m", seconds / 60),
        seconds @ 7200..172_800 => format!("{}h", seconds / 3600),
        seconds => format!("{}d", seconds / 86400),
    }
}

/// The sum over a family; `None` where it is not there.
fn total(samples: &[Sample<'_>], name: &str) -> Option<f64> {
    let mut of = samples.iter().filter(|sample| sample.name == name).peekable();
    of.peek()?;
    Some(of.map(|sample| sample.value).sum())
}

fn control_plane(metrics: &str) -> Facts {
    let samples: Vec<Sample<'_>> = counters::parse(metrics).collect();
    Facts::ControlPlane {
        leader: total(&samples, "fairway_leader").map(|leader| leader > 0.0),
        clients: total(&samples, "pilot_xds").unwrap_or_default(),
        workloads: total(&samples, "fairwayd_workloads"),
        problems: total(&samples, "fairwayd_manifest_problems"),
    }
}

fn agent(metrics: &str, pods: &str) -> anyhow::Result<Facts> {
    let samples: Vec<Sample<'_>> = counters::parse(metrics).collect();
    let pods: Vec<Value> = serde_json::from_str(pods)?;
    let named = |pod: &Value| {
        let text = |field: &str| pod[field].as_str().unwrap_or_default().to_owned();
        format!("{}/{}: {}", text("namespace"), text("name"), text("reason"))
    };
    let is = |state: &'static str| move |pod: &&Value| pod["state"] == state;
    Ok(Facts::Agent {
        captured: pods.iter().filter(is("enrolled")).count(),
        uncaptured: pods.iter().filter(is("uncaptured")).map(named).collect(),
        ztunnels: total(&samples, "ztunnel_connected").unwrap_or_default(),
        older_flows: pods.iter().filter(is("enrolled")).filter_map(|pod| pod["olderFlows"].as_u64()).sum(),
    })
}

fn ztunnel(metrics: &str, dump: &str) -> anyhow::Result<Facts> {
    let samples: Vec<Sample<'_>> = counters::parse(metrics).collect();
    let dump: Value = serde_json::from_str(dump)?;
    let certificates = dump["certificates"].as_array().cloned().unwrap_or_default();
    let mut unavailable = BTreeMap::new();
    let mut next = None;
    for certificate in &certificates {
        let text = |field: &str| certificate[field].as_str().unwrap_or_default().to_owned();
        if let Some(error) = text("state").strip_prefix("Unavailable") {
            unavailable.insert(text("identity"), error.trim_start_matches(": ").to_owned());
        }
        // The leaf's is the first to come.
        let expiry = certificate["certChain"][0]["expirationTime"].as_str().and_then(unix_seconds);
        next = [next, expiry].into_iter().flatten().min();
    }
    Ok(Facts::Ztunnel {
        connected: total(&samples, "fairway_xds_connected").map(|up| up > 0.0),
        last_message_unix_seconds: total(&samples, "fairway_xds_last_message_timestamp_seconds"),
        pods: total(&samples, "workload_manager_active_proxy_count").unwrap_or_default(),
        pending: total(&samples, "workload_manager_pending_proxy_count").unwrap_or_default(),
        certificates: certificates.len(),
        unavailable: unavailable.into_iter().map(|(identity, error)| format!("{identity}: {error}")).collect(),
        next_expiry_unix_seconds: next,
    })
}

/// Of RFC 3339.
pub(crate) fn unix_seconds(text: &str) -> Option<u64> {
    let time = humantime::parse_rfc3339_weak(text).ok()?;
    Some(time.duration_since(SystemTime::UNIX_EPOCH).ok()?.as_secs())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_ztunnel_is_described_by_its_counters_and_certificates() {
        let metrics = "fairway_xds_connected 1\nfairway_xds_last_message_timestamp_seconds 1000\n\
            workload_manager_active_proxy_count 3\nworkload_manager_pending_proxy_count 0\n";
        let dump = json!({"certificates": [
            {"identity": "a", "state": "Available", "certChain": [{"expirationTime": "1970-01-01T02:00:00Z"}, {"expirationTime": "1970-01-01T00:00:01Z"}]},
            {"identity": "b", "state": "Unavailable: the CA is away", "certChain": []},
        ]});
        let facts = ztunnel(metrics, &dump.to_string()).unwrap();
        assert_eq!(
            facts,
            Facts::Ztunnel {
                connected: Some(true),
                last_message_unix_seconds: Some(1000.0),
                pods: 3.0,
                pending: 0.0,
                certificates: 2,
                unavailable: vec!["b: the CA is away".to_owned()],
                next_expiry_unix_seconds: Some(7200),
            }
        );
        let program = Program { ready: true, pod: "z".to_owned(), node: "n".to_owned(), facts, ..Program::default() };
        assert_eq!(program.complaints(), ["z (on n): no certificate of b: the CA is away"]);
        let row = program.row(SystemTime::UNIX_EPOCH + Duration::from_secs(1060));
        assert!(row.contains(&"60s ago".to_owned()) && row.contains(&"in 102m".to_owned()), "{row:?}");
    }

    #[test]
    fn an_agent_that_misses_pods_or_its_ztunnel_is_not_well() {
        let pods = json!([{"namespace": "d", "name": "a", "state": "enrolled", "olderFlows": 3},
            {"namespace": "d", "name": "b", "state": "uncaptured", "reason": "no namespace"}]);
        let facts = agent("ztunnel_connected 0\n", &pods.to_string()).unwrap();
        let program = Program { ready: true, node: "n".to_owned(), facts, ..Program::default() };
        assert_eq!(
            program.complaints(),
            ["d/b: no namespace (on n) is not captured", "no ztunnel is connected to the agent on n"]
        );
        assert_eq!(program.row(SystemTime::UNIX_EPOCH).last().map(String::as_str), Some("3"));
    }

    #[tokio::test]
    async fn a_component_that_should_be_there_and_has_no_pod_is_told() {
        let api = cluster::fake::FakeApi::start().await;
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "z", "namespace": "m", "labels": {"app": "ztunnel"}},
            "status": {"phase": "Pending"}});
        api.server.put("api/v1/pods", pod);
        let absent = async || Overview::of(&api.cluster(), "m").await.unwrap().unwrap().absent;
        assert!(absent().await.is_empty(), "beside another mesh's control plane");
        api.put(
            json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "fairwayd", "namespace": "m"}}),
        );
        assert_eq!(absent().await, ["fairwayd"]);
        let overview = Overview::of(&api.cluster(), "m").await.unwrap().unwrap();
        assert!(overview.text(SystemTime::UNIX_EPOCH).contains("! no pod of fairwayd is there"));
    }
}
