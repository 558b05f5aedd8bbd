//! `fairway top`: who talks to whom now, from the counters of every ztunnel.
//!
//! Both ends of a connection count it. Where the source's ztunnel reports, it is believed; a source outside the mesh is seen by the
//! destination's only.

use std::{
    collections::BTreeMap,
    io::IsTerminal as _,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use serde::Serialize;

use crate::{
    args::{Output, Top},
    counters::{self, Sample},
    mesh::{self, Mesh, Page, Program},
    output,
};

const CLEAR: &str = "\x1b[H\x1b[2J";

pub(crate) fn run(query: &Top) -> anyhow::Result<ExitCode> {
    let mesh = mesh::find(&query.place)?;
    mesh.installed()?;
    let (mut before, mut at) = (look(&*mesh)?, Instant::now());
    loop {
        // What is shown is what happened meanwhile.
        thread::sleep(query.interval);
        let (now, then) = (look(&*mesh)?, Instant::now());
        let rows = rows(&before, &now, then.duration_since(at));
        show(&rows, query)?;
        if query.once {
            return Ok(ExitCode::SUCCESS);
        }
        (before, at) = (now, then);
    }
}

/// Who calls whom, and how.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
struct Pair {
    source: String,
    destination: String,
    service: String,
    mutual_tls: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Totals {
    opened: f64,
    closed: f64,
    failed: f64,
    /// Client to server.
    received: f64,
    sent: f64,
}

/// One line of the table.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    #[serde(flatten)]
    pair: Pair,
    open: f64,
    connections_per_second: f64,
    /// Within the interval.
    failed: f64,
    bytes_to_server_per_second: f64,
    bytes_to_client_per_second: f64,
}

impl Totals {
    fn join(self, other: Self, each: impl Fn(f64, f64) -> f64) -> Self {
        Self {
            opened: each(self.opened, other.opened),
            closed: each(self.closed, other.closed),
            failed: each(self.failed, other.failed),
            received: each(self.received, other.received),
            sent: each(self.sent, other.sent),
        }
    }

    /// A counter that fell belongs to a new process: all it says is new.
    fn since(self, old: Self) -> Self {
        self.join(old, |new, old| if new >= old { new - old } else { new })
    }
}

/// What a ztunnel counts, by whom it is about and whether the source's end says so.
type Counts = BTreeMap<(Pair, bool), Totals>;
/// By node: each counts by itself, and starts anew by itself.
type Look = BTreeMap<String, Counts>;

fn look(mesh: &dyn Mesh) -> anyhow::Result<Look> {
    let mut nodes = Look::new();
    let programs: Vec<Program> = mesh.nodes()?.into_iter().map(|node| Program::Ztunnel(node.name)).collect();
    for (program, answer) in programs.iter().zip(mesh.ask_all(&programs, Page::Metrics)) {
        match answer {
            Ok((200, body)) => drop(nodes.insert(program.to_string(), counts(&body))),
            Ok((code, _)) => eprintln!("fairway: {program} says {code}: what follows is without it"),
            Err(error) => eprintln!("fairway: {program} does not answer: {error:#}: what follows is without it"),
        }
    }
    Ok(nodes)
}

fn counts(body: &str) -> Counts {
    let mut counts = Counts::new();
    counters::parse(body).for_each(|sample| add(&mut counts, &sample));
    counts
}

fn add(counts: &mut Counts, sample: &Sample<'_>) {
    let Some(field) = field_of(sample.name) else { return };
    let label = |name: &str| sample.label(name);
    let party = |side: &str| match (label(&format!("{side}_workload_namespace")), label(&format!("{side}_workload"))) {
        ("unknown" | "", "unknown" | "") => "(outside)".to_owned(),
        (namespace, workload) => format!("{namespace}/{workload}"),
    };
    let pair = Pair {
        source: party("source"),
        destination: party("destination"),
        service: Some(label("destination_service")).filter(|s| *s != "unknown").unwrap_or_default().to_owned(),
        mutual_tls: label("connection_security_policy") == "mutual_tls",
    };
    let by_source = label("reporter") == "source";
    *field(counts.entry((pair, by_source)).or_default()) += sample.value;
}

fn field_of(family: &str) -> Option<fn(&mut Totals) -> &mut f64> {
    Some(match family {
        "istio_tcp_connections_opened_total" => |totals| &mut totals.opened,
        "istio_tcp_connections_closed_total" => |totals| &mut totals.closed,
        "istio_tcp_connections_failed_total" => |totals| &mut totals.failed,
        "istio_tcp_received_bytes_total" => |totals| &mut totals.received,
        "istio_tcp_sent_bytes_total" => |totals| &mut totals.sent,
        _ => return None,
    })
}

/// All that is counted of one pair, and what of it is new.
#[derive(Clone, Copy, Debug, Default)]
struct Change {
    all: Totals,
    new: Totals,
}

fn changes<'a>(before: &Look, now: &'a Look) -> BTreeMap<(&'a Pair, bool), Change> {
    let mut changes: BTreeMap<(&Pair, bool), Change> = BTreeMap::new();
    for (node, counts) in now {
        let old = before.get(node);
        for (key, all) in counts {
            // What a ztunnel had counted while it did not answer is anybody's guess.
            let new = old.map(|old| all.since(old.get(key).copied().unwrap_or_default())).unwrap_or_default();
            let held = changes.entry((&key.0, key.1)).or_default();
            held.all = held.all.join(*all, |a, b| a + b);
            held.new = held.new.join(new, |a, b| a + b);
        }
    }
    changes
}

