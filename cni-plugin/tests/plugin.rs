//! The plugin as a container runtime runs it: a process, its environment, its standard input and output.

use std::{
    io::Write,
    path::Path,
    process::{Command, Stdio},
    time::SystemTime,
};

use cni_plugin::decision::{Decisions, Listed};
use serde_json::{Value, json};

/// What the process printed and whether it succeeded. Anything but JSON on standard output is a failure of its own.
fn run(command: &str, args: &str, stdin: &str) -> (Option<Value>, bool) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_fairway-cni"))
        .env_clear()
        .env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", "c1")
        .env("CNI_NETNS", "/proc/self/ns/net")
        .env("CNI_IFNAME", "eth0")
        .env("CNI_PATH", "/opt/cni/bin")
        .env("CNI_ARGS", args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the plugin starts");
    // One that ends without reading breaks the pipe, and may.
    child.stdin.take().expect("piped").write_all(stdin.as_bytes()).unwrap_or_default();
    let output = child.wait_with_output().expect("it ends");
    let text = String::from_utf8(output.stdout).expect("text");
    let printed = (!text.is_empty()).then(|| serde_json::from_str(&text).expect("JSON and nothing else"));
    (printed, output.status.success())
}

const POD: &str =
    "IgnoreUnknown=1;K8S_POD_NAMESPACE=demo;K8S_POD_NAME=app;K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID=u1";

fn conf(run_dir: &Path, version: &str, more: Value) -> String {
    let mut conf = json!({
        "cniVersion": version, "name": "net", "type": "fairway-cni", "cni_agent_run_dir": run_dir,
        "prevResult": {"cniVersion": version, "ips": [{"version": "4", "address": "10.0.0.7/24"}]},
    });
    conf.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    conf.to_string()
}

#[test]
fn every_version_passes_a_pod_outside_the_mesh_on_as_it_came() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut decisions = Decisions::default();
    decisions.pods.insert("demo/app".into(), Listed { uid: "u1".into(), enrolled: false });
    decisions.write(dir.path(), SystemTime::now()).expect("write");
    for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let (printed, succeeded) = run("ADD", POD, &conf(dir.path(), version, json!({})));
        assert!(succeeded, "{version}: {printed:?}");
        let expected = json!({"cniVersion": version, "ips": [{"version": "4", "address": "10.0.0.7/24"}]});
        assert_eq!(printed, Some(expected), "{version}");
        assert_eq!(run("DEL", POD, &conf(dir.path(), version, json!({}))), (None, true), "{version}");
    }
    for (command, since) in [("CHECK", 2), ("STATUS", 4), ("GC", 4)] {
        for (index, version) in ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"].into_iter().enumerate() {
            let attachments = json!({"cni.dev/valid-attachments": [{"containerID": "c1", "ifname": "eth0"}]});
            let (printed, succeeded) = run(command, POD, &conf(dir.path(), version, attachments));
            assert_eq!(succeeded, index >= since, "{command} {version}: {printed:?}");
            if !succeeded {
                assert_eq!(printed.expect("an error")["code"], 1, "{command} {version}");
            }
        }
    }
}

#[test]
fn versions_are_told_and_others_refused() {
    let (printed, succeeded) = run("VERSION", "", r#"{"cniVersion":"1.0.0"}"#);
    let printed = printed.expect("versions");
    assert!(succeeded && printed["cniVersion"] == "1.0.0", "{printed}");
    assert_eq!(printed["supportedVersions"], json!(["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]));
    for version in ["", "0.1.0", "0.2.0", "2.0.0"] {
        let (printed, succeeded) = run("ADD", POD, &conf(Path::new("/none"), version, json!({})));
        assert!(!succeeded);
        assert_eq!(printed.expect("an error")["code"], 1, "{version}");
    }
}

#[test]
fn a_node_without_an_agent_is_up_and_lets_pods_go_but_takes_no_unknown_one() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let conf = |more: Value| conf(dir.path(), "1.1.0", more);
    for command in ["STATUS", "GC", "DEL"] {
        assert_eq!(run(command, POD, &conf(json!({}))), (None, true), "{command}");
    }
    let (printed, succeeded) = run("ADD", POD, &conf(json!({})));
    let error = printed.expect("an error");
    assert!(!succeeded && error["code"] == 11, "{error}");
    assert!(error["details"].as_str().is_some_and(|d| d.contains("fairway-cni-kubeconfig")), "{error}");
    assert!(run("ADD", POD, &conf(json!({"exclude_namespaces": ["demo"]}))).1, "an excluded namespace needs nobody");
    let own = POD.replace("NAME=app", "NAME=fairway-node-x7f2k");
    assert!(run("ADD", &own, &conf(json!({"pod_namespace": "demo"}))).1, "nor does the agent itself");
    assert!(run("ADD", "IgnoreUnknown=1", &conf(json!({}))).1, "nor a sandbox that is no pod");
}

#[test]
fn nothing_on_standard_input_makes_it_print_anything_but_an_error() {
    for stdin in ["", "{", "[]", "\u{0}", r#"{"cniVersion":7}"#, r#"{"cniVersion":"1.0.0","prevResult":7}"#] {
        let (printed, succeeded) = run("ADD", POD, stdin);
        assert!(!succeeded && printed.is_some_and(|error| error["code"].is_u64()), "{stdin}");
        assert_eq!(run("DEL", POD, stdin), (None, true), "{stdin}: a failing DEL would keep the pod for ever");
    }
}
