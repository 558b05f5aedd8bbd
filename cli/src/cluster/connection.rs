//! Which cluster is meant, in `kubectl`'s order.

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use clap::Args;
use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};

use super::Cluster;

const SERVICE_HOST: &str = "KUBERNETES_SERVICE_HOST";

/// The flags that say which cluster.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Cluster")]
pub(crate) struct Connection {
    /// The kubeconfig; without it KUBECONFIG (a list), ~/.kube/config, the service account of this container, in this order.
    #[arg(long, value_name = "FILE")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// Another context of the kubeconfig than its current one.
    #[arg(long, value_name = "NAME")]
    pub(crate) context: Option<String>,
}

/// Whether the user's environment names a cluster.
pub(crate) fn is_configured() -> bool {
    env::var_os("KUBECONFIG").is_some_and(|list| !list.is_empty())
}

impl Connection {
    /// Said on the command line, rather than found.
    pub(crate) fn is_given(&self) -> bool {
        self.kubeconfig.is_some() || self.context.is_some()
    }

    /// Reads the configuration; nothing is sent yet.
    pub(crate) async fn open(&self) -> anyhow::Result<Cluster> {
        let (mut config, by) = match self.kubeconfig()? {
            Some((kubeconfig, files)) => {
                let context = self.context.clone().or_else(|| kubeconfig.current_context.clone());
                let context = context.filter(|name| !name.is_empty());
                let by =
                    context.with_context(|| format!("{files} has no current context: choose one with --context"))?;
                let options = KubeConfigOptions { context: Some(by.clone()), ..KubeConfigOptions::default() };
                let read = Config::from_custom_kubeconfig(kubeconfig, &options).await;
                (read.with_context(|| format!("context `{by}` of {files} cannot be used"))?, format!("context {by}"))
            }
            None => {
                anyhow::ensure!(self.context.is_none(), "there is no kubeconfig that --context could choose from");
                let read = Config::incluster().context("the service account of this container cannot be used")?;
                (read, "this container's service account".to_owned())
            }
        };
        // Ours has a deadline over all attempts; a rollout is looked at again anyway.
        config.default_retry = false;
        let server = format!("{} ({by})", config.cluster_url.to_string().trim_end_matches('/'));
        let namespace = config.default_namespace.clone();
        let client = Client::try_from(config).with_context(|| format!("cannot make a client of {server}"))?;
        Ok(Cluster { client, server, namespace })
    }

    /// With the names of the files; `None` in a container of a cluster.
    fn kubeconfig(&self) -> anyhow::Result<Option<(Kubeconfig, String)>> {
        let files = files(self.kubeconfig.as_deref(), |name| env::var_os(name).map(PathBuf::from));
        let shown = files.iter().map(|file| file.display().to_string()).collect::<Vec<_>>().join(", ");
        let mut whole: Option<Kubeconfig> = None;
        for file in &files {
            // In a list, as for `kubectl`, a file that is not there counts for nothing.
            if self.kubeconfig.is_none() && !file.exists() {
                continue;
            }
            let read = Kubeconfig::read_from(file).with_context(|| format!("{} cannot be read", file.display()))?;
            whole = Some(match whole {
                None => read,
                Some(first) => {
                    first.merge(read).with_context(|| format!("{} does not fit the others", file.display()))?
                }
            });
        }
        match whole {
            Some(kubeconfig) => Ok(Some((kubeconfig, shown))),
            None if env::var_os(SERVICE_HOST).is_some() => Ok(None),
            None => bail!(
                "no cluster is configured: there is no {shown}; name a kubeconfig with --kubeconfig or KUBECONFIG"
            ),
        }
    }
}

fn files(flag: Option<&Path>, variable: impl Fn(&str) -> Option<PathBuf>) -> Vec<PathBuf> {
    if let Some(file) = flag {
        return vec![file.to_owned()];
    }
    let listed = variable("KUBECONFIG").unwrap_or_default();
    let listed: Vec<PathBuf> = env::split_paths(&listed).filter(|file| !file.as_os_str().is_empty()).collect();
    if listed.is_empty() { vec![variable("HOME").unwrap_or_default().join(".kube/config")] } else { listed }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flag_goes_before_the_list_and_the_list_before_home() {
        let environment =
            |list: &'static str| move |name: &str| Some(PathBuf::from(if name == "HOME" { "/home/u" } else { list }));
        let read = |flag: Option<&str>, list| files(flag.map(Path::new), environment(list));
        assert_eq!(read(Some("/f"), "/a:/b"), [PathBuf::from("/f")]);
        assert_eq!(read(None, "/a::/b"), [PathBuf::from("/a"), PathBuf::from("/b")]);
        assert_eq!(read(None, ""), [PathBuf::from("/home/u/.kube/config")]);
    }

    const CONFIG: &str = "apiVersion: v1\nkind: Config\ncurrent-context: NAME\nclusters:\n- {name: NAME, cluster: {server: 'http://127.0.0.1:1/NAME'}}\n\
        users:\n- {name: NAME, user: {}}\ncontexts:\n- {name: NAME, context: {cluster: NAME, user: NAME, namespace: in-NAME}}\n";

    #[tokio::test]
    async fn a_context_is_chosen_by_name_and_a_wrong_one_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("config");
        std::fs::write(&file, CONFIG.replace("NAME", "one")).unwrap();
        let of =
            |context: Option<&str>| Connection { kubeconfig: Some(file.clone()), context: context.map(str::to_owned) };
        let cluster = of(None).open().await.unwrap();
        assert_eq!(
            (cluster.server.as_str(), cluster.namespace.as_str()),
            ("http://127.0.0.1:1/one (context one)", "in-one")
        );
        let error = of(Some("two")).open().await.unwrap_err();
        assert!(format!("{error:#}").contains("context `two`"), "{error:#}");
    }
}
