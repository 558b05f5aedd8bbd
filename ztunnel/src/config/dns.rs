//! What the environment says about DNS.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
    sync::Arc,
};

use mesh_runtime::env::Reader;
use serde::Serialize;
use serde_json::Value;

use crate::dns::nameservers::{ResolvConf, parse};

/// The port capture rules redirect DNS to.
pub const DNS_PORT: u16 = 15053;
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// DNS for the pods' applications.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Dns {
    pub enabled: bool,
    /// Where to listen in a pod; `None`: both loopback addresses.
    pub address: Option<IpAddr>,
    /// Zero leaves the port to the kernel.
    pub port: u16,
    /// Asked about names that are not ours where it is not known whom the application wanted to ask.
    pub nameservers: Vec<SocketAddr>,
    /// Search domains of a dedicated workload; those of pods follow from their namespace.
    pub search: Vec<Arc<str>>,
    /// Its services come before those of other foreign namespaces.
    pub preferred_namespace: Option<Arc<str>>,
}

impl Dns {
    /// `metadata`: the node's, where upstream keeps these settings.
    pub(super) fn read(r: &Reader<'_>, metadata: &BTreeMap<String, Value>) -> Self {
        let (address, port) = address(r, metadata);
        let ResolvConf { nameservers, search } = resolv_conf();
        Self {
            enabled: text(metadata, "DNS_CAPTURE").is_none_or(|value| value == "true"),
            address,
            port,
            nameservers,
            search,
            preferred_namespace: r.optional("PREFERED_SERVICE_NAMESPACE").map(Arc::from),
        }
    }

    /// Where a pod's DNS is served; `local` stands for the pod where it has no namespace of its own.
    pub fn addresses(&self, local: Option<IpAddr>) -> Vec<SocketAddr> {
        let loopbacks = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        let ips = self.address.or(local).map_or_else(|| loopbacks.to_vec(), |ip| vec![ip]);
        ips.into_iter().map(|ip| SocketAddr::new(ip, self.port)).collect()
    }
}

fn text(metadata: &BTreeMap<String, Value>, key: &str) -> Option<String> {
    metadata.get(key).map(|value| value.as_str().map_or_else(|| value.to_string(), str::to_owned))
}

fn address(r: &Reader<'_>, metadata: &BTreeMap<String, Value>) -> (Option<IpAddr>, u16) {
    let Some(text) = text(metadata, "DNS_PROXY_ADDR") else { return (None, DNS_PORT) };
    let parsed = match text.strip_prefix("localhost:") {
        Some(port) => port.parse().ok().map(|port| (None, port)),
        None => text.parse().ok().map(|address: SocketAddr| (Some(address.ip()), address.port())),
    };
    parsed.unwrap_or_else(|| {
        r.problem("ISTIO_META_DNS_PROXY_ADDR", &text, "localhost:PORT or IP:PORT");
        (None, DNS_PORT)
    })
}

/// A proxy without the file relays to whom the application asked, and cannot help where that is not known.
fn resolv_conf() -> ResolvConf {
    fs::read_to_string(Path::new(RESOLV_CONF)).map(|text| parse(&text)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn read(vars: &[(&str, &str)]) -> Result<Dns, String> {
        let vars: HashMap<String, String> = vars.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let reader = Reader::new(&vars);
        let metadata = super::super::control_plane::metadata(&reader, &Default::default());
        let dns = Dns::read(&reader, &metadata);
        reader.finish().map(|()| dns).map_err(|problems| problems.to_string())
    }

    #[test]
    fn dns_is_on_unless_switched_off_and_listens_where_it_is_told() {
        assert!(read(&[]).expect("defaults").enabled);
        assert!(read(&[("ISTIO_META_DNS_CAPTURE", "true")]).expect("on").enabled);
        assert!(!read(&[("ISTIO_META_DNS_CAPTURE", "false")]).expect("off").enabled);
        let both = read(&[("ISTIO_META_DNS_PROXY_ADDR", "localhost:53")]).expect("localhost");
        assert_eq!(
            both.addresses(None).iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["127.0.0.1:53", "[::1]:53"]
        );
        let one = read(&[("ISTIO_META_DNS_PROXY_ADDR", "127.0.0.2:5353")]).expect("address");
        assert_eq!(one.addresses(None), ["127.0.0.2:5353".parse().expect("address")]);
        let problem = read(&[("ISTIO_META_DNS_PROXY_ADDR", "53")]).expect_err("no address");
        assert!(problem.contains("ISTIO_META_DNS_PROXY_ADDR") && problem.contains("localhost:PORT"), "{problem}");
    }
}
