//! What the words of a question stand for: pods, deployments, nodes, services, ports.

use std::net::IpAddr;

use anyhow::{Context as _, bail, ensure};
use lab::protocol::PodStatus;

use super::facts::End;
use crate::mesh::{Mesh, Service};

/// Names that are told of many.
const TOLD: usize = 4;

/// `name`, `namespace/name`, `deploy/name` or `namespace/deploy/name`.
#[derive(Debug, PartialEq, Eq)]
struct Name<'a> {
    namespace: &'a str,
    name: &'a str,
    is_deployment: bool,
}

impl<'a> Name<'a> {
    fn parse(text: &'a str, namespace: &'a str) -> anyhow::Result<Self> {
        let is_kind = |part: &str| matches!(part, "deploy" | "deployment" | "deployments");
        let parts: Vec<&str> = text.split('/').collect();
        let (namespace, name, is_deployment) = match parts[..] {
            [name] => (namespace, name, false),
            [kind, name] if is_kind(kind) => (namespace, name, true),
            [namespace, name] => (namespace, name, false),
            [namespace, kind, name] if is_kind(kind) => (namespace, name, true),
            _ => ("", "", false),
        };
        let is_name = |part: &str| {
            !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.' || b == b'_')
        };
        ensure!(
            is_name(namespace) && is_name(name),
            "`{text}` is not understood: expected namespace/name or namespace/deploy/name"
        );
        Ok(Self { namespace, name, is_deployment })
    }
}

/// A pod, one of a deployment's, or a node as `node/<name>`.
pub(super) fn source(mesh: &dyn Mesh, text: &str) -> anyhow::Result<End> {
    if let Some(node) = text.strip_prefix("node/") {
        let found = mesh.nodes()?.into_iter().find(|n| n.name == node);
        let found =
            found.with_context(|| format!("there is no node `{node}`; `{}` lists them", mesh.lister("nodes")))?;
        let addresses = found.addresses;
        return Ok(End { name: text.to_owned(), node: node.to_owned(), addresses, ..End::default() });
    }
    let name = Name::parse(text, mesh.namespace())?;
    Ok(End::of_pod(&pod(mesh, &name)?))
}

/// An address, unless only DNS has one, and a port.
pub(super) fn destination(mesh: &dyn Mesh, text: &str, from: &End) -> anyhow::Result<(Option<IpAddr>, u16)> {
    let (name, port) = match text.rsplit_once(':') {
        Some((name, port)) => (name, Some(port)),
        None => (text, None),
    };
    if let Ok(address) = name.trim_matches(['[', ']']).parse() {
        return Ok((Some(address), number(port, None)?));
    }
    if name.contains('.') && !name.contains('/') {
        return Ok((None, number(port, None)?));
    }
    let near = if from.namespace.is_empty() { mesh.namespace() } else { &from.namespace };
    let name = Name::parse(name, near)?;
    let full = format!("{}/{}", name.namespace, name.name);
    let service = if name.is_deployment { None } else { mesh.service(name.namespace, name.name)? };
    let addresses = match &service {
        Some(service) => {
            let port = number(port, Some((&full, service)))?;
            if let Some(selector) = &service.headless {
                let pods: Vec<String> = mesh.pods(name.namespace, selector)?.iter().map(full_name).collect();
                let which = if pods.is_empty() { "which has no running pod".to_owned() } else { some(&pods, port) };
                bail!(
                    "`{full}` is a headless service, a name for its pods and without an address: ask for one of them: {which}"
                );
            }
            &service.addresses
        }
        None => &pod(mesh, &name).with_context(|| format!("`{full}` is neither a service nor a pod"))?.addresses,
    };
    let address = addresses.iter().find_map(|a| a.parse().ok());
    Ok((
        Some(address.with_context(|| format!("`{full}` has no address"))?),
        number(port, service.as_ref().map(|s| (full.as_str(), s)))?,
    ))
}

