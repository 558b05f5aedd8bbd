//! The CNI protocol, versions 0.3.0 to 1.1.0: what the runtime tells a plugin, and what a plugin answers.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

use ipnet::IpNet;
use mesh_runtime::env::Vars;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// Every version this plugin speaks, oldest first.
pub const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// Longest configuration read from standard input.
pub const MAX_CONFIG: usize = 1 << 20;

/// CNI_COMMAND.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    Add,
    Check,
    Del,
    Gc,
    Status,
    Version,
}

impl Command {
    /// The first version that has the command.
    fn since(self) -> usize {
        match self {
            Self::Add | Self::Del | Self::Version => 0,
            Self::Check => 2,
            Self::Gc | Self::Status => 4,
        }
    }
}

/// What went wrong, as the runtime wants to be told (CNI spec, "Error").
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}: {details}")]
pub struct CniError {
    pub code: u32,
    pub message: String,
    /// What would be right.
    pub details: String,
}

impl CniError {
    pub const INCOMPATIBLE_VERSION: u32 = 1;
    pub const INVALID_ENVIRONMENT: u32 = 4;
    pub const IO: u32 = 5;
    pub const DECODE: u32 = 6;
    pub const INVALID_CONFIG: u32 = 7;
    pub const TRY_AGAIN: u32 = 11;
    // From 100 on, a plugin's own.
    pub const REFUSED: u32 = 100;
    pub const CHECK_FAILED: u32 = 101;
    pub const PANIC: u32 = 102;

    pub fn new(code: u32, message: impl Into<String>, details: impl Into<String>) -> Self {
        Self { code, message: message.into(), details: details.into() }
    }

    /// The JSON for standard output.
    pub fn to_json(&self, version: &str) -> String {
        let Self { code, message, details } = self;
        serde_json::json!({ "cniVersion": version, "code": code, "msg": message, "details": details }).to_string()
    }
}

/// The network configuration on standard input, as far as it concerns us.
#[derive(Debug, Deserialize)]
pub struct NetConf {
    /// The version of the list this plugin is chained in.
    #[serde(rename = "cniVersion", default)]
    pub cni_version: String,
    /// The result so far, passed on byte for byte.
    #[serde(rename = "prevResult", default)]
    pub prev_result: Option<Box<RawValue>>,
    /// Where the agent's socket and decision file are.
    #[serde(default = "default_run_dir")]
    pub cni_agent_run_dir: PathBuf,
    /// Namespaces whose pods are never captured.
    #[serde(default)]
    pub exclude_namespaces: Vec<String>,
    /// The namespace of the agent itself.
    #[serde(default)]
    pub pod_namespace: String,
}

fn default_run_dir() -> PathBuf {
    "/var/run/istio-cni".into()
}

/// Reads and checks the configuration.
pub fn parse_config(stdin: &[u8]) -> Result<NetConf, CniError> {
    let decode = |problem: String| {
        CniError::new(CniError::DECODE, problem, "standard input must hold the network configuration, one JSON object")
    };
    if stdin.len() > MAX_CONFIG {
        return Err(decode(format!("the configuration is longer than {MAX_CONFIG} bytes")));
    }
    let conf: NetConf =
        serde_json::from_slice(stdin).map_err(|e| decode(format!("cannot read the configuration: {e}")))?;
    if VERSIONS.contains(&conf.cni_version.as_str()) {
        return Ok(conf);
    }
    Err(CniError::new(
        CniError::INCOMPATIBLE_VERSION,
        format!("cniVersion `{}` is not supported", conf.cni_version),
        format!("use one of {}", VERSIONS.join(", ")),
    ))
}

/// The addresses a previous plugin gave the pod, with the interface and gateway where given.
pub fn previous_ips(conf: &NetConf) -> Result<Vec<PreviousIp>, CniError> {
    #[derive(Deserialize)]
    struct Previous {
        #[serde(default)]
        ips: Option<Vec<PreviousIp>>,
    }
    let Some(raw) = &conf.prev_result else { return Ok(Vec::new()) };
    let previous: Previous = serde_json::from_str(raw.get()).map_err(|e| {
        let details = "prevResult.ips must be a list of {\"address\": \"IP/prefix\", …}";
        CniError::new(CniError::DECODE, format!("cannot read prevResult: {e}"), details)
    })?;
    Ok(previous.ips.unwrap_or_default())
}

