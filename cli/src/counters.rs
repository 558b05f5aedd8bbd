//! The Prometheus text format, as far as counters need it.

/// One line.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Sample<'a> {
    pub(crate) name: &'a str,
    labels: Vec<(&'a str, String)>,
    pub(crate) value: f64,
}

impl Sample<'_> {
    /// Empty when there is no such label.
    pub(crate) fn label(&self, name: &str) -> &str {
        self.labels.iter().find(|(key, _)| *key == name).map_or("", |(_, value)| value)
    }
}

/// Every sample; lines that are none (comments, what is malformed) are passed over.
pub(crate) fn parse(text: &str) -> impl Iterator<Item = Sample<'_>> {
    text.lines().filter(|line| !line.starts_with('#')).filter_map(sample)
}

fn sample(line: &str) -> Option<Sample<'_>> {
    let Some((name, rest)) = line.split_once('{') else {
        let (name, value) = line.split_once(' ')?;
        return Some(Sample { name, labels: Vec::new(), value: number(value)? });
    };
    let (mut labels, mut rest) = (Vec::new(), rest);
    loop {
        rest = rest.trim_start_matches(',');
        if let Some(after) = rest.strip_prefix('}') {
            return Some(Sample { name, labels, value: number(after)? });
        }
        let (key, after) = rest.split_once("=\"")?;
        let (value, after) = quoted(after)?;
        labels.push((key, value));
        rest = after;
    }
}

/// A timestamp may follow.
fn number(text: &str) -> Option<f64> {
    text.split_whitespace().next()?.parse().ok()
}

/// Up to the closing quote; `\\`, `\"` and `\n` are the only escapes.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, c)) = characters.next() {
        match c {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => match characters.next()?.1 {
                'n' => value.push('\n'),
                other => value.push(other),
            },
            other => value.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_may_hold_anything() {
        let text = "# TYPE a counter\na{x=\"1\",y=\"a \\\"b\\\", {c}\\\\\"} 3 1700000000\nb 4.5\nbroken{x=\"\n";
        let samples: Vec<Sample<'_>> = parse(text).collect();
        assert_eq!(samples.len(), 2);
        assert_eq!((samples[0].name, samples[0].label("y"), samples[0].value), ("a", "a \"b\", {c}\\", 3.0));
        assert_eq!((samples[1].name, samples[1].label("x"), samples[1].value), ("b", "", 4.5));
    }
}
