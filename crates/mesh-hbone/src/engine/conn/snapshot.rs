//! The connection as fields. Events must have been taken before (every turn takes them all), and the memory budget is the new owner's
//! to set.

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use super::{
    Conn, Leaving, Local, Peer, RESETS_REMEMBERED, Role, Stream,
    input::{Block, Parse, gathered},
    time::Pings,
};
use crate::engine::{
    flow::Budget,
    frame::{self, HEADER, Header, Kind},
    state::{Fields, RestoreError, Snapshot, Writer},
};

mod tag {
    pub(super) const ROLE: u16 = 1;
    pub(super) const LOCAL: u16 = 2;
    pub(super) const PEER: u16 = 3;
    pub(super) const NOW: u16 = 4;
    pub(super) const PARSE: u16 = 5;
    pub(super) const BLOCK: u16 = 6;
    pub(super) const DECODER: u16 = 7;
    pub(super) const ENCODER: u16 = 8;
    pub(super) const STREAM: u16 = 9;
    pub(super) const NEXT_ID: u16 = 10;
    pub(super) const HIGHEST: u16 = 11;
    pub(super) const SEND: u16 = 12;
    pub(super) const RECV: u16 = 13;
    pub(super) const SETTINGS_ACKED: u16 = 14;
    pub(super) const PINGS: u16 = 15;
    pub(super) const LIMITS: u16 = 16;
    pub(super) const LEAVING: u16 = 17;
    pub(super) const LEFT: u16 = 18;
    pub(super) const RESET: u16 = 19;
    pub(super) const LAST_TINY: u16 = 20;

    pub(super) const ALL: [u16; 20] = [
        ROLE,
        LOCAL,
        PEER,
        NOW,
        PARSE,
        BLOCK,
        DECODER,
        ENCODER,
        STREAM,
        NEXT_ID,
        HIGHEST,
        SEND,
        RECV,
        SETTINGS_ACKED,
        PINGS,
        LIMITS,
        LEAVING,
        LEFT,
        RESET,
        LAST_TINY,
    ];
}

fn invalid<T>(tag: u16, why: &'static str) -> Result<T, RestoreError> {
    Err(RestoreError::Invalid { tag, why })
}

