//! Our tunnels with other people's programs at the far end, over loopback: Envoy in both roles, and h2spec, which asks what nobody
//! asks. What was found is in docs/compatibility.md. The programs are not ours to carry: `.ci/run` fetches them into
//! `target/interop/`, and where one is missing its tests are skipped with one line.
//!
//! | module | what |
//! |---|---|
//! | `envoy_server` | our pool dials, Envoy terminates the CONNECTs |
//! | `envoy_client` | Envoy dials, our server terminates them |
//! | `h2spec` | our server, section by section |
//! | `programs` | finds the programs, runs Envoy, asks its admin port |
//! | `identities`, `ours`, `apps` | certificates, our two ends, what applications do |

#[path = "interop/apps.rs"]
mod apps;
#[path = "interop/identities.rs"]
mod identities;
#[path = "interop/ours.rs"]
mod ours;
#[path = "interop/programs.rs"]
mod programs;

#[path = "interop/envoy_client.rs"]
mod envoy_client;
#[path = "interop/envoy_server.rs"]
mod envoy_server;
#[path = "interop/h2spec.rs"]
mod h2spec;
