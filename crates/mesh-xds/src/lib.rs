//! Delta discovery (the incremental xDS transport): one protocol, its client and its server in one crate, tested against each other.
//!
//! - [`delta`]: both ends' bookkeeping, without I/O: names, versions, nonces, ACK and NACK.
//! - [`on_demand`]: what a client that does not hold everything has asked for, without I/O.
//! - [`client`]: one stream that lives as long as the process, with back-off; yields the model, never wire types.
//! - [`server`]: a shared cache of encoded resources, and a stream per client that sends what changed.
//! - [`convert`]: wire ↔ model, naming the field it could not accept.
//!
//! Deliberately absent: TLS and tokens (the product passes a connected channel and its metadata), and what a resource means.

#![forbid(unsafe_code)]

pub mod backoff;
pub mod client;
pub mod convert;
pub mod delta;
pub mod on_demand;
pub mod server;
