//! Keeps the node's own table: which pods its health probes are marked for.

use std::{collections::BTreeSet, fs, net::IpAddr, path::Path, sync::Arc, time::Duration};

use mesh_runtime::{drain::DrainWatcher, telemetry::error_chain};
use tokio::{sync::watch, task::spawn_blocking, time::timeout};

use super::host::Host;
use crate::rules::{Options, RulesError, host};

/// The addresses of the pods that belong to the mesh. As a whole and never by events: an address is used again sooner than one hears
/// that its former owner is gone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    pub addresses: BTreeSet<IpAddr>,
    /// Whether the addresses of all these pods are known. Otherwise what is there may be theirs.
    pub complete: bool,
}

/// What the table has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Marked {
    pub addresses: BTreeSet<IpAddr>,
    /// Why it could not be brought up to date.
    pub error: Option<String>,
}

impl Marked {
    /// Whether probes to these addresses are marked; or no waiting will help.
    pub fn is_settled(&self, addresses: &[IpAddr]) -> bool {
        self.error.is_some() || addresses.iter().all(|ip| self.addresses.contains(ip))
    }
}

/// The driver's end.
#[derive(Debug)]
pub struct Probes {
    pub wanted: watch::Sender<Wanted>,
    pub marked: watch::Receiver<Arc<Marked>>,
}

/// How often the table is looked at although nothing has changed.
const RECHECK: Duration = Duration::from_secs(60);
const RETRY: Duration = Duration::from_secs(5);

/// What the table should have: what is wanted, and as long as that may not be all, what is there and has not been seen to go.
fn target(there: &BTreeSet<IpAddr>, before: &BTreeSet<IpAddr>, wanted: &Wanted) -> BTreeSet<IpAddr> {
    let unknown = there.iter().filter(|ip| !wanted.complete && !before.contains(*ip));
    unknown.chain(&wanted.addresses).copied().collect()
}

/// Works until the drain starts. The table stays: a successor finds it.
pub async fn run(
    host: Host,
    options: Options,
    mut wanted: watch::Receiver<Wanted>,
    marked: watch::Sender<Arc<Marked>>,
    drain: DrainWatcher,
) {
    let mut before = BTreeSet::new();
    loop {
        let now = wanted.borrow_and_update().clone();
        let (host, options, known, target) = (host.clone(), options.clone(), before.clone(), now.clone());
        let done = spawn_blocking(move || reconcile(&host, &options, &known, &target)).await;
        let error = match done {
            Ok(Ok(changed)) => {
                if changed {
                    tracing::debug!(pods = now.addresses.len(), "marked the node's probes");
                }
                before = now.addresses;
                None
            }
            Ok(Err(error)) => Some(error_chain(&error)),
            Err(error) => Some(error.to_string()),
        };
        if let Some(error) = &error {
            tracing::warn!(error, "the node's probes cannot be told apart in pods; will be repeated");
        }
        let pause = if error.is_some() { RETRY } else { RECHECK };
        marked.send_replace(Arc::new(Marked { addresses: before.clone(), error }));
        tokio::select! {
            _ = drain.signalled() => return,
            changed = timeout(pause, wanted.changed()) => if matches!(changed, Ok(Err(_))) { return },
        }
    }
}

/// Whether anything had to be changed.
fn reconcile(host: &Host, options: &Options, before: &BTreeSet<IpAddr>, wanted: &Wanted) -> Result<bool, RulesError> {
    let user = kubelet_user(&host.proc);
    let found = host::read(host.netns(), options, user)?;
    let there = match &found {
        Some(found) => found.clone(),
        None => host::members(host.netns(), options)?,
    };
    let mut target = target(&there, before, wanted);
    target.retain(|ip| options.ipv6 || ip.is_ipv4());
    if found.as_ref() == Some(&target) {
        return Ok(false);
    }
    host::write(host.netns(), options, user, &target).map(|()| true)
}

/// Programs that are, or contain, the kubelet.
const KUBELETS: [&str; 4] = ["kubelet", "kubelite", "k3s-server", "k3s-agent"];

/// The user whose sockets probes come from; root where no kubelet is found.
fn kubelet_user(proc: &Path) -> u32 {
    let processes = fs::read_dir(proc).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_kubelet = |process: &Path| {
        fs::read_to_string(process.join("comm")).is_ok_and(|comm| KUBELETS.iter().any(|k| comm.trim() == *k))
    };
    let mut users = processes
        .filter(|process| is_kubelet(process))
        .filter_map(|process| effective_user(&fs::read_to_string(process.join("status")).ok()?));
    users.next().unwrap_or(0)
}

fn effective_user(status: &str) -> Option<u32> {
    status.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ips(ips: &[&str]) -> BTreeSet<IpAddr> {
        ips.iter().map(|ip| ip.parse().expect("ip")).collect()
    }

    #[test]
    fn an_incomplete_view_removes_only_what_was_seen_to_go() {
        let there = ips(&["10.0.0.1", "10.0.0.2", "10.0.0.3"]);
        let before = ips(&["10.0.0.1", "10.0.0.2"]);
        let wanted = |complete| Wanted { addresses: ips(&["10.0.0.2", "10.0.0.4"]), complete };
        assert_eq!(target(&there, &before, &wanted(true)), ips(&["10.0.0.2", "10.0.0.4"]));
        assert_eq!(
            target(&there, &before, &wanted(false)),
            ips(&["10.0.0.2", "10.0.0.3", "10.0.0.4"]),
            ".1 was seen to go, nobody knows whose .3 is"
        );
    }

    #[test]
    fn a_pod_is_settled_when_its_addresses_are_marked_or_nothing_helps() {
        let marked = Marked { addresses: ips(&["10.0.0.1"]), error: None };
        let [known, other] = ["10.0.0.1", "10.0.0.2"].map(|ip| [ip.parse().expect("ip")]);
        assert!(marked.is_settled(&known) && !marked.is_settled(&other));
        assert!(Marked { error: Some("no".into()), ..marked }.is_settled(&other));
    }

    #[test]
    fn the_kubelet_is_found_by_its_name_and_root_is_assumed() {
        let dir = tempfile::tempdir().expect("temporary directory");
        assert_eq!(kubelet_user(dir.path()), 0);
        for (pid, comm, uid) in [("7", "sshd\n", 5), ("9", "kubelet\n", 1001)] {
            fs::create_dir(dir.path().join(pid)).expect("mkdir");
            fs::write(dir.path().join(pid).join("comm"), comm).expect("write");
            let status = format!("Name:\t{comm}Uid:\t0\t{uid}\t0\t0\n");
            fs::write(dir.path().join(pid).join("status"), status).expect("write");
        }
        assert_eq!(kubelet_user(dir.path()), 1001);
        assert_eq!(effective_user("Uid:\tx"), None);
    }
}
