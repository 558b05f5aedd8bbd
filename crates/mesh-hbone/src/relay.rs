//! A TCP socket and a tunnel stream: every byte, half-close and reset from each to the other.
//!
//! An application's bytes are read straight into the records that leave, and only when the tunnel has room for them; what the tunnel
//! brings is written to the socket by the tunnel's own task, and comes here only when the socket does not take it. So a flow holds no
//! buffer, and its task sleeps while payload comes in. No idle timeout: only a half-closed flow has a limit.

use std::{
    future::Future,
    io,
    net::Shutdown,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
    time::Duration,
};

use mesh_net::{CopyOutcome, End, Progress, Side, copy::HALF_CLOSED_LIMIT, sockets::reset_on_close};
use socket2::SockRef;
use tokio::{
    io::Interest,
    net::TcpStream,
    time::{Sleep, sleep},
};

use crate::{
    driver::{Drained, Fill, PeerReset, Plug},
    engine::out::MAX_READ,
    stream::{ResetReason, TunnelStream},
};

/// Reads from the application in one turn of its task.
const READS: usize = 4;

/// Copies until both directions are closed or one side fails. `First` is the socket, `Second` the tunnel; `sent` counts from the
/// socket into the tunnel. After a failure the socket is set to be reset when dropped. Cancelling resets the stream (CANCEL) and leaves
/// the socket as it is.
pub fn relay(tcp: Rc<TcpStream>, tunnel: TunnelStream, progress: Rc<Progress>) -> Relay {
    relay_within(tcp, tunnel, progress, HALF_CLOSED_LIMIT)
}

/// As [`relay`], with another limit for half-closed flows.
pub fn relay_within(tcp: Rc<TcpStream>, tunnel: TunnelStream, progress: Rc<Progress>, half_closed: Duration) -> Relay {
    tunnel.link.plug(tunnel.id, Plug { tcp: tcp.clone(), progress: progress.clone() });
    Relay {
        tcp,
        tunnel: Some(tunnel),
        progress,
        up: Up::Open,
        down_ended: false,
        large: false,
        half_closed,
        limit: None,
        watch: None,
    }
}

/// See [`relay`]. Small on purpose: there is one for every idle flow.
#[must_use = "nothing moves unless it is polled"]
pub struct Relay {
    tcp: Rc<TcpStream>,
    /// Until it has ended.
    tunnel: Option<TunnelStream>,
    progress: Rc<Progress>,
    up: Up,
    /// The peer's end has been passed on.
    down_ended: bool,
    large: bool,
    half_closed: Duration,
    limit: Option<Pin<Box<Sleep>>>,
    /// Notices the socket's reset while nobody reads from it.
    watch: Option<Watch>,
}

type Watch = Pin<Box<dyn Future<Output = io::Error>>>;

/// The direction into the tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Up {
    Open,
    /// The application ended it.
    Ended,
    /// The peer wants no more.
    Stopped,
}

impl std::fmt::Debug for Relay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Relay").field("up", &self.up).field("down_ended", &self.down_ended).finish_non_exhaustive()
    }
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

impl Future for Relay {
    type Output = CopyOutcome;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<CopyOutcome> {
        let this = self.get_mut();
        let Some(tunnel) = this.tunnel.take() else { return Poll::Pending };
        let end = match this.both_ways(&tunnel, cx) {
            Ok(false) => {
                this.tunnel = Some(tunnel);
                return Poll::Pending;
            }
            Ok(true) => {
                drop(tunnel);
                End::Clean
            }
            Err(failure) => conclude(failure, &this.tcp, tunnel),
        };
        Poll::Ready(CopyOutcome { sent: this.progress.sent.get(), received: this.progress.received.get(), end })
    }
}

