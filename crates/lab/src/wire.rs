//! What crosses the wire between the nodes: every byte is followed from its SYN, so that "everything is TLS" is a statement about
//! whole streams and not about packets that look like it.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use ipnet::IpNet;
use mesh_net::{
    NetNs,
    capture::{FrameInfo, FrameSocket, TcpHeader, parse},
};

use crate::protocol::Sight;

/// Captured bytes kept since the last mark; beyond it frames are counted as lost.
const KEEP: usize = 192 * 1024 * 1024;
/// Segmentation offload makes frames far larger than the MTU.
const FRAME: usize = 256 * 1024;
/// Out-of-order bytes kept per direction.
const REORDER: usize = 4 * 1024 * 1024;
const HBONE_PORT: u16 = 15008;

/// Follows the wire from its construction on. Stops when dropped.
#[derive(Debug)]
pub struct Recorder {
    log: Arc<Mutex<Log>>,
    stop: Arc<AtomicBool>,
}

impl Recorder {
    /// Listens on an interface that carries what nodes send each other; frames count whose both ends are in `pods`.
    ///
    /// # Errors
    /// When the capture socket or its thread cannot be made.
    pub fn start(wire: &NetNs, port: &str, pods: Vec<IpNet>) -> io::Result<Self> {
        let socket = FrameSocket::open(wire, port)?;
        let recorder = Self { log: Arc::new(Mutex::new(Log { pods, ..Log::default() })), stop: Arc::default() };
        let (log, stop) = (recorder.log.clone(), recorder.stop.clone());
        thread::Builder::new().name("wire".to_owned()).spawn(move || listen(&socket, &log, &stop))?;
        Ok(recorder)
    }

    /// Counts from now; streams are followed on.
    pub fn mark(&self) {
        self.log().mark();
    }

    pub fn look(&self, nonce: Option<&str>) -> Sight {
        self.log().look(nonce)
    }

    /// The frames since the mark as a capture file.
    pub fn pcap(&self) -> Vec<u8> {
        self.log().pcap()
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn listen(socket: &FrameSocket, log: &Mutex<Log>, stop: &AtomicBool) {
    let mut buffer = vec![0; FRAME];
    while !stop.load(Ordering::Relaxed) {
        match socket.recv(&mut buffer, Duration::from_millis(200)) {
            Ok(Some(frame)) => {
                log.lock().unwrap_or_else(PoisonError::into_inner).take(&buffer[..frame.length], &frame);
            }
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(%error, "the wire's capture ended");
                return;
            }
        }
    }
}

/// Everything known of the wire.
#[derive(Debug, Default)]
struct Log {
    /// Where pods live.
    pods: Vec<IpNet>,
    streams: HashMap<(SocketAddr, SocketAddr), Direction>,
    frames: Vec<(SystemTime, usize, Vec<u8>)>,
    kept: usize,
    seen: usize,
    lost: usize,
}

/// One direction of one connection.
#[derive(Debug)]
struct Direction {
    next: u32,
    pending: BTreeMap<u32, Vec<u8>>,
    pending_bytes: usize,
    records: Option<Records>,
    /// In-order payload since the mark.
    payload: Vec<u8>,
    tls: u64,
    clear: u64,
}

impl Log {
    fn take(&mut self, frame: &[u8], info: &FrameInfo) {
        let Some(packet) = parse(frame) else { return };
        let (Some(tcp), Some((from, to))) = (packet.tcp, packet.endpoints()) else { return };
        let is_pod = |ip: IpAddr| self.pods.iter().any(|range| range.contains(&ip));
        if !is_pod(packet.source) || !is_pod(packet.destination) {
            return;
        }
        self.seen += 1;
        if info.length < info.original_length || self.kept + frame.len() > KEEP {
            self.lost += 1;
            return;
        }
        self.kept += frame.len();
        self.frames.push((info.at, info.original_length, frame.to_vec()));
        self.follow(from, to, &tcp, packet.payload);
    }

