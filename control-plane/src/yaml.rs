//! YAML as a tree that knows its lines.
//!
//! A file is first cut at its document markers, which YAML forbids inside any node (YAML 1.2.2 §9.1.2, c-forbidden), and each document
//! is parsed alone: a malformed one costs no other.

use std::collections::{HashMap, HashSet};

use serde_saphyr::granit_parser::{Event, Marker, Parser, ScalarStyle, ScanError, Span};

/// Nodes in one document, aliases expanded; keeps a "billion laughs" from growing.
const MAX_NODES: usize = 200_000;
/// Nodes within nodes.
pub(crate) const MAX_DEPTH: usize = 64;

/// A value and the 1-based line it starts on.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Node {
    pub(crate) line: u32,
    pub(crate) value: Value,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    List(Vec<Node>),
    Map(Vec<Entry>),
    Null,
    /// As written, after unescaping; numbers and booleans are told apart where they are expected.
    Text(String),
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Entry {
    pub(crate) key: String,
    /// Of the key.
    pub(crate) line: u32,
    pub(crate) value: Node,
}

/// Why a document could not be read, and where.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Malformed {
    pub(crate) line: u32,
    pub(crate) message: String,
}

/// Every document of a file that is not empty, in order.
pub(crate) fn documents(text: &str) -> impl Iterator<Item = Result<Node, Malformed>> {
    cut(text).into_iter().filter_map(|(first_line, document)| parse(document, first_line).transpose())
}

/// Pieces of `text` with the 1-based line each starts on; a piece begins with its own marker, if it has one.
fn cut(text: &str) -> Vec<(u32, &str)> {
    let mut pieces = Vec::new();
    let (mut start, mut start_line, mut offset) = (0, 1, 0);
    for (number, line) in (1..).zip(text.split_inclusive('\n')) {
        if is_marker(line, "---") {
            pieces.push((start_line, &text[start..offset]));
            (start, start_line) = (offset, number);
        } else if is_marker(line, "...") {
            pieces.push((start_line, &text[start..offset]));
            (start, start_line) = (offset + line.len(), number + 1);
        }
        offset += line.len();
    }
    pieces.push((start_line, &text[start..]));
    pieces
}

fn is_marker(line: &str, marker: &str) -> bool {
    line.strip_prefix(marker).is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']))
}

/// `None` for a document without content.
///
/// # Errors
/// When `text`, which begins on line `first_line`, is not one well-formed document.
pub(crate) fn parse(text: &str, first_line: u32) -> Result<Option<Node>, Malformed> {
    // A directive (`%YAML 1.2`) would belong to the next piece; no manifest needs one.
    let has_content = |line: &str| !matches!(line.trim_start().as_bytes().first(), None | Some(b'#' | b'%'));
    if !text.strip_prefix("---").unwrap_or(text).lines().any(has_content) {
        return Ok(None);
    }
    let mut builder = Builder { events: Parser::new_from_str(text), first_line, nodes: 0, anchors: HashMap::new() };
    loop {
        match builder.next()? {
            (Event::StreamStart | Event::DocumentStart(..), _) => {}
            (Event::StreamEnd | Event::DocumentEnd, _) => return Ok(None),
            (event, span) => {
                let node = builder.node(event, span, 0)?;
                builder.finish()?;
                return Ok((node.value != Value::Null).then_some(node));
            }
        }
    }
}

struct Builder<I> {
    events: I,
    first_line: u32,
    nodes: usize,
    anchors: HashMap<usize, Node>,
}

impl<'t, I: Iterator<Item = Result<(Event<'t>, Span), ScanError>>> Builder<I> {
    /// The next event, comments left out.
    fn next(&mut self) -> Result<(Event<'t>, Span), Malformed> {
        loop {
            match self.events.next() {
                Some(Ok((Event::Comment(..) | Event::Anchor(..), _))) => {}
                Some(Ok(event)) => return Ok(event),
                Some(Err(error)) => {
                    let line = self.line(error.marker());
                    return Err(Malformed { line, message: error.info().to_owned() });
                }
                None => return Ok((Event::StreamEnd, Span::default())),
            }
        }
    }

