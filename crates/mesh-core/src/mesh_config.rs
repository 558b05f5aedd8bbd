//! Istio's MeshConfig, as far as two programs must read it alike: the names its messages have for their fields, and what the outbound
//! policy's words mean.
//!
//! A name that Istio does not know, or never knew, is a mistake; passed over, it would leave its default in force, which in the case of
//! the outbound policy is the open one. Of Istio 1.31; a field that is new there has to be added here.

use std::fmt;

use crate::{spelling::nearest, workload::OutboundPolicy};

/// A message whose fields are known by name.
#[derive(Clone, Copy, Debug)]
pub struct Message {
    now: &'static [&'static str],
    /// Were fields once; Istio passes them over.
    once: &'static [&'static str],
}

/// A name that no field has, or ever had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownField {
    pub name: String,
    pub nearest: Option<&'static str>,
}

impl UnknownField {
    /// What would be right.
    pub fn remedy(&self) -> String {
        match self.nearest {
            Some(nearest) => format!("did you mean `{nearest}`?"),
            None => "remove it: Istio's MeshConfig has no field of this name here".to_owned(),
        }
    }
}

/// `accesLogFile: unknown field; did you mean `accessLogFile`?`
impl fmt::Display for UnknownField {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: unknown field; {}", self.name, self.remedy())
    }
}

impl Message {
    /// The field's name as JSON has it; Istio reads the one of its schema (`trust_domain`) as well.
    ///
    /// # Errors
    /// When there is no such field, with the nearest that there is.
    pub fn field(&self, name: &str) -> Result<&'static str, UnknownField> {
        let same = |known: &&&str| **known == name || is_in_snake_case(known, name);
        let known = self.now.iter().chain(self.once).find(same);
        known.copied().ok_or_else(|| UnknownField {
            name: name.chars().take(MOST_SHOWN).collect(),
            nearest: nearest(name, self.now.iter().copied()),
        })
    }
}

/// Keeps a message short whatever the input.
const MOST_SHOWN: usize = 80;

/// Whether `name` is how the schema writes the field that JSON calls `known`.
fn is_in_snake_case(known: &str, name: &str) -> bool {
    let mut letters = known.chars().flat_map(|letter| {
        let breaks = letter.is_ascii_uppercase().then_some('_');
        breaks.into_iter().chain([letter.to_ascii_lowercase()])
    });
    name.contains('_') && name.chars().all(|letter| letters.next() == Some(letter)) && letters.next().is_none()
}

/// The words of `outboundTrafficPolicy.mode`. How a name is looked up in the second of the open ones matters to sidecars alone.
pub const OUTBOUND_MODES: [(&str, OutboundPolicy); 3] = [
    ("ALLOW_ANY", OutboundPolicy::AllowAny),
    ("REGISTRY_ONLY", OutboundPolicy::RegistryOnly),
    ("ALLOW_ANY_DYNAMIC_DNS", OutboundPolicy::AllowAny),
];

/// `outboundTrafficPolicy`.
pub const OUTBOUND: Message = Message { now: &["mode", "tls"], once: &[] };

/// The whole.
pub const MESH: Message = Message {
    now: &[
        "accessLogEncoding",
        "accessLogFile",
        "accessLogFormat",
        "ca",
        "caCertificates",
        "certificates",
        "configSources",
        "connectTimeout",
        "defaultConfig",
        "defaultDestinationRuleExportTo",
        "defaultHttpRetryPolicy",
        "defaultProviders",
        "defaultServiceExportTo",
        "defaultTrafficPolicy",
        "defaultVirtualServiceExportTo",
        "disableEnvoyListenerLog",
        "discoverySelectors",
        "dnsRefreshRate",
        "enableAutoMtls",
        "enableEnvoyAccessLogService",
        "enablePrometheusMerge",
        "enableTracing",
        "extensionProviders",
        "h2UpgradePolicy",
        "hboneIdleTimeout",
        "inboundClusterStatName",
        "inboundTrafficPolicy",
        "ingressClass",
        "ingressControllerMode",
        "ingressSelector",
        "ingressService",
        "localityLbSetting",
        "meshMTLS",
        "outboundClusterStatName",
        "outboundTrafficPolicy",
        "pathNormalization",
        "protocolDetectionTimeout",
        "proxyHttpPort",
        "proxyInboundListenPort",
        "proxyListenPort",
        "rootNamespace",
        "serviceEntryVisibility",
        "serviceScopeConfigs",
        "serviceSettings",
        "tcpKeepalive",
        "tlsDefaults",
        "trustDomain",
        "trustDomainAliases",
        "verifyCertificateAtClient",
        "zoneAwareLbSetting",
    ],
    once: &[
        "authPolicy",
        "clusterLocalNamespaces",
        "compliancePolicy",
        "defaultNetworkScope",
        "defaultServiceDependency",
        "disableMixerHttpReports",
        "disablePolicyChecks",
        "disableReportBatch",
        "egressProxyAddress",
        "enableClientSidePolicyCheck",
        "enableSdsTokenMount",
        "envoyAccesslogService",
        "features",
        "fileFlushInterval",
        "fileFlushMinSize",
        "galleyAddress",
        "meshExternalTLS",
        // What the schema calls `meshMTLS`, against its own rule.
        "mesh_mTLS",
        "mixerAddress",
        "mixerCheck",
        "mixerCheckServer",
        "mixerReport",
        "mixerReportServer",
        "mtlsExcludedServices",
        "policyCheckFailOpen",
        "rbacConfig",
        "rdsRefreshDelay",
        "reportBatchMaxEntries",
        "reportBatchMaxTime",
        "reportSessionAffinity",
        "sdsRefreshDelay",
        "sdsUdsPath",
        "sdsUseK8sSaJwt",
        "sidecarToTelemetrySessionAffinity",
        "terminationDrainDuration",
        "thriftConfig",
    ],
};

