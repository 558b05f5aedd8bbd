//! A response on its way out: resources are written as they lie in the cache, piece by piece as the client makes room.

use std::{
    pin::Pin,
    sync::{Arc, Weak},
    task::{Context, Poll, ready},
};

use bytes::{BufMut as _, Bytes, BytesMut};
use http_body::{Body, Frame};
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};
use tokio::sync::mpsc;
use tonic::{Status, codegen::http::HeaderMap};

/// Fields of `DeltaDiscoveryResponse`.
const VERSION: u32 = 1;
const RESOURCES: u32 = 2;
const TYPE_URL: u32 = 4;
const NONCE: u32 = 5;
const REMOVED: u32 = 6;
/// What is handed to the connection at once.
const PIECE: usize = 64 * 1024;

/// A resource's entry in a response.
pub(super) struct Entry<'a> {
    pub(super) type_url: &'a str,
    pub(super) name: &'a str,
    pub(super) version: &'a str,
    pub(super) aliases: &'a [Arc<str>],
    pub(super) body: &'a [u8],
}

/// An entry as it is sent, and where in it version and body begin; the body ends it.
pub(super) struct Encoding {
    pub(super) bytes: Bytes,
    pub(super) version: usize,
    pub(super) body: usize,
}

impl Entry<'_> {
    pub(super) fn encode(&self) -> Encoding {
        // google.protobuf.Any
        let any = length_of(1, self.type_url) + length_of(2, self.body);
        let aliases: usize = self.aliases.iter().map(|alias| length_of(4, &**alias)).sum();
        let length = length_of(3, self.name) + aliases + length_of(1, self.version) + framed(2, any);
        let mut bytes = BytesMut::with_capacity(framed(RESOURCES, length));
        put_length(RESOURCES, length, &mut bytes);
        put(3, self.name, &mut bytes);
        self.aliases.iter().for_each(|alias| put(4, &**alias, &mut bytes));
        put(1, self.version, &mut bytes);
        let version = bytes.len() - self.version.len();
        put_length(2, any, &mut bytes);
        put(1, self.type_url, &mut bytes);
        put(2, self.body, &mut bytes);
        let body = bytes.len() - self.body.len();
        Encoding { bytes: bytes.freeze(), version, body }
    }
}

fn framed(field: u32, length: usize) -> usize {
    key_len(field) + encoded_len_varint(length as u64) + length
}

fn length_of(field: u32, content: impl AsRef<[u8]>) -> usize {
    framed(field, content.as_ref().len())
}

fn put_length(field: u32, length: usize, bytes: &mut BytesMut) {
    encode_key(field, WireType::LengthDelimited, bytes);
    encode_varint(length as u64, bytes);
}

fn put(field: u32, content: impl AsRef<[u8]>, bytes: &mut BytesMut) {
    put_length(field, content.as_ref().len(), bytes);
    bytes.put_slice(content.as_ref());
}

/// Encoded fields in pieces of a good size, which any number of responses share.
#[derive(Clone, Debug)]
pub(super) struct Pieces {
    pieces: Arc<[Bytes]>,
    length: usize,
}

impl Pieces {
    pub(super) fn of<'a>(entries: impl IntoIterator<Item = &'a Bytes>) -> Self {
        let (mut pieces, mut piece, mut length) = (Vec::new(), BytesMut::new(), 0);
        for entry in entries {
            if !piece.is_empty() && piece.len() + entry.len() > PIECE {
                pieces.push(std::mem::take(&mut piece).freeze());
            }
            piece.extend_from_slice(entry);
            length += entry.len();
        }
        pieces.extend(Some(piece.freeze()).filter(|piece| !piece.is_empty()));
        Self { pieces: pieces.into(), length }
    }

    pub(super) fn removals<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        let entry = |name: &str| {
            let mut bytes = BytesMut::with_capacity(length_of(REMOVED, name));
            put(REMOVED, name, &mut bytes);
            bytes.freeze()
        };
        Self::of(&names.into_iter().map(entry).collect::<Vec<_>>())
    }

    pub(super) fn downgrade(&self) -> WeakPieces {
        WeakPieces { pieces: Arc::downgrade(&self.pieces), length: self.length }
    }
}

/// [`Pieces`] for as long as some response is being written from them.
#[derive(Clone, Debug)]
pub(super) struct WeakPieces {
    pieces: Weak<[Bytes]>,
    length: usize,
}

impl WeakPieces {
    pub(super) fn upgrade(&self) -> Option<Pieces> {
        Some(Pieces { pieces: self.pieces.upgrade()?, length: self.length })
    }
}

/// One response that is not written yet.
#[derive(Debug)]
pub(super) struct Outgoing {
    /// Everything but what is shared.
    head: Bytes,
    parts: [Pieces; 2],
    /// Of all pieces of both.
    next: usize,
}

