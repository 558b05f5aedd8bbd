//! A slow cable: what one member of the wire sends arrives later.
//!
//! The member's port leaves the bridge, and every frame is carried between the two by hand: what the member sends waits its time,
//! what it receives does not. Order is kept; nothing is dropped but what the kernel's buffers cannot hold.

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use mesh_net::{NetNs, capture::FrameSocket};

/// Segmentation offload makes frames far larger than the MTU.
const FRAME: usize = 128 * 1024;
/// How soon a relay notices that it should stop.
const NOTICE: Duration = Duration::from_millis(100);

/// Carries frames until it is dropped.
#[derive(Debug)]
pub struct Delay {
    stop: Arc<AtomicBool>,
}

impl Delay {
    /// Between `port` (the member's) and `stub` (the bridge's), both in `wire`.
    ///
    /// # Errors
    /// When a socket or thread cannot be made.
    pub fn start(wire: &NetNs, port: &str, stub: &str, delay: Duration) -> io::Result<Self> {
        let relay = Self { stop: Arc::default() };
        for (from, to, delay) in [(port, stub, delay), (stub, port, Duration::ZERO)] {
            let (from, to) = (FrameSocket::open_for_relay(wire, from)?, FrameSocket::open_for_relay(wire, to)?);
            let stop = relay.stop.clone();
            thread::Builder::new().name("delay".to_owned()).spawn(move || carry(&from, &to, delay, &stop))?;
        }
        Ok(relay)
    }
}

impl Drop for Delay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn carry(from: &FrameSocket, to: &FrameSocket, delay: Duration, stop: &AtomicBool) {
    let (mut waiting, mut buffer) = (VecDeque::<(Instant, Vec<u8>)>::new(), vec![0; FRAME]);
    while !stop.load(Ordering::Relaxed) {
        let pause =
            waiting.front().map_or(NOTICE, |(due, _)| due.saturating_duration_since(Instant::now()).min(NOTICE));
        match from.recv(&mut buffer, pause) {
            Ok(Some(frame)) => waiting.push_back((Instant::now() + delay, buffer[..frame.length].to_vec())),
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(%error, "a delayed cable broke");
                return;
            }
        }
        while waiting.front().is_some_and(|(due, _)| *due <= Instant::now()) {
            if let Some((_, frame)) = waiting.pop_front() {
                // A full transmit queue drops, as a cable's would; TCP sends again.
                to.send(&frame).unwrap_or_default();
            }
        }
    }
}
