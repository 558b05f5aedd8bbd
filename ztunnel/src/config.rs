//! Configuration from the environment, under upstream's names, resolved once: no option is left that means "the default".

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    num::NonZeroUsize,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use mesh_core::workload::OutboundPolicy;
use mesh_net::{KeepAlive, SocketOptions, Transparent};
use mesh_runtime::{
    env::{Problems, Reader, Vars},
    telemetry::Format,
};
use serde::{Serialize, Serializer};

use crate::{inpod::WorkloadInfo, static_config::Source};

mod control_plane;
pub mod dns;
mod mesh_file;
mod threads;
mod timing;
mod trust;

pub use control_plane::Upstream;
use control_plane::upstream;
use mesh_file::{MeshFile, ProxyConfig};
pub use trust::Trust;

/// The mark by which capture rules know the proxy's own packets.
const PACKET_MARK: u32 = 1337;

/// What the process was told to do.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Config {
    pub mode: ProxyMode,
    /// The one workload of dedicated mode.
    pub workload: Option<WorkloadInfo>,
    /// Empty: every workload counts as local.
    pub node: Arc<str>,
    pub pod_name: String,
    pub pod_namespace: String,
    pub service_account: String,
    pub instance_ip: IpAddr,
    pub trust_domain: String,
    /// Trust domains whose identities count as ours, while names migrate.
    pub trust_domain_aliases: Vec<Arc<str>>,
    pub trust: Trust,
    /// Names of services end in `.svc.` and this.
    pub cluster_domain: Arc<str>,
    /// Of workloads whose record says nothing about it.
    #[serde(serialize_with = "debug")]
    pub outbound_policy: OutboundPolicy,
    pub network: Arc<str>,
    pub cluster_id: Arc<str>,
    /// Shown as `istio_build`'s tag.
    pub version: String,
    /// `ISTIO_META_*` and `ISTIO_METAJSON_*`, told to the control plane.
    pub metadata: BTreeMap<String, serde_json::Value>,

    /// `None` when discovery is switched off.
    pub xds: Option<Upstream>,
    /// Ask for what connections need instead of holding the whole mesh.
    pub xds_on_demand: bool,
    /// Facts beside discovery's.
    #[serde(skip)]
    pub static_config: Option<Source>,
    /// Where what discovery said is kept for the next start.
    pub state_dir: Option<PathBuf>,
    pub ca: Upstream,
    /// Certificate lifetime asked for; shorter means more CA load, longer a longer-lived stolen key.
    pub secret_ttl: Duration,
    pub inpod_uds: PathBuf,

    /// Carry TCP. Without, pods are announced and looked after, but nothing listens for their traffic.
    pub proxy: bool,
    pub ports: Ports,
    pub dns: dns::Dns,
    /// Dedicated mode: bind everything to this address instead of the wildcard.
    pub local_address: Option<IpAddr>,
    pub ipv6: bool,
    /// `SO_REUSEPORT` on pod listeners, so that an old and a new process can overlap.
    pub reuse_port: bool,
    pub packet_mark: Option<u32>,
    /// Keep the client's address towards the application: required, never, or (unset) when possible.
    pub original_source: Option<bool>,
    pub socks5: bool,
    pub localhost_app_tunnel: bool,
    pub response_baggage: bool,
    pub pool_max_streams: u16,
    /// Idle tunnels close after this.
    pub pool_idle: Duration,
    /// What a stream starts with; it grows with use.
    pub stream_window: u32,
    pub connection_window: u32,
    pub frame_size: u32,
    #[serde(serialize_with = "keepalive")]
    pub keepalive: Option<KeepAlive>,
    pub user_timeout: Option<Duration>,

    pub workers: usize,
    /// From SIGTERM until what is left is cut.
    pub drain_deadline: Duration,
    pub log_filter: String,
    #[serde(skip)]
    pub log_format: Format,
    /// Log policy decisions at info instead of debug.
    pub log_decisions: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ProxyMode {
    /// The pods of a node, announced by its agent, each in its namespace.
    Shared,
    /// One workload, in this process's own namespace, without an agent.
    Dedicated,
}

/// Every port the process listens on. Other proxies and capture rules rely on the defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Ports {
    pub outbound: u16,
    pub inbound: u16,
    pub passthrough: u16,
    pub socks5: u16,
    pub admin: u16,
    pub stats: u16,
    pub readiness: u16,
}

impl Default for Ports {
    fn default() -> Self {
        Self {
            outbound: 15001,
            inbound: mesh_core::select::HBONE_PORT,
            passthrough: 15006,
            socks5: 15080,
            admin: 15000,
            stats: 15020,
            readiness: 15021,
        }
    }
}

impl From<&ProxyConfig> for Ports {
    fn from(proxy: &ProxyConfig) -> Self {
        let default = Self::default();
        Self {
            admin: proxy.proxy_admin_port.unwrap_or(default.admin),
            stats: proxy.stats_port.unwrap_or(default.stats),
            ..default
        }
    }
}

