//! Samples to Markdown.

use std::fmt::Write as _;

use crate::{
    idle::Idle,
    loads::{Load, Sample},
    mesh::Arm,
    stalled::Stalled,
};

/// What is compared with what, where both were measured.
const RATIOS: [(&str, &str); 4] = [("engine", "h2"), ("mesh", "plain"), ("mesh", "peer"), ("mesh", "engine")];

/// Figures, and then ratios; one row per load. `samples` by load, arm and round.
pub(crate) fn loads(loads: &[Load], arms: &[Arm<'_>], samples: &[Vec<Vec<Sample>>]) -> String {
    let figures = figures(loads, arms, samples);
    let ratios = ratios(loads, arms, samples);
    format!("{figures}\n\nUnits are requests, for bulk MiB.\n{ratios}")
}

fn figures(loads: &[Load], arms: &[Arm<'_>], samples: &[Vec<Vec<Sample>>]) -> String {
    let mut columns = vec!["load".to_owned()];
    columns.extend(arms.iter().map(|arm| format!("{} /s", arm.name)));
    columns.extend(arms.iter().map(|arm| format!("{} p50 (p99) µs", arm.name)));
    columns.extend(proxied(arms).map(|(_, arm)| format!("{} CPU µs/unit", arm.name)));
    let rows = loads.iter().zip(samples).map(|(load, samples)| {
        let mut row = vec![format!("{}{}", load.name, errors(samples))];
        row.extend(samples.iter().map(|samples| format!("{:.0}", median_of(samples, |s| s.per_second))));
        row.extend(samples.iter().map(|samples| latency(load, samples)));
        row.extend(proxied(arms).map(|(arm, _)| format!("{:.1}", median_of(&samples[arm], |s| s.cpu_us_per_unit))));
        row
    });
    table(&columns, rows)
}

/// One table per comparison.
fn ratios(loads: &[Load], arms: &[Arm<'_>], samples: &[Vec<Vec<Sample>>]) -> String {
    let place = |name: &str| arms.iter().position(|arm| arm.name == name);
    let mut out = String::new();
    for (a, b) in RATIOS {
        let (Some(first), Some(second)) = (place(a), place(b)) else { continue };
        let columns = [format!("{a}/{b}"), "/s".into(), "p50".into(), "p99".into(), "CPU".into()];
        let rows = loads.iter().zip(samples).map(|(load, samples)| {
            let figures: [fn(&Sample) -> f64; 4] =
                [|s| s.per_second, |s| s.p50_us, |s| s.p99_us, |s| s.cpu_us_per_unit];
            let ratios = figures.map(|figure| ratio(&samples[first], &samples[second], figure));
            [&[load.name.to_owned()][..], &ratios].concat()
        });
        _ = write!(out, "\n{}\n", table(&columns, rows));
    }
    if !out.is_empty() {
        out += "\nRatios: median of the rounds' (lowest–highest). Better is more than 1 for /s, less for the others.\n";
    }
    out
}

fn proxied<'a>(arms: &'a [Arm<'_>]) -> impl Iterator<Item = (usize, &'a Arm<'a>)> {
    arms.iter().enumerate().filter(|(_, arm)| arm.is_proxied())
}

fn table(columns: &[String], rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut out = format!("| {} |\n|{}", columns.join(" | "), "---|".repeat(columns.len()));
    for row in rows {
        _ = write!(out, "\n| {} |", row.join(" | "));
    }
    out
}

fn latency(load: &Load, samples: &[Sample]) -> String {
    if load.is_bulk() {
        return "–".to_owned();
    }
    format!("{:.0} ({:.0})", median_of(samples, |s| s.p50_us), median_of(samples, |s| s.p99_us))
}

fn errors(samples: &[Vec<Sample>]) -> String {
    match samples.iter().flatten().map(|s| s.errors).sum::<u64>() {
        0 => String::new(),
        errors => format!(" ({errors} errors)"),
    }
}

/// Each round's `a` by its `b`; a dash where there is nothing to compare.
fn ratio(a: &[Sample], b: &[Sample], figure: impl Fn(&Sample) -> f64) -> String {
    let ratios: Vec<f64> =
        a.iter().zip(b).map(|(a, b)| figure(a) / figure(b)).filter(|ratio| ratio.is_finite()).collect();
    if ratios.is_empty() {
        return "–".to_owned();
    }
    let (low, high) = ratios.iter().fold((f64::MAX, f64::MIN), |(low, high), r| (low.min(*r), high.max(*r)));
    format!("{:.2} ({low:.2}–{high:.2})", median(ratios))
}

fn median_of(samples: &[Sample], figure: impl Fn(&Sample) -> f64) -> f64 {
    median(samples.iter().map(figure).collect())
}

/// 0 of nothing.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// One row per arm.
pub(crate) fn stalled(results: &[Stalled]) -> String {
    let columns = ["proxies", "stalled readers", "tunnels", "others answered", "ms until the last knew"];
    let rows = results.iter().map(|Stalled { arm, outcome, tunnels }| {
        let answered = format!("{} of {}", outcome.answered, outcome.asked);
        let figures = [outcome.stalled.to_string(), tunnels.to_string(), answered, outcome.milliseconds.to_string()];
        [&[(*arm).to_owned()][..], &figures].concat()
    });
    table(&columns.map(str::to_owned), rows) + "\n"
}

/// One row per proxy and node.
pub(crate) fn idle(results: &[Idle]) -> String {
    let columns =
        ["proxy", "node", "idle connections", "KiB per connection", "MiB before", "MiB during", "MiB 5 s after"];
    let mib = |bytes: f64| format!("{:.1}", bytes / f64::from(1 << 20));
    let mut refusals = String::new();
    let mut rows = Vec::new();
    for result in results {
        let Idle { arm, wanted, held, before, during, after } = result;
        let open = held.open;
        let count = if open == *wanted { open.to_string() } else { format!("{open} of {wanted}") };
        for (node, role) in ["client's", "server's"].into_iter().enumerate() {
            let kib = format!("{:.2}", result.per_connection()[node] / 1024.0);
            let sizes = [before[node], during[node], after[node]].map(mib);
            rows.push([&[(*arm).to_owned(), role.to_owned(), count.clone(), kib][..], &sizes].concat());
        }
        if let Some(error) = &held.first_error {
            _ = write!(refusals, "\n{arm}: not all connections could be opened; the first refused said: {error}\n");
        }
    }
    table(&columns.map(str::to_owned), rows.into_iter()) + "\n" + &refusals
}
