//! One target per parser of bytes that another process, another machine or a person wrote. None may panic; where there is an
//! encoder, what it writes must be read back as it was.
//!
//! | module | whose bytes |
//! |---|---|
//! | `peers` | other proxies: certificates, HTTP/2, CONNECT targets and headers; frames of the wire |
//! | `control` | the control plane towards its clients, and its clients towards it |
//! | `discovery` | the control plane's clients, in their requests for discovery |
//! | `node` | container runtime, plugin, agent, ztunnel and applications of one node |
//! | `people` | manifests, environment variables, URLs |
//! | `tunnel` | the far end of a tunnel: TLS records, HTTP/2, header blocks; a predecessor that hands one over |

mod control;
mod discovery;
mod node;
mod peers;
mod people;
mod tunnel;

/// The text that a parser of text is given for any bytes.
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
