//! What a command line says to a running lab: one JSON line each way over a unix stream socket; descriptors ride along for `exec`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A request. Pods are named `namespace/name`, or `name` in namespace `default`; nodes and programs by their names
/// (`node1`, `ztunnel/node1`, `agent/node1`, `fairwayd`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum Request {
    /// What runs.
    Status,
    /// Apply a manifest file.
    Apply { file: String, text: String },
    /// What the control plane finds wrong with files that were applied, once it has read all of them; one problem a line, nothing for none.
    Problems { files: Vec<String> },
    /// Delete what a pod, or a file applied before, put there.
    Delete { pod: Option<String>, file: Option<String> },
    /// Set (or with `None` remove) a label of a namespace or a pod.
    Label { namespace: String, pod: Option<String>, key: String, value: Option<String> },
    /// Run a command in a pod (`demo/client`), on a node (`node/node1`) or beside the control plane (`control`). Standard
    /// input, output and error come as descriptors with the request.
    Exec { target: String, command: Vec<String>, env: BTreeMap<String, String> },
    /// Run a command likewise and return what it printed.
    Run { target: String, command: Vec<String> },
    /// HTTP GET inside: `target` as for `Exec`, `url` complete.
    Get { target: String, url: String },
    /// Wait until a program reports ready.
    Ready { program: String },
    /// Serve a listening socket of the host, which comes as a descriptor, with a port inside.
    Forward { name: String, target: String, port: u16 },
    /// What the kernel holds at a target: links, nf_tables tables with their rules, policy routing.
    Inventory { target: String },
    /// The last lines a program or a pod's container wrote.
    Logs { name: String, lines: usize },
    /// Disturb something.
    Fault(Fault),
    /// A question about the wire between the nodes.
    Wire(Wire),
    /// End the lab.
    Down,
}

/// Faults one can inject.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "fault", rename_all = "kebab-case")]
pub enum Fault {
    /// Stop a program where it stands (SIGSTOP); `Thaw` lets it go on.
    Freeze {
        program: String,
    },
    Thaw {
        program: String,
    },
    /// SIGKILL; it stays dead until `Start`, or with `restart` is started again at once, as a kubelet would.
    Kill {
        program: String,
        restart: bool,
    },
    Start {
        program: String,
    },
    /// Cut a node off the wire; `Heal` joins it again.
    Partition {
        node: String,
    },
    Heal {
        node: String,
    },
    /// Make everything a node sends over the wire arrive later; 0 ends it.
    Delay {
        node: String,
        milliseconds: u32,
    },
    /// Start a second ztunnel beside the first, wait until it is ready, and end the first gracefully (a rolling update with
    /// surge 1).
    Upgrade {
        node: String,
        binary: Option<String>,
    },
    /// Drop what opens TCP connections to a port of a pod, as a NetworkPolicy would; `Unblock` ends it.
    Block {
        pod: String,
        port: u16,
    },
    Unblock {
        pod: String,
    },
    /// The pod's readiness probe fails from now on; `Ready` ends it.
    Unready {
        pod: String,
    },
    Ready {
        pod: String,
    },
    /// Restart the control plane with other certificate lifetimes.
    CertificateTtl {
        ttl: String,
    },
}

/// Questions about what crossed the wire.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "wire", rename_all = "kebab-case")]
pub enum Wire {
    /// Forget what was captured; count from now.
    Mark,
    /// Look at everything since the mark.
    Look { nonce: Option<String> },
    /// Write the capture since the mark to a file, in pcap format.
    Pcap { file: String },
}

/// What was seen on the wire between the pods of different nodes since the mark.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sight {
    pub frames: usize,
    /// Frames lost to the capture's bounds; a claim about absence needs 0.
    pub lost: usize,
    /// TCP payload bytes between pods.
    pub payload_bytes: u64,
    /// Of these, in complete TLS records to or from port 15008.
    pub tls_bytes: u64,
    /// Payload bytes that are neither, with one example of who talked to whom.
    pub clear_bytes: u64,
    pub clear_example: Option<String>,
    /// How often the nonce was found, and around its first place.
    pub found: usize,
    pub excerpt: Option<String>,
}

/// A reply.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// Set when the request failed: what, and what would be right.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub text: String,
    /// Exit status of a command; 128 + n for signal n.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<i32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<Status>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sight: Option<Sight>,
}

impl Reply {
    pub fn ok() -> Self {
        Self::default()
    }

    pub fn text(text: impl Into<String>) -> Self {
        Self { text: text.into(), ..Self::default() }
    }

    pub fn error(error: impl std::fmt::Display) -> Self {
        Self { error: Some(error.to_string()), ..Self::default() }
    }
}

/// What runs in a lab.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub nodes: Vec<NodeStatus>,
    pub pods: Vec<PodStatus>,
    pub programs: Vec<ProgramStatus>,
    /// Host addresses that lead to ports inside: name to URL.
    pub urls: BTreeMap<String, String>,
    pub services: BTreeMap<String, Vec<String>>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NodeStatus {
    pub name: String,
    pub addresses: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PodStatus {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub node: String,
    pub service_account: String,
    pub addresses: Vec<String>,
    /// `enabled`, `pending` or empty, as the node agent reports it.
    pub enrolment: String,
    /// Process ids of its containers, seen from inside, in order.
    pub processes: Vec<u32>,
    /// Why it does not run, when it does not.
    pub problem: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ProgramStatus {
    pub name: String,
    /// 0 when it does not run.
    pub process: u32,
    pub restarts: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_survive_json() {
        let requests = [
            Request::Status,
            Request::Fault(Fault::Kill { program: "ztunnel/node1".to_owned(), restart: true }),
            Request::Wire(Wire::Look { nonce: Some("n".to_owned()) }),
        ];
        for request in requests {
            let text = serde_json::to_string(&request).unwrap();
            assert_eq!(serde_json::from_str::<Request>(&text).unwrap(), request, "{text}");
        }
    }
}
