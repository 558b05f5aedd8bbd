//! The rules in a real namespace: what is captured, what is left alone, and what remains after leaving (nothing).

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    process::ExitCode,
    time::{Duration, SystemTime},
};

use cni_plugin::{
    plugin,
    rules::{
        Options, RulesError, apply, captured_flows, flush_redirects, host, model, older_flows, remove, verify,
        verify_installed,
    },
};
use mesh_net::{
    NetNs, SocketOptions,
    isolate::test_main,
    link::{Netlink, Route},
    nft::{Batch, Chain, ChainType, Family, Hook, Nft, Rule},
    sockets::{self, listen_tcp, tcp_socket},
};

const LIMIT: Duration = Duration::from_secs(10);
const POD: &str = "10.1.1.1";
const PEER: &str = "10.1.1.2";

fn main() -> ExitCode {
    test_main(&[
        (
            "new_connections_reach_ztunnel_and_keep_their_destination",
            new_connections_reach_ztunnel_and_keep_their_destination,
        ),
        ("what_must_not_be_captured_is_not", what_must_not_be_captured_is_not),
        (
            "ztunnel_reaches_the_application_under_the_clients_address",
            ztunnel_reaches_the_application_under_the_clients_address,
        ),
        ("flows_older_than_the_enrolment_go_on", flows_older_than_the_enrolment_go_on),
        ("leaving_spares_captured_flows_and_leaves_no_trace", leaving_spares_captured_flows_and_leaves_no_trace),
        ("a_rule_deleted_by_hand_is_noticed_and_repaired", a_rule_deleted_by_hand_is_noticed_and_repaired),
        (
            "a_pod_without_ipv6_is_captured_for_ipv4_and_half_of_it_is_refused",
            a_pod_without_ipv6_is_captured_for_ipv4_and_half_of_it_is_refused,
        ),
        ("bypassing_inbound_capture_leaves_inbound_alone", bypassing_inbound_capture_leaves_inbound_alone),
        (
            "rules_of_istios_agent_are_taken_over_under_open_flows",
            rules_of_istios_agent_are_taken_over_under_open_flows,
        ),
        ("a_sidecars_rules_are_left_alone", a_sidecars_rules_are_left_alone),
        (
            "probes_of_the_node_pass_by_and_its_other_traffic_does_not",
            probes_of_the_node_pass_by_and_its_other_traffic_does_not,
        ),
    ])
}

/// A pod and a peer outside of it.
fn pod_and_peer() -> (NetNs, NetNs) {
    let (pod, peer) = (NetNs::create().expect("namespace"), NetNs::create().expect("namespace"));
    Netlink::in_ns(&pod).expect("netlink").add_veth("eth0", "eth0", Some(&peer), None).expect("veth");
    let addresses = [(&pod, [POD, "fd00::1"]), (&peer, [PEER, "fd00::2"])];
    for (ns, [v4, v6]) in addresses {
        let mut netlink = Netlink::in_ns(ns).expect("netlink");
        let index = netlink.index("eth0").expect("eth0");
        netlink.add_address(index, format!("{v4}/24").parse().expect("net")).expect("address");
        netlink.add_address(index, format!("{v6}/64").parse().expect("net")).expect("address");
        netlink.set_up(index).expect("up");
    }
    let probe = "169.254.7.127/32".parse().expect("net");
    let mut netlink = Netlink::in_ns(&peer).expect("netlink");
    let index = netlink.index("eth0").expect("eth0");
    netlink.add_address(index, probe).expect("address");
    // Like every pod: the kernel looks up the way back to a client before rules may redirect it.
    let via = Some(PEER.parse().expect("ip"));
    let default = Route { via, ..Route::new("0.0.0.0/0".parse().expect("net")) };
    Netlink::in_ns(&pod).expect("netlink").add_route(&default).expect("route");
    (pod, peer)
}

fn address(text: &str) -> SocketAddr {
    text.parse().expect("address")
}

fn listen(ns: &NetNs, at: &str) -> TcpListener {
    ns.run(|| TcpListener::bind(address(at))).expect("enter").expect("bind")
}

