//! What the environment tells the agent.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use mesh_runtime::{
    env::{Problems, Reader, Vars},
    telemetry,
};

use super::{
    api::ApiServer,
    enroll::Pace,
    install::{self, kubeconfig::Credentials, plan::Mode},
};
use crate::rules::{Options, model};

#[derive(Clone, Debug)]
pub struct Config {
    pub node: String,
    pub zds_socket: PathBuf,
    pub run_dir: PathBuf,
    pub excluded_namespaces: Vec<String>,
    pub options: Options,
    pub world: World,
    /// Metrics and pages.
    pub admin: SocketAddr,
    /// Readiness alone, for whoever must not see the rest.
    pub health: Option<SocketAddr>,
    pub grace: Duration,
    pub log_filter: String,
    pub log_format: telemetry::Format,
}

/// Where pods come from, and what it takes to reach them.
#[derive(Clone, Debug)]
pub enum World {
    /// A folder of manifests, as in the lab.
    Folder {
        manifests: PathBuf,
        sandboxes: Option<PathBuf>,
    },
    Kubernetes(Box<Kubernetes>),
}

/// A node of Kubernetes, seen from the agent's container.
#[derive(Clone, Debug)]
pub struct Kubernetes {
    pub api: ApiServer,
    /// What stands before the paths of the node.
    pub host_root: PathBuf,
    pub host_proc: PathBuf,
    /// None where somebody else installs the plugin.
    pub install: Option<install::Settings>,
    /// Whether stopping may be an upgrade at all (not with AMBIENT_DISABLE_SAFE_UPGRADE).
    pub safe_upgrade: bool,
    /// The agent's own namespace and DaemonSet: while that stands, stopping is an upgrade.
    pub namespace: String,
    pub daemon_set: String,
    /// The key of a taint to take from the node once the agent is ready.
    pub taint: Option<String>,
    /// How long a pod may be uncaptured before an Event tells of it.
    pub patience: Duration,
}

impl Config {
    /// Reads the environment; every problem is reported at once.
    pub fn from_env(vars: &dyn Vars) -> Result<Self, Problems> {
        let env = Reader::new(vars);
        let path = |name: &str, default: &str| PathBuf::from(env.string(name, default));
        let json = env.string("LOG_FORMAT", "plain") == "json";
        let run_dir = path("CNI_AGENT_RUN_DIR", "/var/run/istio-cni");
        let excluded_namespaces = excluded_namespaces(env.raw("EXCLUDE_NAMESPACES").as_deref());
        let world = match env.optional("FAIRWAY_MANIFESTS") {
            Some(manifests) => World::Folder {
                manifests: manifests.into(),
                sandboxes: env.optional("FAIRWAY_SANDBOXES").map(PathBuf::from),
            },
            None => World::Kubernetes(Box::new(kubernetes(&env, &run_dir, &excluded_namespaces))),
        };
        let on_kubernetes = matches!(world, World::Kubernetes(_));
        let any = |port| SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        let admin_port = env.parse("MONITORING_PORT", 15014, "a port");
        let admin_ip: IpAddr = if on_kubernetes { any(0).ip() } else { Ipv4Addr::LOCALHOST.into() };
        let config = Self {
            node: env.required("NODE_NAME", "the name of this node"),
            zds_socket: path("ZTUNNEL_UDS_ADDRESS", "/var/run/ztunnel/ztunnel.sock"),
            run_dir,
            excluded_namespaces,
            options: Options {
                dns: env.bool("AMBIENT_DNS_CAPTURE", true),
                ipv6: env.bool("AMBIENT_IPV6", true),
                probe_v4: env.parse::<Ipv4Addr>("HOST_PROBE_SNAT_IP", model::PROBE_V4, "an IPv4 address"),
                probe_v6: env.parse::<Ipv6Addr>("HOST_PROBE_SNAT_IPV6", model::PROBE_V6, "an IPv6 address"),
                ..Options::default()
            },
            world,
            admin: env.parse("FAIRWAY_ADMIN_ADDR", SocketAddr::new(admin_ip, admin_port), "IP:PORT"),
            health: env.optional_parse("FAIRWAY_HEALTH_ADDR", "IP:PORT").or_else(|| on_kubernetes.then(|| any(8000))),
            grace: env.duration("FAIRWAY_UNENROL_GRACE", Pace::default().grace),
            log_filter: env.string("RUST_LOG", "info"),
            log_format: if json { telemetry::Format::Json } else { telemetry::Format::Plain },
        };
        env.finish().map(|()| config)
    }
}

