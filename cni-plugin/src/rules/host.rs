//! The node's own table: what makes its health probes recognisable in captured pods.
//!
//! A probe reaches a pod from the node's address, as does whatever else the node sends or forwards. What its own processes open to a captured
//! pod gets a source address that no one else has; in the pod, connections from there pass the proxy by. The kernel takes the answers
//! back to the process by the connection's record.

use std::{collections::BTreeSet, net::IpAddr};

use mesh_net::{
    NetNs,
    nft::{Batch, Chain, ChainType, Hook, Nft, Rule, SetKey},
};

use super::{
    Options, RulesError,
    model::{FAMILY, digest, probes},
};

pub const TABLE: &str = "fairway-host";
const CHAIN: &str = "postrouting";
/// Before those of kube-proxy and of networks that masquerade: the first to choose a source wins.
const PRIORITY: i32 = 90;
const ELEMENTS_PER_MESSAGE: usize = 500;

/// The set of addresses of the family of `ip`.
fn set_of(ip: IpAddr) -> (&'static str, SetKey) {
    if ip.is_ipv4() { ("probed-v4", SetKey::Ipv4) } else { ("probed-v6", SetKey::Ipv6) }
}

/// `user` is the kubelet's: that of the sockets whose traffic is meant. Forwarded packets have none.
fn rules(options: &Options, user: u32) -> Vec<Rule> {
    let rule = |probe: IpAddr| {
        let (set, _) = set_of(probe);
        let mut rule = Rule::new(set).daddr_in(probe, set).tcp().skuid(user).counter().snat(probe);
        rule.comment = format!("{set}#{:08x}", digest(&format!("{:?}", rule.exprs)));
        rule
    };
    probes(options).map(rule).collect()
}

/// The whole table in one transaction, whatever it was before.
fn batch(options: &Options, user: u32, addresses: &BTreeSet<IpAddr>) -> Batch {
    let mut batch = Batch::new(FAMILY);
    batch.replace_table(TABLE);
    batch.add_chain(TABLE, &Chain::base(CHAIN, ChainType::Nat, Hook::Postrouting, PRIORITY));
    for probe in probes(options) {
        let (set, key) = set_of(probe);
        batch.add_set(TABLE, set, key);
        let members: Vec<IpAddr> = addresses.iter().copied().filter(|ip| ip.is_ipv4() == probe.is_ipv4()).collect();
        members.chunks(ELEMENTS_PER_MESSAGE).for_each(|members| batch.add_elements(TABLE, set, members));
    }
    rules(options, user).iter().for_each(|rule| batch.add_rule(TABLE, CHAIN, rule));
    batch
}

/// The addresses that are in the sets; `None` when the table is not as we would make it.
pub fn read(ns: &NetNs, options: &Options, user: u32) -> Result<Option<BTreeSet<IpAddr>>, RulesError> {
    let comments: Vec<String> = Nft::in_ns(ns)?.rules(FAMILY, TABLE)?.into_iter().map(|rule| rule.comment).collect();
    let wanted: Vec<String> = rules(options, user).into_iter().map(|rule| rule.comment).collect();
    if comments == wanted { members(ns, options).map(Some) } else { Ok(None) }
}

/// The addresses in the sets of a table in whatever state.
pub fn members(ns: &NetNs, options: &Options) -> Result<BTreeSet<IpAddr>, RulesError> {
    let mut nft = Nft::in_ns(ns)?;
    let mut found = BTreeSet::new();
    for probe in probes(options) {
        found.extend(nft.elements(FAMILY, TABLE, set_of(probe).0)?);
    }
    Ok(found)
}

/// Makes the table have these addresses; open connections keep what they have.
pub fn write(ns: &NetNs, options: &Options, user: u32, addresses: &BTreeSet<IpAddr>) -> Result<(), RulesError> {
    Ok(Nft::in_ns(ns)?.apply(batch(options, user, addresses))?)
}

/// Whether there was a table to remove.
pub fn remove(ns: &NetNs) -> Result<bool, RulesError> {
    let mut nft = Nft::in_ns(ns)?;
    if !nft.tables(FAMILY)?.iter().any(|table| table == TABLE) {
        return Ok(false);
    }
    let mut batch = Batch::new(FAMILY);
    batch.remove_table(TABLE);
    nft.apply(batch)?;
    Ok(true)
}
