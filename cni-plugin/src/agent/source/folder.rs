//! A folder of manifests, the same that the control plane reads.

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_runtime::{drain::DrainWatcher, folder::Watch};
use serde::Deserialize;
use tokio::sync::watch;

use super::{Enrolment, PodSource, View, publish};
use crate::{
    agent::{enroll::Uid, status::redirection_named},
    eligibility::{Labels, Pod},
    object::{Metadata, Spec, Status, pod},
};

/// Manifests must have been quiet for this long before they are read: a starting pod waits for it.
const QUIET: Duration = Duration::from_millis(5);
const MAX_FILE: u64 = 4 << 20;
const MAX_DEPTH: usize = 8;
/// The label that tells whose agent wrote an enrolment.
pub const NODE_LABEL: &str = "fairway.dev/node";

/// A folder of YAML manifests, read recursively.
#[derive(Debug)]
pub struct FolderSource {
    folder: PathBuf,
    node: String,
    files: HashMap<PathBuf, ReadFile>,
}

/// A file as it was last read; a malformed one keeps the objects it had before.
#[derive(Debug)]
struct ReadFile {
    stamp: (SystemTime, u64),
    objects: Vec<Object>,
}

impl FolderSource {
    pub fn new(folder: PathBuf, node: String) -> Self {
        Self { folder, node, files: HashMap::new() }
    }

    /// Reads what has changed. An unreadable folder is an error: an incomplete view must not make pods disappear.
    pub fn read(&mut self) -> io::Result<View> {
        let mut paths = Vec::new();
        list(&self.folder, MAX_DEPTH, &mut paths)?;
        let mut files = HashMap::new();
        for (path, stamp) in paths {
            let before = self.files.remove(&path);
            let file = match before {
                Some(file) if file.stamp == stamp => file,
                before => read_file(&path, stamp, before),
            };
            files.insert(path, file);
        }
        self.files = files;
        Ok(self.view())
    }

    fn view(&self) -> View {
        let mut view = View::default();
        let mut namespaces = BTreeMap::new();
        for object in self.files.values().flat_map(|file| &file.objects) {
            match object {
                Object::Pod(pod) if pod.node == self.node => {
                    view.pods.insert(pod.uid.as_str().into(), pod.clone());
                }
                Object::Namespace(name, labels) => {
                    namespaces.insert(name.clone(), labels.clone());
                }
                Object::Enrolment { node, uid, enrolment } if *node == self.node => {
                    view.enrolments.insert(uid.clone(), enrolment.clone());
                }
                Object::Pod(_) | Object::Enrolment { .. } => {}
            }
        }
        view.namespaces = Arc::new(namespaces);
        view
    }
}

impl PodSource for FolderSource {
    fn run(
        mut self: Box<Self>,
        views: watch::Sender<Option<Arc<View>>>,
        drain: DrainWatcher,
    ) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(async move {
            let mut watch = Watch::new(&self.folder, QUIET);
            loop {
                if !watch.is_notified() {
                    watch = Watch::new(&self.folder, QUIET);
                }
                let read = tokio::task::spawn_blocking(move || (self.read(), self)).await;
                // The reading task panics only with a bug; without a source the agent keeps what it has.
                let Ok((view, this)) = read else { return };
                self = this;
                match view {
                    Ok(view) => publish(&views, view),
                    Err(error) => tracing::warn!(folder = %self.folder.display(), %error, "cannot read the manifests"),
                }
                tokio::select! {
                    _ = drain.signalled() => return,
                    () = watch.changed() => {}
                }
            }
        })
    }
}

fn list(folder: &Path, depth: usize, out: &mut Vec<(PathBuf, (SystemTime, u64))>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        // A file that vanishes while we look was being replaced: the next event brings its successor.
        let Ok(metadata) = fs::metadata(entry.path()) else { continue };
        let is_manifest = [".yaml", ".yml"].iter().any(|end| name.ends_with(end)) && !name.starts_with('.');
        if metadata.is_dir() && depth > 0 && !name.starts_with('.') {
            list(&entry.path(), depth - 1, out)?;
        } else if metadata.is_file() && is_manifest {
            out.push((entry.path(), (metadata.modified()?, metadata.len())));
        }
    }
    Ok(())
}

