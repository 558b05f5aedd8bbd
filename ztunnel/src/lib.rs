//! The node proxy: captured pod traffic in and out of mutual-TLS tunnels.
//!
//! In reading order: pods arrive ([`inpod`]), the mesh is known ([`state`], fed by [`discovery`]), each pod's sockets are opened
//! ([`pods`]), a connection is carried ([`proxy`]), names
//! are answered for ([`dns`]) and looked up ([`lookup`]), a flow is described once ([`flow`]), watched while open ([`connections`]) and reported once
//! ([`outcome`]). Data-plane
//! workers own every flow and tunnel; the control runtime does discovery, certificates, the agent's socket and admin, and never
//! touches payload.

#![forbid(unsafe_code)]

pub mod config;

pub mod app;

pub mod inpod;

pub mod discovery;
pub mod local;
pub mod state;
pub mod static_config;

mod crl;

pub mod pods;
pub mod proxy;

pub mod dns;
pub mod lookup;

pub mod flow;

pub mod connections;
mod dense;
mod tunnels;

pub mod outcome;

pub mod metrics;

pub mod admin;

pub mod error;

pub use app::main;
