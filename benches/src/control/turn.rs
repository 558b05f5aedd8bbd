//! One flush per turn.

use std::{
    cell::RefCell,
    io::{self, IoSlice},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use mesh_net::{BufferPool, copy::PooledBuffer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::Shared;

/// What may wait until the end of a turn. Four TLS records, which is what rustls takes at once.
pub const BUFFER: usize = 64 << 10;
/// From this size on a write goes straight on: copying it would cost more than the system call saved.
const LARGE: usize = 8 << 10;
/// Pieces of one write; `h2` has two, what it has encoded and a payload.
const PIECES: usize = 4;

/// A stream whose flushes are put off until [`Turn::poll_out`]. Clones share it: one is for `h2`, one for whoever polls `h2` and ends
/// each poll with `poll_out`. It holds a buffer only while something waits.
#[derive(Debug)]
pub struct Turn<S>(Shared<Inner<S>>);

#[derive(Debug)]
struct Inner<S> {
    stream: S,
    pool: BufferPool,
    waiting: Option<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    buffer: PooledBuffer,
    start: usize,
    end: usize,
}

impl Waiting {
    fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }
}

impl<S> Clone for Turn<S> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Turn<S> {
    /// `pool` has buffers of [`BUFFER`] bytes.
    pub fn new(stream: S, pool: BufferPool) -> Self {
        Self(Rc::new(RefCell::new(Inner { stream, pool, waiting: None })))
    }

    /// Writes out what waits. Pending when the stream takes no more now; the task is woken when it does.
    pub fn poll_out(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let inner = &mut *self.0.borrow_mut();
        ready!(inner.poll_drain(cx))?;
        Pin::new(&mut inner.stream).poll_flush(cx)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Inner<S> {
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(waiting) = &mut self.waiting {
            match ready!(Pin::new(&mut self.stream).poll_write(cx, waiting.bytes()))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => self.written(written),
            }
        }
        Poll::Ready(Ok(()))
    }

    fn written(&mut self, bytes: usize) {
        if let Some(waiting) = &mut self.waiting {
            waiting.start += bytes;
            if waiting.start == waiting.end {
                self.waiting = None;
            }
        }
    }

    fn poll_put(&mut self, cx: &mut Context<'_>, pieces: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let total: usize = pieces.iter().map(|piece| piece.len()).sum();
        if total >= LARGE {
            return self.poll_straight(cx, pieces);
        }
        if self.waiting.as_ref().is_some_and(|waiting| BUFFER - waiting.end < total) {
            ready!(self.poll_drain(cx))?;
        }
        let pool = &self.pool;
        let waiting = self.waiting.get_or_insert_with(|| Waiting { buffer: pool.take(), start: 0, end: 0 });
        for piece in pieces {
            waiting.buffer[waiting.end..waiting.end + piece.len()].copy_from_slice(piece);
            waiting.end += piece.len();
        }
        Poll::Ready(Ok(total))
    }

    /// What waits and then `pieces`, in one write. How much of the latter.
    fn poll_straight(&mut self, cx: &mut Context<'_>, pieces: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        loop {
            let before = self.waiting.as_ref().map_or(&[][..], Waiting::bytes);
            let mut all = [IoSlice::new(&[]); PIECES + 1];
            let held = before.len();
            all[0] = IoSlice::new(before);
            for (to, piece) in all[1..].iter_mut().zip(pieces) {
                *to = IoSlice::new(piece);
            }
            let used = 1 + pieces.len().min(PIECES);
            let first = usize::from(held == 0);
            let written = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, &all[first..used]))?;
            if written > held {
                self.waiting = None;
                return Poll::Ready(Ok(written - held));
            }
            if written == 0 {
                return Poll::Ready(Ok(0));
            }
            self.written(written);
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Turn<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0.borrow_mut().stream).poll_read(cx, buf)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Turn<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().poll_put(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().poll_put(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Put off: see [`Turn::poll_out`].
    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_out(cx))?;
        Pin::new(&mut self.0.borrow_mut().stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    use super::*;

    #[tokio::test]
    async fn small_writes_wait_for_the_turns_end_and_large_ones_keep_their_place() {
        let (near, mut far) = duplex(1 << 20);
        let turn = Turn::new(near, BufferPool::new(BUFFER, 1));
        let mut writer = turn.clone();
        writer.write_all(b"one ").await.unwrap();
        writer.flush().await.unwrap();
        writer.write_all(b"two ").await.unwrap();
        assert!(turn.0.borrow().waiting.is_some());
        writer.write_all(&[b'x'; LARGE]).await.unwrap();
        writer.write_all(b" three").await.unwrap();
        poll_fn(|cx| turn.poll_out(cx)).await.unwrap();
        assert!(turn.0.borrow().waiting.is_none(), "it holds a buffer for nothing");
        drop((turn, writer));
        let mut all = Vec::new();
        far.read_to_end(&mut all).await.unwrap();
        assert_eq!(all, [&b"one two "[..], &[b'x'; LARGE], b" three"].concat());
    }

    #[tokio::test]
    async fn a_stream_that_takes_little_loses_nothing() {
        let (near, mut far) = duplex(1000);
        let turn = Turn::new(near, BufferPool::new(BUFFER, 1));
        let mut writer = turn.clone();
        let sent: Vec<u8> = (0..300_000u32).map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect();
        let sizes = [1, 100, 7000, 20_000, LARGE, 3];
        let sending = async {
            let (mut rest, mut turns) = (&sent[..], sizes.iter().cycle());
            while !rest.is_empty() {
                let (now, later) = rest.split_at(rest.len().min(*turns.next().unwrap()));
                writer.write_all(now).await.unwrap();
                rest = later;
            }
            writer.shutdown().await.unwrap();
        };
        let mut got = Vec::new();
        let (_, read) = tokio::join!(sending, far.read_to_end(&mut got));
        read.unwrap();
        assert!(got == sent);
    }
}
