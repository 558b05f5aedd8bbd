//! Plain TCP to plain TCP: every byte, every half-close, every reset, from each side to the other.
//!
//! A buffer is held only between a read and the write of what was read, so an idle flow holds none.

use std::{
    cell::{Cell, RefCell},
    future::Future,
    io,
    net::Shutdown,
    ops::{Deref, DerefMut},
    pin::pin,
    rc::Rc,
    time::Duration,
};

use socket2::SockRef;
use tokio::{io::Interest, net::TcpStream, select, task::coop::consume_budget, time::sleep};

use crate::sockets::reset_on_close;

/// How long a flow may stay half closed unless the caller says otherwise.
pub const HALF_CLOSED_LIMIT: Duration = Duration::from_secs(3600);

/// Bytes moved so far; read it while the flow runs.
#[derive(Debug, Default)]
pub struct Progress {
    /// From the first socket to the second.
    pub sent: Cell<u64>,
    /// From the second socket to the first.
    pub received: Cell<u64>,
}

/// How a flow ended, and what it moved.
#[derive(Debug)]
pub struct CopyOutcome {
    pub sent: u64,
    pub received: u64,
    pub end: End,
}

/// Which of the two sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    First,
    Second,
}

impl Side {
    fn other(self) -> Self {
        match self {
            Self::First => Self::Second,
            Self::Second => Self::First,
        }
    }
}

/// Why a flow ended.
#[derive(Debug)]
pub enum End {
    /// Both sides closed in order.
    Clean,
    /// This side reset the connection; the other side's socket is set to be reset when dropped.
    Reset(Side),
    /// This side failed otherwise (`TimedOut`: it kept a half-closed flow open too long); both sockets are set to be reset.
    Error(Side, io::Error),
}

/// Copies both ways until both directions are closed or one side fails. The caller drops the sockets afterwards; dropping
/// (cancelling) this future leaves them as they are.
pub async fn copy_bidirectional(
    first: &TcpStream,
    second: &TcpStream,
    pool: &BufferPool,
    progress: &Progress,
) -> CopyOutcome {
    copy_bidirectional_within(first, second, pool, progress, HALF_CLOSED_LIMIT).await
}

/// As [`copy_bidirectional`], with another limit for half-closed flows. Flows open in both directions have none.
pub async fn copy_bidirectional_within(
    first: &TcpStream,
    second: &TcpStream,
    pool: &BufferPool,
    progress: &Progress,
    half_closed: Duration,
) -> CopyOutcome {
    let out = one_way(Side::First, first, second, pool, &progress.sent);
    let back = one_way(Side::Second, second, first, pool, &progress.received);
    let (mut out, mut back) = (pin!(out), pin!(back));
    let done = select! {
        done = &mut out => match done {
            Ok(()) => half_open(back, Side::Second, first, half_closed).await,
            failed => failed,
        },
        done = &mut back => match done {
            Ok(()) => half_open(out, Side::First, second, half_closed).await,
            failed => failed,
        },
    };
    let end = match done {
        Ok(()) => End::Clean,
        Err(failure) => conclude(failure, first, second),
    };
    CopyOutcome { sent: progress.sent.get(), received: progress.received.get(), end }
}

/// A side and what happened to it.
struct Failure {
    side: Side,
    error: io::Error,
}

/// The remaining direction, `from` one side into `finished`, whose own sending direction has ended. Nobody reads from `finished`
/// any more, so its reset has to be watched for.
async fn half_open(
    remaining: impl Future<Output = Result<(), Failure>>,
    from: Side,
    finished: &TcpStream,
    limit: Duration,
) -> Result<(), Failure> {
    select! {
        biased;
        done = remaining => done,
        error = broken(finished) => Err(Failure { side: from.other(), error }),
        () = sleep(limit) => {
            let error = io::Error::new(io::ErrorKind::TimedOut, format!("half closed for {limit:?}"));
            Err(Failure { side: from, error })
        }
    }
}

