//! Others that change the chain too: who it may be, and how long to hold back.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use super::{
    conflist::{Conf, PLUGIN},
    plan::Files,
};

/// Who changes the configuration, as far as it shows.
pub(super) fn suspect(files: &Files) -> String {
    let types: Vec<String> = files
        .values()
        .filter_map(|content| Conf::parse(content.as_ref().ok()?).ok())
        .flat_map(|conf| conf.types())
        .filter(|kind| kind != PLUGIN)
        .collect();
    hint(&types)
}

fn hint(types: &[String]) -> String {
    let remedy = if types.iter().any(|kind| kind.contains("cilium")) {
        "set cni.exclusive=false for Cilium"
    } else {
        "let it keep other plugins' entries, or give us a file of our own (FAIRWAY_OWNED_CNI_CONFIG=true)"
    };
    format!("the chain's other plugins are {}; {remedy}", types.join(", "))
}

/// Tells a fight with another program from single changes.
#[derive(Debug, Default)]
pub(super) struct Fight {
    blows: VecDeque<Instant>,
    rounds: u32,
}

impl Fight {
    const WINDOW: Duration = Duration::from_secs(5);
    const PATIENCE: usize = 5;
    const LONGEST: Duration = Duration::from_secs(30);

    /// How long to hold back after having put something right once more; longer with every round.
    pub(super) fn mended(&mut self, now: Instant) -> Option<Duration> {
        let calm = self.blows.back().is_none_or(|last| now.duration_since(*last) > Self::LONGEST * 2);
        if calm {
            self.rounds = 0;
        }
        self.blows.push_back(now);
        let window = if self.rounds > 0 { Self::LONGEST * 2 } else { Self::WINDOW };
        while self.blows.front().is_some_and(|blow| now.duration_since(*blow) > window) {
            self.blows.pop_front();
        }
        let fights = self.rounds > 0 || self.blows.len() > Self::PATIENCE;
        fights.then(|| {
            self.rounds = (self.rounds + 1).min(6);
            Duration::from_secs(1 << (self.rounds - 1)).min(Self::LONGEST)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fight_slows_us_down_and_single_changes_do_not() {
        let start = Instant::now();
        let mut calm = Fight::default();
        for minute in 0..20 {
            assert_eq!(calm.mended(start + Duration::from_secs(10 * minute)), None);
        }
        let (mut fight, mut now) = (Fight::default(), start);
        for _ in 0..5 {
            assert_eq!(fight.mended(now), None);
        }
        let mut delays = Vec::new();
        for _ in 0..8 {
            let delay = fight.mended(now).expect("a fight");
            delays.push(delay.as_secs());
            now += delay;
        }
        assert_eq!(delays, [1, 2, 4, 8, 16, 30, 30, 30]);
        assert_eq!(fight.mended(now + Duration::from_secs(90)), None, "peace");
    }

    #[test]
    fn the_suspect_is_named_with_the_remedy() {
        assert!(hint(&["cilium-cni".to_owned()]).contains("cni.exclusive=false"));
        assert!(hint(&["calico".to_owned()]).contains("calico"));
    }
}
