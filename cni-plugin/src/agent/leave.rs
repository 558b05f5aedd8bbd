//! Leaving the node: whether it is an upgrade or the end, and what is taken away at the end.

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use k8s_openapi::api::{apps::v1::DaemonSet, core::v1::Node};
use kube::{Api, Client, api::ListParams, core::PartialObjectMeta};
use mesh_net::{NetNs, NetNsId};
use mesh_runtime::{telemetry::error_chain, whole_file};
use tokio::{
    task::spawn_blocking,
    time::{sleep, timeout},
};

use super::{
    host::{Host, NETNS_FOLDERS},
    install::{self, conf_files, plan},
    source::kubernetes::WatchedPod,
    status::{AnnotationStatus, REDIRECTION, StatusWriter},
};
use crate::{decision::Decisions, eligibility::Labels, request::socket_path, rules};

mod retire;
mod selector;

pub use retire::retire;

/// What is known about our own DaemonSet when we are told to stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    Stands,
    Ends(&'static str),
    /// The API server does not say.
    Unknown(String),
}

/// What is to become of what we have put on the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// A successor finds it as it is. Until then no pod of the mesh starts, which is as it should be.
    Stay,
    /// The plugin leaves the chain, captured pods stay captured.
    Unchain,
    /// Nothing remains.
    Remove,
}

/// A plugin without an agent lets no pod start, so in doubt it leaves the chain; a file of our own that runtimes read first was chosen
/// by people who want it to stay.
pub fn fate(standing: &Standing, mode: Option<&plan::Mode>) -> Fate {
    match standing {
        Standing::Stands => Fate::Stay,
        Standing::Ends(_) => Fate::Remove,
        Standing::Unknown(_) if matches!(mode, Some(plan::Mode::Owned { .. })) => Fate::Stay,
        Standing::Unknown(_) => Fate::Unchain,
    }
}

/// What ztunnel keeps beside the socket (the chart's `ztunnel.keepState`).
const KEPT: [&str; 2] = ["state", "keys"];
/// Between two looks at the flows that may end by themselves.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
const ASK_LIMIT: Duration = Duration::from_secs(2);
const ASK_AGAIN: Duration = Duration::from_millis(500);
const TRIES: usize = 3;

/// Asks for our own DaemonSet, a few times where there is no answer to build on.
pub async fn standing(client: &Client, namespace: &str, daemon_set: &str, node: &str) -> Standing {
    let mut answers = Vec::new();
    while answers.len() < TRIES {
        match timeout(ASK_LIMIT, ask(client, namespace, daemon_set, node)).await {
            Ok(Ok(standing)) => return standing,
            Ok(Err(kube::Error::Api(status))) if matches!(status.code, 401 | 403) => answers.push(Unanswered::Refused),
            Ok(Err(error)) => answers.push(Unanswered::Failed(error_chain(&error))),
            Err(_) => answers.push(Unanswered::Failed(format!("no answer within {ASK_LIMIT:?}"))),
        }
        sleep(ASK_AGAIN).await;
    }
    without_answer(answers)
}

/// What became of a question.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Unanswered {
    /// With 401 or 403.
    Refused,
    Failed(String),
}

/// Refused every time, our account, or what it may do, has been deleted; among failures it may be the server's trouble.
fn without_answer(answers: Vec<Unanswered>) -> Standing {
    let failed = answers.into_iter().find_map(|answer| match answer {
        Unanswered::Refused => None,
        Unanswered::Failed(why) => Some(why),
    });
    match failed {
        Some(why) => Standing::Unknown(why),
        None => Standing::Ends("the API server no longer knows our account"),
    }
}

async fn ask(client: &Client, namespace: &str, daemon_set: &str, node: &str) -> kube::Result<Standing> {
    let sets: Api<DaemonSet> = Api::namespaced(client.clone(), namespace);
    let set = match sets.get(daemon_set).await {
        Ok(set) => set,
        Err(kube::Error::Api(status)) if status.code == 404 => return Ok(Standing::Ends("the DaemonSet is gone")),
        Err(error) => return Err(error),
    };
    if set.metadata.deletion_timestamp.is_some() {
        return Ok(Standing::Ends("the DaemonSet is being deleted"));
    }
    let Some(pods) = set.spec.and_then(|spec| spec.template.spec) else { return Ok(Standing::Stands) };
    let nodes: Api<PartialObjectMeta<Node>> = Api::all(client.clone());
    Ok(match nodes.get(node).await {
        Ok(found) if !selector::selects(&pods, node, found.metadata.labels.as_ref().unwrap_or(&Labels::new())) => {
            Standing::Ends("the DaemonSet no longer selects this node")
        }
        // A node that is deleted goes with everything on it.
        _ => Standing::Stands,
    })
}

