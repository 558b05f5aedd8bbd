//! A client that keeps one connection open and uses it: what an application with a connection pool looks like to a mesh that is
//! switched on under it.
//!
//! Every tick it sends a numbered line and expects it back. Its progress is one JSON line per change of state and per second on
//! standard output, so that anyone can see whether the connection of tick 1 is the connection of tick 1,000.

use std::{
    io::{self, BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use super::http::dial;

/// How a steady client is doing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Ticks answered since the start, over all connections.
    pub ticks: u64,
    /// Connections opened since the start; 1 means the first one still lives.
    pub connections: u64,
    /// Ticks answered on the present connection.
    pub on_this_connection: u64,
    /// Longest wait for an answer on the present connection, microseconds.
    pub longest_gap_us: u64,
    /// The present connection's local address.
    pub local: Option<SocketAddr>,
    /// Why the last connection ended.
    pub last_error: Option<String>,
}

/// Echoes lines until the process ends.
///
/// # Errors
/// When the port cannot be bound.
pub fn echo(listen: SocketAddr) -> io::Result<()> {
    for stream in TcpListener::bind(listen)?.incoming() {
        let Ok(stream) = stream else { continue };
        thread::spawn(move || {
            let mut out = &stream;
            // Either side may go at any time; the client reports it.
            stream.set_nodelay(true).and_then(|()| io::copy(&mut &stream, &mut out))
        });
    }
    Ok(())
}

/// Ticks for ever; reconnects when it must, and when `reconnect` is set (as a connection pool does in time).
pub fn run(target: &str, interval: Duration, reconnect: &AtomicBool, mut report: impl FnMut(&Progress)) -> ! {
    let mut progress = Progress::default();
    loop {
        let error = match dial(target, 80, Duration::from_secs(5)) {
            Ok(stream) => tick(&stream, interval, reconnect, &mut progress, &mut report),
            Err(error) => error,
        };
        progress.last_error = Some(error.to_string());
        report(&progress);
        thread::sleep(interval);
    }
}

fn tick(
    stream: &TcpStream,
    interval: Duration,
    reconnect: &AtomicBool,
    progress: &mut Progress,
    report: &mut impl FnMut(&Progress),
) -> io::Error {
    progress.connections += 1;
    (progress.on_this_connection, progress.longest_gap_us) = (0, 0);
    progress.local = stream.local_addr().ok();
    let mut last_report = Instant::now();
    let mut reader = BufReader::new(stream);
    loop {
        if reconnect.swap(false, Ordering::Relaxed) {
            return io::Error::other("told to reconnect");
        }
        let started = Instant::now();
        if let Err(error) = exchange(stream, &mut reader, progress.ticks) {
            return error;
        }
        progress.ticks += 1;
        progress.on_this_connection += 1;
        let gap = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
        progress.longest_gap_us = progress.longest_gap_us.max(gap);
        if progress.on_this_connection == 1 || last_report.elapsed() >= Duration::from_millis(200) {
            report(progress);
            last_report = Instant::now();
        }
        thread::sleep(interval);
    }
}

fn exchange(mut stream: &TcpStream, reader: &mut impl BufRead, tick: u64) -> io::Result<()> {
    let sent = format!("tick {tick}\n");
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(sent.as_bytes())?;
    let mut back = String::new();
    reader.read_line(&mut back)?;
    if back == sent {
        return Ok(());
    }
    Err(if back.is_empty() {
        io::ErrorKind::UnexpectedEof.into()
    } else {
        io::Error::new(io::ErrorKind::InvalidData, format!("sent {sent:?}, got {back:?}"))
    })
}
