//! What else handles pods' traffic: the primary CNI plugin, other meshes, NetworkPolicies.

use std::net::IpAddr;

use cni_plugin::{
    eligibility::Pod,
    rules::model::{PROBE_V4, PROBE_V6},
};
use ipnet::IpNet;
use mesh_core::select::HBONE_PORT;
use serde_json::Value;

use super::{Item, Level, evidence::Evidence, selector::selects, some};

/// DaemonSets by which a primary CNI plugin is known.
const PRIMARIES: [(&str, &str); 11] = [
    ("cilium", "Cilium"),
    ("anetd", "GKE Dataplane V2"),
    ("calico-node", "Calico"),
    ("aws-node", "AWS VPC CNI"),
    ("ovnkube-node", "OVN-Kubernetes"),
    ("antrea-agent", "Antrea"),
    ("kube-flannel-ds", "Flannel"),
    ("kindnet", "kindnet"),
    ("azure-cns", "Azure CNI"),
    ("kube-router", "kube-router"),
    ("weave-net", "Weave"),
];

pub(super) fn primary(evidence: &Evidence) -> Vec<Item> {
    let find = |name: &str| evidence.daemon_sets.iter().find(|set| set["metadata"]["name"] == name);
    let found: Vec<(&str, &Value)> =
        PRIMARIES.iter().filter_map(|(set, name)| find(set).map(|set| (*name, set))).collect();
    let names: Vec<String> = found.iter().map(|(name, _)| (*name).to_owned()).collect();
    let mut items = vec![match names.is_empty() {
        true => Item::fine("network", "no CNI plugin that is known to need anything"),
        false => Item::fine("network", names.join(", ")),
    }];
    for (name, set) in found {
        match name {
            "Cilium" => items.extend(evidence.cilium.as_ref().map(cilium).unwrap_or_default()),
            "Calico" => items.extend(evidence.felix.as_ref().and_then(calico)),
            "AWS VPC CNI" => items.extend(aws(set)),
            "OVN-Kubernetes" => items.push(Item::new(
                "network",
                Level::Warning,
                "OVN-Kubernetes bypasses the node's own rules unless it is in local gateway mode: probes would fail",
                "set `routingViaHost: true`",
            )),
            "GKE Dataplane V2" => items.push(Item::new(
                "network",
                Level::Warning,
                "Dataplane V2 is Cilium that cannot be configured: probes of captured pods may fail",
                "try one namespace first; exec probes are not affected",
            )),
            _ => {}
        }
    }
    items
}

fn cilium(config: &Value) -> Vec<Item> {
    let value = |key: &str| config["data"][key].as_str().unwrap_or_default();
    let mut items = Vec::new();
    if value("cni-exclusive") == "true" {
        let says = "Cilium removes other plugins' entries (cni-exclusive): pods would start uncaptured, or not at all";
        items.push(Item::new("network", Level::Fault, says, "set Cilium's Helm value `cni.exclusive=false`"));
    }
    let replaces_proxy = ["true", "strict"].contains(&value("kube-proxy-replacement"));
    if replaces_proxy && value("bpf-lb-sock-hostns-only") != "true" {
        let says = "Cilium replaces service addresses before ztunnel sees them: policies and waypoints of services are passed by";
        items.push(Item::new(
            "network",
            Level::Warning,
            says,
            "set Cilium's Helm value `socketLB.hostNamespaceOnly=true`",
        ));
    }
    if value("enable-bpf-masquerade") == "true" {
        let says = "Cilium's masquerading in BPF passes the node's rules by: probes of captured pods fail";
        items.push(Item::new("network", Level::Warning, says, "set Cilium's Helm value `bpf.masquerade=false`"));
    }
    items
}

fn calico(felix: &Value) -> Option<Item> {
    let spec = &felix["spec"];
    let replaced = spec["bpfEnabled"] == true && spec["bpfConnectTimeLoadBalancing"] != "Disabled";
    let says = "Calico's eBPF replaces service addresses before ztunnel sees them: policies and waypoints of services are passed by";
    let remedy = "Calico 3.29 or newer, with `bpfConnectTimeLoadBalancing: Disabled`";
    replaced.then(|| Item::new("network", Level::Warning, says, remedy))
}

