//! Reconnect delays: doubled, capped, jittered.

use std::time::Duration;

use rand::RngExt as _;

/// First delay 10 ms, doubled up to 15 s, each drawn from the upper half of its range so that a restarted server is not met by
/// every client at once.
#[derive(Clone, Debug, Default)]
pub struct Backoff {
    attempt: u32,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(10);
    const CAP: Duration = Duration::from_secs(15);

    /// The next delay. `rng` decides the jitter.
    pub fn next_delay(&mut self, rng: &mut impl rand::Rng) -> Duration {
        let full = Self::FIRST.saturating_mul(1 << self.attempt.min(16)).min(Self::CAP);
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
    }
}
