//! Looking at the wire: frames of an interface, and the headers that matter.

use std::{
    io, mem,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    time::{Duration, SystemTime},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::{link::Netlink, netns::NetNs, sys};

/// Receives copies of all frames an interface sends and receives. Nonblocking; may be registered with an event loop.
#[derive(Debug)]
pub struct FrameSocket(OwnedFd);

/// A frame as it was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameInfo {
    /// Bytes in the caller's buffer.
    pub length: usize,
    /// Bytes on the wire.
    pub original_length: usize,
    pub at: SystemTime,
}

impl FrameSocket {
    /// On `interface` of `ns`. Frames wait in a kernel buffer; what does not fit is dropped there.
    pub fn open(ns: &NetNs, interface: &str) -> io::Result<Self> {
        let mut netlink = Netlink::in_ns(ns)?;
        let index = netlink.index(interface).map_err(io::Error::other)?;
        ns.run(|| Self::bind(index))?
    }

    /// As [`FrameSocket::open`], for passing frames on with [`FrameSocket::send`] rather than for reading them: only frames that
    /// come in are received, each behind the kernel's note of what it still owes them (segmentation, checksum; a
    /// `virtio_net_hdr` of ten bytes).
    pub fn open_for_relay(ns: &NetNs, interface: &str) -> io::Result<Self> {
        let socket = Self::open(ns, interface)?;
        sys::set_int_option(&socket, libc::SOL_PACKET, PACKET_VNET_HDR, 1)?;
        sys::set_int_option(&socket, libc::SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)?;
        Ok(socket)
    }

    /// Sends a frame as another relay socket received it, its note included.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        // SAFETY: the buffer is valid for reads of its length.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn bind(index: u32) -> io::Result<Self> {
        let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        // Protocol 0: nothing arrives before bind says from which interface.
        // SAFETY: plain system calls; a returned descriptor is new and ours, and the address is a local of the stated size.
        unsafe {
            let fd = libc::socket(libc::AF_PACKET, kind, 0);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            let fd = OwnedFd::from_raw_fd(fd);
            let mut address: libc::sockaddr_ll = mem::zeroed();
            address.sll_family = AF_PACKET;
            address.sll_protocol = ETH_P_ALL.to_be();
            address.sll_ifindex = index.cast_signed();
            let length = sys::socklen::<libc::sockaddr_ll>();
            if libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length) < 0 {
                return Err(io::Error::last_os_error());
            }
            sys::set_int_option(&fd, libc::SOL_SOCKET, libc::SO_RCVBUF, RECEIVE_BUFFER)?;
            Ok(Self(fd))
        }
    }

    /// The next waiting frame, cut to `buffer`; `WouldBlock` when there is none.
    pub fn try_recv(&self, buffer: &mut [u8]) -> io::Result<FrameInfo> {
        // SAFETY: the buffer is valid for writes of its length.
        let received =
            unsafe { libc::recv(self.0.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), libc::MSG_TRUNC) };
        let original_length = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
        Ok(FrameInfo { length: original_length.min(buffer.len()), original_length, at: SystemTime::now() })
    }

    /// Waits for a frame; `None` when there was none within `limit`.
    pub fn recv(&self, buffer: &mut [u8], limit: Duration) -> io::Result<Option<FrameInfo>> {
        match self.try_recv(buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            frame => return frame.map(Some),
        }
        let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        if poll(&mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)], limit)? == 0 {
            return Ok(None);
        }
        self.try_recv(buffer).map(Some)
    }
}

impl AsFd for FrameSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

const AF_PACKET: u16 = 17;
const ETH_P_ALL: u16 = 3;
const PACKET_VNET_HDR: i32 = 15;
const PACKET_IGNORE_OUTGOING: i32 = 23;
const RECEIVE_BUFFER: i32 = 8 << 20;

/// What a frame carries, as far as it could be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet<'a> {
    pub source: IpAddr,
    pub destination: IpAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// For TCP only.
    pub tcp: Option<TcpHeader>,
    /// What follows the last header read.
    pub payload: &'a [u8],
}

/// The parts of a TCP header that tell what happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpHeader {
    pub source_port: u16,
    pub destination_port: u16,
    pub sequence: u32,
    pub acknowledgement: u32,
    pub flags: u8,
}

impl TcpHeader {
    pub const FIN: u8 = 0x01;
    pub const SYN: u8 = 0x02;
    pub const RST: u8 = 0x04;
    pub const PSH: u8 = 0x08;
    pub const ACK: u8 = 0x10;

