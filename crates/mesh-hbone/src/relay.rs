//! A TCP socket and a tunnel stream: every byte, half-close and reset from each to the other.
//!
//! A buffer is held only from a read to the write of what was read, and bytes are read only when the tunnel has room for them. Credit
//! goes back to the peer once its bytes are in the socket. No idle timeout: only a half-closed flow has a limit.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    io,
    net::Shutdown,
    pin::pin,
    time::Duration,
};

use mesh_net::{
    BufferPool, CopyOutcome, End, Progress, Side,
    copy::{HALF_CLOSED_LIMIT, PooledBuffer},
    sockets::reset_on_close,
};
use socket2::SockRef;
use tokio::{
    io::Interest,
    net::TcpStream,
    task::coop::consume_budget,
    time::{Instant, sleep},
};

use crate::{
    chunk::Chunk,
    stream::{PeerReset, RecvHalf, ResetReason, SendHalf, TunnelStream},
};

/// Copies until both directions are closed or one side fails. `First` is the socket, `Second` the tunnel; `sent` counts from the
/// socket into the tunnel. After a failure the socket is set to be reset when dropped. Cancelling resets the stream (CANCEL) and leaves
/// the socket as it is.
pub async fn relay(tcp: &TcpStream, tunnel: TunnelStream, pool: &BufferPool, progress: &Progress) -> CopyOutcome {
    relay_within(tcp, tunnel, pool, progress, HALF_CLOSED_LIMIT).await
}

/// As [`relay`], with another limit for half-closed flows.
pub async fn relay_within(
    tcp: &TcpStream,
    mut tunnel: TunnelStream,
    pool: &BufferPool,
    progress: &Progress,
    half_closed: Duration,
) -> CopyOutcome {
    let result = both_ways(tcp, &mut tunnel, pool, progress, half_closed).await;
    let end = match result {
        Ok(()) => End::Clean,
        Err(failure) => conclude(failure, tcp, tunnel),
    };
    CopyOutcome { sent: progress.sent.get(), received: progress.received.get(), end }
}

/// A side and what happened to it.
struct Failure {
    side: Side,
    error: io::Error,
}

fn of_tcp(error: io::Error) -> Failure {
    Failure { side: Side::First, error }
}

fn of_tunnel(error: io::Error) -> Failure {
    Failure { side: Side::Second, error }
}

async fn both_ways(
    tcp: &TcpStream,
    tunnel: &mut TunnelStream,
    pool: &BufferPool,
    progress: &Progress,
    half_closed: Duration,
) -> Result<(), Failure> {
    // Borrowed for the length of a poll only: the upload and the watch for the peer's reset take turns.
    let send = RefCell::new(&mut tunnel.send);
    let mut up = pin!(upload(tcp, &send, pool, &progress.sent));
    let mut down = pin!(download(&mut tunnel.recv, tcp, &progress.received));
    let mut limit = pin!(sleep(half_closed));
    let (mut up_done, mut down_done, mut stopped) = (false, false, false);
    while !(down_done && (up_done || stopped)) {
        let was_half = up_done || down_done;
        tokio::select! {
            // First, so that a reset is not taken for the end of data.
            biased;
            reset = poll_fn(|cx| send.borrow_mut().poll_peer_reset(cx)), if !stopped => match reset {
                // Nothing more can be sent; what was received decides how it ends.
                PeerReset::Stopped => stopped = true,
                PeerReset::Broken => return Err(of_tunnel(io::ErrorKind::ConnectionReset.into())),
            },
            done = &mut down, if !down_done => {
                done?;
                down_done = true;
            }
            done = &mut up, if !up_done && !stopped => {
                done?;
                up_done = true;
            }
            // Nobody reads the socket any more, so its reset has to be watched for.
            error = broken(tcp), if up_done => return Err(of_tcp(error)),
            () = &mut limit, if was_half => {
                let error = io::Error::new(io::ErrorKind::TimedOut, format!("half closed for {half_closed:?}"));
                return Err(if up_done { of_tunnel(error) } else { of_tcp(error) });
            }
        }
        if !was_half && (up_done || down_done) {
            limit.as_mut().reset(Instant::now() + half_closed);
        }
    }
    Ok(())
}

