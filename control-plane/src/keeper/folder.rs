//! The CA in a mounted folder: Secret `cacerts`, by the names of Istio or of cert-manager.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_identity::authority::SigningAuthority;
use mesh_runtime::{drain::DrainWatcher, folder::Watch};
use tokio::task::JoinError;

use super::{Keeper, KeeperError, LAYOUTS};
use crate::app::TaskFailed;

/// Where the chart mounts it.
pub(crate) const MOUNT: &str = "/etc/cacerts";
/// A mount is replaced by one link; some write file by file.
const QUIET: Duration = Duration::from_millis(100);
/// Longer files hold no keys or certificates.
const MAX_BYTES: u64 = 1024 * 1024;

/// Whether a CA is mounted there. An optional mount is there, but empty.
pub(crate) fn is_mounted(folder: &Path) -> bool {
    LAYOUTS.iter().any(|[_, key, _]| folder.join(key).exists())
}

/// What the folder holds. Blocks.
pub(crate) fn authority(folder: &Path, now: SystemTime) -> Result<SigningAuthority, KeeperError> {
    let part = |name: &str| {
        let path = folder.join(name);
        let short = fs::metadata(&path).is_ok_and(|meta| meta.len() <= MAX_BYTES);
        short.then(|| fs::read_to_string(&path).ok())?
    };
    super::authority(part, now)
}

/// Follows the folder until the drain.
pub(crate) async fn follow(keeper: Arc<Keeper>, folder: PathBuf, drain: DrainWatcher) -> Result<(), TaskFailed> {
    let mut watch = Watch::new(&folder, QUIET);
    loop {
        let read = folder.clone();
        let kept = tokio::task::spawn_blocking(move || authority(&read, SystemTime::now()));
        keeper.offer(kept.await.map_err(TaskFailed::of::<JoinError>("reading the CA's folder"))?);
        tokio::select! {
            () = watch.changed() => {}
            _ = drain.signalled() => return Ok(()),
        }
    }
}