impl Relay {
    /// Moves what can be moved; true when both directions have ended.
    fn both_ways(&mut self, tunnel: &TunnelStream, cx: &mut Context<'_>) -> Result<bool, Failure> {
        // First, so that a reset is not taken for the end of data.
        match tunnel.link.peer_reset(tunnel.id, cx) {
            Some(PeerReset::Broken) => return Err(of_tunnel(tunnel.link.broken_by())),
            // Nothing more can be sent; what was received decides how it ends.
            Some(PeerReset::Stopped) if self.up == Up::Open => self.up = Up::Stopped,
            Some(PeerReset::Stopped) | None => {}
        }
        if !self.down_ended {
            self.download(tunnel, cx)?;
        }
        let blocked = self.up == Up::Open && self.upload(tunnel, cx)?;
        if self.down_ended && self.up != Up::Open {
            return Ok(true);
        }
        if !self.large && tunnel.link.is_large(tunnel.id) {
            self.large = true;
            tunnel.held.iter().for_each(|held| held.elephant());
        }
        // Nobody reads the socket now, so its reset has to be watched for.
        if blocked || self.up != Up::Open {
            let watch = self.watch.get_or_insert_with(|| Box::pin(broken(self.tcp.clone())));
            if let Poll::Ready(error) = watch.as_mut().poll(cx) {
                return Err(of_tcp(error));
            }
        }
        if self.down_ended || self.up != Up::Open {
            let limit = self.limit.get_or_insert_with(|| Box::pin(sleep(self.half_closed)));
            if limit.as_mut().poll(cx).is_ready() {
                let error = io::Error::new(io::ErrorKind::TimedOut, format!("half closed for {:?}", self.half_closed));
                return Err(if self.down_ended { of_tcp(error) } else { of_tunnel(error) });
            }
        }
        Ok(false)
    }

    /// What the socket did not take when it came, and the end.
    fn download(&mut self, tunnel: &TunnelStream, cx: &mut Context<'_>) -> Result<(), Failure> {
        let mut failed = false;
        let (tcp, progress) = (&self.tcp, &self.progress);
        let drained = tunnel.link.poll_drain(tunnel.id, cx, |cx, bytes| {
            loop {
                match tcp.poll_write_ready(cx) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                }
                match tcp.try_write(bytes) {
                    Ok(written) => {
                        progress.received.set(progress.received.get() + written as u64);
                        return Poll::Ready(Ok(written));
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => {
                        failed = true;
                        return Poll::Ready(Err(error));
                    }
                }
            }
        });
        match drained {
            Poll::Pending | Poll::Ready(Ok(Drained::Open)) => Ok(()),
            Poll::Ready(Ok(Drained::Ended)) => {
                self.down_ended = true;
                match SockRef::from(&*self.tcp).shutdown(Shutdown::Write) {
                    // Closed in both directions before our FIN: nothing is lost by not sending it.
                    Err(error) if error.kind() != io::ErrorKind::NotConnected => Err(of_tcp(error)),
                    _ => Ok(()),
                }
            }
            Poll::Ready(Err(error)) if failed || tunnel.link.is_broken(tunnel.id) => Err(of_tcp(error)),
            Poll::Ready(Err(error)) => Err(of_tunnel(error)),
        }
    }

    /// Reads what the tunnel has room for; true when the tunnel is what holds it up.
    fn upload(&mut self, tunnel: &TunnelStream, cx: &mut Context<'_>) -> Result<bool, Failure> {
        for _ in 0..READS {
            match self.tcp.poll_read_ready(cx) {
                Poll::Pending => {
                    // Idle: what was needed to be blocked is not needed any more.
                    self.watch = None;
                    return Ok(false);
                }
                Poll::Ready(ready) => ready.map_err(of_tcp)?,
            }
            let filled = tunnel.link.fill(tunnel.id, cx, MAX_READ, |slices| self.tcp.try_read_vectored(slices));
            match filled {
                Fill::Sent { bytes, all } => {
                    self.progress.sent.set(self.progress.sent.get() + bytes as u64);
                    if all {
                        // A read that leaves room has emptied the socket, and what comes later is announced anew: asking again
                        // would be a system call for nothing. Saying so to the runtime fails with what we tell it.
                        let empty = || Err::<(), _>(io::ErrorKind::WouldBlock.into());
                        self.tcp.try_io(Interest::READABLE, empty).err();
                    }
                }
                Fill::Empty => {}
                Fill::Eof => {
                    tunnel.link.finish(tunnel.id);
                    self.up = Up::Ended;
                    return Ok(false);
                }
                Fill::Full => return Ok(true),
                Fill::Source(error) => return Err(of_tcp(error)),
                Fill::Gone => return Err(of_tunnel(tunnel.link.broken_by())),
            }
        }
        // A flow that is always readable must not starve the others of its worker.
        cx.waker().wake_by_ref();
        Ok(false)
    }
}

/// Resolves when the kernel has given up the connection: reset by the peer, or timed out.
async fn broken(stream: Rc<TcpStream>) -> io::Error {
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