/// As ztunnel listens: dual-stack, marked.
fn proxy(ns: &NetNs, port: u16) -> TcpListener {
    let options = SocketOptions { mark: Some(model::PROXY_MARK), ..Default::default() };
    let (listener, _) = listen_tcp(Some(ns), address(&format!("[::]:{port}")), 16, &options).expect("listen");
    listener.set_nonblocking(false).expect("blocking");
    listener
}

fn dial(ns: &NetNs, to: &str) -> TcpStream {
    try_dial(ns, to).unwrap_or_else(|e| panic!("cannot reach {to}: {e}"))
}

fn try_dial(ns: &NetNs, to: &str) -> std::io::Result<TcpStream> {
    ns.run(|| TcpStream::connect_timeout(&address(to), LIMIT))?
}

fn dial_from(ns: &NetNs, from: &str, to: &str, mark: Option<u32>) -> TcpStream {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    let source: IpAddr = from.parse().expect("ip");
    let options = SocketOptions { mark, ..Default::default() };
    let socket = tcp_socket(Some(ns), Some(source), address(to), &options).expect("socket");
    let stream = runtime.block_on(sockets::connect(socket, address(to), LIMIT)).expect("connect");
    let stream = stream.into_std().expect("std");
    stream.set_nonblocking(false).expect("blocking");
    stream
}

fn accept(listener: &TcpListener) -> TcpStream {
    let (stream, _) = listener.accept().expect("accept");
    stream.set_read_timeout(Some(LIMIT)).expect("timeout");
    stream
}

fn passes_both_ways(a: &mut TcpStream, b: &mut TcpStream) {
    for (mut from, mut to) in [(&*a, &*b), (&*b, &*a)] {
        from.write_all(b"ping").expect("write");
        let mut buffer = [0; 4];
        to.set_read_timeout(Some(LIMIT)).expect("timeout");
        to.read_exact(&mut buffer).expect("read");
        assert_eq!(&buffer, b"ping");
    }
}

fn new_connections_reach_ztunnel_and_keep_their_destination() {
    let (pod, peer) = pod_and_peer();
    assert!(apply(&pod, &Options::default()).expect("apply"));
    let (outbound, inbound, hbone) = (proxy(&pod, 15001), proxy(&pod, 15006), proxy(&pod, 15008));
    for to in ["10.1.1.2:80", "[fd00::2]:80"] {
        let mut client = dial(&pod, to);
        let mut captured = accept(&outbound);
        assert_eq!(sockets::original_dst(&captured).expect("destination"), address(to));
        passes_both_ways(&mut client, &mut captured);
    }
    for to in ["10.1.1.1:80", "[fd00::1]:80"] {
        let mut client = dial(&peer, to);
        let mut captured = accept(&inbound);
        assert_eq!(sockets::original_dst(&captured).expect("destination"), address(to));
        passes_both_ways(&mut client, &mut captured);
    }
    let _client = dial(&peer, "10.1.1.1:15008");
    assert_eq!(sockets::original_dst(&accept(&hbone)).expect("destination"), address("10.1.1.1:15008"));
}

fn what_must_not_be_captured_is_not() {
    let (pod, peer) = pod_and_peer();
    apply(&pod, &Options::default()).expect("apply");
    let (app, elsewhere) = (listen(&pod, "0.0.0.0:80"), listen(&peer, "10.1.1.2:80"));
    let mut streams = vec![
        // its own loopback, its own address
        (dial(&pod, "127.0.0.1:80"), accept(&app)),
        (dial(&pod, "10.1.1.1:80"), accept(&app)),
        // the kubelet's probe
        (dial_from(&peer, "169.254.7.127", "10.1.1.1:80", None), accept(&app)),
        // ztunnel's own connections
        (dial_from(&pod, POD, "10.1.1.2:80", Some(model::PROXY_MARK)), accept(&elsewhere)),
    ];
    for (client, server) in &mut streams {
        passes_both_ways(client, server);
    }
}

fn ztunnel_reaches_the_application_under_the_clients_address() {
    let (pod, _peer) = pod_and_peer();
    apply(&pod, &Options::default()).expect("apply");
    let app = listen(&pod, "0.0.0.0:80");
    let _inbound = proxy(&pod, 15006);
    for client in [PEER, "10.9.9.9"] {
        let mut ztunnel = dial_from(&pod, client, "10.1.1.1:80", Some(model::PROXY_MARK));
        let mut served = accept(&app);
        assert_eq!(served.peer_addr().expect("peer").ip().to_string(), client);
        passes_both_ways(&mut ztunnel, &mut served);
    }
}

