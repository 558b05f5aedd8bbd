//! HBONE: one TCP connection per HTTP/2 CONNECT stream (RFC 9113 §8.5) inside mutual TLS. The client side with its pool, the server
//! side, and the relay between a socket and a tunnel.
//!
//! Everything here is owned by one worker (`Rc`, not `Send`) and spawned with `spawn_local`. TLS is the caller's: it comes in as a
//! finished stream. Who may connect to whom is decided elsewhere. The HTTP/2 library stays behind this interface.
//!
//! Reading order: [`connect`] what is asked for, [`pool`] which tunnel carries it, [`client`] and [`server`] the two ends,
//! [`TunnelStream`] the bytes, [`relay()`] where they go, [`snapshot`] what can be said about it all.

#![forbid(unsafe_code)]

mod chunk;
pub mod client;
mod config;
pub mod connect;
mod error;
mod keepalive;
pub mod pool;
mod relay;
pub mod server;
pub mod snapshot;
mod stream;

pub use config::{KeepAlive, Settings};
pub use connect::{ConnectRequest, ConnectResponse};
pub use error::Error;
pub use pool::{BoxedTlsStream, Connector, Pool, PoolConfig, TunnelKey};
pub use relay::{relay, relay_within};
pub use stream::{ResetReason, TunnelStream};

use std::{future::Future, pin::Pin};

/// A future that stays on its worker.
pub type LocalBoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;