fn kubernetes(env: &Reader<'_>, run_dir: &Path, excluded_namespaces: &[String]) -> Kubernetes {
    let host_root = PathBuf::from(env.string("FAIRWAY_HOST_ROOT", "/host"));
    let namespace = env.string("POD_NAMESPACE", "istio-system");
    let below = |name: &str, path: &str| env.optional(name).map_or_else(|| host_root.join(path), PathBuf::from);
    if !env.bool("AMBIENT_ENABLED", true) {
        env.problem("AMBIENT_ENABLED", "false", "true, or unset: this agent does nothing else");
    }
    if let Some(selector) = env.optional("AMBIENT_ENABLEMENT_SELECTOR") {
        env.problem(
            "AMBIENT_ENABLEMENT_SELECTOR",
            &selector,
            "unset: pods are chosen by istio.io/dataplane-mode alone",
        );
    }
    let new_mode = if env.bool("CNI_CONF_GROUP_READ", false) { 0o640 } else { 0o600 };
    let install = install::Settings {
        binary: env.string("FAIRWAY_CNI_BINARY", "/opt/cni/bin/fairway-cni").into(),
        bin_dir: below("MOUNTED_CNI_BIN_DIR", "opt/cni/bin"),
        net_dir: below("MOUNTED_CNI_NET_DIR", "etc/cni/net.d"),
        run_dir: run_dir.to_owned(),
        mode: mode(env),
        primary: env.optional("CNI_CONF_NAME"),
        conf_mode: new_mode,
        kubeconfig_mode: octal(env, "KUBECONFIG_MODE", 0o600),
        credentials: credentials(env),
        excluded_namespaces: excluded_namespaces.to_vec(),
        pod_namespace: namespace.clone(),
    };
    Kubernetes {
        api: ApiServer::from_env(env),
        host_proc: below("HOST_PROC", "proc"),
        install: env.bool("FAIRWAY_INSTALL", true).then_some(install),
        safe_upgrade: !env.bool("AMBIENT_DISABLE_SAFE_UPGRADE", false),
        namespace,
        daemon_set: env.string("FAIRWAY_DAEMONSET", "fairway-node"),
        taint: env.optional("FAIRWAY_TAINT"),
        patience: env.duration("FAIRWAY_UNCAPTURED_AFTER", Duration::from_secs(30)),
        host_root,
    }
}

fn mode(env: &Reader<'_>) -> Mode {
    let either = |ours: &str, upstream: &str| env.optional(ours).or_else(|| env.optional(upstream));
    let owned = env.bool("FAIRWAY_OWNED_CNI_CONFIG", env.bool("ISTIO_OWNED_CNI_CONFIG", false));
    if !env.bool("CHAINED_CNI_PLUGIN", true) {
        return Mode::Standalone { file: env.string("CNI_CONF_NAME", "YYY-fairway-cni.conf") };
    }
    if !owned {
        return Mode::Chained;
    }
    let file = either("FAIRWAY_OWNED_CNI_CONF_FILENAME", "ISTIO_OWNED_CNI_CONF_FILENAME");
    let file = file.unwrap_or_else(|| "02-fairway-cni.conflist".into());
    if !file.ends_with(".conflist") || file.contains('/') {
        env.problem("FAIRWAY_OWNED_CNI_CONF_FILENAME", &file, "a file name that ends in .conflist");
    }
    Mode::Owned { file }
}

fn credentials(env: &Reader<'_>) -> Option<Credentials> {
    Some(Credentials {
        host: env.optional("KUBERNETES_SERVICE_HOST")?,
        port: env.parse("KUBERNETES_SERVICE_PORT", 443, "a port"),
        service_account: "/var/run/secrets/kubernetes.io/serviceaccount".into(),
        ca: env.optional("KUBE_CA_FILE").map(PathBuf::from),
        skip_verify: env.bool("SKIP_TLS_VERIFY", false),
    })
}

fn octal(env: &Reader<'_>, name: &str, default: u32) -> u32 {
    let Some(value) = env.optional(name) else { return default };
    u32::from_str_radix(&value, 8).ok().filter(|mode| *mode <= 0o777).unwrap_or_else(|| {
        env.problem(name, &value, "a file mode such as 0600");
        default
    })
}

/// What EXCLUDE_NAMESPACES means, set or not.
pub fn excluded_namespaces(told: Option<&str>) -> Vec<String> {
    list(told.unwrap_or("kube-system"))
}

