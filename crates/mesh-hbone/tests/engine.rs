//! The tunnel engine from outside, without sockets or clock.
//!
//! | module | |
//! |---|---|
//! | `transcript` | saved and restored anywhere, a tunnel says and hears the same |
//! | `golden` | snapshots of each released format are read and written alike; mangled ones do no harm |
//! | `rules` | HTTP/2, frame by frame |

#[path = "engine/certificates.rs"]
mod certificates;
#[path = "engine/exercise.rs"]
mod exercise;
#[path = "engine/golden.rs"]
mod golden;
#[path = "engine/peer.rs"]
mod peer;
#[path = "engine/rules.rs"]
mod rules;
#[path = "engine/script.rs"]
mod script;
#[path = "engine/transcript.rs"]
mod transcript;
