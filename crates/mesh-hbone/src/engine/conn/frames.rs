//! What each frame but DATA means (RFC 9113 §6).

use std::time::Duration;

use http::{HeaderMap, StatusCode};

use super::{Conn, ConnError, Event, Leaving, Role, input::Block, send_go_away};
use crate::engine::{
    frame::{self, ErrorCode, Header, Kind, setting},
    head::{self, Malformed, RequestHead, ResponseHead},
    hpack::HeaderList,
    limits::Abuse,
    out::Out,
};

impl Conn {
    pub(super) fn handle(&mut self, header: Header, payload: &[u8], out: &mut Out) -> Result<(), ConnError> {
        let on_connection = header.stream == 0;
        match header.kind {
            Kind::Headers => self.headers(header, payload, out),
            Kind::Continuation => self.continuation(header, payload, out),
            Kind::Settings if on_connection => self.settings(header, payload, out),
            Kind::Ping if on_connection => self.ping(header, payload, out),
            Kind::GoAway if on_connection => self.go_away(payload),
            Kind::Settings | Kind::Ping | Kind::GoAway => {
                Err(ConnError::protocol("a frame about the connection on a stream"))
            }
            Kind::RstStream => self.rst_stream(header.stream, payload),
            Kind::WindowUpdate => self.window_update(header.stream, payload, out),
            Kind::Data | Kind::Priority | Kind::PushPromise | Kind::Unknown(_) => Ok(()),
        }
    }

    fn headers(&mut self, header: Header, payload: &[u8], out: &mut Out) -> Result<(), ConnError> {
        if header.stream == 0 {
            return Err(ConnError::protocol("HEADERS for the connection"));
        }
        let mut fragment = payload;
        let short = ConnError::new(ErrorCode::FRAME_SIZE_ERROR, "HEADERS shorter than its flags say");
        if header.has(frame::PADDED) {
            let (padding, rest) = fragment.split_first().ok_or(short)?;
            let length = rest.len().checked_sub(usize::from(*padding));
            fragment = &rest[..length.ok_or(ConnError::protocol("more padding than frame"))?];
        }
        if header.has(frame::PRIORITY) {
            // Read past (RFC 9113 §5.3.2), but a stream cannot depend on itself.
            let (priority, rest) = fragment.split_first_chunk::<5>().ok_or(short)?;
            let [a, b, c, d, _] = *priority;
            if u32::from_be_bytes([a, b, c, d]) & frame::MAX_STREAM_ID == header.stream {
                return Err(ConnError::protocol("a stream that depends on itself"));
            }
            fragment = rest;
        }
        let end = header.has(frame::END_STREAM);
        if header.has(frame::END_HEADERS) {
            return self.head(header.stream, end, fragment, out);
        }
        if fragment.is_empty() {
            self.limits.spend(Abuse::Continuation, self.now)?;
        }
        self.block = Some(Block { stream: header.stream, end, bytes: fragment.to_vec(), began: self.now });
        Ok(())
    }

    fn continuation(&mut self, header: Header, payload: &[u8], out: &mut Out) -> Result<(), ConnError> {
        self.limits.spend(Abuse::Continuation, self.now)?;
        let Some(block) = &mut self.block else {
            return Err(ConnError::protocol("CONTINUATION without HEADERS"));
        };
        block.bytes.extend_from_slice(payload);
        if !header.has(frame::END_HEADERS) {
            return Ok(());
        }
        match self.block.take() {
            Some(block) => self.head(block.stream, block.end, &block.bytes, out),
            None => Ok(()),
        }
    }

    /// A header block is complete. It is decoded whatever becomes of it: the table's state depends on it.
    fn head(&mut self, id: u32, end: bool, block: &[u8], out: &mut Out) -> Result<(), ConnError> {
        let limit = super::widen(self.local.header_list);
        let list = self
            .decoder
            .decode(block, limit)
            .map_err(|_| ConnError::new(ErrorCode::COMPRESSION_ERROR, "a header block that cannot be decompressed"))?;
        match self.role {
            Role::Server => self.request(id, end, &list, out),
            Role::Client => self.response(id, end, &list, out),
        }
    }