fn read_file(path: &Path, stamp: (SystemTime, u64), before: Option<ReadFile>) -> ReadFile {
    let text = if stamp.1 > MAX_FILE {
        Err(format!("longer than {MAX_FILE} bytes"))
    } else {
        fs::read_to_string(path).map_err(|e| e.to_string())
    };
    match text.and_then(|text| parse_manifest(&text)) {
        Ok(objects) => ReadFile { stamp, objects },
        Err(problem) => {
            tracing::warn!(file = %path.display(), problem, "malformed manifest: what it said before stays in force");
            ReadFile { stamp, objects: before.map(|file| file.objects).unwrap_or_default() }
        }
    }
}

/// What we read of a manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    Pod(Arc<Pod>),
    Namespace(String, Labels),
    Enrolment { node: String, uid: Uid, enrolment: Enrolment },
}

/// The objects of a multi-document file that concern us. The error names document and line.
pub fn parse_manifest(text: &str) -> Result<Vec<Object>, String> {
    let mut objects = Vec::new();
    for (first_line, document) in documents(text) {
        let located = |error: serde_saphyr::Error| format!("document at line {first_line}: {error}");
        let Some(kind) = serde_saphyr::from_str::<Option<Kind>>(document).map_err(located)? else { continue };
        objects.extend(object(&kind.kind, document).map_err(located)?);
    }
    Ok(objects)
}

/// Documents with the number of their first line. A line that begins with `---` can be nothing but a separator (YAML 1.2 §9.1.2).
fn documents(text: &str) -> Vec<(usize, &str)> {
    let mut documents = Vec::new();
    let (mut start, mut start_line, mut at) = (0, 1, 0);
    for (number, line) in text.split_inclusive('\n').enumerate() {
        if line.trim_end() == "---" || line.starts_with("--- ") {
            documents.push((start_line, &text[start..at]));
            (start, start_line) = (at + line.len(), number + 2);
        }
        at += line.len();
    }
    documents.push((start_line, &text[start..]));
    let is_blank = |text: &str| text.lines().all(|l| l.trim().is_empty() || l.trim_start().starts_with('#'));
    documents.retain(|(_, text)| !is_blank(text));
    documents
}

#[derive(Deserialize)]
struct Kind {
    #[serde(default)]
    kind: String,
}

#[derive(Deserialize)]
struct Raw<S> {
    #[serde(default)]
    metadata: Metadata,
    spec: Option<S>,
    status: Option<Status>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct EnrolmentSpec {
    pod_uid: Option<String>,
    redirection: Option<String>,
}

fn object(kind: &str, document: &str) -> Result<Option<Object>, serde_saphyr::Error> {
    Ok(match kind {
        "Namespace" => {
            let Raw::<serde::de::IgnoredAny> { metadata, .. } = serde_saphyr::from_str(document)?;
            Some(Object::Namespace(metadata.name, metadata.labels.unwrap_or_default()))
        }
        "Pod" => {
            let Raw::<Spec> { metadata, spec, status } = serde_saphyr::from_str(document)?;
            pod(metadata, spec, status).map(|pod| Object::Pod(Arc::new(pod)))
        }
        "PodEnrolment" => enrolment(serde_saphyr::from_str(document)?),
        _ => None,
    })
}

fn enrolment(raw: Raw<EnrolmentSpec>) -> Option<Object> {
    let spec = raw.spec?;
    let redirection = redirection_named(&spec.redirection?)?;
    let node = raw.metadata.labels?.get(NODE_LABEL)?.clone();
    let namespace = raw.metadata.namespace.unwrap_or_else(|| "default".into());
    let enrolment = Enrolment { namespace, name: raw.metadata.name, redirection };
    Some(Object::Enrolment { node, uid: spec.pod_uid?.into(), enrolment })
}

#[cfg(test)]
mod tests {
    use mesh_runtime::drain;
    use proptest::prelude::*;

