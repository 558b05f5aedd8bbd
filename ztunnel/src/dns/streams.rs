//! DNS over TCP (RFC 7766): several queries of a client may be under way; those that are not ours share one connection to a nameserver,
//! whose messages come back as they are, in its order.

use std::{future::pending, io, net::SocketAddr, rc::Rc, time::Duration};

use hickory_proto::op::ResponseCode;
use mesh_net::sockets::{canonical, configure_accepted, original_dst};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    time::{Instant, sleep_until, timeout},
};

use crate::{
    dns::{
        DEADLINE, Place, Slot,
        decide::{Verdict, decide},
        message::{id, refusal},
        metrics::{Labels, Transport},
        servers,
    },
    pods::PodContext,
    proxy::{listeners::Accepted, upstream::open},
};

/// A client that asks nothing for so long is left, and so is one that does not read.
const IDLE: Duration = Duration::from_secs(5);
/// Per nameserver: after it the next is tried.
const CONNECT: Duration = Duration::from_secs(2);
/// Relayed queries of one client under way; more wait in its socket.
const PIPELINE: usize = 32;

/// Serves one client until it is done, idle, or breaks the rules.
pub(crate) async fn serve(pod: Rc<PodContext>, accepted: Accepted) {
    let peer = accepted.peer;
    let Some(_slot) = Slot::take(&pod, Place::Client) else { return };
    if let Err(error) = converse(&pod, accepted).await {
        tracing::debug!(target: "dns", %error, %peer, "DNS client left");
    }
}

async fn converse(pod: &PodContext, accepted: Accepted) -> io::Result<()> {
    let stream = accepted.socket.register()?;
    configure_accepted(&stream, &pod.sockets)?;
    let meant = meant(&stream)?;
    let (reader, writer) = stream.into_split();
    let mut client = Client { pod, meant, writer, nameserver: None, waiting: Vec::new(), last: None };
    let mut queries = Messages::new(reader);
    let (mut open, mut active) = (true, Instant::now());
    while open || !client.waiting.is_empty() {
        let deadline = client.waiting.first().map_or(active + IDLE, |first| first.since + DEADLINE);
        tokio::select! {
            query = queries.next(), if open && client.waiting.len() < PIPELINE => match query? {
                Some(query) => client.take(query).await?,
                None => open = false,
            },
            message = client.next_message() => client.pass_on(message).await?,
            () = sleep_until(deadline) => match client.waiting.is_empty() {
                true => return Ok(()),
                false => client.give_up(1).await?,
            },
        }
        active = Instant::now();
    }
    Ok(())
}

/// Whom the client dialled, if not us.
fn meant(stream: &TcpStream) -> io::Result<Option<SocketAddr>> {
    let (meant, local) = (original_dst(stream)?, canonical(stream.local_addr()?));
    Ok((meant != local).then_some(meant))
}

struct Client<'a> {
    pod: &'a PodContext,
    meant: Option<SocketAddr>,
    writer: OwnedWriteHalf,
    nameserver: Option<(Messages<OwnedReadHalf>, OwnedWriteHalf)>,
    /// Relayed and not answered, oldest first.
    waiting: Vec<Waiting>,
    /// Whose answer came last: a zone's has many messages.
    last: Option<[u8; 2]>,
}

struct Waiting {
    query: Vec<u8>,
    since: Instant,
    labels: Labels,
}

