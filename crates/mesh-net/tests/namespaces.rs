//! What the kernel does with our bytes: namespaces, links, rules and captures, for real and without host root.

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    process::{Command, ExitCode, Stdio},
    thread,
    time::Duration,
};

use mesh_net::{
    NetNs, SocketOptions, Transparent,
    capture::{FrameSocket, TcpHeader, parse},
    conntrack::Conntrack,
    isolate::{Isolated, PodSandbox, kill_group, test_main},
    link::{Family as RuleFamily, Netlink, Route, RouteKind, Rule as RoutingRule},
    nft::{Batch, Chain, ChainType, CtState, Expr, Family, Hook, Nft, Rule, SetKey},
    sockets::{self, listen_tcp, tcp_socket},
};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

const LIMIT: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    test_main(&[
        ("a_socket_keeps_the_namespace_it_was_made_in", a_socket_keeps_the_namespace_it_was_made_in),
        ("a_panic_inside_a_namespace_still_comes_home", a_panic_inside_a_namespace_still_comes_home),
        ("a_descriptor_of_something_else_is_no_namespace", a_descriptor_of_something_else_is_no_namespace),
        ("a_bind_mount_names_the_same_namespace", a_bind_mount_names_the_same_namespace),
        ("pods_on_a_bridge_reach_each_other", pods_on_a_bridge_reach_each_other),
        ("routes_and_rules_read_back_as_written", routes_and_rules_read_back_as_written),
        ("a_redirected_connection_knows_where_it_wanted_to_go", a_redirected_connection_knows_where_it_wanted_to_go),
        ("a_redirected_datagram_is_known_by_where_it_was_sent", a_redirected_datagram_is_known_by_where_it_was_sent),
        ("a_refused_change_leaves_the_rules_untouched", a_refused_change_leaves_the_rules_untouched),
        ("every_expression_is_accepted_by_the_kernel", every_expression_is_accepted_by_the_kernel),
        ("destination_nat_by_set_reaches_the_endpoint", destination_nat_by_set_reaches_the_endpoint),
        ("a_spoofed_source_reaches_the_application", a_spoofed_source_reaches_the_application),
        (
            "sixty_thousand_connections_leave_from_one_client_address",
            sixty_thousand_connections_leave_from_one_client_address,
        ),
        ("a_capture_sees_the_handshake", a_capture_sees_the_handshake),
        ("an_isolated_program_is_alone_and_reports_its_exit", an_isolated_program_is_alone_and_reports_its_exit),
        (
            "a_pod_process_sees_its_own_files_and_dies_with_its_group",
            a_pod_process_sees_its_own_files_and_dies_with_its_group,
        ),
    ])
}

/// Two namespaces joined by a veth pair, 10.1.1.1 and 10.1.1.2, and their IPv6 twins.
fn two_pods() -> (NetNs, NetNs) {
    let (a, b) = (NetNs::create().expect("namespace"), NetNs::create().expect("namespace"));
    Netlink::in_ns(&a).expect("netlink").add_veth("eth0", "eth0", Some(&b), Some(1400)).expect("veth");
    for (ns, addresses) in [(&a, ["10.1.1.1/24", "fd00::1/64"]), (&b, ["10.1.1.2/24", "fd00::2/64"])] {
        let mut netlink = Netlink::in_ns(ns).expect("netlink");
        let index = netlink.index("eth0").expect("eth0");
        for address in addresses {
            netlink.add_address(index, address.parse().expect("address")).expect("add address");
        }
        netlink.set_up(index).expect("up");
    }
    (a, b)
}

fn listen(ns: &NetNs, address: &str) -> TcpListener {
    let address: SocketAddr = address.parse().expect("address");
    ns.run(|| TcpListener::bind(address)).expect("enter").expect("bind")
}

fn dial(ns: &NetNs, address: &str) -> std::io::Result<TcpStream> {
    let address: SocketAddr = address.parse().expect("address");
    let ns = ns.clone();
    ns.run_on_thread(|| TcpStream::connect_timeout(&address, LIMIT))?
}

