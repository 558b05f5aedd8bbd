//! `resolv.conf(5)`: the two lines a relay needs.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

const PORT: u16 = 53;
/// As many as the C library reads.
const SERVERS: usize = 3;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResolvConf {
    pub nameservers: Vec<SocketAddr>,
    /// Lower case, without the last dot.
    pub search: Vec<Arc<str>>,
}

/// Lines that do not read are skipped, as the C library does; the last `search` or `domain` counts.
pub fn parse(text: &str) -> ResolvConf {
    let mut conf = ResolvConf::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => conf.nameservers.extend(words.next().and_then(nameserver)),
            Some("search" | "domain") => conf.search = words.filter_map(domain).collect(),
            _ => {}
        }
    }
    conf.nameservers.truncate(SERVERS);
    conf
}

/// An address with a zone is of one interface, which a pod does not have.
fn nameserver(text: &str) -> Option<SocketAddr> {
    text.parse().ok().map(|ip: IpAddr| SocketAddr::new(ip.to_canonical(), PORT))
}

fn domain(text: &str) -> Option<Arc<str>> {
    let text = text.trim_end_matches('.').to_ascii_lowercase();
    (!text.is_empty()).then(|| text.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nameservers_and_the_last_search_list_are_read_and_nonsense_is_skipped() {
        let text = "# nameserver 1.1.1.1\n; x\nnameserver 10.96.0.10\nnameserver fd00::a\nnameserver fe80::1%eth0\nnameserver\n\
            nameserver 10.0.0.1\nnameserver 10.0.0.2\noptions ndots:5\ndomain old\nsearch Demo.svc.cluster.local. .\n";
        let conf = parse(text);
        let servers: Vec<String> = conf.nameservers.iter().map(ToString::to_string).collect();
        assert_eq!(servers, ["10.96.0.10:53", "[fd00::a]:53", "10.0.0.1:53"]);
        assert_eq!(conf.search, ["demo.svc.cluster.local".into()]);
        assert_eq!(parse("\u{0}\nsearch\nnameserver x"), ResolvConf::default());
    }
}
