//! Peers served at once, of whom nobody knows yet whether they mean well.
//!
//! Who comes when it is full takes the place of whoever has been there longest. Were newcomers to wait instead, as many peers as there
//! are places could keep everybody out by doing nothing; so they have to come anew, all of them, within the moment that an honest
//! request takes. Where many honest ones come at once and that moment is work, the newest wait for it ([`Crowd::room`]): were each to
//! displace one that is nearly done, none would ever be.

use std::{collections::VecDeque, time::Duration};

use tokio::{
    task::{AbortHandle, JoinError, JoinSet},
    time::Instant,
};

/// A bounded set of tasks. They end with it.
#[derive(Debug)]
pub struct Crowd {
    places: usize,
    tasks: JoinSet<()>,
    /// Longest there first; also some that have ended.
    handles: VecDeque<(AbortHandle, Instant)>,
}

impl Crowd {
    pub fn new(places: usize) -> Self {
        Self { places: places.max(1), tasks: JoinSet::new(), handles: VecDeque::new() }
    }

    /// Runs `task`; whether another had to go for it.
    pub fn admit(&mut self, task: impl Future<Output = ()> + Send + 'static) -> bool {
        let displaced = if self.has_room() { None } else { self.handles.pop_front() };
        self.handles.push_back((self.tasks.spawn(task), Instant::now()));
        displaced.inspect(|(handle, _)| handle.abort()).is_some()
    }

    /// Waits until there is room, or whoever has been there longest has had `moment`. Cancel safe.
    pub async fn room(&mut self, moment: Duration) {
        while !self.has_room() {
            let Some((_, since)) = self.handles.front() else { return };
            let had_it = tokio::time::sleep_until(*since + moment);
            tokio::select! {
                () = had_it => return,
                _ = self.tasks.join_next() => {}
            }
        }
    }

    fn has_room(&mut self) -> bool {
        while self.tasks.try_join_next().is_some() {}
        self.handles.retain(|(handle, _)| !handle.is_finished());
        self.handles.len() < self.places
    }

    /// The next task that ends; `None` when there is none. Cancel safe.
    pub async fn ended(&mut self) -> Option<Result<(), JoinError>> {
        self.tasks.join_next().await
    }

    pub fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    /// Waits for all of them.
    pub async fn finish(mut self) {
        while self.tasks.join_next().await.is_some() {}
    }

    /// Ends all of them.
    pub async fn shutdown(mut self) {
        self.tasks.shutdown().await;
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn a_newcomer_takes_the_place_of_the_one_there_longest_and_of_nobody_while_there_is_room() {
        let mut crowd = Crowd::new(2);
        let stay = || {
            let (mut here, gone) = oneshot::channel::<()>();
            let task = async move {
                here.closed().await;
            };
            (task, gone)
        };
        let ((first, first_ends), (second, _second_stays), (third, _third_stays)) = (stay(), stay(), stay());
        assert!(!crowd.admit(first));
        assert!(!crowd.admit(second));
        assert!(crowd.admit(third));
        assert!(first_ends.await.is_err(), "the first was ended");
        assert!(crowd.ended().await.is_some_and(|ended| ended.is_err()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_newcomer_waits_for_a_moment_or_until_somebody_leaves() {
        const MOMENT: Duration = Duration::from_secs(1);
        let mut crowd = Crowd::new(2);
        let began = Instant::now();
        let stay = |span: Duration| async move { tokio::time::sleep(span).await };
        for _ in 0..2 {
            crowd.room(MOMENT).await;
            assert!(!crowd.admit(stay(10 * MOMENT)));
        }
        assert_eq!(began.elapsed(), Duration::ZERO, "there was room");
        crowd.room(MOMENT).await;
        assert_eq!(began.elapsed(), MOMENT);
        assert!(crowd.admit(stay(MOMENT / 4)), "whoever was there longest has had his moment");
        assert!(crowd.admit(stay(10 * MOMENT)));
        crowd.room(MOMENT).await;
        assert_eq!(began.elapsed(), MOMENT + MOMENT / 4, "one has left");
    }

    #[tokio::test]
    async fn who_has_finished_holds_no_place() {
        let mut crowd = Crowd::new(1);
        for _ in 0..3 {
            assert!(!crowd.admit(async {}));
            while !crowd.handles.iter().all(|(handle, _)| handle.is_finished()) {
                tokio::task::yield_now().await;
            }
        }
        crowd.finish().await;
    }
}
