//! `fairwayd run|token|ca|check|definitions`.

use std::{
    ffi::OsString,
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, SystemTime},
};

use clap::{Args, Parser, Subcommand};
use mesh_runtime::{
    env::parse_duration,
    signal::Shutdown,
    telemetry::{self, Format, error_chain},
};

use crate::{
    apiserver,
    app::{self, Config, Source},
    crd,
    index::ClusterIndex,
    keeper::{self, rotate::Step},
    source::Folder,
    token::{Subject, TokenKey},
};

/// The mesh's control plane: manifests to discovery, and the workload CA.
#[derive(Debug, Parser)]
#[command(name = "fairwayd", version, max_term_width = 120)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve discovery and certificates, for a Kubernetes cluster or a folder of manifests.
    Run(Run),
    /// Print a token for a node's proxy, of a folder of manifests.
    Token(Token),
    /// Look after the CA of a Kubernetes cluster.
    #[command(subcommand)]
    Ca(Ca),
    /// Validate manifests: prints each problem with its place and remedy, and exits 1 if there is any.
    Check(Check),
    /// Print the CustomResourceDefinitions of the kinds that users write.
    Definitions,
}

#[derive(Debug, Args)]
struct Run {
    /// Watch the API server: that of the cluster this runs in, else that of the kubeconfig.
    #[arg(long)]
    kubernetes: bool,
    /// Folder of Kubernetes manifests, watched, with its subfolders.
    #[arg(long, env = "FAIRWAY_MANIFESTS", value_name = "DIR")]
    manifests: Option<PathBuf>,
    /// Folder of keys and certificates; made when missing, and worth keeping. With --manifests only.
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Where a CA may be mounted: Istio's cacerts, or a Secret of cert-manager. Without one it is kept in Secret istio-ca-secret. With
    /// --kubernetes only.
    #[arg(long, value_name = "DIR", default_value = keeper::folder::MOUNT)]
    ca_folder: PathBuf,
    /// Where this runs; also the root namespace, whose policies apply to the whole mesh.
    #[arg(long, value_name = "NAMESPACE", default_value = app::NAMESPACE)]
    namespace: String,
    /// The cluster's name in the names of workloads.
    #[arg(long, value_name = "ID", default_value = "Kubernetes")]
    cluster_id: String,
    /// The last part of the names of services.
    #[arg(long, value_name = "DOMAIN", default_value = "cluster.local")]
    cluster_domain: String,
    /// Configuration labelled istio.io/rev with another name is left to others.
    #[arg(long, value_name = "NAME", default_value = "default")]
    revision: String,
    /// Where to serve discovery and certificates.
    #[arg(long, value_name = "IP:PORT", default_value = "0.0.0.0:15012")]
    listen: SocketAddr,
    /// Where to serve readiness, metrics and debugging pages.
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:15014")]
    admin: SocketAddr,
    /// Where the API server may ask whether objects of the mesh are right before it takes them: ValidatingWebhookConfiguration
    /// fairway-NAMESPACE, whose caBundle is kept right. With --kubernetes only; off unless given.
    #[arg(long, value_name = "IP:PORT")]
    webhook: Option<SocketAddr>,
    #[arg(long, value_name = "DOMAIN", default_value = mesh_core::identity::DEFAULT_TRUST_DOMAIN)]
    trust_domain: String,
    /// Default and longest life of workload certificates.
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = duration)]
    workload_cert_ttl: Duration,
    /// A further name or address this server is reached by; may be repeated.
    #[arg(long = "server-name", value_name = "NAME")]
    server_names: Vec<String>,
    /// A service account whose tokens may ask for the identities of pods on their node; may be repeated. ztunnel's, where this runs,
    /// unless said otherwise.
    #[arg(long = "trusted-account", value_name = "NAMESPACE/NAME", value_parser = account)]
    trusted_accounts: Vec<(String, String)>,
    /// Workloads that use a waypoint, or are behind a service that does, accept connections from that waypoint only.
    #[arg(long)]
    default_allow_from_waypoint: bool,
}

#[derive(Debug, Args)]
struct Token {
    /// The state folder of the server that shall accept the token.
    #[arg(long, value_name = "DIR")]
    state: PathBuf,
    /// The node the token speaks for.
    #[arg(long)]
    node: String,
    #[arg(long, default_value = "istio-system")]
    namespace: String,
    #[arg(long, default_value = "ztunnel")]
    service_account: String,
    #[arg(long, default_value = "")]
    pod: String,
    #[arg(long, default_value = "")]
    pod_uid: String,
    #[arg(long, value_name = "DURATION", default_value = "12h", value_parser = duration)]
    ttl: Duration,
}

#[derive(Debug, Subcommand)]
enum Ca {
    /// Replace the CA in Secret istio-ca-secret, root included, without an outage: prepare, switch, finish.
    Rotate(Rotate),
}

