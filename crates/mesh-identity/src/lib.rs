//! Workload identity: keys and requests for certificates, the manager that keeps one certificate per identity fresh, verifiers that
//! compare SPIFFE identities, and the TLS configurations made of it all.
//!
//! Keys are made here and leave the process only for a folder of its owner's choice ([`store`]). Deliberately absent: HTTP/2 tunnels,
//! discovery, who may ask for which identity (that is the certificate authority's decision; [`authority`] only signs).

#![forbid(unsafe_code)]

pub mod authority;
pub mod ca;
pub mod crl;
pub mod csr;
mod grpc;
mod manager;
mod schedule;
pub mod store;
pub mod svid;
pub mod tls;
mod trust;
pub mod verify;

pub use ca::{CaClient, CaError};
pub use grpc::{ControlPlane, ControlPlaneError, GrpcCa, GrpcCaConfig, RootSource, TokenSource};
pub use manager::{Config, Entry, EntryState, FetchError, IdentityError, Manager, Priority};
pub use store::KeyStore;
pub use svid::{Svid, SvidError};
pub use tls::{Compliance, ControlTls, client_config, peer_name, server_config};
pub use trust::Trust;
pub use verify::{Anchors, Distrust, PeerRole, distrust, is_revocation, peer_identity};
