//! Requests, read so that what a client says it holds costs no more than its bytes: of a large mesh that is megabytes from every node.

use std::{
    collections::BTreeMap,
    future::{Future as _, poll_fn},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf as _, Bytes, BytesMut};
use http_body::Body as _;
use prost::{
    DecodeError, Message as _,
    encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field},
};
use proto::discovery::DeltaDiscoveryRequest;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Sleep,
};
use tokio_util::sync::PollSemaphore;
use tonic::{Status, body::Body};

/// The field of `DeltaDiscoveryRequest`.
const INITIAL_VERSIONS: u32 = 5;
/// Of a message, in front of it.
const PREFIX: usize = 5;
/// Requests beyond this take turns.
const LARGE: usize = 64 * 1024;
/// Within which a large request has to come once it is its turn.
const TURN: Duration = Duration::from_secs(10);

/// Name to version of what a client says it holds, as it came.
#[derive(Clone, Debug, Default)]
pub(super) struct Held {
    /// The whole request.
    message: Bytes,
    count: usize,
}

impl Held {
    pub(super) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// What is no text is left out: nothing of ours has such a name.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        let mut rest = &self.message[..];
        let entries = std::iter::from_fn(move || {
            while rest.has_remaining() {
                if let Some(entry) = field(&mut rest).ok()? {
                    return Some(entry);
                }
            }
            None
        });
        entries.filter_map(pair)
    }

    pub(super) fn to_map(&self) -> BTreeMap<String, String> {
        self.iter().map(|(name, version)| (name.to_owned(), version.to_owned())).collect()
    }
}

/// The next field of a request, if it is of what is held.
fn field<'a>(message: &mut &'a [u8]) -> Result<Option<&'a [u8]>, DecodeError> {
    let (field, wire) = decode_key(message)?;
    if field == INITIAL_VERSIONS && wire == WireType::LengthDelimited {
        let length = usize::try_from(decode_varint(&mut &message[..])?).unwrap_or(usize::MAX);
        let start = *message;
        // Refuses what is cut off.
        skip_field(wire, field, message, DecodeContext::default())?;
        let whole = &start[..start.len() - message.len()];
        return Ok(Some(&whole[whole.len() - length..]));
    }
    skip_field(wire, field, message, DecodeContext::default())?;
    Ok(None)
}

/// Key and value of a map's entry.
fn pair(mut entry: &[u8]) -> Option<(&str, &str)> {
    let (mut name, mut version) = (&[][..], &[][..]);
    while entry.has_remaining() {
        let (field, wire) = decode_key(&mut entry).ok()?;
        if wire != WireType::LengthDelimited {
            skip_field(wire, field, &mut entry, DecodeContext::default()).ok()?;
            continue;
        }
        let length = usize::try_from(decode_varint(&mut entry).ok()?).ok()?;
        let content = entry.split_off(..length)?;
        match field {
            1 => name = content,
            2 => version = content,
            _ => {}
        }
    }
    Some((str::from_utf8(name).ok()?, str::from_utf8(version).ok()?))
}

/// A request, and apart from it what the client holds.
#[derive(Debug, Default)]
pub(super) struct Incoming {
    pub(super) request: DeltaDiscoveryRequest,
    pub(super) held: Held,
}

impl Incoming {
    fn decode(message: Bytes) -> Result<Self, DecodeError> {
        let (mut rest, mut others, mut count) = (&message[..], BytesMut::new(), 0);
        while rest.has_remaining() {
            let start = rest;
            match field(&mut rest)? {
                Some(_) => count += 1,
                None => others.extend_from_slice(&start[..start.len() - rest.len()]),
            }
        }
        let request = DeltaDiscoveryRequest::decode(others)?;
        // Most hold nothing, and need not be kept.
        let message = if count > 0 { message } else { Bytes::new() };
        Ok(Self { request, held: Held { message, count } })
    }
}

/// A client's requests. A large one waits for its turn before it is taken in, and keeps the turn until the next is asked for; nothing of
/// its size stays.
pub(super) struct Requests {
    body: Body,
    /// Bytes a request may have.
    most: usize,
    turns: PollSemaphore,
    turn: Option<(OwnedSemaphorePermit, Pin<Box<Sleep>>)>,
    /// Came, and was not looked at.
    unread: Bytes,
    prefix: BytesMut,
    /// What there is of the message under way, and how long it will be.
    message: Option<(BytesMut, usize)>,
}

