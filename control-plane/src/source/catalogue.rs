//! A folder of manifests, as a set of objects that is always usable.
//!
//! Whatever is wrong is a [`Problem`] with its place; meanwhile an object that was once read keeps its last good version, and a security
//! policy that never was is replaced by a stand-in that denies. One document never harms another.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    objects::{self, Object, ObjectKey, Read, Settings},
    problem::Problem,
    yaml,
};

/// Larger files are refused: no manifest is, and each is read whole.
const MAX_FILE_BYTES: u64 = 16 * 1024 * 1024;

/// An object that is new, different, or gone.
pub(crate) type ObjectChange = (ObjectKey, Option<Arc<Object>>);

/// A folder and what was last read from it. Reading blocks.
#[derive(Debug)]
pub(crate) struct Folder {
    root: PathBuf,
    stamps: BTreeMap<Arc<str>, Stamp>,
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
            self.catalogue.files.keys().filter(|file| !found.contains_key(*file)).cloned().collect();
        for file in gone {
            self.stamps.remove(&file);
            self.catalogue.remove_file(&file);
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
        file: ".".into(),
        line: 1,
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

/// By file and position in it.
type Places = BTreeMap<(Arc<str>, usize), Arc<Object>>;

/// Files → objects, without I/O.
#[derive(Debug)]
pub(crate) struct Catalogue {
    settings: Settings,
    files: BTreeMap<Arc<str>, File>,
    /// Every place each object is written at: file, position in the file.
    places: BTreeMap<ObjectKey, Places>,
    in_force: BTreeMap<ObjectKey, Arc<Object>>,
    touched: BTreeSet<ObjectKey>,
}

#[derive(Debug, Default)]
struct File {
    objects: Vec<Held>,
    problems: Vec<Problem>,
    /// Whether every object of it was once identified.
    whole: bool,
}

#[derive(Clone, Debug)]
struct Held {
    object: Arc<Object>,
    /// False for a stand-in, which is no version to fall back on.
    good: bool,
}

impl Catalogue {
    pub(crate) fn new(settings: Settings) -> Self {
        let (files, places, in_force, touched) = Default::default();
        Self { settings, files, places, in_force, touched }
    }

    /// Takes a file's new content.
    pub(crate) fn set_file(&mut self, file: &Arc<str>, text: &str) {
        let read = read_documents(file, text, &self.settings);
        let (before, was_whole) = self.files.get(file).map(|f| (f.objects.clone(), f.whole)).unwrap_or_default();
        let objects = settle(&read, before);
        self.replace(file, File { objects, problems: read.problems, whole: was_whole || !read.unidentified });
    }

    pub(crate) fn set_unreadable(&mut self, file: &Arc<str>, line: u32, message: &str, remedy: &str) {
        let (message, remedy) = (message.to_owned(), remedy.to_owned());
        let problem = Problem { file: file.clone(), line, field: String::new(), message, remedy };
        self.files.entry(file.clone()).or_default().problems = vec![problem];
    }

    pub(crate) fn remove_file(&mut self, file: &Arc<str>) {
        self.replace(file, File::default());
        self.files.remove(file);
    }

    fn replace(&mut self, file: &Arc<str>, new: File) {
        let old = self.files.insert(file.clone(), File::default()).unwrap_or_default();
        for (position, held) in old.objects.iter().enumerate() {
            let key = &held.object.key;
            self.touched.insert(key.clone());
            if let Some(places) = self.places.get_mut(key) {
                places.remove(&(file.clone(), position));
            }
        }
        for (position, held) in new.objects.iter().enumerate() {
            let key = &held.object.key;
            self.touched.insert(key.clone());
            self.places.entry(key.clone()).or_default().insert((file.clone(), position), held.object.clone());
        }
        self.files.insert(file.clone(), new);
    }

    /// What changed since the last call. Of several places, the first by file name and position is in force.
    pub(crate) fn changes(&mut self) -> Vec<ObjectChange> {
        let mut changes = Vec::new();
        for key in std::mem::take(&mut self.touched) {
            let now = self.places.get(&key).and_then(|places| places.values().next()).cloned();
            if now.is_none() {
                self.places.remove(&key);
            }
            let before = self.in_force.get(&key);
            if before.map(|o| &**o) != now.as_deref() {
                match &now {
                    Some(object) => drop(self.in_force.insert(key.clone(), object.clone())),
                    None => drop(self.in_force.remove(&key)),
                }
                changes.push((key, now));
            }
        }
        changes
    }

    /// Sorted by file and line.
    pub(crate) fn problems(&self) -> Vec<Problem> {
        let own = self.files.values().flat_map(|f| f.problems.iter().cloned());
        let mut problems: Vec<Problem> = own.chain(self.duplicates()).collect();
        problems.sort();
        problems
    }

    fn duplicates(&self) -> impl Iterator<Item = Problem> {
        self.places.iter().flat_map(|(key, places)| {
            let first = places.values().next();
            first
                .into_iter()
                .flat_map(move |first| places.values().skip(1).map(move |other| duplicate(key, first, other)))
        })
    }

    /// Files with objects that were never identified: whatever those are, they have no last good version here.
    pub(crate) fn unread(&self) -> BTreeSet<Arc<str>> {
        self.files.iter().filter(|(_, file)| !file.whole).map(|(name, _)| name.clone()).collect()
    }

    pub(crate) fn len(&self) -> usize {
        self.in_force.len()
    }
}

fn duplicate(key: &ObjectKey, first: &Object, other: &Object) -> Problem {
    Problem {
        file: other.file.clone(),
        line: other.line,
        field: String::new(),
        message: format!("{key} is also written at {}:{}, which is in force", first.file, first.line),
        remedy: "remove one of the two".to_owned(),
    }
}

fn read_documents(file: &Arc<str>, text: &str, settings: &Settings) -> Read {
    let mut read = Read::default();
    for document in yaml::documents(text) {
        match document {
            Ok(node) => read.extend(objects::read(file, &node, settings)),
            Err(yaml::Malformed { line, message }) => {
                read.unidentified = true;
                let remedy = "correct the YAML; objects read from this file before stay in force".to_owned();
                read.problems.push(Problem { file: file.clone(), line, field: String::new(), message, remedy });
            }
        }
    }
    read
}

/// The objects of a file: the good ones, the last good version of the wrong ones or else their stand-in, and, where something could not
/// be identified, everything it might have been.
fn settle(read: &Read, before: Vec<Held>) -> Vec<Held> {
    let mut objects: Vec<Held> =
        read.objects.iter().map(|o| Held { object: Arc::new(o.clone()), good: true }).collect();
    let mut named: BTreeSet<ObjectKey> = read.objects.iter().map(|o| o.key.clone()).collect();
    let last_good = |key: &ObjectKey| before.iter().find(|held| held.good && held.object.key == *key).cloned();
    for (key, stand_in) in &read.rejected {
        if named.insert(key.clone()) {
            let stand_in = stand_in.as_ref().map(|o| Held { object: Arc::new(o.clone()), good: false });
            objects.extend(last_good(key).or(stand_in));
        }
    }
    if read.unidentified {
        objects.extend(before.into_iter().filter(|held| !named.contains(&held.object.key)));
    }
    objects
}

#[cfg(test)]
mod tests;
