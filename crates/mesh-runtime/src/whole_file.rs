//! Files that others read whole or not at all: written beside their name, then given it.
//!
//! Of two processes that replace the same file, either wins and neither spoils the other's, as long as they see each other's process ids
//! or do so at different times. What a process that is killed meanwhile leaves is named so that [`is_unfinished`] knows it, ends in
//! nothing that anybody reads, and has no more bits than the file was to have; it stays until somebody [`sweep`]s.

use std::{
    fs::{self, File, Permissions},
    io::{self, Write as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process,
};

/// Between a file's name and what is being written under it.
const UNFINISHED: &str = ".tmp.";

/// Replaces the file in one step, with exactly `mode`, whatever it had and whatever the umask. Readers, also after this process was
/// killed, see the old or the new. After a power failure they may see neither: that is for files that mean nothing after a restart of
/// the machine, or are checked when they are read.
///
/// # Errors
/// Whatever the file system says; the file is then as it was, and nothing is left beside it.
pub fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    write_and_rename(path, content, mode, |_| Ok(()))
}

/// As [`replace`]; after a power failure as well, readers see the old or the new.
///
/// # Errors
/// As of [`replace`].
pub fn replace_synced(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    write_and_rename(path, content, mode, File::sync_all)
}

fn write_and_rename(path: &Path, content: &[u8], mode: u32, end: fn(&File) -> io::Result<()>) -> io::Result<()> {
    let fresh = unfinished(path);
    let written = write(&fresh, content, mode, end).and_then(|()| fs::rename(&fresh, path));
    if written.is_err() {
        // It may not even have been made; the reason is told already.
        remove(&fresh).unwrap_or_default();
    }
    written
}

fn write(path: &Path, content: &[u8], mode: u32, end: fn(&File) -> io::Result<()>) -> io::Result<()> {
    // Of an earlier process with our id, and with whatever mode.
    remove(path)?;
    let mut file = File::options().write(true).create_new(true).mode(mode & 0o600).open(path)?;
    file.write_all(content)?;
    // Not by the mode above, which the umask changes.
    file.set_permissions(Permissions::from_mode(mode))?;
    end(&file)
}

fn unfinished(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{name}{UNFINISHED}{}", process::id()))
}

/// Whether a name is that of a file which is being written, or was when its process was killed.
pub fn is_unfinished(name: &str) -> bool {
    let id = name.rsplit_once(UNFINISHED).map(|(_, id)| id);
    id.is_some_and(|id| !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Removes what earlier processes left of the file unfinished. One that writes it now fails, and leaves the file as it is.
///
/// # Errors
/// When the folder cannot be read, or a file not removed.
pub fn sweep(path: &Path) -> io::Result<()> {
    let prefix = format!("{}{UNFINISHED}", path.file_name().unwrap_or_default().to_string_lossy());
    for entry in fs::read_dir(path.parent().unwrap_or_else(|| Path::new("/")))? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(&prefix) {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

/// Whether there was a file to remove.
///
/// # Errors
/// When it is still there.
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

    fn names(folder: &Path) -> Vec<String> {
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_file_is_replaced_whole_with_its_mode_and_leaves_nothing_unfinished() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        for (replace, content, mode) in
            [(replace as fn(&_, &_, _) -> _, "one", 0o600), (replace_synced, "two", 0o666), (replace, "three", 0o400)]
        {
            // Of an earlier process with our id.
            fs::write(unfinished(&path), "half, and longer than the other").unwrap();
            replace(&path, content.as_bytes(), mode).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), content);
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, mode);
        }
        assert_eq!(names(dir.path()), ["a"]);
    }

    #[test]
    fn what_was_left_unfinished_of_a_file_is_known_and_swept_up() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a", "a.tmp.7", "b.tmp.7", "a.tmp"] {
            fs::write(dir.path().join(name), "half").unwrap();
        }
        sweep(&dir.path().join("a")).unwrap();
        let mut left = names(dir.path());
        left.sort();
        assert_eq!(left, ["a", "a.tmp", "b.tmp.7"]);
        assert_eq!(left.iter().filter(|name| is_unfinished(name)).collect::<Vec<_>>(), ["b.tmp.7"]);
        let a = dir.path().join("a");
        assert!(remove(&a).unwrap() && !remove(&a).unwrap());
    }

    #[test]
    fn a_folder_that_is_missing_is_an_error_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        replace(&dir.path().join("no/a"), b"", 0o600).unwrap_err();
        fs::create_dir(dir.path().join("b")).unwrap();
        fs::write(dir.path().join("b/full"), "").unwrap();
        replace(&dir.path().join("b"), b"", 0o600).expect_err("a folder is in the way");
        assert_eq!(names(dir.path()), ["b"]);
    }
}
