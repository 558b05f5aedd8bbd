//! The plugin on the node: its binary, its kubeconfig and its place in the chain, put there and kept there.

use std::{
    fs,
    io::{self, BufRead},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use mesh_runtime::{
    drain::DrainWatcher,
    folder::Watch,
    readiness::{Pending, Readiness},
    whole_file,
};
use prometheus::{IntCounterVec, IntGauge};
use serde_json::{Value, json};
use tokio::task::spawn_blocking;

pub mod conflist;
mod fight;
mod folder;
pub mod kubeconfig;
pub mod plan;

use conflist::PLUGIN;
use fight::{Fight, suspect};
pub use folder::conf_files;
use kubeconfig::Credentials;
use plan::{Mode, Plan, plan};

use crate::lookup::Kubeconfig;

/// What goes where. Folders are those of the node as they are mounted here.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The plugin in our image.
    pub binary: PathBuf,
    pub bin_dir: PathBuf,
    pub net_dir: PathBuf,
    pub run_dir: PathBuf,
    pub mode: Mode,
    /// CNI_CONF_NAME
    pub primary: Option<String>,
    /// Of new configurations; those that exist keep theirs.
    pub conf_mode: u32,
    pub kubeconfig_mode: u32,
    /// None outside a cluster: then the plugin asks the agent alone.
    pub credentials: Option<Credentials>,
    pub excluded_namespaces: Vec<String>,
    /// The namespace of the agent.
    pub pod_namespace: String,
}

/// Where something went wrong; the label of the metric.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    #[error("cannot install the plugin in {0}")]
    Binary(PathBuf, #[source] io::Error),
    #[error("cannot write the plugin's kubeconfig {0}")]
    Kubeconfig(PathBuf, #[source] io::Error),
    #[error("cannot read or write the CNI configuration in {0}")]
    Configuration(PathBuf, #[source] io::Error),
}

impl InstallError {
    fn label(&self) -> &'static str {
        match self {
            Self::Binary(..) => "COPY_BINARIES_FAILURE",
            Self::Kubeconfig(..) => "CREATE_KUBECONFIG_FAILURE",
            Self::Configuration(..) => "CREATE_CNI_CONFIG_FAILURE",
        }
    }
}

/// What one look at everything came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Looked {
    InOrder,
    /// Something was put right; what.
    Mended(Vec<String>),
    /// The plugin cannot be put into the chain yet; why.
    Waiting(String),
}

const CHUNK: usize = 64 << 10;

impl Settings {
    /// Our entry in a configuration.
    pub fn entry(&self) -> Value {
        json!({
            "name": PLUGIN,
            "type": PLUGIN,
            "cni_agent_run_dir": self.run_dir,
            "exclude_namespaces": self.excluded_namespaces,
            "pod_namespace": self.pod_namespace,
        })
    }

    pub fn installed_binary(&self) -> PathBuf {
        self.bin_dir.join(PLUGIN)
    }

    pub fn kubeconfig(&self) -> PathBuf {
        Kubeconfig::path(&self.run_dir)
    }

    /// Looks at everything and puts right what is not. The chain comes last: a runtime that finds the entry must find the plugin.
    pub fn look(&self) -> Result<Looked, InstallError> {
        let mut mended = Vec::new();
        let binary = self.installed_binary();
        mended.extend(self.place_binary(&binary).map_err(|e| InstallError::Binary(binary, e))?);
        let path = self.kubeconfig();
        mended.extend(self.place_kubeconfig(&path).map_err(|e| InstallError::Kubeconfig(path, e))?);
        let failed = |error| InstallError::Configuration(self.net_dir.clone(), error);
        let files = conf_files(&self.net_dir).map_err(failed)?;
        match plan(&files, &self.mode, self.primary.as_deref(), &self.entry()) {
            Plan::InOrder => {}
            Plan::Wait(why) => return Ok(Looked::Waiting(why)),
            Plan::Write { file, text, remove, why } => {
                self.rewrite(&self.net_dir.join(file), &text).map_err(failed)?;
                remove.map(|old| whole_file::remove(&self.net_dir.join(old))).transpose().map_err(failed)?;
                mended.push(why);
            }
        }
        Ok(if mended.is_empty() { Looked::InOrder } else { Looked::Mended(mended) })
    }

