//! Descriptors between processes: `SOCK_SEQPACKET` with `SCM_RIGHTS` for ZDS, and the same on stream sockets.
//!
//! A truncated packet or a truncated list of descriptors is an error; whatever descriptors did arrive are closed with it.

use std::{
    fs,
    io::{self, IoSlice},
    mem,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    os::unix::net::UnixStream,
    path::Path,
    ptr,
};

use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind, connect, listen,
    sendmsg, socket, socketpair,
};
use tokio::io::{Interest, unix::AsyncFd};

use crate::sys;

/// Descriptors accepted in one message.
pub const MAX_FDS: usize = 16;

/// Who is at the other end of a unix socket, as the kernel saw it when the connection was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerCred {
    pub pid: i32,
    pub uid: u32,
    pub gid: u32,
}

/// A listening `SOCK_SEQPACKET` socket. The path is not removed on drop: the next listener replaces it.
#[derive(Debug)]
pub struct SeqListener(AsyncFd<OwnedFd>);

impl SeqListener {
    /// Binds `path`, replacing a stale socket there. Must be called inside a tokio runtime.
    pub fn bind(path: impl AsRef<Path>) -> io::Result<Self> {
        let path = path.as_ref();
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let fd = new_socket()?;
        bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        listen(&fd, Backlog::new(16)?)?;
        Ok(Self(register(fd)?))
    }

    /// The next connection. Cancel safe.
    pub async fn accept(&self) -> io::Result<SeqStream> {
        let accept = |fd: &OwnedFd| Ok(accept4(fd.as_raw_fd(), SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC)?);
        let raw = self.0.async_io(Interest::READABLE, accept).await?;
        // SAFETY: accept4 just returned this descriptor and nothing else knows it.
        SeqStream::new(unsafe { OwnedFd::from_raw_fd(raw) })
    }
}

/// A connected `SOCK_SEQPACKET` socket: every send is one packet, every receive takes one.
#[derive(Debug)]
pub struct SeqStream(AsyncFd<OwnedFd>);

impl SeqStream {
    /// Connects to the listener at `path`; fails at once when there is none or its queue is full.
    pub fn connect(path: impl AsRef<Path>) -> io::Result<Self> {
        let fd = new_socket()?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path.as_ref())?)?;
        Self::new(fd)
    }

    /// Two ends of one connection.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, socket_flags())?;
        Ok((Self::new(a)?, Self::new(b)?))
    }

    /// Takes over a descriptor, for example one passed by another process.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        nix::fcntl::fcntl(&fd, nix::fcntl::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))?;
        Self::new(fd)
    }

    fn new(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self(register(fd)?))
    }

    /// Sends one packet, with a descriptor if given. Cancel safe: sent whole or not at all.
    pub async fn send(&self, packet: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let fds = fd.map(|fd| [fd.as_raw_fd()]);
        let fds = fds.as_ref().map_or(&[][..], |fds| &fds[..]);
        self.0.async_io(Interest::WRITABLE, |socket| send_message(socket.as_fd(), packet, fds)).await.map(drop)
    }

    /// Receives one packet into `buffer`; length 0 means the peer is gone. Cancel safe.
    pub async fn recv(&self, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
        self.0.async_io(Interest::READABLE, |socket| recv_message(socket.as_fd(), buffer)).await
    }

    /// Who connected.
    pub fn peer_cred(&self) -> io::Result<PeerCred> {
        peer_cred(self.0.get_ref())
    }

    /// The descriptor, to be passed to another process.
    pub fn into_fd(self) -> OwnedFd {
        self.0.into_inner()
    }
}

impl AsFd for SeqStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

/// Who is at the other end of a connected unix socket.
pub fn peer_cred(socket: &impl AsFd) -> io::Result<PeerCred> {
    let cred: libc::ucred = sys::struct_option(socket, libc::SOL_SOCKET, libc::SO_PEERCRED)?;
    Ok(PeerCred { pid: cred.pid, uid: cred.uid, gid: cred.gid })
}

/// Writes all of `bytes` (not empty) to a blocking stream; the descriptors arrive with the first of them.
pub fn send_with_fds(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let sent = send_message(stream.as_fd(), bytes, &raw)?;
    io::Write::write_all(&mut &*stream, &bytes[sent..])
}

/// Reads what is there (at most `buffer`) from a stream, with the descriptors that came along; 0 is the end.
pub fn recv_with_fds(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    recv_message(stream.as_fd(), buffer)
}

fn new_socket() -> nix::Result<OwnedFd> {
    socket(AddressFamily::Unix, SockType::SeqPacket, socket_flags(), None)
}

fn socket_flags() -> SockFlag {
    SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC
}

fn register(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd names the same open descriptor until it is dropped, which AsyncFd does after deregistering it.
    Ok(unsafe { AsyncFd::register(fd) }?)
}

fn send_message(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[RawFd]) -> io::Result<usize> {
    let rights = [ControlMessage::ScmRights(fds)];
    let control = if fds.is_empty() { &[][..] } else { &rights[..] };
    Ok(sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None)?)
}