/// By number, or by the name that the service gives it.
fn number(port: Option<&str>, service: Option<(&str, &Service)>) -> anyhow::Result<u16> {
    let ports = || match service {
        Some((name, service)) if !service.ports.is_empty() => {
            let told = |(name, number): &(String, u16)| {
                if name.is_empty() { number.to_string() } else { format!("{number} ({name})") }
            };
            format!("; service {name} has {}", service.ports.iter().map(told).collect::<Vec<_>>().join(", "))
        }
        _ => String::new(),
    };
    let Some(port) = port else { bail!("the destination needs a port, as namespace/name:port{}", ports()) };
    if let Ok(number) = port.parse() {
        return Ok(number);
    }
    let named = service.and_then(|(_, service)| service.ports.iter().find(|(name, _)| name == port));
    named.map(|(_, number)| *number).with_context(|| format!("`{port}` is not a port{}", ports()))
}

fn pod(mesh: &dyn Mesh, name: &Name<'_>) -> anyhow::Result<PodStatus> {
    let Name { namespace, name: short, is_deployment } = *name;
    if is_deployment {
        if let Some(selector) = mesh.deployment(namespace, short)? {
            let first = mesh.pods(namespace, &selector)?.into_iter().next();
            return first.with_context(|| format!("no pod of deployment `{namespace}/{short}` runs"));
        }
        ensure_namespace(mesh, namespace)?;
        bail!("there is no deployment `{namespace}/{short}`");
    }
    if let Some(pod) = mesh.pod(namespace, short)? {
        return Ok(pod);
    }
    ensure_namespace(mesh, namespace)?;
    let begin = format!("{short}-");
    // Only to help: who may not list them learns as much as before.
    let mut similar = mesh.pods(namespace, "").unwrap_or_default();
    similar.retain(|pod| pod.name.starts_with(&begin));
    let similar: Vec<String> = similar.iter().map(full_name).take(TOLD).collect();
    match similar.is_empty() {
        true => bail!("there is no pod `{namespace}/{short}`; `{}` lists them", mesh.lister("pods")),
        false => bail!("there is no pod `{namespace}/{short}`; perhaps {}", similar.join(" or ")),
    }
}

fn ensure_namespace(mesh: &dyn Mesh, namespace: &str) -> anyhow::Result<()> {
    // Who may not look is told of the pod.
    let there = mesh.has_namespace(namespace).unwrap_or(true);
    ensure!(there, "there is no namespace `{namespace}`; `{}` lists them", mesh.lister("namespaces"));
    Ok(())
}

fn full_name(pod: &PodStatus) -> String {
    format!("{}/{}", pod.namespace, pod.name)
}

fn some(pods: &[String], port: u16) -> String {
    let told: Vec<String> = pods.iter().take(TOLD).map(|pod| format!("{pod}:{port}")).collect();
    told.join(" or ")
}

#[cfg(test)]
mod tests {
    use lab::protocol::NodeStatus;

    use super::*;
    use crate::mesh::{Page, Program};

    /// Namespace `shop` with a service of two ports, a headless one, a deployment, and its pod.
    #[derive(Debug)]
    struct Shop;

    fn client() -> PodStatus {
        let addresses = vec!["10.0.0.7".to_owned()];
        PodStatus { namespace: "shop".to_owned(), name: "client-7d9-x".to_owned(), addresses, ..PodStatus::default() }
    }

    impl Mesh for Shop {
        fn pod(&self, namespace: &str, name: &str) -> anyhow::Result<Option<PodStatus>> {
            Ok(Some(client()).filter(|pod| pod.namespace == namespace && pod.name == name))
        }

        fn pod_at(&self, _address: IpAddr) -> anyhow::Result<Option<PodStatus>> {
            Ok(None)
        }

        fn any_pod(&self) -> anyhow::Result<Option<PodStatus>> {
            Ok(None)
        }

        fn pods(&self, namespace: &str, _selector: &str) -> anyhow::Result<Vec<PodStatus>> {
            Ok(Some(client()).filter(|pod| pod.namespace == namespace).into_iter().collect())
        }

