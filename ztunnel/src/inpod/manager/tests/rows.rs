//! The rest of what a node agent may do, event by event.

use mesh_net::isolate::Isolated;
use tokio::time::Instant;

use super::*;

fn add(name: &str) -> Payload {
    let info = WireInfo { name: name.into(), namespace: "demo".into(), service_account: "sa".into() };
    Payload::Add(AddWorkload { uid: name.into(), workload_info: Some(info) })
}

fn del(name: &str) -> Payload {
    Payload::Del(DelWorkload { uid: name.into() })
}

fn keep(name: &str) -> Payload {
    Payload::Keep(KeepWorkload { uid: name.into() })
}

const STAGE: &str = "FAIRWAY_TEST_STAGE";

/// Runs itself again as root of fresh namespaces, for want of a second one; where the kernel refuses, it prints a line that says so and
/// passes, unless `FAIRWAY_CI=1`.
#[test]
fn a_pod_in_a_new_namespace_is_started_anew_and_in_the_same_one_left_alone() {
    if std::env::var(STAGE).is_ok() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        return runtime.block_on(move_a_pod());
    }
    let mut isolated = Isolated::new(std::env::current_exe().unwrap());
    let name = concat!(module_path!(), "::a_pod_in_a_new_namespace_is_started_anew_and_in_the_same_one_left_alone");
    let name = name.split_once("::").unwrap().1;
    isolated.command().args([name, "--exact", "--nocapture"]).env(STAGE, "1");
    isolated.die_with_parent();
    match isolated.spawn() {
        Ok(mut child) => assert!(child.wait().unwrap().success(), "see above"),
        Err(refusal) if std::env::var("FAIRWAY_CI").is_ok_and(|v| v == "1") => panic!("{refusal}: {}", refusal.source),
        Err(refusal) => println!("skipped: {refusal}: {}", refusal.source),
    }
}

async fn move_a_pod() {
    let mut bench = bench().await;
    let session = bench.session().await;
    let other = NetNs::create().unwrap();
    let other = || Some(other.as_fd().try_clone_to_owned().unwrap());
    assert_eq!(session.add("a").await, "");
    assert_eq!(session.add("a").await, "");
    assert_eq!(session.ask(add("a"), other()).await, "");
    assert_eq!(session.ask(add("a"), other()).await, "");
    assert_eq!(bench.served(), [("a".to_owned(), "Up")]);
    let mut starts = 0;
    while bench.attempts.try_recv().is_ok() {
        starts += 1;
    }
    assert_eq!(starts, 2);
    drop(session);
    bench.finish().await;
}

#[tokio::test]
async fn a_deletion_before_the_snapshot_takes_effect_with_it_and_one_after_it_at_once() {
    let bench = bench().await;
    let session = bench.session().await;
    for name in ["a", "b"] {
        assert_eq!(session.add(name).await, "");
    }
    assert_eq!(session.ask(del("a"), None).await, "");
    let both = [("a".to_owned(), "Up"), ("b".to_owned(), "Up")];
    assert_eq!(bench.served(), both, "served until every pod has been named");
    assert_eq!(session.snapshot().await, "");
    assert_eq!(bench.served(), both[1..]);
    assert_eq!(session.ask(del("b"), None).await, "");
    assert_eq!(bench.served(), []);
    drop(session);
    bench.finish().await;
}

#[tokio::test]
async fn a_waiting_pod_that_is_deleted_before_the_snapshot_waits_no_more() {
    let bench = bench().await;
    let session = bench.session().await;
    assert_eq!(session.add("broken").await, "no worker threads are running");
    assert_eq!(session.ask(del("broken"), None).await, "");
    assert_eq!(bench.served(), []);
    assert_eq!(session.snapshot().await, "");
    assert!(bench.readiness.is_ready());
    drop(session);
    bench.finish().await;
}

/// Upstream forgets it, and the pod stays without listeners until the agent names it again.
#[tokio::test(start_paused = true)]
async fn a_waiting_pod_is_retried_every_five_seconds_and_across_sessions() {
    let mut bench = bench().await;
    let session = bench.session().await;
    assert_ne!(session.add("broken").await, "");
    session.snapshot().await;
    assert_eq!(bench.attempts.recv().await.as_deref(), Some("broken"));
    // The first may come with the session's first tick.
    bench.attempts.recv().await.unwrap();
    for _ in 0..3 {
        let last = Instant::now();
        bench.attempts.recv().await.unwrap();
        assert_eq!(last.elapsed().as_secs(), RETRY.as_secs());
    }
    drop(session);
    let session = bench.session().await;
    assert_eq!(bench.served(), [("broken".to_owned(), "Pending")]);
    bench.attempts.recv().await.unwrap();
    drop(session);
    bench.finish().await;
}

