//! Figures to Markdown.

use std::time::Duration;

use crate::measure::{Changes, Loaded, Spent, Stalled};

const MIB: f64 = 1024.0 * 1024.0;

pub(crate) fn loaded(all: &[Loaded]) -> String {
    let rows = all.iter().enumerate().map(|(at, loaded)| {
        // The first one's memory is mostly the program's own.
        let per_pod = all.first().filter(|_| at > 0).map(|first| {
            (loaded.usage.resident as f64 - first.usage.resident as f64) / (loaded.pods - first.pods).max(1) as f64
        });
        vec![
            loaded.pods.to_string(),
            format!("{:.2}", loaded.ready.as_secs_f64()),
            format!("{:.2}", loaded.usage.cpu.as_secs_f64()),
            format!("{:.0}", loaded.usage.cpu.as_secs_f64() * 1e6 / loaded.pods.max(1) as f64),
            mib(loaded.usage.resident),
            mib(loaded.usage.peak),
            per_pod.map_or_else(|| "–".to_owned(), |bytes| format!("{bytes:.0}")),
        ]
    });
    table(&["pods", "s to ready", "CPU s", "CPU µs/pod", "MiB", "peak MiB", "bytes/pod"], rows)
}

pub(crate) fn storms(all: &[(&str, Spent)], nodes: usize) -> String {
    let rows = all.iter().map(|(what, spent)| {
        let per_node = |n: u64| n as f64 / nodes as f64;
        vec![
            (*what).to_owned(),
            format!("{:.2}", spent.took.as_secs_f64()),
            format!("{:.2}", spent.usage.cpu.as_secs_f64()),
            format!("{:.1}", spent.usage.cpu.as_secs_f64() * 1e3 / nodes as f64),
            format!("{:.2}", spent.own.as_secs_f64()),
            format!("{:.0}", per_node(spent.counts.resources)),
            format!("{:.1}", per_node(spent.counts.bytes) / 1024.0),
            mib(spent.usage.resident),
            mib(spent.usage.peak),
        ]
    });
    table(
        &[
            "all nodes at once",
            "s until served",
            "CPU s",
            "CPU ms/node",
            "bench CPU s",
            "resources/node",
            "KiB/node",
            "MiB after",
            "peak MiB",
        ],
        rows,
    )
}

pub(crate) fn changes(all: &[Changes], nodes: usize) -> String {
    let rows = all.iter().map(|Changes { what, count, latencies, spent }| {
        let mut sorted = latencies.clone();
        sorted.sort();
        let each = |n: f64| n / (*count).max(1) as f64;
        let cpu = |time: Duration| match time.is_zero() {
            true => "–".to_owned(),
            false => format!("{:.2}", each(time.as_secs_f64() * 1e3)),
        };
        let bytes = match spent.counts.bytes {
            0 => "–".to_owned(),
            bytes => format!("{:.0}", each(bytes as f64) / nodes as f64),
        };
        // Per mille, of sorted values.
        let at = |share: usize| sorted.get((sorted.len() * share / 1000).min(sorted.len().saturating_sub(1)));
        let ms = |time: Option<&Duration>| time.map_or_else(String::new, |t| format!("{:.1}", t.as_secs_f64() * 1e3));
        vec![
            (*what).to_owned(),
            count.to_string(),
            ms(at(500)),
            ms(at(990)),
            ms(sorted.last()),
            cpu(spent.usage.cpu),
            cpu(spent.own),
            bytes,
        ]
    });
    table(
        &["change", "times", "p50 ms", "p99 ms", "max ms", "CPU ms/change", "bench CPU ms/change", "bytes/node"],
        rows,
    )
}

pub(crate) fn stalled(stalled: &Stalled) -> String {
    let Stalled { before, after, bulks, workloads } = stalled;
    let row =
        vec![bulks.to_string(), workloads.to_string(), mib(before.resident), mib(after.resident), mib(after.peak)];
    table(
        &["bulks while one node does not read", "workloads in each", "MiB before", "MiB after", "peak MiB"],
        std::iter::once(row),
    )
}

fn mib(bytes: u64) -> String {
    format!("{:.0}", bytes as f64 / MIB)
}

fn table(columns: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let mut out = line(&columns.iter().map(|column| (*column).to_owned()).collect::<Vec<_>>());
    out += &line(&vec!["---".to_owned(); columns.len()]);
    rows.for_each(|row| out += &line(&row));
    out
}