async fn upload(
    tcp: &TcpStream,
    send: &RefCell<&mut SendHalf>,
    pool: &BufferPool,
    moved: &Cell<u64>,
) -> Result<(), Failure> {
    loop {
        let ready = tcp.ready(Interest::READABLE).await.map_err(of_tcp)?;
        let mut buffer = pool.take();
        // Bytes stay in the socket until there is room. After the peer's FIN they are read first, or the FIN would wait too.
        let room = if ready.is_read_closed() { buffer.len() } else { room(tcp, send, buffer.len()).await? };
        let limit = room.min(buffer.len());
        match tcp.try_read(&mut buffer[..limit]) {
            Ok(0) => return send.borrow_mut().finish().map_err(of_tunnel),
            Ok(length) => {
                send_all(tcp, send, buffer, length).await?;
                moved.set(moved.get() + length as u64);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(of_tcp(error)),
        }
        send.borrow_mut().relinquish();
        // A flow that is always readable must not starve the others of its worker.
        consume_budget().await;
    }
}

async fn send_all(
    tcp: &TcpStream,
    send: &RefCell<&mut SendHalf>,
    buffer: PooledBuffer,
    length: usize,
) -> Result<(), Failure> {
    let mut start = 0;
    while start < length {
        let room = room(tcp, send, length - start).await?;
        if start == 0 && room >= length {
            return send.borrow_mut().send(Chunk::pooled(buffer, length)).map_err(of_tunnel);
        }
        let part = Chunk::copied(&buffer[start..(start + room).min(length)]);
        start += room;
        send.borrow_mut().send(part).map_err(of_tunnel)?;
    }
    Ok(())
}

/// Waits for room in the tunnel, and for the sender's reset, which must get through all the same.
async fn room(tcp: &TcpStream, send: &RefCell<&mut SendHalf>, wanted: usize) -> Result<usize, Failure> {
    tokio::select! {
        biased;
        room = poll_fn(|cx| send.borrow_mut().poll_room(cx, wanted)) => room.map_err(of_tunnel),
        error = broken(tcp) => Err(of_tcp(error)),
    }
}

async fn download(recv: &mut RecvHalf, tcp: &TcpStream, moved: &Cell<u64>) -> Result<(), Failure> {
    while let Some(chunk) = poll_fn(|cx| recv.poll_chunk(cx)).await.map_err(of_tunnel)? {
        let mut rest = &chunk[..];
        while !rest.is_empty() {
            tcp.writable().await.map_err(of_tcp)?;
            match tcp.try_write(rest) {
                Ok(written) => {
                    rest = &rest[written..];
                    moved.set(moved.get() + written as u64);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(of_tcp(error)),
            }
        }
        recv.release(chunk.len());
        consume_budget().await;
    }
    match SockRef::from(tcp).shutdown(Shutdown::Write) {
        // Closed in both directions before our FIN: nothing is lost by not sending it.
        Err(error) if error.kind() != io::ErrorKind::NotConnected => Err(of_tcp(error)),
        _ => Ok(()),
    }
}

/// Resolves when the kernel has given up the connection: reset by the peer, or timed out.
async fn broken(stream: &TcpStream) -> io::Error {
    if let Err(error) = stream.ready(Interest::ERROR).await {
        return error;
    }
    match stream.take_error() {
        Ok(Some(error)) | Err(error) => error,
        Ok(None) => io::ErrorKind::ConnectionReset.into(),
    }
}

/// RST on one side becomes RST on the other, of whichever kind it has.
fn conclude(failure: Failure, tcp: &TcpStream, tunnel: TunnelStream) -> End {
    // Fails only on a socket that is gone already.
    drop(reset_on_close(tcp));
    let reset = matches!(failure.error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe);
    tunnel.reset(match failure.side {
        Side::First if reset => ResetReason::ConnectError,
        Side::First | Side::Second => ResetReason::Cancel,
    });
    if reset { End::Reset(failure.side) } else { End::Error(failure.side, failure.error) }
}
