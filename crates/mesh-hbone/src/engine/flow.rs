//! Flow-control windows (RFC 9113 §5.2, §6.9): what we may send, what the peer may send, and how much memory that may cost.

use std::{
    cell::Cell,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use super::{
    frame::MAX_WINDOW,
    state::{Fields, RestoreError, Snapshot, Writer},
};

/// A window grew beyond 2^31-1, or was overrun: FLOW_CONTROL_ERROR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowError;

/// What we may still send. Negative after the peer made its initial window smaller (§6.9.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SendWindow(i32);

impl SendWindow {
    /// `initial` is at most 2^31-1.
    pub fn new(initial: u32) -> Self {
        Self(i32::try_from(initial).unwrap_or(i32::MAX))
    }

    pub fn available(self) -> usize {
        usize::try_from(self.0).unwrap_or(0)
    }

    /// Never more than [`Self::available`].
    pub fn take(&mut self, bytes: usize) {
        let bytes = i32::try_from(bytes).expect("no more is taken than a window holds");
        self.0 = self.0.checked_sub(bytes).expect("no more is taken than a window holds");
    }

    /// WINDOW_UPDATE.
    ///
    /// # Errors
    /// When the window passes 2^31-1.
    pub fn grant(&mut self, bytes: u32) -> Result<(), WindowError> {
        self.adjust(i64::from(bytes))
    }

    /// A change of SETTINGS_INITIAL_WINDOW_SIZE.
    ///
    /// # Errors
    /// When the window passes 2^31-1.
    pub fn adjust(&mut self, difference: i64) -> Result<(), WindowError> {
        self.0 = i32::try_from(i64::from(self.0) + difference).map_err(|_| WindowError)?;
        Ok(())
    }
}

/// What the peer may still send.
///
/// `credit + unreturned + held = target`, where `held` is what was received and not yet [released](Self::release); the three never
/// overlap, so the peer can never make us hold more than `target`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecvWindow {
    credit: u32,
    /// Released, not yet announced.
    unreturned: u32,
    target: u32,
    /// Released since the window last grew.
    drained: u64,
}

impl RecvWindow {
    /// A peer that was told `initial`, at most 2^31-1.
    pub fn new(initial: u32) -> Self {
        Self { credit: initial, unreturned: 0, target: initial, drained: 0 }
    }

    pub fn target(self) -> u32 {
        self.target
    }

    /// Received and not yet released.
    pub fn held(self) -> u32 {
        self.target.saturating_sub(self.credit).saturating_sub(self.unreturned)
    }

    /// A frame of `bytes` flow-controlled bytes begins.
    ///
    /// # Errors
    /// When the peer had less credit.
    pub fn receive(&mut self, bytes: u32) -> Result<(), WindowError> {
        self.credit = self.credit.checked_sub(bytes).ok_or(WindowError)?;
        Ok(())
    }

    /// `bytes` received before are out of our hands. The increment to announce once half a window has gathered: smaller ones would
    /// cost a frame for little, larger ones would stop the peer.
    pub fn release(&mut self, bytes: u32) -> Option<u32> {
        debug_assert!(bytes <= self.held(), "released more than was received");
        self.unreturned += bytes.min(self.held());
        self.drained = self.drained.saturating_add(u64::from(bytes));
        (self.unreturned >= self.target / 2).then(|| self.announce()).filter(|increment| *increment > 0)
    }

    /// Whether the window is what holds the stream back: everything received has gone on, and it has turned over twice.
    pub fn wants_growth(self) -> bool {
        self.held() == 0 && self.drained >= 2 * u64::from(self.target)
    }

    /// Makes the window `target` and answers the increment to announce.
    pub fn grow(&mut self, target: u32) -> u32 {
        let more = target.min(MAX_WINDOW).saturating_sub(self.target);
        self.target += more;
        self.unreturned += more;
        self.drained = 0;
        self.announce()
    }

    fn announce(&mut self) -> u32 {
        let increment = std::mem::take(&mut self.unreturned);
        self.credit += increment;
        increment
    }
}

/// What windows have grown by, and what is kept for readers that do not read: one limit for a pod, one for the process. The two are
/// counted apart, because a window that has grown costs nothing while its stream is healthy, and must not keep new streams out. Clones
/// share.
#[derive(Clone, Debug)]
pub struct Budget(Rc<Pod>);

#[derive(Debug)]
struct Pod {
    grown: Cell<usize>,
    held: Cell<usize>,
    limit: usize,
    process: Process,
}

/// The process-wide part of every [`Budget`]. Clones share.
#[derive(Clone, Debug)]
pub struct Process {
    grown: Arc<AtomicUsize>,
    held: Arc<AtomicUsize>,
    limit: usize,
}

impl Process {
    pub fn new(limit: usize) -> Self {
        Self { grown: Arc::default(), held: Arc::default(), limit }
    }

    pub fn used(&self) -> usize {
        self.grown.load(Ordering::Relaxed) + self.held.load(Ordering::Relaxed)
    }
}

impl Budget {
    pub fn new(limit: usize, process: Process) -> Self {
        Self(Rc::new(Pod { grown: Cell::new(0), held: Cell::new(0), limit, process }))
    }

    /// A window wants to grow. Refused when growth would pass half a limit, or everything together the whole.
    pub fn try_grow(&self, bytes: usize) -> bool {
        let (pod, process) = (&self.0, &self.0.process);
        let fits = |grown: usize, used: usize, limit: usize| grown + bytes <= limit / 2 && used + bytes <= limit;
        let fits = fits(pod.grown.get(), self.used(), pod.limit)
            && fits(process.grown.load(Ordering::Relaxed), process.used(), process.limit);
        if fits {
            self.grow(bytes);
        }
        fits
    }

