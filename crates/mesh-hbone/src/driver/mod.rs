//! A tunnel in its worker: one task moves bytes between the socket and the engine; streams reach the engine through a shared [`Link`].
//!
//! Why no wake-up is lost: whoever changes what another waits for wakes it in the same borrow of [`Core`], and whoever waits leaves its
//! waker there before it returns. The driver's waker is taken by the first who wakes it, so a turn of the worker costs one flush
//! however many streams have something to say.

mod deliver;
mod link;
mod task;

pub(crate) use self::{
    deliver::{Drained, Plug},
    link::{Fill, Link, PeerReset},
    task::{Driver, Incoming},
};
