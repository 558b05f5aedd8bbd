//! A stream beside its windows: what came for it and was not taken, what was moved, how it ended. With the [tunnel](super::tunnel) and
//! the application's socket this is all there is to a flow.

use std::collections::VecDeque;

use super::{
    flow::Budget,
    frame::{ErrorCode, MAX_WINDOW},
    state::{Fields, RestoreError, Snapshot, Writer},
};

/// Payload that nobody has taken; at most the stream's window. Holds no memory when empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(clippy::box_collection, reason = "one pointer in every idle stream, instead of a whole queue")]
pub struct Stall(Option<Box<VecDeque<u8>>>);

impl Stall {
    pub fn len(&self) -> usize {
        self.0.as_ref().map_or(0, |bytes| bytes.len())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// Keeps `bytes`. False when that is more than the pod or the process may hold; they are kept all the same.
    #[must_use]
    pub fn push(&mut self, bytes: &[u8], budget: &Budget) -> bool {
        if bytes.is_empty() {
            return true;
        }
        self.0.get_or_insert_default().extend(bytes);
        budget.hold(bytes.len())
    }

    /// The oldest bytes; some, if there are any.
    pub fn front(&self) -> &[u8] {
        self.0.as_ref().map_or(&[], |bytes| bytes.as_slices().0)
    }

    /// The oldest `count` bytes have been taken; never more than there are.
    pub fn take(&mut self, count: usize, budget: &Budget) {
        budget.let_go(count);
        if let Some(bytes) = &mut self.0 {
            bytes.drain(..count);
            if bytes.is_empty() {
                self.0 = None;
            }
        }
    }

    pub fn clear(&mut self, budget: &Budget) {
        self.take(self.len(), budget);
    }
}

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// `:authority`.
    pub target: Box<str>,
    pub stall: Stall,
    pub sent: u64,
    pub received: u64,
    /// The peer's END_STREAM has come.
    pub ended: bool,
    /// The peer's RST_STREAM, or ours for a rule it broke.
    pub reset: Option<ErrorCode>,
    /// Our END_STREAM is on its way.
    pub send_closed: bool,
    /// Past the size from which it counts as an elephant.
    pub large: bool,
}

impl Flow {
    pub fn new(target: Box<str>) -> Self {
        Self { target, ..Self::default() }
    }

    /// Looks at what was moved; true when that makes it an elephant just now.
    pub fn grew(&mut self) -> bool {
        let large = self.sent.max(self.received) > crate::config::ELEPHANT;
        large && !std::mem::replace(&mut self.large, true)
    }
}

impl Snapshot for Flow {
    fn save(&self, to: &mut Writer) {
        to.bytes(1, self.target.as_bytes());
        let (front, back) = self.stall.0.as_ref().map_or((&[][..], &[][..]), |bytes| bytes.as_slices());
        to.bytes(2, front);
        to.bytes(3, back);
        to.u64(4, self.sent);
        to.u64(5, self.received);
        to.flag(6, self.ended);
        if let Some(code) = self.reset {
            to.u32(7, code.0);
        }
        to.flag(8, self.send_closed);
        to.flag(9, self.large);
    }

    /// What it holds is charged to nobody yet.
    fn restore(from: &Fields<'_>) -> Result<Self, RestoreError> {
        from.only(&[1, 2, 3, 4, 5, 6, 7, 8, 9])?;
        let target = std::str::from_utf8(from.bytes(1)?);
        let target = target.map_err(|_| RestoreError::Invalid { tag: 1, why: "is no text" })?;
        let stalled = [from.bytes(2)?, from.bytes(3)?].concat();
        if stalled.len() > MAX_WINDOW as usize {
            return Err(RestoreError::Invalid { tag: 2, why: "is more than a window" });
        }
        let stall = Stall((!stalled.is_empty()).then(|| Box::new(stalled.into())));
        let reset = from.optional(7)?.map(|_| from.u32(7)).transpose()?.map(ErrorCode);
        Ok(Self {
            target: target.into(),
            stall,
            sent: from.u64(4)?,
            received: from.u64(5)?,
            ended: from.flag(6)?,
            reset,
            send_closed: from.flag(8)?,
            large: from.flag(9)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::state::{decode, encode};

    #[test]
    fn what_stalls_is_charged_and_leaves_no_memory_behind() {
        let (budget, mut stall) = (Budget::default(), Stall::default());
        assert!(stall.push(b"abc", &budget) && stall.push(b"", &budget) && stall.push(b"def", &budget));
        assert_eq!((stall.len(), budget.used()), (6, 6));
        stall.take(4, &budget);
        assert_eq!((stall.front(), budget.used()), (&b"ef"[..], 2));
        stall.clear(&budget);
        assert!(stall.is_empty());
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn a_flow_is_restored_as_it_was() {
        let budget = Budget::default();
        let mut flow = Flow::new("10.0.0.1:80".into());
        assert_eq!(decode::<Flow>(&encode(&flow)).as_ref(), Ok(&flow));
        assert!(flow.stall.push(&[7; 100], &budget));
        flow.stall.take(60, &budget);
        // Wraps around in the ring.
        assert!(flow.stall.push(&[8; 70], &budget));
        (flow.sent, flow.received, flow.ended, flow.reset) = (1, 2, true, Some(ErrorCode::CANCEL));
        let restored = decode::<Flow>(&encode(&flow)).unwrap();
        assert_eq!(restored, flow);
    }

    #[test]
    fn a_flow_is_found_to_be_an_elephant_once() {
        let mut flow = Flow { received: crate::config::ELEPHANT + 1, ..Flow::default() };
        assert!(flow.grew() && !flow.grew() && flow.large);
    }
}
