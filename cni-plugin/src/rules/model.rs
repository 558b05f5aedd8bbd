//! The rules of one pod as data. Ports, marks, probe addresses and names are those of the upstream agent, so that either project's
//! ztunnel works with them and operators' scripts find them.
//!
//! How a connection meets them: an application's SYN leaves through `output` and is redirected to ztunnel's port 15001; one that
//! comes from outside enters through `prerouting` and is redirected to 15006, unless it is for 15008, where ztunnel listens itself.
//! A DNS query leaves through `output` too, and is redirected to 15053. ztunnel's own packets carry [`PROXY_MARK`] and pass. When ztunnel connects to the application under the client's address, those
//! packets mark the connection ([`REPLY_MARK`]), the application's answers take that mark over, and policy routing sends them to `lo`
//! and so back to ztunnel instead of out of the pod.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use mesh_net::{
    link,
    nft::{Batch, Chain, ChainType, CtState, Family, Hook, Rule},
};

/// On every packet ztunnel sends in a pod.
pub const PROXY_MARK: u32 = 0x539;
/// On connections from ztunnel to the application, and on the application's answers.
pub const REPLY_MARK: u32 = 0x111;
pub const MARK_MASK: u32 = 0xfff;
pub const OUTBOUND_PORT: u16 = 15001;
pub const INBOUND_PORT: u16 = 15006;
pub const HBONE_PORT: u16 = 15008;
pub const DNS_PORT: u16 = 15053;
const DNS: u16 = 53;
/// Of connection tracking, for the DNS of ztunnel itself: a query of its own must not be taken for the application's that had the same port
/// before, and be redirected back to it.
const DNS_ZONE: u16 = 1;
/// What the host's own health probes look like in a pod.
pub const PROBE_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 7, 127);
pub const PROBE_V6: Ipv6Addr = Ipv6Addr::new(0xfd16, 0x9254, 0x7127, 0x1337, 0xffff, 0xffff, 0xffff, 0xffff);
/// Table and priority of the policy routing.
pub const ROUTE_TABLE: u32 = 100;
pub const RULE_PRIORITY: u32 = 32764;

pub const FAMILY: Family = Family::Inet;
pub const NAT: &str = "istio-ambient-nat";
pub const MANGLE: &str = "istio-ambient-mangle";
/// For the capture of DNS.
pub const RAW: &str = "istio-ambient-raw";
pub const PREROUTING: &str = "istio-prerouting";
pub const OUTPUT: &str = "istio-output";
/// Leads nowhere; its one rule's comment says what the other rules must be.
pub const MANIFEST: &str = "istio-manifest";

/// What may differ between pods.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Options {
    /// Whether traffic from outside is captured (not with the annotation `bypass-inbound-capture`).
    pub inbound: bool,
    /// Interfaces of nested machines or containers: TCP arriving on them is the pod's outbound traffic.
    pub reroute_interfaces: Vec<String>,
    /// Whether the applications' DNS queries go to ztunnel.
    pub dns: bool,
    pub ipv6: bool,
    pub probe_v4: Ipv4Addr,
    pub probe_v6: Ipv6Addr,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            inbound: true,
            reroute_interfaces: Vec::new(),
            dns: true,
            ipv6: true,
            probe_v4: PROBE_V4,
            probe_v6: PROBE_V6,
        }
    }
}

/// A rule and where it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    pub table: &'static str,
    pub chain: &'static str,
    pub rule: Rule,
}

/// All rules, in order within each chain. Comments are unique names with a digest of what the rule does.
pub fn rules(options: &Options) -> Vec<Placed> {
    let mut rules = vec![
        // mangle
        placed(MANGLE, "prerouting", Rule::new("jump-prerouting").jump(PREROUTING)),
        placed(MANGLE, "output", Rule::new("jump-output").jump(OUTPUT)),
        placed(MANGLE, PREROUTING, from_proxy("mark-connection").counter().set_ct_mark(REPLY_MARK, MARK_MASK)),
        placed(MANGLE, OUTPUT, Rule::new("restore-mark").ct_mark(REPLY_MARK, MARK_MASK).counter().restore_mark()),
        // nat
        placed(NAT, "prerouting", Rule::new("jump-prerouting").jump(PREROUTING)),
        placed(NAT, "output", Rule::new("jump-output").jump(OUTPUT)),
    ];
    rules.extend(options.reroute_interfaces.iter().flat_map(|interface| reroute(interface)));
    if options.inbound {
        rules.extend(inbound(options));
    }
    rules.extend(outbound(options));
    if options.dns {
        rules.extend(dns_zone());
    }
    for placed in &mut rules {
        placed.rule.comment = format!("{}#{:08x}", placed.rule.comment, digest(&format!("{:?}", placed.rule.exprs)));
    }
    rules
}