/// What was done; for the log and for whoever ran the command.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Done {
    pub removed: Vec<String>,
    pub failed: Vec<String>,
}

impl Done {
    fn add(&mut self, what: impl std::fmt::Display, result: io::Result<bool>) {
        match result {
            Ok(true) => self.removed.push(what.to_string()),
            Ok(false) => {}
            Err(error) => self.failed.push(format!("{what}: {}", error_chain(&error))),
        }
    }
}

/// Everything on a node that may be ours.
#[derive(Clone, Debug)]
pub struct Traces {
    pub host: Host,
    pub install: Option<install::Settings>,
    pub run_dir: PathBuf,
    pub zds_socket: PathBuf,
    pub node: String,
    /// How long captured flows may go on.
    pub grace: Duration,
    /// The sockets of the agent that leaves. Another file in their place is a successor's: Istio's agent, or ours of another DaemonSet,
    /// may be started before this one is gone.
    pub sockets: Vec<Bound>,
}

/// A socket's file, known again by what it is and not by its path.
#[derive(Clone, Debug)]
pub struct Bound {
    path: PathBuf,
    file: (u64, u64),
}

impl Bound {
    pub fn at(path: PathBuf) -> io::Result<Self> {
        Ok(Self { file: file_id(&path)?, path })
    }

    fn was_replaced(&self) -> bool {
        file_id(&self.path).is_ok_and(|file| file != self.file)
    }
}

