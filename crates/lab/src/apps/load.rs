//! Request load: keep-alive or one connection per request, closed loop. Reports counts, a latency histogram and its own CPU time.

use std::{
    io::{self, BufReader, Write},
    net::TcpStream,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use super::http::{dial, read_answer};

/// What to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Load {
    /// `host:port`.
    pub target: String,
    /// What to ask for.
    pub path: String,
    pub connections: usize,
    pub seconds: f64,
    /// Open a connection for every request.
    pub new_connections: bool,
}

/// What came of it. Latencies in microseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub requests: u64,
    pub errors: u64,
    /// Of the errors, those of opening a connection.
    #[serde(default)]
    pub connect_errors: u64,
    pub seconds: f64,
    pub p50_us: u64,
    pub p99_us: u64,
    pub first_error: Option<String>,
}

impl Report {
    pub fn per_second(&self) -> f64 {
        if self.seconds > 0.0 { self.requests as f64 / self.seconds } else { 0.0 }
    }
}

/// Runs the load and waits for it.
pub fn run(load: &Load) -> Report {
    let stop = Arc::new(AtomicBool::new(false));
    let started = Instant::now();
    let workers: Vec<_> = (0..load.connections)
        .filter_map(|_| {
            let (load, stop) = (load.clone(), stop.clone());
            thread::Builder::new().stack_size(256 * 1024).spawn(move || worker(&load, &stop)).ok()
        })
        .collect();
    thread::sleep(Duration::from_secs_f64(load.seconds));
    stop.store(true, Ordering::Relaxed);
    let mut report = Report::default();
    let mut latencies = Vec::new();
    for worker in workers {
        let Ok(mut seen) = worker.join() else { continue };
        latencies.append(&mut seen.latencies);
        report.errors += seen.connect_errors + seen.request_errors;
        report.connect_errors += seen.connect_errors;
        report.first_error = report.first_error.or(seen.first_error);
    }
    report.seconds = started.elapsed().as_secs_f64();
    report.requests = latencies.len() as u64;
    latencies.sort_unstable();
    let at = |percent: usize| latencies.get(latencies.len() * percent / 100).copied();
    report.p50_us = at(50).unwrap_or(0).into();
    report.p99_us = at(99).unwrap_or(0).into();
    report
}

#[derive(Debug, Default)]
struct Seen {
    latencies: Vec<u32>,
    connect_errors: u64,
    request_errors: u64,
    first_error: Option<String>,
}

fn worker(load: &Load, stop: &AtomicBool) -> Seen {
    let mut seen = Seen::default();
    let mut kept: Option<TcpStream> = None;
    while !stop.load(Ordering::Relaxed) {
        let started = Instant::now();
        let stream = kept.take().map_or_else(|| dial(&load.target, 80, Duration::from_secs(5)), Ok);
        let (errors, outcome) = match stream {
            Ok(stream) => (&mut seen.request_errors, request(load, stream)),
            Err(error) => (&mut seen.connect_errors, Err(error)),
        };
        match outcome {
            Ok(stream) => {
                seen.latencies.push(u32::try_from(started.elapsed().as_micros()).unwrap_or(u32::MAX));
                kept = stream.filter(|_| !load.new_connections);
            }
            Err(error) => {
                *errors += 1;
                seen.first_error.get_or_insert_with(|| error.to_string());
                // A refused target would otherwise be hammered.
                thread::sleep(Duration::from_millis(5));
            }
        }
    }
    seen
}

/// The connection, unless the server wants it closed.
fn request(load: &Load, stream: TcpStream) -> io::Result<Option<TcpStream>> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    // One write, one segment.
    let request = format!("GET {} HTTP/1.1\r\nhost: {}\r\n\r\n", load.path, load.target);
    (&stream).write_all(request.as_bytes())?;
    let answer = read_answer(&mut BufReader::new(&stream))?;
    match answer.status {
        200 => Ok((!answer.closes).then_some(stream)),
        status => Err(io::Error::other(format!("status {status}"))),
    }
}
