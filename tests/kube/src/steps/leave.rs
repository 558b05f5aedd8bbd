use std::time::Duration;

use anyhow::ensure;

use crate::{
    cluster::{Cluster, INSIDE, MODE, OUTSIDE, SYSTEM, all_pods},
    kubectl,
    report::Evidence,
};

const PATIENCE: Duration = Duration::from_secs(120);

pub(super) fn unlabel(cluster: &Cluster) -> Evidence {
    let before = all_pods(INSIDE)?;
    kubectl::run(&["label", "namespace", INSIDE, &format!("{MODE}-")])?;
    kubectl::eventually("every pod to have left", PATIENCE, || {
        let inside: Vec<String> =
            all_pods(INSIDE)?.into_iter().filter(|(_, p)| p.redirection.is_some()).map(|(_, p)| p.name).collect();
        ensure!(inside.is_empty(), "annotated: {}", inside.join(", "));
        Ok(())
    })?;
    let client = cluster.pod(INSIDE, "client")?;
    cluster.get(INSIDE, &client.name, "http://server/")?;
    kubectl::eventually("the rules to be gone", PATIENCE, || {
        ensure!(!super::faults::has_rules(cluster, &client)?, "{} still has tables", client.name);
        Ok(())
    })?;
    let containers = |pods: &[(_, crate::cluster::Pod)]| -> Vec<_> {
        pods.iter().map(|(_, p)| (p.uid.clone(), p.containers.clone())).collect()
    };
    ensure!(containers(&all_pods(INSIDE)?) == containers(&before), "pods or containers changed");
    Ok(vec![format!("{} pods left with the same containers; annotations and tables are gone", before.len())])
}

/// What must not be found on a node afterwards.
const TRACES: &str = r#"
for f in /opt/cni/bin/fairway-cni /var/run/istio-cni /var/run/ztunnel; do
  if [ -e $f ] && [ -n "$(find $f -mindepth 1 2>/dev/null; [ -f $f ] && echo $f)" ]; then echo "file $f: $(ls -A $f | tr '\n' ' ')"; fi
done
grep -l fairway /etc/cni/net.d/* 2>/dev/null | sed 's/^/conflist /'
nft list tables | grep -E 'istio|fairway' | sed 's/^/host /'
for n in /var/run/netns/*; do nsenter --net=$n nft list tables | grep -E 'istio|fairway' | sed "s|^|$n |"; done
for n in /var/run/netns/*; do nsenter --net=$n ip rule | grep 'fwmark 0x111' | sed "s|^|$n |"; done
true
"#;

pub(super) fn uninstall(cluster: &Cluster) -> Evidence {
    // With pods still in the mesh, as careless people do it.
    kubectl::run(&["label", "namespace", INSIDE, &format!("{MODE}=ambient"), "--overwrite"])?;
    cluster.all_enrolled(PATIENCE)?;
    let said = cluster.fairway(&["uninstall", "--yes"])?;
    let client = cluster.pod(INSIDE, "client")?.name;
    kubectl::eventually("pods to talk without the mesh", PATIENCE, || cluster.get(INSIDE, &client, "http://server/"))?;
    let mut left = Vec::new();
    for node in cluster.nodes()? {
        let traces = cluster.on_node(&node, &["sh", "-c", TRACES])?;
        left.extend(traces.lines().map(|line| format!("{node}: {line}")));
    }
    for kind in ["clusterrole", "clusterrolebinding", "crd", "validatingwebhookconfiguration", "priorityclass"] {
        let names = kubectl::run(&["get", kind, "-o", "name"])?;
        left.extend(names.lines().filter(|n| n.contains("fairway") || n.contains("ztunnel")).map(str::to_owned));
    }
    let namespaces = kubectl::run(&["get", "namespace", "-o", "name"])?;
    left.extend(namespaces.lines().filter(|n| n.ends_with(SYSTEM)).map(str::to_owned));
    let maps =
        kubectl::run(&["get", "configmap", "-A", "--field-selector=metadata.name=istio-ca-root-cert", "-o", "name"])?;
    left.extend(maps.lines().map(str::to_owned));
    let annotated = all_pods(INSIDE)?.into_iter().filter(|(_, pod)| pod.redirection.is_some());
    left.extend(annotated.map(|(_, pod)| format!("annotation of {}", pod.name)));
    ensure!(left.is_empty(), "left behind:\n{}", left.join("\n"));
    Ok(vec![
        said.lines().last().unwrap_or_default().to_owned(),
        "no file, table, routing rule, conflist entry, role, definition or annotation is left".to_owned(),
    ])
}

pub(super) fn remove(_: &Cluster) -> Evidence {
    kubectl::run(&["delete", "namespace", INSIDE, OUTSIDE, "--wait=true", "--timeout=120s"])?;
    Ok(vec![format!("{INSIDE} and {OUTSIDE} are gone")])
}