    fn follow(&mut self, from: SocketAddr, to: SocketAddr, tcp: &TcpHeader, payload: &[u8]) {
        if tcp.has(TcpHeader::SYN) {
            // A new incarnation of the pair; what the old one carried stays counted.
            let old = self.streams.remove(&(from, to));
            let hbone = from.port() == HBONE_PORT || to.port() == HBONE_PORT;
            let mut direction = Direction::new(tcp.sequence.wrapping_add(1), hbone);
            if let Some(old) = old {
                (direction.payload, direction.tls, direction.clear) = (old.payload, old.tls, old.clear);
            }
            self.streams.insert((from, to), direction);
            return;
        }
        if payload.is_empty() {
            return;
        }
        // A stream whose beginning was not seen cannot be vouched for.
        let direction = self.streams.entry((from, to)).or_insert_with(|| Direction::new(tcp.sequence, false));
        if !direction.segment(tcp.sequence, payload) {
            self.lost += 1;
        }
    }

    fn mark(&mut self) {
        self.frames.clear();
        (self.kept, self.seen, self.lost) = (0, 0, 0);
        for direction in self.streams.values_mut() {
            direction.payload = Vec::new();
            (direction.tls, direction.clear) = (0, 0);
        }
    }

    fn look(&self, nonce: Option<&str>) -> Sight {
        let mut sight = Sight { frames: self.seen, lost: self.lost, ..Sight::default() };
        for ((from, to), direction) in &self.streams {
            sight.tls_bytes += direction.tls;
            sight.clear_bytes += direction.clear;
            sight.payload_bytes += direction.payload.len() as u64;
            if direction.clear > 0 && sight.clear_example.is_none() {
                sight.clear_example = Some(format!("{from} → {to}: {} bytes", direction.clear));
            }
            let Some(nonce) = nonce.map(str::as_bytes).filter(|n| !n.is_empty()) else { continue };
            let places = direction.payload.windows(nonce.len()).enumerate().filter(|(_, w)| *w == nonce);
            for (at, _) in places {
                sight.found += 1;
                sight.excerpt.get_or_insert_with(|| excerpt(&direction.payload, at, nonce.len()));
            }
        }
        sight
    }

    /// The classic capture format: magic 0xa1b2c3d4 (microseconds), link type 1 (Ethernet), then per frame seconds,
    /// microseconds, captured and original length.
    fn pcap(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(24 + self.kept + self.frames.len() * 16);
        for word in [0xa1b2_c3d4_u32, 0x0004_0002, 0, 0, u32::try_from(FRAME).unwrap_or(u32::MAX), 1] {
            out.extend(word.to_le_bytes());
        }
        for (at, original, frame) in &self.frames {
            let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
            let length = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
            let seconds = u32::try_from(since.as_secs()).unwrap_or(u32::MAX);
            for word in [seconds, since.subsec_micros(), length(frame.len()), length(*original)] {
                out.extend(word.to_le_bytes());
            }
            out.extend(frame);
        }
        out
    }
}

impl Direction {
    fn new(next: u32, hbone: bool) -> Self {
        Self {
            next,
            pending: BTreeMap::new(),
            pending_bytes: 0,
            records: hbone.then(Records::default),
            payload: Vec::new(),
            tls: 0,
            clear: 0,
        }
    }

    /// Takes a segment in any order; `false` when bytes had to be given up.
    fn segment(&mut self, sequence: u32, payload: &[u8]) -> bool {
        let ahead = sequence.wrapping_sub(self.next).cast_signed();
        if ahead > 0 {
            if self.pending_bytes + payload.len() > REORDER {
                return false;
            }
            self.pending_bytes += payload.len();
            self.pending.insert(sequence, payload.to_vec());
            return true;
        }
        let known = usize::try_from(-i64::from(ahead)).unwrap_or(0);
        if let Some(new) = payload.get(known..)
            && !new.is_empty()
        {
            self.in_order(new);
        }
        while let Some(sequence) = self.pending.keys().copied().find(|s| s.wrapping_sub(self.next).cast_signed() <= 0) {
            let Some(payload) = self.pending.remove(&sequence) else { break };
            self.pending_bytes -= payload.len();
            let known = usize::try_from(-i64::from(sequence.wrapping_sub(self.next).cast_signed())).unwrap_or(0);
            if let Some(new) = payload.get(known..) {
                self.in_order(new);
            }
        }
        true
    }

