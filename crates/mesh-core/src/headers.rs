//! Codecs of what a CONNECT carries: the authority, and the `baggage`, `forwarded` and `traceparent` headers. Every parser takes
//! bytes of a peer: none panics, and none allocates more than it was given.

use std::{fmt, net::SocketAddr, str::FromStr, sync::Arc};

use crate::{
    addr::canonical,
    workload::{Workload, WorkloadType},
};

/// The target of a CONNECT (RFC 9110 §7.2, RFC 9113 §8.5).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Authority {
    /// Always canonical.
    Address(SocketAddr),
    Host {
        host: Arc<str>,
        port: u16,
    },
}

impl Authority {
    pub fn port(&self) -> u16 {
        match self {
            Self::Address(address) => address.port(),
            Self::Host { port, .. } => *port,
        }
    }
}

/// IPv6 bracketed: what goes into `:authority`.
impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Host { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// Why a string is not a CONNECT target.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a CONNECT target; expected ip:port or host:port")]
pub struct InvalidAuthority(pub String);

impl FromStr for Authority {
    type Err = InvalidAuthority;

    /// RFC 9110 §9.3.6: a CONNECT target without host or port MUST be rejected.
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        if let Ok(address) = s.parse::<SocketAddr>() {
            return Ok(Self::Address(canonical(address)));
        }
        host_and_port(s)
            .map(|(host, port)| Self::Host { host: host.into(), port })
            .ok_or_else(|| InvalidAuthority(s.chars().take(256).collect()))
    }
}

fn host_and_port(s: &str) -> Option<(&str, u16)> {
    let (host, port) = s.rsplit_once(':')?;
    // `u16::from_str` would accept "+80".
    let digits = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
    (is_host(host) && digits).then(|| port.parse().ok()).flatten().map(|port| (host, port))
}

/// RFC 1035 §2.3.4 bounds a name to 255 octets. Wildcards and underscores occur in ServiceEntry hosts.
fn is_host(host: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'*');
    (1..=255).contains(&host.len()) && host.bytes().all(plain)
}

/// Who a peer says it is; for telemetry only, never for a decision.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Baggage {
    pub cluster: Option<String>,
    pub namespace: Option<String>,
    pub workload_type: Option<WorkloadType>,
    pub workload_name: Option<String>,
    pub canonical_name: Option<String>,
    pub canonical_revision: Option<String>,
    pub region: Option<String>,
    pub zone: Option<String>,
}

/// The `baggage` header of a workload: non-empty entries only, comma-joined, always a valid header value.
pub fn encode_baggage(workload: &Workload) -> String {
    let workload_key = format!("k8s.{}.name", type_name(workload.workload_type));
    let entries: [(&str, &str); 7] = [
        ("k8s.cluster.name", &workload.cluster_id),
        ("k8s.namespace.name", &workload.namespace),
        (&workload_key, &workload.workload_name),
        ("service.name", &workload.canonical_name),
        ("service.version", &workload.canonical_revision),
        ("cloud.region", &workload.locality.region),
        ("cloud.availability_zone", &workload.locality.zone),
    ];
    let entries: Vec<String> =
        entries.iter().filter(|(_, value)| fits_baggage(value)).map(|(key, value)| format!("{key}={value}")).collect();
    entries.join(",")
}

/// Values are not percent-encoded on this wire, so one with a delimiter cannot be sent; none of Kubernetes' names has one.
fn fits_baggage(value: &str) -> bool {
    !value.is_empty() && value.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b',' | b'=' | b';'))
}

fn type_name(workload_type: WorkloadType) -> &'static str {
    match workload_type {
        WorkloadType::CronJob => "cronjob",
        WorkloadType::Deployment => "deployment",
        WorkloadType::Job => "job",
        WorkloadType::Pod => "pod",
    }
}

/// Reads one `baggage` value; unknown keys and malformed entries are skipped, an empty value counts as absent.
pub fn parse_baggage(header: &str) -> Baggage {
    let mut baggage = Baggage::default();
    for (key, value) in header.split(',').filter_map(|entry| entry.split_once('=')) {
        let value = value.trim();
        if !value.is_empty() {
            baggage.set(key.trim(), value);
        }
    }
    baggage
}

