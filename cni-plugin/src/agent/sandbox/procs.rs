//! Pods found by their processes.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs, io,
    io::Read,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use mesh_net::{NetNs, NetNsId};

use super::{SandboxError, cgroup::pod_uid, verified};
use crate::{
    agent::{enroll::Uid, host::Host},
    eligibility::Pod,
};

/// A static pod's processes carry this in place of its uid.
const CONFIG_HASH: &str = "kubernetes.io/config.hash";
/// Longest file of `/proc` read.
const MAX_FILE: u64 = 64 << 10;

/// A namespace in which a process of a pod runs.
struct Candidate {
    id: NetNsId,
    path: PathBuf,
    /// When its oldest process started, in ticks since boot.
    started: u64,
}

/// Finds them all in one walk over the node's processes. Those in the node's own namespace are passed over.
pub fn find(host: &Host, pods: &[Arc<Pod>]) -> HashMap<Uid, Result<NetNs, SandboxError>> {
    let with_address = || pods.iter().filter(|pod| !pod.ips.is_empty());
    // A set: anybody may annotate a pod of theirs with the name of another, which must not be lost by that.
    let wanted: HashSet<&str> = with_address().flat_map(|pod| names_in_cgroups(pod)).collect();
    // Without anybody to look for, the walk would be for nothing.
    let candidates = if wanted.is_empty() { Ok(HashMap::new()) } else { walk(host, &wanted).map_err(Arc::new) };
    let found = |pod: &Pod| {
        if pod.ips.is_empty() {
            return Err(SandboxError::NoAddress);
        }
        let candidates =
            candidates.as_ref().map_err(|e| SandboxError::NoProcesses(host.proc.clone(), Arc::clone(e)))?;
        let named = names_in_cgroups(pod).filter_map(|name| candidates.get(name));
        choose(named.flatten(), pod)
    };
    pods.iter().map(|pod| (pod.uid.as_str().into(), found(pod))).collect()
}

/// The names a pod may have there. Which of them is its own, its address tells.
fn names_in_cgroups(pod: &Pod) -> impl Iterator<Item = &str> {
    [Some(&pod.uid), pod.annotations.get(CONFIG_HASH)].into_iter().flatten().map(String::as_str)
}

/// By name in cgroups, the oldest first.
type Candidates<'a> = HashMap<&'a str, Vec<Candidate>>;

fn walk<'a>(host: &Host, wanted: &HashSet<&'a str>) -> io::Result<Candidates<'a>> {
    let mut found: HashMap<&str, BTreeMap<NetNsId, Candidate>> = HashMap::new();
    for entry in fs::read_dir(&host.proc)? {
        let process = entry?.path();
        let is_process = process.file_name().is_some_and(|name| name.as_encoded_bytes().iter().all(u8::is_ascii_digit));
        // A process that ends while we look is none of those we look for.
        let Some((name, candidate)) = is_process.then(|| candidate(&process, host, wanted)).flatten() else { continue };
        let namespaces = found.entry(name).or_default();
        match namespaces.get(&candidate.id) {
            Some(known) if known.started <= candidate.started => {}
            _ => drop(namespaces.insert(candidate.id, candidate)),
        }
    }
    let sorted = |namespaces: BTreeMap<NetNsId, Candidate>| {
        let mut candidates: Vec<Candidate> = namespaces.into_values().collect();
        candidates.sort_by_key(|candidate| candidate.started);
        candidates
    };
    Ok(found.into_iter().map(|(name, namespaces)| (name, sorted(namespaces))).collect())
}

fn candidate<'a>(process: &Path, host: &Host, wanted: &HashSet<&'a str>) -> Option<(&'a str, Candidate)> {
    let path = process.join("ns/net");
    let namespace = fs::metadata(&path).ok()?;
    let id = NetNsId { dev: namespace.dev(), ino: namespace.ino() };
    if id == host.netns_id() {
        return None;
    }
    let Ok(name) = pod_uid(&read(&process.join("cgroup"))?) else {
        tracing::debug!(process = %process.display(), "its cgroups name several pods");
        return None;
    };
    let name = wanted.get(name?.as_str())?;
    let started = start_time(&read(&process.join("stat"))?)?;
    Some((name, Candidate { id, path, started }))
}

fn read(path: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    fs::File::open(path).ok()?.take(MAX_FILE).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// Field 22 of `/proc/<pid>/stat`; the command name before it may hold anything.
fn start_time(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// A pod may hold further namespaces (of containers in a container): its own is that of its oldest process, and has its address.
fn choose<'a>(candidates: impl Iterator<Item = &'a Candidate>, pod: &Pod) -> Result<NetNs, SandboxError> {
    let mut error = SandboxError::NoProcess;
    for Candidate { id, path, .. } in candidates {
        match open(*id, path, pod) {
            Ok(ns) => return Ok(ns),
            Err(why) => error = why,
        }
    }
    Err(error)
}

fn open(id: NetNsId, path: &Path, pod: &Pod) -> Result<NetNs, SandboxError> {
    let failed = |error| SandboxError::Netns(path.to_owned(), error);
    let ns = NetNs::open(path).map_err(failed)?;
    // Process numbers are reused.
    if ns.id().map_err(failed)? != id {
        return Err(SandboxError::NoProcess);
    }
    verified(ns, path.to_owned(), &pod.ips)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const UID: &str = "2a4f6c8e-0b1d-4f3a-9c5e-7d9b1f3a5c7e";

    fn process(proc: &Path, pid: u32, cgroup: &str, netns: &str) {
        let folder = proc.join(pid.to_string());
        fs::create_dir_all(folder.join("ns")).expect("mkdir");
        fs::write(folder.join("cgroup"), cgroup).expect("write");
        fs::write(
            folder.join("stat"),
            format!("{pid} (a) b) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 {pid} 0 0"),
        )
        .expect("write");
        symlink(netns, folder.join("ns/net")).expect("link");
    }

    #[test]
    fn start_times_are_read_past_a_hostile_command_name() {
        assert_eq!(start_time("7 (a) b) (c) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 0"), Some(4242));
        assert_eq!(start_time("7 (a"), None);
    }

    #[test]
    fn processes_in_the_nodes_namespace_of_other_pods_or_of_none_are_not_the_pods() {
        let dir = tempfile::tempdir().expect("temporary directory");
        process(dir.path(), 1, "0::/init.scope", "/proc/self/ns/net");
        process(dir.path(), 7, &format!("0::/kubepods/pod{UID}/c"), "/proc/self/ns/net");
        process(dir.path(), 8, "0::/system.slice", "/proc/self/ns/mnt");
        fs::create_dir(dir.path().join("9")).expect("a process that has just ended");
        let mut host = Host::here().expect("host");
        host.proc = dir.path().into();
        let pod = |ips: &[&str]| {
            let ips = ips.iter().map(|ip| ip.parse().expect("ip")).collect();
            Arc::new(Pod { uid: UID.into(), ips, ..Pod::default() })
        };
        let find = |pod: Arc<Pod>| find(&host, &[pod]).remove(UID).expect("an answer").expect_err("no namespace");
        assert!(matches!(find(pod(&["10.0.0.7"])), SandboxError::NoProcess));
        assert!(matches!(find(pod(&[])), SandboxError::NoAddress));
        fs::remove_dir_all(dir.path()).expect("remove");
        assert!(matches!(find(pod(&["10.0.0.7"])), SandboxError::NoProcesses(..)));
    }
}