    fn in_order(&mut self, bytes: &[u8]) {
        self.next = self.next.wrapping_add(u32::try_from(bytes.len()).unwrap_or(0));
        self.payload.extend_from_slice(bytes);
        let tls = self.records.as_mut().map_or(0, |r| r.take(bytes)) as u64;
        self.tls += tls;
        self.clear += bytes.len() as u64 - tls;
    }
}

/// Walks TLS records (RFC 8446 §5.1): type 20–23, legacy version 3.x, a length of at most 2^14 + 256.
#[derive(Debug, Default)]
struct Records {
    header: Vec<u8>,
    left: usize,
    broken: bool,
}

impl Records {
    /// How many of `bytes` belong to well-formed records.
    fn take(&mut self, bytes: &[u8]) -> usize {
        let mut good = 0;
        while good < bytes.len() && !self.broken {
            if self.left > 0 {
                let n = self.left.min(bytes.len() - good);
                self.left -= n;
                good += n;
                continue;
            }
            self.header.push(bytes[good]);
            good += 1;
            if let [kind, major, _, hi, lo] = self.header[..] {
                self.left = usize::from(u16::from_be_bytes([hi, lo]));
                self.broken = !(20..=23).contains(&kind) || major != 3 || self.left > 16_640;
                self.header.clear();
            }
        }
        if self.broken { good.saturating_sub(5) } else { good }
    }
}

fn excerpt(payload: &[u8], at: usize, length: usize) -> String {
    let window = &payload[at.saturating_sub(24)..(at + length + 24).min(payload.len())];
    window.iter().map(|b| if b.is_ascii_graphic() || *b == b' ' { char::from(*b) } else { '·' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(port: u16) -> (SocketAddr, SocketAddr) {
        (SocketAddr::from(([10, 244, 1, 2], 40_000)), SocketAddr::from(([10, 244, 2, 2], port)))
    }

    fn header(sequence: u32, flags: u8) -> TcpHeader {
        TcpHeader { source_port: 1, destination_port: 2, sequence, acknowledgement: 0, flags }
    }

    fn record(length: u16) -> Vec<u8> {
        let mut bytes = vec![23, 3, 3];
        bytes.extend(length.to_be_bytes());
        bytes.extend(vec![0xaa; length.into()]);
        bytes
    }

    #[test]
    fn records_cut_and_reordered_anyhow_are_still_tls() {
        let (from, to) = pair(HBONE_PORT);
        let stream = [record(10), record(300), record(0), record(77)].concat();
        let mut log = Log::default();
        log.follow(from, to, &header(99, TcpHeader::SYN), &[]);
        let cut = [(0, 3), (3, 50), (150, 200), (50, 150), (120, 160), (200, stream.len())];
        for (a, b) in cut {
            log.follow(from, to, &header(100 + u32::try_from(a).unwrap(), TcpHeader::ACK), &stream[a..b]);
        }
        let sight = log.look(None);
        assert_eq!((sight.tls_bytes, sight.clear_bytes, sight.lost), (stream.len() as u64, 0, 0));
    }

    #[test]
    fn clear_text_is_called_clear_and_a_nonce_is_found_across_segments() {
        let (from, to) = pair(8080);
        let mut log = Log::default();
        log.follow(from, to, &header(0, TcpHeader::SYN), &[]);
        log.follow(from, to, &header(1, TcpHeader::ACK), b"GET /non");
        log.follow(from, to, &header(9, TcpHeader::ACK), b"ce HTTP/1.1\r\n");
        let sight = log.look(Some("nonce"));
        assert_eq!((sight.found, sight.tls_bytes, sight.clear_bytes), (1, 0, 21));
        assert_eq!(sight.excerpt.unwrap(), "GET /nonce HTTP/1.1··");
        log.mark();
        assert_eq!(log.look(Some("nonce")), Sight::default());
    }

    #[test]
    fn clear_text_on_the_tunnel_port_does_not_pass_for_tls() {
        let (from, to) = pair(HBONE_PORT);
        let mut log = Log::default();
        log.follow(from, to, &header(0, TcpHeader::SYN), &[]);
        log.follow(from, to, &header(1, TcpHeader::ACK), b"GET / HTTP/1.1\r\n");
        assert_eq!(log.look(None).clear_bytes, 16);
    }

    #[test]
    fn a_stream_joined_late_is_not_vouched_for() {
        let (from, to) = pair(HBONE_PORT);
        let mut log = Log::default();
        log.follow(from, to, &header(5, TcpHeader::ACK), &record(3));
        assert_eq!(log.look(None).clear_bytes, 8);
    }
}