    pub fn has(&self, flags: u8) -> bool {
        self.flags & flags == flags
    }
}

impl Packet<'_> {
    /// Both ends, for TCP.
    pub fn endpoints(&self) -> Option<(SocketAddr, SocketAddr)> {
        let tcp = self.tcp?;
        Some((SocketAddr::new(self.source, tcp.source_port), SocketAddr::new(self.destination, tcp.destination_port)))
    }
}

/// Reads an Ethernet frame. `None` unless it holds IP whose header is whole; a damaged or fragmented TCP header yields `tcp: None`.
pub fn parse(frame: &[u8]) -> Option<Packet<'_>> {
    const ETHERTYPE_IPV4: u16 = 0x0800;
    const ETHERTYPE_IPV6: u16 = 0x86dd;
    let ip = frame.get(14..)?;
    let (mut packet, first_fragment) = match be16(frame, 12)? {
        ETHERTYPE_IPV4 => ipv4(ip)?,
        ETHERTYPE_IPV6 => (ipv6(ip)?, true),
        _ => return None,
    };
    if packet.protocol == TCP
        && first_fragment
        && let Some((tcp, payload)) = tcp(packet.payload)
    {
        (packet.tcp, packet.payload) = (Some(tcp), payload);
    }
    Some(packet)
}

const TCP: u8 = 6;

fn ipv4(ip: &[u8]) -> Option<(Packet<'_>, bool)> {
    let header = usize::from(ip.first()? & 0x0f) * 4;
    let total = usize::from(be16(ip, 2)?).min(ip.len());
    let address = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(ip.get(at..at + 4)?).ok()?));
    let packet = Packet {
        source: address(12)?,
        destination: address(16)?,
        protocol: *ip.get(9)?,
        tcp: None,
        // Ethernet pads short frames: the IP length says where the packet ends.
        payload: ip.get(header.max(20)..total)?,
    };
    Some((packet, be16(ip, 6)? & 0x1fff == 0))
}

/// Extension headers are not followed: `protocol` is the first next-header.
fn ipv6(ip: &[u8]) -> Option<Packet<'_>> {
    let total = (40 + usize::from(be16(ip, 4)?)).min(ip.len());
    let address = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(ip.get(at..at + 16)?).ok()?));
    Some(Packet {
        source: address(8)?,
        destination: address(24)?,
        protocol: *ip.get(6)?,
        tcp: None,
        payload: ip.get(40..total)?,
    })
}

fn tcp(segment: &[u8]) -> Option<(TcpHeader, &[u8])> {
    let header = usize::from(segment.get(12)? >> 4) * 4;
    let parsed = TcpHeader {
        source_port: be16(segment, 0)?,
        destination_port: be16(segment, 2)?,
        sequence: be32(segment, 4)?,
        acknowledgement: be32(segment, 8)?,
        flags: *segment.get(13)?,
    };
    Some((parsed, segment.get(header.max(20)..)?))
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0x00]);
        let total = u8::try_from(40 + payload.len()).expect("short");
        frame.extend([0x45, 0, 0, total, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend([0x3a, 0x99, 0, 80, 0, 0, 0, 9, 0, 0, 0, 8, 0x50, TcpHeader::SYN, 0, 0, 0, 0, 0, 0]);
        frame.extend(payload);
        frame.extend([0; 6]); // padding
        frame
    }

    #[test]
    fn a_tcp_segment_is_read_without_the_padding_of_its_frame() {
        let frame = frame(b"hello");
        let packet = parse(&frame).expect("IP");
        let (source, destination) = packet.endpoints().expect("TCP");
        assert_eq!((source.to_string(), destination.to_string()), ("10.0.0.1:15001".into(), "10.0.0.2:80".into()));
        assert_eq!((packet.payload, packet.tcp.expect("TCP").has(TcpHeader::SYN)), (&b"hello"[..], true));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..128), v6 in any::<bool>()) {
            parse(&bytes);
            let kind: [u8; 2] = if v6 { [0x86, 0xdd] } else { [0x08, 0x00] };
            parse(&[&[0; 12], &kind[..], &bytes].concat());
        }

        #[test]
        fn a_cut_frame_yields_no_more_than_the_whole(cut in 0usize..64) {
            let whole = frame(b"hello");
            let part = parse(&whole[..cut.min(whole.len())]);
            prop_assert!(part.is_none_or(|p| p.payload.len() <= 25));
        }
    }
}