    /// A window that has grown already has a new owner.
    pub fn grow(&self, bytes: usize) {
        self.0.grown.set(self.0.grown.get() + bytes);
        self.0.process.grown.fetch_add(bytes, Ordering::Relaxed);
    }

    pub fn shrink(&self, bytes: usize) {
        self.0.grown.set(self.0.grown.get().saturating_sub(bytes));
        self.0.process.grown.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Keeps what the peer was allowed to send. False when that passes twice a limit: whoever holds it must let go.
    #[must_use]
    pub fn hold(&self, bytes: usize) -> bool {
        let (pod, process) = (&self.0, &self.0.process);
        pod.held.set(pod.held.get() + bytes);
        let all = process.held.fetch_add(bytes, Ordering::Relaxed) + bytes;
        pod.held.get() <= 2 * pod.limit && all <= 2 * process.limit
    }

    pub fn let_go(&self, bytes: usize) {
        self.0.held.set(self.0.held.get().saturating_sub(bytes));
        self.0.process.held.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Readers that do not read have taken all there is: new streams are not welcome.
    pub fn is_exhausted(&self) -> bool {
        let process = &self.0.process;
        self.0.held.get() >= self.0.limit || process.held.load(Ordering::Relaxed) >= process.limit
    }

    pub fn used(&self) -> usize {
        self.0.grown.get() + self.0.held.get()
    }
}

impl Default for Process {
    /// 512 MiB.
    fn default() -> Self {
        Self::new(512 << 20)
    }
}

impl Default for Budget {
    /// 64 MiB for a pod that has the process to itself.
    fn default() -> Self {
        Self::new(64 << 20, Process::default())
    }
}

impl Snapshot for SendWindow {
    fn save(&self, to: &mut Writer) {
        to.bytes(1, &self.0.to_be_bytes());
    }

    fn restore(from: &Fields<'_>) -> Result<Self, RestoreError> {
        from.only(&[1])?;
        Ok(Self(i32::from_be_bytes(from.array(1)?)))
    }
}

impl Snapshot for RecvWindow {
    fn save(&self, to: &mut Writer) {
        to.u32(1, self.credit);
        to.u32(2, self.unreturned);
        to.u32(3, self.target);
        to.u64(4, self.drained);
    }

    fn restore(from: &Fields<'_>) -> Result<Self, RestoreError> {
        from.only(&[1, 2, 3, 4])?;
        let window =
            Self { credit: from.u32(1)?, unreturned: from.u32(2)?, target: from.u32(3)?, drained: from.u64(4)? };
        let sum = u64::from(window.credit) + u64::from(window.unreturned);
        if window.target > MAX_WINDOW || sum > u64::from(window.target) {
            return Err(RestoreError::Invalid { tag: 3, why: "the window's parts are more than the whole" });
        }
        Ok(window)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_send_window_may_be_negative_but_not_too_large() {
        let mut window = SendWindow::new(100);
        window.take(60);
        window.adjust(-100).unwrap();
        assert_eq!(window.available(), 0);
        window.grant(61).unwrap();
        assert_eq!(window.available(), 1);
        assert_eq!(window.grant(MAX_WINDOW), Err(WindowError));
    }

    #[test]
    fn credit_goes_back_by_the_half_window() {
        let mut window = RecvWindow::new(100);
        window.receive(60).unwrap();
        assert_eq!(window.release(49), None);
        assert_eq!(window.release(11), Some(60));
        assert_eq!(window.receive(101), Err(WindowError));
    }

    #[test]
    fn a_window_grows_only_once_its_stream_has_drained_it_twice() {
        let mut window = RecvWindow::new(100);
        for _ in 0..3 {
            window.receive(60).unwrap();
            assert!(!window.wants_growth());
            window.release(60);
        }
        window.receive(60).unwrap();
        assert!(!window.wants_growth(), "it holds something");
        window.release(60);
        assert!(window.wants_growth());
        assert_eq!(window.grow(400), 300);
        assert_eq!((window.target(), window.held()), (400, 0));
        assert!(!window.wants_growth());
    }

    #[test]
    fn a_budget_binds_the_pod_and_the_process() {
        let process = Process::new(150);
        let (one, other) = (Budget::new(100, process.clone()), Budget::new(100, process.clone()));
        assert!(one.try_grow(50) && !one.try_grow(1), "half a pod's limit");
        assert!(other.try_grow(25) && !other.try_grow(1), "half the process's");
        assert!(!one.is_exhausted(), "what grew keeps nobody out");
        assert!(one.hold(100) && one.is_exhausted() && !other.is_exhausted());
        assert!(other.hold(50) && other.is_exhausted(), "the process holds what it may");
        assert!(one.hold(100), "twice the limit is tolerated for what was promised");
        assert!(!one.hold(1));
        one.let_go(201);
        one.shrink(50);
        other.let_go(50);
        other.shrink(25);
        assert_eq!((one.used(), process.used()), (0, 0));
    }

    proptest! {
        /// Whatever is received and released, the peer's credit and what we hold never exceed the target.
        #[test]
        fn a_peer_never_makes_us_hold_more_than_the_target(steps in proptest::collection::vec((0u32..200, any::<bool>()), 0..200)) {
            let mut window = RecvWindow::new(100);
            for (bytes, release) in steps {
                if release {
                    window.release(bytes.min(window.held()));
                    if window.wants_growth() && window.target() < 1600 {
                        window.grow(window.target() * 2);
                    }
                } else if window.receive(bytes).is_ok() {
                    prop_assert!(window.held() <= window.target());
                }
                prop_assert_eq!(window.credit + window.unreturned + window.held(), window.target());
            }
        }
    }
}
