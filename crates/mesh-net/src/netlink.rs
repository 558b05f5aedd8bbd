//! Netlink as bytes: building messages, walking attributes, one blocking socket. `link` and `nft` speak their families on top.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, setsockopt,
            socket, sockopt,
        },
        time::{TimeVal, TimeValLike},
    },
};

use crate::sys;

// The NLM_F_ flags, in the width the header has.
pub(crate) const REQUEST: u16 = 0x1;
pub(crate) const ACK: u16 = 0x4;
pub(crate) const DUMP: u16 = 0x300;
pub(crate) const CREATE: u16 = 0x400;
pub(crate) const EXCL: u16 = 0x200;
pub(crate) const REPLACE: u16 = 0x100;
pub(crate) const APPEND: u16 = 0x800;

const HEADER: usize = 16;
const ALIGN: usize = 4;
const NESTED: u16 = 1 << 15;
const TYPE_MASK: u16 = 0x3fff;
/// The kernel never waits long; a reply that does not come is a fault, not a reason to hang.
const REPLY_LIMIT_SECONDS: i64 = 5;

/// What the kernel refused, in its own words where it gave any.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}{}", .text.as_deref().map(|t| format!(" (kernel: {t})")).unwrap_or_default())]
pub struct NetlinkError {
    /// The operation, for example "add table x".
    pub what: String,
    /// The kernel's extended acknowledgement.
    pub text: Option<String>,
    #[source]
    pub source: io::Error,
}

impl NetlinkError {
    pub(crate) fn new(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self { what: what.into(), text: None, source: source.into() }
    }

    /// Whether the cause is this errno (`libc::ENOENT`, …).
    pub fn is(&self, errno: i32) -> bool {
        self.source.raw_os_error() == Some(errno)
    }
}

/// One message under construction.
pub(crate) struct Message {
    bytes: Vec<u8>,
    /// For errors: what this message asks for.
    pub(crate) what: String,
}

impl Message {
    /// `header` is the family's fixed part that follows the netlink header.
    pub(crate) fn new(kind: u16, flags: u16, header: &[u8], what: impl Into<String>) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(header);
        pad(&mut bytes);
        Self { bytes, what: what.into() }
    }

    pub(crate) fn add_flags(&mut self, flags: u16) {
        let old = u16::from_ne_bytes([self.bytes[6], self.bytes[7]]);
        self.bytes[6..8].copy_from_slice(&(old | flags).to_ne_bytes());
    }

    pub(crate) fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        pad(&mut self.bytes);
        self
    }

    pub(crate) fn attr(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        self.nest_as(kind, |m| {
            m.bytes.extend_from_slice(value);
        })
    }

    /// A NUL-terminated string.
    pub(crate) fn attr_str(&mut self, kind: u16, value: &str) -> &mut Self {
        self.nest_as(kind, |m| {
            m.bytes.extend_from_slice(value.as_bytes());
            m.bytes.push(0);
        })
    }

    pub(crate) fn attr_u32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.attr(kind, &value.to_ne_bytes())
    }

    pub(crate) fn attr_be32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.attr(kind, &value.to_be_bytes())
    }

    pub(crate) fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) -> &mut Self {
        self.nest_as(kind | NESTED, fill)
    }

    fn nest_as(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) -> &mut Self {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 4]);
        fill(self);
        // Names and rules come from us: far below 64 KiB. Anything longer must not silently wrap into another message.
        let length = u16::try_from(self.bytes.len() - start).expect("netlink attribute longer than 64 KiB");
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.bytes[start + 2..start + 4].copy_from_slice(&kind.to_ne_bytes());
        pad(&mut self.bytes);
        self
    }

    fn finish(&mut self, sequence: u32) -> &[u8] {
        let length = u32::try_from(self.bytes.len()).expect("netlink message longer than 4 GiB");
        self.bytes[0..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        &self.bytes
    }
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
}

/// The attributes of a message: type and value. Ends at the first malformed one.
pub(crate) struct Attrs<'a>(pub(crate) &'a [u8]);

impl<'a> Iterator for Attrs<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let length = usize::from(u16_at(self.0, 0)?);
        let kind = u16_at(self.0, 2)? & TYPE_MASK;
        let value = self.0.get(4..length)?;
        self.0 = self.0.get(length.next_multiple_of(ALIGN)..).unwrap_or_default();
        Some((kind, value))
    }
}