/// The source's word, else the destination's; failures are told by whichever end saw more of them.
fn believe(by_reporter: BTreeMap<(&Pair, bool), Change>) -> BTreeMap<&Pair, Change> {
    let mut out: BTreeMap<&Pair, Change> = BTreeMap::new();
    for ((pair, _), change) in by_reporter {
        // The destination's comes first in this order.
        let held = out.entry(pair).or_default();
        let failed = held.new.failed.max(change.new.failed);
        *held = change;
        held.new.failed = failed;
    }
    out
}

fn rows(before: &Look, now: &Look, took: Duration) -> Vec<Row> {
    let seconds = took.as_secs_f64().max(f64::EPSILON);
    let mut rows: Vec<Row> = believe(changes(before, now))
        .into_iter()
        .map(|(pair, Change { all, new })| Row {
            pair: pair.clone(),
            open: (all.opened - all.closed).max(0.0),
            connections_per_second: new.opened / seconds,
            failed: new.failed,
            bytes_to_server_per_second: new.received / seconds,
            bytes_to_client_per_second: new.sent / seconds,
        })
        .filter(|row| row.open > 0.0 || row.connections_per_second > 0.0 || row.failed > 0.0)
        .collect();
    let weight = |row: &Row| row.bytes_to_server_per_second + row.bytes_to_client_per_second;
    rows.sort_by(|a, b| {
        let busier =
            weight(b).total_cmp(&weight(a)).then(b.connections_per_second.total_cmp(&a.connections_per_second));
        busier.then(b.open.total_cmp(&a.open)).then(a.pair.cmp(&b.pair))
    });
    rows
}

fn show(rows: &[Row], query: &Top) -> anyhow::Result<()> {
    match query.output {
        // One look, one line.
        Output::Json => {
            crate::output::say!("{}", serde_json::to_string(rows)?);
            return Ok(());
        }
        Output::Yaml => {
            crate::output::say!("---\n{}", output::yaml(&rows)?);
            return Ok(());
        }
        Output::Text => {}
    }
    let live = !query.once && std::io::stdout().is_terminal();
    let start = if live { CLEAR } else { "" };
    if rows.is_empty() {
        crate::output::say!("{start}no traffic through the mesh");
        return Ok(());
    }
    let line = |row: &Row| {
        let Pair { source, destination, service, mutual_tls } = &row.pair;
        let failed = if row.failed > 0.0 { output::bad(&format!("{:.0}", row.failed)) } else { "0".to_owned() };
        vec![
            source.clone(),
            destination.clone(),
            output::short_name(service),
            if *mutual_tls { "mTLS".to_owned() } else { output::bad("clear") },
            format!("{:.0}", row.open),
            format!("{:.1}", row.connections_per_second),
            failed,
            rate(row.bytes_to_server_per_second),
            rate(row.bytes_to_client_per_second),
        ]
    };
    let headings = ["SOURCE", "DESTINATION", "SERVICE", "WAY", "OPEN", "NEW/S", "FAILED", "TO SERVER/S", "TO CLIENT/S"];
    crate::output::say!("{start}{}", output::table(&headings, rows.iter().map(line)));
    Ok(())
}

