//! The node as this process sees it: from a container, its folders are mounted below another root.

use std::{
    io,
    path::{Path, PathBuf},
};

use mesh_net::{NetNs, NetNsId};

use super::sandbox::SandboxError;

/// Where container runtimes name the namespaces of pods.
pub const NETNS_FOLDERS: [&str; 2] = ["/var/run/netns", "/var/run/docker/netns"];

/// Where the node's files are, and its network namespace.
#[derive(Clone, Debug)]
pub struct Host {
    /// What stands before a path of the node; `/` where there is no container around us.
    pub root: PathBuf,
    /// The node's `/proc`.
    pub proc: PathBuf,
    netns: NetNs,
    id: NetNsId,
}

impl Host {
    /// Without a container around us.
    pub fn here() -> io::Result<Self> {
        let netns = NetNs::current()?;
        Ok(Self { root: "/".into(), proc: "/proc".into(), id: netns.id()?, netns })
    }

    /// Its namespace is that of its first process.
    pub fn mounted(root: PathBuf, proc: PathBuf) -> io::Result<Self> {
        let netns = NetNs::open(proc.join("1/ns/net"))?;
        Ok(Self { root, proc, id: netns.id()?, netns })
    }

    pub fn netns(&self) -> &NetNs {
        &self.netns
    }

    pub fn netns_id(&self) -> NetNsId {
        self.id
    }

    /// Where a path of the node is found from here. `/run` is another name of `/var/run`, which is the one that is mounted.
    pub fn path(&self, path: &Path) -> PathBuf {
        if self.root == Path::new("/") {
            return path.to_owned();
        }
        if let Ok(process) = path.strip_prefix("/proc") {
            return self.proc.join(process);
        }
        let path = path.strip_prefix("/run").map_or_else(|_| path.to_owned(), |rest| Path::new("/var/run").join(rest));
        self.root.join(path.strip_prefix("/").unwrap_or(&path))
    }

    /// Opens a pod's namespace by its path on the node; never the node's own.
    pub fn open_netns(&self, path: &Path) -> Result<NetNs, SandboxError> {
        let failed = |error| SandboxError::Netns(path.to_owned(), error);
        let ns = NetNs::open(self.path(path)).map_err(failed)?;
        if ns.id().map_err(failed)? == self.id { Err(SandboxError::Host(path.to_owned())) } else { Ok(ns) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_the_node_are_found_below_its_root() {
        let here = Host::here().expect("host");
        assert_eq!(here.path(Path::new("/run/netns/a")), Path::new("/run/netns/a"));
        let mut mounted = here;
        (mounted.root, mounted.proc) = ("/host".into(), "/host/proc".into());
        for (node, seen) in [
            ("/var/run/netns/a", "/host/var/run/netns/a"),
            ("/run/netns/a", "/host/var/run/netns/a"),
            ("/proc/7/ns/net", "/host/proc/7/ns/net"),
            ("/running", "/host/running"),
        ] {
            assert_eq!(mounted.path(Path::new(node)), Path::new(seen));
        }
    }
}