impl<'a> Attrs<'a> {
    /// The value of the first attribute of this kind.
    pub(crate) fn value(mut self, kind: u16) -> Option<&'a [u8]> {
        self.find(|(k, _)| *k == kind).map(|(_, value)| value)
    }
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

pub(crate) fn string(value: &[u8]) -> String {
    let end = value.iter().position(|b| *b == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

/// One received message: its type and everything after the netlink header.
pub(crate) struct Reply {
    pub(crate) kind: u16,
    pub(crate) body: Vec<u8>,
    sequence: u32,
    flags: u16,
}

#[cfg(test)]
impl Reply {
    pub(crate) fn for_test(kind: u16, body: Vec<u8>) -> Self {
        Self { kind, body, sequence: 0, flags: 0 }
    }
}

/// A netlink socket; keeps the namespace of the thread that opened it.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: OwnedFd,
    sequence: u32,
}

impl Socket {
    pub(crate) fn open(protocol: SockProtocol) -> io::Result<Self> {
        let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::seconds(REPLY_LIMIT_SECONDS))?;
        // The kernel's explanation with an error, and not our own request back: both exist since Linux 4.12.
        sys::set_int_option(&fd, libc::SOL_NETLINK, libc::NETLINK_EXT_ACK, 1)?;
        sys::set_int_option(&fd, libc::SOL_NETLINK, libc::NETLINK_CAP_ACK, 1)?;
        Ok(Self { fd, sequence: 0 })
    }

    /// One change, acknowledged.
    pub(crate) fn request(&mut self, mut message: Message) -> Result<(), NetlinkError> {
        message.add_flags(REQUEST | ACK);
        self.transact(vec![message])
    }

    /// Sends the messages as one datagram; the last must carry [`ACK`]. The first one refused is the error.
    pub(crate) fn transact(&mut self, mut messages: Vec<Message>) -> Result<(), NetlinkError> {
        let first = self.sequence + 1;
        let mut datagram = Vec::new();
        let mut last_acked = first;
        for message in &mut messages {
            self.sequence += 1;
            if u16_at(&message.bytes, 6).is_some_and(|flags| flags & ACK != 0) {
                last_acked = self.sequence;
            }
            datagram.extend_from_slice(message.finish(self.sequence));
        }
        let what = |sequence: u32| {
            let index = sequence.checked_sub(first).and_then(|i| usize::try_from(i).ok()).unwrap_or(0);
            messages.get(index).map_or_else(String::new, |m| m.what.clone())
        };
        self.send(&datagram).map_err(|e| NetlinkError::new(what(first), e))?;
        let mut failure: Option<NetlinkError> = None;
        loop {
            for reply in self.receive().map_err(|e| NetlinkError::new(what(last_acked), e))? {
                if reply.sequence < first || i32::from(reply.kind) != libc::NLMSG_ERROR {
                    continue;
                }
                let (errno, text) = error_of(&reply);
                if errno != 0 && failure.is_none() {
                    let source = io::Error::from_raw_os_error(errno);
                    failure = Some(NetlinkError { what: what(reply.sequence), text, source });
                }
                // Replies come in order, errors included; a refused batch may end without the last acknowledgement.
                if reply.sequence >= last_acked || (failure.is_some() && !self.more_waiting()) {
                    self.discard_waiting();
                    return failure.map_or(Ok(()), Err);
                }
            }
        }
    }

    /// The one message that answers a request.
    pub(crate) fn get(&mut self, mut message: Message) -> Result<Reply, NetlinkError> {
        message.add_flags(REQUEST);
        self.sequence += 1;
        let sequence = self.sequence;
        self.send(message.finish(sequence)).map_err(|e| NetlinkError::new(message.what.clone(), e))?;
        loop {
            for reply in self.receive().map_err(|e| NetlinkError::new(message.what.clone(), e))? {
                match i32::from(reply.kind) {
                    _ if reply.sequence != sequence => {}
                    libc::NLMSG_ERROR => {
                        let (errno, text) = error_of(&reply);
                        let source = io::Error::from_raw_os_error(errno);
                        return Err(NetlinkError { what: message.what, text, source });
                    }
                    _ => return Ok(reply),
                }
            }
        }
    }

    /// Everything a dump request yields. Repeated when the kernel says that the state changed underneath.
    pub(crate) fn dump(&mut self, build: impl Fn() -> Message) -> Result<Vec<Reply>, NetlinkError> {
        for _ in 0..4 {
            let mut message = build();
            message.add_flags(REQUEST | DUMP);
            let (replies, interrupted) = self.dump_once(message)?;
            if !interrupted {
                return Ok(replies);
            }
        }
        Err(NetlinkError::new(build().what, io::Error::from(io::ErrorKind::Interrupted)))
    }

    fn dump_once(&mut self, mut message: Message) -> Result<(Vec<Reply>, bool), NetlinkError> {
        self.sequence += 1;
        let sequence = self.sequence;
        let what = message.what.clone();
        self.send(message.finish(sequence)).map_err(|e| NetlinkError::new(what.clone(), e))?;
        let (mut all, mut interrupted) = (Vec::new(), false);
        loop {
            for reply in self.receive().map_err(|e| NetlinkError::new(what.clone(), e))? {
                interrupted |= i32::from(reply.flags) & libc::NLM_F_DUMP_INTR != 0;
                match i32::from(reply.kind) {
                    _ if reply.sequence != sequence => {}
                    libc::NLMSG_DONE => return Ok((all, interrupted)),
                    libc::NLMSG_ERROR => {
                        let (errno, text) = error_of(&reply);
                        return Err(NetlinkError { what, text, source: io::Error::from_raw_os_error(errno) });
                    }
                    _ => all.push(reply),
                }
            }
        }
    }

    fn send(&self, datagram: &[u8]) -> nix::Result<()> {
        send(self.fd.as_raw_fd(), datagram, MsgFlags::empty()).map(drop)
    }

    fn receive(&self) -> nix::Result<Vec<Reply>> {
        let mut buffer = vec![0; 64 * 1024];
        loop {
            match recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(length) => return Ok(split(&buffer[..length])),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Err(Errno::ETIMEDOUT),
                Err(errno) => return Err(errno),
            }
        }
    }

    fn more_waiting(&self) -> bool {
        let peek = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK;
        recv(self.fd.as_raw_fd(), &mut [0; 1], peek).is_ok()
    }

    fn discard_waiting(&self) {
        while recv(self.fd.as_raw_fd(), &mut [0; 1], MsgFlags::MSG_DONTWAIT).is_ok() {}
    }
}

