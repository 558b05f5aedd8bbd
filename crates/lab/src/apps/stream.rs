//! Checksummed streams: what arrived is what was sent, however long it took. Also the awkward shapes of TCP: half-closes, resets,
//! servers that speak first, readers that stall.
//!
//! The server speaks a one-line protocol: the client's first line names a mode.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use super::http::dial;

const CHUNK: usize = 64 * 1024;
/// How the last watched connection ended.
static LAST_END: Mutex<&str> = Mutex::new("nothing yet");

/// A repeatable byte sequence and its running checksum (FNV-1a, 64 bits).
#[derive(Clone, Debug)]
pub struct Pattern {
    state: u64,
}

impl Pattern {
    pub fn new(seed: u64) -> Self {
        Self { state: seed | 1 }
    }

    /// Fills `chunk` with the next bytes (xorshift64, eight at a time).
    pub fn fill(&mut self, chunk: &mut [u8]) {
        for word in chunk.chunks_mut(8) {
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
            word.copy_from_slice(&self.state.to_le_bytes()[..word.len()]);
        }
    }
}

/// Checks a stream against the [`Pattern`] of its seed.
struct Check {
    pattern: Pattern,
    expected: Vec<u8>,
    position: usize,
    bytes: u64,
}

impl Check {
    fn new(seed: u64) -> Self {
        Self { pattern: Pattern::new(seed), expected: vec![0; CHUNK], position: CHUNK, bytes: 0 }
    }

    fn take(&mut self, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            if self.position == CHUNK {
                self.pattern.fill(&mut self.expected);
                self.position = 0;
            }
            let n = data.len().min(CHUNK - self.position);
            if data[..n] != self.expected[self.position..self.position + n] {
                return Err(io::Error::new(io::ErrorKind::InvalidData, format!("corrupt near byte {}", self.bytes)));
            }
            self.position += n;
            self.bytes += n as u64;
            data = &data[n..];
        }
        Ok(())
    }
}

/// What a client did and saw.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    pub bytes: u64,
    pub seconds: f64,
    /// `None` when everything arrived intact and ended as it should.
    pub error: Option<String>,
}

/// Serves every mode until the process ends.
///
/// # Errors
/// When the port cannot be bound.
pub fn serve(listen: SocketAddr) -> io::Result<()> {
    for stream in TcpListener::bind(listen)?.incoming() {
        let Ok(stream) = stream else { continue };
        thread::spawn(move || drop(serve_one(&stream)));
    }
    Ok(())
}