    fn node(&mut self, event: Event<'t>, span: Span, depth: usize) -> Result<Node, Malformed> {
        let line = self.line(&span.start);
        let malformed = |message: &str| Err(Malformed { line, message: message.to_owned() });
        self.nodes += 1;
        if self.nodes > MAX_NODES {
            return malformed("the document is too large");
        }
        if depth > MAX_DEPTH {
            return malformed("the document is nested too deeply");
        }
        let (anchor, value) = match event {
            Event::Scalar(text, style, anchor, _) => (anchor, scalar(text.into_owned(), style)),
            Event::SequenceStart(_, anchor, _) => (anchor, Value::List(self.list(depth)?)),
            Event::MappingStart(_, anchor, _) => (anchor, Value::Map(self.map(depth)?)),
            Event::Alias(anchor) => return self.alias(anchor, line),
            _ => return malformed("expected a value"),
        };
        let node = Node { line, value };
        if anchor != 0 {
            self.anchors.insert(anchor, node.clone());
        }
        Ok(node)
    }

    fn alias(&mut self, anchor: usize, line: u32) -> Result<Node, Malformed> {
        let node = self.anchors.get(&anchor).cloned();
        let node = node.ok_or_else(|| Malformed { line, message: "the alias refers to itself".to_owned() })?;
        self.nodes += node.size();
        if self.nodes > MAX_NODES {
            return Err(Malformed { line, message: "aliases make the document too large".to_owned() });
        }
        Ok(node)
    }

    fn list(&mut self, depth: usize) -> Result<Vec<Node>, Malformed> {
        let mut items = Vec::new();
        loop {
            match self.next()? {
                (Event::SequenceEnd, _) => return Ok(items),
                (event, span) => items.push(self.node(event, span, depth + 1)?),
            }
        }
    }

    fn map(&mut self, depth: usize) -> Result<Vec<Entry>, Malformed> {
        let mut entries: Vec<Entry> = Vec::new();
        let mut seen = HashSet::new();
        loop {
            let (key, line) = match self.next()? {
                (Event::MappingEnd, _) => return Ok(entries),
                (Event::Scalar(key, ..), span) => (key.into_owned(), self.line(&span.start)),
                (_, span) => {
                    return Err(Malformed {
                        line: self.line(&span.start),
                        message: "a field name must be plain text".to_owned(),
                    });
                }
            };
            if !seen.insert(key.clone()) {
                return Err(Malformed { line, message: format!("field `{key}` is given twice") });
            }
            let (event, span) = self.next()?;
            let value = self.node(event, span, depth + 1)?;
            entries.push(Entry { key, line, value });
        }
    }

    /// Makes sure that nothing follows the document's value.
    fn finish(&mut self) -> Result<(), Malformed> {
        loop {
            match self.next()? {
                (Event::StreamEnd, _) => return Ok(()),
                (Event::DocumentEnd, _) => {}
                (_, span) => {
                    return Err(Malformed {
                        line: self.line(&span.start),
                        message: "unexpected content after the document".to_owned(),
                    });
                }
            }
        }
    }

    fn line(&self, marker: &Marker) -> u32 {
        let within = u32::try_from(marker.line()).unwrap_or(u32::MAX).max(1);
        self.first_line.saturating_add(within - 1)
    }
}

fn scalar(text: String, style: ScalarStyle) -> Value {
    let is_null = style == ScalarStyle::Plain && matches!(&*text, "" | "~" | "null" | "Null" | "NULL");
    if is_null { Value::Null } else { Value::Text(text) }
}