fn flows_older_than_the_enrolment_go_on() {
    let (pod, peer) = pod_and_peer();
    let (app, elsewhere) = (listen(&pod, "10.1.1.1:80"), listen(&peer, "10.1.1.2:80"));
    let mut out = (dial(&pod, "10.1.1.2:80"), accept(&elsewhere));
    let mut inward = (dial(&peer, "10.1.1.1:80"), accept(&app));
    passes_both_ways(&mut out.0, &mut out.1);
    apply(&pod, &Options::default()).expect("apply");
    assert_eq!((older_flows(&pod).expect("flows"), captured_flows(&pod).expect("flows")), (2, 0));
    // Each direction may be the first to be seen by the new rules.
    passes_both_ways(&mut out.0, &mut out.1);
    passes_both_ways(&mut inward.0, &mut inward.1);
    let outbound = proxy(&pod, 15001);
    let _new = dial(&pod, "10.1.1.2:80");
    let _captured = accept(&outbound);
    assert_eq!((older_flows(&pod).expect("flows"), captured_flows(&pod).expect("flows")), (3, 1));
}

fn leaving_spares_captured_flows_and_leaves_no_trace() {
    let (pod, peer) = pod_and_peer();
    apply(&pod, &Options::default()).expect("apply");
    let (outbound, app) = (proxy(&pod, 15001), listen(&pod, "0.0.0.0:80"));
    let mut captured = (dial(&pod, "10.1.1.2:80"), accept(&outbound));
    let mut spoofed = (dial_from(&pod, "10.9.9.9", "10.1.1.1:80", Some(model::PROXY_MARK)), accept(&app));
    flush_redirects(&pod).expect("flush");
    flush_redirects(&pod).expect("a second time is no error");
    passes_both_ways(&mut captured.0, &mut captured.1);
    passes_both_ways(&mut spoofed.0, &mut spoofed.1);
    let elsewhere = listen(&peer, "10.1.1.2:80");
    let (mut direct, mut served) = (dial(&pod, "10.1.1.2:80"), accept(&elsewhere));
    passes_both_ways(&mut direct, &mut served);
    assert_eq!(captured_flows(&pod).expect("flows"), 1);

    remove(&pod).expect("remove");
    remove(&pod).expect("a second time is no error");
    assert_eq!(Nft::in_ns(&pod).expect("netlink").tables(model::FAMILY).expect("tables"), Vec::<String>::new());
    let mut netlink = Netlink::in_ns(&pod).expect("netlink");
    assert_eq!(netlink.rules().expect("rules"), []);
    assert_eq!(netlink.routes(model::ROUTE_TABLE).expect("routes"), []);
    passes_both_ways(&mut direct, &mut served);
    flush_redirects(&pod).expect("nothing to flush is no error");
    assert!(!verify_installed(&pod).expect("no rules, no mismatch"));
}

/// As iptables-nft would have it: base chains that jump to chains of Istio's.
fn iptables(pod: &NetNs, family: Family, chains: [(&str, Hook, &str); 2], outbound: u16) {
    let mut batch = Batch::new(family);
    batch.add_table("nat");
    for (base, hook, chain) in chains {
        batch.add_chain("nat", &Chain::base(base, ChainType::Nat, hook, -100));
        batch.add_chain("nat", &Chain::regular(chain));
        batch.add_rule("nat", base, &Rule::new("").jump(chain));
    }
    batch.add_rule("nat", chains[1].2, &Rule::new("").tcp().redirect(outbound));
    batch.add_rule("nat", "OUTPUT", &Rule::new("the pod's own").tcp().accept());
    Nft::in_ns(pod).expect("netlink").apply(batch).expect("apply");
}

