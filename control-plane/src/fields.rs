//! Reading typed fields out of a [`Node`], collecting every problem with its place.
//!
//! Reading never stops at the first problem: what cannot be read yields nothing and a [`Problem`], and the caller asks
//! [`Document::is_usable`] in the end.

use std::{
    cell::{Cell, RefCell},
    str::FromStr,
    sync::Arc,
};

use litemap::LiteMap;
use mesh_core::{mesh_config::Message, spelling::nearest};

use crate::{
    problem::{Place, Problem},
    yaml::{Node, Value},
};

/// Where the problems of one document go.
#[derive(Debug)]
pub(crate) struct Document {
    pub(crate) place: Place,
    problems: RefCell<Vec<Problem>>,
    unusable: Cell<bool>,
    wrong: Cell<bool>,
}

impl Document {
    pub(crate) fn new(place: Place) -> Self {
        Self { place, problems: RefCell::default(), unusable: Cell::new(false), wrong: Cell::new(false) }
    }

    /// Whether nothing was found that makes the document mean something else than written.
    pub(crate) fn is_usable(&self) -> bool {
        !self.unusable.get()
    }

    /// Whether nobody could honour what is written; what is unusable here may be for other programs.
    pub(crate) fn is_wrong(&self) -> bool {
        self.wrong.get()
    }

    /// The first problem so far.
    pub(crate) fn first_problem(&self) -> Option<Problem> {
        self.problems.borrow().first().cloned()
    }

    pub(crate) fn into_problems(self) -> Vec<Problem> {
        self.problems.into_inner()
    }

    fn report(&self, line: u32, field: &str, message: impl Into<String>, remedy: impl Into<String>) {
        let (field, message, remedy) = (field.to_owned(), message.into(), remedy.into());
        self.problems.borrow_mut().push(Problem { place: self.place.at(line), field, message, remedy });
    }
}

/// A value, and the path that led to it.
#[derive(Clone)]
pub(crate) struct Cursor<'a> {
    document: &'a Document,
    node: &'a Node,
    /// Of the field's name where there is one, else of the value.
    line: u32,
    path: String,
}

impl<'a> Cursor<'a> {
    pub(crate) fn root(document: &'a Document, node: &'a Node) -> Self {
        Self { document, node, line: node.line, path: String::new() }
    }

    /// The same value, its problems going to another document.
    pub(crate) fn reported_to<'b>(&self, document: &'b Document) -> Cursor<'b>
    where
        'a: 'b,
    {
        Cursor { document, node: self.node, line: self.line, path: self.path.clone() }
    }

    /// A value that was written as text in this one.
    pub(crate) fn embedded<'b>(&self, node: &'b Node) -> Cursor<'b>
    where
        'a: 'b,
    {
        Cursor { document: self.document, node, line: node.line, path: self.path.clone() }
    }

    /// The same value, its problems told of another line.
    pub(crate) fn at(&self, line: u32) -> Self {
        Self { line, ..self.clone() }
    }

    pub(crate) fn line(&self) -> u32 {
        self.line
    }

    pub(crate) fn place(&self) -> Place {
        self.document.place.at(self.line)
    }

    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    /// Reports a problem that makes the document unusable.
    pub(crate) fn reject(&self, message: impl Into<String>, remedy: impl Into<String>) {
        self.document.wrong.set(true);
        self.unsupported(message, remedy);
    }

    /// As [`Self::reject`], of what is right in itself and not for us to do.
    pub(crate) fn unsupported(&self, message: impl Into<String>, remedy: impl Into<String>) {
        self.document.unusable.set(true);
        self.document.report(self.line, &self.path, message, remedy);
    }

    /// Reports something that has less effect than its author may expect.
    pub(crate) fn warn(&self, message: impl Into<String>, remedy: impl Into<String>) {
        self.document.report(self.line, &self.path, message, remedy);
    }

    pub(crate) fn fields(&self) -> Option<Fields<'a>> {
        if matches!(self.node.value, Value::Map(_)) {
            return Some(Fields { cursor: self.clone(), known: RefCell::default() });
        }
        self.reject(format!("expected fields, found {}", kind(self.node)), "write `name: value` lines here");
        None
    }

    pub(crate) fn items(&self) -> Vec<Cursor<'a>> {
        let Value::List(items) = &self.node.value else {
            self.reject(format!("expected a list, found {}", kind(self.node)), "write `- item` lines, or [item, …]");
            return Vec::new();
        };
        let item = |(i, node): (usize, &'a Node)| Cursor {
            node,
            line: node.line,
            path: format!("{}[{i}]", self.path),
            ..self.clone()
        };
        items.iter().enumerate().map(item).collect()
    }

    /// A scalar as written; quotes do not matter.
    pub(crate) fn text(&self) -> Option<&'a str> {
        if let Value::Text(text) = &self.node.value {
            return Some(text);
        }
        self.reject(format!("expected text, found {}", kind(self.node)), "write one value here");
        None
    }

    pub(crate) fn shared(&self) -> Option<Arc<str>> {
        self.text().map(Arc::from)
    }

    /// `expected` completes "expected …".
    pub(crate) fn parse<T: FromStr>(&self, expected: &str) -> Option<T> {
        let text = self.text()?;
        let parsed = text.parse().ok();
        if parsed.is_none() {
            self.reject(format!("`{}` is not valid here", excerpt(text)), format!("expected {expected}"));
        }
        parsed
    }

    pub(crate) fn bool(&self) -> Option<bool> {
        self.parse("true or false")
    }

    pub(crate) fn port(&self) -> Option<u16> {
        self.parse("a port number, 0 to 65535")
    }

    /// One of a few words.
    pub(crate) fn one_of<T: Copy>(&self, choices: &[(&str, T)]) -> Option<T> {
        let text = self.text()?;
        let choice = choices.iter().find(|(name, _)| *name == text).map(|(_, value)| *value);
        if choice.is_none() {
            let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
            self.reject(
                format!("`{}` is not valid here", excerpt(text)),
                format!("expected one of {}", names.join(", ")),
            );
        }
        choice
    }

    /// A list of scalars.
    pub(crate) fn texts(&self) -> Vec<(Cursor<'a>, &'a str)> {
        self.items().into_iter().filter_map(|item| item.text().map(|text| (item, text))).collect()
    }

    /// Labels or annotations.
    pub(crate) fn string_map(&self) -> LiteMap<Arc<str>, Arc<str>> {
        let Some(fields) = self.fields() else { return LiteMap::new() };
        fields.each().filter_map(|(name, value)| Some((name.into(), value.shared()?))).collect()
    }
}

