//! `fairway check`: whether a cluster can run the mesh, before anything is changed; and whether the mesh that runs there is well.
//!
//! `evidence` fetches, everything else judges what was fetched.

mod clock;
mod evidence;
mod labels;
mod membership;
mod network;
mod nodes;
mod older;
mod selector;
mod server;
mod strict;
mod webhooks;

use std::{collections::BTreeMap, process::ExitCode};

use serde::Serialize;
use serde_json::json;

use self::evidence::Evidence;
use crate::{
    args::Check,
    cluster::{self, Cluster},
    output::{self, bad, dim, good, say},
    status::Overview,
};

/// Of the table's columns, also where no terminal says how wide it is.
const FINDING_WIDTH: u16 = 80;
const REMEDY_WIDTH: u16 = 60;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Level {
    Fine,
    /// It could not be found out.
    Unknown,
    /// The mesh runs, but not everything as one might expect.
    Warning,
    /// The mesh, or something that works today, would not run.
    Fault,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Item {
    pub(crate) what: &'static str,
    pub(crate) level: Level,
    pub(crate) finding: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) remedy: String,
}

impl Item {
    fn fine(what: &'static str, finding: impl Into<String>) -> Self {
        Self { what, level: Level::Fine, finding: finding.into(), remedy: String::new() }
    }

    fn new(what: &'static str, level: Level, finding: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { what, level, finding: finding.into(), remedy: remedy.into() }
    }
}