    /// Puts a configuration in its place. It keeps its mode; a new one gets `conf_mode`.
    pub fn rewrite(&self, path: &Path, text: &str) -> io::Result<()> {
        let kept = fs::metadata(path).map(|found| found.permissions().mode() & 0o7777);
        whole_file::replace_synced(path, text.as_bytes(), kept.unwrap_or(self.conf_mode))
    }

    /// See [`plan::passed_over`].
    fn passed_over(&self) -> Option<String> {
        let files = conf_files(&self.net_dir).ok()?;
        plan::passed_over(&files, &self.mode, self.primary.as_deref())
    }

    fn place_binary(&self, to: &Path) -> io::Result<Option<String>> {
        let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", self.binary.display()));
        let ours = fs::File::open(&self.binary).map_err(named)?;
        if fs::File::open(to).is_ok_and(|there| same_content(ours, there).unwrap_or(false)) {
            return Ok(None);
        }
        let ours = fs::read(&self.binary).map_err(named)?;
        whole_file::sweep(to)?;
        whole_file::replace_synced(to, &ours, 0o755)?;
        Ok(Some(format!("{} was missing or another", to.display())))
    }

    fn place_kubeconfig(&self, to: &Path) -> io::Result<Option<String>> {
        let Some(credentials) = &self.credentials else { return Ok(None) };
        let text = credentials.read()?;
        if fs::read_to_string(to).is_ok_and(|there| there == text) {
            return Ok(None);
        }
        whole_file::sweep(to)?;
        whole_file::replace_synced(to, text.as_bytes(), self.kubeconfig_mode)?;
        Ok(Some("the plugin's kubeconfig was missing or had an older token".to_owned()))
    }
}

/// Without holding either in memory: this is looked at again and again.
fn same_content(a: fs::File, b: fs::File) -> io::Result<bool> {
    if a.metadata()?.len() != b.metadata()?.len() {
        return Ok(false);
    }
    let (mut a, mut b) = (io::BufReader::with_capacity(CHUNK, a), io::BufReader::with_capacity(CHUNK, b));
    loop {
        let (left, right) = (a.fill_buf()?, b.fill_buf()?);
        let length = left.len().min(right.len());
        if left[..length] != right[..length] {
            return Ok(false);
        }
        if length == 0 {
            return Ok(left.len() == right.len());
        }
        a.consume(length);
        b.consume(length);
    }
}

/// After a change the folders must have been quiet for this long.
const QUIET: Duration = Duration::from_millis(50);
const RETRY: Duration = Duration::from_secs(2);

