//! Where facts about a mesh come from: a lab on this machine, or a cluster.

mod on_cluster;

use std::net::IpAddr;

use anyhow::{Context as _, ensure};
use lab::{
    components::{AGENT_ADMIN_PORT, CONTROL_ADMIN_PORT, ZTUNNEL_ADMIN_PORT, ZTUNNEL_STATS_PORT},
    control::Lab,
    protocol::{NodeStatus, PodStatus},
};
use serde_json::Value;

use self::on_cluster::OnCluster;
use crate::{
    args::{Place, SYSTEM},
    cluster,
};

/// The lab that is meant when none is named.
const LAB: &str = "default";

/// A program of the mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Program {
    Ztunnel(String),
    Agent(String),
    ControlPlane,
}

impl std::fmt::Display for Program {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ztunnel(node) => write!(f, "ztunnel/{node}"),
            Self::Agent(node) => write!(f, "agent/{node}"),
            Self::ControlPlane => f.write_str("fairwayd"),
        }
    }
}

/// A page: a port and a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Page<'a> {
    /// What a program says of itself to people.
    Admin(&'a str),
    /// A ztunnel's counters have a port of their own.
    Metrics,
}

impl<'a> Page<'a> {
    fn port_and_path(self, program: &Program) -> (u16, &'a str) {
        let admin = match program {
            Program::Ztunnel(_) => ZTUNNEL_ADMIN_PORT,
            Program::Agent(_) => AGENT_ADMIN_PORT,
            Program::ControlPlane => CONTROL_ADMIN_PORT,
        };
        match self {
            Page::Admin(path) => (admin, path),
            Page::Metrics if matches!(program, Program::Ztunnel(_)) => (ZTUNNEL_STATS_PORT, "/metrics"),
            Page::Metrics => (admin, "/metrics"),
        }
    }
}

/// What a service's name stands for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Service {
    pub(crate) addresses: Vec<String>,
    /// Names, which may be empty, and numbers; none where they are not known, as in a lab.
    pub(crate) ports: Vec<(String, u16)>,
    /// Of a headless one: the selector of the pods that it is another name for.
    pub(crate) headless: Option<String>,
}

/// What can be asked of either.
pub(crate) trait Mesh {
    fn pod(&self, namespace: &str, name: &str) -> anyhow::Result<Option<PodStatus>>;

    /// Nodes' own addresses are no pod's.
    fn pod_at(&self, address: IpAddr) -> anyhow::Result<Option<PodStatus>>;

    fn any_pod(&self) -> anyhow::Result<Option<PodStatus>>;

    /// The running ones of a namespace that a selector (as `kubectl -l` takes it; empty: all) picks, those that are ready first.
    fn pods(&self, namespace: &str, selector: &str) -> anyhow::Result<Vec<PodStatus>>;

    fn service(&self, namespace: &str, name: &str) -> anyhow::Result<Option<Service>>;

    /// The selector of its pods.
    fn deployment(&self, namespace: &str, name: &str) -> anyhow::Result<Option<String>>;

    fn has_namespace(&self, name: &str) -> anyhow::Result<bool>;

    /// `namespace/name` of those that make a namespace STRICT as a whole.
    fn strict_authentications(&self, namespace: &str) -> anyhow::Result<Vec<String>>;

    /// # Errors
    /// When no program of a mesh is there that could be asked.
    fn installed(&self) -> anyhow::Result<()>;

    fn nodes(&self) -> anyhow::Result<Vec<NodeStatus>>;

