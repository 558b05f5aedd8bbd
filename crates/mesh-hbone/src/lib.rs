//! HBONE: one TCP connection per HTTP/2 CONNECT stream (RFC 9113 §8.5) inside mutual TLS. The client side with its pool, the server
//! side, and the relay between a socket and a tunnel.
//!
//! Everything here is owned by one worker (`Rc`, not `Send`) and spawned with `spawn_local`. TLS configurations are the caller's, who
//! thereby decides who may connect to whom. HTTP/2 and the TLS record layer are our own: [`engine`] is their state, and only the driver
//! knows sockets.
//!
//! Reading order: [`tls`] who is there, [`connect`] what is asked for, [`pool`] which tunnel carries it, [`client`] and [`server`] the
//! two ends, [`TunnelStream`] the bytes, [`relay()`] where they go, [`snapshot`] what can be said about it all; then [`engine`].

#![forbid(unsafe_code)]

pub mod client;
mod config;
pub mod connect;
mod cut;
mod driver;
pub mod engine;
mod error;
pub mod pool;
mod relay;
pub mod server;
pub mod snapshot;
mod stream;
pub mod tls;

pub use config::{ELEPHANT, KeepAlive, Settings};
pub use connect::{ConnectRequest, ConnectResponse};
pub use cut::Cut;
pub use engine::{
    flow::{Budget, Process},
    limits::Abuse,
};
pub use error::Error;
pub use pool::{Connector, Pool, PoolConfig, TunnelKey};
pub use relay::{Relay, relay, relay_within};
pub use stream::{ResetReason, TunnelStream};
pub use tls::Secured;

use std::{future::Future, pin::Pin};

/// A future that stays on its worker.
pub type LocalBoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;