/// Keeps the plugin installed until the drain starts. Not ready before it is, nor while it is put right.
pub async fn run(
    settings: Settings,
    readiness: Readiness,
    installs: IntCounterVec,
    ready: IntGauge,
    drain: DrainWatcher,
) {
    let mut pending = Some(readiness.pending("installation of the CNI plugin"));
    let mut watches = watch(&settings);
    let mut fight = Fight::default();
    let (mut waiting_for, mut told) = (String::new(), None);
    loop {
        let now = settings.clone();
        let looked = spawn_blocking(move || (now.look(), now.passed_over())).await;
        let looked = looked.map(|(looked, passed_over)| {
            if let Some(what) = passed_over.as_ref().filter(|_| passed_over != told) {
                tracing::warn!(what, "files that are no CNI configurations come before the one with the plugin");
            }
            told = passed_over;
            looked
        });
        let delay = match looked {
            Ok(Ok(Looked::InOrder)) => {
                settle(&mut pending, &ready);
                None
            }
            Ok(Ok(Looked::Mended(what))) => {
                installs.with_label_values(&["SUCCESS"]).inc();
                tracing::info!(what = what.join("; "), "the plugin is installed");
                settle(&mut pending, &ready);
                fight.mended(Instant::now()).inspect(|delay| {
                    let suspect = suspect(&conf_files(&settings.net_dir).unwrap_or_default());
                    tracing::warn!(?delay, "somebody keeps undoing the installation of the plugin: {suspect}");
                })
            }
            Ok(Ok(Looked::Waiting(why))) => {
                unsettle(&mut pending, &readiness, &ready);
                if why != waiting_for {
                    tracing::warn!(why, "the plugin cannot be put into the chain yet");
                    waiting_for = why;
                }
                None
            }
            Ok(Err(error)) => {
                unsettle(&mut pending, &readiness, &ready);
                installs.with_label_values(&[error.label()]).inc();
                tracing::warn!(error = mesh_runtime::telemetry::error_chain(&error), "will be repeated");
                Some(RETRY)
            }
            Err(error) => {
                unsettle(&mut pending, &readiness, &ready);
                tracing::error!(%error, "the installation failed in an unforeseen way");
                Some(RETRY)
            }
        };
        if watches.iter().any(|watch| !watch.is_notified()) {
            watches = watch(&settings);
        }
        tokio::select! {
            _ = drain.signalled() => return,
            () = next(delay, &mut watches) => {}
        }
    }
}

async fn next(delay: Option<Duration>, watches: &mut [Watch]) {
    match delay {
        Some(delay) => tokio::time::sleep(delay).await,
        None => {
            let changed = watches.iter_mut().map(|watch| Box::pin(watch.changed()));
            futures_util::future::select_all(changed).await;
        }
    }
}

fn watch(settings: &Settings) -> Vec<Watch> {
    let tokens = settings.credentials.iter().map(|c| c.service_account.as_path());
    [settings.bin_dir.as_path(), &settings.net_dir].into_iter().chain(tokens).map(|f| Watch::new(f, QUIET)).collect()
}

fn settle(pending: &mut Option<Pending>, ready: &IntGauge) {
    drop(pending.take());
    ready.set(1);
}

