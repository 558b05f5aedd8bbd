//! The little programs that pods of the lab run: a server, a steady client, a load generator. Ordinary sockets, no mesh knowledge.

pub mod hold;
pub mod http;
pub mod load;
pub mod steady;
pub mod stream;