    fn request(&mut self, id: u32, end: bool, list: &HeaderList, out: &mut Out) -> Result<(), ConnError> {
        if let Some(stream) = self.streams.get(&id) {
            if stream.remote_closed {
                return Err(ConnError::new(ErrorCode::STREAM_CLOSED, "HEADERS after the end of a stream"));
            }
            return self.trailers(id, end, list, out);
        }
        if id.is_multiple_of(2) {
            return Err(ConnError::protocol("a client's stream with an even number"));
        }
        let is_late = id <= self.highest;
        if is_late && !self.reset.contains(&id) && !self.is_ignored(id) {
            return Err(ConnError::new(ErrorCode::STREAM_CLOSED, "HEADERS for a stream that is over"));
        }
        self.highest = self.highest.max(id);
        if is_late || self.is_ignored(id) {
            self.limits.spend(Abuse::Useless, self.now)?;
            return Ok(());
        }
        let is_full = self.streams.len() >= super::widen(self.local.max_streams);
        if is_full {
            // It was told how many; only what was on its way meanwhile can be a mistake.
            self.limits.spend(Abuse::RapidReset, self.now)?;
        }
        if is_full || self.budget.is_exhausted() {
            self.send_reset(id, ErrorCode::REFUSED_STREAM, out);
            return Ok(());
        }
        self.insert(id);
        if list.too_large {
            self.limits.spend(Abuse::Useless, self.now)?;
            self.respond(id, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, &HeaderMap::new(), true, out);
            self.reset(id, ErrorCode::NO_ERROR, out);
            self.events.push_back(Event::Malformed { why: "the header list is too large" });
            return Ok(());
        }
        match RequestHead::parse(list) {
            Ok(head) => {
                self.events.push_back(Event::Request { stream: id, head });
                if end {
                    self.remote_end(id, out);
                }
                Ok(())
            }
            Err(Malformed(why)) => {
                self.limits.spend(Abuse::Useless, self.now)?;
                self.reset(id, ErrorCode::PROTOCOL_ERROR, out);
                self.events.push_back(Event::Malformed { why });
                Ok(())
            }
        }
    }

    fn response(&mut self, id: u32, end: bool, list: &HeaderList, out: &mut Out) -> Result<(), ConnError> {
        self.expect_known(id)?;
        let Some(stream) = self.streams.get_mut(&id) else {
            if !self.reset.contains(&id) {
                self.limits.spend(Abuse::Useless, self.now)?;
            }
            return Ok(());
        };
        if stream.remote_closed {
            return self.fail(id, ErrorCode::STREAM_CLOSED, out);
        }
        if stream.headed {
            return self.trailers(id, end, list, out);
        }
        if list.too_large {
            return self.fail(id, ErrorCode::ENHANCE_YOUR_CALM, out);
        }
        match ResponseHead::parse(list) {
            // RFC 9113 §8.1: interim answers end nothing; 101 does not exist here.
            Ok(head) if head.status.is_informational() && head.status != StatusCode::SWITCHING_PROTOCOLS && !end => {
                self.limits.spend(Abuse::Useless, self.now)?;
            }
            Ok(head) if !head.status.is_informational() => {
                stream.headed = true;
                self.events.push_back(Event::Response { stream: id, head });
                if end {
                    self.remote_end(id, out);
                }
            }
            Ok(_) | Err(_) => self.fail(id, ErrorCode::PROTOCOL_ERROR, out)?,
        }
        Ok(())
    }