fn serve_one(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::with_capacity(CHUNK, stream);
    let mut line = String::new();
    reader.by_ref().take(256).read_line(&mut line)?;
    let words: Vec<&str> = line.split_whitespace().collect();
    match words[..] {
        // download <seed> <bytes>: the server sends, then closes.
        ["download", seed, bytes] => send(stream, parse(seed)?, parse(bytes)?),
        // bulk <bytes>: the same unchecked, so that the network and not the checking is measured.
        ["bulk", bytes] => send_zeros(stream, parse(bytes)?),
        // upload <seed> <bytes>: the client sends and half-closes; the server answers with the count, or says what was wrong.
        ["upload", seed, bytes] => {
            let verdict = match receive(&mut reader, parse(seed)?) {
                Ok(got) if got == parse(bytes)? => format!("ok {got}\n"),
                Ok(got) => format!("short {got}\n"),
                Err(error) => format!("bad {error}\n"),
            };
            (&mut &*stream).write_all(verdict.as_bytes())
        }
        // watch: the server reads to the end and remembers how it came; "ended" asks for that.
        ["watch"] => {
            stream.set_read_timeout(Some(Duration::from_secs(60)))?;
            let ended = match io::copy(&mut reader, &mut io::sink()) {
                Ok(_) => "clean",
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => "reset",
                Err(_) => "other",
            };
            *LAST_END.lock().unwrap_or_else(PoisonError::into_inner) = ended;
            Ok(())
        }
        ["ended"] => {
            let ended = *LAST_END.lock().unwrap_or_else(PoisonError::into_inner);
            (&mut &*stream).write_all(ended.as_bytes())
        }
        // closefirst: the server half-closes at once and then reads to the end.
        ["closefirst"] => {
            stream.shutdown(Shutdown::Write)?;
            io::copy(&mut reader, &mut io::sink()).map(drop)
        }
        // reset: the server drops the connection with a RST (unread data with a zero linger).
        ["reset"] => reset(stream),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

fn parse(text: &str) -> io::Result<u64> {
    text.parse().map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn send(mut stream: &TcpStream, seed: u64, bytes: u64) -> io::Result<()> {
    let (mut pattern, mut chunk, mut left) = (Pattern::new(seed), vec![0; CHUNK], bytes);
    while left > 0 {
        pattern.fill(&mut chunk);
        let n = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        stream.write_all(&chunk[..n])?;
        left -= n as u64;
    }
    Ok(())
}

fn send_zeros(mut stream: &TcpStream, bytes: u64) -> io::Result<()> {
    let (chunk, mut left) = (vec![0; CHUNK], bytes);
    while left > 0 {
        let n = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        stream.write_all(&chunk[..n])?;
        left -= n as u64;
    }
    Ok(())
}

fn receive(reader: &mut impl Read, seed: u64) -> io::Result<u64> {
    let (mut check, mut chunk) = (Check::new(seed), vec![0; CHUNK]);
    loop {
        match reader.read(&mut chunk)? {
            0 => return Ok(check.bytes),
            n => check.take(&chunk[..n])?,
        }
    }
}

/// Closes with a RST: zero linger discards what is unsent and tells the peer so.
fn reset(stream: &TcpStream) -> io::Result<()> {
    socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO))
}

/// Downloads and checks `bytes` bytes.
pub fn download(target: &str, bytes: u64) -> Outcome {
    measured(bytes, || {
        let stream = dial(target, 80, Duration::from_secs(10))?;
        writeln!(&stream, "download 7 {bytes}")?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        receive(&mut &stream, 7)
    })
}

/// Uploads `bytes` bytes, half-closes, and expects the server's count on the still open other half.
pub fn upload(target: &str, bytes: u64) -> Outcome {
    measured(bytes, || {
        let stream = dial(target, 80, Duration::from_secs(10))?;
        writeln!(&stream, "upload 7 {bytes}")?;
        send(&stream, 7, bytes)?;
        stream.shutdown(Shutdown::Write)?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let mut verdict = String::new();
        (&stream).take(256).read_to_string(&mut verdict)?;
        match verdict.strip_prefix("ok ").and_then(|n| n.trim().parse().ok()) {
            Some(n) => Ok(n),
            None => Err(io::Error::new(io::ErrorKind::InvalidData, format!("the server says {verdict:?}"))),
        }
    })
}

/// The server half-closes first; the client must see the end and still be able to send.
pub fn close_first(target: &str, bytes: u64) -> Outcome {
    measured(bytes, || {
        let stream = dial(target, 80, Duration::from_secs(10))?;
        (&stream).write_all(b"closefirst\n")?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        if (&stream).read(&mut [0; 1])? != 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "bytes where an end was expected"));
        }
        send(&stream, 7, bytes)?;
        Ok(bytes)
    })
}

/// The server resets; the client must see a reset and not a clean end.
pub fn expect_reset(target: &str) -> Outcome {
    measured(0, || {
        let stream = dial(target, 80, Duration::from_secs(10))?;
        (&stream).write_all(b"reset\n")?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        match (&stream).read(&mut [0; 1]) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(0),
            Err(error) => Err(error),
            Ok(n) => {
                Err(io::Error::new(io::ErrorKind::InvalidData, format!("read {n} bytes where a reset was expected")))
            }
        }
    })
}

