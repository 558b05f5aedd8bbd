//! Files the agent shares with its neighbours: the runtime's record of sandboxes, and what it writes down about its pods.

use std::{
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use mesh_net::{NetNs, NetNsId, link::Netlink};
use serde::Deserialize;

use super::{enroll::Redirection, source::NODE_LABEL};
use crate::eligibility::Pod;

/// The runtime's record of a running pod.
#[derive(Debug, Deserialize)]
struct Sandbox {
    uid: String,
    netns: PathBuf,
    #[serde(default)]
    ips: Vec<IpAddr>,
}

/// Why the namespace of a running pod could not be had.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    #[error("FAIRWAY_SANDBOXES is not set, so pods that run already cannot be found")]
    NoFolder,
    #[error("no record of a sandbox at {0}")]
    NoRecord(PathBuf, #[source] io::Error),
    #[error("the sandbox record {0} is malformed")]
    Malformed(PathBuf, #[source] serde_json::Error),
    #[error("the sandbox record is of pod {0}")]
    OtherPod(String),
    #[error("cannot open the network namespace {0}")]
    Netns(PathBuf, #[source] io::Error),
    #[error("{0} is the node's own network namespace")]
    Host(PathBuf),
    #[error("no interface in {0} has an address of the pod")]
    Foreign(PathBuf),
}

/// Finds the namespace of a running pod and makes sure that it is the pod's: not the node's, and with one of its addresses. Paths are
/// reused, so a record alone proves nothing.
pub fn find_netns(folder: Option<&Path>, pod: &Pod, home: NetNsId) -> Result<NetNs, SandboxError> {
    let record = folder.ok_or(SandboxError::NoFolder)?.join(format!("{}.json", pod.uid));
    let text = fs::read(&record).map_err(|e| SandboxError::NoRecord(record.clone(), e))?;
    let sandbox: Sandbox = serde_json::from_slice(&text).map_err(|e| SandboxError::Malformed(record, e))?;
    if sandbox.uid != pod.uid {
        return Err(SandboxError::OtherPod(sandbox.uid));
    }
    let ns = open_netns(&sandbox.netns, home)?;
    let expected = if pod.ips.is_empty() { &sandbox.ips } else { &pod.ips };
    match has_address(&ns, expected) {
        Ok(true) => Ok(ns),
        Ok(false) => Err(SandboxError::Foreign(sandbox.netns)),
        Err(error) => Err(SandboxError::Netns(sandbox.netns, error)),
    }
}

/// Opens a pod's namespace by path; never the node's own.
pub fn open_netns(path: &Path, home: NetNsId) -> Result<NetNs, SandboxError> {
    let failed = |error| SandboxError::Netns(path.to_owned(), error);
    let ns = NetNs::open(path).map_err(failed)?;
    if ns.id().map_err(failed)? == home { Err(SandboxError::Host(path.to_owned())) } else { Ok(ns) }
}

fn has_address(ns: &NetNs, expected: &[IpAddr]) -> io::Result<bool> {
    let addresses = Netlink::in_ns(ns)?.addresses().map_err(io::Error::other)?;
    Ok(addresses.iter().any(|a| expected.contains(&a.net.addr())))
}

/// Writes down a pod's redirection, or removes what was written; in one step, so that readers see the old or the new.
pub fn write_enrolment(manifests: &Path, node: &str, pod: &Pod, redirection: Option<Redirection>) -> io::Result<()> {
    let folder = manifests.join("enrolment");
    let name = format!("{}_{}.yaml", pod.namespace, pod.name);
    let path = folder.join(&name);
    let Some(redirection) = redirection else {
        return match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
    };
    let redirection = match redirection {
        Redirection::Enabled => "enabled",
        Redirection::Pending => "pending",
    };
    fs::create_dir_all(&folder)?;
    let fresh = folder.join(format!(".{name}.tmp"));
    fs::write(&fresh, enrolment_yaml(node, pod, redirection))?;
    fs::rename(fresh, path)
}

/// Strings are written as JSON, which YAML reads, so that no name can break out of its place.
fn enrolment_yaml(node: &str, pod: &Pod, redirection: &str) -> String {
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    format!(
        "apiVersion: fairway.dev/v1alpha1\nkind: PodEnrolment\nmetadata: {{namespace: {}, name: {}, labels: {{{NODE_LABEL}: {}}}}}\nspec: {{podUid: {}, redirection: {redirection}}}\n",
        quoted(&pod.namespace),
        quoted(&pod.name),
        quoted(node),
        quoted(&pod.uid),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::source::{FolderSource, Object, parse_manifest};

    fn pod() -> Pod {
        Pod { namespace: "demo".into(), name: "a".into(), uid: "u1".into(), node: "n\"1".into(), ..Pod::default() }
    }

    #[test]
    fn an_enrolment_reads_back_and_goes_without_trace() {
        let dir = tempfile::tempdir().expect("temporary directory");
        for redirection in [Redirection::Pending, Redirection::Enabled] {
            write_enrolment(dir.path(), "n\"1", &pod(), Some(redirection)).expect("write");
            let view = FolderSource::new(dir.path().into(), "n\"1".into()).read().expect("read");
            assert_eq!(view.enrolments["u1"].redirection, redirection);
        }
        write_enrolment(dir.path(), "n", &pod(), None).expect("remove");
        write_enrolment(dir.path(), "n", &pod(), None).expect("a second time is no error");
        assert_eq!(fs::read_dir(dir.path().join("enrolment")).expect("list").count(), 0);
        let yaml = enrolment_yaml("n", &pod(), "enabled");
        assert!(matches!(parse_manifest(&yaml).expect("valid")[..], [Object::Enrolment { .. }]), "{yaml}");
    }

    #[test]
    fn a_record_must_be_there_readable_and_of_this_pod() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let home = NetNs::current().expect("namespace").id().expect("id");
        let find = || find_netns(Some(dir.path()), &pod(), home);
        assert!(matches!(find_netns(None, &pod(), home), Err(SandboxError::NoFolder)));
        assert!(matches!(find(), Err(SandboxError::NoRecord(..))));
        let record = dir.path().join("u1.json");
        for (text, fits) in [
            ("{", (|e| matches!(e, SandboxError::Malformed(..))) as fn(&SandboxError) -> bool),
            (r#"{"uid":"u2","netns":"/x"}"#, |e| matches!(e, SandboxError::OtherPod(_))),
            (r#"{"uid":"u1","netns":"/no/such"}"#, |e| matches!(e, SandboxError::Netns(..))),
            (r#"{"uid":"u1","netns":"/proc/self/ns/net"}"#, |e| matches!(e, SandboxError::Host(_))),
        ] {
            fs::write(&record, text).expect("write");
            let error = find().expect_err("refused");
            assert!(fits(&error), "{text}: {error}");
        }
    }
}