    use super::*;
    use crate::agent::enroll::Redirection;

    const MANIFEST: &str = "\
apiVersion: v1
kind: Namespace
metadata: {name: demo, labels: {istio.io/dataplane-mode: ambient}}
---
# only a comment
---
apiVersion: v1
kind: Service
metadata: {name: s, namespace: demo}
spec: {ports: [{port: 80}]}
--- # a pod
apiVersion: v1
kind: Pod
metadata: {name: a, namespace: demo, uid: u1, annotations: {x: \"true\"}}
spec: {nodeName: n1, serviceAccountName: sa, containers: [{name: c}]}
status: {phase: Running, podIPs: [{ip: 10.0.0.7}, {ip: \"fd00::7\"}], podIP: 10.0.0.7}
---
kind: Pod
metadata: {name: b, namespace: demo, uid: u2}
spec: {nodeName: n2}
---
kind: PodEnrolment
metadata: {name: a, namespace: demo, labels: {fairway.dev/node: n1}}
spec: {podUid: u1, redirection: enabled}
";

    #[test]
    fn a_folder_is_read_for_one_node() {
        let dir = tempfile::tempdir().expect("temporary directory");
        fs::create_dir(dir.path().join("sub")).expect("mkdir");
        fs::write(dir.path().join("sub/all.yaml"), MANIFEST).expect("write");
        fs::write(dir.path().join(".hidden.yaml"), "kind: [").expect("write");
        let view = FolderSource::new(dir.path().into(), "n1".into()).read().expect("read");
        assert_eq!(view.pods.len(), 1);
        let (uid, pod) = view.find("demo", "a").expect("pod");
        assert_eq!((&**uid, pod.service_account.as_str(), pod.ips.len()), ("u1", "sa", 2));
        assert_eq!(view.namespaces["demo"]["istio.io/dataplane-mode"], "ambient");
        assert_eq!(view.enrolments["u1"].redirection, Redirection::Enabled);
    }

    #[test]
    fn a_malformed_file_keeps_what_it_said_before_and_a_missing_folder_is_no_empty_view() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let file = dir.path().join("all.yaml");
        fs::write(&file, MANIFEST).expect("write");
        let mut source = FolderSource::new(dir.path().into(), "n1".into());
        let before = source.read().expect("read");
        fs::write(&file, format!("{MANIFEST}---\nkind: Pod\nmetadata: 7\n")).expect("write");
        assert_eq!(source.read().expect("read"), before);
        fs::remove_file(&file).expect("remove");
        assert_eq!(source.read().expect("read"), View::default());
        drop(dir);
        source.read().expect_err("no folder");
    }

    #[test]
    fn a_problem_is_located() {
        let problem =
            parse_manifest("kind: Namespace\nmetadata: {name: a}\n---\nkind: Pod\nmetadata: 7\n").expect_err("bad");
        assert!(problem.starts_with("document at line 4"), "{problem}");
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in "[a-z:{}\\[\\] \\-\n&*!]{0,80}") {
            drop(parse_manifest(&text));
        }
    }

    #[tokio::test]
    async fn a_change_in_the_folder_is_published() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (views, mut seen) = watch::channel(None);
        let (trigger, watcher) = drain::channel();
        let source = Box::new(FolderSource::new(dir.path().into(), "n1".into()));
        let running = tokio::spawn(source.run(views, watcher));
        let first = seen.wait_for(Option::is_some).await.expect("published").clone().expect("view");
        assert!(first.pods.is_empty());
        let fresh = dir.path().join(".all.tmp");
        fs::write(&fresh, MANIFEST).expect("write");
        fs::rename(fresh, dir.path().join("all.yaml")).expect("rename");
        seen.wait_for(|view| view.as_ref().is_some_and(|v| v.pods.len() == 1)).await.expect("published");
        trigger.drain(Duration::from_secs(5)).await;
        running.await.expect("source");
    }
}
