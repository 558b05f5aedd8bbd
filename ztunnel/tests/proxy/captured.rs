//! Capture for real: pods with namespaces and redirect rules of their own. Each test runs itself again as root of fresh namespaces;
//! where the kernel refuses, it prints a line that says so and passes, unless `FAIRWAY_CI=1`.

use std::{
    env,
    net::{IpAddr, SocketAddr},
    process::Command,
};

use mesh_core::{
    index::Resource,
    policy::{Action, Clause, Match, Policy, StringMatch},
};
use mesh_net::{
    NetNs, SocketOptions,
    isolate::Isolated,
    link::{Family as RuleFamily, Netlink, Route, RouteKind, Rule as RoutingRule},
    nft::{Batch, Chain, ChainType, Family, Hook, Nft, Rule},
    sockets::{connect, listen_tcp, tcp_socket},
};
use tokio::{
    join,
    net::{TcpListener, TcpStream},
};
use ztunnel::pods::Protocol;

use crate::{
    dns,
    mesh::{Mesh, PATIENCE, expect_reset, expect_reset_early, policy, samples, service},
    ping_pong,
};

const STAGE: &str = "FAIRWAY_TEST_STAGE";
const FIRST: [&str; 2] = ["10.1.1.1", "fd00::1"];
const SECOND: [&str; 2] = ["10.1.1.2", "fd00::2"];

/// Runs `body` as root of fresh namespaces. `name` is the test's full name.
fn in_namespaces(name: &str, body: impl Future<Output = ()>) {
    if env::var(STAGE).is_ok() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        return runtime.block_on(body);
    }
    let mut isolated = Isolated::new(env::current_exe().expect("this test binary"));
    let command: &mut Command = isolated.command();
    command.args([name, "--exact", "--nocapture"]).env(STAGE, "1");
    isolated.die_with_parent();
    match isolated.spawn() {
        Ok(mut child) => assert!(child.wait().expect("wait").success(), "see above"),
        Err(refusal) if env::var("FAIRWAY_CI").is_ok_and(|v| v == "1") => panic!("{refusal}: {}", refusal.source),
        Err(refusal) => println!("skipped: {refusal}: {}", refusal.source),
    }
}

/// Two namespaces joined by a veth pair, with [`FIRST`] and [`SECOND`] for addresses.
fn two_namespaces() -> (NetNs, NetNs) {
    let (a, b) = (NetNs::create().expect("namespace"), NetNs::create().expect("namespace"));
    Netlink::in_ns(&a).expect("netlink").add_veth("eth0", "eth0", Some(&b), None).expect("veth");
    for (ns, addresses) in [(&a, FIRST), (&b, SECOND)] {
        let mut netlink = Netlink::in_ns(ns).expect("netlink");
        let index = netlink.index("eth0").expect("eth0");
        for (address, length) in addresses.iter().zip([24, 64]) {
            netlink.add_address(index, format!("{address}/{length}").parse().expect("address")).expect("add address");
        }
        netlink.set_up(index).expect("up");
    }
    (a, b)
}

/// Redirects as the node agent installs them, and the way home for answers to addresses that are not the pod's.
fn capture(pod: &NetNs) {
    let (mark, from_proxy) = (0x111, 0x539);
    let mut batch = Batch::new(Family::Inet);
    batch.add_table("t");
    batch.add_chain("t", &Chain::base("mangle-pre", ChainType::Filter, Hook::Prerouting, -150));
    batch.add_chain("t", &Chain::base("mangle-out", ChainType::Route, Hook::Output, -150));
    batch.add_chain("t", &Chain::base("nat-pre", ChainType::Nat, Hook::Prerouting, -100));
    batch.add_chain("t", &Chain::base("nat-out", ChainType::Nat, Hook::Output, -100));
    batch.add_rule("t", "mangle-pre", &Rule::new("").mark(from_proxy, 0xfff).set_ct_mark(mark, 0xfff));
    batch.add_rule("t", "mangle-out", &Rule::new("").ct_mark(mark, 0xfff).restore_mark());
    batch.add_rule("t", "nat-pre", &Rule::new("").not_mark(from_proxy, 0xfff).tcp().not_dport(15008).redirect(15006));
    let dns = Rule::new("").not_oifname("lo").udp().dport(53).not_mark(from_proxy, 0xfff);
    batch.add_rule("t", "nat-out", &dns.redirect(15053));
    batch.add_rule("t", "nat-out", &Rule::new("").mark(mark, 0xfff).accept());
    batch.add_rule("t", "nat-out", &Rule::new("").not_oifname("lo").not_mark(from_proxy, 0xfff).tcp().redirect(15001));
    Nft::in_ns(pod).expect("netlink").apply(batch).expect("rules");
    let mut netlink = Netlink::in_ns(pod).expect("netlink");
    let lo = netlink.index("lo").expect("lo");
    for (family, any) in [(RuleFamily::V4, "0.0.0.0/0"), (RuleFamily::V6, "::/0")] {
        netlink.add_rule(&RoutingRule { family, mark, mask: 0xfff, priority: 32764, table: 100 }).expect("rule");
        let dst = any.parse().expect("any");
        netlink.add_route(&Route { dst, via: None, dev: Some(lo), table: 100, kind: RouteKind::Local }).expect("route");
    }
}

