//! What a peer may make us do that costs it nothing: each kind of nuisance has a bucket of tokens, so that what a healthy peer does
//! now and then is never punished and what only an attacker does is (RFC 9113 §10.5).

use std::time::Duration;

use super::state::{Fields, RestoreError, Snapshot, Writer};

/// A limit that a peer ran into; the tunnel ends with ENHANCE_YOUR_CALM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Abuse {
    /// Streams opened and reset again (CVE-2023-44487).
    RapidReset,
    /// DATA without data, or nothing but padding.
    EmptyData,
    /// DATA of a few bytes, over and over, for the same stream in the same record: nobody who has more to say says it like that.
    TinyData,
    Settings,
    Ping,
    /// Header blocks in many pieces, or empty ones (CVE-2024-27316).
    Continuation,
    /// WINDOW_UPDATE by far more often than we send.
    WindowUpdate,
    /// PRIORITY, extensions, and frames for streams that are over.
    Useless,
    /// TLS records without content, KeyUpdates, session tickets.
    Records,
    /// Answers wait and wait: the peer asks but does not read.
    NeverReads,
    /// A header list beyond any patience.
    HeaderList,
}

impl Abuse {
    /// In the order of their numbers in snapshots: append only.
    pub const ALL: [Self; 11] = [
        Self::RapidReset,
        Self::EmptyData,
        Self::TinyData,
        Self::Settings,
        Self::Ping,
        Self::Continuation,
        Self::WindowUpdate,
        Self::Useless,
        Self::Records,
        Self::NeverReads,
        Self::HeaderList,
    ];

    /// As a metric's label.
    pub const fn label(self) -> &'static str {
        match self {
            Self::RapidReset => "rapid_reset",
            Self::EmptyData => "empty_data",
            Self::TinyData => "tiny_data",
            Self::Settings => "settings",
            Self::Ping => "ping",
            Self::Continuation => "continuation",
            Self::WindowUpdate => "window_update",
            Self::Useless => "useless",
            Self::Records => "records",
            Self::NeverReads => "never_reads",
            Self::HeaderList => "header_list",
        }
    }

    /// Burst, and tokens that come back each second. Zero for limits that are no rate.
    pub const fn allowance(self) -> (u32, u32) {
        match self {
            // Clients that give up on an application that hangs look the same, at some rate.
            Self::RapidReset => (500, 500),
            Self::EmptyData => (100, 100),
            Self::TinyData => (10_000, 1_000),
            Self::Settings => (50, 1),
            Self::Ping => (200, 50),
            Self::Continuation => (64, 50),
            // Each DATA frame of ours pays for two more.
            Self::WindowUpdate => (4_000, 100),
            Self::Useless => (1_000, 100),
            Self::Records => (200, 50),
            Self::NeverReads | Self::HeaderList => (0, 0),
        }
    }
}

const KINDS: usize = 9;

/// Tokens left of each rate. Time is the tunnel's: since it began.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    spent: [u32; KINDS],
    /// Whole seconds for which tokens have come back.
    refilled: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { spent: [0; KINDS], refilled: 0 }
    }
}

impl Limits {
    /// Pays for one nuisance.
    ///
    /// # Errors
    /// When there is no token left.
    pub fn spend(&mut self, kind: Abuse, now: Duration) -> Result<(), Abuse> {
        self.refill(now);
        let (burst, _) = kind.allowance();
        let Some(spent) = self.spent.get_mut(kind as usize) else { return Err(kind) };
        if *spent >= burst {
            return Err(kind);
        }
        *spent += 1;
        Ok(())
    }

    /// We have sent DATA: window updates are due.
    pub fn sent_data(&mut self, frames: u32) {
        let spent = &mut self.spent[Abuse::WindowUpdate as usize];
        *spent = spent.saturating_sub(2 * frames);
    }

    fn refill(&mut self, now: Duration) {
        let seconds = now.as_secs().saturating_sub(self.refilled);
        if seconds == 0 {
            return;
        }
        self.refilled = now.as_secs();
        let seconds = u32::try_from(seconds).unwrap_or(u32::MAX);
        for (spent, kind) in self.spent.iter_mut().zip(Abuse::ALL) {
            *spent = spent.saturating_sub(kind.allowance().1.saturating_mul(seconds));
        }
    }
}

impl Snapshot for Limits {
    fn save(&self, to: &mut Writer) {
        let bytes: Vec<u8> = self.spent.iter().flat_map(|spent| spent.to_be_bytes()).collect();
        to.bytes(1, &bytes);
        to.u64(2, self.refilled);
    }

    /// Another version's further kinds start afresh, and ours that it did not know are unspent.
    fn restore(from: &Fields<'_>) -> Result<Self, RestoreError> {
        from.only(&[1, 2])?;
        let mut limits = Self { refilled: from.u64(2)?, ..Self::default() };
        let (tokens, _) = from.bytes(1)?.as_chunks();
        for (spent, token) in limits.spent.iter_mut().zip(tokens) {
            *spent = u32::from_be_bytes(*token);
        }
        Ok(limits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_burst_is_fine_and_tokens_come_back() {
        for kind in Abuse::ALL.into_iter().take(KINDS) {
            let (burst, rate) = kind.allowance();
            let mut limits = Limits::default();
            for _ in 0..burst {
                assert_eq!(limits.spend(kind, at(0)), Ok(()));
            }
            assert_eq!(limits.spend(kind, at(0)), Err(kind));
            for _ in 0..rate {
                assert_eq!(limits.spend(kind, at(1)), Ok(()), "{kind:?}");
            }
            assert_eq!(limits.spend(kind, at(1)), Err(kind));
        }
    }

    #[test]
    fn who_sends_is_owed_window_updates() {
        let mut limits = Limits::default();
        for _ in 0..100_000 {
            limits.sent_data(1);
            assert_eq!(limits.spend(Abuse::WindowUpdate, at(0)), Ok(()));
            assert_eq!(limits.spend(Abuse::WindowUpdate, at(0)), Ok(()));
        }
    }
}
