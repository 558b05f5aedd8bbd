//! nf_tables without tools: rules as data, applied as one atomic transaction, read back for verification.
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use mesh_net::nft::{Batch, Chain, ChainType, Family, Hook, Nft, Rule};
//! let mut batch = Batch::new(Family::Inet);
//! batch.replace_table("demo");
//! batch.add_chain("demo", &Chain::base("out", ChainType::Nat, Hook::Output, -100));
//! batch.add_rule("demo", "out", &Rule::new("all TCP").tcp().redirect(15001));
//! Nft::open()?.apply(batch)?;
//! # Ok(())
//! # }
//! ```

use std::{io, net::IpAddr};

use nix::sys::socket::SockProtocol;

use crate::{
    netlink::{ACK, APPEND, Attrs, CREATE, Message, NetlinkError, REQUEST, Reply, Socket, string},
    netns::NetNs,
};

mod expr;
mod rule;

pub(crate) use expr::octets;
pub use expr::{AddressType, Cmp, Ct, CtState, Direction, Expr, Meta, Nat, Payload, Verdict};
pub use rule::Rule;

type Result<T> = std::result::Result<T, NetlinkError>;

/// The protocols a table sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    Inet = 1,
    Ip = 2,
    Ip6 = 10,
}

/// What a base chain is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChainType {
    Filter,
    /// Sees the first packet of each connection.
    Nat,
    /// On output, a changed mark makes the kernel route the packet again.
    Route,
}

/// Where a base chain sits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Hook {
    Prerouting,
    Input,
    Forward,
    Output,
    Postrouting,
}

/// What happens to a packet that no rule of a base chain decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Policy {
    Drop,
    Accept,
}

/// A chain; without `base` it is one that rules jump to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    pub name: String,
    pub base: Option<(ChainType, Hook, i32, Policy)>,
}

impl Chain {
    pub fn regular(name: &str) -> Self {
        Self { name: name.into(), base: None }
    }

    /// A base chain that accepts by default.
    pub fn base(name: &str, kind: ChainType, hook: Hook, priority: i32) -> Self {
        Self { name: name.into(), base: Some((kind, hook, priority, Policy::Accept)) }
    }
}

/// What the elements of a set are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SetKey {
    Ipv4,
    Ipv6,
}

/// Changes that take effect together or not at all.
pub struct Batch {
    family: Family,
    messages: Vec<Message>,
    sets: u32,
}

impl Batch {
    pub fn new(family: Family) -> Self {
        Self { family, messages: Vec::new(), sets: 0 }
    }

    /// No error when it exists.
    pub fn add_table(&mut self, table: &str) {
        self.push(NEWTABLE, CREATE, format!("add table {table}"), |m| {
            m.attr_str(TABLE_NAME, table);
        });
    }

    /// `ENOENT` when it does not exist.
    pub fn delete_table(&mut self, table: &str) {
        self.push(DELTABLE, 0, format!("delete table {table}"), |m| {
            m.attr_str(TABLE_NAME, table);
        });
    }

    /// As [`Batch::delete_table`], with no error when it does not exist.
    pub fn remove_table(&mut self, table: &str) {
        self.add_table(table);
        self.delete_table(table);
    }

    /// An empty table, whatever was there before.
    pub fn replace_table(&mut self, table: &str) {
        self.remove_table(table);
        self.add_table(table);
    }

    /// Removes all rules of a table; chains and sets stay.
    pub fn flush_table(&mut self, table: &str) {
        self.push(DELRULE, 0, format!("flush table {table}"), |m| {
            m.attr_str(RULE_TABLE, table);
        });
    }

    pub fn add_chain(&mut self, table: &str, chain: &Chain) {
        self.push(NEWCHAIN, CREATE, format!("add chain {table} {}", chain.name), |m| {
            m.attr_str(CHAIN_TABLE, table).attr_str(CHAIN_NAME, &chain.name);
            if let Some((kind, hook, priority, policy)) = chain.base {
                m.nest(CHAIN_HOOK, |m| {
                    m.attr_be32(HOOK_NUMBER, hook as u32).attr_be32(HOOK_PRIORITY, priority.cast_unsigned());
                });
                m.attr_be32(CHAIN_POLICY, policy as u32).attr_str(CHAIN_TYPE, chain_type(kind));
            }
        });
    }

