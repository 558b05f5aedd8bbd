//! The whole control plane in this process, over real sockets and TLS, as a node proxy sees it.

mod folder;
mod kubernetes;
mod support;
