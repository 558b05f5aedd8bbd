//! Thousands of connections that do nothing: what idleness costs whoever is between the two ends.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, lookup_host},
    runtime::Builder,
    sync::Semaphore,
    task::JoinSet,
    time::{sleep, timeout},
};

/// Connections being opened at once: below any listener's backlog.
const OPENING: usize = 64;
const PATIENCE: Duration = Duration::from_secs(10);

/// What a client held.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    pub open: usize,
    pub first_error: Option<String>,
}

/// Greets every connection with one byte and keeps it until the client ends it.
///
/// # Errors
/// When the port cannot be bound.
pub fn serve(listen: SocketAddr) -> io::Result<()> {
    runtime()?.block_on(async { greet_all(TcpListener::bind(listen).await?).await })
}

async fn greet_all(listener: TcpListener) -> io::Result<()> {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            // Out of descriptors, for instance: those that are open stay.
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => drop(connections.spawn(greet_and_wait(stream))),
                Err(_) => sleep(Duration::from_millis(100)).await,
            },
        }
    }
}

async fn greet_and_wait(mut stream: TcpStream) -> io::Result<()> {
    stream.write_all(b"!").await?;
    while stream.read(&mut [0; 64]).await? > 0 {}
    Ok(())
}

/// Opens `connections` connections, waits for the greeting of each, tells `opened`, and holds them for `length` more.
///
/// # Errors
/// When the name cannot be resolved. Connections that fail are counted out, the first reason kept.
pub fn hold(target: &str, connections: usize, length: Duration, opened: impl FnOnce(&Held)) -> io::Result<()> {
    runtime()?.block_on(async {
        let address = lookup_host(target).await?.next().ok_or(io::ErrorKind::NotFound)?;
        let (_streams, held) = open_all(address, connections).await;
        opened(&held);
        sleep(length).await;
        Ok(())
    })
}

async fn open_all(address: SocketAddr, connections: usize) -> (Vec<TcpStream>, Held) {
    let permits = Arc::new(Semaphore::new(OPENING));
    let mut opening = JoinSet::new();
    for _ in 0..connections {
        let permits = permits.clone();
        opening.spawn(async move {
            let _permit = permits.acquire().await;
            timeout(PATIENCE, open(address)).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        });
    }
    let (mut streams, mut held) = (Vec::new(), Held::default());
    while let Some(outcome) = opening.join_next().await {
        match outcome.map_err(io::Error::other).flatten() {
            Ok(stream) => streams.push(stream),
            Err(error) => drop(held.first_error.get_or_insert_with(|| error.to_string())),
        }
    }
    held.open = streams.len();
    (streams, held)
}

async fn open(address: SocketAddr) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(address).await?;
    stream.read_exact(&mut [0]).await?;
    Ok(stream)
}

fn runtime() -> io::Result<tokio::runtime::Runtime> {
    Builder::new_current_thread().enable_all().build()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn connections_are_open_once_greeted_and_failures_are_counted_out() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(greet_all(listener));
        let (streams, held) = open_all(address, 200).await;
        assert_eq!((streams.len(), held), (200, Held { open: 200, first_error: None }));
        server.abort();
        assert!(server.await.is_err());
        let (_, held) = open_all(address, 2).await;
        assert_eq!((held.open, held.first_error.is_some()), (0, true));
    }
}