fn aws(set: &Value) -> Option<Item> {
    let containers = set["spec"]["template"]["spec"]["containers"].as_array()?;
    let variables: Vec<&Value> = containers.iter().filter_map(|c| c["env"].as_array()).flatten().collect();
    let value = |name: &str| variables.iter().find(|v| v["name"] == name).and_then(|v| v["value"].as_str());
    let strict =
        value("ENABLE_POD_ENI") == Some("true") && value("POD_SECURITY_GROUP_ENFORCING_MODE") != Some("standard");
    let says = "security groups of pods in mode strict: probes of captured pods fail";
    strict.then(|| {
        Item::new("network", Level::Warning, says, "set POD_SECURITY_GROUP_ENFORCING_MODE=standard, or use exec probes")
    })
}

/// Who else would capture the same pods.
pub(super) fn other_meshes(evidence: &Evidence) -> Vec<Item> {
    let mut items = Vec::new();
    for set in &evidence.daemon_sets {
        let (name, within) = (text(&set["metadata"]["name"]), text(&set["metadata"]["namespace"]));
        let ours = set["metadata"]["labels"]["app.kubernetes.io/part-of"] == "fairway";
        match name {
            "istio-cni-node" => items.push(Item::new(
                "other meshes",
                Level::Fault,
                format!("Istio's node agent runs in namespace {within}: two agents would fight over the same pods"),
                "docs/migrate-from-istio.md replaces it; or remove it first",
            )),
            "ztunnel" if !ours => items.push(Item::new(
                "other meshes",
                Level::Fault,
                format!("another ztunnel runs in namespace {within}: both would listen in the same pods"),
                "docs/migrate-from-istio.md replaces it; or remove it first",
            )),
            "linkerd-cni" => items.push(Item::new(
                "other meshes",
                Level::Warning,
                format!("Linkerd's CNI plugin runs in namespace {within}"),
                "keep its namespaces out of this mesh",
            )),
            _ => {}
        }
    }
    let planes = evidence.control_planes.iter().map(|plane| text(&plane["metadata"]["namespace"]).to_owned());
    let planes: Vec<String> = planes.collect();
    if !planes.is_empty() {
        let says = format!(
            "istiod runs in {}: both write ConfigMap istio-ca-root-cert, with the same content only as long as they have the same root",
            some(&planes)
        );
        let remedy = "docs/migrate-from-istio.md: ours takes over the root in istiod's namespace; remove istiod when nothing asks it any more";
        items.push(Item::new("other meshes", Level::Warning, says, remedy));
    }
    if items.is_empty() {
        items.push(Item::fine("other meshes", "none"));
    }
    items
}

/// NetworkPolicies that would keep peers or probes from captured pods.
pub(super) fn policies(evidence: &Evidence) -> Vec<Item> {
    let (mut peers, mut leaving, mut probes, mut enrolled) = (Vec::new(), Vec::new(), Vec::new(), false);
    for (namespace, pods) in &evidence.pods {
        let within: Vec<&Value> =
            evidence.policies.iter().filter(|policy| policy["metadata"]["namespace"] == **namespace).collect();
        let lacking = |direction: &str, admits: &dyn Fn(&Value) -> bool| -> Vec<&Pod> {
            let lacks = |pod: &&Pod| {
                let of_pod = |policy: &&&Value| {
                    isolates(policy, direction) && selects(&policy["spec"]["podSelector"], &pod.labels)
                };
                let mut policies = within.iter().filter(of_pod).peekable();
                // Policies add up: one that admits is enough.
                policies.peek().is_some() && !policies.any(|policy| rules(policy, direction).any(admits))
            };
            // Whoever never is in the mesh meets neither its tunnels nor its probes.
            pods.iter().filter(|pod| evidence.membership.could_belong(pod)).filter(lacks).collect()
        };
        let names: Vec<&str> = within.iter().map(|policy| text(&policy["metadata"]["name"])).collect();
        let told = format!("{namespace} ({})", names.join(", "));
        let mut note = |list: &mut Vec<String>, lacking: Vec<&Pod>| {
            if !lacking.is_empty() {
                list.push(told.clone());
                enrolled |= lacking.iter().any(|pod| evidence.belongs(pod));
            }
        };
        note(&mut peers, lacking("ingress", &|rule| admits_port(rule, HBONE_PORT.into())));
        note(&mut leaving, lacking("egress", &|rule| admits_port(rule, HBONE_PORT.into())));
        note(&mut probes, lacking("ingress", &|rule| admits_probes(rule)));
    }
    let level = if enrolled { Level::Fault } else { Level::Warning };
    let mut items = Vec::new();
    if !peers.is_empty() {
        let says = format!("pods that are not reached by peers in the mesh: {}", some(&peers));
        items.push(Item::new(
            "network policies",
            level,
            says,
            format!("admit TCP {HBONE_PORT} from these peers, beside the application's ports"),
        ));
    }
    if !leaving.is_empty() {
        let says = format!("pods that do not reach peers in the mesh: {}", some(&leaving));
        items.push(Item::new("network policies", level, says, format!("let TCP {HBONE_PORT} out to these peers")));
    }
    if !probes.is_empty() {
        let says = format!("pods whose probes may be dropped: {}", some(&probes));
        items.push(Item::new(
            "network policies",
            Level::Warning,
            says,
            format!("admit {PROBE_V4}/32 (and {PROBE_V6}/128)"),
        ));
    }
    if items.is_empty() {
        items.push(Item::fine("network policies", "none that keeps peers or probes from pods"));
    }
    items
}

