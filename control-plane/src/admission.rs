//! What the API server asks before it takes an object of the mesh: whether it will mean what it says.
//!
//! The answer is that of the one way in which objects are read; nothing is decided here that the pipeline would not decide again, so a
//! cluster without the webhook differs in when a mistake is told, not in what it does. Whatever is not ours to judge, or cannot be judged,
//! is allowed.

mod judgement;
mod message;
mod server;

pub(crate) use server::serve;