fn rules_of_istios_agent_are_taken_over_under_open_flows() {
    let (pod, peer) = pod_and_peer();
    let chains = [("PREROUTING", Hook::Prerouting, "ISTIO_PRERT"), ("OUTPUT", Hook::Output, "ISTIO_OUTPUT")];
    for family in [Family::Ip, Family::Ip6] {
        iptables(&pod, family, chains, 15001);
    }
    let outbound = proxy(&pod, 15001);
    let mut older = (dial(&pod, "10.1.1.2:80"), accept(&outbound));

    assert!(apply(&pod, &Options::default()).expect("apply"));
    passes_both_ways(&mut older.0, &mut older.1);
    let mut newer = (dial(&pod, "10.1.1.2:80"), accept(&outbound));
    passes_both_ways(&mut newer.0, &mut newer.1);
    assert!(!apply(&pod, &Options::default()).expect("apply"), "nothing is left to change");
    // Istio's agent was there once more, and wrote only its own.
    iptables(&pod, Family::Ip, chains, 15001);
    assert!(apply(&pod, &Options::default()).expect("apply"));

    remove(&pod).expect("remove");
    let mut nft = Nft::in_ns(&pod).expect("netlink");
    for family in [Family::Ip, Family::Ip6] {
        assert_eq!(nft.chains(family, "nat").expect("chains"), ["PREROUTING", "OUTPUT"]);
        let rules = nft.rules(family, "nat").expect("rules");
        assert!(rules.iter().all(|rule| rule.comment == "the pod's own"), "{rules:?}");
    }
    let elsewhere = listen(&peer, "10.1.1.2:80");
    let (mut direct, mut served) = (dial(&pod, "10.1.1.2:80"), accept(&elsewhere));
    passes_both_ways(&mut direct, &mut served);
}

fn a_sidecars_rules_are_left_alone() {
    let (pod, _peer) = pod_and_peer();
    let chains = [("PREROUTING", Hook::Prerouting, "ISTIO_INBOUND"), ("OUTPUT", Hook::Output, "ISTIO_OUTPUT")];
    iptables(&pod, Family::Ip, chains, 15001);
    let rules = || Nft::in_ns(&pod).expect("netlink").rules(Family::Ip, "nat").expect("rules");
    let before = rules();
    apply(&pod, &Options::default()).expect("apply");
    remove(&pod).expect("remove");
    assert_eq!(rules(), before);
}

fn cni_check(pod: &NetNs) -> bool {
    let path = "/run/pod-netns";
    if !fs::exists(path).expect("stat") {
        pod.bind_mount(path).expect("mount");
    }
    let args = "K8S_POD_NAMESPACE=demo;K8S_POD_NAME=app";
    let vars = [
        ("CNI_COMMAND", "CHECK"),
        ("CNI_CONTAINERID", "c"),
        ("CNI_NETNS", path),
        ("CNI_IFNAME", "eth0"),
        ("CNI_ARGS", args),
    ];
    let vars: HashMap<String, String> = vars.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    let conf = br#"{"cniVersion":"1.1.0","cni_agent_run_dir":"/run/none","prevResult":{"cniVersion":"1.1.0"}}"#;
    !plugin::run(&vars, conf, SystemTime::now()).failed
}

fn a_rule_deleted_by_hand_is_noticed_and_repaired() {
    let (pod, _peer) = pod_and_peer();
    let options = Options::default();
    assert!(cni_check(&pod), "a pod that was never captured");
    assert!(apply(&pod, &options).expect("apply"));
    assert!(!apply(&pod, &options).expect("apply"), "a second time changes nothing");
    assert!(cni_check(&pod));
    let mut nft = Nft::in_ns(&pod).expect("netlink");
    let count = |nft: &mut Nft| {
        let mut rules = nft.rules(model::FAMILY, model::NAT).expect("rules");
        rules.extend(nft.rules(model::FAMILY, model::MANGLE).expect("rules"));
        rules
    };
    for victim in count(&mut nft) {
        let again = count(&mut nft).into_iter().find(|r| r.comment == victim.comment && r.table == victim.table);
        let handle = again.expect("repaired").handle;
        let mut by_hand = Batch::new(model::FAMILY);
        by_hand.delete_rule(&victim.table, &victim.chain, handle);
        nft.apply(by_hand).expect("delete");
        assert!(!cni_check(&pod), "{victim:?} is missing");
        assert!(matches!(verify(&pod, &options), Err(RulesError::Mismatch(_))));
        assert!(apply(&pod, &options).expect("apply"));
        assert!(cni_check(&pod));
    }
    let mut netlink = Netlink::in_ns(&pod).expect("netlink");
    let rule = netlink.rules().expect("rules")[0];
    netlink.delete_rule(&rule).expect("delete");
    assert!(!cni_check(&pod), "the routing rule is missing");
    apply(&pod, &options).expect("apply");
    let other = Options { inbound: false, ..options };
    assert!(apply(&pod, &other).expect("other settings replace the rules"));
    verify(&pod, &other).expect("as wanted");
}

