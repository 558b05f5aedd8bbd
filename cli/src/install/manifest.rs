//! The chart's manifests as they shall be in this cluster: rendered once per platform, then adapted as parsed objects.

use std::collections::BTreeMap;

use anyhow::Context as _;
use serde_json::Value;

use super::{INSTALL, MANAGED_BY, settings};
use crate::cluster::{MANAGER, Object};

macro_rules! rendered {
    ($($platform:literal),*) => { [$(($platform, include_str!(concat!("../../../deploy/rendered/", $platform, ".yaml")))),*] };
}

const RENDERED: [(&str, &str); 8] =
    rendered!("default", "eks", "gke", "k3d", "k3s", "microk8s", "minikube", "openshift");
/// The namespace they were rendered for.
const NAMESPACE: &str = "istio-system";

/// What is asked for; without hub and tag the images are those of the chart.
#[derive(Clone, Debug, Default)]
pub(super) struct Choice {
    pub(super) namespace: String,
    pub(super) platform: String,
    pub(super) hub: Option<String>,
    pub(super) tag: Option<String>,
    pub(super) settings: BTreeMap<String, String>,
}

pub(crate) fn platforms() -> impl Iterator<Item = &'static str> {
    RENDERED.iter().map(|(name, _)| *name)
}

/// What the nodes say of where they run.
pub(super) fn detect(nodes: &[Value]) -> &'static str {
    nodes.iter().map(platform_of).find(|platform| *platform != "default").unwrap_or("default")
}

fn platform_of(node: &Value) -> &'static str {
    let version = node["status"]["nodeInfo"]["kubeletVersion"].as_str().unwrap_or_default();
    let runtime = node["status"]["nodeInfo"]["containerRuntimeVersion"].as_str().unwrap_or_default();
    let name = node["metadata"]["name"].as_str().unwrap_or_default();
    let has = |label: &str| node["metadata"]["labels"][label].is_string();
    match () {
        () if has("node.openshift.io/os_id") => "openshift",
        () if version.contains("-gke") => "gke",
        () if version.contains("-eks") => "eks",
        () if version.contains("+k3s") && name.starts_with("k3d-") => "k3d",
        () if version.contains("+k3s") => "k3s",
        () if has("microk8s.io/cluster") => "microk8s",
        // With containerd its paths are the usual ones.
        () if has("minikube.k8s.io/name") && runtime.starts_with("docker") => "minikube",
        () => "default",
    }
}

pub(super) fn objects(choice: &Choice) -> anyhow::Result<Vec<Object>> {
    let (_, text) = RENDERED.iter().find(|(name, _)| *name == choice.platform).with_context(|| {
        format!("there is no platform `{}`; there are {}", choice.platform, platforms().collect::<Vec<_>>().join(", "))
    })?;
    let documents: Vec<Value> = serde_saphyr::from_multiple(text).context("the embedded manifests")?;
    let mut objects = Vec::new();
    for mut document in documents.into_iter().filter(|document| !document.is_null()) {
        rename(&mut document, &choice.namespace);
        own(&mut document, &choice.namespace);
        let what = format!("{} {}", document["kind"], document["metadata"]["name"]);
        let mut object = Object::new(document).with_context(|| format!("the embedded {what} is of no known kind"))?;
        for container in containers(&mut object) {
            let image = container["image"].as_str().map(|image| readdress(image, choice));
            container["image"] = image.into();
        }
        objects.push(object);
    }
    settings::apply(&mut objects, &choice.settings)?;
    Ok(objects)
}

/// Hub and tag of the control plane's image.
pub(super) fn images(objects: &[Object]) -> (String, String) {
    let deployment = objects.iter().find(|object| object.is("Deployment", "fairwayd"));
    let image = deployment.and_then(|d| d.value["spec"]["template"]["spec"]["containers"][0]["image"].as_str());
    let (hub, _, tag) = parts(image.unwrap_or_default());
    (hub.to_owned(), tag.to_owned())
}

/// The namespace is in names, addresses, arguments and subjects.
fn rename(value: &mut Value, namespace: &str) {
    match value {
        Value::String(text) if text.contains(NAMESPACE) => *text = text.replace(NAMESPACE, namespace),
        Value::Array(items) => items.iter_mut().for_each(|item| rename(item, namespace)),
        Value::Object(fields) => fields.values_mut().for_each(|field| rename(field, namespace)),
        _ => {}
    }
}

fn own(object: &mut Value, namespace: &str) {
    let labels = &mut object["metadata"]["labels"];
    if let Some(labels) = labels.as_object_mut() {
        labels.remove("helm.sh/chart");
    }
    labels[MANAGED_BY] = MANAGER.into();
    labels[INSTALL] = namespace.into();
}

/// Names of the definitions that an installation brings.
pub(super) fn definitions() -> anyhow::Result<Vec<String>> {
    let (namespace, platform) = (NAMESPACE.to_owned(), "default".to_owned());
    let objects = objects(&Choice { namespace, platform, ..Choice::default() })?;
    let definitions = objects.iter().filter(|object| object.kind.name == "CustomResourceDefinition");
    Ok(definitions.map(|definition| definition.name().to_owned()).collect())
}

