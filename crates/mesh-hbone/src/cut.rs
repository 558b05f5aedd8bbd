//! Ending a tunnel from outside, when its owner learns that it should not be.

use std::{cell::RefCell, rc::Rc, task::Waker};

use mesh_core::reason::Reason;

use crate::error::Error;

/// Ends one tunnel at once, with all its streams. Clones are for the same tunnel. An `Rc`: nothing is locked for it on the data path.
#[derive(Clone, Debug)]
pub struct Cut(Rc<RefCell<State>>);

#[derive(Debug)]
enum State {
    /// Whom to wake; nobody before the tunnel runs.
    Uncut(Option<Waker>),
    Cut {
        reason: Reason,
        message: &'static str,
    },
}

impl Cut {
    pub(crate) fn new() -> Self {
        Self(Rc::new(RefCell::new(State::Uncut(None))))
    }

    /// Every stream of the tunnel ends with [`Error::Cut`], the peer's side with its TCP connection. The first time counts.
    pub fn cut(&self, reason: Reason, message: &'static str) {
        let mut state = self.0.borrow_mut();
        if let State::Uncut(waker) = &mut *state {
            let waker = waker.take();
            *state = State::Cut { reason, message };
            waker.into_iter().for_each(Waker::wake);
        }
    }

    /// Whether the tunnel has ended, so that there is nothing left to cut.
    pub fn is_over(&self) -> bool {
        Rc::strong_count(&self.0) == 1
    }

    /// Why the tunnel must end; else `waker` is woken when it must.
    pub(crate) fn poll(&self, waker: &Waker) -> Option<Error> {
        match &mut *self.0.borrow_mut() {
            State::Uncut(Some(known)) if known.will_wake(waker) => None,
            State::Uncut(known) => {
                *known = Some(waker.clone());
                None
            }
            State::Cut { reason, message } => Some(Error::Cut { reason: *reason, message }),
        }
    }
}