fn reroute(interface: &str) -> [Placed; 2] {
    let on = |name: &str| Rule::new(format!("{name}-{interface}")).iifname(interface).tcp();
    [
        placed(NAT, PREROUTING, new_connection(on("reroute")).counter().redirect(OUTBOUND_PORT)),
        placed(NAT, PREROUTING, on("reroute-done").accept()),
    ]
}

fn inbound(options: &Options) -> Vec<Placed> {
    let mut rules = Vec::new();
    for probe in probes(options) {
        let rule = Rule::new(named("probe-in", probe)).saddr(probe.into()).tcp().counter().accept();
        rules.push(placed(NAT, PREROUTING, rule));
    }
    for local in loopbacks(options) {
        let rule = Rule::new(named("inbound", local)).not_daddr(local.into()).tcp().not_dport(HBONE_PORT);
        let rule = new_connection(rule.not_mark(PROXY_MARK, MARK_MASK)).counter().redirect(INBOUND_PORT);
        rules.push(placed(NAT, PREROUTING, rule));
    }
    rules
}

fn outbound(options: &Options) -> Vec<Placed> {
    let mut rules = Vec::new();
    for probe in probes(options) {
        let rule = Rule::new(named("probe-out", probe)).daddr(probe.into()).tcp().counter().accept();
        rules.push(placed(NAT, OUTPUT, rule));
    }
    if options.dns {
        rules.extend(dns(options));
    }
    rules.push(placed(NAT, OUTPUT, Rule::new("replies").tcp().mark(REPLY_MARK, MARK_MASK).counter().accept()));
    for local in loopbacks(options) {
        // A pod that calls its own address stays inside.
        let rule = Rule::new(named("own-address", local)).oifname("lo").not_daddr(local.into()).counter().accept();
        rules.push(placed(NAT, OUTPUT, rule));
    }
    for local in loopbacks(options) {
        let rule = Rule::new(named("outbound", local)).not_daddr(local.into()).tcp();
        let rule = new_connection(rule.not_mark(PROXY_MARK, MARK_MASK)).counter().redirect(OUTBOUND_PORT);
        rules.push(placed(NAT, OUTPUT, rule));
    }
    rules
}

/// Queries to nameservers on `lo` are between the pod's own programs.
fn dns(options: &Options) -> Vec<Placed> {
    let redirect = |rule: Rule| rule.not_mark(PROXY_MARK, MARK_MASK).counter().redirect(DNS_PORT);
    let udp = Rule::new("dns-udp").not_oifname("lo").udp().dport(DNS);
    let mut rules = vec![placed(NAT, OUTPUT, redirect(udp))];
    for local in loopbacks(options) {
        let rule = Rule::new(named("dns-tcp", local)).not_daddr(local.into()).tcp().dport(DNS);
        rules.push(placed(NAT, OUTPUT, redirect(new_connection(rule))));
    }
    rules
}

fn dns_zone() -> [Placed; 4] {
    let query = from_proxy("dns-zone-query").udp().dport(DNS).counter().set_ct_zone(DNS_ZONE);
    let answer = Rule::new("dns-zone-answer").udp().sport(DNS).not_mark(PROXY_MARK, MARK_MASK);
    [
        placed(RAW, "prerouting", Rule::new("jump-prerouting").jump(PREROUTING)),
        placed(RAW, "output", Rule::new("jump-output").jump(OUTPUT)),
        placed(RAW, PREROUTING, answer.counter().set_ct_zone(DNS_ZONE)),
        placed(RAW, OUTPUT, query),
    ]
}

/// Connection tracking starts with these very rules, so a flow that is older than they are looks new at its next packet; only the
/// SYN tells a connection that really begins.
fn new_connection(rule: Rule) -> Rule {
    rule.syn().ct_state(&[CtState::New])
}

fn from_proxy(name: &str) -> Rule {
    Rule::new(name).mark(PROXY_MARK, MARK_MASK)
}