    /// Removes all rules of a chain.
    pub fn flush_chain(&mut self, table: &str, chain: &str) {
        self.push(DELRULE, 0, format!("flush chain {table} {chain}"), |m| {
            m.attr_str(RULE_TABLE, table).attr_str(RULE_CHAIN, chain);
        });
    }

    /// The chain must be empty and unreferenced.
    pub fn delete_chain(&mut self, table: &str, chain: &str) {
        self.push(DELCHAIN, 0, format!("delete chain {table} {chain}"), |m| {
            m.attr_str(CHAIN_TABLE, table).attr_str(CHAIN_NAME, chain);
        });
    }

    /// A set of addresses. No error when it exists with the same key.
    pub fn add_set(&mut self, table: &str, set: &str, key: SetKey) {
        self.sets += 1;
        let id = self.sets;
        let (key_type, length) = match key {
            SetKey::Ipv4 => (7, 4),
            SetKey::Ipv6 => (8, 16),
        };
        self.push(NEWSET, CREATE, format!("add set {table} {set}"), |m| {
            m.attr_str(SET_TABLE, table).attr_str(SET_NAME, set).attr_be32(SET_FLAGS, 0);
            m.attr_be32(SET_KEY_TYPE, key_type).attr_be32(SET_KEY_LENGTH, length).attr_be32(SET_ID, id);
        });
    }

    /// No error for elements that are there already. All must be of the set's family.
    pub fn add_elements(&mut self, table: &str, set: &str, elements: &[IpAddr]) {
        self.elements(NEWSETELEM, CREATE, "add to", table, set, elements);
    }

    /// `ENOENT` when one is not there.
    pub fn delete_elements(&mut self, table: &str, set: &str, elements: &[IpAddr]) {
        self.elements(DELSETELEM, 0, "delete from", table, set, elements);
    }

    fn elements(&mut self, kind: u16, flags: u16, verb: &str, table: &str, set: &str, elements: &[IpAddr]) {
        self.push(kind, flags, format!("{verb} set {table} {set}"), |m| {
            m.attr_str(ELEMENTS_TABLE, table).attr_str(ELEMENTS_SET, set).nest(ELEMENTS_LIST, |m| {
                for element in elements {
                    m.nest(LIST_ELEMENT, |m| {
                        m.nest(ELEMENT_KEY, |m| {
                            m.attr(DATA_VALUE, &octets(*element));
                        });
                    });
                }
            });
        });
    }

    /// Appends a rule to a chain.
    pub fn add_rule(&mut self, table: &str, chain: &str, rule: &Rule) {
        self.push(NEWRULE, CREATE | APPEND, format!("add rule `{}` to {table} {chain}", rule.comment), |m| {
            m.attr_str(RULE_TABLE, table).attr_str(RULE_CHAIN, chain);
            m.nest(RULE_EXPRESSIONS, |m| rule.exprs.iter().for_each(|e| e.encode(m)));
            if !rule.comment.is_empty() {
                m.attr(RULE_USERDATA, &comment_userdata(&rule.comment));
            }
        });
    }

    pub fn delete_rule(&mut self, table: &str, chain: &str, handle: u64) {
        self.push(DELRULE, 0, format!("delete rule {handle} from {table} {chain}"), |m| {
            m.attr_str(RULE_TABLE, table).attr_str(RULE_CHAIN, chain).attr(RULE_HANDLE, &handle.to_be_bytes());
        });
    }

    fn push(&mut self, kind: u16, flags: u16, what: String, fill: impl FnOnce(&mut Message)) {
        let mut message = new_message(kind, flags | REQUEST, self.family, what);
        fill(&mut message);
        self.messages.push(message);
    }

    fn into_messages(self) -> Vec<Message> {
        let edge = |kind| {
            // The resource id of both edges names the subsystem.
            let header = [&[0, 0][..], &NFTABLES.to_be_bytes()].concat();
            Message::new(kind, REQUEST, &header, "apply the nf_tables transaction")
        };
        let mut messages = vec![edge(BATCH_BEGIN)];
        messages.extend(self.messages);
        // One acknowledgement speaks for all: the kernel answers only after the commit, and errors come unasked.
        if let Some(last) = messages.last_mut() {
            last.add_flags(ACK);
        }
        messages.push(edge(BATCH_END));
        messages
    }
}

/// A rule as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstalledRule {
    pub table: String,
    pub chain: String,
    pub handle: u64,
    /// Empty when the rule has none.
    pub comment: String,
    /// The chain that it jumps or goes to.
    pub target: Option<String>,
    /// Packets its counter has seen; `None` without a counter.
    pub packets: Option<u64>,
}

