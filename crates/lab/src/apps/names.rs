//! A nameserver that knows one answer, and a client that asks it once: by the answer a test sees who gave it.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use hickory_proto::{
    op::{Message, MessageType, OpCode, Query, ResponseCode},
    rr::{Name, RData, Record, RecordType},
};

/// What every name has for address here (RFC 5737): no pod and no service has it.
pub const ANSWER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 53);

/// Answers every query with [`ANSWER`], over UDP and TCP, for ever.
///
/// # Errors
/// When it cannot listen or receive.
pub fn serve(listen: SocketAddr) -> io::Result<()> {
    let (socket, listener) = (UdpSocket::bind(listen)?, TcpListener::bind(listen)?);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // One client at a time, each for as long as it asks.
            while receive(&stream).and_then(|query| send(&stream, &answer(&query)?)).is_ok() {}
        }
    });
    let mut buffer = [0; 65_535];
    loop {
        let (length, peer) = socket.recv_from(&mut buffer)?;
        if let Ok(answer) = answer(&buffer[..length]) {
            // A client that left waits for nothing.
            drop(socket.send_to(&answer, peer));
        }
    }
}

fn answer(query: &[u8]) -> io::Result<Vec<u8>> {
    let query = Message::from_vec(query).map_err(io::Error::other)?;
    let mut answer = Message::new(query.metadata.id, MessageType::Response, OpCode::Query);
    for question in &query.queries {
        answer.add_answer(Record::from_rdata(question.name().clone(), 0, RData::from(IpAddr::from(ANSWER))));
    }
    answer.add_queries(query.queries);
    answer.to_vec().map_err(io::Error::other)
}

/// The IPv4 addresses that `server` has for `name`.
///
/// # Errors
/// When the name is none, the server does not answer within `limit`, or answers with an error.
pub fn ask(server: SocketAddr, name: &str, tcp: bool, limit: Duration) -> io::Result<Vec<IpAddr>> {
    let mut query = Message::new(rand::random(), MessageType::Query, OpCode::Query);
    let mut name = Name::from_ascii(name).map_err(io::Error::other)?;
    name.set_fqdn(true);
    query.metadata.recursion_desired = true;
    query.add_query(Query::query(name, RecordType::A));
    let bytes = query.to_vec().map_err(io::Error::other)?;
    let answer = if tcp { over_tcp(server, &bytes, limit)? } else { over_udp(server, &bytes, limit)? };
    let answer = Message::from_vec(&answer).map_err(io::Error::other)?;
    if answer.metadata.id != query.metadata.id || answer.metadata.response_code != ResponseCode::NoError {
        return Err(io::Error::other(format!("answered {}", answer.metadata.response_code)));
    }
    Ok(answer.answers.iter().filter_map(|record| record.data.ip_addr()).collect())
}

fn over_udp(server: SocketAddr, query: &[u8], limit: Duration) -> io::Result<Vec<u8>> {
    let any = if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any)?;
    socket.set_read_timeout(Some(limit))?;
    // Connected: an answer from any other address is none.
    socket.connect(server)?;
    socket.send(query)?;
    let mut buffer = [0; 65_535];
    let length = socket.recv(&mut buffer)?;
    Ok(buffer[..length].to_vec())
}

fn over_tcp(server: SocketAddr, query: &[u8], limit: Duration) -> io::Result<Vec<u8>> {
    let stream = TcpStream::connect_timeout(&server, limit)?;
    stream.set_read_timeout(Some(limit))?;
    send(&stream, query)?;
    receive(&stream)
}

fn send(mut stream: &TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes(), message].concat())
}

fn receive(mut stream: &TcpStream) -> io::Result<Vec<u8>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut message)?;
    Ok(message)
}