/// Without types a policy is of ingress, and of egress when it has such rules.
fn isolates(policy: &Value, direction: &str) -> bool {
    let spec = &policy["spec"];
    match spec["policyTypes"].as_array() {
        Some(types) => types.iter().filter_map(Value::as_str).any(|kind| kind.eq_ignore_ascii_case(direction)),
        None => direction == "ingress" || spec["egress"].is_array(),
    }
}

fn rules<'a>(policy: &'a Value, direction: &str) -> impl Iterator<Item = &'a Value> {
    policy["spec"][direction].as_array().into_iter().flatten()
}

/// Named ports are none of the tunnel's.
fn admits_port(rule: &Value, port: u64) -> bool {
    let Some(ports) = rule["ports"].as_array().filter(|ports| !ports.is_empty()) else { return true };
    ports.iter().any(|entry| {
        let tcp = entry["protocol"].as_str().is_none_or(|protocol| protocol == "TCP");
        let first = entry["port"].as_u64();
        let last = entry["endPort"].as_u64().or(first);
        tcp && match (first, last) {
            (Some(first), Some(last)) => (first..=last).contains(&port),
            _ => entry["port"].is_null(),
        }
    })
}

fn admits_probes(rule: &Value) -> bool {
    let Some(peers) = rule["from"].as_array().filter(|peers| !peers.is_empty()) else { return true };
    let source = IpAddr::from(PROBE_V4);
    let covers = |text: &Value| {
        text.as_str().and_then(|text| text.parse::<IpNet>().ok()).is_some_and(|net| net.contains(&source))
    };
    peers.iter().any(|peer| {
        let block = &peer["ipBlock"];
        covers(&block["cidr"]) && !block["except"].as_array().into_iter().flatten().any(covers)
    })
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use cni_plugin::eligibility::MODE;
    use serde_json::json;

    use super::*;

    fn with_policies(specs: &[Value]) -> Evidence {
        let policy = |spec: &Value| json!({"metadata": {"name": "p", "namespace": "d"}, "spec": spec});
        let labels = [("app".to_owned(), "a".to_owned())].into();
        let pod = Pod { namespace: "d".to_owned(), name: "a".to_owned(), labels, ..Pod::default() };
        Evidence {
            policies: specs.iter().map(policy).collect(),
            pods: [("d".to_owned(), vec![pod])].into(),
            ..Evidence::default()
        }
    }

    #[test]
    fn policies_that_do_not_admit_tunnels_or_probes_are_told() {
        let any = json!({"app": "a"});
        let rule = |ports: Value| json!({"podSelector": {"matchLabels": any}, "ingress": [{"ports": ports}]});
        for (specs, told) in [
            (vec![], 0),
            (vec![rule(json!([{"port": 80}]))], 1),
            (vec![rule(json!([{"port": 15008}]))], 0),
            (vec![rule(json!([{"port": 15000, "endPort": 15010}]))], 0),
            (vec![rule(json!([{"port": 15008, "protocol": "UDP"}]))], 1),
            (vec![rule(json!([{"port": "http"}]))], 1),
            (vec![rule(json!([]))], 0),
            // One that admits is enough.
            (vec![rule(json!([{"port": 80}])), rule(json!([{"port": 15008}]))], 0),
            (vec![json!({"podSelector": {"matchLabels": {"app": "other"}}, "ingress": []})], 0),
            // Nothing gets in: neither peers nor probes.
            (vec![json!({"podSelector": {}, "policyTypes": ["Ingress"]})], 2),
            (
                vec![
                    json!({"podSelector": {}, "policyTypes": ["Egress"], "egress": [{"ports": [{"port": 53, "protocol": "UDP"}]}]}),
                ],
                1,
            ),
            (vec![json!({"podSelector": {}, "ingress": [{"from": [{"podSelector": {}}]}]})], 1),
            (vec![json!({"podSelector": {}, "ingress": [{"from": [{"ipBlock": {"cidr": "169.254.0.0/16"}}]}]})], 0),
            (
                vec![
                    json!({"podSelector": {}, "ingress": [{"from": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}}]}]}),
                ],
                1,
            ),
        ] {
            let items = policies(&with_policies(&specs));
            let found = items.iter().filter(|item| item.level > Level::Fine).count();
            assert_eq!(found, told, "{specs:?}: {items:?}");
        }
    }

    #[test]
    fn in_a_namespace_that_is_in_the_mesh_they_are_faults() {
        let mut evidence = with_policies(&[json!({"podSelector": {}, "ingress": [{"ports": [{"port": 80}]}]})]);
        assert_eq!(policies(&evidence)[0].level, Level::Warning);
        evidence.namespaces =
            vec![json!({"metadata": {"name": "d", "labels": {"istio.io/dataplane-mode": "ambient"}}})];
        assert_eq!(policies(&evidence)[0].level, Level::Fault);
    }

    #[test]
    fn pods_that_never_are_in_the_mesh_need_nothing_admitted() {
        let deny = [json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]})];
        let label = |key: &str, value: &str| [(key.to_owned(), value.to_owned())].into();
        for pod in [
            Pod { host_network: true, ..Pod::default() },
            Pod { labels: label(MODE, "none"), ..Pod::default() },
            Pod { annotations: label("sidecar.istio.io/status", "{}"), ..Pod::default() },
            Pod { namespace: "kube-system".to_owned(), ..Pod::default() },
        ] {
            let mut evidence = with_policies(&deny);
            evidence.pods.insert("d".to_owned(), vec![pod.clone()]);
            assert!(policies(&evidence).iter().all(|item| item.level == Level::Fine), "{pod:?}");
        }
    }

    #[test]
    fn primary_plugins_are_asked_for_what_is_known_to_break() {
        let set = |name: &str| json!({"metadata": {"name": name, "namespace": "kube-system"}});
        let cilium = |data: Value| Evidence {
            daemon_sets: vec![set("cilium")],
            cilium: Some(json!({"data": data})),
            ..Evidence::default()
        };
        let worst = |evidence: &Evidence| primary(evidence).into_iter().map(|item| item.level).max();
        assert_eq!(worst(&cilium(json!({"cni-exclusive": "false"}))), Some(Level::Fine));
        assert_eq!(worst(&cilium(json!({"cni-exclusive": "true"}))), Some(Level::Fault));
        assert_eq!(worst(&cilium(json!({"kube-proxy-replacement": "true"}))), Some(Level::Warning));
        let calico = |spec: Value| Evidence {
            daemon_sets: vec![set("calico-node")],
            felix: Some(json!({"spec": spec})),
            ..Evidence::default()
        };
        assert_eq!(worst(&calico(json!({"bpfEnabled": true}))), Some(Level::Warning));
        assert_eq!(
            worst(&calico(json!({"bpfEnabled": true, "bpfConnectTimeLoadBalancing": "Disabled"}))),
            Some(Level::Fine)
        );
    }

    #[test]
    fn another_mesh_on_the_same_nodes_is_a_fault_and_our_own_is_none() {
        let set = |name: &str, part: &str| json!({"metadata": {"name": name, "namespace": "n", "labels": {"app.kubernetes.io/part-of": part}}});
        let level = |set: Value| other_meshes(&Evidence { daemon_sets: vec![set], ..Evidence::default() })[0].level;
        assert_eq!(level(set("istio-cni-node", "istio")), Level::Fault);
        assert_eq!(level(set("ztunnel", "istio")), Level::Fault);
        assert_eq!(level(set("ztunnel", "fairway")), Level::Fine);
        // While the control plane is exchanged, both run.
        let istiod = json!({"metadata": {"name": "istiod", "namespace": "n"}});
        assert_eq!(
            other_meshes(&Evidence { control_planes: vec![istiod], ..Evidence::default() })[0].level,
            Level::Warning
        );
    }
}
