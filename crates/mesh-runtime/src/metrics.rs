//! The metrics registry of a process and its text form.

use std::sync::Arc;

use prometheus::{
    Opts,
    core::{Collector, Desc, Describer},
    proto::{Counter, Gauge, Metric, MetricFamily, MetricType},
};
use tokio::runtime::Handle;

mod openmetrics;
mod runtimes;

/// One per process; cheap to clone. Crates register their own families and keep typed handles to them.
#[derive(Clone, Debug)]
pub struct Registry(Arc<prometheus::Registry>);

impl Default for Registry {
    fn default() -> Self {
        Self::new()
    }
}

impl Registry {
    /// A registry that already holds the process's own figures (file descriptors, memory, CPU).
    pub fn new() -> Self {
        let registry = Self(Arc::new(prometheus::Registry::new()));
        registry.register(Box::new(ProcessCollector::new()));
        registry
    }

    /// Registers a family and hands it back, so that `let x = registry.add(IntCounter::new(..))` reads as one step.
    ///
    /// # Panics
    /// When the name is malformed or taken: a programming error that the first test run shows.
    pub fn add<C: Collector + Clone + 'static>(&self, collector: Result<C, prometheus::Error>) -> C {
        let collector = collector.expect("metric names and labels are constants");
        self.register(Box::new(collector.clone()));
        collector
    }

    /// # Panics
    /// When a name is taken twice.
    pub fn register(&self, collector: Box<dyn Collector>) {
        self.0.register(collector).expect("each metric family is registered once");
    }

    /// Shows these runtimes, by the names of their threads.
    ///
    /// # Panics
    /// When called twice.
    pub fn runtimes(&self, runtimes: Vec<(String, Handle)>) {
        self.register(Box::new(runtimes::Runtimes::new(runtimes)));
    }

    /// Every family as OpenMetrics text; families without a value are left out.
    pub fn encode(&self) -> String {
        openmetrics::encode(&self.0.gather())
    }
}

/// A family put together by hand, for figures that are read rather than kept.
pub fn family((name, help): (&str, &str), kind: MetricType, metrics: Vec<Metric>) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(name.to_owned());
    family.set_help(help.to_owned());
    family.set_field_type(kind);
    family.set_metric(metrics);
    family
}

/// A value of [`family`]; labels are set on it.
pub fn counter(value: f64) -> Metric {
    let mut counter = Counter::default();
    counter.set_value(value);
    let mut metric = Metric::default();
    metric.set_counter(counter);
    metric
}

/// As [`counter`].
pub fn gauge(value: f64) -> Metric {
    let mut gauge = Gauge::default();
    gauge.set_value(value);
    let mut metric = Metric::default();
    metric.set_gauge(gauge);
    metric
}

const OPEN_FDS: (&str, &str) = ("process_open_fds", "Open file descriptors");
const MAX_FDS: (&str, &str) = ("process_max_fds", "Limit of open file descriptors");
const RESIDENT: (&str, &str) = ("process_resident_memory_bytes", "Resident memory");
const CPU: (&str, &str) = ("process_cpu_seconds_total", "User and system CPU time spent");

/// Figures read from `/proc/self` at each scrape.
#[derive(Debug)]
struct ProcessCollector(Vec<Desc>);

impl ProcessCollector {
    fn new() -> Self {
        let describe = |(name, help)| Opts::new(name, help).describe().expect("constant names are valid");
        Self([OPEN_FDS, MAX_FDS, RESIDENT, CPU].map(describe).into())
    }
}

impl Collector for ProcessCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.0.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let open = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
        let open = f64::from(u32::try_from(open).unwrap_or(u32::MAX));
        let max = max_fds(&read("/proc/self/limits")).unwrap_or(0.0);
        let resident = resident_bytes(&read("/proc/self/status")).unwrap_or(0.0);
        let cpu = cpu_seconds(&read("/proc/self/stat")).unwrap_or(0.0);
        let shown = |what, value| family(what, MetricType::GAUGE, vec![gauge(value)]);
        vec![
            shown(OPEN_FDS, open),
            shown(MAX_FDS, max),
            shown(RESIDENT, resident),
            family(CPU, MetricType::COUNTER, vec![counter(cpu)]),
        ]
    }
}

fn max_fds(limits: &str) -> Option<f64> {
    limits.lines().find(|l| l.starts_with("Max open files"))?.split_whitespace().nth(3)?.parse().ok()
}

fn resident_bytes(status: &str) -> Option<f64> {
    let kib: f64 = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024.0)
}

/// Fields 14 and 15 of `/proc/<pid>/stat`, in ticks of 1/100 s; the command name before them may hold anything.
pub fn cpu_seconds(stat: &str) -> Option<f64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let (user, system): (f64, f64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some((user + system) / 100.0)
}

#[cfg(test)]
mod tests {
    use prometheus::IntCounter;

    use super::*;

    #[test]
    fn shows_process_figures_and_what_was_added() {
        let registry = Registry::new();
        let counter = registry.add(IntCounter::new("things_total", "Things that happened"));
        counter.inc_by(3);
        let text = registry.encode();
        assert!(text.contains("things_total 3"), "{text}");
        assert!(text.contains("process_open_fds"), "{text}");
        assert!(text.contains("# TYPE process_cpu_seconds counter"), "{text}");
    }

    #[tokio::test]
    async fn shows_each_thread_of_each_runtime() {
        let registry = Registry::new();
        let other = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
        registry.runtimes(vec![("0".to_owned(), Handle::current()), ("control".to_owned(), other.handle().clone())]);
        let text = registry.encode();
        for wanted in [
            "tokio_num_workers 3",
            "tokio_num_alive_tasks 0",
            "tokio_global_queue_depth 0",
            "tokio_worker_total_busy_duration_seconds_total{worker=\"0\"}",
            "tokio_worker_park_count_total{worker=\"control-0\"}",
            "tokio_worker_park_unpark_count_total{worker=\"control-1\"}",
        ] {
            assert!(text.contains(wanted), "{wanted} missing from {text}");
        }
        other.shutdown_background();
    }

    #[test]
    fn reads_cpu_time_past_a_hostile_command_name() {
        let stat = "42 (a) b) (c) S 1 2 3 4 5 6 7 8 9 10 150 50 0 0";
        assert_eq!(cpu_seconds(stat), Some(2.0));
        assert_eq!(cpu_seconds("garbage"), None);
    }
}
