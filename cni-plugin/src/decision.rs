//! The agent's decision file: who on this node belongs to the mesh, readable by the plugin while the agent is busy or away.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use mesh_runtime::whole_file;
use serde::{Deserialize, Serialize};

/// The agent rewrites the file this often even when nothing changes.
pub const REFRESH: Duration = Duration::from_secs(10);
/// Older than this, the file speaks of a world that may have changed since.
pub const FRESH: Duration = Duration::from_secs(60);
const MAX_BYTES: u64 = 16 << 20;

/// The file's content.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Decisions {
    /// Seconds since 1970.
    pub written_at: u64,
    /// By `namespace/name`; a pod that is not here has not been seen by the agent.
    pub pods: BTreeMap<String, Listed>,
}

/// What was decided about a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed {
    pub uid: String,
    pub enrolled: bool,
}

impl Decisions {
    /// The file's place in the agent's run directory.
    pub fn path(run_dir: &Path) -> PathBuf {
        run_dir.join("decisions.json")
    }

    /// `None` when there is no file, or none that can be trusted now.
    pub fn read_fresh(run_dir: &Path, now: SystemTime) -> Option<Self> {
        let path = Self::path(run_dir);
        if fs::metadata(&path).ok()?.len() > MAX_BYTES {
            return None;
        }
        let decisions: Self = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
        decisions.is_fresh(now).then_some(decisions)
    }

    /// Written recently, and not in the future: a clock set back must not make an old file young.
    fn is_fresh(&self, now: SystemTime) -> bool {
        let now = seconds(now);
        self.written_at <= now + 5 && now.saturating_sub(self.written_at) <= FRESH.as_secs()
    }

    /// Replaces the file in one step.
    pub fn write(&mut self, run_dir: &Path, now: SystemTime) -> io::Result<()> {
        self.written_at = seconds(now);
        whole_file::replace(&Self::path(run_dir), &serde_json::to_vec(self)?, 0o644)
    }

    /// Whether the pod is enrolled; `None` when the file does not know this very pod.
    pub fn of(&self, namespace: &str, name: &str, uid: Option<&str>) -> Option<bool> {
        let listed = self.pods.get(&format!("{namespace}/{name}"))?;
        // A pod recreated under its old name may carry other labels.
        uid.is_none_or(|uid| uid == listed.uid).then_some(listed.enrolled)
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_believed_while_fresh_and_only_about_the_same_pod() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let start = UNIX_EPOCH + Duration::from_secs(1_000_000);
        assert_eq!(Decisions::read_fresh(dir.path(), start), None);
        let mut decisions = Decisions::default();
        decisions.pods.insert("a/b".into(), Listed { uid: "u1".into(), enrolled: false });
        decisions.write(dir.path(), start).expect("write");
        let read = Decisions::read_fresh(dir.path(), start + FRESH).expect("fresh");
        assert_eq!(read.of("a", "b", Some("u1")), Some(false));
        assert_eq!(read.of("a", "b", Some("u2")), None);
        assert_eq!(read.of("a", "c", None), None);
        assert_eq!(Decisions::read_fresh(dir.path(), start + FRESH + Duration::from_secs(1)), None);
        assert_eq!(Decisions::read_fresh(dir.path(), start - Duration::from_secs(100)), None);
        fs::write(Decisions::path(dir.path()), "{").expect("write");
        assert_eq!(Decisions::read_fresh(dir.path(), start), None);
    }
}