/// Control space for [`MAX_FDS`] descriptors, aligned as `cmsghdr` must be.
#[repr(C)]
union ControlBuffer {
    _align: libc::cmsghdr,
    bytes: [u8; CONTROL_SPACE],
}

const CONTROL_SPACE: usize = {
    const FDS: u32 = 4 * 16;
    assert!(FDS as usize == MAX_FDS * size_of::<RawFd>());
    // SAFETY: arithmetic on the argument only.
    unsafe { libc::CMSG_SPACE(FDS) as usize }
};

/// By hand rather than by nix: nix gives up on a truncated control message before the descriptors in it can be closed.
fn recv_message(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut control = ControlBuffer { bytes: [0; _] };
    let mut vector = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: msghdr is a structure of integers and pointers; all zero means "none of it".
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    header.msg_iov = &raw mut vector;
    header.msg_iovlen = 1;
    header.msg_control = (&raw mut control).cast();
    header.msg_controllen = size_of::<ControlBuffer>() as _;
    // SAFETY: header points at `buffer` and `control`, both valid for writes of the stated lengths during the call.
    let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_CMSG_CLOEXEC) };
    let length = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: the kernel filled `control` and set msg_controllen accordingly.
    let fds = unsafe { take_fds(&header) };
    if header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the message or its descriptors were truncated"));
    }
    Ok((length, fds))
}

/// # Safety
/// `header` must describe a control buffer the kernel has just filled.
unsafe fn take_fds(header: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: the CMSG functions stay within msg_controllen, and the kernel's lengths are consistent.
    unsafe {
        let mut message = libc::CMSG_FIRSTHDR(header);
        while !message.is_null() {
            if (*message).cmsg_level == libc::SOL_SOCKET && (*message).cmsg_type == libc::SCM_RIGHTS {
                let count = ((*message).cmsg_len as usize - libc::CMSG_LEN(0) as usize) / size_of::<RawFd>();
                let data = libc::CMSG_DATA(message).cast::<RawFd>();
                // Each is a new descriptor of this process that nobody else knows.
                fds.extend((0..count).map(|i| OwnedFd::from_raw_fd(ptr::read_unaligned(data.add(i)))));
            }
            message = libc::CMSG_NXTHDR(header, message);
        }
    }
    fds
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Read, os::unix::fs::MetadataExt};

    use super::*;

    #[tokio::test]
    async fn a_packet_arrives_whole_with_its_descriptor() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("s.sock");
        let _stale = SeqListener::bind(&path).expect("bind");
        let listener = SeqListener::bind(&path).expect("a stale socket is replaced");
        let client = SeqStream::connect(&path).expect("connect");
        let server = listener.accept().await.expect("accept");
        assert_eq!(server.peer_cred().expect("credentials").pid, std::process::id().cast_signed());

        let file = File::open("/dev/null").expect("open");
        client.send(b"one", Some(file.as_fd())).await.expect("send");
        client.send(b"two", None).await.expect("send");
        let mut buffer = [0; 16];
        let (length, fds) = server.recv(&mut buffer).await.expect("receive");
        assert_eq!((&buffer[..length], fds.len()), (&b"one"[..], 1));
        let passed = File::from(fds.into_iter().next().expect("descriptor"));
        assert_eq!(passed.metadata().expect("stat").ino(), file.metadata().expect("stat").ino());
        let (length, fds) = server.recv(&mut buffer).await.expect("receive");
        assert_eq!((&buffer[..length], fds.len()), (&b"two"[..], 0));
        drop(client);
        assert_eq!(server.recv(&mut buffer).await.expect("end").0, 0);
    }

    #[tokio::test]
    async fn a_packet_longer_than_the_buffer_is_refused_and_its_descriptor_closed() {
        let (a, b) = SeqStream::pair().expect("pair");
        let (mut reader, writer) = io::pipe().expect("pipe");
        a.send(&[7; 32], Some(writer.as_fd())).await.expect("send");
        drop(writer);
        let error = b.recv(&mut [0; 16]).await.expect_err("truncated");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        // The end of the pipe shows that the passed writer was closed.
        assert_eq!(reader.read(&mut [0; 1]).expect("read"), 0);
    }

    #[tokio::test]
    async fn more_descriptors_than_allowed_are_refused() {
        let (a, b) = UnixStream::pair().expect("pair");
        let file = File::open("/dev/null").expect("open");
        send_with_fds(&a, b"x", &[file.as_fd(); MAX_FDS + 1]).expect("send");
        recv_with_fds(&b, &mut [0; 4]).expect_err("too many");
    }

    #[test]
    fn streams_carry_several_descriptors() {
        let (a, b) = UnixStream::pair().expect("pair");
        let file = File::open("/dev/null").expect("open");
        send_with_fds(&a, b"hello", &[file.as_fd(), file.as_fd()]).expect("send");
        let mut buffer = [0; 16];
        let (length, fds) = recv_with_fds(&b, &mut buffer).expect("receive");
        assert_eq!((&buffer[..length], fds.len()), (&b"hello"[..], 2));
        assert_eq!(peer_cred(&b).expect("credentials").pid, std::process::id().cast_signed());
    }
}