#[tokio::test]
async fn a_descriptor_where_none_belongs_and_none_where_one_does_cost_only_the_request() {
    let bench = bench().await;
    let session = bench.session().await;
    assert!(session.ask(add("a"), None).await.contains("0 descriptors; expected exactly the network namespace"));
    assert_eq!(session.add("a").await, "");
    for payload in [del("a"), keep("a"), Payload::SnapshotSent(SnapshotSent {})] {
        assert!(session.ask(payload, Some(namespace())).await.contains("1 descriptors; expected none"));
    }
    assert_eq!(bench.served(), [("a".to_owned(), "Up")]);
    assert_eq!(session.snapshot().await, "", "the session goes on");
    drop(session);
    bench.finish().await;
}

#[tokio::test]
async fn a_pod_kept_after_the_snapshot_ends_the_session_and_no_pod() {
    let bench = bench().await;
    let session = bench.session().await;
    assert_eq!(session.add("a").await, "");
    session.snapshot().await;
    assert!(session.ask(keep("a"), None).await.contains("KeepWorkload after SnapshotSent"));
    let session = bench.session().await;
    assert_eq!(bench.served(), [("a".to_owned(), "Up")]);
    drop(session);
    bench.finish().await;
}

#[tokio::test]
async fn answers_fit_the_agents_kilobyte_whatever_they_quote() {
    let bench = bench().await;
    let session = bench.session().await;
    // `raw` reads into 1,024 bytes; a longer answer would be cut, and not decode.
    let uid = "u".repeat(3000);
    let error = session.ask(Payload::Add(AddWorkload { uid, workload_info: None }), None).await;
    assert!(error.len() <= 900 && error.starts_with("AddWorkload of pod uuu"), "{error}");
    assert_eq!(session.add("a").await, "");
    drop(session);
    bench.finish().await;
}

#[tokio::test]
async fn an_agent_that_was_away_for_long_is_found_within_the_cap_and_takes_over() {
    let mut bench = bench().await;
    let session = bench.session().await;
    assert_eq!(session.add("a").await, "");
    session.snapshot().await;
    let path = bench.dir.path().join("zds.sock");
    // Its successor is another process: a new socket at the same place.
    std::fs::remove_file(&path).unwrap();
    let elsewhere = bench.dir.path().join("other.sock");
    bench.agent = SeqListener::bind(&elsewhere).unwrap();
    drop(session);
    // Only while no worker thread has anything to do: the paused clock would not wait for it.
    tokio::time::pause();
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert_eq!(bench.readiness.list(), ["workload proxy manager"]);
    assert_eq!(bench.served(), [("a".to_owned(), "Up")], "nothing is torn down meanwhile");
    bench.agent = SeqListener::bind(&path).unwrap();
    let back = Instant::now();
    let session = bench.session().await;
    assert!(back.elapsed() <= Duration::from_secs(1), "{:?}", back.elapsed());
    tokio::time::resume();
    assert_eq!(session.add("b").await, "");
    assert_eq!(session.snapshot().await, "");
    assert_eq!(bench.served(), [("b".to_owned(), "Up")], "the successor decides who stays");
    drop(session);
    bench.finish().await;
}

#[tokio::test]
async fn no_pod_is_taken_in_while_leaving() {
    let Bench { dir: _dir, agent, pods, drain, manager, certificates, .. } = bench().await;
    let stream = agent.accept().await.unwrap();
    let mut buffer = [0; 1024];
    stream.recv(&mut buffer).await.unwrap();
    assert_eq!(drain.drain(Duration::from_secs(10)).await, Drained::Complete);
    manager.await.unwrap();
    let add = WorkloadRequest { payload: Some(add("late")) }.encode_to_vec();
    stream.send(&add, Some(namespace().as_fd())).await.expect_err("nobody listens any more");
    assert!(pods.dump().is_empty());
    certificates.abort();
}
