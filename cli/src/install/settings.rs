//! `--set`: the chart's values that can be changed without Helm, each with what it may be.

use std::collections::BTreeMap;

use serde_json::json;

use super::manifest::containers;
use crate::cluster::Object;

/// A key of the chart's values, what it takes, and what it does.
struct Setting {
    key: &'static str,
    takes: &'static str,
    apply: fn(&mut Vec<Object>, &str) -> Option<()>,
}

const SETTINGS: [Setting; 12] = [
    Setting { key: "admission.enabled", takes: "true or false", apply: admission },
    Setting {
        key: "cni.ambient.dnsCapture",
        takes: "true or false",
        apply: |objects, value| node(objects, "AMBIENT_DNS_CAPTURE", boolean(value)?),
    },
    Setting {
        key: "cni.excludeNamespaces",
        takes: "names, separated by commas",
        apply: |objects, value| node(objects, "EXCLUDE_NAMESPACES", names(value)?),
    },
    Setting {
        key: "cni.logging.level",
        takes: "a log filter",
        apply: |objects, value| node(objects, "RUST_LOG", value),
    },
    Setting {
        key: "controlPlane.logLevel",
        takes: "a log filter",
        apply: |objects, value| environment(objects, "fairwayd", "RUST_LOG", value),
    },
    Setting { key: "controlPlane.replicaCount", takes: "1 to 20", apply: replicas },
    Setting {
        key: "controlPlane.workloadCertTtl",
        takes: "a duration like 90s, 15m or 24h",
        apply: |objects, value| argument(objects, "fairwayd", "--workload-cert-ttl", duration(value)?),
    },
    Setting {
        key: "global.imagePullPolicy",
        takes: "Always, IfNotPresent or Never",
        apply: |objects, value| pull_policy(objects, value),
    },
    Setting { key: "global.logAsJson", takes: "true or false", apply: |objects, value| log_format(objects, value) },
    Setting {
        key: "global.multiCluster.clusterName",
        takes: "a name",
        apply: |objects, value| cluster_name(objects, value),
    },
    Setting {
        key: "global.network",
        takes: "a name",
        apply: |objects, value| environment(objects, "ztunnel", "NETWORK", value),
    },
    Setting {
        key: "ztunnel.logLevel",
        takes: "a log filter",
        apply: |objects, value| environment(objects, "ztunnel", "RUST_LOG", value),
    },
];

/// `KEY=VALUE`, for the command line.
pub(crate) fn parse(text: &str) -> Result<(String, String), String> {
    let Some((key, value)) = text.split_once('=') else { return Err(format!("expected KEY=VALUE; {}", known())) };
    if !SETTINGS.iter().any(|setting| setting.key == key) {
        return Err(format!("{}; anything else needs the Helm chart", known()));
    }
    if value.contains('\n') {
        return Err("a value is one line".to_owned());
    }
    Ok((key.to_owned(), value.to_owned()))
}

/// For the help.
pub(crate) fn known() -> String {
    let keys: Vec<String> = SETTINGS.iter().map(|setting| format!("{} ({})", setting.key, setting.takes)).collect();
    format!("the keys are {}", keys.join(", "))
}

pub(super) fn apply(objects: &mut Vec<Object>, settings: &BTreeMap<String, String>) -> anyhow::Result<()> {
    for (key, value) in settings {
        let setting = SETTINGS.iter().find(|setting| setting.key == key);
        // One that this version no longer knows was written down by another.
        let Some(setting) = setting else { anyhow::bail!("--set {key}: {}", known()) };
        let done = (setting.apply)(objects, value);
        anyhow::ensure!(done.is_some(), "--set {key}={value}: expected {}", setting.takes);
    }
    Ok(())
}

fn find<'a>(objects: &'a mut [Object], kind: &str, name: &str) -> Option<&'a mut Object> {
    objects.iter_mut().find(|object| object.is(kind, name))
}

fn workload<'a>(objects: &'a mut [Object], name: &str) -> Option<&'a mut Object> {
    objects.iter_mut().find(|object| object.name() == name && ["Deployment", "DaemonSet"].contains(&object.kind.name))
}

/// Without it nobody asks, and nobody listens.
fn admission(objects: &mut Vec<Object>, value: &str) -> Option<()> {
    if boolean(value)? == "true" {
        return Some(());
    }
    objects.retain(|object| object.kind.name != "ValidatingWebhookConfiguration");
    for container in containers(workload(objects, "fairwayd")?) {
        let arguments = container["args"].as_array_mut()?;
        arguments.retain(|argument| !argument.as_str().is_some_and(|text| text.starts_with("--webhook=")));
    }
    Some(())
}

/// The agent reads its settings once: its pods are replaced when they change.
fn node(objects: &mut [Object], name: &str, value: &str) -> Option<()> {
    find(objects, "ConfigMap", "fairway-node")?.value["data"][name] = value.into();
    let checksum =
        &mut workload(objects, "fairway-node")?.value["spec"]["template"]["metadata"]["annotations"]["checksum/config"];
    *checksum = format!("{} {name}={value}", checksum.as_str()?).into();
    Some(())
}