impl Requests {
    pub(super) fn new(body: Body, turns: Arc<Semaphore>, most: usize) -> Self {
        let (unread, prefix, message) = Default::default();
        Self { body, most, turns: PollSemaphore::new(turns), turn: None, unread, prefix, message }
    }

    /// The next one; `None` at the end. Cancel safe.
    ///
    /// # Errors
    /// When there is no going on.
    pub(super) async fn message(&mut self) -> Result<Option<Incoming>, Status> {
        if self.message.is_none() {
            self.turn = None;
        }
        poll_fn(|cx| self.poll_message(cx)).await
    }

    fn poll_message(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Incoming>, Status>> {
        loop {
            if let Some((message, length)) = &mut self.message {
                if *length > LARGE && self.turn.is_none() {
                    // It is never closed.
                    if let Some(permit) = ready!(self.turns.poll_acquire(cx)) {
                        self.turn = Some((permit, Box::pin(tokio::time::sleep(TURN))));
                        *message = BytesMut::with_capacity(*length);
                    }
                }
                let taken = self.unread.split_to(self.unread.len().min(*length - message.len()));
                message.extend_from_slice(&taken);
                if message.len() == *length {
                    let message = std::mem::take(message).freeze();
                    self.message = None;
                    let decoded = Incoming::decode(message).map(Some);
                    return Poll::Ready(decoded.map_err(|error| Status::internal(error.to_string())));
                }
            } else {
                let taken = self.unread.split_to(self.unread.len().min(PREFIX - self.prefix.len()));
                self.prefix.extend_from_slice(&taken);
                if let Ok([compressed, length @ ..]) = <[u8; PREFIX]>::try_from(&self.prefix[..]) {
                    self.prefix.clear();
                    let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
                    if compressed != 0 {
                        return Poll::Ready(Err(Status::unimplemented("requests are not to be compressed")));
                    }
                    if length > self.most {
                        let told = format!("a request of {length} bytes; no more than {} are read", self.most);
                        return Poll::Ready(Err(Status::resource_exhausted(told)));
                    }
                    self.message = Some((BytesMut::new(), length));
                    continue;
                }
            }
            if let Some((_, deadline)) = &mut self.turn
                && deadline.as_mut().poll(cx).is_ready()
            {
                return Poll::Ready(Err(Status::deadline_exceeded("a request does not come to its end")));
            }
            match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => self.unread = frame.into_data().unwrap_or_default(),
                Some(Err(error)) => return Poll::Ready(Err(error)),
                None => return Poll::Ready(Ok(None)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use http_body::Frame;
    use http_body_util::StreamBody;
    use proptest::prelude::*;
    use proto::core::Node;
    use tokio_stream::{Stream, StreamExt as _};

    use super::*;

    const MOST: usize = 1 << 20;

    fn request(held: usize) -> DeltaDiscoveryRequest {
        DeltaDiscoveryRequest {
            node: Some(Node { id: "n".to_owned(), ..Node::default() }),
            type_url: "t".to_owned(),
            resource_names_subscribe: vec!["a".to_owned()],
            initial_resource_versions: (0..held).map(|n| (format!("name-{n}"), format!("version-{n}"))).collect(),
            response_nonce: "7".to_owned(),
            ..DeltaDiscoveryRequest::default()
        }
    }

    #[test]
    fn what_is_held_is_read_apart_from_the_rest() {
        for count in [0, 1, 50] {
            let wanted = request(count);
            let incoming = Incoming::decode(wanted.encode_to_vec().into()).unwrap();
            assert_eq!(incoming.held.is_empty(), count == 0);
            assert_eq!(incoming.held.to_map(), wanted.initial_resource_versions);
            assert_eq!(
                incoming.request,
                DeltaDiscoveryRequest { initial_resource_versions: BTreeMap::new(), ..wanted }
            );
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_request_or_refused(bytes: Vec<u8>, cut in 0_usize..200) {
            if let Ok(incoming) = Incoming::decode(bytes.into()) {
                incoming.held.to_map();
            }
            let whole = request(3).encode_to_vec();
            let cut = cut.min(whole.len());
            let ours = Incoming::decode(whole[..cut].to_vec().into());
            prop_assert_eq!(ours.is_ok(), DeltaDiscoveryRequest::decode(&whole[..cut]).is_ok());
        }
    }

    fn framed(length: usize) -> Vec<u8> {
        // A field of ours that holds the rest.
        let message = (0..=5).map(|less| DeltaDiscoveryRequest {
            response_nonce: "n".repeat(length - less),
            ..DeltaDiscoveryRequest::default()
        });
        let message = message.map(|m| m.encode_to_vec()).find(|m| m.len() == length).unwrap();
        [&[0][..], &u32::try_from(length).unwrap().to_be_bytes(), &message].concat()
    }

    fn requests(frames: impl Stream<Item = Bytes> + Send + 'static, turns: &Arc<Semaphore>) -> Requests {
        let frames = frames.map(|bytes| Ok::<_, Status>(Frame::data(bytes)));
        Requests::new(Body::new(StreamBody::new(frames)), turns.clone(), MOST)
    }

    fn of(lengths: &[usize], turns: &Arc<Semaphore>) -> Requests {
        let all: Vec<u8> = lengths.iter().flat_map(|length| framed(*length)).collect();
        let frames: Vec<Bytes> = all.chunks(777).map(Bytes::copy_from_slice).collect();
        requests(tokio_stream::iter(frames), turns)
    }

    #[tokio::test]
    async fn large_requests_take_turns_and_small_ones_need_none() {
        let turns = Arc::new(Semaphore::new(1));
        let mut first = of(&[10, LARGE + 1, 10, 10], &turns);
        let next =
            async |requests: &mut Requests| requests.message().await.unwrap().map(|r| r.request.response_nonce.len());
        assert_eq!(next(&mut first).await, Some(8));
        assert_eq!(turns.available_permits(), 1);
        assert!(next(&mut first).await > Some(LARGE - 10));
        assert_eq!(turns.available_permits(), 0, "it is being dealt with");
        assert_eq!(next(&mut of(&[LARGE], &turns)).await, Some(LARGE - 4), "a small one");
        let mut second = of(&[LARGE + 1], &turns);
        let waiting = tokio::spawn(async move { second.message().await.unwrap().is_some() });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        assert_eq!(next(&mut first).await, Some(8));
        assert!(waiting.await.unwrap());
        assert_eq!((next(&mut first).await, next(&mut first).await), (Some(8), None));
    }

    #[tokio::test(start_paused = true)]
    async fn a_large_request_that_stops_coming_loses_its_turn() {
        let turns = Arc::new(Semaphore::new(1));
        let some = Bytes::from(framed(2 * LARGE)).slice(..LARGE);
        let mut stopped = requests(tokio_stream::iter([some]).chain(tokio_stream::pending()), &turns);
        assert_eq!(stopped.message().await.unwrap_err().code(), tonic::Code::DeadlineExceeded);
        drop(stopped);
        assert_eq!(turns.available_permits(), 1);
    }

    #[tokio::test]
    async fn what_cannot_be_read_ends_the_stream() {
        let turns = Arc::new(Semaphore::new(1));
        let code = async |bytes: &'static [u8]| {
            let mut requests = requests(tokio_stream::iter([Bytes::from_static(bytes)]), &turns);
            requests.message().await.map(|request| request.is_some()).map_err(|status| status.code())
        };
        assert_eq!(code(&[1, 0, 0, 0, 0]).await, Err(tonic::Code::Unimplemented));
        assert_eq!(code(&[0, 255, 0, 0, 0]).await, Err(tonic::Code::ResourceExhausted));
        assert_eq!(code(&[0, 0, 0, 0, 1, 0xff]).await, Err(tonic::Code::Internal));
        assert_eq!(code(&[0, 0, 0, 0, 9, 1]).await, Ok(false), "it ends within a request");
        assert_eq!(code(&[0, 0, 0, 0, 0]).await, Ok(true), "an empty request");
    }
}
