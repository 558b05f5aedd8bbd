//! The rules that Istio's agent puts into a pod by iptables, where that writes to nf_tables. Ours mean the same and stand beside them
//! without harm, but nobody would take those out when the pod leaves the mesh: so whoever puts ours in takes them over.

use mesh_net::{
    NetNs,
    nft::{Batch, Family, Nft},
};

use super::RulesError;

const TABLES: [&str; 3] = ["nat", "mangle", "raw"];
/// Of ambient mode alone. A sidecar has an `ISTIO_OUTPUT`, too, which is none of ours.
const MARKER: &str = "ISTIO_PRERT";
const CHAINS: [&str; 2] = [MARKER, "ISTIO_OUTPUT"];

/// Whether the pod is captured by them, wholly or in part.
pub fn are_present(ns: &NetNs) -> Result<bool, RulesError> {
    let mut nft = Nft::in_ns(ns)?;
    for family in [Family::Ip, Family::Ip6] {
        for table in TABLES {
            if nft.chains(family, table)?.iter().any(|chain| chain == MARKER) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// Takes the chains out, with the rules that lead to them; says whether there were any. Connections that they captured go on.
pub fn remove(ns: &NetNs) -> Result<bool, RulesError> {
    let mut nft = Nft::in_ns(ns)?;
    let mut any = false;
    for family in [Family::Ip, Family::Ip6] {
        // One transaction for all tables: half of them would send packets astray.
        let mut batch = Batch::new(family);
        let mut found = false;
        for table in TABLES {
            let present = nft.chains(family, table)?;
            if !present.iter().any(|chain| chain == MARKER) {
                continue;
            }
            found = true;
            for rule in nft.rules(family, table)? {
                if rule.target.is_some_and(|target| CHAINS.contains(&target.as_str())) {
                    batch.delete_rule(table, &rule.chain, rule.handle);
                }
            }
            for chain in CHAINS.iter().filter(|chain| present.iter().any(|p| p == *chain)) {
                batch.flush_chain(table, chain);
                batch.delete_chain(table, chain);
            }
        }
        if found {
            nft.apply(batch)?;
            any = true;
        }
    }
    Ok(any)
}
