use std::os::fd::{AsFd, OwnedFd};

use mesh_core::identity::Identity;
use mesh_identity::{CaClient, CaError};
use mesh_net::SeqListener;
use mesh_runtime::{
    drain::{self, DrainTrigger},
    metrics::Registry,
    workers::Workers,
};
use prost::Message;
use proto::istio::workload::zds::{
    AddWorkload, DelWorkload, KeepWorkload, SnapshotSent, WorkloadInfo as WireInfo, WorkloadRequest, WorkloadResponse,
    ZdsHello, workload_request::Payload, workload_response,
};
use tokio::{sync::mpsc, task::JoinHandle};

use super::*;
use crate::{config::Config, outcome::Outcomes, pods::Shared, state::State};

mod rows;

struct NoCa;

impl CaClient for NoCa {
    fn sign(&self, _: &Identity, _: String) -> BoxFuture<'_, Result<Vec<String>, CaError>> {
        Box::pin(std::future::pending())
    }
}

/// A node agent, and the manager that follows it. Pods named `broken…` fail to start; the channel tells of each attempt.
struct Bench {
    dir: tempfile::TempDir,
    agent: SeqListener,
    pods: PodTable,
    readiness: Readiness,
    attempts: mpsc::Receiver<String>,
    drain: DrainTrigger,
    manager: JoinHandle<()>,
    certificates: JoinHandle<()>,
    _workers: Workers,
}

async fn bench() -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("zds.sock");
    let agent = SeqListener::bind(&socket).unwrap();
    let config = Arc::new(Config::default_for_tests());
    let (registry, readiness, pods) = (Registry::new(), Readiness::default(), PodTable::default());
    let workers = Workers::spawn(1, "test").unwrap();
    let (identities, task) = mesh_identity::Manager::new(mesh_identity::Config::default(), Arc::new(NoCa));
    let state = State::new("".into());
    let shared = Arc::new(Shared {
        config: config.clone(),
        state: state.clone(),
        identities: identities.clone(),
        outcomes: Outcomes::new(&registry),
        lookups: crate::lookup::Lookups::new(false),
        memory: mesh_hbone::Process::default(),
        workers: workers.handles().to_vec(),
    });
    let local = Arc::new(Local::new(config, state, identities));
    let (tried, attempts) = mpsc::channel(64);
    let start: StartPod = Box::new(move |info, _| {
        let (shared, tried) = (shared.clone(), tried.clone());
        Box::pin(async move {
            tried.send(info.name.to_string()).await.unwrap();
            if info.name.starts_with("broken") {
                return Err(StartError::NoWorkers);
            }
            // In this process's own namespace: tests need no privileges.
            crate::pods::start(&shared, info, None).await
        })
    });
    let metrics = ControlMetrics::new(&registry, "test");
    let deadline = Duration::from_secs(5);
    let manager = Manager::new(socket, start, pods.clone(), local, metrics, readiness.clone(), deadline);
    let (drain, watcher) = drain::channel();
    let (manager, certificates) = (tokio::spawn(manager.run(watcher)), tokio::spawn(task));
    Bench { dir, agent, pods, readiness, attempts, drain, manager, certificates, _workers: workers }
}

impl Bench {
    async fn session(&self) -> Session {
        let stream = self.agent.accept().await.unwrap();
        let mut buffer = [0; 1024];
        let (length, _) = stream.recv(&mut buffer).await.unwrap();
        assert_eq!(ZdsHello::decode(&buffer[..length]).unwrap().version, 1);
        Session(stream)
    }

    fn served(&self) -> Vec<(String, &'static str)> {
        self.pods.dump().into_iter().map(|(uid, pod)| (uid.to_string(), pod.state)).collect()
    }

    async fn finish(self) {
        assert_eq!(self.drain.drain(Duration::from_secs(10)).await, Drained::Complete);
        self.manager.await.unwrap();
        assert!(self.pods.dump().is_empty());
        self.certificates.abort();
        drop(self.dir);
    }
}

struct Session(SeqStream);

impl Session {
    /// Sends a request and returns the error it was answered with.
    async fn ask(&self, payload: Payload, fd: Option<OwnedFd>) -> String {
        self.raw(&WorkloadRequest { payload: Some(payload) }.encode_to_vec(), fd).await
    }

