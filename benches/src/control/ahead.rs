//! Reading the socket in large pieces.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use mesh_net::{BufferPool, copy::PooledBuffer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A stream read as far ahead as a buffer of `pool` allows. It holds a buffer only while something in it has not been asked for.
#[derive(Debug)]
pub struct Ahead<S> {
    stream: S,
    pool: BufferPool,
    held: Option<(PooledBuffer, usize, usize)>,
}

impl<S> Ahead<S> {
    pub fn new(stream: S, pool: BufferPool) -> Self {
        Self { stream, pool, held: None }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Ahead<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let (buffer, start, end) = match this.held.take() {
            Some(held) => held,
            None => {
                let mut buffer = this.pool.take();
                let mut read = ReadBuf::new(&mut buffer);
                ready!(Pin::new(&mut this.stream).poll_read(cx, &mut read))?;
                let length = read.filled().len();
                (buffer, 0, length)
            }
        };
        let length = buf.remaining().min(end - start);
        buf.put_slice(&buffer[start..start + length]);
        if start + length < end {
            this.held = Some((buffer, start + length, end));
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Ahead<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