/// The rules of one namespace.
#[derive(Debug)]
pub struct Nft(Socket);

impl Nft {
    /// Of the calling thread's namespace, now and later.
    pub fn open() -> io::Result<Self> {
        Ok(Self(Socket::open(SockProtocol::NetlinkNetFilter)?))
    }

    pub fn in_ns(ns: &NetNs) -> io::Result<Self> {
        ns.run(Self::open)?
    }

    /// All of the batch or nothing. The error names the first change the kernel refused.
    pub fn apply(&mut self, batch: Batch) -> Result<()> {
        if batch.messages.is_empty() {
            return Ok(());
        }
        self.0.transact(batch.into_messages())
    }

    pub fn tables(&mut self, family: Family) -> Result<Vec<String>> {
        let replies = self.0.dump(|| new_message(GETTABLE, 0, family, "list tables".into()))?;
        Ok(replies.iter().filter_map(|r| attr(r, TABLE_NAME).map(string)).collect())
    }

    /// Names of the chains of a table, none when there is no such table.
    pub fn chains(&mut self, family: Family, table: &str) -> Result<Vec<String>> {
        let replies = self.0.dump(|| new_message(GETCHAIN, 0, family, "list chains".into()))?;
        let ours = replies.iter().filter(|r| attr(r, CHAIN_TABLE).is_some_and(|t| string(t) == table));
        Ok(ours.filter_map(|r| attr(r, CHAIN_NAME).map(string)).collect())
    }

    /// The rules of a table in the order of evaluation within each chain; none when there is no such table.
    pub fn rules(&mut self, family: Family, table: &str) -> Result<Vec<InstalledRule>> {
        let replies = self.0.dump(|| {
            let mut message = new_message(GETRULE, 0, family, format!("list rules of {table}"));
            message.attr_str(RULE_TABLE, table);
            message
        });
        let replies = absent_is_empty(replies)?;
        Ok(replies.iter().filter_map(installed_rule).filter(|rule| rule.table == table).collect())
    }

    /// The addresses in a set, none when there is no such set.
    pub fn elements(&mut self, family: Family, table: &str, set: &str) -> Result<Vec<IpAddr>> {
        let replies = self.0.dump(|| {
            let mut message = new_message(GETSETELEM, 0, family, format!("list set {table} {set}"));
            message.attr_str(ELEMENTS_TABLE, table).attr_str(ELEMENTS_SET, set);
            message
        });
        let replies = absent_is_empty(replies)?;
        let lists = replies.iter().filter_map(|r| attr(r, ELEMENTS_LIST)).flat_map(Attrs);
        Ok(lists.filter_map(|(_, element)| element_ip(element)).collect())
    }
}

fn absent_is_empty(replies: Result<Vec<Reply>>) -> Result<Vec<Reply>> {
    match replies {
        Err(error) if error.is(libc::ENOENT) => Ok(Vec::new()),
        replies => replies,
    }
}

// Numbers of linux/netfilter/nf_tables.h and nfnetlink.h.
const NFTABLES: u16 = 10;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
const NEWTABLE: u16 = 0;
const GETTABLE: u16 = 1;
const DELTABLE: u16 = 2;
const NEWCHAIN: u16 = 3;
const GETCHAIN: u16 = 4;
const DELCHAIN: u16 = 5;
const NEWRULE: u16 = 6;
const GETRULE: u16 = 7;
const DELRULE: u16 = 8;
const NEWSET: u16 = 9;
const NEWSETELEM: u16 = 12;
const GETSETELEM: u16 = 13;
const DELSETELEM: u16 = 14;
const TABLE_NAME: u16 = 1;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const CHAIN_TYPE: u16 = 7;
const HOOK_NUMBER: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const RULE_HANDLE: u16 = 3;
const RULE_EXPRESSIONS: u16 = 4;
const RULE_USERDATA: u16 = 7;
const SET_TABLE: u16 = 1;
const SET_NAME: u16 = 2;
const SET_FLAGS: u16 = 3;
const SET_KEY_TYPE: u16 = 4;
const SET_KEY_LENGTH: u16 = 5;
const SET_ID: u16 = 10;
const ELEMENTS_TABLE: u16 = 1;
const ELEMENTS_SET: u16 = 2;
const ELEMENTS_LIST: u16 = 3;
const ELEMENT_KEY: u16 = 1;
const LIST_ELEMENT: u16 = 1;
const DATA_VALUE: u16 = 1;
const EXPR_NAME: u16 = 1;
const EXPR_DATA: u16 = 2;
const IMMEDIATE_DATA: u16 = 2;
const DATA_VERDICT: u16 = 2;
const VERDICT_CHAIN: u16 = 2;
const COUNTER_PACKETS: u16 = 2;
/// nfgenmsg: family, version, resource id.
const GENERIC_HEADER: usize = 4;