/// The containers of a workload.
pub(super) fn containers(object: &mut Object) -> impl Iterator<Item = &mut Value> {
    let template = object.value.pointer_mut("/spec/template/spec/containers");
    template.and_then(Value::as_array_mut).into_iter().flatten()
}

fn readdress(image: &str, choice: &Choice) -> String {
    let (hub, name, tag) = parts(image);
    let (hub, tag) = (choice.hub.as_deref().unwrap_or(hub), choice.tag.as_deref().unwrap_or(tag));
    format!("{}/{name}:{tag}", hub.trim_end_matches('/'))
}

/// Hub, name and tag; a registry's port is part of the hub.
fn parts(image: &str) -> (&str, &str, &str) {
    let (hub, rest) = image.rsplit_once('/').unwrap_or(("", image));
    let (name, tag) = rest.split_once(':').unwrap_or((rest, "latest"));
    (hub, name, tag)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::component::COMPONENTS;

    fn choice(platform: &str) -> Choice {
        Choice { namespace: "mesh".to_owned(), platform: platform.to_owned(), ..Choice::default() }
    }

    #[test]
    fn every_platform_can_be_installed_anywhere_and_is_found_again_by_label() {
        for platform in platforms() {
            let objects = objects(&choice(platform)).unwrap();
            assert!(COMPONENTS.iter().all(|c| objects.iter().any(|o| o.is(c.kind, c.name))), "{platform}");
            for object in &objects {
                assert!(!object.value.to_string().contains(NAMESPACE), "{object}");
                assert_eq!(
                    (object.label(INSTALL), object.label(MANAGED_BY)),
                    (Some("mesh"), Some(MANAGER)),
                    "{object}"
                );
                assert!(object.namespace().is_some() == object.kind.namespaced, "{object}");
            }
        }
    }

    #[test]
    fn pods_are_chosen_by_the_labels_that_they_have() {
        let objects = objects(&choice("default")).unwrap();
        for component in &COMPONENTS {
            let workload = objects.iter().find(|o| o.is(component.kind, component.name)).unwrap();
            let (key, value) = component.selector.split_once('=').unwrap();
            assert_eq!(workload.value["spec"]["template"]["metadata"]["labels"][key], value);
            let template = &workload.value["spec"]["template"];
            let port = &template["metadata"]["annotations"]["prometheus.io/port"];
            assert!(port.is_string(), "annotations are text: {port}");
            let probe = &template["spec"]["containers"][0]["readinessProbe"]["httpGet"];
            assert_eq!(
                (probe["port"].as_u64(), probe["path"].as_str()),
                (Some(component.ready.0.into()), Some(component.ready.1))
            );
        }
    }

    #[test]
    fn images_come_from_the_hub_with_the_tag() {
        let chosen =
            Choice { hub: Some("r.example:5000/x".to_owned()), tag: Some("t".to_owned()), ..choice("default") };
        let mut objects = objects(&chosen).unwrap();
        let images: Vec<Value> =
            objects.iter_mut().flat_map(|o| containers(o).map(|c| c["image"].clone()).collect::<Vec<_>>()).collect();
        assert_eq!(
            images,
            ["r.example:5000/x/fairway-node:t", "r.example:5000/x/ztunnel:t", "r.example:5000/x/fairwayd:t"]
        );
        assert_eq!(super::images(&objects), ("r.example:5000/x".to_owned(), "t".to_owned()));
    }

    #[test]
    fn nodes_tell_the_platform() {
        let node = |name: &str, version: &str, runtime: &str, label: &str| {
            json!({"metadata": {"name": name, "labels": {label: "x"}},
                "status": {"nodeInfo": {"kubeletVersion": version, "containerRuntimeVersion": runtime}}})
        };
        for (node, wanted) in [
            (node("n", "v1.34.1-gke.1", "containerd://2", "a"), "gke"),
            (node("n", "v1.34.1-eks-1", "containerd://2", "a"), "eks"),
            (node("n", "v1.34.1+k3s1", "containerd://2", "a"), "k3s"),
            (node("k3d-a", "v1.34.1+k3s1", "containerd://2", "a"), "k3d"),
            (node("n", "v1.34.1", "cri-o://1", "node.openshift.io/os_id"), "openshift"),
            (node("n", "v1.34.1", "containerd://2", "microk8s.io/cluster"), "microk8s"),
            (node("n", "v1.34.1", "docker://28", "minikube.k8s.io/name"), "minikube"),
            (node("n", "v1.34.1", "containerd://2", "minikube.k8s.io/name"), "default"),
            (node("n", "v1.34.1", "containerd://2", "a"), "default"),
        ] {
            assert_eq!(detect(&[json!({}), node.clone()]), wanted, "{node}");
        }
    }
}