fn placed(table: &'static str, chain: &'static str, rule: Rule) -> Placed {
    Placed { table, chain, rule }
}

fn named(name: &str, ip: IpAddr) -> String {
    format!("{name}-{}", if ip.is_ipv4() { "v4" } else { "v6" })
}

pub(super) fn probes(options: &Options) -> impl Iterator<Item = IpAddr> {
    let v6 = options.ipv6.then_some(options.probe_v6.into());
    [Some(options.probe_v4.into()), v6].into_iter().flatten()
}

/// 127.0.0.1 and ::1, which every table of the upstream rules exempts by literal match.
fn loopbacks(options: &Options) -> impl Iterator<Item = IpAddr> + use<> {
    let v6 = options.ipv6.then_some(Ipv6Addr::LOCALHOST.into());
    [Some(Ipv4Addr::LOCALHOST.into()), v6].into_iter().flatten()
}

/// The tables, in the order they are made.
pub fn tables(options: &Options) -> Vec<&'static str> {
    let raw = options.dns.then_some(RAW);
    raw.into_iter().chain([MANGLE, NAT]).collect()
}

/// The chains of all tables.
pub fn chains(options: &Options) -> Vec<(&'static str, Chain)> {
    let mangle = |name, kind, hook| (MANGLE, Chain::base(name, kind, hook, -150));
    let nat = |name, hook| (NAT, Chain::base(name, ChainType::Nat, hook, -100));
    // Before connection tracking.
    let raw = |name, hook| (RAW, Chain::base(name, ChainType::Filter, hook, -300));
    let mut chains = vec![
        (MANGLE, Chain::regular(PREROUTING)),
        (MANGLE, Chain::regular(OUTPUT)),
        (MANGLE, Chain::regular(MANIFEST)),
        mangle("prerouting", ChainType::Filter, Hook::Prerouting),
        // Of type route, so that a restored mark makes the kernel route the packet again.
        mangle("output", ChainType::Route, Hook::Output),
        (NAT, Chain::regular(PREROUTING)),
        (NAT, Chain::regular(OUTPUT)),
        nat("prerouting", Hook::Prerouting),
        nat("output", Hook::Output),
    ];
    if options.dns {
        chains.extend([PREROUTING, OUTPUT].map(|name| (RAW, Chain::regular(name))));
        chains.extend([raw("prerouting", Hook::Prerouting), raw("output", Hook::Output)]);
    }
    chains
}

/// Everything as one transaction that replaces whatever these tables held.
pub fn batch(options: &Options) -> Batch {
    let mut batch = Batch::new(FAMILY);
    batch.remove_table(RAW);
    for table in tables(options) {
        batch.replace_table(table);
    }
    for (table, chain) in chains(options) {
        batch.add_chain(table, &chain);
    }
    let rules = rules(options);
    for Placed { table, chain, rule } in &rules {
        batch.add_rule(table, chain, rule);
    }
    let lines = rules.iter().map(|p| (p.table, p.chain, p.rule.comment.as_str()));
    batch.add_rule(MANGLE, MANIFEST, &Rule::new(manifest(lines, options.ipv6)));
    batch
}

/// What the manifest says of these rules: losing one, adding one or changing their order shows. A rule changed in place under its old
/// comment does not; re-applying, which happens at every recheck that finds a difference, is the cure for all.
pub fn manifest<'a>(rules: impl Iterator<Item = (&'a str, &'a str, &'a str)>, ipv6: bool) -> String {
    let mut lines: Vec<String> = Vec::new();
    let mut position = std::collections::HashMap::new();
    for (table, chain, comment) in rules {
        // The order within a chain is part of the meaning; the order of chains is not.
        let index = position.entry((table, chain)).or_insert(0u32);
        lines.push(format!("{table} {chain} {index:03} {comment}"));
        *index += 1;
    }
    lines.sort_unstable();
    let families = if ipv6 { "v4+v6" } else { "v4" };
    format!("fairway-1 {families} rules={} digest={:08x}", lines.len(), digest(&lines.join("\n")))
}

/// Whether a manifest speaks of IPv6 too.
pub fn manifest_has_ipv6(manifest: &str) -> bool {
    manifest.contains(" v4+v6 ")
}

