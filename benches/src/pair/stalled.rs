//! Readers that stall, and others who share their tunnel.

use std::{
    io::Write as _,
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::Args;
use lab::apps::http;
use serde::{Deserialize, Serialize};

/// What each of the stalled asks for and does not read: more than any window and buffer holds.
const BYTES: u64 = 1 << 30;
/// Until everything that can fill up is full.
const FILL: Duration = Duration::from_millis(1500);
const PATIENCE: Duration = Duration::from_secs(2);

#[derive(Clone, Debug, Args)]
pub struct Options {
    /// A server of streams (`fairway app stream`).
    #[arg(long)]
    bulk: String,
    /// What the others ask.
    #[arg(long)]
    url: String,
    #[arg(long, default_value_t = 40)]
    stalled: usize,
    #[arg(long, default_value_t = 10)]
    pings: usize,
}

/// How it went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    pub stalled: usize,
    pub asked: usize,
    pub answered: usize,
    /// Until the last of them knew.
    pub milliseconds: u64,
}

/// Opens what shall stall, waits until nothing moves, and asks. All at once, each within two seconds.
///
/// # Errors
/// When those that shall stall cannot be opened.
pub fn run(options: &Options) -> anyhow::Result<Outcome> {
    let stall = || {
        let mut stream = TcpStream::connect(&options.bulk)?;
        writeln!(stream, "bulk {BYTES}")?;
        std::io::Result::Ok(stream)
    };
    let stalled: Vec<TcpStream> =
        (0..options.stalled).map(|_| stall()).collect::<Result<_, _>>().context("cannot open what shall stall")?;
    thread::sleep(FILL);
    let began = Instant::now();
    let answered = thread::scope(|scope| {
        let asking: Vec<_> = (0..options.pings).map(|_| scope.spawn(|| http::get(&options.url, PATIENCE))).collect();
        let answers = asking.into_iter().map(|asked| asked.join().is_ok_and(|answer| answer.is_ok()));
        answers.filter(|answered| *answered).count()
    });
    let milliseconds = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    Ok(Outcome { stalled: stalled.len(), asked: options.pings, answered, milliseconds })
}
