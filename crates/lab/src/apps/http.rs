//! A small HTTP/1.1 server and client over plain `std` sockets: enough for requests whose bytes one wants to find on a wire.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use nix::sys::signal::{SigSet, Signal};

/// Largest head or body either side accepts.
const LIMIT: u64 = 64 * 1024;

/// Answers every request with the server's name, the peer it saw and the request's path, until the process ends; `/bytes/N` with N
/// bytes instead. Told to terminate, it goes on for `drain`, asking every client to take its next request elsewhere, and exits: a
/// server that finishes its work before it goes.
///
/// # Errors
/// When the port cannot be bound.
pub fn serve(listen: SocketAddr, name: &str, drain: Duration) -> io::Result<()> {
    let leaving = leave_when_told(drain)?;
    let listener = TcpListener::bind(listen)?;
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        let (name, leaving) = (name.to_owned(), leaving.clone());
        // One thread per connection: a test server for tens of connections; the load generator has its own.
        thread::spawn(move || drop(answer(&stream, &name, &leaving)));
    }
    Ok(())
}

/// Set from the moment SIGTERM arrives; the process exits `drain` later. Without it, process 1 of a container would not notice the
/// signal at all.
fn leave_when_told(drain: Duration) -> io::Result<Arc<AtomicBool>> {
    let mut told = SigSet::empty();
    told.add(Signal::SIGTERM);
    // Inherited by every thread, so that only the one below gets it.
    told.thread_block()?;
    let leaving = Arc::new(AtomicBool::new(false));
    let flag = leaving.clone();
    thread::spawn(move || {
        let signal = told.wait();
        flag.store(true, Ordering::Relaxed);
        thread::sleep(if signal.is_ok() { drain } else { Duration::ZERO });
        std::process::exit(0)
    });
    Ok(leaving)
}

fn answer(stream: &TcpStream, name: &str, leaving: &AtomicBool) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let peer = stream.peer_addr()?.ip().to_canonical();
    let mut reader = BufReader::new(stream);
    while let Some(request) = read_head(&mut reader)? {
        let path = request.lines().next().and_then(|l| l.split(' ').nth(1)).unwrap_or("/").to_owned();
        let body = sized_body(&path).unwrap_or_else(|| format!("{name} saw {peer} ask for {path}\n"));
        let length = body.len();
        let closes = leaving.load(Ordering::Relaxed);
        let connection = if closes { "connection: close\r\n" } else { "" };
        let answer = format!(
            "HTTP/1.1 200 OK\r\ncontent-length: {length}\r\ncontent-type: text/plain\r\n{connection}\r\n{body}"
        );
        (&mut &*stream).write_all(answer.as_bytes())?;
        if closes {
            break;
        }
    }
    Ok(())
}

/// Of `/bytes/N`, up to what a client accepts.
fn sized_body(path: &str) -> Option<String> {
    let length: u64 = path.strip_prefix("/bytes/")?.parse().ok()?;
    Some("x".repeat(usize::try_from(length.min(LIMIT)).ok()?))
}

/// One answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    pub body: String,
    /// The server ends the connection after it.
    pub closes: bool,
}

/// `GET http://host[:port]/path` on a connection of its own.
///
/// # Errors
/// Whatever the sockets say; a malformed URL or answer is `InvalidInput` or `InvalidData`.
pub fn get(url: &str, timeout: Duration) -> io::Result<Answer> {
    let rest = url.strip_prefix("http://").ok_or_else(|| invalid("the URL must start with http://"))?;
    let (authority, path) = rest.split_once('/').map_or_else(|| (rest, "/".to_owned()), |(a, p)| (a, format!("/{p}")));
    let stream = dial(authority, 80, timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: {authority}\r\nconnection: close\r\n\r\n");
    (&stream).write_all(request.as_bytes())?;
    read_answer(&mut BufReader::new(&stream))
}

/// Connects to `host[:port]`, trying each address the name has.
///
/// # Errors
/// The last address's error.
pub fn dial(authority: &str, default_port: u16, timeout: Duration) -> io::Result<TcpStream> {
    let with_port = if authority.parse::<SocketAddr>().is_ok()
        || authority.rsplit_once(':').is_some_and(|(h, p)| !h.contains(':') && p.parse::<u16>().is_ok())
    {
        authority.to_owned()
    } else {
        format!("{authority}:{default_port}")
    };
    let mut last = invalid("the name has no address");
    for address in with_port.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, timeout) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Reads one answer with a `content-length` or up to the end of the stream.
///
/// # Errors
/// An early end or a malformed head.
pub fn read_answer(reader: &mut impl BufRead) -> io::Result<Answer> {
    let head = read_head(reader)?.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).ok_or_else(|| malformed("no status"))?;
    let header = |wanted: &str| {
        let fields = head.lines().filter_map(|l| l.split_once(':'));
        fields.filter(|(name, _)| name.eq_ignore_ascii_case(wanted)).map(|(_, value)| value.trim()).next()
    };
    let length = header("content-length").and_then(|value| value.parse::<u64>().ok());
    let closes = length.is_none() || header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
    let mut body = Vec::new();
    reader.take(length.unwrap_or(LIMIT).min(LIMIT)).read_to_end(&mut body)?;
    if length.is_some_and(|l| body.len() as u64 != l) {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Answer { status, body: String::from_utf8_lossy(&body).into_owned(), closes })
}

/// A head up to its empty line; `None` at a clean end of stream.
fn read_head(reader: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut head = Vec::new();
    loop {
        let n = reader.by_ref().take(LIMIT - head.len() as u64).read_until(b'\n', &mut head)?;
        if n == 0 {
            return if head.is_empty() { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
        }
        if head.ends_with(b"\r\n\r\n") || head.ends_with(b"\n\n") {
            return Ok(Some(String::from_utf8_lossy(&head).into_owned()));
        }
    }
}

fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

fn malformed(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_answered_with_peer_and_path() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        for leaving in [false, true] {
            let listener = listener.try_clone().unwrap();
            let serve = move || answer(&listener.accept().unwrap().0, "server", &AtomicBool::new(leaving));
            let server = thread::spawn(serve);
            let answer = get(&format!("http://{address}/nonce-1"), Duration::from_secs(5)).unwrap();
            let body = "server saw 127.0.0.1 ask for /nonce-1\n".to_owned();
            assert_eq!(answer, Answer { status: 200, body, closes: leaving });
            server.join().unwrap().unwrap();
        }
    }

    #[test]
    fn a_body_of_any_length_up_to_the_limit_can_be_asked_for() {
        assert_eq!(sized_body("/bytes/64").map(|b| b.len()), Some(64));
        assert_eq!(sized_body("/bytes/99999999").map(|b| b.len() as u64), Some(LIMIT));
        assert_eq!((sized_body("/bytes/x"), sized_body("/other")), (None, None));
    }

    #[test]
    fn malformed_answers_are_errors() {
        for bad in ["", "HTTP/1.1", "HTTP/1.1 abc\r\n\r\n", "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nab"] {
            assert!(read_answer(&mut bad.as_bytes()).is_err(), "{bad:?}");
        }
    }
}
