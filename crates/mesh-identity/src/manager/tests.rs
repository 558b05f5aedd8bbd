use std::{
    sync::{Mutex, atomic::AtomicUsize},
    time::Duration,
};

use mesh_runtime::private::PrivateFolder;

use super::*;
use crate::{authority::SigningAuthority, ca::BoxFuture};

const TTL: Duration = Duration::from_secs(10);
const ANSWER_TIME: Duration = Duration::from_millis(50);

/// Lets virtual time pass: every test here runs on a paused clock, which jumps to the next timer once no task can go on. Nobody waits.
async fn pass(time: Duration) {
    tokio::time::sleep(time).await;
}

/// A CA on a paused clock that can be made to refuse.
struct FakeCa {
    authority: SigningAuthority,
    clock: Arc<dyn Fn() -> SystemTime + Send + Sync>,
    asked: AtomicUsize,
    down: Mutex<bool>,
    ttl: Mutex<Duration>,
}

impl CaClient for FakeCa {
    fn sign(&self, identity: &Identity, csr_pem: String) -> BoxFuture<'_, Result<Vec<String>, CaError>> {
        let identity = identity.clone();
        Box::pin(async move {
            self.asked.fetch_add(1, Ordering::SeqCst);
            pass(ANSWER_TIME).await;
            if *self.down.lock().unwrap() {
                return Err(CaError::Refused("down".to_owned()));
            }
            let ttl = *self.ttl.lock().unwrap();
            Ok(self.authority.sign(&csr_pem, &identity, ttl, (self.clock)()).unwrap())
        })
    }
}

fn start() -> (Manager, Arc<FakeCa>, tokio::task::JoinHandle<()>) {
    start_with(None)
}

fn start_with(store: Option<Arc<KeyStore>>) -> (Manager, Arc<FakeCa>, tokio::task::JoinHandle<()>) {
    let (origin, base) = (Instant::now(), SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000));
    let clock: Arc<dyn Fn() -> SystemTime + Send + Sync> = Arc::new(move || base + origin.elapsed());
    let authority = SigningAuthority::generate("cluster.local").unwrap();
    let ca = Arc::new(FakeCa {
        authority,
        clock: clock.clone(),
        asked: AtomicUsize::new(0),
        down: Mutex::new(false),
        ttl: Mutex::new(TTL),
    });
    let (manager, task) = Manager::new(Config { clock, store, ..Config::default() }, ca.clone());
    (manager, ca, tokio::spawn(task))
}

fn identity() -> Identity {
    Identity::new("cluster.local", "demo", "client")
}

#[tokio::test(start_paused = true)]
async fn many_waiters_share_one_request() {
    let (manager, ca, _task) = start();
    let (manager, identity) = (&manager, &identity());
    let all = futures_util::future::join_all((0..50).map(|_| manager.certificate(identity, Priority::RealTime)));
    let generations: Vec<u64> = all.await.into_iter().map(|svid| svid.unwrap().generation).collect();
    assert_eq!(generations, [1; 50]);
    assert_eq!(ca.asked.load(Ordering::SeqCst), 1);
    assert_eq!(manager.entries()[0].state, EntryState::Available);
}

#[tokio::test(start_paused = true)]
async fn ten_second_certificates_never_lapse() {
    let (manager, ca, _task) = start();
    let mut last = manager.certificate(&identity(), Priority::RealTime).await.unwrap().generation;
    for _ in 0..120 {
        pass(Duration::from_secs(1)).await;
        let svid = manager.cached(&identity()).expect("a valid certificate at every moment");
        assert!(svid.generation >= last);
        last = svid.generation;
    }
    let asked = ca.asked.load(Ordering::SeqCst);
    assert!((12..=25).contains(&asked), "{asked} requests in two minutes");
}

#[tokio::test(start_paused = true)]
async fn a_valid_certificate_survives_failed_renewals() {
    let (manager, ca, _task) = start();
    let first = manager.certificate(&identity(), Priority::RealTime).await.unwrap();
    *ca.down.lock().unwrap() = true;
    pass(Duration::from_millis(9500)).await;
    assert!(ca.asked.load(Ordering::SeqCst) > 1, "renewal was tried");
    assert!(Arc::ptr_eq(&manager.cached(&identity()).unwrap(), &first));
    assert_eq!(manager.entries()[0].state, EntryState::Available);
    pass(Duration::from_secs(10)).await;
    assert!(manager.cached(&identity()).is_none(), "an expired certificate is not handed out");
    *ca.down.lock().unwrap() = false;
    assert!(manager.certificate(&identity(), Priority::RealTime).await.unwrap().generation > first.generation);
}

