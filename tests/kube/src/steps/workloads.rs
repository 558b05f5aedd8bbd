use std::{collections::BTreeSet, time::Duration};

use anyhow::{Context as _, ensure};

use crate::{
    cluster::{Cluster, INSIDE, all_pods},
    kubectl,
    report::Evidence,
};

const PATIENCE: Duration = Duration::from_secs(60);
const KINDS: &str = include_str!("../../manifests/kinds.yaml");

pub(super) fn names(cluster: &Cluster) -> Evidence {
    let client = cluster.pod(INSIDE, "client")?.name;
    let mut lines = Vec::new();
    for host in ["server", "server.fairway-e2e", "server.fairway-e2e.svc.cluster.local"] {
        cluster.get(INSIDE, &client, &format!("http://{host}/"))?;
    }
    lines.push("short, namespaced and full names of a service answer".to_owned());
    let named = |ordinal: u8| format!("http://db-{ordinal}.db:8080/");
    for ordinal in [0, 1] {
        let answer = cluster.get(INSIDE, &client, &named(ordinal))?;
        ensure!(answer.contains(&format!("db-{ordinal} saw")), "db-{ordinal}.db leads to: {answer}");
    }
    lines.push("db-0.db and db-1.db lead each to its own pod".to_owned());
    let before = cluster.pods(INSIDE, "db")?.into_iter().find(|pod| pod.name == "db-0").context("no db-0")?;
    kubectl::run(&["-n", INSIDE, "delete", "pod", "db-0"])?;
    kubectl::rolled_out(INSIDE, "statefulset/db")?;
    cluster.all_enrolled(PATIENCE)?;
    let answer = kubectl::eventually("db-0's name to lead to its new pod", PATIENCE, || {
        cluster.get(INSIDE, &client, &named(0))
    })?;
    let after = cluster.pods(INSIDE, "db")?.into_iter().find(|pod| pod.name == "db-0").context("no db-0")?;
    ensure!(before.uid != after.uid && answer.contains("db-0 saw"), "{before:?} {after:?} {answer}");
    lines.push(format!("db-0 moved from {} to {}, and its name with it", before.address, after.address));
    Ok(lines)
}

/// Pods that live shorter, start earlier or elsewhere than a server does.
pub(super) fn kinds(cluster: &Cluster) -> Evidence {
    kubectl::apply(KINDS, &cluster.image)?;
    for job in ["job/once", "job/early"] {
        kubectl::run(&["-n", INSIDE, "wait", "--for=condition=Complete", job, "--timeout=50s"])?;
    }
    kubectl::run(&["-n", INSIDE, "wait", "--for=condition=Ready", "pod/hooked", "--timeout=50s"])?;
    let hooked = cluster.pod(INSIDE, "hooked")?;
    // A hook that fails has its container ended and started again.
    let failed: u64 = hooked.containers.iter().map(|container| container.2).sum();
    let host = cluster.pod(INSIDE, "host")?;
    ensure!(host.redirection.is_none(), "a pod on the host's network is annotated");
    cluster.get(INSIDE, &host.name, "http://server/")?;
    // Completed pods leave ztunnel and the probes' set, whatever still names them.
    let jobs: Vec<_> = all_pods(INSIDE)?.into_iter().filter(|(_, pod)| pod.phase == "Succeeded").collect();
    ensure!(jobs.len() >= 2, "no completed pods are left to look at");
    kubectl::eventually("completed pods to be let go", PATIENCE, || {
        let held: Vec<String> = all_pods(INSIDE)?
            .into_iter()
            .filter(|(_, pod)| pod.phase == "Succeeded" && pod.redirection.is_some())
            .map(|(_, pod)| pod.name)
            .collect();
        ensure!(held.is_empty(), "still annotated: {}", held.join(", "));
        Ok(())
    })?;
    kubectl::run(&["-n", INSIDE, "delete", "--wait=true", "pod/hooked", "job/once", "job/early"])?;
    ensure!(failed == 0, "the postStart hook failed {failed} times before it reached a service");
    Ok(vec![
        "a Job that calls a service completes, and its pod is let go".to_owned(),
        "an init container and a postStart hook reach a service".to_owned(),
        format!("{} on the host's network is not captured and reaches a service", host.name),
    ])
}

pub(super) fn restarts(cluster: &Cluster) -> Evidence {
    let client = cluster.pod(INSIDE, "client")?.name;
    let server = cluster.pod(INSIDE, "server")?;
    let url = format!("http://{}:8080/", server.address);
    let container = &server.containers.first().context("a server without containers")?.0;
    let id = container.rsplit('/').next().unwrap_or_default();
    // Ends the container's process as a crash would; the sandbox stays.
    let script =
        format!("for p in /proc/[0-9]*; do grep -q {id} $p/cgroup 2>/dev/null && kill -9 ${{p#/proc/}}; done; true");
    cluster.on_node(&server.node, &["sh", "-c", &script])?;
    let again = kubectl::eventually("the container to be restarted", PATIENCE, || {
        let now = cluster.pods(INSIDE, "server")?.into_iter().find(|pod| pod.uid == server.uid).context("gone")?;
        ensure!(now.ready && now.containers[0].2 > server.containers[0].2, "{now:?}");
        Ok(now)
    })?;
    ensure!(again.redirection.as_deref() == Some("enabled"), "no longer captured: {again:?}");
    cluster.get(INSIDE, &client, &url)?;

    let mut addresses = BTreeSet::new();
    let mut reused = 0;
    for round in 0..6 {
        let name = format!("brief-{round}");
        let overrides = format!(
            r#"{{"spec":{{"nodeName":"{}","terminationGracePeriodSeconds":0,"serviceAccountName":"visitor"}}}}"#,
            server.node
        );
        let image = format!("--image={}", cluster.image);
        let overrides = format!("--overrides={overrides}");
        let args = ["-n", INSIDE, "run", &name, &image, "--restart=Never", &overrides, "--labels=app=brief"];
        kubectl::run(&[&args[..], &["--command", "--", "fairway", "app", "http"]].concat())?;
        kubectl::run(&["-n", INSIDE, "wait", "--for=condition=Ready", &format!("pod/{name}"), "--timeout=60s"])?;
        let pod = cluster.pods(INSIDE, "brief")?.into_iter().find(|pod| pod.name == name).context("gone")?;
        reused += u32::from(!addresses.insert(pod.address.clone()));
        let answer = kubectl::eventually("a new pod to be reached", Duration::from_secs(10), || {
            cluster.get(INSIDE, &client, &format!("http://{}:8080/", pod.address))
        })?;
        ensure!(answer.contains(&name), "{} was expected, {answer} answered", pod.name);
        kubectl::run(&["-n", INSIDE, "delete", "pod", &name, "--wait=true"])?;
    }
    Ok(vec![
        "the server's container was killed and restarted in its sandbox; it is captured and answers".to_owned(),
        format!("6 short-lived pods, {} addresses, {reused} used again: each was reached as itself", addresses.len()),
    ])
}