fn a_pod_without_ipv6_is_captured_for_ipv4_and_half_of_it_is_refused() {
    let (pod, _peer) = pod_and_peer();
    let disable = |interface: &str| {
        let path = format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6");
        pod.run(|| fs::write(path, "1")).expect("enter").expect("sysctl");
    };
    disable("lo");
    assert!(apply(&pod, &Options::default()).is_err(), "IPv6 would leave by the other interface uncaptured");
    disable("all");
    apply(&pod, &Options::default()).expect("apply");
    verify_installed(&pod).expect("complete");
    let families: Vec<_> = Netlink::in_ns(&pod).expect("netlink").rules().expect("rules");
    assert_eq!(families.len(), 1);
    let outbound = proxy(&pod, 15001);
    let _client = dial(&pod, "10.1.1.2:80");
    accept(&outbound);
    remove(&pod).expect("remove");
}

fn bypassing_inbound_capture_leaves_inbound_alone() {
    let (pod, peer) = pod_and_peer();
    apply(&pod, &Options { inbound: false, ..Options::default() }).expect("apply");
    let (app, outbound) = (listen(&pod, "0.0.0.0:80"), proxy(&pod, 15001));
    let (mut client, mut served) = (dial(&peer, "10.1.1.1:80"), accept(&app));
    passes_both_ways(&mut client, &mut served);
    let _client = dial(&pod, "10.1.1.2:80");
    accept(&outbound);
}

/// The peer plays the node; what it sends as root to marked pods are probes.
fn probes_of_the_node_pass_by_and_its_other_traffic_does_not() {
    let (pod, node) = pod_and_peer();
    let mut netlink = Netlink::in_ns(&node).expect("netlink");
    let index = netlink.index("eth0").expect("eth0");
    // A node has no such address: its kernel knows the way back.
    netlink.delete_address(index, "169.254.7.127/32".parse().expect("net")).expect("remove");
    let via = Some("fd00::2".parse().expect("ip"));
    let default = Route { via, ..Route::new("::/0".parse().expect("net")) };
    Netlink::in_ns(&pod).expect("netlink").add_route(&default).expect("route");
    let options = Options::default();
    assert!(apply(&pod, &options).expect("rules"));
    let (app, ztunnel) = (listen(&pod, &format!("{POD}:8080")), proxy(&pod, model::INBOUND_PORT));
    let app_v6 = listen(&pod, "[fd00::1]:8080");
    let marked = |ips: &[&str]| -> BTreeSet<IpAddr> { ips.iter().map(|ip| ip.parse().expect("ip")).collect() };
    let both = marked(&[POD, "fd00::1"]);
    host::write(&node, &options, 0, &both).expect("write");
    assert_eq!(host::read(&node, &options, 0).expect("read"), Some(both.clone()));
    assert_eq!(host::read(&node, &options, 1000).expect("read"), None, "another kubelet's rules");
    for (to, listener, seen) in [
        (format!("{POD}:8080"), &app, IpAddr::from(model::PROBE_V4)),
        ("[fd00::1]:8080".into(), &app_v6, model::PROBE_V6.into()),
    ] {
        let mut probe = dial(&node, &to);
        let mut answered = accept(listener);
        assert_eq!(answered.peer_addr().expect("peer").ip(), seen);
        passes_both_ways(&mut probe, &mut answered);
    }
    // Another user's traffic, and that to a pod which is not marked.
    for (user, addresses) in [(1000, both), (0, marked(&["10.9.9.9"]))] {
        host::write(&node, &options, user, &addresses).expect("write");
        let _other = dial(&node, &format!("{POD}:8080"));
        assert_eq!(
            accept(&ztunnel).peer_addr().expect("peer").ip().to_canonical(),
            PEER.parse::<IpAddr>().expect("ip")
        );
    }
    assert!(host::remove(&node).expect("remove") && !host::remove(&node).expect("again"));
    assert_eq!(Nft::in_ns(&node).expect("netlink").tables(model::FAMILY).expect("tables"), Vec::<String>::new());
}