/// An entry of `prevResult.ips`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct PreviousIp {
    pub address: IpNet,
    #[serde(default)]
    pub gateway: Option<IpAddr>,
    #[serde(default)]
    pub interface: Option<i64>,
}

/// The CNI environment of one call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallEnv {
    pub command: Command,
    pub container_id: String,
    /// Empty when the runtime gave none (allowed for DEL).
    pub netns: PathBuf,
    /// The `K8S_POD_…` arguments; `None` for a sandbox that is no Kubernetes pod.
    pub pod: Option<PodArgs>,
}

/// Which pod the sandbox is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodArgs {
    pub namespace: String,
    pub name: String,
    /// Older runtimes do not tell.
    pub uid: Option<String>,
}

/// Reads `CNI_COMMAND` and, for the commands that need them, the other variables.
pub fn parse_env(vars: &dyn Vars) -> Result<CallEnv, CniError> {
    let text = |name: &str| vars.var(name).unwrap_or_default();
    let command = parse_command(&text("CNI_COMMAND"))?;
    let env = CallEnv {
        command,
        container_id: text("CNI_CONTAINERID"),
        netns: text("CNI_NETNS").into(),
        pod: parse_args(&text("CNI_ARGS"))?,
    };
    if matches!(command, Command::Add | Command::Check) {
        required("CNI_CONTAINERID", &env.container_id, "the container's id")?;
        required("CNI_NETNS", &env.netns.to_string_lossy(), "the path of the pod's network namespace")?;
        required("CNI_IFNAME", &text("CNI_IFNAME"), "the name of the interface, for example eth0")?;
    }
    Ok(env)
}

fn invalid_env(message: String, details: &str) -> CniError {
    CniError::new(CniError::INVALID_ENVIRONMENT, message, details)
}

fn required(name: &str, value: &str, expected: &str) -> Result<(), CniError> {
    if value.is_empty() {
        return Err(invalid_env(format!("{name} is not set"), &format!("the runtime must set it to {expected}")));
    }
    Ok(())
}

fn parse_command(value: &str) -> Result<Command, CniError> {
    Ok(match value {
        "ADD" => Command::Add,
        "CHECK" => Command::Check,
        "DEL" => Command::Del,
        "GC" => Command::Gc,
        "STATUS" => Command::Status,
        "VERSION" => Command::Version,
        other => {
            let details = "use ADD, CHECK, DEL, GC, STATUS or VERSION; this program is run by a container runtime";
            return Err(invalid_env(format!("CNI_COMMAND is `{other}`"), details));
        }
    })
}

/// `K8S_POD_NAMESPACE=a;K8S_POD_NAME=b;…`; other keys are for other plugins.
fn parse_args(args: &str) -> Result<Option<PodArgs>, CniError> {
    let mut pairs = BTreeMap::new();
    for item in args.split(';').filter(|item| !item.is_empty()) {
        let Some((key, value)) = item.split_once('=') else {
            return Err(invalid_env(format!("CNI_ARGS has `{item}`"), "it must be KEY=VALUE pairs separated by ;"));
        };
        pairs.insert(key, value);
    }
    let take = |key: &str| pairs.get(key).filter(|v| !v.is_empty()).map(|v| (*v).to_owned());
    Ok(match (take("K8S_POD_NAMESPACE"), take("K8S_POD_NAME")) {
        (Some(namespace), Some(name)) => Some(PodArgs { namespace, name, uid: take("K8S_POD_UID") }),
        _ => None,
    })
}

/// Whether the version of the configuration has the command.
pub fn check_version(command: Command, conf: &NetConf) -> Result<(), CniError> {
    let since = command.since();
    if VERSIONS.iter().position(|v| *v == conf.cni_version).is_some_and(|v| v >= since) {
        return Ok(());
    }
    let message = format!("cniVersion {} has no such command", conf.cni_version);
    Err(CniError::new(CniError::INCOMPATIBLE_VERSION, message, format!("it came with {}", VERSIONS[since])))
}

/// The answer to ADD: the previous result unchanged, or an empty one when we are the first of the chain.
pub fn add_result(conf: &NetConf) -> String {
    match &conf.prev_result {
        Some(raw) => raw.get().to_owned(),
        None => serde_json::json!({ "cniVersion": conf.cni_version }).to_string(),
    }
}