impl Config {
    /// # Errors
    /// Every variable that cannot be used, with its value and what would be right.
    pub fn from_env(vars: &dyn Vars) -> Result<Self, Problems> {
        let reader = Reader::new(vars);
        let config = Self::read(&reader, mesh_file::mounted(&reader).as_deref());
        reader.finish().map(|()| config)
    }

    /// A dedicated proxy of `demo/test` on loopback with every port chosen by the kernel, without control plane.
    pub fn default_for_tests() -> Self {
        let vars: std::collections::HashMap<String, String> =
            [("PROXY_MODE", "dedicated"), ("PROXY_WORKLOAD_INFO", "demo/test/test"), ("XDS_ADDRESS", "")]
                .map(|(k, v)| (k.to_owned(), v.to_owned()))
                .into();
        let config = Self::from_env(&vars).expect("the literals above are valid");
        let ports = Ports { outbound: 0, inbound: 0, passthrough: 0, socks5: 0, admin: 0, stats: 0, readiness: 0 };
        let dns = dns::Dns { port: 0, ..config.dns };
        Self { ports, dns, local_address: Some(Ipv4Addr::LOCALHOST.into()), workers: 1, ipv6: false, ..config }
    }

    /// `mesh` is the text of the mesh's configuration file.
    fn read(r: &Reader<'_>, mesh: Option<&str>) -> Self {
        let (mesh, proxy) = MeshFile::read(r, mesh);
        let mode = mode(r);
        let shared = mode == ProxyMode::Shared;
        let cluster_id = r.optional("ISTIO_META_CLUSTER_ID").unwrap_or_else(|| r.string("CLUSTER_ID", "Kubernetes"));
        let keepalive = timing::keepalive_from(r);
        let metadata = control_plane::metadata(r, &proxy);
        let dns = dns::Dns::read(r, &metadata);
        Self {
            mode,
            workload: workload(r, mode, &cluster_id),
            node: r.string("NODE_NAME", "").into(),
            pod_name: r.string("POD_NAME", ""),
            pod_namespace: r.string("POD_NAMESPACE", ""),
            service_account: r.string("SERVICE_ACCOUNT", ""),
            instance_ip: r.parse("INSTANCE_IP", Ipv4Addr::new(1, 1, 1, 1).into(), "this pod's IP address"),
            trust_domain: r.string("TRUST_DOMAIN", mesh_core::identity::DEFAULT_TRUST_DOMAIN),
            trust_domain_aliases: mesh.trust_domain_aliases.iter().map(|alias| alias.as_str().into()).collect(),
            trust: Trust::read(r),
            cluster_domain: r.string("CLUSTER_DOMAIN", "cluster.local").into(),
            outbound_policy: mesh.outbound_policy(),
            network: r.string("NETWORK", "").into(),
            version: r.string("ISTIO_META_ISTIO_VERSION", "unknown"),
            metadata,
            xds: (r.raw("XDS_ADDRESS").as_deref() != Some("")).then(|| upstream(r, "XDS", &cluster_id, &proxy)),
            xds_on_demand: control_plane::on_demand(r, &dns),
            static_config: control_plane::static_config(r),
            state_dir: r.optional("FAIRWAY_STATE_DIR").map(PathBuf::from),
            ca: upstream(r, "CA", &cluster_id, &proxy),
            cluster_id: cluster_id.into(),
            secret_ttl: r.duration("SECRET_TTL", Duration::from_secs(24 * 3600)),
            inpod_uds: r.string("INPOD_UDS", "/var/run/ztunnel/ztunnel.sock").into(),
            proxy: r.bool("ENABLE_PROXY", true),
            ports: Ports::from(&proxy),
            dns,
            local_address: local_address(r, mode),
            ipv6: r.bool("IPV6_ENABLED", true),
            reuse_port: r.bool("INPOD_PORT_REUSE", true) && shared,
            packet_mark: r
                .optional_parse("PACKET_MARK", "a packet mark such as 1337")
                .or_else(|| shared.then_some(PACKET_MARK)),
            original_source: r.optional_bool("ENABLE_ORIG_SRC"),
            socks5: r.bool("UNSTABLE_ENABLE_SOCKS5", false),
            localhost_app_tunnel: r.bool("LOCALHOST_APP_TUNNEL", true),
            response_baggage: r.bool("ENABLE_RESPONSE_BAGGAGE", true),
            pool_max_streams: within(r, "POOL_MAX_STREAMS_PER_CONNECTION", 100, 1, 1000),
            pool_idle: r.duration("POOL_UNUSED_RELEASE_TIMEOUT", Duration::from_secs(300)),
            stream_window: within(r, "HTTP2_STREAM_WINDOW_SIZE", 1 << 16, 65_535, i32::MAX as u32),
            connection_window: within(r, "HTTP2_CONNECTION_WINDOW_SIZE", 16 << 20, 65_535, i32::MAX as u32),
            // RFC 9113 §6.5.2 bounds SETTINGS_MAX_FRAME_SIZE.
            frame_size: within(r, "HTTP2_FRAME_SIZE", 65_536, 16_384, 16_777_215),
            user_timeout: timing::user_timeout(r, keepalive),
            keepalive,
            workers: threads::from_env(r, proxy.concurrency),
            drain_deadline: timing::drain_deadline(r),
            log_filter: r.string("RUST_LOG", "info"),
            log_format: log_format(r),
            log_decisions: r.bool("AUTHZ_POLICY_INFO_LOGGING", false),
        }
    }

