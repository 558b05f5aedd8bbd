//! Reconnect delays: doubled, capped, jittered.

use std::time::Duration;

use rand::RngExt as _;

/// First delay 10 ms, doubled up to 15 s unless told otherwise, each drawn from the upper half of its range so that a restarted
/// server is not met by every client at once.
#[derive(Clone, Debug)]
pub struct Backoff {
    attempt: u32,
    cap: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self::capped(Self::CAP)
    }
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(10);
    const CAP: Duration = Duration::from_secs(15);

    /// No delay is longer than this.
    pub fn capped(cap: Duration) -> Self {
        Self { attempt: 0, cap }
    }

    /// The next delay. `rng` decides the jitter.
    pub fn next_delay(&mut self, rng: &mut impl rand::Rng) -> Duration {
        let full = Self::FIRST.saturating_mul(1 << self.attempt.min(16)).min(self.cap);
        self.attempt = self.attempt.saturating_add(1);
        full.mul_f64(rng.random_range(0.5..=1.0))
    }

    /// Call when the peer has proved healthy.
    pub fn reset(&mut self) {
        self.attempt = 0;
    }
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::StdRng};

    use super::*;

    #[test]
    fn grows_to_its_cap_and_starts_over() {
        let mut rng = StdRng::seed_from_u64(1);
        let mut backoff = Backoff::default();
        assert!(backoff.next_delay(&mut rng) <= Duration::from_millis(10));
        let last = (0..40).map(|_| backoff.next_delay(&mut rng)).last().unwrap();
        assert!(last >= Backoff::CAP / 2 && last <= Backoff::CAP);
        backoff.reset();
        assert!(backoff.next_delay(&mut rng) <= Duration::from_millis(10));
        let mut capped = Backoff::capped(Duration::from_secs(1));
        assert!((0..40).all(|_| capped.next_delay(&mut rng) <= Duration::from_secs(1)));
    }
}