impl Baggage {
    fn set(&mut self, key: &str, value: &str) {
        let field = match key {
            "k8s.cluster.name" => &mut self.cluster,
            "k8s.namespace.name" => &mut self.namespace,
            "service.name" => &mut self.canonical_name,
            "service.version" => &mut self.canonical_revision,
            "cloud.region" => &mut self.region,
            "cloud.availability_zone" => &mut self.zone,
            _ => match workload_type(key) {
                Some(workload_type) => {
                    self.workload_type = Some(workload_type);
                    &mut self.workload_name
                }
                None => return,
            },
        };
        *field = Some(value.to_owned());
    }
}

fn workload_type(key: &str) -> Option<WorkloadType> {
    match key {
        "k8s.cronjob.name" => Some(WorkloadType::CronJob),
        "k8s.deployment.name" => Some(WorkloadType::Deployment),
        "k8s.job.name" => Some(WorkloadType::Job),
        "k8s.pod.name" => Some(WorkloadType::Pod),
        _ => None,
    }
}

/// The `forwarded` header (RFC 7239 §4): the app's own address, and the service it addressed, if any.
pub fn encode_forwarded(client: SocketAddr, host: Option<&str>) -> String {
    match host.filter(|host| is_host(host)) {
        Some(host) => format!("for=\"{client}\";host={host}"),
        None => format!("for=\"{client}\""),
    }
}

/// The `host` of a `forwarded` value: a hint for telemetry, never an input to authorisation.
pub fn parse_forwarded_host(header: &str) -> Option<String> {
    let host = header.split(';').find_map(|part| part.trim().strip_prefix("host="))?;
    let host = host.trim().trim_matches('"');
    is_host(host).then(|| host.to_owned())
}

/// W3C Trace Context `traceparent`, one per application connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TraceParent {
    pub trace_id: u128,
    pub parent_id: u64,
    pub flags: u8,
}

impl TraceParent {
    /// A fresh, unsampled one. All-zero ids are invalid (Trace Context §3.2.2.3), hence the `| 1`.
    pub fn random(rng: &mut impl rand::Rng) -> Self {
        let trace_id = (u128::from(rng.next_u64()) << 64) | u128::from(rng.next_u64()) | 1;
        Self { trace_id, parent_id: rng.next_u64() | 1, flags: 0 }
    }

    /// What both ends of a connection log of it: the trace id as it is written in the header.
    pub fn id(&self) -> impl fmt::Display + use<> {
        let id = self.trace_id;
        fmt::from_fn(move |f| write!(f, "{id:032x}"))
    }
}

impl fmt::Display for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-{:02x}", self.trace_id, self.parent_id, self.flags)
    }
}

/// Not a usable `traceparent`; the receiver makes a fresh one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a W3C traceparent; expected 00-<32 hex>-<16 hex>-<2 hex>")]
pub struct InvalidTraceParent;

impl FromStr for TraceParent {
    type Err = InvalidTraceParent;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let parts: Vec<&str> = s.splitn(5, '-').collect();
        let [version, trace_id, parent_id, flags] = parts[..] else { return Err(InvalidTraceParent) };
        let version = hex(version, 2).ok_or(InvalidTraceParent)?;
        let trace_id = hex(trace_id, 32).ok_or(InvalidTraceParent)?;
        let parent_id = hex(parent_id, 16).ok_or(InvalidTraceParent)?;
        let flags = hex(flags, 2).ok_or(InvalidTraceParent)?;
        // Trace Context §3.2.2.1: version ff is invalid; §3.2.2.3 and .4: all-zero ids are.
        if version == 0xff || trace_id == 0 || parent_id == 0 {
            return Err(InvalidTraceParent);
        }
        let parent_id = u64::try_from(parent_id).map_err(|_| InvalidTraceParent)?;
        Ok(Self { trace_id, parent_id, flags: u8::try_from(flags).map_err(|_| InvalidTraceParent)? })
    }
}