fn nanos(time: Duration) -> u64 {
    // 584 years.
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn time(from: &Fields<'_>, tag: u16) -> Result<Duration, RestoreError> {
    from.u64(tag).map(Duration::from_nanos)
}

impl Snapshot for Conn {
    fn save(&self, to: &mut Writer) {
        debug_assert!(self.events.is_empty(), "a turn is not over");
        to.flag(tag::ROLE, self.role == Role::Server);
        to.snapshot(tag::LOCAL, &self.local);
        to.snapshot(tag::PEER, &self.peer);
        to.u64(tag::NOW, nanos(self.now));
        to.snapshot(tag::PARSE, &self.parse);
        if let Some(block) = &self.block {
            to.snapshot(tag::BLOCK, block);
        }
        to.snapshot(tag::DECODER, &self.decoder);
        to.snapshot(tag::ENCODER, &self.encoder);
        let mut ids: Vec<u32> = self.streams.keys().copied().collect();
        ids.sort_unstable();
        for id in ids {
            to.group(tag::STREAM, |to| {
                to.u32(0, id);
                self.streams[&id].save(to);
            });
        }
        to.u32(tag::NEXT_ID, self.next_id);
        to.u32(tag::HIGHEST, self.highest);
        to.snapshot(tag::SEND, &self.send);
        to.snapshot(tag::RECV, &self.recv);
        to.flag(tag::SETTINGS_ACKED, self.settings_acked);
        to.snapshot(tag::PINGS, &self.pings);
        to.snapshot(tag::LIMITS, &self.limits);
        match self.leaving {
            Leaving::No => {}
            Leaving::Announced { ping, deadline } => to.group(tag::LEAVING, |to| {
                to.u64(1, ping);
                to.u64(2, nanos(deadline));
            }),
            Leaving::Final { last } => to.group(tag::LEAVING, |to| to.u32(3, last)),
        }
        if let Some(left) = self.left {
            to.u32(tag::LEFT, left);
        }
        let reset: Vec<u8> = self.reset.iter().flat_map(|id| id.to_be_bytes()).collect();
        to.bytes(tag::RESET, &reset);
        if let Some(tiny) = self.last_tiny {
            to.u32(tag::LAST_TINY, tiny);
        }
    }

    fn restore(from: &Fields<'_>) -> Result<Self, RestoreError> {
        from.only(&tag::ALL)?;
        let mut streams = HashMap::default();
        for stream in from.all(tag::STREAM) {
            let fields = Fields::parse(stream)?;
            if streams.insert(fields.u32(0)?, Stream::restore(&fields)?).is_some() {
                return invalid(tag::STREAM, "a stream occurs twice");
            }
        }
        let leaving = from.optional(tag::LEAVING)?.map(Fields::parse).transpose()?;
        let leaving = match leaving.as_ref().map(|fields| fields.only(&[1, 2, 3])).transpose()? {
            None => Leaving::No,
            Some(fields) if fields.optional(3)?.is_some() => Leaving::Final { last: fields.u32(3)? },
            Some(fields) => Leaving::Announced { ping: fields.u64(1)?, deadline: time(fields, 2)? },
        };
        let (ids, rest) = from.bytes(tag::RESET)?.as_chunks();
        if !rest.is_empty() || ids.len() > RESETS_REMEMBERED {
            return invalid(tag::RESET, "is no list of streams");
        }
        let optional = |tag| from.optional(tag).and_then(|value| value.map(|_| from.u32(tag)).transpose());
        let conn = Self {
            role: if from.flag(tag::ROLE)? { Role::Server } else { Role::Client },
            local: from.snapshot(tag::LOCAL)?,
            peer: from.snapshot(tag::PEER)?,
            now: time(from, tag::NOW)?,
            parse: from.snapshot(tag::PARSE)?,
            block: from.optional(tag::BLOCK)?.map(|_| from.snapshot(tag::BLOCK)).transpose()?,
            decoder: from.snapshot(tag::DECODER)?,
            encoder: from.snapshot(tag::ENCODER)?,
            streams,
            next_id: from.u32(tag::NEXT_ID)?,
            highest: from.u32(tag::HIGHEST)?,
            send: from.snapshot(tag::SEND)?,
            recv: from.snapshot(tag::RECV)?,
            settings_acked: from.flag(tag::SETTINGS_ACKED)?,
            pings: from.snapshot(tag::PINGS)?,
            limits: from.snapshot(tag::LIMITS)?,
            leaving,
            left: optional(tag::LEFT)?,
            reset: ids.iter().map(|id| u32::from_be_bytes(*id)).collect(),
            last_tiny: optional(tag::LAST_TINY)?,
            events: VecDeque::new(),
            // Whoever restores knows the pod.
            budget: Budget::default(),
        };
        if conn.next_id.is_multiple_of(2) || conn.next_id > frame::MAX_STREAM_ID + 2 {
            return invalid(tag::NEXT_ID, "is no client's stream");
        }
        conn.check_streams()?;
        conn.check_parse()?;
        let grown: usize = conn.streams.values().map(|stream| conn.grown(stream)).sum();
        conn.budget.grow(grown);
        Ok(conn)
    }
}

/// What other code relies on, and only a damaged snapshot breaks.
impl Conn {
    fn was_opened(&self, id: u32) -> bool {
        let opened = match self.role {
            Role::Client => id < self.next_id,
            Role::Server => id <= self.highest,
        };
        opened && !id.is_multiple_of(2)
    }

    fn check_streams(&self) -> Result<(), RestoreError> {
        if !self.streams.keys().all(|id| self.was_opened(*id)) {
            return invalid(tag::STREAM, "a stream was never opened");
        }
        // What a window costs is what it has grown by.
        if self.streams.values().any(|stream| stream.recv.target() < self.local.stream_window) {
            return invalid(tag::STREAM, "a window has shrunk");
        }
        Ok(())
    }

    fn check_parse(&self) -> Result<(), RestoreError> {
        // Of a DATA frame: what is still to come was counted against both windows when it began.
        let is_received = |bytes: u32, id: u32, deliver: bool| {
            let stream = self.streams.get(&id).filter(|_| deliver);
            let fits = bytes <= self.recv.held() && stream.is_none_or(|stream| bytes <= stream.recv.held());
            // One that is opened later must not inherit it.
            fits && (self.was_opened(id) || !deliver)
        };
        let fits = match &self.parse {
            Parse::Preface { .. } => self.role == Role::Server,
            Parse::Header { .. } => true,
            Parse::Whole { header, .. } => header.length <= self.local.frame_size,
            Parse::Padding { header, deliver } => is_received(header.length, header.stream, *deliver),
            Parse::Data { stream, left, padding, deliver, .. } => {
                *left > 0 && *padding <= u32::from(u8::MAX) && is_received(*left, *stream, *deliver)
            }
            Parse::Skip { left } => (1..=self.local.frame_size).contains(left),
        };
        if !fits {
            return invalid(tag::PARSE, "is no place in a frame");
        }
        match &self.block {
            Some(block) if block.bytes.len() > self.max_block() => invalid(tag::BLOCK, "is too long"),
            Some(_) | None => Ok(()),
        }
    }
}

impl Snapshot for Local {
    fn save(&self, to: &mut Writer) {
        to.u32(1, self.stream_window);
        to.u32(2, self.connection_window);
        to.u32(3, self.frame_size);
        to.u32(4, self.header_list);
        to.u32(5, self.max_streams);
        to.u64(6, nanos(self.ping_interval));
        to.u64(7, nanos(self.ping_timeout));
        to.u64(8, nanos(self.handshake_timeout));
    }

    fn restore(from: &Fields<'_>) -> Result<Self, RestoreError> {
        from.only(&[1, 2, 3, 4, 5, 6, 7, 8])?;
        let local = Self {
            stream_window: from.u32(1)?,
            connection_window: from.u32(2)?,
            frame_size: from.u32(3)?,
            header_list: from.u32(4)?,
            max_streams: from.u32(5)?,
            ping_interval: time(from, 6)?,
            ping_timeout: time(from, 7)?,
            handshake_timeout: time(from, 8)?,
        };
        if !(frame::MIN_FRAME_SIZE..=frame::MAX_FRAME_SIZE).contains(&local.frame_size) {
            return invalid(3, "is no frame size");
        }
        if local.stream_window > frame::MAX_WINDOW || local.connection_window > frame::MAX_WINDOW {
            return invalid(1, "is no window");
        }
        Ok(local)
    }
}

impl Snapshot for Peer {
    fn save(&self, to: &mut Writer) {
        to.u32(1, self.initial_window);
        if let Some(max) = self.max_streams {
            to.u32(2, max);
        }
        to.flag(3, self.known);
    }

    fn restore(from: &Fields<'_>) -> Result<Self, RestoreError> {
        from.only(&[1, 2, 3])?;
        let max_streams = from.optional(2)?.map(|_| from.u32(2)).transpose()?;
        let peer = Self { initial_window: from.u32(1)?, max_streams, known: from.flag(3)? };
        if peer.initial_window > frame::MAX_WINDOW { invalid(1, "is no window") } else { Ok(peer) }
    }
}

impl Snapshot for Stream {
    fn save(&self, to: &mut Writer) {
        to.snapshot(1, &self.send);
        to.snapshot(2, &self.recv);
        to.flag(3, self.local_closed);
        to.flag(4, self.remote_closed);
        to.flag(5, self.headed);
        to.flag(6, self.blocked);
    }

    fn restore(from: &Fields<'_>) -> Result<Self, RestoreError> {
        from.only(&[0, 1, 2, 3, 4, 5, 6])?;
        Ok(Self {
            send: from.snapshot(1)?,
            recv: from.snapshot(2)?,
            local_closed: from.flag(3)?,
            remote_closed: from.flag(4)?,
            headed: from.flag(5)?,
            blocked: from.flag(6)?,
        })
    }
}

impl Snapshot for Pings {
    fn save(&self, to: &mut Writer) {
        to.u64(1, self.next);
        if let Some((number, sent)) = self.pending {
            to.u64(2, number);
            to.u64(3, nanos(sent));
        }
        to.u64(4, nanos(self.answered));
    }

    fn restore(from: &Fields<'_>) -> Result<Self, RestoreError> {
        from.only(&[1, 2, 3, 4])?;
        let pending = from.optional(2)?.map(|_| Ok::<_, RestoreError>((from.u64(2)?, time(from, 3)?))).transpose()?;
        Ok(Self { next: from.u64(1)?, pending, answered: time(from, 4)? })
    }
}

impl Snapshot for Block {
    fn save(&self, to: &mut Writer) {
        to.u32(1, self.stream);
        to.flag(2, self.end);
        to.bytes(3, &self.bytes);
        to.u64(4, nanos(self.began));
    }

    fn restore(from: &Fields<'_>) -> Result<Self, RestoreError> {
        from.only(&[1, 2, 3, 4])?;
        Ok(Self { stream: from.u32(1)?, end: from.flag(2)?, bytes: from.bytes(3)?.to_vec(), began: time(from, 4)? })
    }
}

/// One field per state: 1 preface, 2 header, 3 whole frame, 4 padding, 5 data, 6 skip.
impl Snapshot for Parse {
    fn save(&self, to: &mut Writer) {
        match self {
            Self::Preface { seen } => to.u64(1, *seen as u64),
            Self::Header { bytes, filled } => to.bytes(2, &bytes[..*filled]),
            Self::Whole { header, payload, missing, skip } => to.group(3, |to| {
                to.bytes(1, &header.encode());
                to.bytes(2, payload);
                to.u32(3, *missing);
                to.u32(4, *skip);
            }),
            Self::Padding { header, deliver } => to.group(4, |to| {
                to.bytes(1, &header.encode());
                to.flag(2, *deliver);
            }),
            Self::Data { stream, left, padding, end, deliver } => to.group(5, |to| {
                to.u32(1, *stream);
                to.u32(2, *left);
                to.u32(3, *padding);
                to.flag(4, *end);
                to.flag(5, *deliver);
            }),
            Self::Skip { left } => to.u32(6, *left),
        }
    }

    fn restore(from: &Fields<'_>) -> Result<Self, RestoreError> {
        from.only(&[1, 2, 3, 4, 5, 6])?;
        if from.optional(1)?.is_some() {
            return match usize::try_from(from.u64(1)?) {
                Ok(seen) if seen < frame::PREFACE.len() => Ok(Self::Preface { seen }),
                Ok(_) | Err(_) => invalid(1, "is beyond the preface"),
            };
        }
        if let Some(seen) = from.optional(2)? {
            let mut bytes = [0; HEADER];
            let Some(room) = bytes.get_mut(..seen.len()).filter(|_| seen.len() < HEADER) else {
                return invalid(2, "is a whole header");
            };
            room.copy_from_slice(seen);
            return Ok(Self::Header { bytes, filled: seen.len() });
        }
        if let Some(whole) = from.optional(3)? {
            let fields = Fields::parse(whole)?;
            fields.only(&[1, 2, 3, 4])?;
            let header = Header::parse(&fields.array(1)?);
            let (payload, missing, skip) = (fields.bytes(2)?.to_vec(), fields.u32(3)?, fields.u32(4)?);
            let length = gathered(&header).filter(|length| length.checked_add(skip) == Some(header.length));
            let whole = u32::try_from(payload.len()).ok().and_then(|have| have.checked_add(missing));
            if missing == 0 || length.is_none() || whole != length {
                return invalid(3, "has not the length of its frame");
            }
            return Ok(Self::Whole { header, payload, missing, skip });
        }
        if let Some(padding) = from.optional(4)? {
            let fields = Fields::parse(padding)?;
            fields.only(&[1, 2])?;
            let header = Header::parse(&fields.array(1)?);
            if header.length == 0 || header.kind != Kind::Data {
                return invalid(4, "is no padded frame");
            }
            return Ok(Self::Padding { header, deliver: fields.flag(2)? });
        }
        if let Some(data) = from.optional(5)? {
            let fields = Fields::parse(data)?;
            fields.only(&[1, 2, 3, 4, 5])?;
            return Ok(Self::Data {
                stream: fields.u32(1)?,
                left: fields.u32(2)?,
                padding: fields.u32(3)?,
                end: fields.flag(4)?,
                deliver: fields.flag(5)?,
            });
        }
        Ok(Self::Skip { left: from.u32(6)? })
    }
}