fn a_socket_keeps_the_namespace_it_was_made_in() {
    let (ns, home) = (NetNs::create().expect("namespace"), NetNs::current().expect("home"));
    let any = "127.0.0.1:0".parse().expect("address");
    let (listener, _) = listen_tcp(Some(&ns), any, 16, &SocketOptions::default()).expect("listen");
    let dest = listener.local_addr().expect("address");
    let address = dest.to_string();
    let socket = tcp_socket(Some(&ns), None, dest, &SocketOptions::default()).expect("socket");
    socket.connect_timeout(&dest.into(), LIMIT).expect("connected from outside, as from inside");
    assert_eq!(NetNs::current().expect("home").id().expect("id"), home.id().expect("id"));
    dial(&home, &address).expect_err("not in this namespace");
    dial(&ns, &address).expect("lo is up in a new namespace");
    let inner = ns.run(|| home.run(|| NetNs::current().expect("current").id().expect("id")));
    assert_eq!(inner.expect("outer").expect("inner"), home.id().expect("id"));
}

fn a_panic_inside_a_namespace_still_comes_home() {
    let (ns, home) = (NetNs::create().expect("namespace"), NetNs::current().expect("home").id().expect("id"));
    thread::scope(|scope| {
        let caught = scope.spawn(|| {
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| ns.run(|| panic!("on purpose"))));
            (result.is_err(), NetNs::current().expect("current").id().expect("id"))
        });
        assert_eq!(caught.join().expect("thread"), (true, home));
    });
}

fn a_descriptor_of_something_else_is_no_namespace() {
    NetNs::open("/dev/null").expect_err("a device");
    NetNs::open("/proc/self/ns/mnt").expect_err("another kind of namespace");
}

fn a_bind_mount_names_the_same_namespace() {
    let ns = NetNs::create().expect("namespace");
    ns.bind_mount("/run/pod").expect("mount");
    assert_eq!(NetNs::open("/run/pod").expect("open").id().expect("id"), ns.id().expect("id"));
    ns.bind_mount("/run/pod").expect_err("the name is taken");
}

fn pods_on_a_bridge_reach_each_other() {
    let node = NetNs::create().expect("namespace");
    let mut netlink = Netlink::in_ns(&node).expect("netlink");
    netlink.add_bridge("br0").expect("bridge");
    let bridge = netlink.index("br0").expect("index");
    netlink.set_up(bridge).expect("up");
    let pods: Vec<NetNs> = (1..=2u8)
        .map(|i| {
            let pod = NetNs::create().expect("namespace");
            let veth = format!("veth{i}");
            netlink.add_veth(&veth, "eth0", Some(&pod), None).expect("veth");
            let index = netlink.index(&veth).expect("index");
            netlink.set_master(index, Some(bridge)).expect("enslave");
            netlink.set_up(index).expect("up");
            let mut inside = Netlink::in_ns(&pod).expect("netlink");
            let index = inside.index("eth0").expect("eth0");
            inside.add_address(index, format!("10.2.0.{i}/16").parse().expect("address")).expect("add address");
            inside.set_up(index).expect("up");
            pod
        })
        .collect();
    assert!(netlink.links().expect("links").iter().any(|l| l.name == "veth1" && l.master == Some(bridge) && l.up));
    let server = listen(&pods[1], "10.2.0.2:8080");
    dial(&pods[0], "10.2.0.2:8080").expect("connect");
    assert_eq!(server.accept().expect("accept").1.ip(), "10.2.0.1".parse::<IpAddr>().expect("address"));
    netlink.delete_link("veth1").expect("delete");
    assert!(netlink.index("veth1").expect_err("gone").is(19 /* ENODEV */));
}

fn routes_and_rules_read_back_as_written() {
    let ns = NetNs::create().expect("namespace");
    let mut netlink = Netlink::in_ns(&ns).expect("netlink");
    let lo = netlink.index("lo").expect("lo");
    for (family, any) in [(RuleFamily::V4, "0.0.0.0/0"), (RuleFamily::V6, "::/0")] {
        let rule = RoutingRule { family, mark: 0x111, mask: 0xfff, priority: 32764, table: 100 };
        let dst = any.parse().expect("prefix");
        let route = Route { dst, via: None, dev: Some(lo), table: 100, kind: RouteKind::Local };
        for _ in 0..2 {
            netlink.add_rule(&rule).expect("a second time is no error");
            netlink.add_route(&route).expect("a second time is no error");
        }
        assert_eq!(netlink.rules().expect("rules").iter().filter(|r| **r == rule).count(), 1);
        assert!(netlink.routes(100).expect("routes").contains(&route), "{:?}", netlink.routes(100));
        for _ in 0..2 {
            netlink.delete_route(&route).expect("a second time is no error");
            netlink.delete_rule(&rule).expect("a second time is no error");
        }
    }
    assert_eq!((netlink.rules().expect("rules"), netlink.routes(100).expect("routes")), (vec![], vec![]));
    let error = netlink.add_address(99, "10.0.0.1/8".parse().expect("address")).expect_err("no such link");
    assert!(error.to_string().starts_with("cannot add address 10.0.0.1/8"), "{error}");
}

