//! A cluster's life with the mesh, in order.

mod enrol;
mod faults;
mod install;
mod leave;
mod policy;
mod rollouts;
mod workloads;

use crate::{
    cluster::Cluster,
    report::{Evidence, Report},
};

type Run = fn(&Cluster) -> Evidence;

/// Name, what is promised, and how it is shown.
const STEPS: [(&str, &str, Run); 21] = [
    ("workloads", "Workloads of every kind run, without a mesh or beside one", install::workloads),
    ("install", "The mesh is installed under running workloads, which notice nothing", install::run),
    ("label", "A namespace is labelled: same pods, same containers, every byte between nodes is TLS", enrol::run),
    ("policy", "Policies by identity hold, and say so in their status", policy::identities),
    ("plaintext", "Who would be refused under STRICT is told before it is set", policy::before_strict),
    ("strict", "STRICT: strangers are refused, kubelet's probes go on", policy::strict),
    ("names", "DNS, headless services and a StatefulSet work captured", workloads::names),
    (
        "pods",
        "Jobs complete; init containers and postStart hooks reach the network; hostNetwork is left alone",
        workloads::kinds,
    ),
    (
        "restart",
        "A pod whose containers restart in place stays captured; recycled addresses confuse nobody",
        workloads::restarts,
    ),
    ("rollout", "An application is rolled out under load", rollouts::application),
    ("upgrade", "The ztunnel DaemonSet is rolled under load", rollouts::ztunnel),
    ("outage", "The control plane is away for minutes while pods are created", faults::control_plane_outage),
    ("agent", "The node agent is killed in the middle of pods starting: none runs uncaptured", faults::agent_killed),
    (
        "conflist",
        "Somebody overwrites the CNI configuration: it heals, and no pod slips through",
        faults::conflist_overwritten,
    ),
    ("reboot", "All namespaces of a node go and come back", faults::node_reboot),
    ("settings", "A setting is changed under load: certificates last a minute from now on", install::settings),
    ("roots", "The CA's root is rotated under load", faults::root_rotation),
    ("leader", "The leading replica is killed: another writes", faults::leader_killed),
    ("unlabel", "The label is removed: pods go on, unencrypted, nothing restarted", leave::unlabel),
    ("uninstall", "The mesh is removed: nothing is left on nodes or API server", leave::uninstall),
    ("remove", "The workloads are removed", leave::remove),
];

/// Steps about what `fairway` alone promises, or that exchange what is there.
const OURS_ALONE: [&str; 5] = ["install", "settings", "roots", "leader", "uninstall"];

pub(crate) fn run(cluster: &Cluster, report: &mut Report, only: &[String], keep: bool) {
    let known: Vec<&str> = STEPS.iter().map(|(name, ..)| *name).collect();
    if let Some(unknown) = only.iter().find(|name| !known.contains(&name.as_str())) {
        report.step("steps", "The steps asked for are known", || {
            anyhow::bail!("there is no step `{unknown}`; there are {}", known.join(", "))
        });
        return;
    }
    for (name, title, step) in STEPS {
        let chosen = only.iter().any(|chosen| chosen == name);
        if OURS_ALONE.contains(&name) && cluster.mesh.installed {
            if chosen {
                report.step(name, title, || anyhow::bail!("not with --installed"));
            }
            continue;
        }
        let wanted = only.is_empty() || chosen;
        let leaves = ["unlabel", "uninstall", "remove"].contains(&name);
        if wanted && !(leaves && keep && only.is_empty()) {
            report.step(name, title, || step(cluster));
        }
    }
}