impl Outgoing {
    /// # Errors
    /// Where it is longer than messages can be.
    pub(super) fn new(version: u64, type_url: &str, nonce: &str, parts: [Pieces; 2]) -> Result<Self, Status> {
        let mut fields = BytesMut::new();
        put(VERSION, version.to_string(), &mut fields);
        put(TYPE_URL, type_url, &mut fields);
        put(NONCE, nonce, &mut fields);
        let shared: usize = parts.iter().map(|part| part.length).sum();
        let length = u32::try_from(fields.len() + shared);
        let length = length.map_err(|_| Status::resource_exhausted("a response of more than 4 GiB"))?;
        // Most are small, and go as one piece.
        let alone = if shared <= PIECE { shared } else { 0 };
        let mut head = BytesMut::with_capacity(5 + fields.len() + alone);
        // Not compressed, and how long it is.
        head.put_u8(0);
        head.put_u32(length);
        head.extend_from_slice(&fields);
        let mut next = 0;
        if alone > 0 {
            let pieces = || parts.iter().flat_map(|part| &*part.pieces);
            pieces().for_each(|piece| head.extend_from_slice(piece));
            next = pieces().count();
        }
        Ok(Self { head: head.freeze(), parts, next })
    }

    /// `None` when all is written.
    fn piece(&mut self) -> Option<Bytes> {
        if !self.head.is_empty() {
            return Some(std::mem::take(&mut self.head));
        }
        let piece = self.parts.iter().flat_map(|part| &*part.pieces).nth(self.next).cloned();
        self.next += 1;
        piece
    }
}

/// A stream of responses, as a body.
pub(super) struct Responses {
    queue: mpsc::Receiver<Result<Outgoing, Status>>,
    current: Option<Outgoing>,
    ended: bool,
}

impl Responses {
    pub(super) fn new(queue: mpsc::Receiver<Result<Outgoing, Status>>) -> Self {
        Self { queue, current: None, ended: false }
    }
}

impl Body for Responses {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        loop {
            if self.ended {
                return Poll::Ready(None);
            }
            if let Some(piece) = self.current.as_mut().and_then(Outgoing::piece) {
                return Poll::Ready(Some(Ok(Frame::data(piece))));
            }
            let status = match ready!(self.queue.poll_recv(cx)) {
                Some(Ok(response)) => {
                    self.current = Some(response);
                    continue;
                }
                Some(Err(status)) => status,
                None => Status::ok(""),
            };
            self.ended = true;
            let mut trailers = HeaderMap::new();
            status.add_header(&mut trailers)?;
            return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
        }
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;
    use proto::discovery::{DeltaDiscoveryResponse, Resource};

    use super::*;

    #[test]
    fn what_is_written_in_pieces_is_the_message() {
        let resource = |n: usize| Resource {
            name: format!("name-{n}"),
            version: "v".repeat(32),
            aliases: vec![format!("/10.0.0.{n}"); n % 3],
            resource: Some(prost_types::Any { type_url: "t".to_owned(), value: vec![7; n * 1500] }),
            ttl: None,
        };
        for count in [0, 1, 2, 7, 90] {
            let wanted = DeltaDiscoveryResponse {
                system_version_info: "12".to_owned(),
                resources: (0..count).map(resource).collect(),
                type_url: "t".to_owned(),
                nonce: "3".to_owned(),
                removed_resources: (0..count).map(|n| format!("gone-{n}")).collect(),
            };
            let encode = |r: &Resource| {
                let aliases: Vec<Arc<str>> = r.aliases.iter().map(|alias| alias.as_str().into()).collect();
                let body = &r.resource.as_ref().unwrap().value;
                Entry { type_url: "t", name: &r.name, version: &r.version, aliases: &aliases, body }.encode().bytes
            };
            let entries: Vec<Bytes> = wanted.resources.iter().map(encode).collect();
            let removed = Pieces::removals(wanted.removed_resources.iter().map(String::as_str));
            for _ in 0..2 {
                // What is shared is not used up.
                let parts = [removed.clone(), Pieces::of(&entries)];
                let mut outgoing = Outgoing::new(12, "t", "3", parts).unwrap();
                let pieces: Vec<Bytes> = std::iter::from_fn(|| outgoing.piece()).collect();
                assert!(pieces.iter().all(|piece| !piece.is_empty() && piece.len() <= PIECE + 140_000));
                let whole = pieces.concat();
                assert_eq!(whole[0], 0);
                assert_eq!(u32::from_be_bytes(whole[1..5].try_into().unwrap()) as usize, whole.len() - 5);
                assert_eq!(DeltaDiscoveryResponse::decode(&whole[5..]).unwrap(), wanted);
            }
        }
    }
}