    async fn raw(&self, packet: &[u8], fd: Option<OwnedFd>) -> String {
        self.0.send(packet, fd.as_ref().map(AsFd::as_fd)).await.unwrap();
        let mut buffer = [0; 1024];
        let (length, _) = self.0.recv(&mut buffer).await.unwrap();
        let answer = WorkloadResponse::decode(&buffer[..length]).unwrap();
        let Some(workload_response::Payload::Ack(ack)) = answer.payload else { panic!("not an acknowledgement") };
        ack.error
    }

    async fn add(&self, name: &str) -> String {
        let info = WireInfo { name: name.into(), namespace: "demo".into(), service_account: "sa".into() };
        let add = AddWorkload { uid: name.into(), workload_info: Some(info) };
        self.ask(Payload::Add(add), Some(namespace())).await
    }

    async fn snapshot(&self) -> String {
        self.ask(Payload::SnapshotSent(SnapshotSent {}), None).await
    }
}

fn namespace() -> OwnedFd {
    std::fs::File::open("/proc/thread-self/ns/net").unwrap().into()
}

#[tokio::test]
async fn pods_are_served_before_they_are_acknowledged_and_readiness_waits_for_the_snapshot() {
    let bench = bench().await;
    let session = bench.session().await;
    assert_eq!(session.add("a").await, "");
    assert_eq!(bench.served(), [("a".to_owned(), "Up")]);
    assert_eq!(bench.readiness.list(), ["workload proxy manager"]);
    assert_eq!(session.snapshot().await, "");
    assert_eq!(session.add("a").await, "", "announcing it again changes nothing");
    assert!(bench.readiness.is_ready());
    assert_eq!(session.ask(Payload::Del(DelWorkload { uid: "a".into() }), None).await, "");
    assert_eq!(session.ask(Payload::Del(DelWorkload { uid: "unknown".into() }), None).await, "");
    assert_eq!(bench.served(), []);
    drop(session);
    bench.finish().await;
}

#[tokio::test]
async fn losing_the_agent_tears_nothing_down_until_the_next_snapshot() {
    let bench = bench().await;
    let session = bench.session().await;
    for name in ["a", "b", "c"] {
        assert_eq!(session.add(name).await, "");
    }
    session.snapshot().await;
    drop(session);

    let session = bench.session().await;
    assert_eq!(bench.readiness.list(), ["workload proxy manager"]);
    assert_eq!(session.add("a").await, "");
    assert_eq!(session.ask(Payload::Keep(KeepWorkload { uid: "b".into() }), None).await, "");
    let all = [("a".to_owned(), "Up"), ("b".to_owned(), "Up"), ("c".to_owned(), "Up")];
    assert_eq!(bench.served(), all);
    session.snapshot().await;
    assert_eq!(bench.served(), all[..2]);
    drop(session);
    bench.finish().await;
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_cannot_be_served_is_told_of_and_retried() {
    let mut bench = bench().await;
    let session = bench.session().await;
    assert_eq!(session.add("broken").await, "no worker threads are running");
    assert_eq!(session.snapshot().await, "");
    assert_eq!(bench.served(), [("broken".to_owned(), "Pending")]);
    assert!(!bench.readiness.is_ready());
    for _ in 0..3 {
        assert_eq!(bench.attempts.recv().await.as_deref(), Some("broken"));
    }
    assert_eq!(session.ask(Payload::Del(DelWorkload { uid: "broken".into() }), None).await, "");
    assert!(bench.readiness.is_ready());
    drop(session);
    bench.finish().await;
}

#[tokio::test]
async fn nonsense_is_answered_and_costs_the_session_not_the_process() {
    let bench = bench().await;
    let session = bench.session().await;
    assert_eq!(session.add("a").await, "");
    let add = AddWorkload { uid: "b".into(), workload_info: None };
    assert!(session.ask(Payload::Add(add), None).await.contains("without workload_info"));
    assert_eq!(session.add("c").await, "", "one bad request is refused alone");
    assert!(session.raw(&[0xff; 64], None).await.contains("not a WorkloadRequest"));

    let session = bench.session().await;
    assert!(session.raw(&[0; PACKET + 1], None).await.contains("truncated"));

    let session = bench.session().await;
    session.snapshot().await;
    assert!(session.snapshot().await.contains("second SnapshotSent"));

    let session = bench.session().await;
    assert_eq!(session.add("d").await, "");
    assert_eq!(bench.served().len(), 1, "the snapshot named nobody, so only what came after is served");
    drop(session);
    bench.finish().await;
}
