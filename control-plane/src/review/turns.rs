//! Reviews of one address take turns, in the order in which they came.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Of an address, under way at once.
const AT_ONCE: usize = 8;
/// Under way and waiting.
const PLACES: usize = 256;

#[derive(Debug, Default)]
pub(super) struct Turns {
    by_address: Mutex<HashMap<IpAddr, Weak<Address>>>,
}

#[derive(Debug)]
struct Address {
    places: Arc<Semaphore>,
    turns: Arc<Semaphore>,
}

/// The right to ask.
#[derive(Debug)]
pub(super) struct Turn {
    _turn: OwnedSemaphorePermit,
    _place: OwnedSemaphorePermit,
    _address: Arc<Address>,
}

impl Turns {
    /// The next turn of an address; `None` if too many wait already, or it takes longer than `patience`.
    pub(super) async fn of(&self, from: IpAddr, patience: Duration) -> Option<Turn> {
        let address = self.address(from);
        let place = address.places.clone().try_acquire_owned().ok()?;
        let turn = tokio::time::timeout(patience, address.turns.clone().acquire_owned()).await.ok()?.ok()?;
        Some(Turn { _turn: turn, _place: place, _address: address })
    }

    fn address(&self, from: IpAddr) -> Arc<Address> {
        let mut by_address = self.by_address.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(address) = by_address.get(&from).and_then(Weak::upgrade) {
            return address;
        }
        by_address.retain(|_, address| address.strong_count() > 0);
        let (places, turns) = (Arc::new(Semaphore::new(PLACES)), Arc::new(Semaphore::new(AT_ONCE)));
        let address = Arc::new(Address { places, turns });
        by_address.insert(from, Arc::downgrade(&address));
        address
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt as _, future::join_all};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(5);

    #[tokio::test(start_paused = true)]
    async fn an_address_waits_for_its_own_turns_only_and_not_for_long() {
        let (turns, [busy, other]) = (Turns::default(), [1, 2].map(|last| IpAddr::from([10, 0, 0, last])));
        let held: Vec<Turn> =
            join_all((0..AT_ONCE).map(|_| turns.of(busy, PATIENCE))).await.into_iter().flatten().collect();
        assert_eq!(held.len(), AT_ONCE);
        assert!(turns.of(other, PATIENCE).now_or_never().flatten().is_some());
        assert!(turns.of(busy, PATIENCE).await.is_none(), "none comes free");
        let waiting = turns.of(busy, PATIENCE);
        let (next, ()) = tokio::join!(waiting, async { drop(held) });
        assert!(next.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_than_a_few_wait_and_nothing_is_kept_of_who_has_gone() {
        let (turns, from) = (Turns::default(), IpAddr::from([10, 0, 0, 1]));
        let all = join_all((0..PLACES + 1).map(|_| turns.of(from, PATIENCE)));
        let got = all.await;
        assert!(got[PLACES].is_none());
        assert_eq!(got.iter().flatten().count(), AT_ONCE);
        drop(got);
        drop(turns.of([10, 0, 0, 2].into(), PATIENCE).await);
        assert_eq!(turns.by_address.lock().unwrap().len(), 1);
    }
}
