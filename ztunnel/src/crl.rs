//! The file of revocation lists: read at the start, and again whenever it or a folder it is reached through changes.
//!
//! It fails open, as upstream does: a file that is missing or damaged changes nothing, which log and metric say. A set of lists is
//! replaced whole.

use std::{
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_identity::{
    Trust,
    crl::{CrlError, Crls, MAX_FILE},
};
use mesh_runtime::{drain::DrainWatcher, folder::Watch};
use prometheus::IntCounterVec;

/// Between the changes of one update.
const QUIET: Duration = Duration::from_millis(100);

/// See the module.
pub(crate) struct RevocationLists {
    path: PathBuf,
    trust: Arc<Trust>,
    loads: IntCounterVec,
    seen: Seen,
}

/// What the file was when it was last looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Nothing,
    Missing,
    File { device: u64, inode: u64, modified: (i64, i64), length: u64 },
}

#[derive(Debug, thiserror::Error)]
enum LoadError {
    #[error("it cannot be read: {0}")]
    Read(#[from] io::Error),
    #[error(transparent)]
    Parse(#[from] CrlError),
}

impl RevocationLists {
    pub(crate) fn new(path: PathBuf, trust: Arc<Trust>, loads: IntCounterVec) -> Self {
        Self { path, trust, loads, seen: Seen::Nothing }
    }

    /// Reads the file, unless it is the one that was read last.
    pub(crate) async fn load(&mut self) {
        let seen = look(&self.path);
        if seen == std::mem::replace(&mut self.seen, seen) {
            return;
        }
        let path = self.path.clone();
        // Lists may be long.
        let loaded = tokio::task::spawn_blocking(move || read(&path)).await;
        let loaded = loaded.unwrap_or_else(|panic| Err(io::Error::other(panic).into()));
        let shown = self.path.display();
        let result = match loaded {
            Ok(crls) => {
                tracing::info!(path = %shown, lists = crls.len(), "revocation lists loaded");
                for issuer in crls.overdue(SystemTime::now()) {
                    tracing::warn!(path = %shown, issuer, "a revocation list is past its next update; it still counts");
                }
                self.trust.set_crls(crls);
                "ok"
            }
            Err(LoadError::Read(error)) if error.kind() == io::ErrorKind::NotFound => {
                tracing::warn!(path = %shown, lists = self.trust.crls().len(), "CRL_PATH does not exist; waiting for it");
                "missing"
            }
            Err(error) => {
                let kept = self.trust.crls().len();
                tracing::warn!(path = %shown, %error, kept, "revocation lists not loaded; expected PEM or one list in DER");
                "failed"
            }
        };
        self.loads.with_label_values(&[result]).inc();
    }

    /// Follows the file until the drain begins to stop services.
    pub(crate) async fn follow(mut self, drain: DrainWatcher) {
        let folder =
            self.path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
        let folder = folder.to_owned();
        let mut watch = Watch::new(&folder, QUIET);
        let signalled = drain.signalled();
        tokio::pin!(signalled);
        loop {
            // A change between the first look and the watch.
            self.load().await;
            tokio::select! {
                () = watch.changed() => {}
                _ = &mut signalled => return,
            }
            if !watch.is_notified() && folder.exists() {
                watch = Watch::new(&folder, QUIET);
            }
        }
    }
}

fn look(path: &Path) -> Seen {
    match std::fs::metadata(path) {
        Ok(file) => Seen::File {
            device: file.dev(),
            inode: file.ino(),
            modified: (file.mtime(), file.mtime_nsec()),
            length: file.len(),
        },
        Err(_) => Seen::Missing,
    }
}

fn read(path: &Path) -> Result<Crls, LoadError> {
    let found = std::fs::metadata(path)?;
    if !found.is_file() {
        // Others may never end, or never begin.
        return Err(io::Error::other("expected a regular file").into());
    }
    let length = usize::try_from(found.len()).unwrap_or(usize::MAX);
    if length > MAX_FILE {
        return Err(CrlError::TooLong(length).into());
    }
    Ok(Crls::parse(&std::fs::read(path)?)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use mesh_runtime::drain;
    use prometheus::Opts;
    use rcgen::{
        BasicConstraints, CertificateParams, CertificateRevocationListParams, IsCa, Issuer, KeyIdMethod, KeyPair,
        KeyUsagePurpose, SerialNumber, date_time_ymd,
    };

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    /// So many lists, of which nobody is on any.
    fn lists(count: usize) -> String {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::CrlSign];
        let issuer = Issuer::new(params, key);
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2025, 1, 1),
            next_update: date_time_ymd(2025, 2, 1),
            crl_number: SerialNumber::from(1_u64),
            issuing_distribution_point: None,
            revoked_certs: Vec::new(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&issuer).unwrap().pem().unwrap().repeat(count)
    }

    fn watched(path: PathBuf) -> (RevocationLists, Arc<Trust>, IntCounterVec) {
        let trust = Arc::new(Trust::default());
        let loads = IntCounterVec::new(Opts::new("loads", "help"), &["result"]).unwrap();
        (RevocationLists::new(path, trust.clone(), loads.clone()), trust, loads)
    }

    #[tokio::test]
    async fn a_file_that_is_missing_or_damaged_changes_nothing_and_is_counted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca-crl.pem");
        let (mut followed, trust, loads) = watched(path.clone());
        followed.load().await;
        followed.load().await;
        assert_eq!((trust.crls().len(), loads.with_label_values(&["missing"]).get()), (0, 1));
        std::fs::write(&path, lists(2)).unwrap();
        followed.load().await;
        assert_eq!((trust.crls().len(), loads.with_label_values(&["ok"]).get()), (2, 1));
        std::fs::write(&path, "nonsense").unwrap();
        followed.load().await;
        assert_eq!((trust.crls().len(), loads.with_label_values(&["failed"]).get()), (2, 1));
        std::fs::remove_file(&path).unwrap();
        followed.load().await;
        assert_eq!((trust.crls().len(), loads.with_label_values(&["missing"]).get()), (2, 2));
    }

    /// As kubelet does: the file is a link through `..data`, which is what changes.
    #[tokio::test]
    async fn a_swapped_link_on_the_way_to_the_file_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let put = |version: &str, count| {
            std::fs::create_dir(dir.path().join(version)).unwrap();
            std::fs::write(dir.path().join(version).join("ca-crl.pem"), lists(count)).unwrap();
            symlink(version, dir.path().join("..new")).unwrap();
            std::fs::rename(dir.path().join("..new"), dir.path().join("..data")).unwrap();
        };
        put("..1", 1);
        symlink("..data/ca-crl.pem", dir.path().join("ca-crl.pem")).unwrap();
        let (followed, trust, _) = watched(dir.path().join("ca-crl.pem"));
        let mut changes = trust.changes();
        let (stop, watcher) = drain::channel();
        let task = tokio::spawn(followed.follow(watcher));
        for count in [1, 2] {
            if count == 2 {
                put("..2", 2);
            }
            tokio::time::timeout(PATIENCE, changes.changed()).await.expect("followed").unwrap();
            assert_eq!(trust.crls().len(), count);
        }
        stop.drain(PATIENCE).await;
        task.await.unwrap();
    }
}
