//! How the control plane is reached, what it is told of this process, and what takes its place.

use std::{collections::BTreeMap, fmt, path::Path};

use mesh_identity::{ControlPlane, ControlTls, RootSource, TokenSource};
use mesh_runtime::env::Reader;
use serde::Serialize;

use super::{debug, dns::Dns, mesh_file::ProxyConfig};
use crate::static_config::Source;

const TOKEN_PATH: &str = "./var/run/secrets/tokens/istio-token";
const ROOT_PATH: &str = "./var/run/secrets/istio/root-cert.pem";

/// How to reach the control plane or the CA.
#[derive(Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Upstream {
    /// `host:port`, with or without `https://`.
    pub address: String,
    #[serde(serialize_with = "debug")]
    pub roots: RootSource,
    #[serde(skip)]
    pub token: TokenSource,
    #[serde(skip)]
    pub headers: Vec<(String, String)>,
    pub alternative_name: Option<String>,
}

impl Upstream {
    /// The address with everything that is needed to connect.
    pub fn control_plane(&self, tls: ControlTls) -> ControlPlane {
        ControlPlane {
            address: self.address.clone(),
            roots: self.roots.clone(),
            token: self.token.clone(),
            headers: self.headers.clone(),
            alternative_name: self.alternative_name.clone(),
            tls,
        }
    }
}

/// Secrets left out.
impl fmt::Debug for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upstream")
            .field("address", &self.address)
            .field("roots", &self.roots)
            .field("alternative_name", &self.alternative_name)
            .finish_non_exhaustive()
    }
}

/// `prefix` is `XDS` or `CA`.
pub(super) fn upstream(r: &Reader<'_>, prefix: &str, cluster: &str, proxy: &ProxyConfig) -> Upstream {
    let in_cluster = r.optional("KUBERNETES_SERVICE_HOST").is_some();
    let default = if in_cluster { "https://istiod.istio-system.svc:15012" } else { "https://localhost:15012" };
    let default = proxy.discovery_address.as_deref().unwrap_or(default);
    let header_prefix = format!("{prefix}_HEADER_");
    let extra = r.with_prefix(&header_prefix);
    let headers = extra.iter().map(|(name, value)| (name[header_prefix.len()..].to_ascii_lowercase(), value.clone()));
    Upstream {
        address: with_scheme(r.string(&format!("{prefix}_ADDRESS"), default)),
        roots: roots(&r.string(&format!("{prefix}_ROOT_CA"), ROOT_PATH)),
        token: token(r.optional("AUTH_TOKEN")),
        headers: headers.chain([("clusterid".to_owned(), cluster.to_owned())]).collect(),
        alternative_name: r.optional(&format!("ALT_{prefix}_HOSTNAME")),
    }
}

fn with_scheme(address: String) -> String {
    if address.contains("://") { address } else { format!("https://{address}") }
}

fn roots(text: &str) -> RootSource {
    match text {
        "SYSTEM" => RootSource::System,
        pem if pem.contains("-----BEGIN") => RootSource::Pem(pem.to_owned()),
        path => RootSource::File(path.into()),
    }
}

/// A token never holds a slash, so a path is known for one even before its file exists.
fn token(text: Option<String>) -> TokenSource {
    match text {
        Some(path) if path.contains('/') || Path::new(&path).exists() => TokenSource::File(path.into()),
        Some(literal) => TokenSource::Literal(literal),
        None if Path::new(TOKEN_PATH).exists() => TokenSource::File(TOKEN_PATH.into()),
        None => TokenSource::None,
    }
}

pub(super) fn static_config(r: &Reader<'_>) -> Option<Source> {
    let (path, inline) = (r.optional("LOCAL_XDS_PATH"), r.optional("LOCAL_XDS"));
    if let (Some(path), Some(_)) = (&path, &inline) {
        r.problem("LOCAL_XDS_PATH", path, "unset, as LOCAL_XDS is set too: the facts are in one place");
    }
    path.map(|path| Source::File(path.into())).or_else(|| inline.map(Source::Inline))
}

/// The DNS proxy answers from the whole registry, which a proxy that asks on demand does not hold.
pub(super) fn on_demand(r: &Reader<'_>, dns: &Dns) -> bool {
    let wanted = r.bool("XDS_ON_DEMAND", false);
    if wanted && dns.enabled {
        r.problem(
            "XDS_ON_DEMAND",
            "true",
            "false, or ISTIO_META_DNS_CAPTURE=false beside it: the DNS proxy needs the whole registry",
        );
    }
    wanted
}

pub(super) fn metadata(r: &Reader<'_>, proxy: &ProxyConfig) -> BTreeMap<String, serde_json::Value> {
    let told = proxy.metadata().map(|(name, value)| (name, serde_json::Value::String(value)));
    let mut out: BTreeMap<_, _> = told.collect();
    for (name, value) in r.with_prefix("ISTIO_META_") {
        out.insert(name["ISTIO_META_".len()..].to_owned(), serde_json::Value::String(value));
    }
    for (name, value) in r.with_prefix("ISTIO_METAJSON_") {
        match serde_json::from_str(&value) {
            Ok(json) => drop(out.insert(name["ISTIO_METAJSON_".len()..].to_owned(), json)),
            Err(_) => r.problem(&name, &value, "a JSON value"),
        }
    }
    out
}