/// The client resets; the server must see a reset and not a clean end.
pub fn send_reset(target: &str) -> Outcome {
    measured(0, || {
        let stream = dial(target, 80, Duration::from_secs(10))?;
        (&stream).write_all(b"watch\nsome bytes")?;
        // The bytes must have arrived, or the reset could overtake the connection itself.
        thread::sleep(Duration::from_millis(200));
        reset(&stream)?;
        drop(stream);
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            match ended(target)?.as_str() {
                "reset" => return Ok(0),
                other if Instant::now() > deadline => return Err(io::Error::other(format!("the server saw {other}"))),
                _ => thread::sleep(Duration::from_millis(20)),
            }
        }
    })
}

fn ended(target: &str) -> io::Result<String> {
    let stream = dial(target, 80, Duration::from_secs(10))?;
    (&stream).write_all(b"ended\n")?;
    let mut text = String::new();
    (&stream).take(64).read_to_string(&mut text)?;
    Ok(text)
}

/// Downloads as slowly as a stuck application: reads nothing for `pause`, then everything, checked.
pub fn slow_download(target: &str, bytes: u64, pause: Duration) -> Outcome {
    measured(bytes, || {
        let stream = dial(target, 80, Duration::from_secs(10))?;
        writeln!(&stream, "download 7 {bytes}")?;
        thread::sleep(pause);
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        receive(&mut &stream, 7)
    })
}

/// A server that speaks first: the client sends nothing until it has been greeted.
///
/// # Errors
/// When the port cannot be bound.
pub fn greet(listen: SocketAddr) -> io::Result<()> {
    for stream in TcpListener::bind(listen)?.incoming() {
        let Ok(mut stream) = stream else { continue };
        thread::spawn(move || stream.write_all(b"hello\n").and_then(|()| io::copy(&mut &stream, &mut io::sink())));
    }
    Ok(())
}

/// Waits for the greeting of [`greet`].
pub fn expect_greeting(target: &str) -> Outcome {
    measured(6, || {
        let stream = dial(target, 80, Duration::from_secs(10))?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        let mut line = String::new();
        BufReader::new(&stream).take(64).read_line(&mut line)?;
        Ok(line.len() as u64)
    })
}

/// Runs `connections` small checked downloads at once.
pub fn many(target: &str, connections: usize, bytes: u64) -> Outcome {
    at_once(target, connections, bytes, download)
}

/// Downloads `bytes` bytes on each of `connections` connections at once, as fast as they come, unchecked.
pub fn bulk(target: &str, connections: usize, bytes: u64) -> Outcome {
    at_once(target, connections, bytes, bulk_one)
}

fn bulk_one(target: &str, bytes: u64) -> Outcome {
    measured(bytes, || {
        let stream = dial(target, 80, Duration::from_secs(10))?;
        writeln!(&stream, "bulk {bytes}")?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let (mut chunk, mut got) = (vec![0; CHUNK], 0);
        loop {
            match (&stream).read(&mut chunk)? {
                0 => return Ok(got),
                n => got += n as u64,
            }
        }
    })
}

fn at_once(target: &str, connections: usize, bytes: u64, one: fn(&str, u64) -> Outcome) -> Outcome {
    measured(bytes * connections as u64, || {
        let threads: Vec<_> = (0..connections)
            .map(|_| {
                let target = target.to_owned();
                thread::Builder::new().stack_size(256 * 1024).spawn(move || one(&target, bytes))
            })
            .collect::<Result<_, _>>()?;
        let mut total = 0;
        for handle in threads {
            let outcome = handle.join().map_err(|_| io::Error::other("a client thread panicked"))?;
            if let Some(error) = outcome.error {
                return Err(io::Error::other(error));
            }
            total += outcome.bytes;
        }
        Ok(total)
    })
}

fn measured(expected: u64, run: impl FnOnce() -> io::Result<u64>) -> Outcome {
    let started = Instant::now();
    let (bytes, error) = match run() {
        Ok(bytes) if bytes == expected => (bytes, None),
        Ok(bytes) => (bytes, Some(format!("{bytes} of {expected} bytes"))),
        Err(error) => (0, Some(error.to_string())),
    };
    Outcome { bytes, seconds: started.elapsed().as_secs_f64(), error }
}