fn file_id(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

impl Traces {
    /// Takes our plugin out of the chain: every configuration, not only the one of the mode of today.
    pub fn unchain(&self) -> Done {
        let mut done = Done::default();
        let Some(install) = &self.install else { return done };
        let files = match conf_files(&install.net_dir) {
            Ok(files) => files,
            Err(error) => {
                done.add(install.net_dir.display(), Err(error));
                return done;
            }
        };
        for (name, content) in files {
            // What we could not read, we have not written.
            let Ok(text) = content else { continue };
            let path = install.net_dir.join(&name);
            let change = match plan::without_us(&name, &text, &install.mode) {
                None => continue,
                Some(None) => whole_file::remove(&path),
                Some(Some(text)) => install.rewrite(&path, &text).map(|()| true),
            };
            done.add(format_args!("our entry in {}", path.display()), change);
        }
        done
    }

    /// Removes everything; may be repeated. New connections pass uncaptured first, open ones may end, then the rules go.
    pub async fn remove(&self, client: Option<&Client>) -> Done {
        let this = self.clone();
        let first = spawn_blocking(move || {
            let done = this.unchain();
            let (namespaces, unreadable) = captured(&this.host);
            (done, namespaces, unreadable)
        });
        let (mut done, namespaces, unreadable) = match first.await {
            Ok(first) => first,
            Err(error) => return Done { failed: vec![error.to_string()], ..Done::default() },
        };
        done.failed.extend(unreadable);
        for (what, ns) in &namespaces {
            done.add(format_args!("redirects of {what}"), rules::flush_redirects(ns).map_err(other).map(|()| false));
        }
        if let Some(client) = client {
            done.add("annotations of captured pods", self.unannotate(client).await.map_err(io::Error::other));
        }
        let until = Instant::now() + self.grace;
        while Instant::now() < until && namespaces.iter().any(|(_, ns)| rules::captured_flows(ns).is_ok_and(|n| n > 0))
        {
            sleep(LOOK_AGAIN).await;
        }
        for (what, ns) in &namespaces {
            done.add(format_args!("rules in {what}"), rules::remove(ns).map_err(other).map(|()| true));
        }
        let table = rules::host::remove(self.host.netns()).map_err(other);
        done.add(format_args!("table {} of the node", rules::host::TABLE), table);
        for path in self.files() {
            done.add(path.display(), whole_file::remove(&path));
        }
        // With another agent in our place, ztunnel may well stay.
        if !self.has_successor_at(&self.zds_socket) {
            for path in KEPT.map(|name| self.zds_socket.with_file_name(name)) {
                done.add(path.display(), remove_folder(&path));
            }
        }
        done
    }

    fn has_successor_at(&self, path: &Path) -> bool {
        self.sockets.iter().any(|bound| bound.path == path && bound.was_replaced())
    }

    fn files(&self) -> Vec<PathBuf> {
        let install = self.install.iter().flat_map(|i| [i.kubeconfig(), i.installed_binary()]);
        let run = [Decisions::path(&self.run_dir), socket_path(&self.run_dir), self.zds_socket.clone()];
        install.chain(run).filter(|path| !self.has_successor_at(path)).collect()
    }

    /// Whether there was an annotation to remove.
    async fn unannotate(&self, client: &Client) -> Result<bool, String> {
        let pods: Api<WatchedPod> = Api::all(client.clone());
        let of_node = ListParams::default().fields(&format!("spec.nodeName={}", self.node));
        let listed = timeout(ASK_LIMIT, pods.list(&of_node)).await.map_err(|_| "no answer in time".to_owned())?;
        let pods = listed.map_err(|e| error_chain(&e))?.items.into_iter().filter_map(WatchedPod::into_pod);
        let pods: Vec<_> = pods.filter(|pod| pod.annotations.contains_key(REDIRECTION)).collect();
        let status = AnnotationStatus(client.clone());
        let written = join_all(pods.iter().map(|pod| status.write(pod, None))).await;
        written.into_iter().collect::<Result<Vec<()>, String>>().map(|written| !written.is_empty())
    }
}

fn remove_folder(path: &Path) -> io::Result<bool> {
    match fs::remove_dir_all(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn other(error: rules::RulesError) -> io::Error {
    io::Error::other(error)
}

/// The namespaces with rules of ours, whoever lives in them, and what could not be looked at.
fn captured(host: &Host) -> (Vec<(String, NetNs)>, Vec<String>) {
    let (mut found, mut failed) = (Vec::new(), Vec::new());
    let mut seen: BTreeSet<NetNsId> = BTreeSet::from([host.netns_id()]);
    for path in paths(host) {
        // One that is gone by now is none to clean.
        let Ok(ns) = NetNs::open(&path) else { continue };
        if !ns.id().is_ok_and(|id| seen.insert(id)) {
            continue;
        }
        match rules::is_ours(&ns) {
            Ok(true) => found.push((path.display().to_string(), ns)),
            Ok(false) => {}
            Err(error) => failed.push(format!("{}: {}", path.display(), error_chain(&error))),
        }
    }
    (found, failed)
}

/// Of processes, and of those that runtimes keep by name.
fn paths(host: &Host) -> Vec<PathBuf> {
    let names = |folder: &PathBuf| -> Vec<PathBuf> {
        fs::read_dir(folder).map(|entries| entries.flatten().map(|e| e.path()).collect()).unwrap_or_default()
    };
    let is_process =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.as_encoded_bytes().iter().all(u8::is_ascii_digit));
    let processes = names(&host.proc).into_iter().filter(is_process).map(|process| process.join("ns/net"));
    let named = NETNS_FOLDERS.iter().flat_map(|folder| names(&host.path(folder.as_ref())));
    named.chain(processes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_refusal_among_failures_is_no_end() {
        let failed = || Unanswered::Failed("no answer".to_owned());
        let ends = Standing::Ends("the API server no longer knows our account");
        assert_eq!(without_answer(vec![Unanswered::Refused; TRIES]), ends);
        for mixed in [vec![failed(), failed(), Unanswered::Refused], vec![Unanswered::Refused, failed()]] {
            assert_eq!(without_answer(mixed), Standing::Unknown("no answer".to_owned()));
        }
    }

    #[test]
    fn only_a_daemon_set_that_stands_makes_it_an_upgrade() {
        let owned = plan::Mode::Owned { file: "02.conflist".into() };
        let unknown = Standing::Unknown("frozen".into());
        for (standing, mode, expected) in [
            (Standing::Stands, Some(&plan::Mode::Chained), Fate::Stay),
            (Standing::Stands, Some(&owned), Fate::Stay),
            (Standing::Ends("gone"), Some(&plan::Mode::Chained), Fate::Remove),
            (Standing::Ends("gone"), Some(&owned), Fate::Remove),
            (unknown.clone(), Some(&plan::Mode::Chained), Fate::Unchain),
            (unknown.clone(), Some(&owned), Fate::Stay),
            (unknown, None, Fate::Unchain),
        ] {
            assert_eq!(fate(&standing, mode), expected, "{standing:?} {mode:?}");
        }
    }
}