async fn one_way(
    side: Side,
    from: &TcpStream,
    to: &TcpStream,
    pool: &BufferPool,
    moved: &Cell<u64>,
) -> Result<(), Failure> {
    let reading = |error| Failure { side, error };
    let writing = |error| Failure { side: side.other(), error };
    loop {
        from.readable().await.map_err(reading)?;
        let mut buffer = pool.take();
        match from.try_read(&mut buffer) {
            Ok(0) => return SockRef::from(to).shutdown(Shutdown::Write).or_else(already_gone).map_err(writing),
            Ok(length) => {
                let mut rest = &buffer[..length];
                while !rest.is_empty() {
                    select! {
                        biased;
                        ready = to.writable() => ready.map_err(writing)?,
                        // Blocked by a slow receiver: the sender's reset must get through all the same.
                        error = broken(from) => return Err(reading(error)),
                    }
                    match to.try_write(rest) {
                        Ok(written) => {
                            rest = &rest[written..];
                            moved.set(moved.get() + written as u64);
                        }
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                        Err(error) => return Err(writing(error)),
                    }
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(reading(error)),
        }
        drop(buffer);
        // A flow that is always readable must not starve the others of its worker.
        consume_budget().await;
    }
}

/// The peer closed both directions before our FIN: nothing is lost by not sending it.
fn already_gone(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotConnected { Ok(()) } else { Err(error) }
}

/// Resolves when the kernel has given up the connection: reset by the peer, or timed out.
async fn broken(stream: &TcpStream) -> io::Error {
    if let Err(error) = stream.ready(Interest::ERROR).await {
        return error;
    }
    match stream.take_error() {
        Ok(Some(error)) | Err(error) => error,
        // The other direction took the error off the socket first.
        Ok(None) => io::ErrorKind::ConnectionReset.into(),
    }
}

/// RST on one side becomes RST on the other.
fn conclude(failure: Failure, first: &TcpStream, second: &TcpStream) -> End {
    for stream in [first, second] {
        // Setting the option fails only on a socket that is gone already, which is what it was to achieve.
        drop(reset_on_close(stream));
    }
    match failure.error.kind() {
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => End::Reset(failure.side),
        _ => End::Error(failure.side, failure.error),
    }
}

/// Buffers of one worker. Clones share; not for several threads.
#[derive(Clone, Debug)]
pub struct BufferPool(Rc<Shelf>);

#[derive(Debug)]
struct Shelf {
    length: usize,
    retain: usize,
    idle: RefCell<Vec<Box<[u8]>>>,
    taken: Cell<usize>,
}

impl BufferPool {
    /// Buffers of `length` bytes, of which at most `retain` are kept while unused.
    pub fn new(length: usize, retain: usize) -> Self {
        Self(Rc::new(Shelf { length, retain, idle: RefCell::default(), taken: Cell::default() }))
    }

    /// A buffer with arbitrary content; it goes back when dropped.
    pub fn take(&self) -> PooledBuffer {
        let bytes = self.0.idle.borrow_mut().pop().unwrap_or_else(|| vec![0; self.0.length].into_boxed_slice());
        self.0.taken.set(self.0.taken.get() + 1);
        PooledBuffer { bytes, pool: self.clone() }
    }

    /// Buffers in use at this moment.
    pub fn in_use(&self) -> usize {
        self.0.taken.get()
    }
}

/// A buffer on loan.
#[derive(Debug)]
pub struct PooledBuffer {
    bytes: Box<[u8]>,
    pool: BufferPool,
}

impl Deref for PooledBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl DerefMut for PooledBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl Drop for PooledBuffer {
    fn drop(&mut self) {
        let shelf = &self.pool.0;
        shelf.taken.set(shelf.taken.get() - 1);
        let mut idle = shelf.idle.borrow_mut();
        if idle.len() < shelf.retain {
            idle.push(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    async fn connected() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let client = TcpStream::connect(listener.local_addr().expect("address"));
        let (client, accepted) = tokio::join!(client, listener.accept());
        (client.expect("connect"), accepted.expect("accept").0)
    }

    /// client ↔ (near, far) ↔ server, copied between near and far while `scenario` runs.
    async fn relayed<F: Future>(scenario: impl FnOnce(TcpStream, TcpStream) -> F) -> (CopyOutcome, F::Output) {
        let pool = BufferPool::new(64 * 1024, 4);
        let ((client, near), (server, far)) = (connected().await, connected().await);
        let copying = async {
            let outcome = copy_bidirectional(&near, &far, &pool, &Progress::default()).await;
            drop((near, far));
            outcome
        };
        let (outcome, observed) = tokio::join!(copying, scenario(client, server));
        assert_eq!(pool.in_use(), 0);
        (outcome, observed)
    }

    async fn read_all(stream: &mut TcpStream) -> Vec<u8> {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.expect("read to the end");
        all
    }

    #[tokio::test]
    async fn a_half_close_passes_each_way_and_the_other_direction_goes_on() {
        for client_first in [true, false] {
            let (outcome, ()) = relayed(|client, server| async move {
                let (mut early, mut late) = if client_first { (client, server) } else { (server, client) };
                early.write_all(b"question").await.expect("write");
                early.shutdown().await.expect("shut down");
                assert_eq!(read_all(&mut late).await, b"question");
                late.write_all(b"a longer answer").await.expect("write");
                late.shutdown().await.expect("shut down");
                assert_eq!(read_all(&mut early).await, b"a longer answer");
            })
            .await;
            assert!(matches!(outcome.end, End::Clean), "{outcome:?}");
            let moved = if client_first { (8, 15) } else { (15, 8) };
            assert_eq!((outcome.sent, outcome.received), moved);
        }
    }

    #[tokio::test]
    async fn a_reset_of_one_side_resets_the_other() {
        for (client_resets, side) in [(true, Side::First), (false, Side::Second)] {
            let (outcome, ()) = relayed(|client, server| async move {
                let (mut rude, mut victim) = if client_resets { (client, server) } else { (server, client) };
                rude.write_all(b"x").await.expect("write");
                victim.read_exact(&mut [0]).await.expect("read");
                reset_on_close(&rude).expect("linger");
                drop(rude);
                let error = victim.read(&mut [0]).await.expect_err("reset");
                assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
            })
            .await;
            assert!(matches!(outcome.end, End::Reset(s) if s == side), "{outcome:?}");
        }
    }

    #[tokio::test]
    async fn a_reset_gets_through_after_the_half_close_of_the_same_side() {
        let (outcome, ()) = relayed(|mut client, mut server| async move {
            client.shutdown().await.expect("shut down");
            assert_eq!(read_all(&mut server).await, b"");
            reset_on_close(&client).expect("linger");
            drop(client);
            // Client's port is gone; the server learns it without anybody sending a byte.
            let error = server.ready(Interest::ERROR).await.and_then(|_| server.take_error()).expect("watch");
            // Linux reports a reset that follows the peer's FIN as EPIPE.
            assert_eq!(error.expect("an error").kind(), io::ErrorKind::BrokenPipe);
        })
        .await;
        assert!(matches!(outcome.end, End::Reset(Side::First)), "{outcome:?}");
    }

    #[tokio::test]
    async fn a_reset_gets_through_while_the_receiver_does_not_read() {
        let (outcome, ()) = relayed(|client, server| async move {
            let chunk = vec![0; 1 << 20];
            // Fill every buffer on the way. Whether the relay will make room once more, only waiting can tell; how long is no
            // promise, since what is tested holds with room left as well.
            loop {
                while client.try_write(&chunk).is_ok() {
                    tokio::task::yield_now().await;
                }
                if tokio::time::timeout(Duration::from_millis(100), client.writable()).await.is_err() {
                    break;
                }
            }
            reset_on_close(&client).expect("linger");
            drop(client);
            drop(server.ready(Interest::ERROR).await);
        })
        .await;
        assert!(matches!(outcome.end, End::Reset(Side::First)), "{outcome:?}");
    }

    #[tokio::test]
    async fn a_flow_half_closed_too_long_ends() {
        let (client, near) = connected().await;
        let (server, far) = connected().await;
        SockRef::from(&client).shutdown(Shutdown::Write).expect("shut down");
        let (pool, progress) = (BufferPool::new(1024, 1), Progress::default());
        let outcome = copy_bidirectional_within(&near, &far, &pool, &progress, Duration::ZERO).await;
        assert!(
            matches!(outcome.end, End::Error(Side::Second, ref e) if e.kind() == io::ErrorKind::TimedOut),
            "{outcome:?}"
        );
        drop(server);
    }

    #[tokio::test]
    async fn sixty_four_mebibytes_arrive_unchanged_both_ways() {
        const TOTAL: usize = 64 << 20;
        let byte = |i: usize, salt: u64| ((i as u64 ^ salt).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8;
        let end = |stream: TcpStream, mine: u64, theirs: u64| async move {
            let (mut reader, mut writer) = stream.into_split();
            let send = async move {
                for start in (0..TOTAL).step_by(1 << 18) {
                    let chunk: Vec<u8> = (start..start + (1 << 18)).map(|i| byte(i, mine)).collect();
                    writer.write_all(&chunk).await.expect("write");
                }
                writer.shutdown().await.expect("shut down");
            };
            let receive = async move {
                let (mut buffer, mut at) = (vec![0; 1 << 18], 0);
                loop {
                    let length = reader.read(&mut buffer).await.expect("read");
                    if length == 0 {
                        return at;
                    }
                    assert!(buffer[..length].iter().enumerate().all(|(i, b)| *b == byte(at + i, theirs)));
                    at += length;
                }
            };
            tokio::join!(send, receive).1
        };
        let (outcome, received) =
            relayed(|client, server| async move { tokio::join!(end(client, 1, 2), end(server, 2, 1)) }).await;
        assert_eq!(received, (TOTAL, TOTAL));
        assert_eq!((outcome.sent, outcome.received), (TOTAL as u64, TOTAL as u64));
        assert!(matches!(outcome.end, End::Clean), "{outcome:?}");
    }

    #[test]
    fn a_pool_keeps_no_more_than_it_may() {
        let pool = BufferPool::new(8, 1);
        let (a, b) = (pool.take(), pool.take());
        assert_eq!(pool.in_use(), 2);
        drop((a, b));
        assert_eq!((pool.in_use(), pool.0.idle.borrow().len()), (0, 1));
    }
}
