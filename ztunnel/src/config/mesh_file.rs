//! The mesh's own configuration: `./etc/istio/config/mesh` as Istio mounts it, and `PROXY_CONFIG`, merged over its `defaultConfig`. Keys
//! that are meant for others are theirs; keys that Istio does not know are mistakes, and refused. Variables of the environment win over
//! both.

mod checked;

use std::{collections::BTreeMap, fmt, fs, io};

use mesh_core::{
    mesh_config::{MESH, Message, OUTBOUND, OUTBOUND_MODES, PROXY},
    workload::OutboundPolicy,
};
use mesh_runtime::env::Reader;
use serde::{Deserialize, Deserializer, de};

use checked::{Checked, Named};

pub(super) const PATH: &str = "./etc/istio/config/mesh";
const VARIABLE: &str = "PROXY_CONFIG";

/// What concerns this proxy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct MeshFile {
    default_config: Option<Checked<ProxyConfig>>,
    pub(super) trust_domain_aliases: Vec<String>,
    outbound_traffic_policy: Option<Checked<OutboundTrafficPolicy>>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct ProxyConfig {
    pub(super) discovery_address: Option<String>,
    pub(super) proxy_admin_port: Option<u16>,
    pub(super) stats_port: Option<u16>,
    pub(super) concurrency: Option<u16>,
    pub(super) proxy_metadata: BTreeMap<String, Text>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
struct OutboundTrafficPolicy {
    mode: OutboundMode,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct OutboundMode(OutboundPolicy);

impl Named for MeshFile {
    const MESSAGE: Message = MESH;
}

impl Named for ProxyConfig {
    const MESSAGE: Message = PROXY;
}

impl Named for OutboundTrafficPolicy {
    const MESSAGE: Message = OUTBOUND;
}

impl MeshFile {
    /// Both sources; `file` is the first one's text, when there is one.
    pub(super) fn read(r: &Reader<'_>, file: Option<&str>) -> (Self, ProxyConfig) {
        let mut mesh: Self = file.map(|text| parse(r, PATH, text)).unwrap_or_default();
        let Checked(mut proxy) = mesh.default_config.take().unwrap_or_default();
        if let Some(text) = r.optional(VARIABLE) {
            proxy.merge(parse(r, VARIABLE, &text));
        }
        (mesh, proxy)
    }

    pub(super) fn outbound_policy(&self) -> OutboundPolicy {
        self.outbound_traffic_policy.map(|Checked(policy)| policy.mode.0).unwrap_or_default()
    }
}

impl ProxyConfig {
    fn merge(&mut self, over: Self) {
        self.discovery_address = over.discovery_address.or_else(|| self.discovery_address.take());
        self.proxy_admin_port = over.proxy_admin_port.or(self.proxy_admin_port);
        self.stats_port = over.stats_port.or(self.stats_port);
        self.concurrency = over.concurrency.or(self.concurrency);
        self.proxy_metadata.extend(over.proxy_metadata);
    }

    /// The node's metadata, without the prefix that variables of the same meaning have.
    pub(super) fn metadata(&self) -> impl Iterator<Item = (String, String)> {
        let bare = |name: &str| name.strip_prefix("ISTIO_META_").unwrap_or(name).to_owned();
        self.proxy_metadata.iter().map(move |(name, value)| (bare(name), value.0.clone()))
    }
}

/// The file as it is mounted; `None` when it is not. An unreadable one is a problem.
pub(super) fn mounted(r: &Reader<'_>) -> Option<String> {
    match fs::read_to_string(PATH) {
        Ok(text) => Some(text),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => None,
        Err(error) => {
            r.problem(PATH, &error.to_string(), "a readable file, or none");
            None
        }
    }
}

/// An empty document is an empty configuration.
fn parse<T: Default + Named + for<'de> Deserialize<'de>>(r: &Reader<'_>, name: &str, text: &str) -> T {
    match serde_saphyr::from_str::<Option<Checked<T>>>(text) {
        Ok(parsed) => parsed.unwrap_or_default().0,
        Err(error) => {
            let line = error
                .location()
                .and_then(|place| text.lines().nth(usize::try_from(place.line()).ok()?.checked_sub(1)?));
            r.problem(name, line.unwrap_or_default(), &format!("YAML of Istio's mesh configuration: {error}"));
            T::default()
        }
    }
}

impl<'de> Deserialize<'de> for OutboundMode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Word;

        impl de::Visitor<'_> for Word {
            type Value = OutboundMode;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let modes: Vec<&str> = OUTBOUND_MODES.iter().map(|(mode, _)| *mode).collect();
                write!(f, "one of {}", modes.join(", "))
            }

            fn visit_str<E: de::Error>(self, written: &str) -> Result<OutboundMode, E> {
                let mode = OUTBOUND_MODES.iter().find(|(mode, _)| *mode == written);
                let wrong = || E::invalid_value(de::Unexpected::Str(written), &self);
                mode.map(|(_, policy)| OutboundMode(*policy)).ok_or_else(wrong)
            }
        }

        deserializer.deserialize_str(Word)
    }
}

/// A string, however a person wrote it: `"false"` and `false` are the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Text(String);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Scalar;

        impl de::Visitor<'_> for Scalar {
            type Value = Text;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a number or a boolean")
            }

            fn visit_str<E>(self, text: &str) -> Result<Text, E> {
                Ok(Text(text.to_owned()))
            }

            fn visit_bool<E>(self, value: bool) -> Result<Text, E> {
                Ok(Text(value.to_string()))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Text, E> {
                Ok(Text(value.to_string()))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Text, E> {
                Ok(Text(value.to_string()))
            }

            fn visit_f64<E>(self, value: f64) -> Result<Text, E> {
                Ok(Text(value.to_string()))
            }
        }

        deserializer.deserialize_any(Scalar)
    }
}
