//! A folder of manifests.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{Catalogue, ObjectChange};
use crate::{
    objects::Settings,
    problem::{Place, Problem},
};

/// Larger files are refused: no manifest is, and each is read whole.
pub(super) const MAX_FILE_BYTES: u64 = 16 * 1024 * 1024;

/// A folder and what was last read from it. Reading blocks.
#[derive(Debug)]
pub(crate) struct Folder {
    root: PathBuf,
    pub(super) stamps: BTreeMap<Arc<str>, Stamp>,
    /// The root itself could not be listed.
    unreadable: Option<Problem>,
    pub(crate) catalogue: Catalogue,
}

/// Tells whether a file was replaced or changed.
type Stamp = (u64, u64, u64, i64, i64);

/// Names one version of one file: its inode, and the seconds and nanoseconds of its last change.
pub(crate) type Version = (u64, i64, i64);

impl Folder {
    pub(crate) fn new(root: PathBuf, settings: Settings) -> Self {
        Self { root, stamps: BTreeMap::new(), unreadable: None, catalogue: Catalogue::new(settings) }
    }

    /// Reads what changed since the last call.
    pub(crate) fn scan(&mut self) -> Vec<ObjectChange> {
        let mut found = BTreeMap::new();
        self.unreadable = list(&self.root, "", &mut found).err().map(|error| folder_problem(&error));
        if self.unreadable.is_some() {
            return Vec::new(); // nothing is known to be gone
        }
        let gone: Vec<Arc<str>> =
            self.catalogue.documents().filter(|file| !found.contains_key(*file)).cloned().collect();
        for file in gone {
            self.stamps.remove(&file);
            self.catalogue.remove(&file);
        }
        for (file, (path, stamp)) in found {
            let read = match stamp {
                Ok(stamp) if self.stamps.get(&file) == Some(&stamp) => continue,
                Ok(stamp) => self.read_file(&file, &path).then_some(stamp),
                Err(error) => {
                    self.cannot_read(&file, &error);
                    None
                }
            };
            // What could not be read is tried again, changed or not.
            match read {
                Some(stamp) => drop(self.stamps.insert(file, stamp)),
                None => drop(self.stamps.remove(&file)),
            }
        }
        self.catalogue.changes()
    }

    /// False if there was nothing that could be read.
    fn read_file(&mut self, file: &Arc<str>, path: &Path) -> bool {
        let read = fs::metadata(path).and_then(|meta| match meta.len() {
            0..=MAX_FILE_BYTES => fs::read(path),
            _ => Err(io::Error::other(format!("it is larger than {} MiB", MAX_FILE_BYTES >> 20))),
        });
        match read.map(String::from_utf8) {
            Ok(Ok(text)) => self.catalogue.set_file(file, &text),
            Ok(Err(error)) => {
                let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
                let line = 1 + u32::try_from(valid.iter().filter(|b| **b == b'\n').count()).unwrap_or(u32::MAX - 1);
                self.catalogue.set_unreadable(file, line, "the file is not UTF-8", "save it as UTF-8");
            }
            // Removed between listing and reading: the next scan sees it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return false,
            Err(error) => {
                self.cannot_read(file, &error);
                return false;
            }
        }
        true
    }

    fn cannot_read(&mut self, file: &Arc<str>, error: &io::Error) {
        let message = format!("the file cannot be read: {error}");
        self.catalogue.set_unreadable(file, 1, &message, "make it readable; its last good objects stay in force");
    }

    /// Whether the last scan saw the whole folder.
    pub(crate) fn is_readable(&self) -> bool {
        self.unreadable.is_none()
    }

    /// The versions of files that the objects in force, and the problems, come from.
    pub(crate) fn versions(&self) -> impl Iterator<Item = Version> {
        self.stamps.values().map(|(_, inode, _, seconds, nanoseconds)| (*inode, *seconds, *nanoseconds))
    }

    pub(crate) fn problems(&self) -> Vec<Problem> {
        self.unreadable.iter().cloned().chain(self.catalogue.problems()).collect()
    }
}

fn folder_problem(error: &io::Error) -> Problem {
    Problem {
        place: Place::file(&".".into(), 1),
        field: String::new(),
        message: format!("the manifest folder cannot be read: {error}"),
        remedy: "create it, or correct --manifests; what was last read stays in force".to_owned(),
    }
}

/// Manifests by path relative to the root; of one that is there but cannot be looked at, why.
type Found = BTreeMap<Arc<str>, (PathBuf, io::Result<Stamp>)>;

/// `*.yaml` and `*.yml` below `folder`, dot-files and dot-folders left out.
fn list(folder: &Path, prefix: &str, found: &mut Found) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        if name.starts_with('.') {
            continue;
        }
        let relative = format!("{prefix}{name}");
        let is_manifest = name.ends_with(".yaml") || name.ends_with(".yml");
        let meta = match entry.file_type().map(|kind| (kind, fs::metadata(entry.path()))) {
            Ok((_, Ok(meta))) => meta,
            // An entry that vanishes meanwhile, or a dangling link, is not there.
            Ok((_, Err(error))) | Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            // Nothing is known to be gone.
            Ok((kind, Err(error))) if !kind.is_dir() => {
                if is_manifest {
                    found.insert(relative.into(), (entry.path(), Err(error)));
                }
                continue;
            }
            Ok((_, Err(error))) | Err(error) => return Err(error),
        };
        // A link to a folder could lead in circles, and Kubernetes' own ones start with a dot.
        if meta.is_dir() && !entry.file_type()?.is_symlink() {
            match list(&entry.path(), &format!("{relative}/"), found) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        } else if meta.is_file() && is_manifest {
            let stamp = (meta.dev(), meta.ino(), meta.len(), meta.ctime(), meta.ctime_nsec());
            found.insert(relative.into(), (entry.path(), Ok(stamp)));
        }
    }
    Ok(())
}
