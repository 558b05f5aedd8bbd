//! Documents → objects, without I/O: which version of each is in force.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use smallvec::SmallVec;

use super::ObjectChange;
use crate::{
    objects::{self, Object, ObjectKey, Read, Settings, Sharing},
    problem::{Place, Problem},
    yaml,
};

/// What is written, by document: a file of manifests, or an object of a cluster, which is one of its own.
#[derive(Debug)]
pub(crate) struct Catalogue {
    settings: Settings,
    documents: BTreeMap<Arc<str>, Document>,
    /// Of documents that have any.
    problems: BTreeMap<Arc<str>, Vec<Problem>>,
    written: BTreeMap<ObjectKey, Written>,
    /// Objects that are written at several places.
    contested: BTreeSet<ObjectKey>,
    touched: BTreeSet<ObjectKey>,
    sharing: Sharing,
}

/// In which document, where in it, and what is written there.
type Version = (Arc<str>, u32, Arc<Object>);

/// An object's versions.
#[derive(Debug, Default)]
struct Written {
    /// By document and position in it.
    places: SmallVec<[Version; 1]>,
    in_force: Option<Arc<Object>>,
}

impl Written {
    fn set(&mut self, document: &Arc<str>, position: u32, object: &Arc<Object>) {
        let at = self.places.partition_point(|(name, at, _)| (name, at) < (document, &position));
        self.places.insert(at, (document.clone(), position, object.clone()));
    }

    fn remove(&mut self, document: &str, position: u32) {
        self.places.retain(|(name, at, _)| (&**name, *at) != (document, position));
    }

    fn versions(&self) -> impl Iterator<Item = &Arc<Object>> {
        self.places.iter().map(|(_, _, object)| object)
    }
}

#[derive(Debug, Default)]
struct Document {
    objects: SmallVec<[Held; 1]>,
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
        let (documents, problems, written, contested, touched, sharing) = Default::default();
        Self { settings, documents, problems, written, contested, touched, sharing }
    }

    /// Takes a file's new content.
    pub(crate) fn set_file(&mut self, file: &Arc<str>, text: &str) {
        let read = read_documents(file, text, &self.settings);
        self.set(file, read);
    }

    /// Takes what a document says now.
    pub(crate) fn set(&mut self, name: &Arc<str>, mut read: Read) {
        let (name, before) = self.documents.remove_entry(name).unwrap_or_else(|| (name.clone(), Document::default()));
        let whole = before.whole || !read.unidentified;
        self.tell(&name, std::mem::take(&mut read.problems));
        read.objects.iter_mut().for_each(|object| self.sharing.share(object));
        let objects = settle(read, &before.objects);
        self.replace(&name, before.objects, Document { objects, whole });
    }

    pub(crate) fn set_unreadable(&mut self, file: &Arc<str>, line: u32, message: &str, remedy: &str) {
        let (message, remedy) = (message.to_owned(), remedy.to_owned());
        self.documents.entry(file.clone()).or_default();
        self.tell(file, vec![Problem { place: Place::file(file, line), field: String::new(), message, remedy }]);
    }

    pub(crate) fn remove(&mut self, name: &Arc<str>) {
        if let Some(before) = self.documents.remove(name) {
            self.tell(name, Vec::new());
            self.replace(name, before.objects, Document::default());
            self.documents.remove(name);
        }
    }

    fn tell(&mut self, name: &Arc<str>, problems: Vec<Problem>) {
        match problems.is_empty() {
            true => drop(self.problems.remove(name)),
            false => drop(self.problems.insert(name.clone(), problems)),
        }
    }

    fn replace(&mut self, name: &Arc<str>, old: impl IntoIterator<Item = Held>, new: Document) {
        for (position, held) in (0..).zip(old) {
            self.touched.insert(held.object.key.clone());
            if let Some(written) = self.written.get_mut(&held.object.key) {
                written.remove(name, position);
                if written.places.len() < 2 {
                    self.contested.remove(&held.object.key);
                }
            }
        }
        for (position, held) in (0..).zip(&new.objects) {
            let key = &held.object.key;
            self.touched.insert(key.clone());
            let written = self.written.entry(key.clone()).or_default();
            written.set(name, position, &held.object);
            if written.places.len() > 1 {
                self.contested.insert(key.clone());
            }
        }
        self.documents.insert(name.clone(), new);
    }

    /// What changed since the last call. Of several places, the first by document and position is in force.
    pub(crate) fn changes(&mut self) -> Vec<ObjectChange> {
        let mut changes = Vec::new();
        for key in std::mem::take(&mut self.touched) {
            let Some(written) = self.written.get_mut(&key) else { continue };
            let now = written.versions().next().cloned();
            let before = std::mem::replace(&mut written.in_force, now.clone());
            if now.is_none() {
                self.written.remove(&key);
            }
            if before.as_deref() != now.as_deref() {
                changes.push((key, now));
            }
        }
        changes
    }

    /// Sorted.
    pub(crate) fn problems(&self) -> Vec<Problem> {
        let own = self.problems.values().flatten().cloned();
        let mut problems: Vec<Problem> = own.chain(self.duplicates()).collect();
        problems.sort();
        problems
    }

    pub(crate) fn problems_of(&self, name: &str) -> &[Problem] {
        self.problems.get(name).map_or(&[], Vec::as_slice)
    }

    fn duplicates(&self) -> impl Iterator<Item = Problem> {
        let contested = self.contested.iter().filter_map(|key| Some((key, self.written.get(key)?)));
        contested.flat_map(|(key, written)| {
            let first = written.versions().next();
            first
                .into_iter()
                .flat_map(move |first| written.versions().skip(1).map(move |other| duplicate(key, first, other)))
        })
    }

    pub(crate) fn documents(&self) -> impl Iterator<Item = &Arc<str>> {
        self.documents.keys()
    }

    /// Names of documents that begin so.
    pub(crate) fn documents_of<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a Arc<str>> {
        let from = self.documents.range::<str, _>((std::ops::Bound::Included(prefix), std::ops::Bound::Unbounded));
        from.map(|(name, _)| name).take_while(move |name| name.starts_with(prefix))
    }

    /// Documents with objects that were never identified: whatever those are, they have no last good version here.
    pub(crate) fn unread(&self) -> BTreeSet<Arc<str>> {
        self.documents.iter().filter(|(_, document)| !document.whole).map(|(name, _)| name.clone()).collect()
    }

    pub(crate) fn len(&self) -> usize {
        self.written.values().filter(|written| written.in_force.is_some()).count()
    }
}

