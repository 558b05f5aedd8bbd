//! From bytes to frames: nothing is copied that is there as a whole, and payload never is.

use std::{ops::Range, time::Duration};

use super::{Conn, ConnError, Event, MAX_QUEUED, widen};
use crate::engine::{
    frame::{self, ErrorCode, HEADER, Header, Kind, PREFACE},
    limits::Abuse,
    out::Out,
};

/// SETTINGS longer than this repeat themselves.
const MAX_SETTINGS: u32 = 64 * 6;
/// What of a GOAWAY is read: its debug data is for people.
const MAX_GOAWAY: u32 = 8;
/// A DATA frame below this is tiny.
const TINY: u32 = 16;

/// Where in the peer's bytes we are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Parse {
    /// The client's first 24 bytes.
    Preface {
        seen: usize,
    },
    Header {
        bytes: [u8; HEADER],
        filled: usize,
    },
    /// A frame that is handled as a whole: `payload` has arrived, `missing` has not; `skip` bytes after it mean nothing.
    Whole {
        header: Header,
        payload: Vec<u8>,
        missing: u32,
        skip: u32,
    },
    /// The first byte of a padded DATA frame.
    Padding {
        header: Header,
        deliver: bool,
    },
    Data {
        stream: u32,
        left: u32,
        padding: u32,
        end: bool,
        deliver: bool,
    },
    Skip {
        left: u32,
    },
}

impl Default for Parse {
    fn default() -> Self {
        Self::Header { bytes: [0; HEADER], filled: 0 }
    }
}

/// HEADERS whose CONTINUATIONs are still coming.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) stream: u32,
    pub(super) end: bool,
    pub(super) bytes: Vec<u8>,
    pub(super) began: Duration,
}