fn a_redirected_connection_knows_where_it_wanted_to_go() {
    let (client, server) = two_pods();
    let mut batch = Batch::new(Family::Inet);
    batch.replace_table("t");
    batch.add_chain("t", &Chain::base("out", ChainType::Nat, Hook::Output, -100));
    batch.add_rule("t", "out", &Rule::new("redirect").tcp().not_dport(9).counter().redirect(15001));
    let mut nft = Nft::in_ns(&client).expect("netlink");
    nft.apply(batch).expect("apply");
    let options = SocketOptions { transparent: Transparent::BestEffort, ..Default::default() };
    let (proxy, transparent) =
        listen_tcp(Some(&client), "[::]:15001".parse().expect("address"), 16, &options).expect("listen");
    assert!(transparent);
    proxy.set_nonblocking(false).expect("blocking");
    for dest in ["10.1.1.2:80", "[fd00::2]:443"] {
        let _client = dial(&client, dest).expect("redirected");
        let (accepted, _) = proxy.accept().expect("accept");
        assert_eq!(sockets::original_dst(&accepted).expect("original destination").to_string(), dest);
    }
    let rules = nft.rules(Family::Inet, "t").expect("rules");
    assert_eq!((rules[0].comment.as_str(), rules[0].packets, rules.len()), ("redirect", Some(2), 1));
    drop(server);
}

fn a_redirected_datagram_is_known_by_where_it_was_sent() {
    let (client, server) = two_pods();
    let mut batch = Batch::new(Family::Inet);
    batch.replace_table("t");
    batch.add_chain("t", &Chain::base("out", ChainType::Nat, Hook::Output, -100));
    batch.add_chain("t", &Chain::base("zone", ChainType::Filter, Hook::Output, -300));
    batch.add_rule("t", "out", &Rule::new("redirect").udp().dport(53).redirect(15053));
    batch.add_rule("t", "zone", &Rule::new("apart").udp().dport(99).set_ct_zone(1));
    Nft::in_ns(&client).expect("netlink").apply(batch).expect("apply");
    let mut tracked = Conntrack::in_ns(&client).expect("netlink");
    for (own, dest) in [("127.0.0.1:15053", "10.1.1.2:53"), ("[::1]:15053", "[fd00::2]:53")] {
        let own: SocketAddr = own.parse().expect("address");
        let dest: SocketAddr = dest.parse().expect("address");
        let proxy = sockets::listen_udp(Some(&client), own, &SocketOptions::default()).expect("listen");
        proxy.set_nonblocking(false).expect("blocking");
        let application = sockets::udp_socket(Some(&client), None, dest, &SocketOptions::default()).expect("socket");
        application.send(b"?").expect("send");
        let (_, peer) = proxy.recv_from(&mut [0; 8]).expect("receive");
        assert_eq!(tracked.udp_destination(peer, own).expect("look up"), Some(dest));
        let stranger = SocketAddr::new(peer.ip(), 9);
        assert_eq!(tracked.udp_destination(stranger, own).expect("look up"), None);
    }
    drop(server);
}

fn a_refused_change_leaves_the_rules_untouched() {
    let ns = NetNs::create().expect("namespace");
    let mut nft = Nft::in_ns(&ns).expect("netlink");
    let mut batch = Batch::new(Family::Inet);
    batch.add_table("t");
    batch.add_chain("t", &Chain::regular("c"));
    batch.add_rule("t", "c", &Rule::new("kept").counter());
    nft.apply(batch).expect("apply");
    let mut bad = Batch::new(Family::Inet);
    bad.flush_table("t");
    bad.add_rule("t", "absent", &Rule::new("lost").counter());
    bad.add_rule("t", "c", &Rule::new("also lost").counter());
    let error = nft.apply(bad).expect_err("no such chain");
    assert!(error.is(2 /* ENOENT */) && error.to_string().contains("`lost` to t absent"), "{error}");
    let rules = nft.rules(Family::Inet, "t").expect("rules");
    assert_eq!(rules.iter().map(|r| r.comment.as_str()).collect::<Vec<_>>(), ["kept"]);
    let mut by_handle = Batch::new(Family::Inet);
    by_handle.delete_rule("t", "c", rules[0].handle);
    nft.apply(by_handle).expect("delete by handle");
    assert_eq!(nft.rules(Family::Inet, "t").expect("rules"), []);
    let mut remove = Batch::new(Family::Inet);
    remove.remove_table("t");
    remove.remove_table("never there");
    nft.apply(remove).expect("remove");
    assert_eq!(nft.tables(Family::Inet).expect("tables"), Vec::<String>::new());
    assert_eq!(nft.rules(Family::Inet, "t").expect("no table, no rules"), []);
}