pub(crate) fn run(query: &Check) -> anyhow::Result<ExitCode> {
    cluster::block_on(async {
        let cluster = query.connection.open().await?;
        if let Some(namespace) = &query.strict {
            return strict::run(&cluster, query, namespace).await;
        }
        let mut items = preflight(&cluster, &query.namespace).await?;
        match Overview::of(&cluster, &query.namespace).await {
            Ok(Some(overview)) => items.extend(installed(&overview)),
            Ok(None) => items.push(Item::fine("mesh", format!("nothing runs in namespace {} yet", query.namespace))),
            Err(error) => items.push(Item::new("mesh", Level::Unknown, format!("{error:#}"), "")),
        }
        let fit = items.iter().all(|item| item.level != Level::Fault);
        let document = json!({ "server": cluster.server, "fit": fit, "items": items });
        say!("{}", query.output.render(&document, || text(&cluster.server, &items))?);
        Ok(if fit { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    })
}

/// Everything that can be known before the mesh is installed.
pub(crate) async fn preflight(cluster: &Cluster, namespace: &str) -> anyhow::Result<Vec<Item>> {
    Ok(judge(&Evidence::gather(cluster, namespace).await?))
}

fn judge(evidence: &Evidence) -> Vec<Item> {
    let mut items = vec![server::version(&evidence.version), server::permissions(&evidence.denied)];
    items.extend(nodes::judge(&evidence.nodes));
    items.extend(network::primary(evidence));
    items.extend(network::other_meshes(evidence));
    items.extend(network::policies(evidence));
    items.extend(server::quotas(evidence));
    items.push(server::pod_security(evidence));
    items.push(webhooks::judge(evidence));
    items.extend(webhooks::admission(evidence));
    items.extend(labels::judge(evidence));
    items.extend(clock::judge(evidence));
    // Nothing found where nothing could be seen is not fine.
    let is_blind =
        |item: &Item| item.level == Level::Fine && evidence.unknown.iter().any(|(what, _)| *what == item.what);
    items.retain(|item| !is_blind(item));
    let mut unknown: BTreeMap<&'static str, Vec<String>> = BTreeMap::new();
    for (what, why) in &evidence.unknown {
        unknown.entry(what).or_default().push(why.clone());
    }
    let remedy = "ask for this permission, or choose another user with --context";
    items.extend(unknown.into_iter().map(|(what, why)| Item::new(what, Level::Unknown, some(&why), remedy)));
    items
}

/// What the programs that run say of themselves.
fn installed(overview: &Overview) -> Vec<Item> {
    let mut complaints: Vec<String> = overview.complaints();
    let shown = complaints.len().min(5);
    let more = complaints.len() - shown;
    complaints.truncate(shown);
    if more > 0 {
        complaints.push(format!("and {more} more"));
    }
    let mesh = match complaints.is_empty() {
        true => Item::fine("mesh", format!("{} programs, all ready and in touch", overview.programs.len())),
        false => {
            Item::new("mesh", Level::Fault, complaints.join("; "), "`fairway status` says more; the pods' logs say why")
        }
    };
    let mut versions: Vec<&str> = overview.programs.iter().map(|program| program.version.as_str()).collect();
    versions.sort_unstable();
    versions.dedup();
    let skew = match versions.as_slice() {
        [one] => Item::fine("versions", format!("all {one}")),
        many => Item::new(
            "versions",
            Level::Warning,
            format!("side by side: {}", many.join(", ")),
            "finish the upgrade: `fairway upgrade`",
        ),
    };
    vec![mesh, skew]
}

pub(crate) fn text(server: &str, items: &[Item]) -> String {
    let mark = |level: Level| match level {
        Level::Fine => good("ok"),
        Level::Unknown => dim("unknown"),
        Level::Warning => "warning".to_owned(),
        Level::Fault => bad("FAULT"),
    };
    let row = |item: &Item| vec![item.what.to_owned(), mark(item.level), item.finding.clone(), item.remedy.clone()];
    let mut table = output::table(&["WHAT", "", "FINDING", "REMEDY"], items.iter().map(row));
    output::bound(&mut table, &[(2, FINDING_WIDTH), (3, REMEDY_WIDTH)]);
    let count = |level: Level| items.iter().filter(|item| item.level == level).count();
    let verdict = match count(Level::Fault) {
        0 => good("fit"),
        _ => bad("not fit"),
    };
    format!("{server}\n\n{table}\n\n{verdict}: {} faults, {} warnings", count(Level::Fault), count(Level::Warning))
}

/// `a, b, c and 4 more`.
fn some(names: &[String]) -> String {
    const SHOWN: usize = 4;
    if names.len() <= SHOWN {
        return names.join(", ");
    }
    format!("{} and {} more", names[..SHOWN].join(", "), names.len() - SHOWN)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::cluster::fake::FakeApi;

    #[test]
    fn what_cannot_be_seen_is_not_called_fine() {
        let evidence = Evidence {
            version: json!({"gitVersion": "v1.34.0", "minor": "34"}),
            unknown: vec![("nodes", "403".to_owned()), ("webhooks", "a".to_owned()), ("webhooks", "b".to_owned())],
            ..Evidence::default()
        };
        let items = judge(&evidence);
        let of = |what: &str| {
            items
                .iter()
                .filter(|item| item.what == what)
                .map(|item| (item.level, item.finding.clone()))
                .collect::<Vec<_>>()
        };
        assert_eq!(of("webhooks"), [(Level::Unknown, "a, b".to_owned())]);
        assert_eq!(of("nodes"), [(Level::Unknown, "403".to_owned())]);
        assert!(of("kernel").is_empty(), "no node, no kernel");
        assert!(of("API server").iter().all(|(level, _)| *level == Level::Fine));
    }

    #[test]
    fn a_long_finding_is_broken_into_lines_also_where_there_is_no_terminal() {
        let items = [Item::new("mesh", Level::Fault, "word ".repeat(100), "remedy ".repeat(100))];
        let widest = text("s", &items).lines().map(|line| line.chars().count()).max().unwrap();
        assert!(widest <= usize::from(FINDING_WIDTH + REMEDY_WIDTH) + 30, "{widest}");
    }

    #[tokio::test]
    async fn a_list_that_is_refused_is_unknown_to_everything_that_reads_it() {
        let policy = json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": "p", "namespace": "d"}, "spec": {"podSelector": {}, "policyTypes": ["Ingress"]}});
        for (refused, unknown) in [
            ("/api/v1/namespaces/d/pods", &["network policies"][..]),
            ("/api/v1/namespaces", &["labels", "network policies", "pod security", "webhooks"]),
            ("/api/v1/nodes", &["clocks", "nodes", "quotas"]),
            ("/apis/apps/v1/daemonsets", &["network", "other meshes"]),
            ("/api/v1/namespaces/m/configmaps/fairway-node", &["network policies", "webhooks"]),
        ] {
            let api = FakeApi::start().await;
            api.put(policy.clone());
            api.forbid(refused);
            let evidence = Evidence::gather(&api.cluster(), "m").await.unwrap();
            let items = judge(&evidence);
            for what in unknown {
                let levels: Vec<Level> =
                    items.iter().filter(|item| item.what == *what).map(|item| item.level).collect();
                assert!(
                    levels.contains(&Level::Unknown) && !levels.contains(&Level::Fine),
                    "{refused}: {what}: {levels:?}"
                );
            }
        }
    }
}