impl Node {
    fn size(&self) -> usize {
        match &self.value {
            Value::List(items) => items.iter().map(Self::size).sum::<usize>() + 1,
            Value::Map(entries) => entries.iter().map(|e| e.value.size()).sum::<usize>() + 1,
            Value::Null | Value::Text(_) => 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// `key=value@line` of every leaf, in order.
    fn leaves(node: &Node, path: &str, out: &mut Vec<String>) {
        match &node.value {
            Value::List(items) => items.iter().enumerate().for_each(|(i, n)| leaves(n, &format!("{path}[{i}]"), out)),
            Value::Map(entries) => entries.iter().for_each(|e| leaves(&e.value, &format!("{path}.{}", e.key), out)),
            Value::Null => out.push(format!("{path}=null@{}", node.line)),
            Value::Text(text) => out.push(format!("{path}={text}@{}", node.line)),
        }
    }

    fn read(text: &str) -> Vec<Result<Vec<String>, (u32, String)>> {
        let describe = |node: Node| {
            let mut out = Vec::new();
            leaves(&node, "", &mut out);
            out
        };
        documents(text).map(|d| d.map(describe).map_err(|m| (m.line, m.message))).collect()
    }

    #[test]
    fn lines_are_those_of_the_file_in_every_style() {
        let text = "# first\na: 1\n---\n\nb:\n  - x\n  - {y: 2,\n     z: [3]}\n--- # third\nc: |\n  text\n\nd: \"q\"\n...\n# nothing\n---\ne:\n";
        let expected: Vec<Vec<&str>> = vec![
            vec![".a=1@2"],
            vec![".b[0]=x@6", ".b[1].y=2@7", ".b[1].z[0]=3@8"],
            vec![".c=text\n@10", ".d=q@13"],
            vec![".e=null@17"],
        ];
        let found: Vec<Vec<String>> = read(text).into_iter().map(Result::unwrap).collect();
        // A block scalar starts at its indicator or on its first line; either is a fair place to point at.
        let found: Vec<Vec<String>> =
            found.into_iter().map(|d| d.into_iter().map(|l| l.replace("text\n@11", "text\n@10")).collect()).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn carriage_returns_do_not_shift_lines() {
        let text = "a: 1\r\n---\r\nb:\r\n  c: 2\r\n";
        let found: Vec<Vec<String>> = read(text).into_iter().map(Result::unwrap).collect();
        assert_eq!(found, [vec![".a=1@1"], vec![".b.c=2@4"]]);
    }

    #[test]
    fn a_malformed_document_harms_no_other() {
        let found = read("a: 1\n---\nb: [1, 2\nc: 3\n---\nd: 4\n");
        assert_eq!(found[0], Ok(vec![".a=1@1".to_owned()]));
        assert!(matches!(&found[1], Err((line, _)) if (3..=5).contains(line)), "{found:?}");
        assert_eq!(found[2], Ok(vec![".d=4@6".to_owned()]));
    }

    #[test]
    fn a_field_given_twice_is_refused_at_its_second_place() {
        assert_eq!(read("a: 1\nb: 2\na: 3\n"), [Err((3, "field `a` is given twice".to_owned()))]);
    }

    #[test]
    fn aliases_expand_within_bounds() {
        assert_eq!(read("a: &x {k: 1}\nb: *x\n"), [Ok(vec![".a.k=1@1".to_owned(), ".b.k=1@1".to_owned()])]);
        let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for i in 1..12 {
            let of = |n: usize| format!("*a{}", n - 1);
            bomb += &format!("a{i}: &a{i} [{}]\n", vec![of(i); 10].join(", "));
        }
        assert!(read(&bomb)[0].as_ref().unwrap_err().1.contains("too large"));
    }

    #[test]
    fn depth_is_bounded() {
        let deep = format!("{}1{}", "[".repeat(500), "]".repeat(500));
        assert!(read(&deep)[0].is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "(\\PC|\\n|: |- |---\\n|[&*!{}\\[\\]#|>]){0,60}") {
            drop(read(&text));
        }
    }
}
