//! ZDS messages and what a session may send when; no I/O.
//!
//! The agent sends one request at a time and waits for its acknowledgement; requests and acknowledgements match by order alone. So every
//! packet is answered exactly once, whatever is in it, and nothing is ever sent unasked.

use std::{collections::HashSet, sync::Arc};

use prost::Message as _;
use proto::istio::workload::zds::{
    Ack, Version, WorkloadRequest, WorkloadResponse, ZdsHello, workload_request::Payload, workload_response,
};

use super::WorkloadInfo;

/// The agent reads at most 1024 bytes; the text of an acknowledgement stays well below.
const MAX_ERROR: usize = 900;

/// What an agent may say. `N` stands for the namespace that came along.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message<N> {
    Add {
        info: WorkloadInfo,
        netns: N,
    },
    Del {
        uid: Arc<str>,
    },
    /// A pod that the agent knows and holds no namespace of now.
    Keep {
        uid: Arc<str>,
    },
    /// Every pod of the node has been named.
    SnapshotSent,
}

#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    #[error("the packet is not a WorkloadRequest")]
    Undecodable(#[source] prost::DecodeError),
    #[error("the request is of a kind this proxy does not know")]
    UnknownRequest,
    #[error("{0} without a pod uid")]
    NoUid(&'static str),
    #[error("AddWorkload of pod {0} without workload_info")]
    NoInfo(Arc<str>),
    #[error("AddWorkload of pod {uid} with {got} descriptors; expected exactly the network namespace")]
    NotOneNamespace { uid: Arc<str>, got: usize },
    #[error("{kind} with {got} descriptors; expected none")]
    UnexpectedDescriptors { kind: &'static str, got: usize },
    #[error("KeepWorkload after SnapshotSent")]
    KeepAfterSnapshot,
    #[error("a second SnapshotSent in one session")]
    SecondSnapshot,
}

impl ProtocolError {
    /// Whether the two sides no longer agree on where the session stands; otherwise only the one request is refused.
    pub fn ends_session(&self) -> bool {
        match self {
            Self::Undecodable(_) | Self::KeepAfterSnapshot | Self::SecondSnapshot => true,
            Self::UnknownRequest
            | Self::NoUid(_)
            | Self::NoInfo(_)
            | Self::NotOneNamespace { .. }
            | Self::UnexpectedDescriptors { .. } => false,
        }
    }
}

/// The first packet of a session.
pub fn hello() -> Vec<u8> {
    ZdsHello { version: Version::V1.into() }.encode_to_vec()
}

/// The answer to a packet; no error means success.
pub fn ack(error: Option<&str>) -> Vec<u8> {
    let error = error.unwrap_or_default();
    let error = error[..error.floor_char_boundary(MAX_ERROR)].to_owned();
    WorkloadResponse { payload: Some(workload_response::Payload::Ack(Ack { error })) }.encode_to_vec()
}

/// Understands one packet and what came with it. Surplus descriptors are closed by being dropped.
///
/// # Errors
/// When the packet is not a well-formed request.
pub fn parse<N>(packet: &[u8], descriptors: Vec<N>) -> Result<Message<N>, ProtocolError> {
    let request = WorkloadRequest::decode(packet).map_err(ProtocolError::Undecodable)?;
    match request.payload.ok_or(ProtocolError::UnknownRequest)? {
        Payload::Add(add) => {
            let uid = uid("AddWorkload", add.uid)?;
            let info = add.workload_info.ok_or_else(|| ProtocolError::NoInfo(uid.clone()))?;
            let got = descriptors.len();
            let [netns] = <[N; 1]>::try_from(descriptors)
                .map_err(|_| ProtocolError::NotOneNamespace { uid: uid.clone(), got })?;
            let info = WorkloadInfo {
                uid,
                name: info.name.into(),
                namespace: info.namespace.into(),
                service_account: info.service_account.into(),
            };
            Ok(Message::Add { info, netns })
        }
        Payload::Del(del) => {
            bare("DelWorkload", &descriptors)?;
            Ok(Message::Del { uid: uid("DelWorkload", del.uid)? })
        }
        Payload::Keep(keep) => {
            bare("KeepWorkload", &descriptors)?;
            Ok(Message::Keep { uid: uid("KeepWorkload", keep.uid)? })
        }
        Payload::SnapshotSent(_) => bare("SnapshotSent", &descriptors).map(|()| Message::SnapshotSent),
    }
}

fn uid(kind: &'static str, uid: String) -> Result<Arc<str>, ProtocolError> {
    if uid.is_empty() { Err(ProtocolError::NoUid(kind)) } else { Ok(uid.into()) }
}

fn bare<N>(kind: &'static str, descriptors: &[N]) -> Result<(), ProtocolError> {
    match descriptors.len() {
        0 => Ok(()),
        got => Err(ProtocolError::UnexpectedDescriptors { kind, got }),
    }
}

/// What one connection to the agent has said so far.
#[derive(Debug, Default)]
pub struct Session {
    /// Pods added or kept before the snapshot was complete.
    named: HashSet<Arc<str>>,
    complete: bool,
}

/// What to do about a message.
#[derive(Debug, PartialEq, Eq)]
pub enum Step<N> {
    /// Serve the pod, unless it is being served in that namespace already.
    Start {
        info: WorkloadInfo,
        netns: N,
    },
    Stop {
        uid: Arc<str>,
    },
    /// Give up retrying the pod; what serves it stays until the snapshot is complete.
    Forget {
        uid: Arc<str>,
    },
    Nothing,
    /// Stop every pod but these.
    Reap {
        keep: HashSet<Arc<str>>,
    },
}

impl Session {
    /// Whether the agent has named every pod of the node.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// # Errors
    /// When the message does not belong here; the session is over then, and the next one starts anew.
    pub fn step<N>(&mut self, message: Message<N>) -> Result<Step<N>, ProtocolError> {
        match message {
            Message::Add { info, netns } => {
                self.name(&info.uid);
                Ok(Step::Start { info, netns })
            }
            Message::Keep { .. } if self.complete => Err(ProtocolError::KeepAfterSnapshot),
            Message::Keep { uid } => {
                self.name(&uid);
                Ok(Step::Nothing)
            }
            Message::Del { uid } if self.complete => Ok(Step::Stop { uid }),
            Message::Del { uid } => {
                self.named.remove(&uid);
                Ok(Step::Forget { uid })
            }
            Message::SnapshotSent if self.complete => Err(ProtocolError::SecondSnapshot),
            Message::SnapshotSent => {
                self.complete = true;
                Ok(Step::Reap { keep: std::mem::take(&mut self.named) })
            }
        }
    }

    fn name(&mut self, uid: &Arc<str>) {
        if !self.complete {
            self.named.insert(uid.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use proto::istio::workload::zds::{AddWorkload, DelWorkload, KeepWorkload, SnapshotSent, WorkloadInfo as WireInfo};

    use super::*;

    fn packet(payload: Payload) -> Vec<u8> {
        WorkloadRequest { payload: Some(payload) }.encode_to_vec()
    }

    fn add(uid: &str) -> Payload {
        let info = WireInfo { name: "a".into(), namespace: "demo".into(), service_account: "sa".into() };
        Payload::Add(AddWorkload { uid: uid.into(), workload_info: Some(info) })
    }

    fn info(uid: &str) -> WorkloadInfo {
        WorkloadInfo { uid: uid.into(), name: "a".into(), namespace: "demo".into(), service_account: "sa".into() }
    }

    #[test]
    fn an_add_needs_exactly_one_descriptor_and_nothing_else_may_bring_one() {
        let parsed = parse(&packet(add("1")), vec![7]).unwrap();
        assert_eq!(parsed, Message::Add { info: info("1"), netns: 7 });
        for descriptors in [vec![], vec![1, 2]] {
            let error = parse(&packet(add("1")), descriptors).unwrap_err();
            assert!(matches!(error, ProtocolError::NotOneNamespace { .. }) && !error.ends_session());
        }
        for payload in [
            Payload::Del(DelWorkload { uid: "1".into() }),
            Payload::Keep(KeepWorkload { uid: "1".into() }),
            Payload::SnapshotSent(SnapshotSent {}),
        ] {
            parse(&packet(payload.clone()), Vec::<u8>::new()).unwrap();
            let error = parse(&packet(payload), vec![1]).unwrap_err();
            assert!(matches!(error, ProtocolError::UnexpectedDescriptors { .. }), "{error}");
        }
    }

    #[test]
    fn one_bad_request_is_refused_alone_and_noise_ends_the_session() {
        let nameless = packet(Payload::Add(AddWorkload { uid: "1".into(), workload_info: None }));
        assert!(!parse(&nameless, vec![1]).unwrap_err().ends_session());
        assert!(!parse::<u8>(&packet(Payload::Del(DelWorkload::default())), vec![]).unwrap_err().ends_session());
        assert!(!parse::<u8>(&[], vec![]).unwrap_err().ends_session());
        assert!(parse::<u8>(&[0xff; 40], vec![]).unwrap_err().ends_session());
    }

    #[test]
    fn only_the_snapshot_decides_who_stays() {
        let mut session = Session::default();
        let start = session.step(Message::Add { info: info("1"), netns: () }).unwrap();
        assert_eq!(start, Step::Start { info: info("1"), netns: () });
        assert_eq!(session.step::<()>(Message::Keep { uid: "2".into() }).unwrap(), Step::Nothing);
        session.step(Message::Add { info: info("3"), netns: () }).unwrap();
        assert_eq!(session.step::<()>(Message::Del { uid: "3".into() }).unwrap(), Step::Forget { uid: "3".into() });
        let keep = HashSet::from(["1".into(), "2".into()]);
        assert_eq!(session.step::<()>(Message::SnapshotSent).unwrap(), Step::Reap { keep });
        assert_eq!(session.step::<()>(Message::Del { uid: "1".into() }).unwrap(), Step::Stop { uid: "1".into() });
    }

    #[test]
    fn keep_and_snapshot_have_no_place_after_the_snapshot() {
        let mut session = Session::default();
        session.step::<()>(Message::SnapshotSent).unwrap();
        assert!(session.step::<()>(Message::Keep { uid: "1".into() }).unwrap_err().ends_session());
        assert!(session.step::<()>(Message::SnapshotSent).unwrap_err().ends_session());
    }

    #[test]
    fn acknowledgements_fit_the_agents_buffer() {
        assert!(ack(Some(&"ö".repeat(5000))).len() < 1024);
        let decoded = WorkloadResponse::decode(&*ack(None)).unwrap();
        assert_eq!(decoded.payload, Some(workload_response::Payload::Ack(Ack::default())));
        assert_eq!(ZdsHello::decode(&*hello()).unwrap().version(), Version::V1);
    }
}
