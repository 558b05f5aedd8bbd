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
        let Ok((mut seen, errors, first)) = worker.join() else { continue };
        latencies.append(&mut seen);
        report.errors += errors;
        report.first_error = report.first_error.or(first);
    }
    report.seconds = started.elapsed().as_secs_f64();
    report.requests = latencies.len() as u64;
    latencies.sort_unstable();
    let at = |percent: usize| latencies.get(latencies.len() * percent / 100).copied();
    report.p50_us = at(50).unwrap_or(0).into();
    report.p99_us = at(99).unwrap_or(0).into();
    report
}

fn worker(load: &Load, stop: &AtomicBool) -> (Vec<u32>, u64, Option<String>) {
    let (mut latencies, mut errors, mut first) = (Vec::new(), 0, None);
    let mut kept: Option<TcpStream> = None;
    while !stop.load(Ordering::Relaxed) {
        let started = Instant::now();
        match request(load, kept.take()) {
            Ok(stream) => {
                latencies.push(u32::try_from(started.elapsed().as_micros()).unwrap_or(u32::MAX));
                kept = (!load.new_connections).then_some(stream);
            }
            Err(error) => {
                errors += 1;
                first.get_or_insert_with(|| error.to_string());
                // A refused target would otherwise be hammered.
                thread::sleep(Duration::from_millis(5));
            }
        }
    }
    (latencies, errors, first)
}

fn request(load: &Load, kept: Option<TcpStream>) -> io::Result<TcpStream> {
    let stream = match kept {
        Some(stream) => stream,
        None => dial(&load.target, 80, Duration::from_secs(5))?,
    };
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    // One write, one segment.
    let request = format!("GET {} HTTP/1.1\r\nhost: {}\r\n\r\n", load.path, load.target);
    (&stream).write_all(request.as_bytes())?;
    let answer = read_answer(&mut BufReader::new(&stream))?;
    if answer.status == 200 { Ok(stream) } else { Err(io::Error::other(format!("status {}", answer.status))) }
}
