//! Alerts, dashboards and runbooks name what exists.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;

const ALERTS: &str = "deploy/charts/fairway/files/alerts.yaml";
const RUNBOOKS: &str = "docs/runbooks";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
        let path = entry.expect("readable").path();
        if path.is_dir() {
            found.extend(files(&path, extension));
        } else if path.extension().is_some_and(|e| e == extension) {
            found.push(path);
        }
    }
    found
}

fn alerts() -> Vec<Value> {
    let text: Value = serde_saphyr::from_str(&read(&root().join(ALERTS))).expect("YAML");
    text["groups"][0]["rules"].as_array().expect("rules").clone()
}

/// Words of a query that have the form of our metrics' names, as their families are called.
fn metrics(query: &str) -> BTreeSet<String> {
    let words = query.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let families =
        ["fairway_", "fairwayd_", "istio_", "citadel_", "pilot_", "ztunnel_", "workload_manager_", "process_"];
    words
        .filter(|word| families.iter().any(|family| word.starts_with(family)))
        .map(|word| word.trim_end_matches("_bucket").to_owned())
        .collect()
}

fn queries() -> Vec<String> {
    let mut queries: Vec<String> = alerts().iter().filter_map(|a| a["expr"].as_str().map(str::to_owned)).collect();
    for path in files(&root().join("deploy/dashboards"), "json") {
        let dashboard: Value = serde_json::from_str(&read(&path)).expect("JSON");
        for panel in dashboard["panels"].as_array().expect("panels") {
            for target in panel["targets"].as_array().expect("targets") {
                queries.push(target["expr"].as_str().expect("a query").to_owned());
            }
        }
    }
    queries
}

#[test]
fn every_metric_that_is_asked_for_is_one_that_a_program_has() {
    let sources = ["crates", "ztunnel/src", "control-plane/src", "cni-plugin/src"];
    let paths = sources.iter().flat_map(|folder| files(&root().join(folder), "rs"));
    let text: String = paths.map(|path| read(&path)).collect();
    let asked: BTreeSet<String> = queries().iter().flat_map(|query| metrics(query)).collect();
    assert!(asked.len() > 20, "{asked:?}");
    let unknown: Vec<&String> = asked.iter().filter(|name| !text.contains(&format!("\"{name}\""))).collect();
    assert!(unknown.is_empty(), "nobody has {unknown:?}");
}

/// What a page searches for in logs and metrics: each alternative of a pattern, and whether case is ignored.
fn searched(page: &str) -> Vec<(String, bool)> {
    let mut words = Vec::new();
    for command in page.lines().flat_map(|line| line.split(" | ").skip(1)).filter(|part| part.starts_with("grep ")) {
        let command = command.trim_start_matches("grep ");
        let (flags, pattern) = match command.split_once(' ') {
            Some((flags, pattern)) if flags.starts_with('-') => (flags, pattern),
            _ => ("", command),
        };
        let forgiving = flags.contains('i');
        words.extend(pattern.trim_matches('\'').split('|').map(|word| (word.to_owned(), forgiving)));
    }
    words
}

/// Whether a line of a program's source could put a word into its output: in a string, or as the name of a field of a log line.
fn says(line: &str, word: &str) -> bool {
    let in_string = line.split('"').skip(1).step_by(2).any(|text| text.contains(word));
    let field = line.split("tracing::").nth(1).is_some_and(|event| event.contains(&format!("{word} = ")));
    !line.trim_start().starts_with("//") && (in_string || field)
}

#[test]
fn every_word_that_a_page_searches_for_is_one_that_a_program_says() {
    let sources = ["crates", "ztunnel/src", "control-plane/src", "cni-plugin/src"];
    let paths = sources.iter().flat_map(|folder| files(&root().join(folder), "rs"));
    let text: String = paths.map(|path| read(&path)).collect();
    let lower = text.to_lowercase();
    let mut count = 0;
    for path in files(&root().join(RUNBOOKS), "md") {
        for (word, forgiving) in searched(&read(&path)) {
            count += 1;
            let is_level = ["ERROR", "WARN"].contains(&&*word);
            let (text, sought) = if forgiving { (&lower, word.to_lowercase()) } else { (&text, word.clone()) };
            let said = is_level || text.lines().any(|line| says(line, &sought));
            assert!(said, "{}: no program says `{word}`", path.display());
        }
    }
    assert!(count > 15, "{count}");
}

#[test]
fn a_word_counts_where_it_is_printed_and_not_where_it_is_a_name() {
    assert!(says(r#"    tracing::warn!(remedy = x.remedy, "{}", x);"#, "remedy"));
    assert!(says(r#"    warn!("the lease changed hands");"#, "lease"));
    assert!(!says("    let remedy = x.remedy;", "remedy"));
    assert!(!says(r#"    // as "lease" says"#, "lease"));
    assert_eq!(
        searched("kubectl logs x | grep -iE 'a|b c' | tail -2\nkubectl get y | grep z"),
        [("a".to_owned(), true), ("b c".to_owned(), true), ("z".to_owned(), false)]
    );
}

#[test]
fn every_alert_has_its_page_and_every_page_its_alert() {
    let mut named = BTreeSet::new();
    for alert in alerts() {
        let name = alert["alert"].as_str().expect("a name");
        let page = alert["annotations"]["runbook_url"].as_str().expect("a page");
        assert!(page.ends_with(&format!("/{RUNBOOKS}/{name}.md")), "{name}: {page}");
        named.insert(format!("{name}.md"));
    }
    let pages = files(&root().join(RUNBOOKS), "md");
    let pages: BTreeSet<String> =
        pages.iter().filter_map(|page| page.file_name()).map(|name| name.to_string_lossy().into_owned()).collect();
    assert_eq!(named, pages);
}

#[test]
fn every_page_says_what_it_is_what_is_felt_three_commands_and_the_way_out() {
    for path in files(&root().join(RUNBOOKS), "md") {
        let text = read(&path);
        for part in ["**Symptom.**", "**Meaning.**", "**What users feel.**", "**First commands**", "**Mend.**"] {
            assert!(text.contains(part), "{}: {part} is missing", path.display());
        }
        let commands = text.split("```").nth(1).expect("commands").lines().skip(1).count();
        assert_eq!(commands, 3, "{}", path.display());
    }
}
