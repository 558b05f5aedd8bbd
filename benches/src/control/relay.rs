//! A TCP socket and a stream of `h2`: every byte, half-close and reset from each to the other.

use std::{
    future::Future,
    io,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Buf as _, Bytes};
use h2::{Reason, RecvStream, SendStream};
use mesh_net::{BufferPool, sockets::reset_on_close};
use tokio::{
    io::{AsyncRead as _, AsyncWrite as _, ReadBuf},
    net::TcpStream,
};

use super::{READ, chunk::Chunk};

/// Reads from the application in one turn of its task.
const READS: usize = 4;
/// Frames given to the application in one turn.
const WRITES: usize = 16;

/// Copies both ways until both directions are closed or one side fails.
#[must_use = "nothing moves unless it is polled"]
pub struct Relay {
    tcp: TcpStream,
    send: SendStream<Chunk>,
    recv: RecvStream,
    pool: BufferPool,
    /// Came from the tunnel, and the socket has not taken it.
    unwritten: Bytes,
    up_ended: bool,
    down: Down,
}

/// The direction from the tunnel to the socket.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Down {
    Open,
    /// The peer has ended it; our FIN is on its way.
    Closing,
    Ended,
}

/// The side that failed.
enum Failure {
    Tcp(io::Error),
    Tunnel,
}

impl Relay {
    pub fn new(tcp: TcpStream, send: SendStream<Chunk>, recv: RecvStream, pool: BufferPool) -> Self {
        Self { tcp, send, recv, pool, unwritten: Bytes::new(), up_ended: false, down: Down::Open }
    }

    fn download(&mut self, cx: &mut Context<'_>) -> Result<(), Failure> {
        let mut frames = 0;
        while self.down == Down::Open {
            while !self.unwritten.is_empty() {
                match Pin::new(&mut self.tcp).poll_write(cx, &self.unwritten) {
                    Poll::Pending => return Ok(()),
                    Poll::Ready(written) => {
                        let written = written.map_err(Failure::Tcp)?;
                        self.unwritten.advance(written);
                        // Fails only on a stream that is over, where credit means nothing.
                        drop(self.recv.flow_control().release_capacity(written));
                    }
                }
            }
            if frames == WRITES {
                cx.waker().wake_by_ref();
                return Ok(());
            }
            frames += 1;
            match self.recv.poll_data(cx) {
                Poll::Pending => return Ok(()),
                Poll::Ready(Some(Ok(bytes))) => self.unwritten = bytes,
                // RFC 9113 §8.1: NO_ERROR says that the response is complete, not that it failed.
                Poll::Ready(Some(Err(error))) if error.reason() != Some(Reason::NO_ERROR) => {
                    return Err(Failure::Tunnel);
                }
                Poll::Ready(Some(Err(_)) | None) => self.down = Down::Closing,
            }
        }
        if self.down == Down::Closing {
            match Pin::new(&mut self.tcp).poll_shutdown(cx) {
                Poll::Pending => return Ok(()),
                // Closed in both directions before our FIN: nothing is lost by not sending it.
                Poll::Ready(Err(error)) if error.kind() != io::ErrorKind::NotConnected => {
                    return Err(Failure::Tcp(error));
                }
                Poll::Ready(_) => self.down = Down::Ended,
            }
        }
        Ok(())
    }

    fn upload(&mut self, cx: &mut Context<'_>) -> Result<(), Failure> {
        for _ in 0..READS {
            match self.tcp.poll_read_ready(cx) {
                Poll::Pending => return Ok(()),
                Poll::Ready(ready) => ready.map_err(Failure::Tcp)?,
            }
            let Poll::Ready(room) = self.poll_room(cx)? else { return Ok(()) };
            let mut buffer = self.pool.take();
            // Not `try_read`: this one knows by a short read that the socket is empty, and saves asking again.
            let mut read = ReadBuf::new(&mut buffer[..room]);
            match Pin::new(&mut self.tcp).poll_read(cx, &mut read) {
                Poll::Pending => return Ok(()),
                Poll::Ready(result) => result.map_err(Failure::Tcp)?,
            }
            let length = read.filled().len();
            self.up_ended = length == 0;
            let chunk = if self.up_ended { Chunk::empty() } else { Chunk::pooled(buffer, length) };
            self.send.send_data(chunk, self.up_ended).map_err(|_| Failure::Tunnel)?;
            if self.up_ended {
                return Ok(());
            }
        }
        // A flow that is always readable must not starve the others of its worker.
        cx.waker().wake_by_ref();
        Ok(())
    }

    /// How much may be read from the application.
    fn poll_room(&mut self, cx: &mut Context<'_>) -> Result<Poll<usize>, Failure> {
        // Kept while the stream is idle: the connection's window has enough for all.
        self.send.reserve_capacity(READ);
        loop {
            // The library announces changes of capacity only; what is there already must be asked for.
            match self.send.capacity() {
                0 => match self.send.poll_capacity(cx) {
                    Poll::Pending => return Ok(Poll::Pending),
                    Poll::Ready(Some(Ok(_))) => {}
                    Poll::Ready(Some(Err(_)) | None) => return Err(Failure::Tunnel),
                },
                room => return Ok(Poll::Ready(room.min(READ))),
            }
        }
    }

    /// RST on one side becomes RST on the other.
    fn conclude(&mut self, failure: &Failure) {
        // Fails only on a socket that is gone already.
        drop(reset_on_close(&self.tcp));
        let reset =
            |error: &io::Error| matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe);
        self.send.send_reset(match failure {
            Failure::Tcp(error) if reset(error) => Reason::CONNECT_ERROR,
            Failure::Tcp(_) | Failure::Tunnel => Reason::CANCEL,
        });
    }
}

impl Future for Relay {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        let mut result = this.download(cx);
        if result.is_ok() && !this.up_ended {
            result = this.upload(cx);
        }
        if result.is_ok() && this.down == Down::Ended && !this.up_ended {
            // Nothing comes in any more that would tell of the peer's reset.
            result = match this.send.poll_reset(cx) {
                Poll::Pending => Ok(()),
                Poll::Ready(Ok(Reason::NO_ERROR | Reason::CANCEL)) => {
                    this.up_ended = true;
                    Ok(())
                }
                Poll::Ready(_) => Err(Failure::Tunnel),
            };
        }
        match result {
            Err(failure) => {
                this.conclude(&failure);
                Poll::Ready(())
            }
            Ok(()) if this.up_ended && this.down == Down::Ended => Poll::Ready(()),
            Ok(()) => Poll::Pending,
        }
    }
}