fn every_expression_is_accepted_by_the_kernel() {
    let ns = NetNs::create().expect("namespace");
    let mut nft = Nft::in_ns(&ns).expect("netlink");
    let net = |s: &str| s.parse::<ipnet::IpNet>().expect("prefix");
    let mut batch = Batch::new(Family::Inet);
    batch.replace_table("t");
    for (name, kind, hook) in [
        ("pre", ChainType::Filter, Hook::Prerouting),
        ("nat-out", ChainType::Nat, Hook::Output),
        ("post", ChainType::Nat, Hook::Postrouting),
        ("route", ChainType::Route, Hook::Output),
    ] {
        batch.add_chain("t", &Chain::base(name, kind, hook, -150));
    }
    batch.add_chain("t", &Chain::regular("sub"));
    batch.add_set("t", "v4", SetKey::Ipv4);
    batch.add_set("t", "v6", SetKey::Ipv6);
    batch.add_elements("t", "v4", &["10.0.0.1".parse().expect("ip"), "10.0.0.2".parse().expect("ip")]);
    batch.add_elements("t", "v6", &["fd00::1".parse().expect("ip")]);
    let rules = [
        ("pre", Rule::new("1").mark(0x539, 0xfff).set_ct_mark(0x111, 0xfff)),
        (
            "pre",
            Rule::new("2").iifname("eth0").tcp().sport(53).syn().ct_state(&[CtState::New, CtState::Related]).drop(),
        ),
        ("pre", Rule::new("3").ct_direction(mesh_net::nft::Direction::Reply).jump("sub")),
        ("route", Rule::new("4").ct_mark(0x111, 0xfff).restore_mark()),
        ("route", Rule::new("5").udp().dport(53).skuid(0).set_mark(7)),
        ("nat-out", Rule::new("6").daddr_type(mesh_net::nft::AddressType::Local).accept()),
        (
            "nat-out",
            Rule::new("7").not_oifname("lo").not_daddr(net("127.0.0.0/8")).not_mark(0x539, 0xfff).tcp().redirect(1),
        ),
        (
            "nat-out",
            Rule::new("8")
                .daddr_in("0.0.0.0".parse().expect("ip"), "v4")
                .one_in(3)
                .dnat("10.0.0.9".parse().expect("ip"), None),
        ),
        (
            "nat-out",
            Rule::new("9").daddr(net("fd00::/64")).tcp().dport(80).dnat("fd00::9".parse().expect("ip"), Some(81)),
        ),
        ("post", Rule::new("10").saddr(net("10.0.0.0/8")).oifname("eth0").masquerade()),
        ("post", Rule::new("11").daddr_in("::".parse().expect("ip"), "v6").snat("fd00::7".parse().expect("ip"))),
        ("sub", Rule::new("12").with([Expr::Counter, Expr::Verdict(mesh_net::nft::Verdict::Return)])),
    ];
    for (chain, rule) in &rules {
        batch.add_rule("t", chain, rule);
    }
    nft.apply(batch).expect("apply");
    let mut found: Vec<u32> =
        nft.rules(Family::Inet, "t").expect("rules").iter().map(|r| r.comment.parse().expect("number")).collect();
    found.sort_unstable();
    assert_eq!(found, (1..=12).collect::<Vec<_>>());
    assert_eq!(nft.chains(Family::Inet, "t").expect("chains").len(), 5);
    let mut elements = nft.elements(Family::Inet, "t", "v4").expect("elements");
    elements.sort_unstable();
    assert_eq!(elements, ["10.0.0.1".parse::<IpAddr>().expect("ip"), "10.0.0.2".parse().expect("ip")]);
    let mut fewer = Batch::new(Family::Inet);
    fewer.delete_elements("t", "v4", &elements[..1]);
    fewer.flush_chain("t", "sub");
    nft.apply(fewer).expect("delete an element");
    assert_eq!(nft.elements(Family::Inet, "t", "v4").expect("elements").len(), 1);
}