impl Client<'_> {
    async fn take(&mut self, query: Vec<u8>) -> io::Result<()> {
        match decide(self.pod, &query, Transport::Tcp).await {
            Verdict::Ignore => Err(io::ErrorKind::InvalidData.into()),
            Verdict::Reply(reply) => send(&mut self.writer, &reply).await,
            Verdict::Relay(labels) => {
                self.pod.shared.outcomes.dns().relayed(&labels);
                // From here on, so that a dial counts towards the deadline.
                let since = Instant::now();
                let sent = self.ask(&query).await;
                self.waiting.push(Waiting { query, since, labels });
                match sent {
                    Ok(()) => Ok(()),
                    Err(error) => self.lost(&error).await,
                }
            }
        }
    }

    async fn ask(&mut self, query: &[u8]) -> io::Result<()> {
        if self.nameserver.is_none() {
            let dialled = timeout(DEADLINE, dial(self.pod, servers(self.pod, self.meant))).await;
            let (reader, writer) = dialled.map_err(|_| io::ErrorKind::TimedOut)??.into_split();
            self.nameserver = Some((Messages::new(reader), writer));
        }
        match &mut self.nameserver {
            Some((_, writer)) => send(writer, query).await,
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// Cancel safe.
    async fn next_message(&mut self) -> io::Result<Option<Vec<u8>>> {
        match &mut self.nameserver {
            Some((messages, _)) => messages.next().await,
            None => pending().await,
        }
    }

    async fn pass_on(&mut self, message: io::Result<Option<Vec<u8>>>) -> io::Result<()> {
        let message = match message {
            Ok(Some(message)) => message,
            Ok(None) => return self.lost(&io::ErrorKind::UnexpectedEof.into()).await,
            Err(error) => return self.lost(&error).await,
        };
        let answered = self.waiting.iter().position(|waiting| id(&waiting.query) == id(&message));
        if let Some(answered) = answered {
            let Waiting { since, labels, .. } = self.waiting.remove(answered);
            self.pod.shared.outcomes.dns().answered(&labels, since.elapsed());
            self.last = id(&message);
        }
        // Anything else answers nobody.
        if self.last.is_some() && self.last == id(&message) { send(&mut self.writer, &message).await } else { Ok(()) }
    }

    /// The nameserver is gone, and with it every answer awaited.
    async fn lost(&mut self, error: &io::Error) -> io::Result<()> {
        tracing::debug!(target: "dns", %error, "cannot relay over TCP");
        self.nameserver = None;
        self.give_up(self.waiting.len()).await
    }

    /// Tells the client that the oldest queries get no answer.
    async fn give_up(&mut self, count: usize) -> io::Result<()> {
        for Waiting { query, labels, .. } in self.waiting.drain(..count) {
            self.pod.shared.outcomes.dns().failed(&labels);
            send(&mut self.writer, &refusal(&query, ResponseCode::ServFail)).await?;
        }
        Ok(())
    }
}

async fn dial(pod: &PodContext, servers: Vec<SocketAddr>) -> io::Result<TcpStream> {
    let mut failure = io::Error::new(io::ErrorKind::NotFound, "no nameserver is known");
    for server in servers {
        let own = pod.shared.config.local_address;
        match timeout(CONNECT, open(pod.netns.as_ref(), own, &pod.sockets, server)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => failure = error,
            Err(_) => failure = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(failure)
}

/// Each message is preceded by its length (RFC 1035 §4.2.2), and both leave together (RFC 7766 §8).
async fn send(to: &mut OwnedWriteHalf, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidData)?;
    let framed = [&length.to_be_bytes(), message].concat();
    timeout(IDLE, to.write_all(&framed)).await.map_err(|_| io::ErrorKind::TimedOut)?
}

/// Messages as they arrive.
struct Messages<R> {
    reader: R,
    /// Never holds more than one message and what came along with its end.
    buffer: Vec<u8>,
}

impl<R: AsyncRead + Unpin> Messages<R> {
    fn new(reader: R) -> Self {
        Self { reader, buffer: Vec::new() }
    }

    /// `None` at an end between messages. Cancel safe.
    async fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            if let Some(length) = self.buffer.first_chunk().map(|length| usize::from(u16::from_be_bytes(*length)))
                && self.buffer.len() >= 2 + length
            {
                let rest = self.buffer.split_off(2 + length);
                let mut message = std::mem::replace(&mut self.buffer, rest);
                message.drain(..2);
                return Ok(Some(message));
            }
            if self.reader.read_buf(&mut self.buffer).await? == 0 {
                let whole = self.buffer.is_empty();
                return if whole { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn messages_are_what_their_lengths_say_however_they_arrive() {
        let (mut near, far) = tokio::io::duplex(3);
        let writing = tokio::spawn(async move {
            near.write_all(b"\0\x03abc\0\0\0\x01d\0").await.expect("write");
        });
        let mut messages = Messages::new(far);
        for expected in ["abc", "", "d"] {
            assert_eq!(messages.next().await.expect("read").expect("message"), expected.as_bytes());
        }
        messages.next().await.expect_err("cut within a length");
        writing.await.expect("written");
    }
}