/// `12 B`, `3.4 kB`, `1.2 GB`.
fn rate(bytes: f64) -> String {
    const UNITS: [&str; 4] = ["B", "kB", "MB", "GB"];
    let mut value = bytes;
    for unit in UNITS {
        if value < 1000.0 || unit == "GB" {
            return if unit == "B" { format!("{value:.0} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1000.0;
    }
    String::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look_at(text: &str) -> Look {
        [("node1".to_owned(), counts(text))].into()
    }

    fn line(family: &str, reporter: &str, source: &str, flags: &str, value: u32) -> String {
        format!(
            "{family}{{reporter=\"{reporter}\",source_workload=\"{source}\",source_workload_namespace=\"t\",destination_workload=\"b\",\
             destination_workload_namespace=\"t\",destination_service=\"b.t.svc.cluster.local\",response_flags=\"{flags}\",\
             connection_security_policy=\"mutual_tls\"}} {value}\n"
        )
    }

    #[test]
    fn both_ends_of_a_connection_are_one_line_and_failures_count_though_only_the_far_end_saw_them() {
        let opened = |reporter, n| line("istio_tcp_connections_opened_total", reporter, "a", "-", n);
        let closed = |reporter, flags, n| line("istio_tcp_connections_closed_total", reporter, "a", flags, n);
        let failed = line("istio_tcp_connections_failed_total", "destination", "a", "DENY", 2);
        let before = look_at(&(opened("source", 5) + &opened("destination", 5)));
        let now = look_at(
            &(opened("source", 9)
                + &opened("destination", 9)
                + &closed("source", "-", 3)
                + &closed("source", "CONNECT", 1)
                + &failed),
        );
        let rows = rows(&before, &now, Duration::from_secs(2));
        assert_eq!(rows.len(), 1);
        assert_eq!((rows[0].open, rows[0].connections_per_second, rows[0].failed), (5.0, 2.0, 2.0));
        assert_eq!((rows[0].pair.source.as_str(), rows[0].pair.destination.as_str()), ("t/a", "t/b"));
    }

    #[test]
    fn a_ztunnel_that_started_anew_is_not_counted_backwards() {
        let opened = |n| line("istio_tcp_connections_opened_total", "source", "a", "-", n);
        let rows = rows(&look_at(&opened(100)), &look_at(&opened(4)), Duration::from_secs(1));
        assert_eq!(rows[0].connections_per_second, 4.0);
    }

    #[test]
    fn each_ztunnel_is_compared_with_itself() {
        let opened = |n| counts(&line("istio_tcp_connections_opened_total", "source", "a", "-", n));
        let look = |nodes: &[(&str, u32)]| nodes.iter().map(|(node, n)| ((*node).to_owned(), opened(*n))).collect();
        let per_second = |before: &[(&str, u32)], now: &[(&str, u32)]| {
            let (before, now): (Look, Look) = (look(before), look(now));
            rows(&before, &now, Duration::from_secs(1))[0].connections_per_second
        };
        assert_eq!(per_second(&[("n1", 100), ("n2", 50)], &[("n1", 4), ("n2", 60)]), 14.0, "one started anew");
        assert_eq!(per_second(&[("n1", 100)], &[("n1", 101), ("n2", 60)]), 1.0, "one did not answer before");
        assert_eq!(per_second(&[("n1", 100), ("n2", 50)], &[("n1", 101)]), 1.0, "one does not answer any more");
    }

    #[test]
    fn rates_are_short() {
        assert_eq!([rate(0.0), rate(999.0), rate(3400.0), rate(5.2e12)], ["0 B", "999 B", "3.4 kB", "5200.0 GB"]);
    }
}
