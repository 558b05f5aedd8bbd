//! The metrics registry of a process and its text form.

use std::sync::Arc;

use prometheus::{
    Encoder, Gauge, Opts, TextEncoder,
    core::{Collector, Desc},
    proto::MetricFamily,
};

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

    /// Every family in Prometheus text format.
    pub fn encode(&self) -> String {
        let mut out = Vec::new();
        match TextEncoder::new().encode(&self.0.gather(), &mut out) {
            Ok(()) => String::from_utf8(out).unwrap_or_default(),
            Err(error) => format!("# cannot encode metrics: {error}\n"),
        }
    }
}

/// Figures read from `/proc/self` at each scrape.
#[derive(Debug)]
struct ProcessCollector {
    open_fds: Gauge,
    max_fds: Gauge,
    resident: Gauge,
    cpu: Gauge,
}

impl ProcessCollector {
    fn new() -> Self {
        let gauge = |name, help| Gauge::with_opts(Opts::new(name, help)).expect("constant names are valid");
        Self {
            open_fds: gauge("process_open_fds", "Open file descriptors"),
            max_fds: gauge("process_max_fds", "Limit of open file descriptors"),
            resident: gauge("process_resident_memory_bytes", "Resident memory"),
            cpu: gauge("process_cpu_seconds_total", "User and system CPU time spent"),
        }
    }

    fn gauges(&self) -> [&Gauge; 4] {
        [&self.open_fds, &self.max_fds, &self.resident, &self.cpu]
    }
}

impl Collector for ProcessCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.gauges().into_iter().flat_map(Collector::desc).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        if let Ok(entries) = std::fs::read_dir("/proc/self/fd") {
            self.open_fds.set(f64::from(u32::try_from(entries.count()).unwrap_or(u32::MAX)));
        }
        self.max_fds.set(max_fds(&read("/proc/self/limits")).unwrap_or(0.0));
        self.resident.set(resident_bytes(&read("/proc/self/status")).unwrap_or(0.0));
        self.cpu.set(cpu_seconds(&read("/proc/self/stat")).unwrap_or(0.0));
        self.gauges().into_iter().flat_map(Collector::collect).collect()
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
    }

    #[test]
    fn reads_cpu_time_past_a_hostile_command_name() {
        let stat = "42 (a) b) (c) S 1 2 3 4 5 6 7 8 9 10 150 50 0 0";
        assert_eq!(cpu_seconds(stat), Some(2.0));
        assert_eq!(cpu_seconds("garbage"), None);
    }
}
