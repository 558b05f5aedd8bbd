//! What must be there before the agent starts, told all at once, each with its remedy.

use std::{fmt, fs, io, path::Path};

use mesh_net::nft::{Family, Nft};

use super::{
    config::Kubernetes,
    host::{Host, NETNS_FOLDERS},
};

/// Everything that is missing.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub struct Missing(pub Vec<String>);

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "this node, or what the agent may do on it, is not as it must be:")?;
        self.0.iter().try_for_each(|what| write!(f, "\n  {what}"))
    }
}

/// Bits of linux/capability.h, and what each is for.
const CAPABILITIES: [(u32, &str, &str); 3] = [
    (12, "NET_ADMIN", "to write rules"),
    (19, "SYS_PTRACE", "to find the namespaces of pods"),
    (21, "SYS_ADMIN", "to enter the namespaces of pods"),
];

/// The node, if everything needed is there.
pub fn check(kubernetes: &Kubernetes) -> Result<Host, Missing> {
    let mut missing = match fs::read_to_string("/proc/self/status") {
        Ok(status) => lacking(effective(&status).unwrap_or(0)),
        Err(error) => vec![format!("/proc/self/status: {error}")],
    };
    let proc = &kubernetes.host_proc;
    let host = Host::mounted(kubernetes.host_root.clone(), proc.clone());
    match &host {
        Err(error) => missing.push(format!(
            "{}/1/ns/net: {error}: mount the node's /proc there (HOST_PROC) and grant SYS_PTRACE",
            proc.display()
        )),
        Ok(host) => {
            if let Err(error) = Nft::in_ns(host.netns())
                .map_err(|e| e.to_string())
                .and_then(|mut nft| nft.tables(Family::Inet).map(drop).map_err(|e| e.to_string()))
            {
                missing.push(format!("nf_tables: {error}: load the kernel module nf_tables, and grant NET_ADMIN"));
            }
            let folders = NETNS_FOLDERS.map(|folder| host.path(folder.as_ref()));
            if !folders.iter().any(|folder| folder.is_dir()) {
                missing.push(format!(
                    "{}: not there: mount the node's namespaces there, with propagation HostToContainer",
                    folders[0].display()
                ));
            }
        }
    }
    if let Some(install) = &kubernetes.install {
        missing.extend(writable(&install.bin_dir, "mount the node's CNI binaries there (MOUNTED_CNI_BIN_DIR)"));
        missing.extend(writable(&install.net_dir, "mount the node's CNI configuration there (MOUNTED_CNI_NET_DIR)"));
        if !install.binary.is_file() {
            missing.push(format!("{}: the image lacks the plugin (FAIRWAY_CNI_BINARY)", install.binary.display()));
        }
    }
    match host {
        Ok(host) if missing.is_empty() => Ok(host),
        _ => Err(Missing(missing)),
    }
}

fn effective(status: &str) -> Option<u64> {
    let bits = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(bits.trim(), 16).ok()
}

fn lacking(effective: u64) -> Vec<String> {
    let lacks = CAPABILITIES.iter().filter(|(bit, ..)| effective & (1 << bit) == 0);
    lacks.map(|(_, name, purpose)| format!("capability {name} is missing: grant it, {purpose}")).collect()
}

/// By writing: a read-only mount shows in no mode.
fn writable(path: &Path, remedy: &str) -> Option<String> {
    let probe = path.join(format!(".fairway-node.{}", std::process::id()));
    let written = fs::write(&probe, "").and_then(|()| fs::remove_file(&probe));
    written.err().map(|error: io::Error| format!("{}: {error}: {remedy}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_read_bit_by_bit() {
        assert_eq!(lacking(effective("CapPrm:\t0\nCapEff:\t000001ffffffffff\n").expect("bits")), Vec::<String>::new());
        let few = lacking(effective("CapEff:\t0000000000001000\n").expect("bits")).join("; ");
        assert!(!few.contains("NET_ADMIN") && few.contains("SYS_PTRACE") && few.contains("SYS_ADMIN"), "{few}");
        assert_eq!(effective("CapEff:\tzz"), None);
    }

    #[test]
    fn folders_are_tried_and_left_as_they_were() {
        let dir = tempfile::tempdir().expect("temporary directory");
        assert_eq!(writable(dir.path(), "mount it"), None);
        assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 0);
        let absent = writable(&dir.path().join("no"), "mount it").expect("absent");
        assert!(absent.ends_with("mount it") && absent.contains("/no: "), "{absent}");
    }
}