fn destination_nat_by_set_reaches_the_endpoint() {
    let (client, server) = two_pods();
    let vip: IpAddr = "10.96.0.1".parse().expect("ip");
    let mut netlink = Netlink::in_ns(&client).expect("netlink");
    let route =
        Route { via: Some("10.1.1.2".parse().expect("ip")), ..Route::new("10.96.0.0/16".parse().expect("net")) };
    netlink.add_route(&route).expect("route");
    let mut batch = Batch::new(Family::Ip);
    batch.replace_table("kube");
    batch.add_chain("kube", &Chain::base("out", ChainType::Nat, Hook::Output, -100));
    batch.add_set("kube", "vips", SetKey::Ipv4);
    batch.add_elements("kube", "vips", &[vip]);
    let rule = Rule::new("vip").daddr_in(vip, "vips").tcp().dport(80);
    batch.add_rule("kube", "out", &rule.dnat("10.1.1.2".parse().expect("ip"), Some(8080)));
    Nft::in_ns(&client).expect("netlink").apply(batch).expect("apply");
    let server = listen(&server, "10.1.1.2:8080");
    let stream = dial(&client, "10.96.0.1:80").expect("through the virtual address");
    assert_eq!(stream.peer_addr().expect("peer").ip(), vip);
    server.accept().expect("accept");
}

fn a_spoofed_source_reaches_the_application() {
    let (client, pod) = two_pods();
    // The application's answers to the spoofed client go back through lo, as the capture rules arrange it.
    let mut netlink = Netlink::in_ns(&pod).expect("netlink");
    let lo = netlink.index("lo").expect("lo");
    let rule = RoutingRule { family: RuleFamily::V4, mark: 0x111, mask: 0xfff, priority: 32764, table: 100 };
    netlink.add_rule(&rule).expect("rule");
    let any = "0.0.0.0/0".parse().expect("any");
    netlink
        .add_route(&Route { dst: any, via: None, dev: Some(lo), table: 100, kind: RouteKind::Local })
        .expect("route");
    let mut batch = Batch::new(Family::Inet);
    batch.add_table("m");
    batch.add_chain("m", &Chain::base("pre", ChainType::Filter, Hook::Prerouting, -150));
    batch.add_chain("m", &Chain::base("out", ChainType::Route, Hook::Output, -150));
    batch.add_rule("m", "pre", &Rule::new("").mark(0x539, 0xfff).set_ct_mark(0x111, 0xfff));
    batch.add_rule("m", "out", &Rule::new("").ct_mark(0x111, 0xfff).restore_mark());
    Nft::in_ns(&pod).expect("netlink").apply(batch).expect("apply");

    let app = listen(&pod, "10.1.1.2:80");
    let serving = thread::spawn(move || {
        let (mut stream, peer) = app.accept().expect("accept");
        stream.write_all(b"hi").expect("write");
        peer.ip()
    });
    let dest = "10.1.1.2:80".parse().expect("address");
    let options = SocketOptions { mark: Some(1337), ..Default::default() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    let greeting = runtime.block_on(async {
        let source = "10.1.1.1".parse().expect("ip");
        let socket = tcp_socket(Some(&pod), Some(source), dest, &options).expect("socket");
        let stream = sockets::connect(socket, dest, LIMIT).await.expect("connect");
        stream.readable().await.expect("readable");
        let mut buffer = [0; 2];
        stream.try_read(&mut buffer).expect("read");
        buffer
    });
    assert_eq!((serving.join().expect("application"), &greeting), ("10.1.1.1".parse().expect("ip"), b"hi"));
    drop(client);
}

/// More than there are ports: each destination has them all, because a port is chosen when the destination is known. A bind that chooses
/// one before ends when the ports of the address do.
fn sixty_thousand_connections_leave_from_one_client_address() {
    const WANTED: u64 = 60_000;
    const DESTINATIONS: u64 = 3;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("limit");
    // Two descriptors each; fewer where the machine does not give as many, and then as many times fewer ports.
    let connections = WANTED.min((hard - 1000) / 2);
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("raise the limit");
    let ports = connections / DESTINATIONS + 64;
    let ns = NetNs::create().expect("namespace");
    let range = format!("{} {}", 65_535 - ports, 65_535);
    ns.run(|| std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", range)).expect("enter").expect("port range");
    let client: IpAddr = "127.9.9.9".parse().expect("address");
    let options = SocketOptions { transparent: Transparent::Required, ..SocketOptions::default() };
    let mut open = Vec::new();
    for _ in 0..DESTINATIONS {
        let listener = listen(&ns, "127.0.0.1:0");
        let address = listener.local_addr().expect("address");
        for _ in 0..connections / DESTINATIONS {
            let socket = tcp_socket(Some(&ns), Some(client), address, &options).expect("socket");
            socket.set_nonblocking(false).expect("blocking");
            socket.connect(&address.into()).expect("connect");
            open.push((socket, listener.accept().expect("accept").0));
        }
    }
    assert!(open.iter().all(|(_, accepted)| accepted.peer_addr().is_ok_and(|peer| peer.ip() == client)));
    drop(open);
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).expect("lower the limit again");
}

fn a_capture_sees_the_handshake() {
    let (client, server) = two_pods();
    let wire = FrameSocket::open(&server, "eth0").expect("capture");
    let listener = listen(&server, "10.1.1.2:80");
    let _stream = dial(&client, "10.1.1.2:80").expect("connect");
    listener.accept().expect("accept");
    let mut buffer = [0; 2048];
    let mut flags = Vec::new();
    while flags.len() < 3 {
        let frame = wire.recv(&mut buffer, LIMIT).expect("receive").expect("a frame in time");
        if let Some(tcp) = parse(&buffer[..frame.length]).and_then(|p| p.tcp) {
            flags.push(tcp.flags);
        }
    }
    assert_eq!(flags, [TcpHeader::SYN, TcpHeader::SYN | TcpHeader::ACK, TcpHeader::ACK]);
    FrameSocket::open(&server, "eth9").expect_err("no such interface");
}

fn an_isolated_program_is_alone_and_reports_its_exit() {
    let mut isolated = Isolated::new("/bin/sh");
    isolated.command().args(["-c", "echo $$ $(id -u) $(ls /run | wc -l) $(ls /sys/class/net); exit 7"]);
    isolated.command().stdout(Stdio::piped());
    let output = isolated.spawn().expect("spawn").wait_with_output().expect("wait");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "1 0 0 lo\n");
    assert_eq!(output.status.code(), Some(7));

    let mut stuck = Isolated::new("/bin/sh");
    stuck.command().args(["-c", "trap 'exit 9' TERM; echo ready; while :; do read x; done"]);
    stuck.command().stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = stuck.spawn().expect("spawn");
    child.stdout.take().expect("stdout").read_exact(&mut [0; 6]).expect("ready");
    kill_process(child.id(), 15);
    drop(child.stdin.take());
    assert_eq!(child.wait().expect("wait").code(), Some(9), "the waiter passes signals on");

    let error = Isolated::new("/no/such/program").spawn().expect_err("no program");
    assert_eq!(
        (error.to_string().as_str(), error.source.kind()),
        ("cannot start the program", std::io::ErrorKind::NotFound)
    );
}

