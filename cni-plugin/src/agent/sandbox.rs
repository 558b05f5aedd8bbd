//! The namespaces of pods that run already: where they are looked for, and that they are the pod's.

use std::{
    collections::HashMap,
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use mesh_net::{NetNs, link::Netlink};
use serde::Deserialize;

use super::{enroll::Uid, host::Host};
use crate::eligibility::Pod;

pub mod cgroup;
pub mod procs;

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
    #[error("the processes of the node cannot be read in {0}")]
    NoProcesses(PathBuf, #[source] Arc<io::Error>),
    #[error("no process of the pod runs on this node, or none outside the node's own network namespace")]
    NoProcess,
    #[error("the pod has no address yet")]
    NoAddress,
    #[error("cannot open the network namespace {0}")]
    Netns(PathBuf, #[source] io::Error),
    #[error("{0} is the node's own network namespace")]
    Host(PathBuf),
    #[error("no interface in {0} has an address of the pod")]
    Foreign(PathBuf),
}

/// Where the namespaces of running pods are looked for.
#[derive(Clone, Debug)]
pub enum Sandboxes {
    /// The container runtime's records, one file per pod.
    Records(Option<PathBuf>),
    /// The cgroups of the node's processes.
    Processes,
}

impl Sandboxes {
    /// Looks for all of them at once. Blocks for as long as it takes to read `/proc`.
    pub fn find(&self, host: &Host, pods: &[Arc<Pod>]) -> HashMap<Uid, Result<NetNs, SandboxError>> {
        match self {
            Self::Records(folder) => {
                let find = |pod: &Arc<Pod>| (pod.uid.as_str().into(), find_record(folder.as_deref(), pod, host));
                pods.iter().map(find).collect()
            }
            Self::Processes => procs::find(host, pods),
        }
    }
}

/// The runtime's record of a running pod.
#[derive(Debug, Deserialize)]
struct Sandbox {
    uid: String,
    netns: PathBuf,
    #[serde(default)]
    ips: Vec<IpAddr>,
}

/// Paths are reused, so a record alone proves nothing.
fn find_record(folder: Option<&Path>, pod: &Pod, host: &Host) -> Result<NetNs, SandboxError> {
    let record = folder.ok_or(SandboxError::NoFolder)?.join(format!("{}.json", pod.uid));
    let text = fs::read(&record).map_err(|e| SandboxError::NoRecord(record.clone(), e))?;
    let sandbox: Sandbox = serde_json::from_slice(&text).map_err(|e| SandboxError::Malformed(record, e))?;
    if sandbox.uid != pod.uid {
        return Err(SandboxError::OtherPod(sandbox.uid));
    }
    let expected = if pod.ips.is_empty() { &sandbox.ips } else { &pod.ips };
    verified(host.open_netns(&sandbox.netns)?, sandbox.netns, expected)
}

/// The namespace, if it has one of the addresses.
fn verified(ns: NetNs, path: PathBuf, expected: &[IpAddr]) -> Result<NetNs, SandboxError> {
    match has_address(&ns, expected) {
        Ok(true) => Ok(ns),
        Ok(false) => Err(SandboxError::Foreign(path)),
        Err(error) => Err(SandboxError::Netns(path, error)),
    }
}

fn has_address(ns: &NetNs, expected: &[IpAddr]) -> io::Result<bool> {
    let addresses = Netlink::in_ns(ns)?.addresses().map_err(io::Error::other)?;
    Ok(addresses.iter().any(|a| expected.contains(&a.net.addr())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_must_be_there_readable_and_of_this_pod() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let host = Host::here().expect("host");
        let pod = Pod { uid: "u1".into(), ..Pod::default() };
        let find = || find_record(Some(dir.path()), &pod, &host);
        assert!(matches!(find_record(None, &pod, &host), Err(SandboxError::NoFolder)));
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
