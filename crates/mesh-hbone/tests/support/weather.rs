//! A transport that does everything a transport may do to whoever uses it.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use mesh_hbone::tls::Transport;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};

/// How bad it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weather {
    /// Most bytes of one read or write.
    pub(crate) piece: usize,
    /// How often it is not ready though it could be. It then wakes at once.
    pub(crate) pending: f64,
    /// How often nothing moves for a while.
    pub(crate) stall: f64,
    pub(crate) stall_for: Duration,
    /// Keeps what is written until it is flushed.
    pub(crate) lazy: bool,
    /// Bytes read after which the connection is gone, and how.
    pub(crate) breaks: Option<(usize, Break)>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Break {
    /// As a process that died: its kernel closes.
    End,
    Reset,
}

/// See the module.
pub(crate) struct Rough<T> {
    io: T,
    weather: Weather,
    reading: Side,
    writing: Side,
    kept: Vec<u8>,
    read: usize,
}

struct Side {
    rng: StdRng,
    stall: Option<Pin<Box<Sleep>>>,
}

/// What it takes of several slices at most.
const JOINS: usize = 40 << 10;
/// What a lazy transport keeps at most.
const KEEPS: usize = 16 << 10;

impl<T: Transport> Rough<T> {
    pub(crate) fn new(io: T, weather: Weather, rng: &mut StdRng) -> Self {
        let mut side = || Side { rng: StdRng::seed_from_u64(rng.random()), stall: None };
        Self { io, weather, reading: side(), writing: side(), kept: Vec::new(), read: 0 }
    }

    /// Hands on what was kept.
    fn poll_kept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.kept.is_empty() {
            let length = self.writing.piece(&self.weather, self.kept.len());
            let written = ready!(Pin::new(&mut self.io).poll_write(cx, &self.kept[..length]))?;
            self.kept.drain(..written);
        }
        Poll::Ready(Ok(()))
    }

    fn broken(&self) -> Option<Break> {
        self.weather.breaks.filter(|(after, _)| self.read >= *after).map(|(_, how)| how)
    }
}

impl Side {
    fn piece(&mut self, weather: &Weather, most: usize) -> usize {
        self.rng.random_range(1..=weather.piece).min(most)
    }

    fn poll_ready(&mut self, weather: &Weather, cx: &mut Context<'_>) -> Poll<()> {
        if self.stall.is_none() && self.rng.random_bool(weather.stall) {
            self.stall = Some(Box::pin(sleep(weather.stall_for.mul_f64(self.rng.random()))));
        }
        if let Some(stall) = &mut self.stall {
            ready!(stall.as_mut().poll(cx));
            self.stall = None;
        }
        if self.rng.random_bool(weather.pending) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(())
    }
}

impl<T: Transport> AsyncRead for Rough<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        match this.broken() {
            Some(Break::End) => return Poll::Ready(Ok(())),
            Some(Break::Reset) => return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
            None => {}
        }
        ready!(this.reading.poll_ready(&this.weather, cx));
        let length = this.reading.piece(&this.weather, buf.remaining());
        let mut piece = vec![0; length];
        let mut part = ReadBuf::new(&mut piece);
        ready!(Pin::new(&mut this.io).poll_read(cx, &mut part))?;
        buf.put_slice(part.filled());
        this.read += part.filled().len();
        Poll::Ready(Ok(()))
    }
}

impl<T: Transport> AsyncWrite for Rough<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if this.broken().is_some() {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        ready!(this.writing.poll_ready(&this.weather, cx));
        let length = this.writing.piece(&this.weather, buf.len());
        if !this.weather.lazy {
            return Pin::new(&mut this.io).poll_write(cx, &buf[..length]);
        }
        if this.kept.len() >= KEEPS {
            ready!(this.poll_kept(cx))?;
        }
        this.kept.extend_from_slice(&buf[..length]);
        Poll::Ready(Ok(length))
    }

    /// Takes from several slices at once, and ends anywhere in them.
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut joined = Vec::new();
        for slice in bufs {
            let room = self.weather.piece.min(JOINS) - joined.len();
            joined.extend_from_slice(&slice[..slice.len().min(room)]);
        }
        self.poll_write(cx, &joined)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_kept(cx))?;
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_kept(cx))?;
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