/// Lower-case hex of exactly `len` digits, as Trace Context §3.2.1 demands.
fn hex(s: &str, len: usize) -> Option<u128> {
    let lower = s.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    (s.len() == len && lower).then(|| u128::from_str_radix(s, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use proptest::prelude::*;
    use rand::{SeedableRng, rngs::StdRng};

    use super::*;

    #[test]
    fn authority_is_an_address_when_it_parses_as_one() {
        for (text, expected) in [
            ("10.0.0.1:80", "10.0.0.1:80"),
            ("[2001:db8::1]:80", "[2001:db8::1]:80"),
            ("[::ffff:10.0.0.1]:80", "10.0.0.1:80"),
            ("web.demo.svc.cluster.local:80", "web.demo.svc.cluster.local:80"),
        ] {
            assert_eq!(text.parse::<Authority>().unwrap().to_string(), expected, "{text}");
        }
    }

    #[test]
    fn authority_without_host_or_port_is_rejected() {
        for text in
            ["", ":80", "host", "host:", "host:70000", "host:+80", "a b:80", "a/b:80", "u@h:80", "2001:db8::1:80"]
        {
            assert!(text.parse::<Authority>().is_err(), "{text}");
        }
    }

    #[test]
    fn baggage_keeps_its_documented_order_and_skips_empty_entries() {
        let mut workload = Workload::new("Kubernetes//Pod/demo/web-1", "demo", "web-1");
        workload.workload_type = WorkloadType::Deployment;
        workload.workload_name = "web".into();
        workload.canonical_name = "web".into();
        workload.locality.region = "r1".into();
        let expected = "k8s.cluster.name=Kubernetes,k8s.namespace.name=demo,k8s.deployment.name=web,service.name=web,cloud.region=r1";
        assert_eq!(encode_baggage(&workload), expected);
    }

    #[test]
    fn forwarded_quotes_the_client_and_not_the_host() {
        let client: SocketAddr = "[2001:db8::1]:4000".parse().unwrap();
        let header = encode_forwarded(client, Some("web.demo.svc"));
        assert_eq!(header, "for=\"[2001:db8::1]:4000\";host=web.demo.svc");
        assert_eq!(parse_forwarded_host(&header).as_deref(), Some("web.demo.svc"));
        assert_eq!(parse_forwarded_host("for=x;host=\"\""), None);
        assert_eq!(parse_forwarded_host(&encode_forwarded(client, None)), None);
    }

    #[test]
    fn traceparent_of_the_wrong_shape_is_refused() {
        let zero = format!("00-{}-{}-00", "0".repeat(32), "1".repeat(16));
        let upper = format!("00-{}-{}-00", "A".repeat(32), "1".repeat(16));
        let long = format!("00-{}-{}-00-x", "1".repeat(32), "1".repeat(16));
        for text in ["", "00", &zero, &upper, &long] {
            assert!(text.parse::<TraceParent>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn authority_round_trips(ip: IpAddr, port: u16, host in "[a-z*_][a-z0-9.-]{0,80}") {
            for authority in [Authority::Address(canonical(SocketAddr::new(ip, port))), Authority::Host { host: host.into(), port }] {
                prop_assert_eq!(authority.to_string().parse::<Authority>().unwrap(), authority);
            }
        }

        #[test]
        fn baggage_round_trips(namespace in "[a-z0-9-]{0,20}", name in "[a-z0-9.-]{0,20}", zone in "[a-z0-9-]{0,9}") {
            let mut workload = Workload::new("u", &*namespace, &*name);
            workload.locality.zone = zone.as_str().into();
            let baggage = parse_baggage(&encode_baggage(&workload));
            let non_empty = |s: String| (!s.is_empty()).then_some(s);
            prop_assert_eq!(baggage.workload_type, non_empty(name.clone()).map(|_| WorkloadType::Pod));
            prop_assert_eq!(baggage.namespace, non_empty(namespace));
            prop_assert_eq!(baggage.workload_name, non_empty(name));
            prop_assert_eq!(baggage.zone, non_empty(zone));
        }

        #[test]
        fn traceparent_round_trips(seed: u64) {
            let traceparent = TraceParent::random(&mut StdRng::seed_from_u64(seed));
            prop_assert_eq!(traceparent.to_string().len(), 55);
            prop_assert_eq!(traceparent.to_string().parse::<TraceParent>().unwrap(), traceparent);
        }

        #[test]
        fn parsers_never_panic(text in "\\PC*", bytes: Vec<u8>) {
            for text in [text.as_str(), &String::from_utf8_lossy(&bytes)] {
                drop((text.parse::<Authority>(), text.parse::<TraceParent>(), parse_baggage(text), parse_forwarded_host(text)));
            }
        }
    }
}
