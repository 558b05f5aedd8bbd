//! Sockets, namespaces, netlink, byte copy: what the programs ask of the Linux kernel, and the one home of `unsafe`.
//!
//! Modules in the order a node comes to life: [`isolate`] puts a program into namespaces of its own, [`netns`] and [`link`]
//! build networks, [`nft`] captures traffic, [`conntrack`] says where it was meant to go, [`unix`] passes namespaces between processes, [`sockets`] opens what carries the
//! traffic, [`mod@copy`] moves its bytes, [`limits`] bounds how many, and [`capture`] looks at it on the wire.

pub mod isolate;
pub mod netns;

mod netlink;

pub mod conntrack;
pub mod link;
pub mod nft;

pub mod sockets;
pub mod unix;

pub mod copy;

pub mod limits;

pub mod capture;

mod sys;

pub use copy::{BufferPool, CopyOutcome, End, Progress, Side, copy_bidirectional};
pub use netlink::NetlinkError;
pub use netns::{NetNs, NetNsId};
pub use sockets::{KeepAlive, SocketOptions, Transparent};
pub use unix::{PeerCred, SeqListener, SeqStream};
