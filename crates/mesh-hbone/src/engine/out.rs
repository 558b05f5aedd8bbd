//! What a tunnel has to say and has not said yet: a queue of TLS records, filled in place, sealed in place, written from there.
//!
//! A slab is `[5 header | up to 16,384 plaintext | 1 type | 16 tag]`. Frames of many streams gather in the last, still open record; an
//! application's bytes are read straight behind their frame header. Nothing is sealed before it is about to be written, so that what
//! comes late can still join. A queue that is empty holds no slab.

use std::{
    cell::RefCell,
    collections::VecDeque,
    io::{self, IoSliceMut},
};

use smallvec::SmallVec;

use super::{
    frame::{self, Header, Kind},
    record::{self, ContentType, RecordError, Seal},
    state::{Fields, RestoreError, Snapshot, Writer},
};

/// In front of the plaintext (RFC 8446 §5.1).
const START: usize = record::HEADER;
/// Most plaintext of one record (RFC 8446 §5.2).
pub const MAX_PLAINTEXT: usize = 1 << 14;
const SLAB: usize = MAX_PLAINTEXT + record::OVERHEAD;
/// Largest DATA payload that fits a record with its header.
pub const MAX_PAYLOAD: usize = MAX_PLAINTEXT - frame::HEADER;

/// Records that one read from an application may fill. More saves few system calls and makes the neighbours wait.
const SEGMENTS: usize = 4;
/// Bytes one read from an application may bring.
pub const MAX_READ: usize = SEGMENTS * MAX_PAYLOAD;
/// Room in the open record below which a read starts a new one instead of making a sliver of a frame.
const WORTHWHILE: usize = 1 << 10;

/// Most unsealed records that are restored. Neighbours together fill a slab at least, so these are far more bytes than a tunnel queues.
const MAX_RESTORED: usize = 256;

/// Slabs a worker keeps for the next one that needs some: half a MiB.
const RETAINED: usize = 32;

thread_local! {
    /// Of this worker.
    static SLABS: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

fn take_slab() -> Box<[u8]> {
    SLABS.with_borrow_mut(Vec::pop).unwrap_or_else(|| vec![0; SLAB].into_boxed_slice())
}

fn give_back(slab: Box<[u8]>) {
    SLABS.with_borrow_mut(|slabs| {
        if slabs.len() < RETAINED {
            slabs.push(slab);
        }
    });
}

#[derive(Debug)]
struct Record {
    slab: Box<[u8]>,
    /// Of the plaintext, or of the whole record once sealed.
    end: usize,
    content: ContentType,
}

impl Record {
    fn new(content: ContentType) -> Self {
        Self { slab: take_slab(), end: START, content }
    }

    fn space(&self) -> usize {
        START + MAX_PLAINTEXT - self.end
    }

    fn append(&mut self, bytes: &[u8]) {
        self.slab[self.end..self.end + bytes.len()].copy_from_slice(bytes);
        self.end += bytes.len();
    }
}

/// What one read brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filled {
    pub bytes: usize,
    /// DATA frames made of them.
    pub frames: u32,
    /// There was room for more.
    pub all: bool,
}

/// The queue of one tunnel.
#[derive(Debug, Default)]
pub struct Out {
    records: VecDeque<Record>,
    /// Records at the front that are sealed.
    sealed: usize,
    /// Bytes of the first record that have been written.
    written: usize,
    queued: usize,
}

impl Out {
    /// Bytes that wait, give or take what sealing adds.
    pub fn queued(&self) -> usize {
        self.queued
    }

    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Appends a frame whose payload is at hand and at most [`MAX_PAYLOAD`] long.
    pub fn frame(&mut self, kind: Kind, flags: u8, stream: u32, payload: &[u8]) {
        let length = u32::try_from(payload.len()).expect("frames of ours fit a record");
        let header = Header { length, kind, flags, stream };
        let record = self.open_record(frame::HEADER + payload.len());
        record.append(&header.encode());
        record.append(payload);
        self.queued += frame::HEADER + payload.len();
    }

    /// Raw bytes ahead of any frame: the client's preface.
    pub fn preface(&mut self, bytes: &[u8]) {
        self.open_record(bytes.len()).append(bytes);
        self.queued += bytes.len();
    }

