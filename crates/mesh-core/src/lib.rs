//! The nouns of the mesh and every decision about them, shared by both proxies, the control plane and `fairway why`.
//!
//! Deliberately absent: I/O, clocks, async, protobuf, Kubernetes. Time and randomness are parameters, so every decision here can be
//! replayed. Reading order follows a connection: [`index`] finds the parties, [`select`] picks the next hop, [`balance`] the
//! endpoint, [`authorize`] decides, [`headers`] tells the far side, [`reason`] names what went wrong. Before it, [`names`] answers for
//! the names of the mesh. Beside it: [`mesh_config`], which several programs must read alike, [`spelling`], and
//! [`pool`], where equal values become one.

#![forbid(unsafe_code)]

pub mod addr;
pub mod authorize;
pub mod balance;
pub mod headers;
pub mod identity;
pub mod index;
pub mod mesh_config;
pub mod names;
pub mod origin;
pub mod policy;
pub mod pool;
pub mod reason;
pub mod select;
pub mod service;
pub mod spelling;
pub mod workload;
