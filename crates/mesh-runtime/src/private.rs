//! Folders that only this process's user may enter, for what outlives the process: keys, policies.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

/// Why a folder is not private.
#[derive(Debug, thiserror::Error)]
pub enum PrivateFolderError {
    #[error("{}: cannot be used", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{}: not a folder; expected one of mode 0700 that is ours", .0.display())]
    NotAFolder(PathBuf),
    #[error("{}: belongs to user {owner}; expected {expected}, who runs this process", path.display())]
    Owner { path: PathBuf, owner: u32, expected: u32 },
    #[error("{}: mode {mode:04o} lets others in; expected 0700", path.display())]
    Mode { path: PathBuf, mode: u32 },
}

/// A folder of mode 0700 that belongs to the user of this process.
#[derive(Clone, Debug)]
pub struct PrivateFolder {
    path: PathBuf,
    owner: u32,
}

impl PrivateFolder {
    /// Opens `path`, making it when only the last part is missing.
    ///
    /// # Errors
    /// When others than this process's user can get at it.
    pub fn open(path: &Path) -> Result<Self, PrivateFolderError> {
        let failed = |source| PrivateFolderError::Io { path: path.to_owned(), source };
        match fs::DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
            _ => {}
        }
        // What the kernel shows of a process belongs to its effective user.
        let owner = fs::metadata("/proc/self").map_err(failed)?.uid();
        let found = fs::symlink_metadata(path).map_err(failed)?;
        let path = path.to_owned();
        match found.mode() & 0o777 {
            _ if !found.is_dir() => Err(PrivateFolderError::NotAFolder(path)),
            _ if found.uid() != owner => Err(PrivateFolderError::Owner { path, owner: found.uid(), expected: owner }),
            mode if mode & 0o077 != 0 => Err(PrivateFolderError::Mode { path, mode }),
            _ => Ok(Self { path, owner }),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The user of this process.
    pub fn owner(&self) -> u32 {
        self.owner
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_folder_that_others_can_enter_is_refused_with_what_would_be_right() {
        let above = tempfile::tempdir().unwrap();
        let path = above.path().join("keys");
        assert_eq!(PrivateFolder::open(&path).unwrap().path(), path);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700, "made as it should be");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let text = PrivateFolder::open(&path).unwrap_err().to_string();
        assert!(text.contains("mode 0755 lets others in; expected 0700"), "{text}");
        let file = above.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(PrivateFolder::open(&file).unwrap_err().to_string().contains("not a folder"));
        assert!(PrivateFolder::open(&above.path().join("a/b")).is_err(), "more than one part is missing");
    }
}
