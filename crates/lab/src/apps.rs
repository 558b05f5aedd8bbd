//! The little programs that pods of the lab run: servers, a steady client, a load generator. Ordinary sockets, no mesh knowledge.

pub mod hold;
pub mod http;
pub mod load;
pub mod names;
pub mod relay;
pub mod steady;
pub mod stream;
