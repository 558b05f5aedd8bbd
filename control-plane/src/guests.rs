//! Connections of which no call has been accepted yet.
//!
//! Anybody may connect, and a peer that answers pings is never silent. So until it has shown who it is a connection is a guest's: an
//! address has few of them, there are not many in all, and none stays for long. Who comes when it is full takes the place of the one
//! that has been there longest, of his own address or of the one that has most: nobody is kept out by what others hold.

use std::{
    collections::{HashMap, VecDeque},
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// How many guests there may be. Of an address fewer than there are handshakes at once, so that no address keeps the others out of those.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) per_address: usize,
    pub(crate) in_all: usize,
}

/// Which connections are guests'.
#[derive(Clone, Debug)]
pub(crate) struct Guests {
    limits: Limits,
    book: Arc<Mutex<Book>>,
}

#[derive(Debug, Default)]
struct Book {
    /// Longest there first; of no address an empty list.
    by_address: HashMap<IpAddr, VecDeque<Arc<Inner>>>,
    count: usize,
}

/// A connection's place. Left when dropped.
#[derive(Debug)]
pub(crate) struct Guest(Peer);

/// Who is at the other end of a connection, for the calls that come over it.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    inner: Arc<Inner>,
    book: Arc<Mutex<Book>>,
}

#[derive(Debug)]
struct Inner {
    address: IpAddr,
    accepted: AtomicBool,
    displaced: CancellationToken,
}

fn lock(book: &Mutex<Book>) -> MutexGuard<'_, Book> {
    // Nothing in between its changes can panic.
    book.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Guests {
    pub(crate) fn new(limits: Limits) -> Self {
        Self { limits, book: Arc::default() }
    }

    /// Takes in a connection from `address`; whether another has to go for it.
    pub(crate) fn admit(&self, address: IpAddr) -> (Guest, bool) {
        let address = address.to_canonical();
        let inner = Inner { address, accepted: AtomicBool::new(false), displaced: CancellationToken::new() };
        let inner = Arc::new(inner);
        let mut book = lock(&self.book);
        let displaced = match book.by_address.get(&address) {
            Some(own) if own.len() >= self.limits.per_address => book.displace(address),
            _ if book.count >= self.limits.in_all => {
                let most = book.by_address.iter().max_by_key(|(_, guests)| guests.len()).map(|(address, _)| *address);
                most.is_some_and(|address| book.displace(address))
            }
            _ => false,
        };
        book.by_address.entry(address).or_default().push_back(inner.clone());
        book.count += 1;
        drop(book);
        (Guest(Peer { inner, book: self.book.clone() }), displaced)
    }
}

impl Book {
    fn displace(&mut self, address: IpAddr) -> bool {
        let longest = self.by_address.get(&address).and_then(VecDeque::front).cloned();
        longest.inspect(|longest| self.remove(longest)).inspect(|longest| longest.displaced.cancel()).is_some()
    }

    fn remove(&mut self, guest: &Arc<Inner>) {
        let Some(guests) = self.by_address.get_mut(&guest.address) else { return };
        let before = guests.len();
        guests.retain(|other| !Arc::ptr_eq(other, guest));
        self.count -= before - guests.len();
        if guests.is_empty() {
            self.by_address.remove(&guest.address);
        }
    }
}

impl Guest {
    pub(crate) fn peer(&self) -> &Peer {
        &self.0
    }

    /// Whether a call was accepted: then it is a guest no more.
    pub(crate) fn is_accepted(&self) -> bool {
        self.0.inner.accepted.load(Ordering::Acquire)
    }

    /// Completes when somebody else needs the place.
    pub(crate) fn displaced(&self) -> WaitForCancellationFutureOwned {
        self.0.inner.displaced.clone().cancelled_owned()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        lock(&self.0.book).remove(&self.0.inner);
    }
}

impl Peer {
    pub(crate) fn address(&self) -> IpAddr {
        self.inner.address
    }

    /// A call was accepted: the connection may stay, and takes no guest's place.
    pub(crate) fn accept(&self) {
        if !self.inner.accepted.swap(true, Ordering::AcqRel) {
            lock(&self.book).remove(&self.inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { per_address: 2, in_all: 4 };

    fn from(last: u8) -> IpAddr {
        [10, 0, 0, last].into()
    }

    fn is_displaced(guest: &Guest) -> bool {
        guest.0.inner.displaced.is_cancelled()
    }

    #[test]
    fn an_address_that_has_all_its_places_gives_up_its_own_oldest() {
        let guests = Guests::new(LIMITS);
        let (other, _) = guests.admit(from(2));
        let (first, _) = guests.admit(from(1));
        let (second, displaced) = guests.admit(IpAddr::from([10, 0, 0, 1]).to_canonical());
        assert!(!displaced);
        let mapped = std::net::Ipv4Addr::new(10, 0, 0, 1).to_ipv6_mapped();
        let (third, displaced) = guests.admit(mapped.into());
        assert!(displaced && is_displaced(&first), "the same address, however it is written");
        assert!([&other, &second, &third].iter().all(|guest| !is_displaced(guest)));
    }

    #[test]
    fn when_all_places_are_taken_the_address_that_has_most_gives_up_its_oldest() {
        let guests = Guests::new(LIMITS);
        let (single, _) = guests.admit(from(3));
        let many = [1, 1, 2].map(|last| guests.admit(from(last)).0);
        let (newcomer, displaced) = guests.admit(from(4));
        assert!(displaced && is_displaced(&many[0]));
        assert!([&single, &many[1], &many[2], &newcomer].iter().all(|guest| !is_displaced(guest)));
    }

    #[test]
    fn who_was_accepted_or_has_left_takes_no_place() {
        let guests = Guests::new(LIMITS);
        let (accepted, _) = guests.admit(from(1));
        accepted.peer().clone().accept();
        assert!(accepted.is_accepted());
        for _ in 0..9 {
            drop(guests.admit(from(1)));
        }
        let (_stays, displaced) = guests.admit(from(1));
        assert!(!displaced && !is_displaced(&accepted));
        drop(accepted);
        assert_eq!(lock(&guests.book).count, 1);
        assert_eq!(lock(&guests.book).by_address.len(), 1);
    }
}
