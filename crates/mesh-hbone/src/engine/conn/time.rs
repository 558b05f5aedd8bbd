//! What happens because time passes: keep-alive, and patience that ends.

use std::time::Duration;

use super::{Conn, ConnError, Event, Leaving};
use crate::engine::{
    frame::{ErrorCode, Kind},
    limits::Abuse,
    out::Out,
};

/// PINGs of ours, numbered so that an answer is known for what it answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Pings {
    pub(super) next: u64,
    /// The oldest not answered, and when it was sent.
    pub(super) pending: Option<(u64, Duration)>,
    /// When the last answer came, or the connection began.
    pub(super) answered: Duration,
}

impl Pings {
    /// Sends one outside the rhythm; its number.
    pub(super) fn send(&mut self, out: &mut Out) -> u64 {
        let number = self.next;
        self.next = self.next.wrapping_add(1);
        out.frame(Kind::Ping, 0, 0, &number.to_be_bytes());
        number
    }

    /// Whether it was waited for.
    pub(super) fn answered(&mut self, number: u64, now: Duration) -> bool {
        let awaited = self.pending.is_some_and(|(pending, _)| pending == number);
        if awaited {
            self.pending = None;
            self.answered = now;
        }
        awaited
    }
}

impl Conn {
    /// When [`Self::on_time`] has something to do.
    pub fn next_deadline(&self) -> Duration {
        let ping = match self.pings.pending {
            Some((_, sent)) => sent + self.local.ping_timeout,
            None => self.pings.answered + self.local.ping_interval,
        };
        let opening = (!self.peer.known || !self.settings_acked).then_some(self.local.handshake_timeout);
        let leaving = match self.leaving {
            Leaving::Announced { deadline, .. } => Some(deadline),
            Leaving::No | Leaving::Final { .. } => None,
        };
        [opening, leaving, self.slow_block()].into_iter().flatten().fold(ping, Duration::min)
    }

    /// Does what is due; see [`Self::set_now`].
    ///
    /// # Errors
    /// When the peer let a deadline pass.
    pub fn on_time(&mut self, out: &mut Out) -> Result<(), ConnError> {
        let now = self.now;
        if now >= self.local.handshake_timeout {
            if !self.peer.known {
                return Err(silent(ErrorCode::SETTINGS_TIMEOUT, "HTTP/2 handshake did not finish in time"));
            }
            if !self.settings_acked {
                return Err(silent(ErrorCode::SETTINGS_TIMEOUT, "our SETTINGS were not acknowledged in time"));
            }
        }
        if self.slow_block().is_some_and(|deadline| now >= deadline) {
            return Err(Abuse::Continuation.into());
        }
        if let Leaving::Announced { deadline, .. } = self.leaving
            && now >= deadline
        {
            self.leave(out);
        }
        match self.pings.pending {
            Some((_, sent)) if now >= sent + self.local.ping_timeout => {
                Err(silent(ErrorCode::NO_ERROR, "the peer did not answer a PING"))
            }
            None if now >= self.pings.answered + self.local.ping_interval => {
                let number = self.pings.send(out);
                self.pings.pending = Some((number, now));
                Ok(())
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Events that did not come from input: ask after [`Self::on_time`] and after closing streams.
    pub fn pending_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }
}

fn silent(code: ErrorCode, why: &'static str) -> ConnError {
    ConnError { silent: true, ..ConnError::new(code, why) }
}