/// ProxyConfig: `defaultConfig`, and the variable `PROXY_CONFIG`.
pub const PROXY: Message = Message {
    now: &[
        "availabilityZone",
        "binaryPath",
        "caCertificatesPem",
        "concurrency",
        "configPath",
        "connectionSettings",
        "controlPlaneAuthPolicy",
        "customConfigFile",
        "discoveryAddress",
        "discoveryRefreshDelay",
        "drainDuration",
        "envoyAccessLogService",
        "envoyMetricsService",
        "envoyMetricsServiceAddress",
        "extraStatTags",
        "fileFlushInterval",
        "fileFlushMinSizeKb",
        "gatewayTopology",
        "holdApplicationUntilProxyStarts",
        "image",
        "interceptionMode",
        "meshId",
        "privateKeyProvider",
        "proxyAdminPort",
        "proxyBootstrapTemplatePath",
        "proxyHeaders",
        "proxyMetadata",
        "proxyStatsMatcher",
        "readinessProbe",
        "runtimeValues",
        "sds",
        "serviceCluster",
        "statNameLength",
        "statsCompression",
        "statsPort",
        "statsdUdpAddress",
        "statusPort",
        "terminationDrainDuration",
        "tracing",
        "tracingServiceName",
        "zipkinAddress",
    ],
    once: &[
        "connectTimeout",
        "discoveryMtlsAddress",
        "discoveryPlainAddress",
        "envoyAccessLogServiceAddress",
        "fileFlushMinSize",
        "parentShutdownDuration",
        "pilot",
        "revision",
        "routeRules",
        "upstreamClusters",
    ],
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_known_in_either_spelling_and_what_was_one_still_is() {
        for (message, name, expected) in [
            (MESH, "outboundTrafficPolicy", "outboundTrafficPolicy"),
            (MESH, "outbound_traffic_policy", "outboundTrafficPolicy"),
            (MESH, "h2_upgrade_policy", "h2UpgradePolicy"),
            (MESH, "mixerCheckServer", "mixerCheckServer"),
            (PROXY, "proxy_metadata", "proxyMetadata"),
            (PROXY, "statsPort", "statsPort"),
            (OUTBOUND, "mode", "mode"),
        ] {
            assert_eq!(message.field(name), Ok(expected));
        }
    }

    #[test]
    fn what_is_not_a_field_is_told_with_the_nearest_that_is() {
        for (message, name, nearest) in [
            (MESH, "outboundTrafficPolcy", Some("outboundTrafficPolicy")),
            (MESH, "OutboundTrafficPolicy", Some("outboundTrafficPolicy")),
            (MESH, "outbound-traffic-policy", Some("outboundTrafficPolicy")),
            (MESH, "outbound_traffic_polic", Some("outboundTrafficPolicy")),
            (MESH, "mode", None),
            (MESH, "", None),
            (MESH, "_", None),
            (PROXY, "proxyMetdata", Some("proxyMetadata")),
            (OUTBOUND, "modes", Some("mode")),
            (OUTBOUND, "something", None),
        ] {
            let unknown = message.field(name).unwrap_err();
            assert_eq!((unknown.name.as_str(), unknown.nearest), (name, nearest));
        }
        let long = MESH.field(&"x".repeat(1000)).unwrap_err();
        assert_eq!((long.name.len(), long.nearest), (MOST_SHOWN, None));
        let told = MESH.field("accesLogFile").unwrap_err().to_string();
        assert_eq!(told, "accesLogFile: unknown field; did you mean `accessLogFile`?");
    }
}