    /// RFC 9113 §8.5 has no trailers after CONNECT; that they end the stream is what a peer that sends them means all the same.
    fn trailers(&mut self, id: u32, end: bool, list: &HeaderList, out: &mut Out) -> Result<(), ConnError> {
        if !end || head::check_trailers(list).is_err() {
            self.limits.spend(Abuse::Useless, self.now)?;
            return self.fail(id, ErrorCode::PROTOCOL_ERROR, out);
        }
        self.remote_end(id, out);
        Ok(())
    }

    pub(super) fn remote_end(&mut self, id: u32, _out: &mut Out) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        stream.remote_closed = true;
        let over = stream.local_closed;
        self.events.push_back(Event::End { stream: id });
        if over {
            self.remove(id);
        }
    }

    fn settings(&mut self, header: Header, payload: &[u8], out: &mut Out) -> Result<(), ConnError> {
        if header.has(frame::ACK) {
            if !payload.is_empty() {
                return Err(ConnError::new(ErrorCode::FRAME_SIZE_ERROR, "an acknowledgement with settings"));
            }
            if std::mem::replace(&mut self.settings_acked, true) {
                self.limits.spend(Abuse::Settings, self.now)?;
            } else {
                self.decoder.set_limit(0);
            }
            return Ok(());
        }
        let (settings, rest) = payload.as_chunks::<{ setting::LENGTH }>();
        if !rest.is_empty() {
            return Err(ConnError::new(ErrorCode::FRAME_SIZE_ERROR, "a part of a setting"));
        }
        if std::mem::replace(&mut self.peer.known, true) {
            self.limits.spend(Abuse::Settings, self.now)?;
        }
        for [id0, id1, v0, v1, v2, v3] in settings {
            self.setting(u16::from_be_bytes([*id0, *id1]), u32::from_be_bytes([*v0, *v1, *v2, *v3]))?;
        }
        out.frame(Kind::Settings, frame::ACK, 0, &[]);
        self.events.push_back(Event::Limits);
        Ok(())
    }

    fn setting(&mut self, id: u16, value: u32) -> Result<(), ConnError> {
        match id {
            setting::ENABLE_PUSH if value > 1 || (value == 1 && self.role == Role::Client) => {
                return Err(ConnError::protocol("SETTINGS_ENABLE_PUSH is out of range"));
            }
            setting::MAX_CONCURRENT_STREAMS => self.peer.max_streams = Some(value),
            setting::INITIAL_WINDOW_SIZE => {
                let overflow = ConnError::new(ErrorCode::FLOW_CONTROL_ERROR, "a window beyond 2^31-1");
                if value > frame::MAX_WINDOW {
                    return Err(overflow);
                }
                let difference = i64::from(value) - i64::from(self.peer.initial_window);
                self.peer.initial_window = value;
                let mut writable = Vec::new();
                for (id, stream) in &mut self.streams {
                    stream.send.adjust(difference).map_err(|_| overflow)?;
                    if stream.blocked && stream.send.available() > 0 {
                        stream.blocked = false;
                        writable.push(*id);
                    }
                }
                // Oldest first: a hash table's order would be another one after each hand-over.
                writable.sort_unstable();
                self.events.extend(writable.into_iter().map(|stream| Event::Writable { stream }));
            }
            setting::MAX_FRAME_SIZE if !(frame::MIN_FRAME_SIZE..=frame::MAX_FRAME_SIZE).contains(&value) => {
                return Err(ConnError::protocol("SETTINGS_MAX_FRAME_SIZE is out of range"));
            }
            // Our frames never exceed the smallest maximum; further parameters are none of ours (RFC 9113 §6.5.2).
            _ => {}
        }
        Ok(())
    }

    fn ping(&mut self, header: Header, payload: &[u8], out: &mut Out) -> Result<(), ConnError> {
        if !header.has(frame::ACK) {
            self.limits.spend(Abuse::Ping, self.now)?;
            out.frame(Kind::Ping, frame::ACK, 0, payload);
            return Ok(());
        }
        let number = payload.try_into().map_or(0, u64::from_be_bytes);
        let mut awaited = self.pings.answered(number, self.now);
        if let Leaving::Announced { ping, .. } = self.leaving
            && ping == number
        {
            awaited = true;
            self.leave(out);
        }
        if !awaited {
            self.limits.spend(Abuse::Ping, self.now)?;
        }
        Ok(())
    }

    /// The second GOAWAY: what came until now is served, what comes later was sent by a peer that knew.
    pub(super) fn leave(&mut self, out: &mut Out) {
        send_go_away(self.highest, ErrorCode::NO_ERROR, out);
        self.leaving = Leaving::Final { last: self.highest };
        // Wakes whoever waits for the connection to be done.
        self.events.push_back(Event::Limits);
    }

    fn go_away(&mut self, payload: &[u8]) -> Result<(), ConnError> {
        let Some((last, _)) = payload.split_first_chunk() else { return Ok(()) };
        if self.left.is_some() {
            self.limits.spend(Abuse::Useless, self.now)?;
        }
        let last = (u32::from_be_bytes(*last) & frame::MAX_STREAM_ID).min(self.left.unwrap_or(u32::MAX));
        self.left = Some(last);
        if self.role == Role::Client {
            // Never processed, so welcome elsewhere (RFC 9113 §6.8).
            let mut gone: Vec<u32> = self.streams.keys().copied().filter(|id| *id > last).collect();
            gone.sort_unstable();
            for id in gone {
                self.remove(id);
                self.events.push_back(Event::Reset { stream: id, code: ErrorCode::REFUSED_STREAM });
            }
        }
        self.events.push_back(Event::Limits);
        Ok(())
    }

    fn rst_stream(&mut self, id: u32, payload: &[u8]) -> Result<(), ConnError> {
        if id == 0 {
            return Err(ConnError::protocol("RST_STREAM for the connection"));
        }
        self.expect_known(id)?;
        let code = ErrorCode(payload.try_into().map_or(0, u32::from_be_bytes));
        match self.streams.get(&id) {
            Some(stream) => {
                if self.role == Role::Server && !stream.headed {
                    self.limits.spend(Abuse::RapidReset, self.now)?;
                }
                self.remove(id);
                self.events.push_back(Event::Reset { stream: id, code });
            }
            // It crossed ours on the wire, or comes for one that was never taken up.
            None if self.reset.contains(&id) || self.is_ignored(id) => self.reset.retain(|known| *known != id),
            None => self.limits.spend(Abuse::Useless, self.now)?,
        }
        Ok(())
    }

    fn window_update(&mut self, id: u32, payload: &[u8], out: &mut Out) -> Result<(), ConnError> {
        self.limits.spend(Abuse::WindowUpdate, self.now)?;
        let increment = payload.try_into().map_or(0, u32::from_be_bytes) & frame::MAX_WINDOW;
        if id == 0 {
            if increment == 0 {
                return Err(ConnError::protocol("WINDOW_UPDATE by nothing"));
            }
            let overflow = ConnError::new(ErrorCode::FLOW_CONTROL_ERROR, "the connection's window beyond 2^31-1");
            self.send.grant(increment).map_err(|_| overflow)?;
            self.events.push_back(Event::AllWritable);
            return Ok(());
        }
        self.expect_known(id)?;
        let Some(stream) = self.streams.get_mut(&id) else { return Ok(()) };
        if increment == 0 {
            self.fail(id, ErrorCode::PROTOCOL_ERROR, out)?;
        } else if stream.send.grant(increment).is_err() {
            self.fail(id, ErrorCode::FLOW_CONTROL_ERROR, out)?;
        } else if stream.blocked && stream.send.available() > 0 {
            stream.blocked = false;
            self.events.push_back(Event::Writable { stream: id });
        }
        Ok(())
    }

    pub(super) fn slow_block(&self) -> Option<Duration> {
        self.block.as_ref().map(|block| block.began + self.local.handshake_timeout)
    }
}