        fn service(&self, namespace: &str, name: &str) -> anyhow::Result<Option<Service>> {
            let ports = vec![("http".to_owned(), 80), ("metrics".to_owned(), 9090)];
            let web = Service { addresses: vec!["10.1.0.1".to_owned()], ports, headless: None };
            Ok(match (namespace, name) {
                ("shop", "web") => Some(web),
                ("shop", "db") => Some(Service { headless: Some(String::new()), addresses: Vec::new(), ..web }),
                _ => None,
            })
        }

        fn deployment(&self, namespace: &str, name: &str) -> anyhow::Result<Option<String>> {
            Ok(((namespace, name) == ("shop", "client")).then(String::new))
        }

        fn has_namespace(&self, name: &str) -> anyhow::Result<bool> {
            Ok(name == "shop")
        }

        fn strict_authentications(&self, _namespace: &str) -> anyhow::Result<Vec<String>> {
            Ok(Vec::new())
        }

        fn installed(&self) -> anyhow::Result<()> {
            Ok(())
        }

        fn nodes(&self) -> anyhow::Result<Vec<NodeStatus>> {
            Ok(Vec::new())
        }

        fn ask(&self, program: &Program, _page: Page<'_>) -> anyhow::Result<(i32, String)> {
            bail!("{program} is not there")
        }

        fn namespace(&self) -> &str {
            "shop"
        }

        fn system(&self) -> &str {
            "istio-system"
        }

        fn lister(&self, what: &str) -> String {
            format!("kubectl get {what}")
        }
    }

    fn said(text: &str) -> String {
        match source(&Shop, text) {
            Ok(end) => end.name,
            Err(error) => format!("{error:#}"),
        }
    }

    #[test]
    fn a_source_is_a_pod_or_one_of_a_deployments_and_what_is_missing_is_named() {
        for (text, wanted) in [
            ("shop/client-7d9-x", "shop/client-7d9-x"),
            ("deploy/client", "shop/client-7d9-x"),
            ("shop/deploy/client", "shop/client-7d9-x"),
            ("shop/client", "there is no pod `shop/client`; perhaps shop/client-7d9-x"),
            ("shop/other", "there is no pod `shop/other`; `kubectl get pods` lists them"),
            ("shopp/client", "there is no namespace `shopp`; `kubectl get namespaces` lists them"),
            ("shopp/deploy/client", "there is no namespace `shopp`; `kubectl get namespaces` lists them"),
            ("shop/deploy/other", "there is no deployment `shop/other`"),
            ("shop/", "`shop/` is not understood: expected namespace/name or namespace/deploy/name"),
        ] {
            assert_eq!(said(text), wanted, "{text}");
        }
    }

    #[test]
    fn a_destinations_port_is_a_number_or_a_name_and_the_services_own_are_listed() {
        let from = End { namespace: "shop".to_owned(), ..End::default() };
        let said = |text: &str| match destination(&Shop, text, &from) {
            Ok((address, port)) => format!("{address:?} {port}"),
            Err(error) => format!("{error:#}"),
        };
        for (text, wanted) in [
            ("shop/web:http", "Some(10.1.0.1) 80"),
            ("web:9090", "Some(10.1.0.1) 9090"),
            ("shop/deploy/client:8080", "Some(10.0.0.7) 8080"),
            ("[fd00::1]:80", "Some(fd00::1) 80"),
            ("example.com:443", "None 443"),
            ("shop/web:htp", "`htp` is not a port; service shop/web has 80 (http), 9090 (metrics)"),
            (
                "shop/web",
                "the destination needs a port, as namespace/name:port; service shop/web has 80 (http), 9090 (metrics)",
            ),
            ("shop/client-7d9-x:http", "`http` is not a port"),
        ] {
            assert_eq!(said(text), wanted, "{text}");
        }
        assert!(said("shop/db:80").ends_with("ask for one of them: shop/client-7d9-x:80"), "{}", said("shop/db:80"));
        assert!(said("shopp/web:80").contains("there is no namespace `shopp`"), "{}", said("shopp/web:80"));
    }
}