#[tokio::test(start_paused = true)]
async fn failure_reaches_every_waiter_and_a_later_connection_shortens_the_back_off() {
    let (manager, ca, _task) = start();
    *ca.down.lock().unwrap() = true;
    let (a, b) = (identity(), identity());
    let (a, b) = tokio::join!(manager.certificate(&a, Priority::RealTime), manager.certificate(&b, Priority::RealTime));
    assert!(a.is_err() && b.is_err());
    // Let the back-off grow, then ask: the answer comes long before the next planned attempt.
    pass(Duration::from_secs(300)).await;
    *ca.down.lock().unwrap() = false;
    let asked = Instant::now();
    manager.certificate(&identity(), Priority::RealTime).await.unwrap();
    assert!(asked.elapsed() <= Duration::from_millis(1100));
}

#[tokio::test(start_paused = true)]
async fn forgetting_answers_waiters_and_stops_renewal() {
    let (manager, ca, _task) = start();
    let (waiter, identity) = (manager.clone(), identity());
    let wanted = identity.clone();
    let waiting = tokio::spawn(async move { waiter.certificate(&wanted, Priority::RealTime).await });
    pass(ANSWER_TIME / 2).await;
    manager.forget(&identity);
    assert!(matches!(waiting.await.unwrap(), Err(IdentityError::Forgotten)));
    pass(Duration::from_secs(60)).await;
    assert_eq!(ca.asked.load(Ordering::SeqCst), 1);
    assert!(manager.entries().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_restart_while_the_ca_is_away_costs_no_certificate_and_renewal_goes_on() {
    let above = tempfile::tempdir().unwrap();
    let store = Arc::new(KeyStore::new(PrivateFolder::open(&above.path().join("keys")).unwrap()));
    let (manager, _ca, task) = start_with(Some(store.clone()));
    let (wanted, gone) = (identity(), Identity::new("cluster.local", "demo", "gone"));
    let before = manager.certificate(&wanted, Priority::RealTime).await.unwrap();
    manager.certificate(&gone, Priority::RealTime).await.unwrap();
    manager.forget(&gone);
    drop(manager);
    task.await.unwrap();

    let (manager, ca, _task) = start_with(Some(store));
    *ca.down.lock().unwrap() = true;
    assert!(manager.certificate(&gone, Priority::RealTime).await.is_err(), "forgotten");
    assert!(manager.entries().iter().all(|entry| entry.identity == gone), "nobody has asked yet");
    let after = manager.certificate(&wanted, Priority::RealTime).await.unwrap();
    assert_eq!(after.chain, before.chain);
    *ca.down.lock().unwrap() = false;
    pass(TTL).await;
    let renewed = manager.cached(&wanted).expect("renewed in time");
    assert!(renewed.generation > after.generation && renewed.chain != after.chain);
}

#[tokio::test(start_paused = true)]
async fn the_task_ends_with_its_last_handle() {
    let (manager, _ca, task) = start();
    manager.warm(identity());
    drop(manager);
    task.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_node_full_of_pods_announced_at_once_gets_every_certificate() {
    const PODS: usize = 5000;
    let (manager, ca, _task) = start();
    *ca.ttl.lock().unwrap() = Duration::from_secs(24 * 3600);
    let account = |i: usize| Identity::new("cluster.local", "demo", format!("account-{i}"));
    for i in 0..PODS {
        manager.warm(account(i));
    }
    let held = || manager.entries().iter().filter(|entry| entry.state == EntryState::Available).count();
    let mut steps = 0;
    while held() < PODS {
        pass(Duration::from_secs(10)).await;
        steps += 1;
        assert!(steps < PODS, "{} of {PODS}", held());
    }
    assert_eq!(ca.asked.load(Ordering::SeqCst), PODS, "each once");
}

#[tokio::test(start_paused = true)]
async fn the_last_word_on_an_identity_counts() {
    let (manager, ca, _task) = start();
    let (kept, gone) = (identity(), Identity::new("cluster.local", "demo", "gone"));
    manager.forget(&kept);
    manager.warm(kept.clone());
    manager.warm(gone.clone());
    manager.forget(&gone);
    pass(ANSWER_TIME * 2).await;
    assert_eq!(manager.entries().iter().map(|entry| &entry.identity).collect::<Vec<_>>(), [&kept]);
    // Asked for after it was given up, in one breath: it is wanted.
    manager.forget(&gone);
    manager.certificate(&gone, Priority::RealTime).await.unwrap();
    assert_eq!(ca.asked.load(Ordering::SeqCst), 2);
}