/// The answer to VERSION, in the caller's version where it named one.
pub fn version_result(stdin: &[u8]) -> String {
    #[derive(Deserialize, Serialize)]
    struct Asked {
        #[serde(rename = "cniVersion", default)]
        cni_version: String,
    }
    let asked = serde_json::from_slice::<Asked>(stdin).map(|a| a.cni_version).unwrap_or_default();
    let version = VERSIONS.iter().find(|v| **v == asked).unwrap_or(&VERSIONS[4]);
    serde_json::json!({ "cniVersion": version, "supportedVersions": VERSIONS }).to_string()
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn env(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    proptest! {
        #[test]
        fn no_input_makes_the_parsers_panic(stdin in prop::collection::vec(any::<u8>(), 0..200), args in "\\PC{0,60}") {
            if let Ok(conf) = parse_config(&stdin) {
                drop(previous_ips(&conf));
            }
            version_result(&stdin);
            drop(parse_args(&args));
        }
    }

    #[test]
    fn the_previous_result_is_passed_on_byte_for_byte() {
        let result = r#"{ "cniVersion":"1.0.0",  "ips":[{"address":"10.0.0.7/24","gateway":"10.0.0.1","interface":0}], "x": 1.50 }"#;
        let conf =
            parse_config(format!(r#"{{"cniVersion":"1.0.0","prevResult":{result}}}"#).as_bytes()).expect("valid");
        assert_eq!(add_result(&conf), result);
        let ips = previous_ips(&conf).expect("readable");
        assert_eq!((ips[0].address.to_string().as_str(), ips[0].interface), ("10.0.0.7/24", Some(0)));
        let alone = parse_config(br#"{"cniVersion":"0.3.1"}"#).expect("valid");
        assert_eq!(add_result(&alone), r#"{"cniVersion":"0.3.1"}"#);
    }

    #[test]
    fn malformed_input_is_named_with_its_remedy() {
        assert_eq!(parse_config(b"{").expect_err("cut").code, CniError::DECODE);
        assert_eq!(parse_config(b"{}").expect_err("no version").code, CniError::INCOMPATIBLE_VERSION);
        let bad_list = parse_config(br#"{"cniVersion":"1.0.0","exclude_namespaces":7}"#).expect_err("type");
        assert!(bad_list.message.contains("line 1"), "{bad_list}");
        let no_netns = parse_env(&env(&[("CNI_COMMAND", "ADD"), ("CNI_CONTAINERID", "c")])).expect_err("no netns");
        assert_eq!((no_netns.code, no_netns.message.as_str()), (4, "CNI_NETNS is not set"));
        assert!(parse_env(&env(&[])).expect_err("nothing").message.contains("CNI_COMMAND"));
        let bad_args = parse_env(&env(&[("CNI_COMMAND", "DEL"), ("CNI_ARGS", "K8S_POD_NAME")])).expect_err("args");
        assert!(bad_args.message.contains("CNI_ARGS"));
    }

    #[test]
    fn commands_exist_from_their_version_on() {
        let conf = |v: &str| parse_config(format!(r#"{{"cniVersion":"{v}"}}"#).as_bytes()).expect("valid");
        check_version(Command::Check, &conf("0.3.1")).expect_err("before 0.4.0");
        check_version(Command::Check, &conf("0.4.0")).expect("CHECK");
        check_version(Command::Status, &conf("1.0.0")).expect_err("before 1.1.0");
        check_version(Command::Gc, &conf("1.1.0")).expect("GC");
        assert!(version_result(br#"{"cniVersion":"0.4.0"}"#).contains(r#""cniVersion":"0.4.0""#));
        assert!(version_result(b"junk").contains("1.1.0"));
    }

    #[test]
    fn a_sandbox_without_kubernetes_arguments_is_no_pod() {
        assert_eq!(parse_args("IgnoreUnknown=1").expect("valid"), None);
        let pod = parse_args("IgnoreUnknown=1;K8S_POD_NAMESPACE=a;K8S_POD_NAME=b;K8S_POD_UID=u").expect("valid");
        assert_eq!(pod, Some(PodArgs { namespace: "a".into(), name: "b".into(), uid: Some("u".into()) }));
    }
}
