use std::time::Instant;

use anyhow::ensure;

use crate::{
    cluster::{Cluster, INSIDE, OUTSIDE, SYSTEM, all_pods},
    kubectl,
    report::{Evidence, took},
};

const WORKLOADS: &str = include_str!("../../manifests/workloads.yaml");

pub(super) fn workloads(cluster: &Cluster) -> Evidence {
    kubectl::apply(WORKLOADS, &cluster.image)?;
    for (namespace, what) in [
        (INSIDE, "deployment/server"),
        (INSIDE, "deployment/echo"),
        (INSIDE, "deployment/visitor"),
        (INSIDE, "daemonset/client"),
        (INSIDE, "daemonset/host"),
        (INSIDE, "statefulset/db"),
        (OUTSIDE, "deployment/stranger"),
        (OUTSIDE, "daemonset/inspector"),
    ] {
        kubectl::rolled_out(namespace, what)?;
    }
    let pods = all_pods(INSIDE)?;
    let captured = pods.iter().filter(|(_, pod)| pod.redirection.is_some()).count();
    ensure!(captured == 0, "{captured} of {} pods are captured already", pods.len());
    Ok(vec![format!("{} pods on {} nodes", pods.len(), cluster.nodes()?.len())])
}

pub(super) fn run(cluster: &Cluster) -> Evidence {
    let before = all_pods(INSIDE)?;
    let load = cluster.start_load(&cluster.pod(INSIDE, "client")?.name, "server", 20, true)?;
    let started = Instant::now();
    cluster.fairway(&["install", "--hub", &cluster.hub, "--tag", &cluster.tag])?;
    let installed = started.elapsed();
    let counted = crate::cluster::counted(load)?;
    for what in ["deployment/fairwayd", "daemonset/ztunnel", "daemonset/fairway-node"] {
        kubectl::rolled_out(SYSTEM, what)?;
    }
    ensure!(all_pods(INSIDE)? == before, "pods changed");
    ensure!(counted.errors == 0, "meanwhile: {}", crate::cluster::told(&counted));
    Ok(vec![
        format!("`fairway install` returned with everything ready after {}", took(installed)),
        format!("meanwhile: {}", crate::cluster::told(&counted)),
        format!("{} pods with the same containers as before", before.len()),
    ])
}

/// How long certificates are valid from [`settings`] on.
pub(super) const CERTIFICATES: &str = "1m";

pub(super) fn settings(cluster: &Cluster) -> Evidence {
    let before = all_pods(INSIDE)?;
    let load = cluster.start_load(&cluster.pod(INSIDE, "client")?.name, "server", 30, true)?;
    let started = Instant::now();
    let setting = format!("controlPlane.workloadCertTtl={CERTIFICATES}");
    let printed = cluster.fairway(&["upgrade", "--hub", &cluster.hub, "--tag", &cluster.tag, "--set", &setting])?;
    let changed = started.elapsed();
    let counted = crate::cluster::counted(load)?;
    kubectl::rolled_out(SYSTEM, "deployment/fairwayd")?;
    let deployment = kubectl::get(&["-n", SYSTEM, "deployment/fairwayd"])?;
    let arguments = deployment["spec"]["template"]["spec"]["containers"][0]["args"].to_string();
    ensure!(arguments.contains(&format!("--workload-cert-ttl={CERTIFICATES}")), "fairwayd runs with {arguments}");
    ensure!(all_pods(INSIDE)? == before, "pods changed");
    ensure!(counted.errors == 0, "meanwhile: {}", crate::cluster::told(&counted));
    Ok(vec![
        format!("`fairway upgrade --set {setting}` returned after {}", took(changed)),
        printed.lines().last().unwrap_or_default().trim().to_owned(),
        format!("meanwhile: {}", crate::cluster::told(&counted)),
    ])
}
