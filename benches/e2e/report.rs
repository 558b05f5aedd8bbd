//! Samples to Markdown.

use std::fmt::Write as _;

use crate::{
    idle::Idle,
    loads::{Load, Sample},
    mesh::Arm,
};

/// One row per load; `samples` by load, arm and round. The first arm is plain TCP, the second ours.
pub(crate) fn loads(loads: &[Load], arms: &[Arm<'_>], samples: &[Vec<Vec<Sample>>]) -> String {
    let mut out = String::from("| load |");
    for arm in arms {
        _ = write!(out, " {} /s |", arm.name);
    }
    out += " mesh/plain |";
    for arm in arms {
        _ = write!(out, " {} p50 (p99) µs |", arm.name);
    }
    out += " mesh/plain |";
    for arm in arms.iter().filter(|arm| arm.meshed) {
        _ = write!(out, " {} CPU µs/unit |", arm.name);
    }
    if arms.len() > 2 {
        out += " ours/peer: /s | p50 | CPU |";
    }
    let columns = out.matches('|').count() - 1;
    _ = write!(out, "\n|{}", "---|".repeat(columns));
    for (load, samples) in loads.iter().zip(samples) {
        out += "\n";
        out += &row(load, arms, samples);
    }
    out + "\n\nUnits are requests, for bulk MiB. Ratios: median of the rounds' (lowest–highest).\n"
}

fn row(load: &Load, arms: &[Arm<'_>], samples: &[Vec<Sample>]) -> String {
    let mut out = format!("| {}{} |", load.name, errors(samples));
    for samples in samples {
        _ = write!(out, " {:.0} |", median(samples.iter().map(|s| s.per_second)));
    }
    _ = write!(out, " {} |", ratio(&samples[1], &samples[0], |s| s.per_second));
    let latency = |samples: &[Sample]| match load.is_bulk() {
        true => "–".to_owned(),
        false => {
            let (p50, p99) = (median(samples.iter().map(|s| s.p50_us)), median(samples.iter().map(|s| s.p99_us)));
            format!("{p50:.0} ({p99:.0})")
        }
    };
    for samples in samples {
        _ = write!(out, " {} |", latency(samples));
    }
    _ = write!(out, " {} |", ratio(&samples[1], &samples[0], |s| s.p50_us));
    for (_, samples) in arms.iter().zip(samples).filter(|(arm, _)| arm.meshed) {
        _ = write!(out, " {:.1} |", median(samples.iter().map(|s| s.cpu_us_per_unit)));
    }
    if let [_, ours, peer] = samples {
        for figure in [|s: &Sample| s.per_second, |s: &Sample| s.p50_us, |s: &Sample| s.cpu_us_per_unit] {
            _ = write!(out, " {} |", ratio(ours, peer, figure));
        }
    }
    out
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
    format!("{:.2} ({low:.2}–{high:.2})", median(ratios.iter().copied()))
}

/// 0 of nothing.
fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// One row per ztunnel and node.
pub(crate) fn idle(results: &[Idle]) -> String {
    let mut out = String::from(
        "| ztunnel | node | idle connections | KiB per connection | MiB before | MiB during | MiB 5 s after |\n|---|---|---|---|---|---|---|",
    );
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    for result in results {
        let Idle { arm, wanted, held, before, during, after } = result;
        for (node, role) in ["client's", "server's"].into_iter().enumerate() {
            let (kib, open) = (result.per_connection()[node] / 1024.0, held.open);
            let count = if open == *wanted { open.to_string() } else { format!("{open} of {wanted}") };
            let (before, during, after) = (mib(before[node]), mib(during[node]), mib(after[node]));
            _ = write!(out, "\n| {arm} | {role} | {count} | {kib:.1} | {before:.1} | {during:.1} | {after:.1} |");
        }
        if let Some(error) = &held.first_error {
            _ = write!(out, "\n\n{arm}: not all connections could be opened; the first refused said: {error}\n");
        }
    }
    out
}