    pub fn is_shared(&self) -> bool {
        self.mode == ProxyMode::Shared
    }

    /// Where pod, stats and readiness ports bind.
    pub fn wildcard(&self, port: u16) -> SocketAddr {
        let any = if self.ipv6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
        SocketAddr::new(self.local_address.unwrap_or(any), port)
    }

    /// Where ports for this machine only bind.
    pub fn loopback(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.local_address.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)), port)
    }

    /// Whether a destination port is one of ours: connecting there would be talking to ourselves.
    pub fn is_own_port(&self, port: u16) -> bool {
        let p = &self.ports;
        port == p.outbound || port == p.inbound || port == p.passthrough || (self.socks5 && port == p.socks5)
    }

    /// Whether listeners and spoofed sockets are transparent. Dedicated mode shares its namespace and never is.
    pub fn transparent(&self) -> Transparent {
        match self.original_source {
            _ if !self.is_shared() => Transparent::Never,
            Some(true) => Transparent::Required,
            Some(false) => Transparent::Never,
            None => Transparent::BestEffort,
        }
    }

    /// Of sockets towards applications and other proxies, and of accepted plain ones.
    pub fn socket_options(&self) -> SocketOptions {
        SocketOptions {
            mark: self.packet_mark,
            transparent: self.transparent(),
            reuse_port: false,
            keepalive: self.keepalive,
            user_timeout: self.user_timeout,
        }
    }

    /// The proxy's own workload, when it knows who it is: all three names are needed.
    pub fn own_workload(&self) -> Option<WorkloadInfo> {
        let known = !(self.pod_name.is_empty() || self.pod_namespace.is_empty() || self.service_account.is_empty());
        known.then(|| WorkloadInfo {
            uid: format!("{}//Pod/{}/{}", self.cluster_id, self.pod_namespace, self.pod_name).into(),
            name: self.pod_name.as_str().into(),
            namespace: self.pod_namespace.as_str().into(),
            service_account: self.service_account.as_str().into(),
        })
    }
}

fn mode(r: &Reader<'_>) -> ProxyMode {
    match r.string("PROXY_MODE", "shared").as_str() {
        "shared" => ProxyMode::Shared,
        "dedicated" => ProxyMode::Dedicated,
        other => {
            r.problem("PROXY_MODE", other, "shared or dedicated");
            ProxyMode::Shared
        }
    }
}

fn workload(r: &Reader<'_>, mode: ProxyMode, cluster: &str) -> Option<WorkloadInfo> {
    if mode == ProxyMode::Shared {
        return None;
    }
    const EXPECTED: &str = "namespace/name/serviceaccount of the dedicated workload";
    let text = r.required("PROXY_WORKLOAD_INFO", EXPECTED);
    let parts: Vec<&str> = text.split('/').collect();
    match parts[..] {
        [namespace, name, account] if parts.iter().all(|part| !part.is_empty()) => Some(WorkloadInfo {
            uid: format!("{cluster}//Pod/{namespace}/{name}").into(),
            name: name.into(),
            namespace: namespace.into(),
            service_account: account.into(),
        }),
        _ if text.is_empty() => None,
        _ => {
            r.problem("PROXY_WORKLOAD_INFO", &text, EXPECTED);
            None
        }
    }
}

fn local_address(r: &Reader<'_>, mode: ProxyMode) -> Option<IpAddr> {
    const NAME: &str = "FAIRWAY_LOCAL_ADDRESS";
    let address = r.optional_parse::<IpAddr>(NAME, "an IP address of this machine")?;
    if mode == ProxyMode::Shared {
        r.problem(NAME, &address.to_string(), "unset unless PROXY_MODE=dedicated");
    }
    Some(address)
}

fn within<T>(r: &Reader<'_>, name: &str, default: T, low: T, high: T) -> T
where
    T: std::str::FromStr + PartialOrd + fmt::Display + Copy,
{
    let expected = format!("a number from {low} to {high}");
    let value = r.parse(name, default, &expected);
    if (low..=high).contains(&value) {
        return value;
    }
    r.problem(name, &value.to_string(), &expected);
    default
}

fn log_format(r: &Reader<'_>) -> Format {
    match r.string("LOG_FORMAT", "plain").as_str() {
        "plain" => Format::Plain,
        "json" => Format::Json,
        other => {
            r.problem("LOG_FORMAT", other, "plain or json");
            Format::Plain
        }
    }
}

fn keepalive<S: Serializer>(value: &Option<KeepAlive>, s: S) -> Result<S::Ok, S::Error> {
    value.map(|k| (k.idle, k.interval, k.retries)).serialize(s)
}

fn debug<S: Serializer>(value: &impl fmt::Debug, s: S) -> Result<S::Ok, S::Error> {
    s.collect_str(&format_args!("{value:?}"))
}

/// CPUs this process may use, the cgroup's quota included.
fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

#[cfg(test)]
mod tests;
