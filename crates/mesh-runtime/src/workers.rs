//! Data-plane threads: each a current-thread runtime with a `LocalSet`, so that what lives on a worker needs no locks.
//!
//! Work is sent to a worker as a closure that makes a future there; the future need not be `Send`.

use std::{
    cell::Cell,
    future::Future,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot},
    task::LocalSet,
};
use tokio_util::sync::CancellationToken;

type Job = Box<dyn FnOnce() -> Pin<Box<dyn Future<Output = ()>>> + Send>;

/// Jobs in flight to one worker; senders wait beyond it.
const JOB_QUEUE: usize = 1024;

thread_local! {
    static CURRENT: Cell<Option<usize>> = const { Cell::new(None) };
}

/// The threads. Dropping it stops them: their tasks are dropped where they stand.
#[derive(Debug)]
pub struct Workers {
    handles: Vec<WorkerHandle>,
    threads: Vec<JoinHandle<()>>,
    runtimes: Vec<Handle>,
    stop: CancellationToken,
}

/// A way to run things on one worker.
#[derive(Clone, Debug)]
pub struct WorkerHandle {
    index: usize,
    jobs: mpsc::Sender<Job>,
    load: Arc<AtomicUsize>,
}

/// The worker is gone: the process is shutting down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("worker thread has stopped")]
pub struct WorkerGone;

impl Workers {
    /// Starts `count` threads (at least one) named `<name>-<index>`.
    ///
    /// # Errors
    /// When a thread or its runtime cannot be made.
    pub fn spawn(count: usize, name: &str) -> io::Result<Self> {
        let mut workers =
            Self { handles: Vec::new(), threads: Vec::new(), runtimes: Vec::new(), stop: CancellationToken::new() };
        for index in 0..count.max(1) {
            let (jobs, queue) = mpsc::channel(JOB_QUEUE);
            let stop = workers.stop.clone();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            workers.runtimes.push(runtime.handle().clone());
            let thread = std::thread::Builder::new().name(format!("{name}-{index}")).spawn(move || {
                CURRENT.set(Some(index));
                let local = LocalSet::new();
                local.block_on(&runtime, run(queue, stop));
            })?;
            workers.handles.push(WorkerHandle { index, jobs, load: Arc::default() });
            workers.threads.push(thread);
        }
        Ok(workers)
    }

    pub fn handles(&self) -> &[WorkerHandle] {
        &self.handles
    }

    /// The runtime of each worker, for its figures only.
    pub fn runtimes(&self) -> &[Handle] {
        &self.runtimes
    }

    /// Stops the workers, dropping what still runs on them, and joins their threads. Blocks.
    pub fn join(mut self) {
        self.stop.cancel();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a worker thread panicked");
            }
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn run(mut queue: mpsc::Receiver<Job>, stop: CancellationToken) {
    // On return the LocalSet drops its tasks.
    let jobs = async {
        while let Some(job) = queue.recv().await {
            tokio::task::spawn_local(job());
        }
    };
    stop.run_until_cancelled(jobs).await;
}

impl WorkerHandle {
    pub fn index(&self) -> usize {
        self.index
    }

    /// Whether the caller runs on this worker.
    pub fn is_current(&self) -> bool {
        current() == Some(self.index)
    }

    /// Runs `make`'s future on the worker, detached.
    ///
    /// # Errors
    /// [`WorkerGone`] after shutdown.
    pub async fn spawn<M, F>(&self, make: M) -> Result<(), WorkerGone>
    where
        M: FnOnce() -> F + Send + 'static,
        F: Future<Output = ()> + 'static,
    {
        self.jobs.send(Box::new(move || Box::pin(make()))).await.map_err(|_| WorkerGone)
    }

    /// [`Self::spawn`] without waiting.
    ///
    /// # Errors
    /// [`WorkerGone`] after shutdown, and also when the worker's queue is full: the caller sheds.
    pub fn try_spawn<M, F>(&self, make: M) -> Result<(), WorkerGone>
    where
        M: FnOnce() -> F + Send + 'static,
        F: Future<Output = ()> + 'static,
    {
        self.jobs.try_send(Box::new(move || Box::pin(make()))).map_err(|_| WorkerGone)
    }

    /// Runs `make`'s future on the worker and returns its result.
    ///
    /// # Errors
    /// [`WorkerGone`] after shutdown, or when the future panicked.
    pub async fn run<M, F, T>(&self, make: M) -> Result<T, WorkerGone>
    where
        M: FnOnce() -> F + Send + 'static,
        F: Future<Output = T> + 'static,
        T: Send + 'static,
    {
        let (done, result) = oneshot::channel();
        self.spawn(move || {
            let future = make();
            async move {
                // The asker may have gone away; then nobody wants the result.
                drop(done.send(future.await));
            }
        })
        .await?;
        result.await.map_err(|_| WorkerGone)
    }

    /// Open flows on this worker; compare between workers to place new ones.
    pub fn load(&self) -> usize {
        self.load.load(Ordering::Relaxed)
    }

    /// Counts one flow on this worker until dropped.
    pub fn occupy(&self) -> Occupied {
        self.load.fetch_add(1, Ordering::Relaxed);
        Occupied(self.load.clone())
    }
}

/// See [`WorkerHandle::occupy`].
#[derive(Debug)]
pub struct Occupied(Arc<AtomicUsize>);

impl Drop for Occupied {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The index of the worker the caller runs on.
pub fn current() -> Option<usize> {
    CURRENT.get()
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;

    #[tokio::test]
    async fn runs_futures_that_are_not_send_on_their_worker() {
        let workers = Workers::spawn(2, "test").unwrap();
        for handle in workers.handles() {
            let local = handle.clone();
            let seen = handle
                .run(move || async move {
                    let shared = Rc::new(local.is_current());
                    tokio::task::yield_now().await;
                    (current(), *shared)
                })
                .await
                .unwrap();
            assert_eq!(seen, (Some(handle.index()), true));
        }
        tokio::task::spawn_blocking(|| workers.join()).await.unwrap();
    }

    #[tokio::test]
    async fn a_panicking_task_costs_only_itself() {
        let workers = Workers::spawn(1, "test").unwrap();
        let handle = &workers.handles()[0];
        assert_eq!(handle.run(|| async { panic!("one connection") }).await, Err::<(), _>(WorkerGone));
        assert_eq!(handle.run(|| async { 7 }).await, Ok(7));
    }

    #[test]
    fn load_counts_what_is_held() {
        let workers = Workers::spawn(1, "test").unwrap();
        let handle = &workers.handles()[0];
        let (a, b) = (handle.occupy(), handle.occupy());
        assert_eq!(handle.load(), 2);
        drop((a, b));
        assert_eq!(handle.load(), 0);
    }
}