    /// Status and body.
    fn ask(&self, program: &Program, page: Page<'_>) -> anyhow::Result<(i32, String)>;

    /// The same page of many.
    fn ask_all(&self, programs: &[Program], page: Page<'_>) -> Vec<anyhow::Result<(i32, String)>> {
        programs.iter().map(|program| self.ask(program, page)).collect()
    }

    /// The namespace of a name that says none.
    fn namespace(&self) -> &str;

    /// Where the mesh is installed.
    fn system(&self) -> &str;

    /// The command that lists `pods` or `nodes`.
    fn lister(&self, what: &str) -> String;

    /// A page in JSON.
    fn fetch(&self, program: &Program, path: &str) -> anyhow::Result<Value> {
        let (status, body) =
            self.ask(program, Page::Admin(path)).with_context(|| format!("{program} does not answer"))?;
        ensure!(status == 200, "{program} says {status}: {}", body.trim());
        serde_json::from_str(&body).with_context(|| format!("{program} does not answer in JSON"))
    }
}

/// Which is meant: what is named; else the cluster of KUBECONFIG; else a running lab; else the cluster that `kubectl` would find.
pub(crate) fn find(place: &Place) -> anyhow::Result<Box<dyn Mesh>> {
    if let Some(name) = &place.lab {
        return Ok(Box::new(Lab::find(name)?));
    }
    if !place.connection.is_given()
        && !cluster::is_configured()
        && let Ok(lab) = Lab::find(LAB)
    {
        return Ok(Box::new(lab));
    }
    let found = OnCluster::open(place).context("no lab is meant (--lab NAME), and the cluster cannot be used")?;
    Ok(Box::new(found))
}

impl Mesh for Lab {
    fn pod(&self, namespace: &str, name: &str) -> anyhow::Result<Option<PodStatus>> {
        Ok(self.status()?.pods.into_iter().find(|pod| pod.namespace == namespace && pod.name == name))
    }

    fn pod_at(&self, address: IpAddr) -> anyhow::Result<Option<PodStatus>> {
        let is_at = |pod: &PodStatus| pod.addresses.iter().any(|a| a.parse() == Ok(address));
        Ok(self.status()?.pods.into_iter().find(is_at))
    }

    fn any_pod(&self) -> anyhow::Result<Option<PodStatus>> {
        Ok(self.status()?.pods.into_iter().next())
    }

    /// A lab knows no labels: every one is picked.
    fn pods(&self, namespace: &str, _selector: &str) -> anyhow::Result<Vec<PodStatus>> {
        let mut pods = self.status()?.pods;
        pods.retain(|pod| pod.namespace == namespace);
        Ok(pods)
    }

    fn service(&self, namespace: &str, name: &str) -> anyhow::Result<Option<Service>> {
        let addresses = self.status()?.services.remove(&format!("{namespace}/{name}"));
        Ok(addresses.map(|addresses| Service { addresses, ..Service::default() }))
    }

    /// A lab has pods only.
    fn deployment(&self, _namespace: &str, _name: &str) -> anyhow::Result<Option<String>> {
        Ok(None)
    }

    /// A lab does not tell what is in none of them.
    fn has_namespace(&self, _name: &str) -> anyhow::Result<bool> {
        Ok(true)
    }

    /// A lab's policies always say which object they were.
    fn strict_authentications(&self, _namespace: &str) -> anyhow::Result<Vec<String>> {
        Ok(Vec::new())
    }

    fn installed(&self) -> anyhow::Result<()> {
        Ok(())
    }

    fn nodes(&self) -> anyhow::Result<Vec<NodeStatus>> {
        Ok(self.status()?.nodes)
    }

    fn ask(&self, program: &Program, page: Page<'_>) -> anyhow::Result<(i32, String)> {
        let (port, path) = page.port_and_path(program);
        let target = match program {
            Program::ControlPlane => "control".to_owned(),
            other => other.to_string(),
        };
        Ok(self.get(&target, &format!("http://127.0.0.1:{port}{path}"))?)
    }

    fn namespace(&self) -> &str {
        "default"
    }

    fn system(&self) -> &str {
        SYSTEM
    }

    fn lister(&self, what: &str) -> String {
        format!("fairway lab {}", if what == "pods" { "pods" } else { "status" })
    }
}