fn environment(objects: &mut [Object], component: &str, name: &str, value: &str) -> Option<()> {
    for container in containers(workload(objects, component)?) {
        let variables = container["env"].as_array_mut()?;
        variables.iter_mut().find(|variable| variable["name"] == name)?["value"] = value.into();
    }
    Some(())
}

fn replicas(objects: &mut Vec<Object>, value: &str) -> Option<()> {
    let count: u64 = value.parse().ok().filter(|count| (1..=20).contains(count))?;
    workload(objects, "fairwayd")?.value["spec"]["replicas"] = count.into();
    if count == 1 {
        // With one replica it would only keep nodes from being drained.
        objects.retain(|object| object.kind.name != "PodDisruptionBudget");
    }
    Some(())
}

fn pull_policy(objects: &mut [Object], value: &str) -> Option<()> {
    ["Always", "IfNotPresent", "Never"].contains(&value).then_some(())?;
    for container in objects.iter_mut().flat_map(containers) {
        container["imagePullPolicy"] = value.into();
    }
    Some(())
}

fn log_format(objects: &mut [Object], value: &str) -> Option<()> {
    let format = if boolean(value)? == "true" { "json" } else { "plain" };
    environment(objects, "fairwayd", "LOG_FORMAT", format)?;
    environment(objects, "ztunnel", "LOG_FORMAT", format)?;
    node(objects, "LOG_FORMAT", format)
}

fn cluster_name(objects: &mut [Object], value: &str) -> Option<()> {
    (!value.is_empty()).then_some(())?;
    environment(objects, "ztunnel", "ISTIO_META_CLUSTER_ID", value)?;
    argument(objects, "fairwayd", "--cluster-id", value)
}

fn argument(objects: &mut [Object], component: &str, flag: &str, value: &str) -> Option<()> {
    let is_it = |text: &str| text.strip_prefix(flag).is_some_and(|rest| rest.starts_with('='));
    for container in containers(workload(objects, component)?) {
        let mut arguments = container["args"].as_array_mut()?.iter_mut();
        *arguments.find(|argument| argument.as_str().is_some_and(is_it))? = json!(format!("{flag}={value}"));
    }
    Some(())
}

fn duration(value: &str) -> Option<&str> {
    mesh_runtime::env::parse_duration(value).filter(|duration| !duration.is_zero()).map(|_| value)
}

fn boolean(value: &str) -> Option<&str> {
    ["true", "false"].contains(&value).then_some(value)
}

fn names(value: &str) -> Option<&str> {
    let is_name = |name: &str| {
        !name.is_empty() && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    value.split(',').all(is_name).then_some(value)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::install::manifest::{Choice, objects};

    fn with(settings: &[(&str, &str)]) -> anyhow::Result<Vec<Object>> {
        let settings = settings.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let (namespace, platform) = ("istio-system".to_owned(), "default".to_owned());
        objects(&Choice { namespace, platform, settings, ..Choice::default() })
    }

    #[test]
    fn every_key_changes_something_and_refuses_nonsense_where_it_can() {
        let plain: Vec<Value> = with(&[]).unwrap().into_iter().map(|object| object.value).collect();
        let values = ["false", "false", "a,b", "debug", "debug", "1", "15m", "Never", "true", "c2", "net2", "debug"];
        for (setting, value) in SETTINGS.iter().zip(values) {
            let changed: Vec<Value> = with(&[(setting.key, value)]).unwrap().into_iter().map(|o| o.value).collect();
            assert_ne!(changed, plain, "{}", setting.key);
            parse(&format!("{}={value}", setting.key)).unwrap();
        }
        for (key, value) in [
            ("admission.enabled", "0"),
            ("controlPlane.replicaCount", "0"),
            ("controlPlane.workloadCertTtl", "0s"),
            ("cni.ambient.dnsCapture", "maybe"),
            ("cni.excludeNamespaces", "A b"),
        ] {
            assert!(with(&[(key, value)]).is_err(), "{key}={value}");
        }
        assert!(parse("cni.unknown=1").unwrap_err().contains("controlPlane.replicaCount"));
    }

    #[test]
    fn without_admission_nothing_of_it_is_left() {
        let told = |objects: Vec<Object>| {
            let asks = objects.iter().any(|object| object.is("ValidatingWebhookConfiguration", "fairway-istio-system"));
            (asks, objects.iter().any(|object| object.value.to_string().contains("--webhook=")))
        };
        assert_eq!(told(with(&[("admission.enabled", "true")]).unwrap()), (true, true));
        assert_eq!(told(with(&[("admission.enabled", "false")]).unwrap()), (false, false));
    }

    #[test]
    fn other_settings_of_the_agent_mean_other_pods() {
        let objects = with(&[("cni.logging.level", "debug")]).unwrap();
        let agent = objects.iter().find(|object| object.is("DaemonSet", "fairway-node")).unwrap();
        let checksum = agent.value["spec"]["template"]["metadata"]["annotations"]["checksum/config"].as_str().unwrap();
        assert!(checksum.ends_with(" RUST_LOG=debug"), "{checksum}");
    }
}
