//! Answers of the API server, for as long as each may be believed. No clock: time is passed in.

use std::{collections::HashMap, sync::Arc, time::Duration};

use aws_lc_rs::digest::{self, SHA256, SHA256_OUTPUT_LEN};
use tokio::time::Instant;

use super::{Bearer, Outcome};
use crate::callers::NotBelieved;

/// A good answer is asked for again after this.
const FRESH: Duration = Duration::from_secs(300);
/// A bad one: the API server may not have seen the pod yet.
const REFUSED: Duration = Duration::from_secs(10);
/// How long an old answer does while the API server does not answer, before it is asked again.
const LEAN: Duration = Duration::from_secs(10);
/// Good answers kept; a node has one, or two while its token is being replaced.
const MAX_BEARERS: usize = 32_768;
/// Bad answers kept; apart from the good ones, so that nobody's nonsense drives those out.
const MAX_REFUSED: usize = 1024;

pub(super) type Digest = [u8; SHA256_OUTPUT_LEN];

pub(super) fn digest(token: &str) -> Digest {
    let mut digest = [0; SHA256_OUTPUT_LEN];
    digest.copy_from_slice(digest::digest(&SHA256, token.as_bytes()).as_ref());
    digest
}

#[derive(Debug, Default)]
pub(super) struct Answers {
    bearers: HashMap<Digest, Kept<Bearer>>,
    refused: HashMap<Digest, Kept<Arc<str>>>,
}

#[derive(Debug)]
struct Kept<T> {
    answer: T,
    fresh_until: Instant,
    /// When the token itself expires.
    ends: Instant,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Known {
    Fresh(Outcome),
    /// Believed if there is no better answer.
    Stale(Bearer),
    Nothing,
}

impl Answers {
    pub(super) fn of(&self, digest: &Digest, now: Instant) -> Known {
        if let Some(kept) = self.refused.get(digest).filter(|kept| now < kept.fresh_until) {
            return Known::Fresh(Err(NotBelieved::Refused(kept.answer.to_string())));
        }
        match self.bearers.get(digest).filter(|kept| now < kept.ends) {
            Some(kept) if now < kept.fresh_until => Known::Fresh(Ok(kept.answer.clone())),
            Some(kept) => Known::Stale(kept.answer.clone()),
            None => Known::Nothing,
        }
    }

    /// Keeps what was answered `now` about a token that expires after `left`.
    pub(super) fn keep(&mut self, digest: Digest, outcome: Outcome, now: Instant, left: Duration) {
        let ends = now + left;
        match outcome {
            Ok(answer) => {
                self.refused.remove(&digest);
                make_room(&mut self.bearers, MAX_BEARERS, now);
                self.bearers.insert(digest, Kept { answer, fresh_until: ends.min(now + FRESH), ends });
            }
            Err(NotBelieved::Refused(why)) => {
                self.bearers.remove(&digest);
                make_room(&mut self.refused, MAX_REFUSED, now);
                let fresh_until = now + REFUSED;
                self.refused.insert(digest, Kept { answer: why.into(), fresh_until, ends: fresh_until });
            }
            Err(NotBelieved::Unknown(_)) => {}
        }
    }

    /// An old answer does for a moment more.
    pub(super) fn lean_on(&mut self, digest: &Digest, now: Instant) {
        if let Some(kept) = self.bearers.get_mut(digest) {
            kept.fresh_until = kept.ends.min(now + LEAN);
        }
    }
}

/// Lets go of what has expired, and, if that is not enough, of what expires first.
fn make_room<T>(kept: &mut HashMap<Digest, Kept<T>>, limit: usize, now: Instant) {
    if kept.len() >= limit {
        kept.retain(|_, kept| now < kept.ends);
    }
    while kept.len() >= limit {
        let Some(first) = kept.iter().min_by_key(|(_, kept)| kept.ends).map(|(digest, _)| *digest) else { return };
        kept.remove(&first);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bearer() -> Bearer {
        let [namespace, service_account, pod, pod_uid] =
            ["istio-system", "ztunnel", "z-1", "u-1"].map(Arc::<str>::from);
        Bearer { namespace, service_account, pod, pod_uid }
    }

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn a_good_answer_is_fresh_for_a_while_and_stale_until_the_token_ends() {
        let (mut answers, start) = (Answers::default(), Instant::now());
        let (long, short) = (digest("long"), digest("short"));
        answers.keep(long, Ok(bearer()), start, HOUR);
        answers.keep(short, Ok(bearer()), start, FRESH / 2);
        let stale = || Known::Stale(bearer());
        let fresh = || Known::Fresh(Ok(bearer()));
        let table = [
            (long, Duration::ZERO, fresh()),
            (long, FRESH, stale()),
            (long, HOUR, Known::Nothing),
            (short, FRESH / 3, fresh()),
            (short, FRESH / 2, Known::Nothing),
            (digest("other"), Duration::ZERO, Known::Nothing),
        ];
        for (digest, after, expected) in table {
            assert_eq!(answers.of(&digest, start + after), expected, "{after:?}");
        }
        answers.lean_on(&long, start + FRESH);
        assert_eq!(answers.of(&long, start + FRESH), fresh());
        assert_eq!(answers.of(&long, start + FRESH + LEAN), stale());
        answers.lean_on(&long, start + HOUR);
        assert_eq!(answers.of(&long, start + HOUR), Known::Nothing, "the token's own end is the end");
    }

    #[test]
    fn a_refusal_is_kept_briefly_and_takes_back_what_was_believed() {
        let (mut answers, start) = (Answers::default(), Instant::now());
        let digest = digest("a");
        answers.keep(digest, Ok(bearer()), start, HOUR);
        answers.keep(digest, Err(NotBelieved::Refused("gone".into())), start, HOUR);
        assert_eq!(answers.of(&digest, start), Known::Fresh(Err(NotBelieved::Refused("gone".into()))));
        assert_eq!(answers.of(&digest, start + REFUSED), Known::Nothing);
    }

    #[test]
    fn nonsense_is_bounded_and_drives_out_nobody() {
        let (mut answers, start) = (Answers::default(), Instant::now());
        answers.keep(digest("good"), Ok(bearer()), start, HOUR);
        for i in 0..MAX_REFUSED + 5 {
            answers.keep(digest(&i.to_string()), Err(NotBelieved::Refused("no".into())), start, HOUR);
        }
        assert_eq!((answers.refused.len(), answers.bearers.len()), (MAX_REFUSED, 1));
    }
}
