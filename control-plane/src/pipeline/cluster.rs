//! The pipeline of a Kubernetes cluster.

use std::{sync::Arc, time::Duration};

use kube::Client;
use mesh_runtime::drain::DrainWatcher;
use tokio::{sync::mpsc, task::JoinError, time::Instant};

use super::Pipeline;
use crate::{
    app::TaskFailed,
    metrics::Metrics,
    objects::Settings,
    source::kubernetes::{Feed, Objects, Told, Turn},
    status::{self, Sink},
};

/// What happens within this time of an event is published with it: a burst costs one step.
const WINDOW: Duration = Duration::from_millis(3);
/// Events of each queue in one step, so that a flood of one kind holds back no other.
const BATCH: usize = 1024;

pub(crate) struct ClusterPipeline {
    objects: Objects,
    pipeline: Pipeline,
    sink: Arc<Sink>,
    metrics: Metrics,
}

impl ClusterPipeline {
    pub(crate) fn new(objects: Objects, pipeline: Pipeline, sink: Arc<Sink>, metrics: Metrics) -> Self {
        let mut new = Self { objects, pipeline, sink, metrics };
        new.await_lists();
        new
    }

    /// Follows an API server until the drain. On a thread of its own: however much there is to be written to clients, events get in,
    /// and an endpoint that goes need not wait until all have read of something else.
    pub(crate) async fn run(
        self,
        api_server: kube::Config,
        settings: Settings,
        drain: DrainWatcher,
    ) -> Result<(), TaskFailed> {
        let following = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.map_err(TaskFailed::of("the source"))?.block_on(async move {
                // Its connections live on this thread, so the client is nobody else's.
                let client = Client::try_from(api_server).map_err(TaskFailed::of("the source"))?;
                self.follow(Feed::start(&client, &settings), drain).await
            })
        };
        let followed = tokio::task::spawn_blocking(following).await;
        followed.map_err(TaskFailed::of::<JoinError>("the source"))?
    }

    async fn follow(self, mut feed: Feed, drain: DrainWatcher) -> Result<(), TaskFailed> {
        let mut pipeline = self;
        loop {
            let batch = tokio::select! {
                batch = batch(&mut feed) => batch,
                _ = drain.signalled() => return Ok(()),
            };
            let Some(batch) = batch else {
                return Err(TaskFailed::of("the source")("its watches ended without being told to"));
            };
            let step = tokio::task::spawn_blocking(|| pipeline.step(batch));
            pipeline = step.await.map_err(TaskFailed::of::<JoinError>("the source"))?;
        }
    }

    /// Takes in what was told and, once every kind is known, publishes what follows. Computes for a while if it is much.
    fn step(mut self, batch: Vec<Told>) -> Self {
        let oldest = batch.iter().map(|told| told.at).min();
        for told in batch {
            let turn = self.objects.on(told);
            turn.iter().for_each(|turn| self.note(turn));
        }
        // Half of the objects would be another mesh than the one there is.
        let complete = self.objects.awaited().next().is_none();
        if complete {
            let changes = self.objects.changes();
            self.pipeline.apply(changes);
            self.state();
        }
        self.pipeline.report(self.objects.problems(), self.objects.watch_problems(), Default::default());
        if !complete {
            self.await_lists();
        } else if self.pipeline.is_starting() {
            self.pipeline.set_ready(self.objects.len());
        } else if let Some(oldest) = oldest {
            self.metrics.event_to_publish.observe(oldest.elapsed().as_secs_f64());
        }
        self
    }

    /// Has objects be told what came of them, where that is not what they say already.
    fn state(&mut self) {
        let mut keys = self.pipeline.index.take_evaluated();
        keys.extend(self.objects.take_restated());
        let now = status::now();
        for key in keys {
            let told = self.objects.stated(&key).and_then(|(stated, problems)| {
                let wanted = status::wanted(&key, stated, problems, &self.pipeline.index);
                status::difference(&wanted, &stated.status, &now)
            });
            self.sink.set(key, told);
        }
    }

    fn await_lists(&mut self) {
        let kinds: Vec<&str> = self.objects.awaited().map(|kind| kind.name()).collect();
        self.pipeline.awaits(format!("the first list of {}", kinds.join(", ")));
    }

    fn note(&self, turn: &Turn) {
        match turn {
            Turn::Failed(kind, why) => match self.metrics.watch_failed(kind.name()) {
                true => tracing::warn!(kind = kind.name(), why, "the watch failed; what was read stays in force"),
                false => tracing::debug!(kind = kind.name(), why, "the watch failed again"),
            },
            Turn::Recovered(kind) => {
                self.metrics.watch_recovered(kind.name());
                tracing::info!(kind = kind.name(), "the watch goes on");
            }
            Turn::Unknown(kind) => {
                self.metrics.watch_recovered(kind.name());
                tracing::info!(kind = kind.name(), "the cluster does not know this kind; it is looked for again");
            }
        }
    }
}

/// The next events: first those of pods, then the others. `None` when the watches have ended.
async fn batch(feed: &mut Feed) -> Option<Vec<Told>> {
    let first = tokio::select! {
        told = feed.urgent.recv() => told?,
        told = feed.other.recv() => told?,
    };
    let mut batch = vec![first];
    tokio::time::sleep_until(Instant::now() + WINDOW).await;
    let waiting =
        |queue: &mut mpsc::Receiver<Told>| std::iter::from_fn(|| queue.try_recv().ok()).take(BATCH).collect::<Vec<_>>();
    batch.extend(waiting(&mut feed.urgent));
    batch.extend(waiting(&mut feed.other));
    Some(batch)
}
