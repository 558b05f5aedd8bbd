//! Peers served at once, of whom nobody knows yet whether they mean well.
//!
//! Who comes when it is full takes the place of whoever has been there longest. Were newcomers to wait instead, as many peers as there
//! are places could keep everybody out by doing nothing; so they have to come anew, all of them, within the moment that an honest
//! request takes.

use std::collections::VecDeque;

use tokio::task::{AbortHandle, JoinError, JoinSet};

/// A bounded set of tasks. They end with it.
#[derive(Debug)]
pub struct Crowd {
    places: usize,
    tasks: JoinSet<()>,
    /// Longest there first; also some that have ended.
    handles: VecDeque<AbortHandle>,
}

impl Crowd {
    pub fn new(places: usize) -> Self {
        Self { places: places.max(1), tasks: JoinSet::new(), handles: VecDeque::new() }
    }

    /// Runs `task`; whether another had to go for it.
    pub fn admit(&mut self, task: impl Future<Output = ()> + Send + 'static) -> bool {
        while self.tasks.try_join_next().is_some() {}
        self.handles.retain(|handle| !handle.is_finished());
        let displaced = if self.handles.len() < self.places { None } else { self.handles.pop_front() };
        self.handles.push_back(self.tasks.spawn(task));
        displaced.inspect(AbortHandle::abort).is_some()
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

    #[tokio::test]
    async fn who_has_finished_holds_no_place() {
        let mut crowd = Crowd::new(1);
        for _ in 0..3 {
            assert!(!crowd.admit(async {}));
            while !crowd.handles.iter().all(AbortHandle::is_finished) {
                tokio::task::yield_now().await;
            }
        }
        crowd.finish().await;
    }
}
