use std::collections::HashMap;

use mesh_core::{
    identity::Identity,
    index::{Delta, Provenance, Resource},
    policy::{Action, Policy, Rule, Scope},
    workload::Workload,
};
use mesh_identity::{CaError, authority::SigningAuthority, ca::BoxFuture};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::*;

mod families;
mod routes;

struct TestCa(SigningAuthority);

impl CaClient for TestCa {
    fn sign(&self, identity: &Identity, csr_pem: String) -> BoxFuture<'_, Result<Vec<String>, CaError>> {
        let (identity, ttl) = (identity.clone(), Duration::from_secs(3600));
        Box::pin(async move {
            let now = std::time::SystemTime::now();
            self.0.sign(&csr_pem, &identity, ttl, now).map_err(|e| CaError::Refused(e.to_string()))
        })
    }
}

async fn start() -> App {
    let authority = SigningAuthority::generate("cluster.local").unwrap();
    App::start_with_ca(Config::default_for_tests(), Arc::new(TestCa(authority))).await.unwrap()
}

/// Status and body.
async fn ask(address: SocketAddr, request: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(format!("{request} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

async fn get(address: SocketAddr, path: &str) -> Value {
    let (status, body) = ask(address, &format!("GET {path}")).await;
    assert_eq!(status, 200, "{body}");
    serde_json::from_str(&body).unwrap()
}

/// `demo/test`, this proxy's workload, and `demo/web`, which a policy shields from it.
fn populate(app: &App) {
    let pod = |name: &str, address: [u8; 4]| {
        let mut workload = Workload::new(format!("Kubernetes//Pod/demo/{name}"), "demo", name);
        workload.service_account = name.into();
        workload.addresses = vec![address.into()];
        workload.tunnel_protocol = mesh_core::workload::TunnelProtocol::Hbone;
        workload
    };
    let mut web = pod("web", [10, 0, 0, 2]);
    web.authorization_policies = vec!["demo/shield".into()];
    let policy = Policy {
        name: "shield".into(),
        namespace: "demo".into(),
        scope: Scope::WorkloadSelector,
        action: Action::Deny,
        rules: vec![Rule::default()],
        dry_run: false,
        origin: Default::default(),
    };
    let upserts = vec![
        Resource::Workload(Arc::new(pod("test", [10, 0, 0, 1]))),
        Resource::Workload(Arc::new(web)),
        Resource::Policy(Arc::new(policy)),
    ];
    app.shared.state.update(|index| {
        index.apply(Delta { provenance: Provenance::Xds, upserts, removals: Vec::new() });
        index.set_policies_complete(true);
    });
}

#[tokio::test]
async fn starts_serves_its_ports_and_leaves_when_told() {
    let app = start().await;
    assert_eq!(ask(app.readiness, "GET /healthz/ready").await, (200, "ready\n".to_owned()));
    let (_, metrics) = ask(app.stats, "GET /stats/prometheus").await;
    assert!(metrics.contains("istio_build{component=\"ztunnel\""), "{metrics}");
    assert_eq!(ask(app.admin, "GET /quitquitquit").await.0, 405);
    assert_eq!(ask(app.admin, "POST /quitquitquit").await, (200, "shutdown now\n".to_owned()));
    app.quit.cancelled().await;
    let ports = [app.admin, app.stats, app.readiness];
    assert_eq!(app.stop().await, Drained::Complete);
    for port in ports {
        TcpStream::connect(port).await.expect_err("nothing listens any more");
    }
}

#[tokio::test]
async fn the_dump_shows_what_is_known_and_no_secret() {
    let app = start().await;
    populate(&app);
    let identity = Identity::new("cluster.local", "demo", "test");
    app.shared.identities.certificate(&identity, mesh_identity::Priority::RealTime).await.unwrap();
    let dump = get(app.admin, "/config_dump").await;
    assert_eq!(dump["workloads"][0]["name"], "test");
    assert_eq!(dump["policies"][0]["name"], "shield");
    assert_eq!(dump["certificates"][0]["state"], "Available");
    assert_eq!(dump["config"]["mode"], "dedicated");
    assert!(dump.get("workloadState").is_none(), "only shared proxies have one");
    assert!(!dump.to_string().contains("PRIVATE KEY"));
    app.stop().await;
}

#[tokio::test]
async fn why_answers_as_a_connection_would_be_decided() {
    let app = start().await;
    populate(&app);
    let outbound = "/debug/why/outbound?namespace=demo&pod=test&destination=10.0.0.2:80";
    let why = get(app.admin, outbound).await;
    assert_eq!(why["nextHop"]["type"], "hbone");
    assert_eq!(why["nextHop"]["tunnel"]["accepted"][0], "spiffe://cluster.local/ns/demo/sa/web");
    assert_eq!(why["decision"]["verdict"], "allow");
    assert_eq!((&why["farSide"]["verdict"], &why["farSide"]["policy"]), (&"deny".into(), &"demo/shield".into()));

    let inbound = "/debug/why/inbound?namespace=demo&pod=web&source_ip=10.0.0.1&destination=10.0.0.2:80\
        &source_identity=spiffe://cluster.local/ns/demo/sa/test";
    let why = get(app.admin, inbound).await;
    assert_eq!((&why["decision"]["reason"], &why["decision"]["policy"]), (&"denied".into(), &"demo/shield".into()));
    app.stop().await;
}

#[tokio::test]
async fn questions_that_cannot_be_answered_say_what_is_wrong() {
    let app = start().await;
    for (path, status, wanted) in [
        ("/debug/why/outbound?namespace=demo&pod=test", 400, "parameter `destination` is missing"),
        (
            "/debug/why/outbound?namespace=demo&pod=test&destination=web",
            400,
            "`destination` is `web`: expected IP:PORT",
        ),
        ("/debug/why/outbound?namespace=demo&pod=nobody&destination=10.0.0.2:80", 404, "no workload demo/nobody"),
        ("/debug/why/inbound?destination=10.0.0.2:80&source_ip=x", 400, "`source_ip` is `x`"),
    ] {
        let (got, body) = ask(app.admin, &format!("GET {path}")).await;
        assert!(got == status && body.contains(wanted), "{path}: {got} {body}");
    }
    app.stop().await;
}

#[tokio::test]
async fn a_port_that_is_taken_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut config = Config::default_for_tests();
    config.ports.admin = taken.local_addr().unwrap().port();
    let authority = SigningAuthority::generate("cluster.local").unwrap();
    let error = App::start_with_ca(config, Arc::new(TestCa(authority))).await.err().expect("the port is taken");
    assert!(format!("{error:#}").contains(&format!("failed to bind to address {}", taken.local_addr().unwrap())));
}

#[test]
fn a_bad_ca_address_is_refused_at_the_start() {
    let vars = HashMap::from([("CA_ADDRESS".to_owned(), "not an address".to_owned())]);
    let config = Config::from_env(&vars).unwrap();
    let error = certificate_authority(&config).expect_err("not an address");
    assert!(format!("{error:#}").starts_with("CA_ADDRESS: "), "{error:#}");
}

#[test]
fn only_an_owner_waits_for_listeners() {
    assert!(Role::Owner.waits_for().contains(&"proxy"));
    assert!(!Role::Standby.waits_for().contains(&"proxy"));
    assert!(Role::Relieved.waits_for().is_empty());
}

/// Never signs.
struct DeadCa;

impl CaClient for DeadCa {
    fn sign(&self, _: &Identity, _: String) -> BoxFuture<'_, Result<Vec<String>, CaError>> {
        Box::pin(std::future::ready(Err(CaError::Refused("dead".to_owned()))))
    }
}

#[tokio::test]
async fn certificates_outlive_a_restart_when_told_where() {
    let above = tempfile::tempdir().unwrap();
    let folder = above.path().join("keys");
    let config = || {
        let mut config = Config::default_for_tests();
        config.trust.keys_dir = Some(folder.clone());
        config
    };
    let authority = Arc::new(TestCa(SigningAuthority::generate("cluster.local").unwrap()));
    let identity = Identity::new("cluster.local", "demo", "test");
    let certificate = async |app: &App| {
        app.shared.identities.certificate(&identity, mesh_identity::Priority::RealTime).await.unwrap().chain.clone()
    };
    let app = App::start_with_ca(config(), authority).await.unwrap();
    let before = certificate(&app).await;
    app.stop().await;
    let app = App::start_with_ca(config(), Arc::new(DeadCa)).await.unwrap();
    assert_eq!(certificate(&app).await, before);
    app.stop().await;
    std::fs::set_permissions(&folder, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let error = App::start_with_ca(config(), Arc::new(DeadCa)).await.err().expect("open to others");
    let text = format!("{error:#}");
    assert!(text.starts_with("FAIRWAY_KEYS_DIR: ") && text.ends_with("expected 0700"), "{text}");
    let mut config = Config::default_for_tests();
    config.state_dir = Some(folder);
    let error = App::start_with_ca(config, Arc::new(DeadCa)).await.err().expect("open to others");
    assert!(format!("{error:#}").starts_with("FAIRWAY_STATE_DIR: "), "{error:#}");
}

#[tokio::test]
async fn revocation_lists_are_followed_from_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = Config::default_for_tests();
    config.trust.crl_path = Some(folder.path().join("ca-crl.pem"));
    let app = App::start_with_ca(config, Arc::new(DeadCa)).await.unwrap();
    let (_, metrics) = ask(app.stats, "GET /stats/prometheus").await;
    assert!(metrics.contains("fairway_crl_loads_total{result=\"missing\"} 1"), "{metrics}");
    let mut changes = app.shared.identities.trust().changes();
    changes.borrow_and_update();
    std::fs::write(folder.path().join("ca-crl.pem"), "").unwrap();
    tokio::time::timeout(Duration::from_secs(60), changes.changed()).await.expect("followed").unwrap();
    app.stop().await;
}

#[tokio::test]
async fn facts_written_beside_a_proxy_without_discovery_make_it_ready_and_are_enforced() {
    let text = "workloads: [{name: test, namespace: demo, serviceAccount: test, workloadIps: [10.0.0.1]}]\n\
        policies: [{name: shield, namespace: demo, scope: Namespace, action: Deny, dryRun: false, rules: [[]]}]";
    let source = crate::static_config::Source::Inline(text.to_owned());
    let config = Config { static_config: Some(source), ..Config::default_for_tests() };
    let authority = SigningAuthority::generate("cluster.local").unwrap();
    let app = App::start_with_ca(config, Arc::new(TestCa(authority))).await.unwrap();
    assert_eq!(ask(app.readiness, "GET /healthz/ready").await.0, 200);
    assert!(app.shared.state.snapshot().policies_complete());
    let dump = get(app.admin, "/config_dump").await;
    assert_eq!(dump["staticConfig"]["workloads"][0]["name"], "test");
    assert_eq!(dump["policies"][0]["name"], "shield");
    app.stop().await;
    let bad = Some(crate::static_config::Source::Inline("workload: []".to_owned()));
    let config = Config { static_config: bad, ..Config::default_for_tests() };
    let authority = SigningAuthority::generate("cluster.local").unwrap();
    let error = App::start_with_ca(config, Arc::new(TestCa(authority))).await.err().expect("an unknown key");
    assert!(format!("{error:#}").contains("LOCAL_XDS: "), "{error:#}");
}

#[tokio::test]
async fn why_asks_for_what_it_does_not_hold_as_a_connection_would() {
    let server = crate::discovery::tests::serve(&crate::discovery::tests::resources());
    let app = start().await;
    let life = server.tells(app.shared.state.clone(), |config| config.xds_on_demand = true);
    app.shared.state.demand().unwrap().fetch("c//Pod/demo/a".into()).await.unwrap();
    let why = get(app.admin, "/debug/why/outbound?namespace=demo&pod=a&destination=10.0.0.2:80").await;
    assert_eq!(why["destinationWorkload"]["name"], "b", "{why}");
    assert_eq!(why["farSide"]["policy"], "demo/shield", "{why}");
    life.end().await;
    app.stop().await;
}

#[tokio::test]
async fn a_proxy_that_is_switched_off_listens_for_no_traffic() {
    let authority = Arc::new(TestCa(SigningAuthority::generate("cluster.local").unwrap()));
    let config = Config { proxy: false, ..Config::default_for_tests() };
    let app = App::start_with_ca(config, authority).await.unwrap();
    let info = app.shared.config.workload.clone().unwrap();
    let pod = pods::start(&app.shared, info, None).await.unwrap();
    assert!(pod.listening().is_empty());
    drop(pod);
    assert_eq!(ask(app.readiness, "GET /healthz/ready").await.0, 200);
    assert_eq!(app.stop().await, Drained::Complete);
}

#[tokio::test]
async fn readiness_names_what_is_waited_for() {
    let vars =
        [("PROXY_MODE", "dedicated"), ("PROXY_WORKLOAD_INFO", "demo/test/test"), ("XDS_ADDRESS", "http://127.0.0.1:1")];
    let vars: HashMap<String, String> = vars.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
    let mut config = Config::default_for_tests();
    config.xds = Config::from_env(&vars).unwrap().xds;
    let app = App::start_with_ca(config, Arc::new(DeadCa)).await.unwrap();
    let pending = (500, "not ready, pending: state manager\n".to_owned());
    assert_eq!(ask(app.readiness, "GET /healthz/ready").await, pending);
    app.stop().await;
}
