//! Putting files where others read them: whole or not at all.

use std::{
    fs::{self, File, Permissions},
    io::{self, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    process,
};

/// Between a file's name and what is being written under it.
const UNFINISHED: &str = ".tmp.";

/// Replaces the file in one step. It keeps its mode; a new one gets `mode`.
pub fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let kept = fs::metadata(path).map(|m| m.permissions().mode() & 0o7777);
    with_mode(path, content, kept.unwrap_or(mode))
}

/// As [`replace`], whatever mode the file had.
pub fn with_mode(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let fresh = unfinished(path);
    let written = write(&fresh, content, mode).and_then(|()| fs::rename(&fresh, path));
    if written.is_err() {
        // What is left is swept up at the next start.
        fs::remove_file(&fresh).unwrap_or_default();
    }
    written
}

fn write(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(content)?;
    // Not by the mode above, which the umask changes.
    file.set_permissions(Permissions::from_mode(mode))?;
    file.sync_all()
}

/// Its name ends in nothing that a runtime reads.
fn unfinished(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{name}{UNFINISHED}{}", process::id()))
}

/// Removes what an earlier process left unfinished.
pub fn sweep(path: &Path) -> io::Result<()> {
    let prefix = format!("{}{UNFINISHED}", path.file_name().unwrap_or_default().to_string_lossy());
    for entry in fs::read_dir(path.parent().unwrap_or_else(|| Path::new("/")))? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(&prefix) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Whether there was a file to remove.
pub fn remove(path: &Path) -> io::Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).expect("stat").permissions().mode() & 0o7777
    }

    #[test]
    fn a_file_keeps_its_mode_and_leaves_nothing_unfinished() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("10-a.conflist");
        replace(&path, b"one", 0o600).expect("new");
        assert_eq!(mode(&path), 0o600);
        fs::set_permissions(&path, Permissions::from_mode(0o644)).expect("chmod");
        replace(&path, b"two", 0o600).expect("again");
        assert_eq!((fs::read(&path).expect("read"), mode(&path)), (b"two".to_vec(), 0o644));
        with_mode(&path, b"three", 0o600).expect("again");
        assert_eq!(mode(&path), 0o600);
        fs::write(dir.path().join("10-a.conflist.tmp.7"), "half").expect("write");
        sweep(&path).expect("sweep");
        assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 1);
        assert!(remove(&path).expect("there") && !remove(&path).expect("gone"));
    }

    #[test]
    fn a_folder_that_is_missing_is_an_error_and_leaves_nothing() {
        let dir = tempfile::tempdir().expect("temporary directory");
        replace(&dir.path().join("no/a"), b"", 0o600).expect_err("no folder");
        fs::create_dir(dir.path().join("b")).expect("mkdir");
        fs::write(dir.path().join("b/full"), "").expect("write");
        replace(&dir.path().join("b"), b"", 0o600).expect_err("a folder is in the way");
        assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 1);
    }
}
