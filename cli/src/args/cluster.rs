//! The grammar of what is about a cluster.

use std::time::Duration;

use clap::{Args, builder::PossibleValuesParser};

use super::Output;
use crate::{cluster::Connection, install};

/// Where the mesh is installed if nobody says otherwise.
pub(crate) const SYSTEM: &str = "istio-system";

/// Where the mesh is. What is named counts; else the cluster of KUBECONFIG; else the lab `default` if it runs; else the cluster that
/// `kubectl` would find.
#[derive(Clone, Debug, Args)]
pub(crate) struct Place {
    /// A lab of this machine; without it, and without KUBECONFIG or --context, the lab `default` where it runs.
    #[arg(long, alias = "name", value_name = "NAME", conflicts_with_all = ["kubeconfig", "context"])]
    pub(crate) lab: Option<String>,
    /// Where the mesh is installed in a cluster.
    #[arg(long, default_value = SYSTEM, value_parser = namespace)]
    pub(crate) mesh_namespace: String,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Args)]
pub(crate) struct Check {
    /// Who still talks to this namespace in clear, and would be refused if it were STRICT.
    #[arg(long, value_name = "NAMESPACE", value_parser = namespace)]
    pub(crate) strict: Option<String>,
    /// With --strict: count what happens within this time, instead of everything since the ztunnels started.
    #[arg(long = "for", value_name = "TIME", value_parser = patience, requires = "strict")]
    pub(crate) watch: Option<Duration>,
    /// Where the mesh is, or shall be.
    #[arg(short, long, default_value = SYSTEM, value_parser = namespace)]
    pub(crate) namespace: String,
    #[arg(short, long, value_enum, default_value_t)]
    pub(crate) output: Output,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Args)]
pub(crate) struct ClusterStatus {
    #[arg(short, long, default_value = SYSTEM, value_parser = namespace)]
    pub(crate) namespace: String,
    #[arg(short, long, value_enum, default_value_t)]
    pub(crate) output: Output,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Args)]
pub(crate) struct Install {
    #[command(flatten)]
    pub(crate) selection: Selection,
    /// Say what would be created, changed or deleted, and change nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Wait until every component serves; the default.
    #[arg(long, overrides_with = "no_wait")]
    // Never read: it is there to be written down, and to take a --no-wait before it back.
    wait: bool,
    /// Return as soon as everything is applied.
    #[arg(long, overrides_with = "wait")]
    pub(crate) no_wait: bool,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Args)]
pub(crate) struct Upgrade {
    #[command(flatten)]
    pub(crate) selection: Selection,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

/// What shall be there. What is not given is as it was installed, else the chart's default.
#[derive(Debug, Args)]
pub(crate) struct Selection {
    /// Where images come from.
    #[arg(long, value_name = "REGISTRY")]
    pub(crate) hub: Option<String>,
    /// Of the images.
    #[arg(long)]
    pub(crate) tag: Option<String>,
    #[arg(short, long, default_value = SYSTEM, value_parser = namespace)]
    pub(crate) namespace: String,
    /// Paths and permissions of the nodes; `auto` asks them.
    #[arg(long, default_value = "auto", value_parser = platforms())]
    pub(crate) platform: String,
    /// A value of the chart; may be given several times.
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = install::setting, help = install::settings_help())]
    pub(crate) settings: Vec<(String, String)>,
    /// How long all components together may take to become ready.
    #[arg(long, default_value = "5m", value_parser = patience)]
    pub(crate) timeout: Duration,
    /// Go on though `fairway check` finds faults.
    #[arg(long)]
    pub(crate) skip_check: bool,
    /// Make objects of the same names ours, whoever made them.
    #[arg(long)]
    pub(crate) take_over: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Uninstall {
    #[arg(short, long, default_value = SYSTEM, value_parser = namespace)]
    pub(crate) namespace: String,
    /// Do not ask.
    #[arg(short, long)]
    pub(crate) yes: bool,
    /// Remove the label istio.io/dataplane-mode=ambient from namespaces and pods.
    #[arg(long)]
    pub(crate) purge_labels: bool,
    /// Delete the definitions though there are objects of them, which go with them.
    #[arg(long)]
    pub(crate) purge_crds: bool,
    /// Keep the CA's Secret for another installation. One that fairwayd did not make stays anyway.
    #[arg(long)]
    pub(crate) keep_ca: bool,
    /// How long pods may take to end.
    #[arg(long, default_value = "5m", value_parser = patience)]
    pub(crate) timeout: Duration,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

pub(super) fn namespace(text: &str) -> Result<String, String> {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let valid =
        (1..=63).contains(&text.len()) && text.bytes().all(allowed) && !text.starts_with('-') && !text.ends_with('-');
    valid.then(|| text.to_owned()).ok_or_else(|| "expected the name of a namespace".to_owned())
}

fn platforms() -> PossibleValuesParser {
    PossibleValuesParser::new(["auto"].into_iter().chain(install::platforms()))
}

fn patience(text: &str) -> Result<Duration, String> {
    let patience: Duration = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    let allowed = Duration::from_secs(1)..=Duration::from_secs(24 * 3600);
    if allowed.contains(&patience) { Ok(patience) } else { Err("expected 1s to 24h".to_owned()) }
}