fn unsettle(pending: &mut Option<Pending>, readiness: &Readiness, ready: &IntGauge) {
    pending.get_or_insert_with(|| readiness.pending("installation of the CNI plugin"));
    ready.set(0);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(dir: &Path) -> Settings {
        for folder in ["image", "bin", "net.d", "run", "account"] {
            fs::create_dir_all(dir.join(folder)).expect("mkdir");
        }
        fs::write(dir.join("image/fairway-cni"), "program").expect("write");
        fs::write(dir.join("account/token"), "one").expect("write");
        fs::write(dir.join("account/ca.crt"), "ca").expect("write");
        Settings {
            binary: dir.join("image/fairway-cni"),
            bin_dir: dir.join("bin"),
            net_dir: dir.join("net.d"),
            run_dir: dir.join("run"),
            mode: Mode::Chained,
            primary: None,
            conf_mode: 0o600,
            kubeconfig_mode: 0o600,
            credentials: Some(Credentials {
                host: "10.96.0.1".into(),
                port: 443,
                service_account: dir.join("account"),
                ca: None,
                skip_verify: false,
            }),
            excluded_namespaces: vec!["kube-system".into()],
            pod_namespace: "istio-system".into(),
        }
    }

    const BRIDGE: &str = r#"{"name":"n","cniVersion":"1.0.0","plugins":[{"type":"bridge"}]}"#;

    #[test]
    fn a_configuration_keeps_its_mode_and_a_new_one_gets_ours() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (settings, path) = (settings(dir.path()), dir.path().join("net.d/10-a.conflist"));
        let mode = || fs::metadata(&path).expect("stat").permissions().mode() & 0o7777;
        settings.rewrite(&path, "one").expect("new");
        assert_eq!(mode(), 0o600);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("chmod");
        settings.rewrite(&path, "two").expect("again");
        assert_eq!((fs::read_to_string(&path).expect("read").as_str(), mode()), ("two", 0o644));
    }

    #[test]
    fn whatever_is_missing_or_changed_is_put_right() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let settings = settings(dir.path());
        assert!(matches!(settings.look().expect("readable"), Looked::Waiting(_)));
        assert!(settings.installed_binary().exists() && settings.kubeconfig().exists(), "these need no primary");
        let conf = dir.path().join("net.d/10-a.conflist");
        fs::write(&conf, BRIDGE).expect("write");
        assert!(matches!(settings.look().expect("written"), Looked::Mended(what) if what.len() == 1));
        assert_eq!(settings.look().expect("readable"), Looked::InOrder);
        let mode = |path: &Path| fs::metadata(path).expect("stat").permissions().mode() & 0o7777;
        assert_eq!((mode(&settings.kubeconfig()), mode(&settings.installed_binary())), (0o600, 0o755));

        type Harm = fn(&Path);
        let harms: [Harm; 5] = [
            |dir| fs::write(dir.join("net.d/10-a.conflist"), BRIDGE).expect("overwritten"),
            |dir| fs::write(dir.join("net.d/05-new.conflist"), BRIDGE).expect("pre-empted"),
            |dir| fs::remove_file(dir.join("bin/fairway-cni")).expect("removed"),
            |dir| fs::write(dir.join("account/token"), "two").expect("rotated"),
            |dir| fs::write(Kubeconfig::path(&dir.join("run")), "").expect("emptied"),
        ];
        for harm in harms {
            harm(dir.path());
            assert!(matches!(settings.look().expect("written"), Looked::Mended(_)));
            assert_eq!(settings.look().expect("readable"), Looked::InOrder);
        }
        assert!(fs::read_to_string(settings.kubeconfig()).expect("read").contains("two"));
    }

    #[test]
    fn a_file_that_only_a_runtime_could_use_is_waited_for_and_one_that_none_can_is_told() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let settings = settings(dir.path());
        fs::write(dir.path().join("net.d/10-a.conflist"), BRIDGE).expect("write");
        settings.look().expect("written");
        let first = dir.path().join("net.d/05-first.conflist");
        let large = vec![b' '; usize::try_from(folder::MAX_CONF).expect("small") + 1];
        let latin = [&b"{\"name\":\"\xe4\","[..], &BRIDGE.as_bytes()[1..]].concat();
        for (content, why) in [(large, "more than 2097152 bytes"), (latin, "no text")] {
            fs::write(&first, content).expect("write");
            let Looked::Waiting(told) = settings.look().expect("readable") else { panic!("waits") };
            assert!(told.starts_with("05-first.conflist") && told.contains(why), "{told}");
        }
        fs::write(&first, "{").expect("write");
        assert_eq!(settings.look().expect("readable"), Looked::InOrder);
        assert!(settings.passed_over().is_some_and(|told| told.starts_with("05-first.conflist")));
        fs::remove_file(&first).expect("remove");
        assert_eq!(settings.passed_over(), None);
    }

    #[test]
    fn what_cannot_be_done_is_told_apart() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let settings = settings(dir.path());
        fs::remove_dir(dir.path().join("net.d")).expect("rmdir");
        assert_eq!(settings.look().expect_err("no folder").label(), "CREATE_CNI_CONFIG_FAILURE");
        fs::remove_file(dir.path().join("account/token")).expect("remove");
        assert_eq!(settings.look().expect_err("no token").label(), "CREATE_KUBECONFIG_FAILURE");
        fs::remove_file(dir.path().join("image/fairway-cni")).expect("remove");
        assert_eq!(settings.look().expect_err("no binary").label(), "COPY_BINARIES_FAILURE");
    }
}