#[derive(Debug, Args)]
struct Rotate {
    /// The next step; one that does not come next is refused.
    #[arg(long)]
    step: Step,
    /// Where the control plane runs.
    #[arg(long, value_name = "NAMESPACE", default_value = app::NAMESPACE)]
    namespace: String,
    /// Where a CA may be mounted, as the control plane has it: such a one comes before the Secret, and is not rotated here.
    #[arg(long, value_name = "DIR", default_value = keeper::folder::MOUNT)]
    ca_folder: PathBuf,
}

#[derive(Debug, Args)]
struct Check {
    #[arg(long, env = "FAIRWAY_MANIFESTS", value_name = "DIR")]
    manifests: PathBuf,
}

fn duration(text: &str) -> Result<Duration, String> {
    parse_duration(text).filter(|d| !d.is_zero()).ok_or_else(|| "expected a duration like 90s, 15m or 24h".to_owned())
}

fn account(text: &str) -> Result<(String, String), String> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => Ok((namespace.into(), name.into())),
        _ => Err("expected NAMESPACE/NAME".to_owned()),
    }
}

/// Runs the program with `args`, its own name left out.
pub fn main(args: Vec<OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(std::iter::once(OsString::from("fairwayd")).chain(args)) {
        Ok(cli) => cli,
        Err(error) => {
            // Printing help to a closed pipe is not worth an error.
            drop(error.print());
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let outcome = match cli.command {
        Command::Run(run) => self::run(run),
        Command::Token(token) => self::token(token),
        Command::Ca(Ca::Rotate(rotate)) => self::rotate(rotate),
        Command::Check(check) => return self::check(check),
        Command::Definitions => definitions(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fairwayd: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(run: Run) -> Result<(), String> {
    let var = |name: &str| std::env::var(name).unwrap_or_default();
    let filter = Some(var("RUST_LOG")).filter(|filter| !filter.is_empty()).unwrap_or_else(|| "info".to_owned());
    let format = if var("LOG_FORMAT") == "json" { Format::Json } else { Format::Plain };
    telemetry::init(&filter, format).map_err(|error| format!("RUST_LOG={filter}: {error}"))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|error| format!("cannot start: {error}"))?;
    runtime.block_on(async {
        let config = config(run).await?;
        serve(config).await
    })
}

async fn config(run: Run) -> Result<Config, String> {
    let source = source(run.kubernetes, run.manifests, run.state)?;
    let source = match source {
        Chosen::Folder { .. } if run.webhook.is_some() => {
            return Err(
                "--webhook goes with --kubernetes only: nobody asks before a manifest is written; use `fairwayd check`"
                    .to_owned(),
            );
        }
        Chosen::Folder { manifests, state } => Source::Folder { manifests, state },
        Chosen::Kubernetes => {
            let config = apiserver::configuration().await.map_err(|error| error_chain(&error))?;
            let (api_server, ca_folder) = (Box::new(config), run.ca_folder);
            Source::Kubernetes { api_server, ca_folder, identity: identity() }
        }
    };
    let mut trusted_accounts = run.trusted_accounts;
    if trusted_accounts.is_empty() {
        trusted_accounts.push((run.namespace.clone(), "ztunnel".to_owned()));
    }
    Ok(Config {
        source,
        namespace: run.namespace,
        cluster_id: run.cluster_id,
        cluster_domain: run.cluster_domain,
        revision: run.revision,
        listen: run.listen,
        admin: run.admin,
        webhook: run.webhook,
        trust_domain: run.trust_domain,
        workload_cert_ttl: run.workload_cert_ttl,
        server_names: run.server_names,
        trusted_accounts,
        default_allow_from_waypoint: run.default_allow_from_waypoint,
    })
}

/// Of this replica: its pod's name, which is its host's where nobody says otherwise.
fn identity() -> String {
    let told = std::env::var("POD_NAME").ok().filter(|name| !name.is_empty());
    let host = || std::fs::read_to_string("/proc/sys/kernel/hostname").map(|name| name.trim().to_owned());
    told.or_else(|| host().ok()).filter(|name| !name.is_empty()).unwrap_or_else(|| "fairwayd".to_owned())
}

#[derive(Debug, PartialEq, Eq)]
enum Chosen {
    Folder { manifests: PathBuf, state: PathBuf },
    Kubernetes,
}

/// Exactly one source: of two, nobody could tell which is in force.
fn source(kubernetes: bool, manifests: Option<PathBuf>, state: Option<PathBuf>) -> Result<Chosen, String> {
    let told = match (kubernetes, manifests, state) {
        (true, None, None) => return Ok(Chosen::Kubernetes),
        (false, Some(manifests), Some(state)) => return Ok(Chosen::Folder { manifests, state }),
        (true, Some(_), _) => {
            "--kubernetes and --manifests (or FAIRWAY_MANIFESTS) exclude each other: give one of them"
        }
        (true, None, Some(_)) => "--state goes with --manifests only: on Kubernetes keys are kept in a Secret",
        (false, Some(_), None) => "--manifests needs --state, a folder for keys and certificates",
        (false, None, _) => "no source is given: use --kubernetes, or --manifests DIR --state DIR",
    };
    Err(told.to_owned())
}

async fn serve(config: Config) -> Result<(), String> {
    let mut shutdown = Shutdown::new().map_err(|error| format!("cannot catch signals: {error}"))?;
    let started = tokio::select! {
        started = app::start(config) => started,
        signal = shutdown.recv() => {
            tracing::info!(signal, "stopping before the start was complete");
            return Ok(());
        }
    };
    let mut running = started.map_err(|error| error_chain(&error))?;
    let outcome = tokio::select! {
        signal = shutdown.recv() => {
            tracing::info!(signal, "stopping");
            Ok(())
        }
        error = running.failed() => Err(error_chain(&error)),
    };
    running.stop().await;
    outcome
}

fn token(token: Token) -> Result<(), String> {
    let Token { state, node, namespace, service_account, pod, pod_uid, ttl } = token;
    let subject = Subject { node, namespace, service_account, pod, pod_uid };
    let issued = TokenKey::open(&state).and_then(|key| key.issue(&subject, ttl, SystemTime::now()));
    println!("{}", issued.map_err(|error| error_chain(&error))?);
    Ok(())
}

fn rotate(rotate: Rotate) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| format!("cannot start: {error}"))?;
    let Rotate { step, namespace, ca_folder } = rotate;
    let told = runtime.block_on(async {
        let config = apiserver::configuration().await.map_err(|error| error_chain(&error))?;
        let client = kube::Client::try_from(config).map_err(|error| error_chain(&error))?;
        let secrets = kube::Api::namespaced(client, &namespace);
        keeper::rotate::rotate(&secrets, &namespace, step, &ca_folder).await.map_err(|error| error_chain(&error))
    });
    println!("{}", told?);
    Ok(())
}

fn definitions() -> Result<(), String> {
    for definition in crd::definitions() {
        let text = serde_saphyr::to_string(&definition).map_err(|error| error_chain(&error))?;
        print!("---\n{text}");
    }
    Ok(())
}

fn check(check: Check) -> ExitCode {
    let unused = SocketAddr::from(([127, 0, 0, 1], 0));
    let source = Source::Folder { manifests: check.manifests.clone(), state: PathBuf::new() };
    let config = Config::new(source, unused, unused);
    let mut folder = Folder::new(check.manifests, config.object_settings());
    let changes = folder.scan();
    let objects = changes.len();
    let mut index = ClusterIndex::new(config.index_settings());
    index.apply(changes);
    let mut problems = folder.problems();
    problems.extend(index.problems().cloned());
    problems.sort();
    for problem in &problems {
        println!("{problem}");
    }
    match problems.len() {
        0 => {
            println!("{objects} objects, no problems");
            ExitCode::SUCCESS
        }
        count => {
            eprintln!("fairwayd: {count} {} found", if count == 1 { "problem" } else { "problems" });
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_one_source_is_chosen() {
        let some = || Some(PathBuf::from("x"));
        let folder = Chosen::Folder { manifests: "x".into(), state: "x".into() };
        let table = [
            (true, None, None, Ok(Chosen::Kubernetes)),
            (false, some(), some(), Ok(folder)),
            (true, some(), None, Err("exclude each other")),
            (true, some(), some(), Err("exclude each other")),
            (true, None, some(), Err("--state goes with --manifests only")),
            (false, some(), None, Err("--manifests needs --state")),
            (false, None, some(), Err("no source is given")),
            (false, None, None, Err("no source is given")),
        ];
        for (kubernetes, manifests, state, expected) in table {
            let chosen = source(kubernetes, manifests, state);
            match (&chosen, &expected) {
                (Ok(chosen), Ok(expected)) => assert_eq!(chosen, expected),
                (Err(told), Err(part)) => assert!(told.contains(part), "{told}"),
                _ => panic!("{chosen:?} instead of {expected:?}"),
            }
        }
    }

    #[tokio::test]
    async fn a_webhook_is_for_a_cluster() {
        let words = ["fairwayd", "run", "--manifests", "x", "--state", "x", "--webhook", "127.0.0.1:1"];
        let Command::Run(run) = Cli::try_parse_from(words).unwrap().command else { panic!() };
        let told = config(run).await.unwrap_err();
        assert!(told.contains("--webhook goes with --kubernetes only"), "{told}");
    }
}