/// The policy routing that belongs to the rules; `lo` is the loopback's index.
pub fn routing(lo: u32, ipv6: bool) -> Vec<(link::Rule, link::Route)> {
    let families = [(link::Family::V4, Ipv4Addr::UNSPECIFIED.into()), (link::Family::V6, Ipv6Addr::UNSPECIFIED.into())];
    let wanted = families.into_iter().take(if ipv6 { 2 } else { 1 });
    wanted.map(|(family, any)| (reply_rule(family), reply_route(lo, any))).collect()
}

fn reply_rule(family: link::Family) -> link::Rule {
    link::Rule { family, mark: REPLY_MARK, mask: MARK_MASK, priority: RULE_PRIORITY, table: ROUTE_TABLE }
}

fn reply_route(lo: u32, any: IpAddr) -> link::Route {
    let dst = IpNet::new_assert(any, 0);
    link::Route { dst, via: None, dev: Some(lo), table: ROUTE_TABLE, kind: link::RouteKind::Local }
}

/// FNV-1a, folded: tells versions of a rule apart, no defence against forgery.
pub(super) fn digest(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(options: &Options, table: &str, chain: &str) -> Vec<String> {
        let rules = rules(options);
        let of_chain = rules.iter().filter(|p| p.table == table && p.chain == chain);
        of_chain.map(|p| p.rule.comment.split('#').next().unwrap_or_default().to_owned()).collect()
    }

    #[test]
    fn the_order_within_chains_is_that_of_the_reference() {
        let all = Options { reroute_interfaces: vec!["vm0".into()], ..Options::default() };
        assert_eq!(
            names(&all, NAT, PREROUTING),
            ["reroute-vm0", "reroute-done-vm0", "probe-in-v4", "probe-in-v6", "inbound-v4", "inbound-v6"]
        );
        assert_eq!(
            names(&all, NAT, OUTPUT),
            [
                "probe-out-v4",
                "probe-out-v6",
                "dns-udp",
                "dns-tcp-v4",
                "dns-tcp-v6",
                "replies",
                "own-address-v4",
                "own-address-v6",
                "outbound-v4",
                "outbound-v6"
            ]
        );
        assert_eq!(names(&all, MANGLE, PREROUTING), ["mark-connection"]);
        assert_eq!(names(&all, RAW, PREROUTING), ["dns-zone-answer"]);
        assert_eq!(names(&all, RAW, OUTPUT), ["dns-zone-query"]);
        assert_eq!(names(&all, MANGLE, OUTPUT), ["restore-mark"]);
    }

    #[test]
    fn bypassing_inbound_leaves_prerouting_alone_and_v4_only_pods_get_no_v6_rule() {
        let bypass = Options { inbound: false, ..Options::default() };
        assert_eq!(names(&bypass, NAT, PREROUTING), Vec::<String>::new());
        let v4 = Options { ipv6: false, ..Options::default() };
        assert!(rules(&v4).iter().all(|p| !p.rule.comment.contains("-v6")));
        assert_eq!(routing(1, false).len(), 1);
    }

    #[test]
    fn without_dns_capture_port_53_is_as_any_other() {
        let off = Options { dns: false, ..Options::default() };
        assert!(rules(&off).iter().all(|p| p.table != RAW && !p.rule.comment.contains("dns")));
        assert!(chains(&off).iter().all(|(table, _)| *table != RAW) && !tables(&off).contains(&RAW));
    }

    #[test]
    fn a_manifest_notices_a_lost_changed_or_moved_rule() {
        let rules = [("t", "a", "1"), ("t", "a", "2"), ("t", "b", "3")];
        let whole = manifest(rules.into_iter(), true);
        assert!(manifest_has_ipv6(&whole));
        assert_eq!(whole, manifest([rules[2], rules[0], rules[1]].into_iter(), true), "the order of chains is free");
        for changed in
            [vec![rules[0], rules[2]], vec![rules[1], rules[0], rules[2]], vec![("t", "a", "x"), rules[1], rules[2]]]
        {
            assert_ne!(whole, manifest(changed.into_iter(), true));
        }
    }

    #[test]
    fn comments_fit_what_the_kernel_keeps() {
        let options = Options { reroute_interfaces: vec!["abcdefghijklmno".into()], ..Options::default() };
        assert!(rules(&options).iter().all(|p| p.rule.comment.len() < 128));
    }
}