fn split(mut datagram: &[u8]) -> Vec<Reply> {
    let mut replies = Vec::new();
    while let (Some(length), Some(kind)) = (u32_at(datagram, 0), u16_at(datagram, 4)) {
        let length = length as usize;
        let (Some(body), Some(flags), Some(sequence)) =
            (datagram.get(HEADER..length), u16_at(datagram, 6), u32_at(datagram, 8))
        else {
            break;
        };
        replies.push(Reply { kind, body: body.to_vec(), sequence, flags });
        datagram = datagram.get(length.next_multiple_of(ALIGN)..).unwrap_or_default();
    }
    replies
}

/// errno (0: acknowledged) and the kernel's text.
fn error_of(reply: &Reply) -> (i32, Option<String>) {
    const MESSAGE: u16 = 1;
    let errno = u32_at(&reply.body, 0).map_or(libc::EPROTO, |e| e.cast_signed().saturating_neg());
    // NETLINK_CAP_ACK: after the errno comes only the header of our request, then the attributes.
    let attributes = reply.body.get(size_of::<i32>() + HEADER..).unwrap_or_default();
    let text = if i32::from(reply.flags) & libc::NLM_F_ACK_TLVS != 0 { Attrs(attributes).value(MESSAGE) } else { None };
    (errno, text.map(string))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn walking_any_bytes_ends_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
            for reply in split(&bytes) {
                let _ = error_of(&reply);
            }
            Attrs(&bytes).for_each(|(_, value)| drop(string(value)));
        }
    }

    #[test]
    fn attributes_read_back_as_written() {
        let mut message = Message::new(1, 0, &[], "test");
        message.attr_str(1, "abc").nest(2, |m| {
            m.attr_be32(3, 7);
        });
        let found: Vec<_> = Attrs(&message.bytes[HEADER..]).collect();
        assert_eq!(found[0], (1, &b"abc\0"[..]));
        assert_eq!(Attrs(found[1].1).value(3), Some(&[0, 0, 0, 7][..]));
    }
}
