//! Bytes on their way into the counters: at the end of a flow, and now and then while it is open. A worker has one timer for all its
//! flows, and none while it has no flow, so an idle one costs no wake-up.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use mesh_net::Progress;
use tokio::time::sleep;

use crate::{
    dense::{Dense, Place, Placed},
    flow::Direction,
    metrics::Series,
};

/// Between two counts of a long flow's bytes.
const INTERVAL: Duration = Duration::from_secs(5);

thread_local! {
    /// Of this worker: as many as open flows.
    static OPEN: RefCell<Dense<Rc<Meter>>> = RefCell::default();
    static COUNTING: Cell<bool> = const { Cell::new(false) };
}

/// The bytes of one flow, and the series they count for.
#[derive(Debug)]
pub(crate) struct Meter {
    series: Arc<Series>,
    progress: Rc<Progress>,
    /// Sent and received, as far as counted.
    counted: Cell<(u64, u64)>,
    direction: Direction,
    /// Among the open ones of its worker.
    followed: Cell<bool>,
    ended: Cell<bool>,
    place: Place,
}

impl Meter {
    pub(crate) fn new(series: Arc<Series>, direction: Direction) -> Rc<Self> {
        Rc::new(Self {
            series,
            progress: Rc::default(),
            counted: Cell::default(),
            direction,
            followed: Cell::default(),
            ended: Cell::default(),
            place: Place::default(),
        })
    }

    pub(crate) fn series(&self) -> &Arc<Series> {
        &self.series
    }

    pub(crate) fn progress(&self) -> &Rc<Progress> {
        &self.progress
    }

    /// Counts what has moved since the last time.
    pub(crate) fn count(&self) {
        let moved = (self.progress.sent.get(), self.progress.received.get());
        let before = self.counted.replace(moved);
        if moved == before {
            return;
        }
        let (up, down) = (moved.0.saturating_sub(before.0), moved.1.saturating_sub(before.1));
        let (to_server, to_client) = match self.direction {
            Direction::Outbound => (up, down),
            Direction::Inbound => (down, up),
        };
        self.series.received.fetch_add(to_server, Relaxed);
        self.series.sent.fetch_add(to_client, Relaxed);
    }

    /// Counts now and then from now on, until the end. Call once, within a `LocalSet`.
    pub(crate) fn follow(self: &Rc<Self>) {
        self.followed.set(true);
        OPEN.with_borrow_mut(|open| open.add(self.clone()));
        if !COUNTING.replace(true) {
            tokio::task::spawn_local(count(Counting));
        }
    }

    /// Counts for the last time. False when that has been done.
    pub(crate) fn end(&self) -> bool {
        if self.ended.replace(true) {
            return false;
        }
        self.count();
        if self.followed.replace(false) {
            OPEN.with_borrow_mut(|open| open.remove(self));
        }
        true
    }
}

impl Placed for Meter {
    fn place(&self) -> &Place {
        &self.place
    }
}

/// The worker's timer runs.
struct Counting;

impl Drop for Counting {
    fn drop(&mut self) {
        COUNTING.set(false);
    }
}

/// Until no flow is open.
async fn count(_counting: Counting) {
    loop {
        sleep(INTERVAL).await;
        let open = OPEN.with_borrow(|open| {
            open.iter().for_each(|meter| meter.count());
            open.len()
        });
        if open == 0 {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use mesh_runtime::metrics::Registry;
    use tokio::task::{LocalSet, yield_now};

    use super::*;
    use crate::{
        flow::Flow,
        metrics::{Metrics, TrafficLabels},
    };

    fn meter(metrics: &Metrics) -> Rc<Meter> {
        let flow = Flow::new(Direction::Outbound, ([10, 0, 0, 1], 1).into(), ([10, 0, 0, 2], 2).into());
        Meter::new(metrics.traffic.series(TrafficLabels::of(&flow)), Direction::Outbound)
    }

    #[tokio::test(start_paused = true)]
    async fn open_flows_are_counted_by_one_timer_that_ends_after_the_last() {
        let metrics = Metrics::new(&Registry::new());
        let (one, other) = (meter(&metrics), meter(&metrics));
        let counted = || one.series().received.load(Relaxed);
        LocalSet::new()
            .run_until(async {
                one.follow();
                other.follow();
                yield_now().await;
                one.progress().sent.set(5);
                other.progress().sent.set(7);
                assert_eq!(counted(), 0);
                sleep(INTERVAL).await;
                yield_now().await;
                assert_eq!(counted(), 12);
                one.progress().sent.set(6);
                assert!(one.end() && other.end() && !one.end());
                assert_eq!(counted(), 13);
                sleep(INTERVAL).await;
                yield_now().await;
                assert!(!COUNTING.get());
                let again = meter(&metrics);
                again.follow();
                yield_now().await;
                again.progress().sent.set(2);
                sleep(INTERVAL).await;
                yield_now().await;
                assert_eq!(counted(), 15);
            })
            .await;
    }
}