/// The fields of a map.
pub(crate) struct Fields<'a> {
    pub(crate) cursor: Cursor<'a>,
    known: RefCell<Vec<&'static str>>,
}

impl<'a> Fields<'a> {
    /// `None` when absent or null.
    pub(crate) fn get(&self, name: &'static str) -> Option<Cursor<'a>> {
        self.known.borrow_mut().push(name);
        self.given().find(|(key, _)| *key == name).map(|(_, value)| value)
    }

    /// Every field that is not null.
    pub(crate) fn given(&self) -> impl Iterator<Item = (&'a str, Cursor<'a>)> {
        self.each().filter(|(_, value)| value.node.value != Value::Null)
    }

    pub(crate) fn required(&self, name: &'static str) -> Option<Cursor<'a>> {
        let found = self.get(name);
        if found.is_none() {
            self.cursor.reject(format!("`{name}` is missing"), format!("add `{name}:`"));
        }
        found
    }

    /// Every field, null ones included.
    pub(crate) fn each(&self) -> impl Iterator<Item = (&'a str, Cursor<'a>)> {
        let Value::Map(entries) = &self.cursor.node.value else { unreachable!("made by Cursor::fields only") };
        let path = |key: &str| match self.cursor.path.is_empty() {
            true => key.to_owned(),
            false => format!("{}.{key}", self.cursor.path),
        };
        entries.iter().map(move |e| {
            (e.key.as_str(), Cursor { node: &e.value, line: e.line, path: path(&e.key), ..self.cursor.clone() })
        })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.each().next().is_none()
    }

    /// Rejects fields that a message of Istio's does not have; whether there are any.
    pub(crate) fn deny_unknown_to(&self, message: &Message) -> bool {
        let unknown = self.each().filter_map(|(name, field)| Some((field, message.field(name).err()?)));
        unknown.map(|(field, unknown)| field.reject("unknown field", unknown.remedy())).count() > 0
    }

    /// Rejects fields that were never asked for: in a policy, a misspelt one would silently change what it means.
    pub(crate) fn deny_unknown(&self) {
        let known = self.known.borrow();
        for (name, field) in self.each().filter(|(name, _)| !known.contains(name)) {
            let remedy = match nearest(name, known.iter().copied()) {
                Some(nearest) => format!("did you mean `{nearest}`?"),
                None => format!("known here: {}", known.join(", ")),
            };
            field.reject("unknown field", remedy);
        }
    }
}

fn kind(node: &Node) -> &'static str {
    match node.value {
        Value::List(_) => "a list",
        Value::Map(_) => "fields",
        Value::Null => "nothing",
        Value::Text(_) => "text",
    }
}

/// Keeps a message short whatever the input.
pub(crate) fn excerpt(text: &str) -> String {
    text.chars().take(80).collect()
}
