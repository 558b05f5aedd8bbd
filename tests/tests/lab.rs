//! The mesh as its users meet it: real programs, real namespaces, real nf_tables, on virtual nodes. One lab per test.
//!
//! | module | what |
//! |---|---|
//! | `demo` | the guided run, with and without namespaces |
//! | `traffic` | what TCP can do, through the mesh: half-closes, resets, volume, many at once, both families |
//! | `bad_days` | programs killed, restarted, upgraded; pods deleted; labels changed under load |
//! | `watch` | what an operator sees of it |
//! | `why` | seeded faults, named by `fairway why` and met by a connection |
//! | `names` | who answers a pod's DNS |
//! | `waypoint` | traffic to what is bound to a waypoint |
//! | `traces` | nothing is left behind |

#[path = "lab/harness.rs"]
mod harness;

#[path = "lab/bad_days.rs"]
mod bad_days;
#[path = "lab/demo.rs"]
mod demo;
#[path = "lab/names.rs"]
mod names;
#[path = "lab/traces.rs"]
mod traces;
#[path = "lab/traffic.rs"]
mod traffic;
#[path = "lab/watch.rs"]
mod watch;
#[path = "lab/waypoint.rs"]
mod waypoint;
#[path = "lab/why.rs"]
mod why;
