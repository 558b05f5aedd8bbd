//! What `deploy/rendered/` must say; `cargo xtask render --check` is what ties it to the chart.

use serde_json::json;

use super::*;

fn root() -> PathBuf {
    crate::root()
}

fn objects(platform: &str) -> Vec<Value> {
    let path = root().join(RENDERED).join(format!("{platform}.yaml"));
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    text.split("\n---\n")
        .map(|part| serde_saphyr::from_str(part).expect("YAML"))
        .filter(|o| *o != Value::Null)
        .collect()
}

fn of_kind<'a>(objects: &'a [Value], kind: &str) -> Vec<&'a Value> {
    objects.iter().filter(|object| object["kind"] == kind).collect()
}

fn named<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    let found = objects.iter().find(|object| object["kind"] == kind && object["metadata"]["name"] == name);
    found.unwrap_or_else(|| panic!("there is no {kind} {name}"))
}

fn container<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    &named(objects, kind, name)["spec"]["template"]["spec"]["containers"][0]
}

fn host_path<'a>(agent: &'a Value, volume: &str) -> &'a str {
    let volumes = agent["spec"]["template"]["spec"]["volumes"].as_array().expect("volumes");
    let found = volumes.iter().find(|v| v["name"] == volume).expect("the volume is there");
    found["hostPath"]["path"].as_str().expect("a path")
}

#[test]
fn each_platform_has_its_paths() {
    const K3S: &str = "/var/lib/rancher/k3s/agent/etc/cni/net.d";
    let table = [
        ("default", "/opt/cni/bin", "/etc/cni/net.d", "/var/run/netns"),
        ("eks", "/opt/cni/bin", "/etc/cni/net.d", "/var/run/netns"),
        ("gke", "/home/kubernetes/bin", "/etc/cni/net.d", "/var/run/netns"),
        ("k3d", "/bin", K3S, "/var/run/netns"),
        ("k3s", "/var/lib/rancher/k3s/data/cni", K3S, "/var/run/netns"),
        (
            "microk8s",
            "/var/snap/microk8s/current/opt/cni/bin",
            "/var/snap/microk8s/current/args/cni-network",
            "/var/run/netns",
        ),
        ("minikube", "/opt/cni/bin", "/etc/cni/net.d", "/var/run/docker/netns"),
        ("openshift", "/var/lib/cni/bin", "/etc/cni/multus/net.d", "/var/run/netns"),
    ];
    let tested: Vec<&str> = table.iter().map(|row| row.0).filter(|platform| *platform != "default").collect();
    assert_eq!(tested, platforms(&root()).expect("the platforms' table"));
    for (platform, programs, configuration, namespaces) in table {
        let objects = objects(platform);
        let agent = named(&objects, "DaemonSet", "fairway-node");
        let paths = ["cni-bin-dir", "cni-net-dir", "cni-netns-dir"].map(|volume| host_path(agent, volume));
        assert_eq!(paths, [programs, configuration, namespaces], "{platform}");
    }
}

#[test]
fn gke_alone_gets_a_quota_and_openshift_alone_its_constraints_and_multus() {
    for platform in ["default", "eks", "gke", "k3d", "k3s", "microk8s", "minikube", "openshift"] {
        let objects = objects(platform);
        assert_eq!(of_kind(&objects, "ResourceQuota").len(), usize::from(platform == "gke"), "{platform}");
        let multus = usize::from(platform == "openshift");
        assert_eq!(of_kind(&objects, "NetworkAttachmentDefinition").len(), multus, "{platform}");
        let constraints = of_kind(&objects, "RoleBinding");
        let constraints =
            constraints.iter().filter(|b| b["roleRef"]["name"].as_str().expect("a name").contains(":scc:"));
        assert_eq!(constraints.count(), 2 * multus, "{platform}");
        let settings = &named(&objects, "ConfigMap", "fairway-node")["data"];
        let chained = if platform == "openshift" { "false" } else { "true" };
        assert_eq!(settings["CHAINED_CNI_PLUGIN"], chained, "{platform}");
        for name in ["ztunnel", "fairway-node"] {
            let label = &container(&objects, "DaemonSet", name)["securityContext"]["seLinuxOptions"]["type"];
            let expected = if platform == "openshift" { json!("spc_t") } else { Value::Null };
            assert_eq!(label, &expected, "{platform}: {name}");
        }
    }
}

#[test]
fn what_only_helm_may_run_is_in_no_file() {
    for platform in ["default", "openshift"] {
        for object in objects(platform) {
            let hook = &object["metadata"]["annotations"]["helm.sh/hook"];
            assert!(hook.is_null(), "{platform}: {} {}", object["kind"], object["metadata"]["name"]);
        }
    }
}

#[test]
fn nobody_may_more_than_what_is_written_down() {
    for object in objects("default").iter().filter(|o| o["kind"] == "ClusterRole" || o["kind"] == "Role") {
        let name = &object["metadata"]["name"];
        for rule in object["rules"].as_array().expect("rules") {
            let text = rule.to_string();
            assert!(!text.contains('*'), "{name}: {text}");
            let resources = rule["resources"].to_string();
            let writes = rule["verbs"]
                .as_array()
                .expect("verbs")
                .iter()
                .any(|verb| ["update", "patch", "delete"].contains(&verb.as_str().expect("a verb")));
            if writes
                && ["secrets", "configmaps", "leases", "webhookconfigurations"]
                    .iter()
                    .any(|kind| resources.contains(kind))
            {
                assert!(rule["resourceNames"].is_array(), "{name} may write any: {text}");
            }
        }
    }
}

