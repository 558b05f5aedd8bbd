//! What the async runtimes of a process say of themselves.

use prometheus::{
    Opts,
    core::{Collector, Desc},
    proto::{LabelPair, Metric, MetricFamily, MetricType},
};
use tokio::runtime::{Handle, RuntimeMetrics};

use super::{counter, family, gauge};

const WORKERS: (&str, &str) = ("tokio_num_workers", "Threads that run tasks");
const TASKS: (&str, &str) =
    ("tokio_num_alive_tasks", "Tasks alive in the runtimes; a data-plane thread's own tasks apart");
const QUEUE: (&str, &str) = ("tokio_global_queue_depth", "Tasks waiting in the runtimes' shared queues");
const BUSY: (&str, &str) = ("tokio_worker_total_busy_duration_seconds_total", "Time a thread was busy");
const PARKS: (&str, &str) = ("tokio_worker_park_count_total", "Times a thread went to sleep");
const UNPARKS: (&str, &str) = ("tokio_worker_park_unpark_count_total", "Times a thread went to sleep or woke");

/// Sums over several runtimes; per thread where upstream's families are.
#[derive(Debug)]
pub(super) struct Runtimes {
    /// By the names of their threads.
    runtimes: Vec<(String, Handle)>,
    descriptions: Vec<Desc>,
}

impl Runtimes {
    pub(super) fn new(runtimes: Vec<(String, Handle)>) -> Self {
        let plain = [WORKERS, TASKS, QUEUE].map(|(name, help)| Opts::new(name, help));
        let by_worker = [BUSY, PARKS, UNPARKS].map(|(name, help)| Opts::new(name, help).variable_label("worker"));
        let describe = |opts: Opts| prometheus::core::Describer::describe(&opts).expect("constant names are valid");
        Self { runtimes, descriptions: plain.into_iter().chain(by_worker).map(describe).collect() }
    }

    fn sum(&self, of: fn(&RuntimeMetrics) -> usize) -> Vec<Metric> {
        let sum: usize = self.runtimes.iter().map(|(_, runtime)| of(&runtime.metrics())).sum();
        vec![gauge(sum as f64)]
    }

    fn by_worker(&self, of: fn(&RuntimeMetrics, usize) -> f64) -> Vec<Metric> {
        let threads = self.runtimes.iter().flat_map(|(name, runtime)| {
            let metrics = runtime.metrics();
            let threads = metrics.num_workers();
            let label = move |i: usize| if threads == 1 { name.clone() } else { format!("{name}-{i}") };
            (0..threads).map(move |i| labelled(counter(of(&metrics, i)), label(i)))
        });
        threads.collect()
    }
}

fn labelled(mut metric: Metric, worker: String) -> Metric {
    let mut pair = LabelPair::default();
    pair.set_name("worker".to_owned());
    pair.set_value(worker);
    metric.set_label(vec![pair]);
    metric
}

impl Collector for Runtimes {
    fn desc(&self) -> Vec<&Desc> {
        self.descriptions.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        vec![
            family(WORKERS, MetricType::GAUGE, self.sum(RuntimeMetrics::num_workers)),
            family(TASKS, MetricType::GAUGE, self.sum(RuntimeMetrics::num_alive_tasks)),
            family(QUEUE, MetricType::GAUGE, self.sum(RuntimeMetrics::global_queue_depth)),
            family(
                BUSY,
                MetricType::COUNTER,
                self.by_worker(|metrics, i| metrics.worker_total_busy_duration(i).as_secs_f64()),
            ),
            family(PARKS, MetricType::COUNTER, self.by_worker(|metrics, i| metrics.worker_park_count(i) as f64)),
            family(
                UNPARKS,
                MetricType::COUNTER,
                self.by_worker(|metrics, i| metrics.worker_park_unpark_count(i) as f64),
            ),
        ]
    }
}