impl Conn {
    /// The next thing that `input` from `at` on tells; `None` when it tells no more. `at` moves to the first byte not looked at. Ranges of
    /// [`Event::Data`] are of `input`.
    ///
    /// # Errors
    /// The connection is over; [`Conn::close`] tells the peer.
    pub fn next(&mut self, input: &[u8], at: &mut usize, out: &mut Out) -> Result<Option<Event>, ConnError> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            if out.queued() > MAX_QUEUED {
                return Err(Abuse::NeverReads.into());
            }
            let rest = input.get(*at..).unwrap_or_default();
            let before = *at;
            let data = self.step(rest, at, out)?;
            if let Some((stream, range)) = data {
                return Ok(Some(Event::Data { stream, range: before + range.start..before + range.end }));
            }
            if *at == before && self.events.is_empty() {
                return Ok(None);
            }
        }
    }

    /// One step forward; payload as a range of `rest`.
    fn step(&mut self, rest: &[u8], at: &mut usize, out: &mut Out) -> Result<Option<(u32, Range<usize>)>, ConnError> {
        match &mut self.parse {
            Parse::Preface { seen } => {
                let length = rest.len().min(PREFACE.len() - *seen);
                if rest[..length] != PREFACE[*seen..*seen + length] {
                    return Err(ConnError::protocol("no HTTP/2 preface"));
                }
                *seen += length;
                *at += length;
                if *seen == PREFACE.len() {
                    self.parse = Parse::default();
                }
            }
            Parse::Header { bytes, filled } => {
                let length = rest.len().min(HEADER - *filled);
                bytes[*filled..*filled + length].copy_from_slice(&rest[..length]);
                *filled += length;
                *at += length;
                if *filled == HEADER {
                    let header = Header::parse(bytes);
                    self.begin(header, out)?;
                    // The common case: the whole frame is here, and need not be gathered.
                    if let Parse::Whole { missing, skip, .. } = &self.parse
                        && let Some(payload) = rest[length..].get(..widen(*missing))
                    {
                        *at += payload.len();
                        let skip = *skip;
                        self.parse = after(skip);
                        self.handle(header, payload, out)?;
                    }
                }
            }
            Parse::Whole { header, payload, missing, skip } => {
                let length = rest.len().min(widen(*missing));
                payload.extend_from_slice(&rest[..length]);
                *missing -= narrow(length);
                *at += length;
                if *missing == 0 {
                    let (header, payload, skip) = (*header, std::mem::take(payload), *skip);
                    self.parse = after(skip);
                    self.handle(header, &payload, out)?;
                }
            }
            Parse::Padding { header, deliver } => {
                let (header, deliver) = (*header, *deliver);
                if let Some(padding) = rest.first() {
                    *at += 1;
                    let padding = u32::from(*padding);
                    let left = (header.length - 1)
                        .checked_sub(padding)
                        .ok_or(ConnError::protocol("more padding than frame"))?;
                    self.returned(header.stream, padding + 1, deliver, out);
                    self.begin_data(&header, left, padding, deliver, out)?;
                }
            }
            Parse::Data { stream, left, deliver, .. } => {
                let (stream, deliver) = (*stream, *deliver);
                let length = rest.len().min(widen(*left));
                *left -= narrow(length);
                let done = *left == 0;
                *at += length;
                self.received(narrow(length), out);
                if done {
                    self.end_data(out);
                }
                if deliver && length > 0 {
                    return Ok(Some((stream, 0..length)));
                }
            }
            Parse::Skip { left } => {
                let length = rest.len().min(widen(*left));
                *left -= narrow(length);
                *at += length;
                if *left == 0 {
                    self.parse = Parse::default();
                }
            }
        }
        Ok(None)
    }

    /// A frame header is complete.
    fn begin(&mut self, header: Header, out: &mut Out) -> Result<(), ConnError> {
        if header.length > self.local.frame_size {
            return Err(ConnError::new(ErrorCode::FRAME_SIZE_ERROR, "a frame beyond SETTINGS_MAX_FRAME_SIZE"));
        }
        if !self.peer.known && (header.kind != Kind::Settings || header.has(frame::ACK)) {
            return Err(ConnError::protocol("the first frame is not SETTINGS"));
        }
        if let Some(block) = &self.block
            && (header.kind != Kind::Continuation || header.stream != block.stream)
        {
            return Err(ConnError::protocol("a header block is interrupted"));
        }
        match header.kind {
            Kind::Data => return self.begin_flow(&header, out),
            Kind::Headers | Kind::Continuation => {
                let gathered = self.block.as_ref().map_or(0, |block| block.bytes.len());
                if gathered + widen(header.length) > self.max_block() {
                    return Err(Abuse::HeaderList.into());
                }
            }
            Kind::Settings if header.length > MAX_SETTINGS => return Err(Abuse::Settings.into()),
            Kind::RstStream | Kind::WindowUpdate => expect_length(&header, 4)?,
            Kind::Ping => expect_length(&header, 8)?,
            Kind::Priority => {
                // Deprecated (RFC 9113 §5.3.2): read past, but for its size, which is a stream error.
                if header.stream == 0 {
                    return Err(ConnError::protocol("PRIORITY for the connection"));
                }
                self.limits.spend(Abuse::Useless, self.now)?;
                if header.length != 5 {
                    self.fail(header.stream, ErrorCode::FRAME_SIZE_ERROR, out)?;
                }
            }
            Kind::GoAway if header.length < 8 => {
                return Err(ConnError::new(ErrorCode::FRAME_SIZE_ERROR, "a short GOAWAY"));
            }
            Kind::Settings | Kind::GoAway => {}
            Kind::PushPromise => return Err(ConnError::protocol("PUSH_PROMISE, which we do not allow")),
            Kind::Unknown(_) => self.limits.spend(Abuse::Useless, self.now)?,
        }
        self.parse = match gathered(&header) {
            Some(length) => Parse::Whole { header, payload: Vec::new(), missing: length, skip: header.length - length },
            None => after(header.length),
        };
        Ok(())
    }

    /// Encoded header blocks: several times the list's limit, so that a list too long is answered and not a reason to part.
    pub(super) fn max_block(&self) -> usize {
        4 * widen(self.local.header_list)
    }

    /// A DATA frame: all of it counts against both windows (RFC 9113 §6.9.1), whoever gets it.
    fn begin_flow(&mut self, header: &Header, out: &mut Out) -> Result<(), ConnError> {
        let (id, length) = (header.stream, header.length);
        if id == 0 {
            return Err(ConnError::protocol("DATA for the connection"));
        }
        let overrun = ConnError::new(ErrorCode::FLOW_CONTROL_ERROR, "the connection's window is overrun");
        self.recv.receive(length).map_err(|_| overrun)?;
        let deliver = self.admit_data(id, length, out)?;
        if !header.has(frame::PADDED) {
            return self.begin_data(header, length, 0, deliver, out);
        }
        if length == 0 {
            return Err(ConnError::new(ErrorCode::FRAME_SIZE_ERROR, "padding without its length"));
        }
        self.parse = Parse::Padding { header: *header, deliver };
        Ok(())
    }

    /// Whether anybody wants the payload.
    fn admit_data(&mut self, id: u32, length: u32, out: &mut Out) -> Result<bool, ConnError> {
        let is_server = self.role == super::Role::Server;
        let Some(stream) = self.streams.get_mut(&id) else {
            self.expect_known(id)?;
            if !self.reset.contains(&id) && !self.is_ignored(id) {
                self.limits.spend(Abuse::Useless, self.now)?;
                self.send_reset(id, ErrorCode::STREAM_CLOSED, out);
            }
            return Ok(false);
        };
        let failure = if stream.remote_closed {
            Some(ErrorCode::STREAM_CLOSED)
        } else if !is_server && !stream.headed {
            Some(ErrorCode::PROTOCOL_ERROR)
        } else {
            stream.recv.receive(length).err().map(|_| ErrorCode::FLOW_CONTROL_ERROR)
        };
        if let Some(code) = failure {
            self.fail(id, code, out)?;
        }
        Ok(failure.is_none())
    }

    fn begin_data(
        &mut self,
        header: &Header,
        left: u32,
        padding: u32,
        deliver: bool,
        out: &mut Out,
    ) -> Result<(), ConnError> {
        let end = header.has(frame::END_STREAM);
        if left == 0 && !end {
            self.limits.spend(Abuse::EmptyData, self.now)?;
        } else if left < TINY && self.last_tiny == Some(header.stream) {
            self.limits.spend(Abuse::TinyData, self.now)?;
        }
        self.last_tiny = (left < TINY).then_some(header.stream);
        self.parse = Parse::Data { stream: header.stream, left, padding, end, deliver };
        if left == 0 {
            self.end_data(out);
        }
        Ok(())
    }

    fn end_data(&mut self, out: &mut Out) {
        let Parse::Data { stream, padding, end, deliver, .. } = self.parse else { return };
        self.parse = after(padding);
        if end && deliver {
            self.remote_end(stream, out);
        }
    }

    /// Bytes of a DATA frame are here: the connection's window does not wait for anybody to want them.
    fn received(&mut self, bytes: u32, out: &mut Out) {
        if let Some(increment) = self.recv.release(bytes) {
            out.frame(Kind::WindowUpdate, 0, 0, &increment.to_be_bytes());
        }
    }

    /// Padding and its length: nobody will ever take those.
    fn returned(&mut self, id: u32, bytes: u32, deliver: bool, out: &mut Out) {
        self.received(bytes, out);
        if deliver {
            self.consumed(id, widen(bytes), out);
        }
    }

    /// A new record begins: what follows was not said in one breath with what came before.
    pub fn begin_record(&mut self) {
        self.last_tiny = None;
    }

    /// The peer may not name streams that were never opened (RFC 9113 §5.1.1).
    pub(super) fn expect_known(&self, id: u32) -> Result<(), ConnError> {
        let ours = id % 2 == 1 && self.role == super::Role::Client;
        let known = if ours { id < self.next_id } else { id <= self.highest };
        if known { Ok(()) } else { Err(ConnError::protocol("a frame for a stream that was never opened")) }
    }

    /// Opened by a peer that did not know yet that we are leaving.
    pub(super) fn is_ignored(&self, id: u32) -> bool {
        matches!(self.leaving, super::Leaving::Final { last } if id > last)
    }
}

fn after(skip: u32) -> Parse {
    if skip == 0 { Parse::default() } else { Parse::Skip { left: skip } }
}

fn expect_length(header: &Header, length: u32) -> Result<(), ConnError> {
    if header.length == length {
        Ok(())
    } else {
        Err(ConnError::new(ErrorCode::FRAME_SIZE_ERROR, "a frame of the wrong size"))
    }
}

/// How many bytes of a frame are gathered before it is handled, if it is one that is handled as a whole.
pub(super) fn gathered(header: &Header) -> Option<u32> {
    match header.kind {
        Kind::Headers | Kind::Continuation | Kind::Settings | Kind::RstStream | Kind::WindowUpdate | Kind::Ping => {
            Some(header.length)
        }
        Kind::GoAway => Some(header.length.min(MAX_GOAWAY)),
        Kind::Data | Kind::Priority | Kind::PushPromise | Kind::Unknown(_) => None,
    }
}

/// Lengths within one input buffer.
fn narrow(length: usize) -> u32 {
    u32::try_from(length).expect("input buffers are smaller than 4 GiB")
}