#[test]
fn the_webhook_is_asked_about_our_kinds_only_and_its_absence_stops_nothing() {
    let objects = objects("default");
    let webhooks = &named(&objects, "ValidatingWebhookConfiguration", "fairway-istio-system")["webhooks"];
    assert_eq!(webhooks.as_array().expect("webhooks").len(), 1);
    let webhook = &webhooks[0];
    assert_eq!((&webhook["failurePolicy"], &webhook["timeoutSeconds"]), (&json!("Ignore"), &json!(2)));
    assert_eq!((&webhook["matchPolicy"], &webhook["sideEffects"]), (&json!("Equivalent"), &json!("None")));
    let rules = webhook["rules"].as_array().expect("rules").iter();
    let asked: Vec<Value> = rules
        .inspect(|rule| assert_eq!(rule["operations"], json!(["CREATE", "UPDATE"])))
        .map(|rule| json!([rule["apiGroups"][0], rule["resources"]]))
        .collect();
    let security = json!(["security.istio.io", ["authorizationpolicies", "peerauthentications"]]);
    assert_eq!(asked, [security, json!(["networking.istio.io", ["serviceentries", "workloadentries"]])]);
    // From the API server to the program.
    let service = &webhook["clientConfig"]["service"];
    assert_eq!((&service["name"], &service["path"]), (&json!("fairwayd"), &json!("/validate")));
    let ports = named(&objects, "Service", "fairwayd")["spec"]["ports"].as_array().expect("ports").clone();
    let port = ports.iter().find(|port| port["port"] == service["port"]).expect("the Service has the port");
    let arguments = container(&objects, "Deployment", "fairwayd")["args"].as_array().expect("arguments");
    assert!(arguments.contains(&json!(format!("--webhook=[::]:{}", port["targetPort"]))));
}

#[test]
fn the_control_plane_runs_as_nobody_special() {
    let objects = objects("default");
    let pod = &named(&objects, "Deployment", "fairwayd")["spec"]["template"]["spec"];
    assert_eq!(pod["securityContext"]["runAsUser"], 1337);
    assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
    let expected = json!({
        "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"]},
    });
    assert_eq!(pod["containers"][0]["securityContext"], expected);
}

#[test]
fn on_nodes_nothing_is_privileged_shares_the_nodes_network_or_processes_or_has_another_capability() {
    let objects = objects("default");
    let table = [
        ("ztunnel", json!(["NET_ADMIN", "SYS_ADMIN", "NET_RAW"])),
        ("fairway-node", json!(["NET_ADMIN", "NET_RAW", "SYS_PTRACE", "SYS_ADMIN", "DAC_OVERRIDE"])),
    ];
    for (name, capabilities) in table {
        let pod = &named(&objects, "DaemonSet", name)["spec"]["template"]["spec"];
        let context = &pod["containers"][0]["securityContext"];
        assert_eq!(context["capabilities"], json!({"drop": ["ALL"], "add": capabilities}), "{name}");
        assert_eq!(
            (&context["privileged"], &context["readOnlyRootFilesystem"]),
            (&json!(false), &json!(true)),
            "{name}"
        );
        assert_eq!((&pod["hostNetwork"], &pod["hostPID"]), (&Value::Null, &Value::Null), "{name}");
    }
}

#[test]
fn selectors_find_their_pods_and_every_image_is_ours() {
    let objects = objects("default");
    for kind in ["DaemonSet", "Deployment"] {
        for object in of_kind(&objects, kind) {
            let labels = &object["spec"]["template"]["metadata"]["labels"];
            for (key, value) in object["spec"]["selector"]["matchLabels"].as_object().expect("labels") {
                assert_eq!(&labels[key], value, "{}", object["metadata"]["name"]);
            }
            assert_eq!(labels["istio.io/dataplane-mode"], "none");
            let name = object["metadata"]["name"].as_str().expect("a name");
            let image = &object["spec"]["template"]["spec"]["containers"][0]["image"];
            assert_eq!(image, &format!("localhost/{name}:{}", env!("CARGO_PKG_VERSION")));
        }
    }
    let selector = &named(&objects, "Service", "fairwayd")["spec"]["selector"];
    let labels = &named(&objects, "Deployment", "fairwayd")["spec"]["template"]["metadata"]["labels"];
    assert_eq!(selector["app"], labels["app"]);
}

#[test]
fn what_is_tidied_has_no_blanks_at_the_ends() {
    assert_eq!(tidy("a  \n\n b\n\n\n"), "a\n\n b\n");
}

#[test]
fn values_and_their_schema_have_the_same_keys_and_no_other_is_taken() {
    fn compare(path: &str, values: &Value, schema: &Value) {
        let (Some(values), Some(properties)) = (values.as_object(), schema["properties"].as_object()) else { return };
        assert_eq!(schema["additionalProperties"], false, "{path}");
        let keys =
            |map: &serde_json::Map<String, Value>| map.keys().cloned().collect::<std::collections::BTreeSet<_>>();
        assert_eq!(keys(values), keys(properties), "{path}");
        for (key, value) in values {
            compare(&format!("{path}.{key}"), value, &properties[key]);
        }
    }
    let read = |name: &str| fs::read_to_string(root().join(CHART).join(name)).expect("readable");
    let values: Value = serde_saphyr::from_str(&read("values.yaml")).expect("YAML");
    compare("", &values, &serde_json::from_str(&read("values.schema.json")).expect("JSON"));
}
