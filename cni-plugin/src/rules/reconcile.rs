//! Putting the rules into a namespace, looking whether they are there, and taking them out again without cutting flows.
//!
//! Everything here blocks for a few milliseconds and may be repeated at any time.

use std::{fs, io};

use mesh_net::{
    NetNs, NetlinkError,
    link::Netlink,
    nft::{Batch, Nft},
};

use super::{flows, istio, model};
use crate::rules::model::{FAMILY, MANGLE, MANIFEST, NAT, OUTPUT, Options, PREROUTING, RAW};

/// Why rules could not be read or written, or are not what they should be.
#[derive(Debug, thiserror::Error)]
pub enum RulesError {
    #[error("cannot work in the pod's network namespace")]
    Namespace(#[from] io::Error),
    #[error("the kernel refuses the pod's rules")]
    Kernel(#[from] NetlinkError),
    #[error("the pod's rules are not as they were installed: {0}")]
    Mismatch(String),
}

type Result<T> = std::result::Result<T, RulesError>;

/// Makes the namespace's rules those of `options`, and nobody else's; says whether anything had to change. IPv6 is left out where `lo`
/// has none.
pub fn apply(ns: &NetNs, options: &Options) -> Result<bool> {
    let options = Options { ipv6: options.ipv6 && has_ipv6(ns)?, ..options.clone() };
    match verify_exactly(ns, &options) {
        Ok(()) => return istio::remove(ns),
        Err(RulesError::Mismatch(_)) => {}
        Err(error) => return Err(error),
    }
    // Routing before rules: a marked packet that finds no route would leave the pod.
    let mut netlink = Netlink::in_ns(ns)?;
    let lo = netlink.index("lo")?;
    for (rule, route) in model::routing(lo, options.ipv6) {
        netlink.add_route(&route)?;
        netlink.add_rule(&rule)?;
    }
    Nft::in_ns(ns)?.apply(model::batch(&options))?;
    verify_exactly(ns, &options)?;
    // After ours: at no moment is the pod uncaptured.
    istio::remove(ns)?;
    Ok(true)
}

/// As [`apply`] would have left it, without changing anything.
pub fn verify(ns: &NetNs, options: &Options) -> Result<()> {
    verify_exactly(ns, &Options { ipv6: options.ipv6 && has_ipv6(ns)?, ..options.clone() })
}

fn verify_exactly(ns: &NetNs, options: &Options) -> Result<()> {
    let found = installed_manifest(ns)?.ok_or_else(|| RulesError::Mismatch("there are none".into()))?;
    let rules = model::rules(options);
    let wanted = model::manifest(rules.iter().map(|p| (p.table, p.chain, p.rule.comment.as_str())), options.ipv6);
    if found != wanted {
        return Err(RulesError::Mismatch("they are of another version or for other settings".into()));
    }
    verify_installed(ns).map(drop)
}

/// Whether the rules are complete by their own manifest; `false` when the namespace has none at all.
pub fn verify_installed(ns: &NetNs) -> Result<bool> {
    let mut nft = Nft::in_ns(ns)?;
    let Some(manifest) = manifest_of(&mut nft)? else {
        let traces = nft.tables(FAMILY)?.into_iter().find(|t| [NAT, MANGLE, RAW].contains(&t.as_str()));
        return traces.map_or(Ok(false), |t| Err(RulesError::Mismatch(format!("table {t} has no manifest"))));
    };
    let mut rules = nft.rules(FAMILY, MANGLE)?;
    for table in [NAT, RAW] {
        rules.extend(nft.rules(FAMILY, table)?);
    }
    rules.retain(|rule| rule.chain != MANIFEST);
    let ipv6 = model::manifest_has_ipv6(&manifest);
    let found = model::manifest(rules.iter().map(|r| (r.table.as_str(), r.chain.as_str(), r.comment.as_str())), ipv6);
    if found != manifest {
        return Err(RulesError::Mismatch(format!("found {found}, installed were {manifest}")));
    }
    verify_routing(ns, ipv6).map(|()| true)
}

/// Whether there are rules that we have put there, complete or not. Those of others have no manifest.
pub fn is_ours(ns: &NetNs) -> Result<bool> {
    Ok(installed_manifest(ns)?.is_some())
}

fn verify_routing(ns: &NetNs, ipv6: bool) -> Result<()> {
    let mut netlink = Netlink::in_ns(ns)?;
    let lo = netlink.index("lo")?;
    let (rules, routes) = (netlink.rules()?, netlink.routes(model::ROUTE_TABLE)?);
    for (rule, route) in model::routing(lo, ipv6) {
        if !rules.contains(&rule) {
            return Err(RulesError::Mismatch(format!("the routing rule for mark {:#x} is missing", rule.mark)));
        }
        if !routes.contains(&route) {
            let text = format!("the local route to {} in table {} is missing", route.dst, route.table);
            return Err(RulesError::Mismatch(text));
        }
    }
    Ok(())
}

/// First step of leaving: new connections are no longer redirected, captured ones go on.
pub fn flush_redirects(ns: &NetNs) -> Result<()> {
    let mut nft = Nft::in_ns(ns)?;
    let present = nft.chains(FAMILY, NAT)?;
    let mut batch = Batch::new(FAMILY);
    for chain in [PREROUTING, OUTPUT] {
        if present.iter().any(|c| c == chain) {
            batch.flush_chain(NAT, chain);
        }
    }
    Ok(nft.apply(batch)?)
}

/// Last step of leaving: no trace of ours remains. Captured flows that are still open are cut.
pub fn remove(ns: &NetNs) -> Result<()> {
    let mut batch = Batch::new(FAMILY);
    for table in [NAT, RAW, MANGLE] {
        batch.remove_table(table);
    }
    Nft::in_ns(ns)?.apply(batch)?;
    if istio::are_present(ns)? {
        // Its agent has the pod by now, and uses the same routing.
        return Ok(());
    }
    let mut netlink = Netlink::in_ns(ns)?;
    let lo = netlink.index("lo")?;
    for (rule, route) in model::routing(lo, has_ipv6(ns)?) {
        netlink.delete_rule(&rule)?;
        netlink.delete_route(&route)?;
    }
    Ok(())
}

/// Open connections that depend on the rules.
pub fn captured_flows(ns: &NetNs) -> io::Result<usize> {
    Ok(rows(ns)?.into_iter().filter(|row| row.is_captured()).count())
}

/// Open connections with the world in which ztunnel has no part: when rules have just been installed, the flows that are older.
pub fn older_flows(ns: &NetNs) -> io::Result<usize> {
    Ok(rows(ns)?.into_iter().filter(|row| row.is_foreign()).count())
}

fn rows(ns: &NetNs) -> io::Result<Vec<flows::Row>> {
    let [v4, v6] =
        ns.run_on_thread(|| ["tcp", "tcp6"].map(|name| read_if_there(&format!("/proc/thread-self/net/{name}"))))?;
    let tables = [v4?, v6?];
    Ok(tables.iter().flatten().flat_map(|table| flows::parse(table)).collect())
}

fn installed_manifest(ns: &NetNs) -> Result<Option<String>> {
    Ok(manifest_of(&mut Nft::in_ns(ns)?)?)
}

fn manifest_of(nft: &mut Nft) -> std::result::Result<Option<String>, NetlinkError> {
    let rules = nft.rules(FAMILY, MANGLE)?;
    Ok(rules.into_iter().find(|rule| rule.chain == MANIFEST).map(|rule| rule.comment))
}

/// `None` where there is no such file; any other failure is one, since "none" would be taken for an answer.
fn read_if_there(path: &str) -> io::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Some pods switch IPv6 off for `lo`; then no route can be made there. Without it on any other interface none is needed; with it,
/// IPv6 would leave uncaptured, which is refused.
fn has_ipv6(ns: &NetNs) -> io::Result<bool> {
    let enabled = |interface: &str| {
        let value = read_if_there(&format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6"))?;
        io::Result::Ok(value.is_some_and(|v| v.trim() == "0"))
    };
    ns.run(|| {
        if enabled("lo")? {
            return Ok(true);
        }
        let Ok(interfaces) = fs::read_dir("/proc/sys/net/ipv6/conf") else { return Ok(false) };
        for interface in interfaces.flatten() {
            let name = interface.file_name().to_string_lossy().into_owned();
            // "all" and "default" are templates, not interfaces.
            if !["all", "default", "lo"].contains(&name.as_str()) && enabled(&name)? {
                let message = format!("IPv6 is on for {name} but off for lo, where captured IPv6 would have to return");
                return Err(io::Error::other(message));
            }
        }
        Ok(false)
    })?
}