fn kill_process(pid: u32, signal: i32) {
    let status = Command::new("/bin/kill").args([format!("-{signal}"), pid.to_string()]).status().expect("kill");
    assert!(status.success());
}

fn a_pod_process_sees_its_own_files_and_dies_with_its_group() {
    let netns = NetNs::create().expect("namespace");
    Netlink::in_ns(&netns).expect("netlink").add_bridge("pod0").expect("bridge");
    std::fs::write("/run/hosts", "10.0.0.1 demo\n").expect("write");
    std::fs::write("/run/resolv", "nameserver 10.0.0.10\n").expect("write");
    let sandbox = PodSandbox {
        netns,
        hosts: Some("/run/hosts".into()),
        resolv_conf: Some("/run/resolv".into()),
        die_with_parent: true,
    };
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "cat /etc/hosts /etc/resolv.conf; grep -c pod0 /proc/net/dev; sleep 1000"]);
    let mut child = sandbox.confine(command.stdout(Stdio::piped())).expect("confine").spawn().expect("spawn");
    let mut output = [0; "10.0.0.1 demo\nnameserver 10.0.0.10\n1\n".len()];
    child.stdout.take().expect("stdout").read_exact(&mut output).expect("read");
    assert_eq!(&output, b"10.0.0.1 demo\nnameserver 10.0.0.10\n1\n");
    kill_group(child.id(), 9).expect("kill");
    assert_eq!(child.wait().expect("wait").code(), None);
    kill_group(child.id(), 9).expect("a group that is gone is no error");
}