fn new_message(kind: u16, flags: u16, family: Family, what: String) -> Message {
    Message::new(NFTABLES << 8 | kind, flags, &[family as u8, 0, 0, 0], what)
}

fn chain_type(kind: ChainType) -> &'static str {
    match kind {
        ChainType::Filter => "filter",
        ChainType::Nat => "nat",
        ChainType::Route => "route",
    }
}

/// The layout the `nft` command shows as `comment "…"`: type 0, length, NUL-terminated text.
fn comment_userdata(comment: &str) -> Vec<u8> {
    const LONGEST: usize = 128;
    let end = comment.floor_char_boundary(LONGEST - 1);
    let text = &comment.as_bytes()[..end];
    let length = u8::try_from(text.len() + 1).unwrap_or(u8::MAX);
    [&[0, length], text, &[0]].concat()
}

fn comment_of(userdata: &[u8]) -> String {
    match userdata {
        [0, length, rest @ ..] => rest.get(..usize::from(*length)).map(string).unwrap_or_default(),
        _ => String::new(),
    }
}

fn attr(reply: &Reply, kind: u16) -> Option<&[u8]> {
    Attrs(reply.body.get(GENERIC_HEADER..)?).value(kind)
}

fn installed_rule(reply: &Reply) -> Option<InstalledRule> {
    Some(InstalledRule {
        table: string(attr(reply, RULE_TABLE)?),
        chain: string(attr(reply, RULE_CHAIN)?),
        handle: u64::from_be_bytes(attr(reply, RULE_HANDLE)?.try_into().ok()?),
        comment: attr(reply, RULE_USERDATA).map(comment_of).unwrap_or_default(),
        target: attr(reply, RULE_EXPRESSIONS).and_then(target),
        packets: attr(reply, RULE_EXPRESSIONS).and_then(packets),
    })
}

fn target(expressions: &[u8]) -> Option<String> {
    let named = |e: &&[u8]| Attrs(e).value(EXPR_NAME).is_some_and(|n| string(n) == "immediate");
    let loads = Attrs(expressions).map(|(_, e)| e).filter(named).filter_map(|e| Attrs(e).value(EXPR_DATA));
    let mut verdicts = loads.filter_map(|e| Attrs(Attrs(e).value(IMMEDIATE_DATA)?).value(DATA_VERDICT));
    verdicts.find_map(|verdict| Attrs(verdict).value(VERDICT_CHAIN)).map(string)
}

fn packets(expressions: &[u8]) -> Option<u64> {
    let counter =
        Attrs(expressions).find(|(_, e)| Attrs(e).value(EXPR_NAME).is_some_and(|n| string(n) == "counter"))?;
    let data = Attrs(counter.1).value(EXPR_DATA)?;
    Some(u64::from_be_bytes(Attrs(data).value(COUNTER_PACKETS)?.try_into().ok()?))
}

fn element_ip(element: &[u8]) -> Option<IpAddr> {
    let key = Attrs(Attrs(element).value(ELEMENT_KEY)?).value(DATA_VALUE)?;
    match key.len() {
        4 => Some(IpAddr::from(<[u8; 4]>::try_from(key).ok()?)),
        16 => Some(IpAddr::from(<[u8; 16]>::try_from(key).ok()?)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_reply_makes_a_reader_panic(body in prop::collection::vec(any::<u8>(), 0..200)) {
            installed_rule(&Reply::for_test(NEWRULE, body.clone()));
            comment_of(&body);
            packets(&body);
            target(&body);
            element_ip(&body);
        }

        #[test]
        fn comments_read_back_cut_to_what_the_kernel_keeps(comment in "\\PC{0,200}") {
            let read = comment_of(&comment_userdata(&comment));
            prop_assert!(comment.starts_with(&read) && (read.len() == comment.len() || read.len() > 120));
        }
    }
}
