//! ZDS, the agent's half: packets, and the server that keeps every connected ztunnel told.
//!
//! A session: hello, then every workload of the node (`add` with its namespace, `keep` where that is not at hand), `snapshot_sent`,
//! then changes. One request is outstanding at a time and answers count by position, so a session whose answer is late is closed:
//! the late answer would be taken for the next one's.

use std::{
    collections::BTreeMap,
    io,
    os::fd::AsFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::future::join_all;
use mesh_net::{NetNs, SeqListener, SeqStream};
use mesh_runtime::drain::DrainWatcher;
use prost::Message;
use proto::istio::workload::zds as wire;
use tokio::{
    sync::{Notify, mpsc, oneshot},
    task::JoinSet,
    time::{sleep, timeout},
};

use super::enroll::Uid;

/// One packet; both sides refuse more.
const MAX_PACKET: usize = 1024;
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
const QUEUE: usize = 100;
/// At most five connections are accepted in a second.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// What can go wrong with one ztunnel.
#[derive(Debug, thiserror::Error)]
pub enum ZdsError {
    #[error("no ztunnel is connected")]
    NotConnected,
    #[error("ztunnel cannot take the pod: {0}")]
    Refused(String),
    #[error("ztunnel does not follow the protocol: {0}")]
    Protocol(String),
    #[error("ztunnel did not answer in time")]
    TimedOut,
    #[error("the connection to ztunnel broke")]
    Io(#[from] io::Error),
}

/// A pod as ztunnel is told of it.
#[derive(Clone, Debug)]
pub struct Workload {
    pub uid: Uid,
    pub name: String,
    pub namespace: String,
    pub service_account: String,
    /// `None`: it exists, but its namespace has not been found (yet) by this process.
    pub netns: Option<NetNs>,
}

/// Reads ztunnel's first packet.
pub fn parse_hello(packet: &[u8]) -> Result<(), ZdsError> {
    let hello = wire::ZdsHello::decode(packet).map_err(|e| ZdsError::Protocol(format!("unreadable hello: {e}")))?;
    if hello.version == wire::Version::V1 as i32 {
        return Ok(());
    }
    Err(ZdsError::Protocol(format!(
        "hello of version {}, this agent speaks {}",
        hello.version,
        wire::Version::V1 as i32
    )))
}

/// Reads an answer; an error in it is [`ZdsError::Refused`].
pub fn parse_response(packet: &[u8]) -> Result<(), ZdsError> {
    let response =
        wire::WorkloadResponse::decode(packet).map_err(|e| ZdsError::Protocol(format!("unreadable answer: {e}")))?;
    match response.payload {
        Some(wire::workload_response::Payload::Ack(ack)) if ack.error.is_empty() => Ok(()),
        Some(wire::workload_response::Payload::Ack(ack)) => Err(ZdsError::Refused(ack.error)),
        None => Err(ZdsError::Protocol("an answer without content".into())),
    }
}

/// A packet to ztunnel and the descriptor that goes with it.
#[derive(Clone, Debug)]
struct Request {
    packet: Vec<u8>,
    netns: Option<NetNs>,
}

impl Request {
    fn new(payload: wire::workload_request::Payload, netns: Option<NetNs>) -> Self {
        Self { packet: wire::WorkloadRequest { payload: Some(payload) }.encode_to_vec(), netns }
    }

    fn add_or_keep(workload: &Workload) -> Self {
        let uid = workload.uid.to_string();
        let Some(netns) = &workload.netns else {
            return Self::new(wire::workload_request::Payload::Keep(wire::KeepWorkload { uid }), None);
        };
        let workload_info = Some(wire::WorkloadInfo {
            name: workload.name.clone(),
            namespace: workload.namespace.clone(),
            service_account: workload.service_account.clone(),
        });
        let add = wire::AddWorkload { uid, workload_info };
        Self::new(wire::workload_request::Payload::Add(add), Some(netns.clone()))
    }

    fn delete(uid: &str) -> Self {
        Self::new(wire::workload_request::Payload::Del(wire::DelWorkload { uid: uid.to_owned() }), None)
    }

    fn snapshot_sent() -> Self {
        Self::new(wire::workload_request::Payload::SnapshotSent(wire::SnapshotSent {}), None)
    }
}

type Reply = oneshot::Sender<Result<(), ZdsError>>;

/// The workloads of the node and the sessions that must know them. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Zds {
    shared: Arc<Mutex<Shared>>,
    changed: Arc<Notify>,
}

#[derive(Debug, Default)]
struct Shared {
    workloads: BTreeMap<Uid, Workload>,
    /// Oldest first.
    sessions: Vec<(u64, mpsc::Sender<(Request, Reply)>)>,
    next_session: u64,
}

impl Zds {
    fn lock(&self) -> MutexGuard<'_, Shared> {
        // Plain maps: no panic leaves them half changed.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connected ztunnels.
    pub fn connected(&self) -> usize {
        self.lock().sessions.len()
    }

    /// Completes when a ztunnel has received the whole picture. Cancel safe.
    pub async fn synced(&self) {
        self.changed.notified().await;
    }

    /// Makes the workload part of every later snapshot, without telling anybody now.
    pub fn remember(&self, workload: Workload) {
        self.lock().workloads.insert(workload.uid.clone(), workload);
    }

    /// Sends the workload to the newest ztunnel and waits for its acknowledgement; later ones get it with their snapshot.
    pub async fn announce(&self, workload: Workload) -> Result<(), ZdsError> {
        let request = Request::add_or_keep(&workload);
        let newest = {
            let mut shared = self.lock();
            shared.workloads.insert(workload.uid.clone(), workload);
            shared.sessions.last().map(|(_, queue)| queue.clone())
        };
        ask(newest.ok_or(ZdsError::NotConnected)?, request).await
    }

    /// Makes every ztunnel let go of the workload; those that do not answer lose their connection.
    pub async fn withdraw(&self, uid: &Uid) {
        let sessions: Vec<_> = {
            let mut shared = self.lock();
            shared.workloads.remove(uid);
            shared.sessions.iter().map(|(_, queue)| queue.clone()).collect()
        };
        let told = join_all(sessions.into_iter().map(|queue| ask(queue, Request::delete(uid)))).await;
        for error in told.into_iter().filter_map(Result::err) {
            tracing::warn!(%uid, %error, "a ztunnel was not told that a pod left");
        }
    }

    /// Makes every ztunnel let go of every workload.
    pub async fn withdraw_all(&self) {
        let uids: Vec<Uid> = self.lock().workloads.keys().cloned().collect();
        for uid in uids {
            self.withdraw(&uid).await;
        }
    }

    /// Accepts ztunnels until the drain starts. Call it only when the workloads to be kept are all remembered: a ztunnel drops those
    /// that its snapshot does not mention.
    pub async fn serve(self, listener: SeqListener, drain: DrainWatcher) {
        let mut sessions = JoinSet::new();
        let stop = drain.signalled();
        tokio::pin!(stop);
        loop {
            tokio::select! {
                _ = &mut stop => break,
                Some(_) = sessions.join_next(), if !sessions.is_empty() => {}
                accepted = listener.accept() => {
                    match accepted {
                        Ok(stream) => drop(sessions.spawn(self.clone().session(stream))),
                        Err(error) => tracing::warn!(%error, "cannot accept a ztunnel"),
                    }
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        sessions.shutdown().await;
    }

    async fn session(self, stream: SeqStream) {
        let (queue, requests) = mpsc::channel(QUEUE);
        let (registration, workloads) = self.register(queue);
        tracing::info!(session = registration.id, "ztunnel connected");
        let ended = self.converse(&stream, workloads, requests).await;
        tracing::info!(session = registration.id, reason = %ended, "ztunnel disconnected");
    }

    /// In one step, so that no change falls between the snapshot and the queue.
    fn register(&self, queue: mpsc::Sender<(Request, Reply)>) -> (Registration, Vec<Workload>) {
        let mut shared = self.lock();
        let id = shared.next_session;
        shared.next_session += 1;
        shared.sessions.push((id, queue));
        (Registration { id, zds: self.clone() }, shared.workloads.values().cloned().collect())
    }

    /// Runs until the connection ends; returns why.
    async fn converse(
        &self,
        stream: &SeqStream,
        workloads: Vec<Workload>,
        mut requests: mpsc::Receiver<(Request, Reply)>,
    ) -> ZdsError {
        match self.bring_up_to_date(stream, workloads).await {
            Err(error) => return error,
            Ok(()) => self.changed.notify_one(),
        }
        let mut unasked = [0; MAX_PACKET];
        loop {
            tokio::select! {
                // Between requests ztunnel has nothing to say: a packet is a fault, silence of length 0 the end.
                received = stream.recv(&mut unasked) => return match received {
                    Ok((0, _)) => io::Error::from(io::ErrorKind::UnexpectedEof).into(),
                    Ok(_) => ZdsError::Protocol("it spoke unasked".into()),
                    Err(error) => error.into(),
                },
                request = requests.recv() => {
                    // The sender is in `Shared` until this session is deregistered.
                    let Some((request, reply)) = request else { return ZdsError::NotConnected };
                    let answer = exchange(stream, &request).await;
                    let fatal = fatal(&answer);
                    // A caller that has given up needs no answer.
                    drop(reply.send(answer));
                    if let Some(error) = fatal {
                        return error;
                    }
                }
            }
        }
    }

    async fn bring_up_to_date(&self, stream: &SeqStream, workloads: Vec<Workload>) -> Result<(), ZdsError> {
        parse_hello(&receive(stream).await?)?;
        for workload in workloads {
            match exchange(stream, &Request::add_or_keep(&workload)).await {
                // ztunnel retries it by itself.
                Err(ZdsError::Refused(error)) => {
                    tracing::warn!(uid = %workload.uid, error, "ztunnel cannot take a pod yet")
                }
                answer => answer?,
            }
        }
        exchange(stream, &Request::snapshot_sent()).await
    }
}

/// A place in the list of sessions, given up on drop.
struct Registration {
    id: u64,
    zds: Zds,
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.zds.lock().sessions.retain(|(id, _)| *id != self.id);
    }
}

async fn ask(queue: mpsc::Sender<(Request, Reply)>, request: Request) -> Result<(), ZdsError> {
    let (reply, answer) = oneshot::channel();
    // The queue is bounded: a session that cannot keep up must not hold the caller for ever.
    timeout(ANSWER_LIMIT, queue.send((request, reply)))
        .await
        .map_err(|_| ZdsError::TimedOut)?
        .map_err(|_| ZdsError::NotConnected)?;
    drop(queue);
    answer.await.unwrap_or(Err(ZdsError::NotConnected))
}

async fn exchange(stream: &SeqStream, request: &Request) -> Result<(), ZdsError> {
    let fd = request.netns.as_ref().map(AsFd::as_fd);
    timeout(ANSWER_LIMIT, stream.send(&request.packet, fd)).await.map_err(|_| ZdsError::TimedOut)??;
    parse_response(&receive(stream).await?)
}

async fn receive(stream: &SeqStream) -> Result<Vec<u8>, ZdsError> {
    let mut buffer = vec![0; MAX_PACKET];
    let received = timeout(ANSWER_LIMIT, stream.recv(&mut buffer)).await.map_err(|_| ZdsError::TimedOut)?;
    match received? {
        (0, _) => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
        (length, fds) if fds.is_empty() => {
            buffer.truncate(length);
            Ok(buffer)
        }
        _ => Err(ZdsError::Protocol("it sent a descriptor".into())),
    }
}

/// After anything but an answer, answers can no longer be told apart by position.
fn fatal(answer: &Result<(), ZdsError>) -> Option<ZdsError> {
    match answer {
        Ok(()) | Err(ZdsError::Refused(_)) => None,
        Err(ZdsError::TimedOut) => Some(ZdsError::TimedOut),
        Err(ZdsError::NotConnected) => Some(ZdsError::NotConnected),
        Err(ZdsError::Protocol(why)) => Some(ZdsError::Protocol(why.clone())),
        Err(ZdsError::Io(error)) => Some(ZdsError::Io(io::Error::from(error.kind()))),
    }
}

#[cfg(test)]
mod tests {
    use mesh_runtime::drain;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_packet_makes_the_parsers_panic(packet in prop::collection::vec(any::<u8>(), 0..64)) {
            drop(parse_hello(&packet));
            drop(parse_response(&packet));
        }
    }

    struct Peer {
        stream: SeqStream,
    }

    impl Peer {
        async fn connect(path: &std::path::Path) -> Self {
            let stream = SeqStream::connect(path).expect("connect");
            let hello = wire::ZdsHello { version: wire::Version::V1 as i32 };
            stream.send(&hello.encode_to_vec(), None).await.expect("hello");
            Self { stream }
        }

        /// Takes one request and acknowledges it; what it was, and how many descriptors came along.
        async fn take(&self, error: &str) -> (String, usize) {
            let mut buffer = [0; MAX_PACKET];
            let (length, fds) = self.stream.recv(&mut buffer).await.expect("receive");
            let request = wire::WorkloadRequest::decode(&buffer[..length]).expect("a request");
            let ack = wire::Ack { error: error.to_owned() };
            let response = wire::WorkloadResponse { payload: Some(wire::workload_response::Payload::Ack(ack)) };
            self.stream.send(&response.encode_to_vec(), None).await.expect("acknowledge");
            let text = match request.payload.expect("content") {
                wire::workload_request::Payload::Add(add) => {
                    format!("add {} {}", add.uid, add.workload_info.expect("info").name)
                }
                wire::workload_request::Payload::Keep(keep) => format!("keep {}", keep.uid),
                wire::workload_request::Payload::Del(del) => format!("del {}", del.uid),
                wire::workload_request::Payload::SnapshotSent(_) => "snapshot sent".to_owned(),
            };
            (text, fds.len())
        }
    }

    fn workload(uid: &str, with_netns: bool) -> Workload {
        Workload {
            uid: uid.into(),
            name: format!("pod-{uid}"),
            namespace: "demo".into(),
            service_account: "default".into(),
            netns: with_netns.then(|| NetNs::current().expect("namespace")),
        }
    }

    #[tokio::test]
    async fn snapshot_live_changes_and_fan_out() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("z.sock");
        let zds = Zds::default();
        assert!(matches!(zds.announce(workload("a", true)).await, Err(ZdsError::NotConnected)));
        zds.remember(workload("b", false));
        let (trigger, watcher) = drain::channel();
        let serving = tokio::spawn(zds.clone().serve(SeqListener::bind(&path).expect("bind"), watcher));

        let first = Peer::connect(&path).await;
        assert_eq!(first.take("").await, ("add a pod-a".into(), 1));
        assert_eq!(first.take("not yet").await, ("keep b".into(), 0), "a refusal does not end the snapshot");
        assert_eq!(first.take("").await, ("snapshot sent".into(), 0));
        zds.synced().await;

        let second = Peer::connect(&path).await;
        for _ in 0..3 {
            second.take("").await;
        }
        zds.synced().await;
        assert_eq!(zds.connected(), 2);
        let (added, taken) = tokio::join!(zds.announce(workload("c", true)), second.take(""));
        assert_eq!((added.is_ok(), taken), (true, ("add c pod-c".into(), 1)), "the newest gets it");
        let (refused, _) = tokio::join!(zds.announce(workload("d", true)), second.take("no such namespace"));
        assert!(matches!(refused, Err(ZdsError::Refused(why)) if why == "no such namespace"));
        let gone = "c".into();
        let ((), one, two) = tokio::join!(zds.withdraw(&gone), first.take(""), second.take(""));
        assert_eq!((one.0, two.0), ("del c".into(), "del c".into()), "both let go");

        drop(second);
        let (added, taken) = tokio::join!(retry_announce(&zds), first.take(""));
        assert_eq!((added, taken.0), (true, "add e pod-e".into()), "the previous one is the newest again");
        trigger.drain(Duration::from_secs(5)).await;
        serving.await.expect("served");
    }

    async fn retry_announce(zds: &Zds) -> bool {
        while zds.connected() > 1 {
            tokio::task::yield_now().await;
        }
        zds.announce(workload("e", true)).await.is_ok()
    }

    #[tokio::test]
    async fn a_peer_that_misbehaves_loses_its_connection_only() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("z.sock");
        let zds = Zds::default();
        let (_trigger, watcher) = drain::channel();
        let serving = tokio::spawn(zds.clone().serve(SeqListener::bind(&path).expect("bind"), watcher));
        let rude = SeqStream::connect(&path).expect("connect");
        rude.send(b"\xff\xff\xff", None).await.expect("send");
        assert_eq!(rude.recv(&mut [0; 8]).await.map(|r| r.0).unwrap_or(0), 0, "closed");
        let talker = Peer::connect(&path).await;
        talker.take("").await;
        zds.synced().await;
        talker.stream.send(b"\x08\x01", None).await.expect("send");
        assert_eq!(talker.stream.recv(&mut [0; 8]).await.map(|r| r.0).unwrap_or(0), 0, "closed");
        let good = Peer::connect(&path).await;
        assert_eq!(good.take("").await.0, "snapshot sent");
        serving.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn a_late_answer_closes_the_session() {
        let (agent, ztunnel) = SeqStream::pair().expect("pair");
        let zds = Zds::default();
        let hello = wire::ZdsHello { version: wire::Version::V1 as i32 };
        ztunnel.send(&hello.encode_to_vec(), None).await.expect("hello");
        let session = tokio::spawn(zds.clone().session(agent));
        session.await.expect("session");
        assert_eq!(zds.connected(), 0);
    }
}
