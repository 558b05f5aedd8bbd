//! What a misspelt name was meant to be.

/// The one of `known` that someone who wrote `name` most likely meant: at most two letters off, case and separators
/// not counted.
pub fn nearest<'k>(name: &str, known: impl IntoIterator<Item = &'k str>) -> Option<&'k str> {
    let plain = |name: &str| name.chars().filter(|c| !matches!(c, '_' | '-')).collect::<String>().to_ascii_lowercase();
    let name = plain(name);
    let measured = known.into_iter().map(|known| (distance(&name, &plain(known)), known));
    measured.min().filter(|(distance, _)| *distance <= 2 && *distance < name.len()).map(|(_, known)| known)
}

/// Levenshtein's, for short names; anything long is far from everything.
fn distance(a: &str, b: &str) -> usize {
    if a.len() > 64 {
        return usize::MAX;
    }
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let next = (diagonal + usize::from(x != *y)).min(row[j] + 1).min(row[j + 1] + 1);
            diagonal = std::mem::replace(&mut row[j + 1], next);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_is_close_and_neither_case_nor_separators_count() {
        let known = ["from", "to", "when", "sourceNamespaces"];
        for (name, expected) in [
            ("form", Some("from")),
            ("form ", None),
            ("source_namespace", Some("sourceNamespaces")),
            ("Source-Namespaces", Some("sourceNamespaces")),
            ("ot", None),
            ("", None),
            ("something", None),
        ] {
            assert_eq!(nearest(name, known), expected, "{name}");
        }
        assert_eq!(nearest(&"x".repeat(100_000), known), None);
    }

    #[test]
    fn distance_counts_edits() {
        for (a, b, expected) in [("form", "from", 2), ("rule", "rules", 1), ("", "abc", 3), ("same", "same", 0)] {
            assert_eq!(distance(a, b), expected, "{a} {b}");
        }
    }
}