fn ips(addresses: [&str; 2]) -> [IpAddr; 2] {
    addresses.map(|address| address.parse().expect("address"))
}

fn listen(ns: &NetNs, ip: IpAddr) -> (TcpListener, SocketAddr) {
    let (listener, _) = listen_tcp(Some(ns), SocketAddr::new(ip, 0), 16, &SocketOptions::default()).expect("listen");
    let address = listener.local_addr().expect("address");
    (TcpListener::from_std(listener).expect("register"), address)
}

async fn try_dial(ns: &NetNs, to: SocketAddr) -> std::io::Result<TcpStream> {
    connect(tcp_socket(Some(ns), None, to, &SocketOptions::default())?, to, PATIENCE).await
}

async fn dial(ns: &NetNs, to: SocketAddr) -> TcpStream {
    try_dial(ns, to).await.expect("connected")
}

#[test]
fn captured_pods_speak_hbone_and_applications_see_the_clients_address() {
    in_namespaces("captured::captured_pods_speak_hbone_and_applications_see_the_clients_address", async {
        let (first, second) = two_namespaces();
        let mesh = Mesh::new();
        let client = mesh.pod_in(&first, "client", &ips(FIRST)).await;
        let server = mesh.pod_in(&second, "server", &ips(SECOND)).await;
        capture(&first);
        capture(&second);
        for (from, to) in ips(FIRST).into_iter().zip(ips(SECOND)) {
            let (listener, address) = listen(&second, to);
            let (mut near, accepted) = join!(dial(&first, address), listener.accept());
            let (mut far, peer) = accepted.expect("accept");
            assert_eq!(peer.ip(), from);
            ping_pong(&mut near, &mut far).await;
            let open = server.handle.connections().inbound;
            assert!(open.iter().any(|c| c.protocol == Protocol::Hbone && c.actual_dst == address), "{open:?}");
        }
        drop(client);
    });
}

#[test]
fn a_captured_query_is_answered_or_goes_as_the_pods_own_to_whom_the_application_asked() {
    in_namespaces(
        "captured::a_captured_query_is_answered_or_goes_as_the_pods_own_to_whom_the_application_asked",
        async {
            let (first, second) = two_namespaces();
            let mesh = Mesh::new();
            let _client = mesh.pod_in(&first, "client", &ips(FIRST)).await;
            mesh.upsert([service("web", [240, 0, 0, 1], 80)]);
            capture(&first);
            for (own, nameserver) in ips(FIRST).into_iter().zip(ips(SECOND)) {
                assert_eq!(dns::captured(&first, &second, nameserver).await, own);
            }
        },
    );
}

#[test]
fn captured_plaintext_reaches_the_application_until_a_policy_wants_identities() {
    in_namespaces("captured::captured_plaintext_reaches_the_application_until_a_policy_wants_identities", async {
        let (outsider, inside) = two_namespaces();
        let mesh = Mesh::new();
        let server = mesh.pod_in(&inside, "server", &ips(SECOND)).await;
        capture(&inside);
        let (listener, address) = listen(&inside, ips(SECOND)[0]);
        let (mut near, accepted) = join!(dial(&outsider, address), listener.accept());
        let (mut far, peer) = accepted.expect("accept");
        assert_eq!(peer.ip(), ips(FIRST)[0]);
        ping_pong(&mut near, &mut far).await;
        assert_eq!(server.handle.connections().inbound[0].protocol, Protocol::Tcp);
        mesh.upsert([Resource::Policy(strict().into())]);
        expect_reset(&mut near).await;
        expect_reset(&mut far).await;
        expect_reset_early(try_dial(&outsider, address).await).await;
    });
}

/// What PeerAuthentication STRICT becomes: denies whoever has no identity.
#[test]
fn a_pod_that_dials_its_own_capture_port_does_not_loop() {
    in_namespaces("captured::a_pod_that_dials_its_own_capture_port_does_not_loop", async {
        let (first, _second) = two_namespaces();
        let [indexed, unknown] = ips(FIRST);
        let mesh = Mesh::new();
        let client = mesh.pod_in(&first, "client", &[indexed]).await;
        for ip in [indexed, unknown] {
            expect_reset_early(try_dial(&first, SocketAddr::new(ip, 15001)).await).await;
        }
        let metrics = client.finish().await;
        let failures = "fairway_connection_failures_total";
        assert_eq!(samples(&metrics, failures, &[r#"reason="bad_target""#, " 2"]).len(), 1, "{metrics}");
    });
}

fn strict() -> Policy {
    let anonymous = Match { not_principals: vec![StringMatch::Presence], ..Match::default() };
    let mut policy = policy("strict", Action::Deny, &[]);
    policy.rules[0].clauses = vec![Clause { matches: vec![anonymous] }];
    policy
}