    fn open_record(&mut self, length: usize) -> &mut Record {
        let open = self.tail_space();
        if open < length {
            self.records.push_back(Record::new(ContentType::ApplicationData));
        }
        self.records.back_mut().expect("there is one now")
    }

    /// Of the last record, if more may join it.
    fn tail_space(&self) -> usize {
        let is_open = self.records.len() > self.sealed;
        match self.records.back() {
            Some(record) if is_open && record.content == ContentType::ApplicationData => record.space(),
            _ => 0,
        }
    }

    /// Lets `read` put at most `max` bytes of a stream (and at most [`MAX_READ`]) behind frame headers. Nothing is queued when it
    /// brought none.
    ///
    /// # Errors
    /// Those of `read`.
    pub fn fill(
        &mut self,
        stream: u32,
        max: usize,
        read: impl FnOnce(&mut [IoSliceMut<'_>]) -> io::Result<usize>,
    ) -> io::Result<Filled> {
        let (first, room) = self.plan(max);
        let result = {
            let mut left = max;
            let mut slices = SmallVec::<[IoSliceMut<'_>; SEGMENTS]>::new();
            for record in self.records.iter_mut().skip(first) {
                let length = left.min(record.space() - frame::HEADER);
                let start = record.end + frame::HEADER;
                slices.push(IoSliceMut::new(&mut record.slab[start..start + length]));
                left -= length;
            }
            read(&mut slices)
        };
        let (mut left, mut frames) = (*result.as_ref().unwrap_or(&0), 0);
        let brought = left;
        for record in self.records.iter_mut().skip(first) {
            let length = left.min(record.space() - frame::HEADER);
            if length == 0 {
                break;
            }
            let bytes = u32::try_from(length).expect("a record is small");
            record.append(&Header { length: bytes, kind: Kind::Data, flags: 0, stream }.encode());
            record.end += length;
            self.queued += frame::HEADER + length;
            left -= length;
            frames += 1;
        }
        while self.records.len() > self.sealed && self.records.back().is_some_and(|record| record.end == START) {
            self.records.pop_back().into_iter().for_each(|record| give_back(record.slab));
        }
        result.map(|_| Filled { bytes: brought, frames, all: brought < room })
    }

    /// Makes room for up to `max` bytes in at most [`SEGMENTS`] records; the index of the first, and how much room it is.
    fn plan(&mut self, max: usize) -> (usize, usize) {
        let tail = self.tail_space();
        let joins = tail >= frame::HEADER + max.min(WORTHWHILE);
        let first = self.records.len() - usize::from(joins);
        let mut room = if joins { tail - frame::HEADER } else { 0 };
        while room < max && self.records.len() - first < SEGMENTS {
            self.records.push_back(Record::new(ContentType::ApplicationData));
            room += MAX_PAYLOAD;
        }
        (first, room.min(max))
    }

    /// Seals records until `bytes` are ready to be written or nothing is left to seal.
    ///
    /// # Errors
    /// When no key can seal any more.
    pub fn seal(&mut self, bytes: usize, seal: &mut Seal) -> Result<(), RecordError> {
        // One pass goes to the end; later ones leave the open record alone until what they sealed is written.
        let waits = self.sealed > 0;
        while self.seals_next(bytes, waits) {
            if seal.needs_update() {
                self.update_key(seal, false)?;
            }
            let Some(record) = self.records.get_mut(self.sealed) else { break };
            let plaintext = record.end - START;
            record.end = seal.seal(&mut record.slab, record.content, plaintext)?;
            self.queued += record.end - plaintext;
            self.sealed += 1;
        }
        Ok(())
    }

    /// Nothing that was sealed waits.
    pub fn is_all_written(&self) -> bool {
        self.sealed == 0
    }

    /// Whether [`Self::seal`] would seal something now.
    pub fn will_seal(&self, bytes: usize) -> bool {
        self.seals_next(bytes, self.sealed > 0)
    }

    /// Behind sealed records that wait, the open one stays open: it could not be written before them, and a peer that does not read
    /// would otherwise have a slab for each small frame.
    fn seals_next(&self, bytes: usize, waits: bool) -> bool {
        let ready: usize = self.records.iter().take(self.sealed).map(|record| record.end).sum();
        let is_last = self.sealed + 1 >= self.records.len();
        let stays_open = waits && is_last && self.tail_space() >= WORTHWHILE;
        ready - self.written < bytes && self.sealed < self.records.len() && !stays_open
    }

    /// A KeyUpdate (RFC 8446 §4.6.3) behind what is sealed already and before what is not; that goes by the next key.
    ///
    /// # Errors
    /// When no key can seal any more.
    pub fn update_key(&mut self, seal: &mut Seal, request: bool) -> Result<(), RecordError> {
        let mut record = Record::new(ContentType::Handshake);
        record.end = seal.key_update(&mut record.slab, request)?;
        self.queued += record.end;
        self.records.insert(self.sealed, record);
        self.sealed += 1;
        Ok(())
    }

    /// Ends the connection's sending direction, behind everything else.
    pub fn alert(&mut self, level: u8, description: u8) {
        let mut record = Record::new(ContentType::Alert);
        record.append(&[level, description]);
        self.queued += 2;
        self.records.push_back(record);
    }

    /// Drops what has not been sealed: the peer will not listen to it.
    pub fn discard_unsealed(&mut self) {
        for record in self.records.drain(self.sealed..) {
            self.queued -= record.end - START;
            give_back(record.slab);
        }
    }

    /// What can be written now, in order.
    pub fn ready(&self) -> impl Iterator<Item = &[u8]> {
        let mut skip = self.written;
        self.records.iter().take(self.sealed).map(move |record| &record.slab[std::mem::take(&mut skip)..record.end])
    }

    /// `bytes` of [`Self::ready`] have been written.
    pub fn advance(&mut self, bytes: usize) {
        self.queued -= bytes;
        self.written += bytes;
        while self.sealed > 0
            && let Some(front) = self.records.front()
            && self.written >= front.end
        {
            self.written -= front.end;
            self.sealed -= 1;
            self.records.pop_front().into_iter().for_each(|record| give_back(record.slab));
        }
        if self.records.is_empty() {
            // The queue's own memory: an idle tunnel has none.
            self.records = VecDeque::new();
        }
    }
}

impl Drop for Out {
    fn drop(&mut self) {
        self.records.drain(..).for_each(|record| give_back(record.slab));
    }
}

const CIPHERTEXT: u16 = 1;
const PLAINTEXT: u16 = 2;

impl Snapshot for Out {
    fn save(&self, to: &mut Writer) {
        let ciphertext: Vec<u8> = self.ready().flatten().copied().collect();
        if !ciphertext.is_empty() {
            to.bytes(CIPHERTEXT, &ciphertext);
        }
        for record in self.records.iter().skip(self.sealed) {
            let mut bytes = zeroize::Zeroizing::new(vec![record.content as u8]);
            bytes.extend_from_slice(&record.slab[START..record.end]);
            to.bytes(PLAINTEXT, &bytes);
        }
    }

    fn restore(from: &Fields<'_>) -> Result<Self, RestoreError> {
        from.only(&[CIPHERTEXT, PLAINTEXT])?;
        let invalid = || RestoreError::Invalid { tag: PLAINTEXT, why: "is no record" };
        let mut out = Self::default();
        // Where records begin means nothing any more: slabs are filled, so that restoring costs about as much as was saved.
        for bytes in from.optional(CIPHERTEXT)?.unwrap_or_default().chunks(SLAB) {
            let mut slab = take_slab();
            slab[..bytes.len()].copy_from_slice(bytes);
            out.records.push_back(Record { slab, end: bytes.len(), content: ContentType::ApplicationData });
            out.sealed += 1;
            out.queued += bytes.len();
        }
        if from.all(PLAINTEXT).count() > MAX_RESTORED {
            return Err(RestoreError::Invalid { tag: PLAINTEXT, why: "occurs more often than anything was queued" });
        }
        for bytes in from.all(PLAINTEXT) {
            let (content, plaintext) = bytes.split_first().ok_or_else(invalid)?;
            const CONTENTS: [ContentType; 3] =
                [ContentType::Alert, ContentType::Handshake, ContentType::ApplicationData];
            let content = CONTENTS.into_iter().find(|known| *known as u8 == *content);
            let content = content.ok_or_else(invalid)?;
            if !(1..=MAX_PLAINTEXT).contains(&plaintext.len()) {
                return Err(invalid());
            }
            let mut record = Record::new(content);
            record.append(plaintext);
            out.records.push_back(record);
            out.queued += plaintext.len();
        }
        Ok(out)
    }
}