fn list(text: &str) -> Vec<String> {
    text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn vars(vars: &[(&str, &str)]) -> HashMap<String, String> {
        vars.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn every_problem_of_the_environment_is_named() {
        let vars = vars(&[
            ("AMBIENT_DNS_CAPTURE", "perhaps"),
            ("FAIRWAY_ADMIN_ADDR", "here"),
            ("FAIRWAY_HEALTH_ADDR", "there"),
            ("MONITORING_PORT", "99999"),
            ("HOST_PROBE_SNAT_IP", "::1"),
            ("AMBIENT_ENABLED", "false"),
            ("AMBIENT_ENABLEMENT_SELECTOR", "- podSelector: {}"),
        ]);
        let problems = Config::from_env(&vars).expect_err("problems").to_string();
        for name in [
            "NODE_NAME",
            "AMBIENT_DNS_CAPTURE",
            "FAIRWAY_ADMIN_ADDR",
            "FAIRWAY_HEALTH_ADDR",
            "MONITORING_PORT",
            "HOST_PROBE_SNAT_IP",
            "AMBIENT_ENABLED",
            "AMBIENT_ENABLEMENT_SELECTOR",
        ] {
            assert!(problems.contains(name), "{name} is missing in {problems}");
        }
    }

    #[test]
    fn a_folder_of_manifests_stands_for_kubernetes_where_it_is_given() {
        let folder = Config::from_env(&vars(&[("NODE_NAME", "n"), ("FAIRWAY_MANIFESTS", "/m")])).expect("valid");
        assert!(matches!(folder.world, World::Folder { .. }));
        assert_eq!((folder.admin.to_string().as_str(), folder.health), ("127.0.0.1:15014", None));

        let node = vars(&[("NODE_NAME", "n"), ("KUBERNETES_SERVICE_HOST", "10.96.0.1"), ("KUBECONFIG", "/k")]);
        let node = Config::from_env(&node).expect("valid");
        let World::Kubernetes(kubernetes) = node.world else { panic!("no folder was given") };
        assert_eq!(kubernetes.api, ApiServer::InCluster);
        assert_eq!(kubernetes.host_proc, PathBuf::from("/host/proc"));
        assert_eq!(node.admin.to_string(), "[::]:15014");
        assert_eq!(node.health.map(|h| h.port()), Some(8000));

        let outside = Config::from_env(&vars(&[("NODE_NAME", "n"), ("KUBECONFIG", "/k")])).expect("valid");
        let World::Kubernetes(kubernetes) = outside.world else { panic!("no folder was given") };
        assert_eq!(kubernetes.api, ApiServer::Kubeconfig("/k".into()));
    }

    #[test]
    fn the_ways_into_the_chain_have_upstreams_names() {
        let mode = |given: &[(&str, &str)]| {
            let config = Config::from_env(&vars(&[&[("NODE_NAME", "n")], given].concat())).expect("valid");
            let World::Kubernetes(kubernetes) = config.world else { panic!("no folder was given") };
            kubernetes.install.map(|install| (install.mode, install.primary, install.kubeconfig_mode))
        };
        let owned = |file: &str| Mode::Owned { file: file.into() };
        assert_eq!(mode(&[]), Some((Mode::Chained, None, 0o600)));
        assert_eq!(mode(&[("FAIRWAY_INSTALL", "false")]), None);
        let (found, ..) = mode(&[("ISTIO_OWNED_CNI_CONFIG", "true")]).expect("installs");
        assert_eq!(found, owned("02-fairway-cni.conflist"));
        let names = [("FAIRWAY_OWNED_CNI_CONFIG", "1"), ("ISTIO_OWNED_CNI_CONF_FILENAME", "00-x.conflist")];
        assert_eq!(mode(&names).expect("installs").0, owned("00-x.conflist"));
        let alone = [("CHAINED_CNI_PLUGIN", "false"), ("KUBECONFIG_MODE", "0640")];
        let standalone = Mode::Standalone { file: "YYY-fairway-cni.conf".into() };
        assert_eq!(mode(&alone), Some((standalone, None, 0o640)));
        let bad = [("NODE_NAME", "n"), ("KUBECONFIG_MODE", "rw"), ("FAIRWAY_OWNED_CNI_CONFIG", "1")];
        let bad = [&bad[..], &[("ISTIO_OWNED_CNI_CONF_FILENAME", "x.conf")]].concat();
        let problems = Config::from_env(&vars(&bad)).expect_err("problems").to_string();
        assert!(problems.contains("KUBECONFIG_MODE") && problems.contains(".conflist"), "{problems}");
    }

    #[test]
    fn lists_forgive_blanks() {
        assert_eq!(list(" a, ,b,"), ["a", "b"]);
    }
}