fn duplicate(key: &ObjectKey, first: &Object, other: &Object) -> Problem {
    Problem {
        place: other.place.clone(),
        field: String::new(),
        message: format!("{key} is also written at {}, which is in force", first.place),
        remedy: "remove one of the two".to_owned(),
    }
}

fn read_documents(file: &Arc<str>, text: &str, settings: &Settings) -> Read {
    let mut read = Read::default();
    for document in yaml::documents(text) {
        match document {
            Ok(node) => read.extend(objects::read(&Place::file(file, node.line), &node, settings)),
            Err(yaml::Malformed { line, message }) => {
                read.unidentified = true;
                let remedy = "correct the YAML; objects read from this file before stay in force".to_owned();
                let place = Place::file(file, line);
                read.problems.push(Problem { place, field: String::new(), message, remedy });
            }
        }
    }
    read
}

/// The objects of a document: the good ones, the last good version of the wrong ones or else their stand-in, and, where something could
/// not be identified, everything it might have been.
fn settle(read: Read, before: &[Held]) -> SmallVec<[Held; 1]> {
    let mut named: BTreeSet<ObjectKey> = read.objects.iter().map(|o| o.key.clone()).collect();
    let held = |object, good| Held { object: Arc::new(object), good };
    // Most of what a cluster tells of its objects changes nothing here.
    let same =
        |position: usize, object: &Object| before.get(position).filter(|held| held.good && *held.object == *object);
    let good = read.objects.into_iter().enumerate();
    let mut objects: SmallVec<[Held; 1]> =
        good.map(|(position, o)| same(position, &o).cloned().unwrap_or_else(|| held(o, true))).collect();
    let last_good = |key: &ObjectKey| before.iter().find(|held| held.good && held.object.key == *key).cloned();
    for (key, stand_in) in read.rejected {
        if named.insert(key.clone()) {
            objects.extend(last_good(&key).or_else(|| stand_in.map(|o| held(o, false))));
        }
    }
    if read.unidentified {
        objects.extend(before.iter().filter(|held| !named.contains(&held.object.key)).cloned());
    }
    objects
}
