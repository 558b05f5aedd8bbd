use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use crate::{
    cluster::{Cluster, INSIDE, SYSTEM, all_pods, counted, text, told},
    kubectl,
    report::{Evidence, took},
};

const PATIENCE: Duration = Duration::from_secs(90);

/// Runs one pod of an account on a node, with the server's program in it.
fn run_pod(cluster: &Cluster, name: &str, account: &str, node: Option<&str>) -> anyhow::Result<()> {
    let node = node.map(|node| format!(r#","nodeName":"{node}""#)).unwrap_or_default();
    let overrides = format!(
        r#"--overrides={{"spec":{{"terminationGracePeriodSeconds":0,"serviceAccountName":"{account}"{node}}}}}"#
    );
    let image = format!("--image={}", cluster.image);
    let args = ["-n", INSIDE, "run", name, &image, "--restart=Never", &overrides, "--labels=app=made"];
    kubectl::run(&[&args[..], &["--command", "--", "fairway", "app", "http"]].concat()).map(drop)
}

fn remove_made() -> anyhow::Result<()> {
    kubectl::run(&["-n", INSIDE, "delete", "pod", "-l", "app=made", "--wait=true"]).map(drop)
}

fn ready(pod: &str) -> anyhow::Result<()> {
    kubectl::run(&["-n", INSIDE, "wait", "--for=condition=Ready", &format!("pod/{pod}"), "--timeout=55s"]).map(drop)
}

pub(super) fn control_plane_outage(cluster: &Cluster) -> Evidence {
    let client = cluster.pod(INSIDE, "client")?;
    let name = &cluster.mesh.control_plane;
    let deployment = format!("deployment/{name}");
    let replicas = kubectl::get(&["-n", SYSTEM, &deployment])?["spec"]["replicas"].to_string();
    let scale = |to: &str| kubectl::run(&["-n", SYSTEM, "scale", &deployment, &format!("--replicas={to}")]);
    let load = cluster.start_load(&client.name, "server", 100, true)?;
    scale("0")?;
    let result = (|| {
        kubectl::eventually("the control plane to be gone", PATIENCE, || {
            let left = kubectl::list(&["-n", SYSTEM, "pods", "-l", &format!("app={name}")])?;
            ensure!(left.is_empty(), "{} pods left", left.len());
            Ok(())
        })?;
        let gone = Instant::now();
        // An identity that is certified on this node already.
        run_pod(cluster, "made-known", "client", Some(&client.node))?;
        ready("made-known")?;
        let called = kubectl::eventually("a new pod of a known identity to call out", Duration::from_secs(20), || {
            cluster.get(INSIDE, "made-known", "http://server/")
        })?;
        // A ztunnel that starts now knows what its predecessor knew.
        kubectl::run(&["-n", SYSTEM, "rollout", "restart", "daemonset/ztunnel"])?;
        kubectl::rolled_out(SYSTEM, "daemonset/ztunnel")?;
        cluster.get(INSIDE, &client.name, "http://server/")?;
        // The outage itself: more than a minute of it is what the step promises.
        std::thread::sleep(Duration::from_secs(75).saturating_sub(gone.elapsed()));
        Ok::<_, anyhow::Error>((called, gone))
    })();
    scale(&replicas)?;
    kubectl::rolled_out(SYSTEM, &deployment)?;
    let (called, gone) = result?;
    let away = gone.elapsed();
    let counted = counted(load)?;
    kubectl::eventually("the new pod to be reached", PATIENCE, || {
        let made = cluster.pod(INSIDE, "made")?;
        cluster.get(INSIDE, &client.name, &format!("http://{}:8080/", made.address))
    })?;
    remove_made()?;
    let lines = vec![
        format!("away for {}; meanwhile: {}", took(away), told(&counted)),
        format!("a pod created meanwhile, of an identity known on its node, calls out: {}", called.trim()),
        "every ztunnel was replaced meanwhile, and served".to_owned(),
        "the pod is reached after the control plane's return".to_owned(),
    ];
    ensure!(counted.errors == 0, "{}", lines.join("\n"));
    Ok(lines)
}

pub(super) fn agent_killed(cluster: &Cluster) -> Evidence {
    let node = cluster.pod(INSIDE, "client")?.node;
    let agent = agent_on(cluster, &node)?;
    for n in 0..6 {
        run_pod(cluster, &format!("made-{n}"), "client", Some(&node))?;
        if n == 2 {
            kubectl::run(&["-n", SYSTEM, "delete", "pod", &agent, "--grace-period=0", "--force"])?;
        }
    }
    let mut uncaptured = 0;
    kubectl::eventually("every pod to run captured", PATIENCE, || {
        let made = cluster.pods(INSIDE, "made")?;
        // A pod that runs has passed its ADD; it must then have its rules, whatever has been written about it.
        let running: Vec<_> = made.iter().filter(|pod| pod.phase == "Running").collect();
        for pod in &running {
            if !has_rules(cluster, pod)? {
                uncaptured += 1;
            }
        }
        let done = running.len() == made.len() && made.iter().all(|p| p.redirection.as_deref() == Some("enabled"));
        ensure!(done, "{} of {} run", running.len(), made.len());
        Ok(())
    })?;
    ensure!(uncaptured == 0, "{uncaptured} times a pod ran without rules");
    kubectl::rolled_out(SYSTEM, &format!("daemonset/{}", cluster.mesh.agent))?;
    remove_made()?;
    Ok(vec![
        "the agent was killed among 6 starting pods; all run captured, none was ever seen running without rules"
            .to_owned(),
    ])
}

fn agent_on(cluster: &Cluster, node: &str) -> anyhow::Result<String> {
    let selector = format!("--field-selector=spec.nodeName={node}");
    let label = format!("k8s-app={}", cluster.mesh.agent);
    let agents = kubectl::list(&["-n", SYSTEM, "pods", "-l", &label, &selector])?;
    let agent = agents.first().context("no node agent there")?;
    Ok(text(&agent["metadata"]["name"]))
}

/// Whether the pod's network namespace has the capture's tables, or chains in those of iptables.
pub(super) fn has_rules(cluster: &Cluster, pod: &crate::cluster::Pod) -> anyhow::Result<bool> {
    let container = pod.containers.first().map(|c| c.0.rsplit('/').next().unwrap_or_default().to_owned());
    let id = container.filter(|id| !id.is_empty()).context("no container yet")?;
    let script = format!(
        "for p in /proc/[0-9]*; do if grep -q {id} $p/cgroup 2>/dev/null; then nsenter -t ${{p#/proc/}} -n nft list chains; break; fi; done"
    );
    let chains = cluster.on_node(&pod.node, &["sh", "-c", &script])?;
    Ok(chains.contains("istio-ambient") || chains.contains("ISTIO_"))
}

pub(super) fn conflist_overwritten(cluster: &Cluster) -> Evidence {
    let node = cluster.pod(INSIDE, "client")?.node;
    let folder = "/etc/cni/net.d";
    let plugin = &cluster.mesh.plugin;
    let list = format!("cd {folder} && grep -l {plugin} *.conflist | head -n1");
    let file = cluster.on_node(&node, &["sh", "-c", &list])?.trim().to_owned();
    ensure!(!file.is_empty(), "no conflist names {plugin}");
    let text = cluster.on_node(&node, &["cat", &format!("{folder}/{file}")])?;
    let mut conflist: serde_json::Value = serde_json::from_str(&text)?;
    let plugins = conflist["plugins"].as_array_mut().context("no plugins")?;
    plugins.retain(|entry| entry["type"] != *plugin);
    let without = conflist.to_string();
    let write = format!("cat > {folder}/.new <<'END'\n{without}\nEND\nmv {folder}/.new {folder}/{file}");
    cluster.on_node(&node, &["sh", "-c", &write])?;
    let started = Instant::now();
    run_pod(cluster, "made-slipped", "client", Some(&node))?;
    kubectl::eventually("the entry to be back", Duration::from_secs(30), || {
        let text = cluster.on_node(&node, &["cat", &format!("{folder}/{file}")])?;
        ensure!(text.contains(plugin.as_str()), "the entry is missing");
        Ok(())
    })?;
    let healed = started.elapsed();
    ready("made-slipped")?;
    cluster.all_enrolled(PATIENCE)?;
    remove_made()?;
    Ok(vec![
        format!("{file} on {node} lost the entry {plugin} and had it back within {}", took(healed)),
        "a pod started in that moment is captured".to_owned(),
    ])
}

/// What a reboot does to pods, as far as it can be done from inside: every sandbox ends, the CNI configuration is as before the mesh,
/// and the kubelet starts everything anew.
pub(super) fn node_reboot(cluster: &Cluster) -> Evidence {
    let node = cluster.pod(INSIDE, "client")?.node;
    let before = all_pods(INSIDE)?;
    let running = |pod: &crate::cluster::Pod| pod.node == node && !pod.host_network && pod.phase == "Running";
    let there = before.iter().filter(|(_, pod)| running(pod)).count();
    let sandboxes = "ctr -n k8s.io containers ls | grep /pause | cut -d' ' -f1";
    let script = format!("for id in $({sandboxes}); do ctr -n k8s.io tasks kill -s KILL $id 2>/dev/null; done; true");
    // The inspector's own sandbox goes too, and with it the answer.
    drop(cluster.on_node(&node, &["sh", "-c", &format!("(sleep 1; {script}) </dev/null >/dev/null 2>&1 &")]));
    let started = Instant::now();
    // Until the sandboxes are dead, which nobody is left to tell.
    std::thread::sleep(Duration::from_secs(3));
    kubectl::eventually("every pod of the node to be back", Duration::from_secs(150), || {
        let pods = all_pods(INSIDE)?;
        let again: Vec<_> = pods.iter().filter(|(_, pod)| running(pod)).collect();
        let late = again.iter().find(|(_, pod)| !pod.ready);
        ensure!(late.is_none(), "{late:?}");
        let restarted = again.iter().filter(|(_, p)| !before.iter().any(|(_, b)| b.containers == p.containers)).count();
        ensure!(restarted >= there, "{restarted} of {there} restarted");
        Ok(())
    })?;
    let back = started.elapsed();
    cluster.all_enrolled(PATIENCE)?;
    for (_, pod) in all_pods(INSIDE)?.iter().filter(|(_, p)| p.node == node && !p.host_network && p.phase == "Running")
    {
        ensure!(has_rules(cluster, pod)?, "{} has no rules", pod.name);
    }
    let client = cluster.pods(INSIDE, "client")?.into_iter().find(|pod| pod.node == node).context("no client")?;
    kubectl::eventually("traffic", PATIENCE, || cluster.get(INSIDE, &client.name, "http://server/"))?;
    Ok(vec![format!("{there} sandboxes of {node} were killed; all pods were back, captured, after {}", took(back))])
}

/// Long enough for certificates of [`super::install::CERTIFICATES`] to be renewed, and for those before them to expire.
const RENEWED: Duration = Duration::from_secs(75);

pub(super) fn root_rotation(cluster: &Cluster) -> Evidence {
    let clients = cluster.pods(INSIDE, "client")?;
    let root = || {
        let map = kubectl::get(&["-n", INSIDE, "configmap", "istio-ca-root-cert"])?;
        Ok::<_, anyhow::Error>(text(&map["data"]["root-cert.pem"]))
    };
    let before = root()?;
    let seconds = u32::try_from(4 * RENEWED.as_secs())?;
    let load = cluster.start_load(&clients[0].name, "server", seconds, true)?;
    let mut lines = Vec::new();
    for step in ["prepare", "switch", "finish"] {
        let previous = root()?;
        let said =
            kubectl::exec(SYSTEM, "deployment/fairwayd", &["/usr/local/bin/fairwayd", "ca", "rotate", "--step", step])?;
        lines.push(format!("{step}: {}", said.trim()));
        if step != "switch" {
            kubectl::eventually("the roots to be published", PATIENCE, || {
                ensure!(root()? != previous, "as before");
                Ok(())
            })?;
        }
        // Every certificate in use is renewed under each state, and the load with it.
        std::thread::sleep(RENEWED);
    }
    let counted = counted(load)?;
    ensure!(root()? != before, "the root is the old one");
    ensure!(counted.errors == 0, "{}", told(&counted));
    lines.push(told(&counted));
    Ok(lines)
}

pub(super) fn leader_killed(cluster: &Cluster) -> Evidence {
    let holder = || {
        let lease = kubectl::get(&["-n", SYSTEM, "lease", "fairwayd"])?;
        let holder = text(&lease["spec"]["holderIdentity"]);
        ensure!(!holder.is_empty(), "nobody holds the lease");
        Ok(holder)
    };
    let before = holder()?;
    let load = cluster.start_load(&cluster.pod(INSIDE, "client")?.name, "server", 30, true)?;
    kubectl::run(&["-n", SYSTEM, "delete", "pod", &before, "--grace-period=0", "--force"])?;
    let started = Instant::now();
    let after = kubectl::eventually("another holder", PATIENCE, || {
        let now = holder()?;
        ensure!(now != before, "{now} still holds it");
        Ok(now)
    })?;
    let taken = started.elapsed();
    kubectl::run(&["-n", INSIDE, "delete", "configmap", "istio-ca-root-cert"])?;
    kubectl::eventually("the new leader to write", PATIENCE, || {
        kubectl::get(&["-n", INSIDE, "configmap", "istio-ca-root-cert"]).map(drop)
    })?;
    kubectl::rolled_out(SYSTEM, "deployment/fairwayd")?;
    let counted = counted(load)?;
    ensure!(counted.errors == 0, "meanwhile: {}", told(&counted));
    Ok(vec![
        format!("{before} was killed; {after} led {} later and restored a deleted ConfigMap", took(taken)),
        format!("meanwhile: {}", told(&counted)),
    ])
}
