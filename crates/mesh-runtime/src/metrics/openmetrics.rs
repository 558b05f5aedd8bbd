//! Metric families as OpenMetrics text (OpenMetrics 1.0), which older scrapers read as Prometheus text.
//!
//! Differences that matter: a counter's family is named without `_total` and its samples with it, bucket bounds are written as floats, and
//! the text ends with `# EOF`, so that a scrape cut short is noticed. A counter that is known to the world by a name without `_total`
//! keeps it and is written without a type, as OpenMetrics lets no counter's sample be named so: its scrapers read it as of unknown type.

use std::fmt::{self, Write};

use prometheus::proto::{LabelPair, Metric, MetricFamily, MetricType};

const TOTAL: &str = "_total";

/// One text of all families, in their order. Labels keep the order they came in.
pub(super) fn encode(families: &[MetricFamily]) -> String {
    let mut out = String::new();
    families.iter().try_for_each(|family| encode_family(family, &mut out)).expect("strings can be written to");
    out.push_str("# EOF\n");
    out
}

fn encode_family(family: &MetricFamily, out: &mut String) -> fmt::Result {
    let kind = family.get_field_type();
    let base = family.name().strip_suffix(TOTAL).filter(|_| kind == MetricType::COUNTER);
    let name = base.unwrap_or_else(|| family.name());
    let word = match kind {
        MetricType::COUNTER => base.map(|_| "counter"),
        MetricType::GAUGE => Some("gauge"),
        MetricType::HISTOGRAM => Some("histogram"),
        // Nothing here makes summaries.
        MetricType::SUMMARY | MetricType::UNTYPED => return Ok(()),
    };
    writeln!(out, "# HELP {name} {}", escaped(family.help()))?;
    word.map_or(Ok(()), |word| writeln!(out, "# TYPE {name} {word}"))?;
    family.get_metric().iter().try_for_each(|metric| match kind {
        MetricType::COUNTER => {
            let suffix = base.map_or("", |_| TOTAL);
            sample(out, (name, suffix), metric, None, metric.get_counter().get_value())
        }
        MetricType::GAUGE => sample(out, (name, ""), metric, None, metric.get_gauge().get_value()),
        _ => histogram(out, name, metric),
    })
}

fn histogram(out: &mut String, name: &str, metric: &Metric) -> fmt::Result {
    let histogram = metric.get_histogram();
    for bucket in histogram.get_bucket().iter().filter(|bucket| bucket.upper_bound().is_finite()) {
        let bound = format!("{:?}", bucket.upper_bound());
        sample(out, (name, "_bucket"), metric, Some(&bound), bucket.cumulative_count() as f64)?;
    }
    let count = histogram.get_sample_count() as f64;
    sample(out, (name, "_bucket"), metric, Some("+Inf"), count)?;
    sample(out, (name, "_sum"), metric, None, histogram.get_sample_sum())?;
    sample(out, (name, "_count"), metric, None, count)
}

fn sample(
    out: &mut String,
    (name, suffix): (&str, &str),
    metric: &Metric,
    bound: Option<&str>,
    value: f64,
) -> fmt::Result {
    write!(out, "{name}{suffix}")?;
    let labels = metric.get_label().iter().map(|pair: &LabelPair| (pair.name(), pair.value()));
    let mut separator = '{';
    for (label, text) in labels.chain(bound.map(|bound| ("le", bound))) {
        write!(out, "{separator}{label}=\"{}\"", escaped(text))?;
        separator = ',';
    }
    if separator == ',' {
        out.push('}');
    }
    match value {
        v if v.is_infinite() => writeln!(out, " {}Inf", if v > 0.0 { '+' } else { '-' }),
        v => writeln!(out, " {v}"),
    }
}

/// Label values and help texts alike.
fn escaped(text: &str) -> std::borrow::Cow<'_, str> {
    if text.contains(['\\', '"', '\n']) {
        text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n").into()
    } else {
        text.into()
    }
}

#[cfg(test)]
mod tests {
    use prometheus::{Gauge, HistogramOpts, HistogramVec, IntCounter, IntGaugeVec, Opts, core::Collector};

    use super::*;

    #[test]
    fn families_are_written_as_openmetrics_wants_them() {
        let counter = IntCounter::new("things_total", "Things \"seen\"").unwrap();
        counter.inc_by(3);
        let gauge = IntGaugeVec::new(Opts::new("open", "Open"), &["what"]).unwrap();
        gauge.with_label_values(&["a \"b\"\\\n"]).set(-2);
        let histogram = HistogramOpts::new("took_seconds", "Took").buckets(vec![0.5, 1.0]);
        let histogram = HistogramVec::new(histogram, &["result"]).unwrap();
        histogram.with_label_values(&["ok"]).observe(0.75);
        let endless = Gauge::new("endless", "Endless").unwrap();
        endless.set(f64::INFINITY);
        let old = IntCounter::new("csr_count", "Old").unwrap();
        let families: Vec<MetricFamily> =
            [counter.collect(), old.collect(), gauge.collect(), histogram.collect(), endless.collect()].concat();
        let wanted = concat!(
            "# HELP things Things \\\"seen\\\"\n# TYPE things counter\nthings_total 3\n",
            "# HELP csr_count Old\ncsr_count 0\n",
            "# HELP open Open\n# TYPE open gauge\nopen{what=\"a \\\"b\\\"\\\\\\n\"} -2\n",
            "# HELP took_seconds Took\n# TYPE took_seconds histogram\n",
            "took_seconds_bucket{result=\"ok\",le=\"0.5\"} 0\n",
            "took_seconds_bucket{result=\"ok\",le=\"1.0\"} 1\n",
            "took_seconds_bucket{result=\"ok\",le=\"+Inf\"} 1\n",
            "took_seconds_sum{result=\"ok\"} 0.75\ntook_seconds_count{result=\"ok\"} 1\n",
            "# HELP endless Endless\n# TYPE endless gauge\nendless +Inf\n# EOF\n",
        );
        assert_eq!(encode(&families), wanted);
    }
}
