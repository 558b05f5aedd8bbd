//! What has to be written into the folder of CNI configurations, if anything.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::conflist::{Conf, ConfError};

/// How our plugin comes into the chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Our entry is put into the primary configuration.
    Chained,
    /// A copy of the primary with our entry, in a file that sorts before it.
    Owned { file: String },
    /// A file of our plugin alone, for a meta plugin such as Multus.
    Standalone { file: String },
}

/// The folder should be so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    InOrder,
    /// Nothing can be done until something changes; why.
    Wait(String),
    Write {
        file: String,
        text: String,
        /// A file that the new one replaces.
        remove: Option<String>,
        why: String,
    },
}

/// The files of the folder that count, by name.
pub type Files = BTreeMap<String, Content>;

/// The text of a file, or why it is not known here. A runtime may know better, and use it.
pub type Content = Result<String, String>;

/// As runtimes see it, which take the first by name.
pub fn is_conf(name: &str) -> bool {
    [".conf", ".conflist", ".json"].iter().any(|end| name.ends_with(end)) && !name.starts_with('.')
}

/// `primary` is the configured name of the primary configuration; it also means its siblings (`.conf`, `.conflist`, `.json`).
pub fn plan(files: &Files, mode: &Mode, primary: Option<&str>, entry: &Value) -> Plan {
    match mode {
        Mode::Chained => chained(files, primary, entry),
        Mode::Owned { file } => owned(files, file, primary, entry),
        Mode::Standalone { file } => standalone(files, file, entry),
    }
}

/// What to say of files that come before the primary and that no runtime can use: CRI-O passes over them, as we do, and containerd does
/// not.
pub fn passed_over(files: &Files, mode: &Mode, primary: Option<&str>) -> Option<String> {
    let own = match mode {
        Mode::Chained => None,
        Mode::Owned { file } => Some(file.as_str()),
        Mode::Standalone { .. } => return None,
    };
    let Found { unusable, .. } = find(files, primary, own).ok().filter(|found| !found.unusable.is_empty())?;
    Some(format!("{}: containerd starts no pods while this comes first; correct or remove it", unusable.join("; ")))
}

fn chained(files: &Files, primary: Option<&str>, entry: &Value) -> Plan {
    let Found { name, conf, .. } = match find(files, primary, None) {
        Ok(found) => found,
        Err(wait) => return Plan::Wait(wait),
    };
    if conf.has(entry) {
        return Plan::InOrder;
    }
    let why = if conf.has_any() { "our entry is another" } else { "our entry is missing" };
    let file = as_list(name, &conf);
    let remove = (file != name).then(|| name.to_owned());
    Plan::Write { file, text: conf.with(entry), remove, why: format!("{name}: {why}") }
}

fn owned(files: &Files, own: &str, primary: Option<&str>, entry: &Value) -> Plan {
    let Found { name, conf, .. } = match find(files, primary, Some(own)) {
        Ok(found) => found,
        Err(wait) => return Plan::Wait(wait),
    };
    if own > name {
        return Plan::Wait(format!("{own} must sort before {name}, or no runtime reads it: choose another name"));
    }
    let text = conf.with(entry);
    let why = match files.get(own) {
        Some(Ok(found)) if same(found, &text) => return Plan::InOrder,
        Some(_) => format!("{own} is not {name} with our entry"),
        None => format!("{own} is missing"),
    };
    Plan::Write { file: own.to_owned(), text, remove: None, why }
}

fn standalone(files: &Files, own: &str, entry: &Value) -> Plan {
    let mut alone = entry.clone();
    alone["cniVersion"] = json!("0.3.1");
    let text = format!("{alone:#}\n");
    let why = match files.get(own) {
        Some(Ok(found)) if same(found, &text) => return Plan::InOrder,
        Some(_) => format!("{own} is another"),
        None => format!("{own} is missing"),
    };
    Plan::Write { file: own.to_owned(), text, remove: None, why }
}

/// By meaning: somebody may have formatted it anew.
fn same(a: &str, b: &str) -> bool {
    let value = |text: &str| serde_json::from_str::<Value>(text).ok();
    value(a).is_some_and(|a| Some(a) == value(b))
}

struct Found<'a> {
    name: &'a str,
    conf: Conf,
    /// What comes before it, and why it is none.
    unusable: Vec<String>,
}

/// The first usable configuration by name, as runtimes choose it. One that we cannot judge stands in the way of all behind it: a runtime
/// that can would start its pods without us.
fn find<'a>(files: &'a Files, wanted: Option<&str>, own: Option<&str>) -> Result<Found<'a>, String> {
    let is_candidate = |name: &str| Some(name) != own && wanted.is_none_or(|w| stem(w) == stem(name));
    let mut unusable = Vec::new();
    for (name, content) in files.iter().filter(|(name, _)| is_candidate(name)) {
        let parsed = match content {
            Ok(text) => Conf::parse(text),
            Err(why) => return Err(in_the_way(name, why)),
        };
        match parsed {
            // Ours alone, left behind by another mode.
            Ok(conf) if conf.without().is_none() => {}
            Ok(conf) if conf.is_list() == name.ends_with(".conflist") => return Ok(Found { name, conf, unusable }),
            Ok(conf) if conf.is_list() => unusable.push(format!("{name}: a list of plugins has to be in a .conflist")),
            Ok(_) => unusable.push(format!("{name}: {}", ConfError::NoPlugin)),
            // The last one counts for a runtime.
            Err(error @ ConfError::Twice(_)) => return Err(in_the_way(name, &error.to_string())),
            Err(error) => unusable.push(format!("{name}: {error}")),
        }
    }
    let which = wanted.map_or_else(|| "primary CNI configuration".to_owned(), |w| format!("{w} (CNI_CONF_NAME)"));
    let unusable = if unusable.is_empty() { String::new() } else { format!("; unusable: {}", unusable.join("; ")) };
    Err(format!("there is no {which} yet{unusable}"))
}

fn in_the_way(name: &str, why: &str) -> String {
    format!("{name}: {why}; a runtime may use it all the same, and start pods without us: correct or remove it")
}

fn stem(name: &str) -> &str {
    [".conflist", ".conf", ".json"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name)
}

fn as_list(name: &str, conf: &Conf) -> String {
    if conf.is_list() { name.to_owned() } else { format!("{}.conflist", stem(name)) }
}

/// What is to be done with one file when we leave: `None` to delete it, the text it should have, or nothing.
pub fn without_us(name: &str, text: &str, mode: &Mode) -> Option<Option<String>> {
    let is_own = matches!(mode, Mode::Owned { file } | Mode::Standalone { file } if file == name);
    match Conf::parse(text) {
        Ok(_) if is_own => Some(None),
        Ok(conf) if conf.has_any() || conf.without().is_none() => Some(conf.without()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BRIDGE: &str = r#"{"name":"n","cniVersion":"1.0.0","plugins":[{"type":"bridge"}]}"#;
    const SINGLE: &str = r#"{"name":"n","cniVersion":"0.4.0","type":"bridge"}"#;

    fn entry() -> Value {
        json!({"name": "fairway-cni", "type": "fairway-cni"})
    }

    fn files(files: &[(&str, &str)]) -> Files {
        files.iter().map(|(name, text)| ((*name).to_owned(), Ok((*text).to_owned()))).collect()
    }

    /// Carries the plan out and names the file written; a second look must find everything in order.
    fn settle(mut files: Files, mode: &Mode, primary: Option<&str>) -> (String, Files) {
        let Plan::Write { file, text, remove, .. } = plan(&files, mode, primary, &entry()) else {
            panic!("nothing to write: {:?}", plan(&files, mode, primary, &entry()));
        };
        files.insert(file.clone(), Ok(text));
        remove.map(|old| files.remove(&old));
        assert_eq!(plan(&files, mode, primary, &entry()), Plan::InOrder, "{files:?}");
        (file, files)
    }

    #[test]
    fn the_first_usable_file_by_name_is_the_primary() {
        let cases: [(&[(&str, &str)], &str); 7] = [
            (&[("20-b.conflist", BRIDGE), ("10-a.conflist", BRIDGE)], "10-a.conflist"),
            (
                &[("05-bad.conflist", "{"), ("06-none.conflist", r#"{"plugins":[]}"#), ("10-a.conflist", BRIDGE)],
                "10-a.conflist",
            ),
            (&[("05-untyped.conf", "{}"), ("10-a.conflist", BRIDGE)], "10-a.conflist"),
            (&[("05-single.conflist", SINGLE), ("10-a.conflist", BRIDGE)], "10-a.conflist"),
            (&[("05-list.conf", BRIDGE), ("10-a.conflist", BRIDGE)], "10-a.conflist"),
            (&[("10-a.conf", SINGLE)], "10-a.conflist"),
            (&[("10-a.json", SINGLE), ("20-b.conflist", BRIDGE)], "10-a.conflist"),
        ];
        for (folder, expected) in cases {
            assert_eq!(settle(files(folder), &Mode::Chained, None).0, expected);
        }
        let (_, converted) = settle(files(&[("10-a.conf", SINGLE)]), &Mode::Chained, None);
        assert!(!converted.contains_key("10-a.conf"), "or a runtime would read it first");
    }

    #[test]
    fn what_no_runtime_can_use_is_passed_over_and_told() {
        let bad = files(&[("05-bad.conflist", "{"), ("10-a.conflist", BRIDGE), ("20-bad.conflist", "{")]);
        let told = passed_over(&bad, &Mode::Chained, None).expect("something to say");
        assert!(told.starts_with("05-bad.conflist: it is not a JSON object") && !told.contains("20-bad"), "{told}");
        assert!(told.contains("containerd starts no pods"), "{told}");
        let own = Mode::Owned { file: "02-us.conflist".into() };
        assert!(passed_over(&bad, &own, None).is_some());
        let alone = Mode::Standalone { file: "YYY-us.conf".into() };
        for (mode, primary) in [(&alone, None), (&Mode::Chained, Some("10-a.conflist"))] {
            assert_eq!(passed_over(&bad, mode, primary), None, "{mode:?} {primary:?}");
        }
        assert_eq!(passed_over(&files(&[("10-a.conflist", BRIDGE)]), &Mode::Chained, None), None);
    }

    #[test]
    fn what_only_a_runtime_could_use_stands_in_the_way_of_all_behind_it() {
        let first = |content: Content| {
            let mut folder = files(&[("10-a.conflist", BRIDGE)]);
            folder.insert("05-first.conflist".into(), content);
            folder
        };
        let twice = r#"{"name":"n","plugins":[],"plugins":[{"type":"bridge"}]}"#;
        let own = Mode::Owned { file: "02-us.conflist".into() };
        for (content, why) in [(Err("it is not UTF-8".to_owned()), "not UTF-8"), (Ok(twice.to_owned()), "two fields")] {
            for mode in [&Mode::Chained, &own] {
                let Plan::Wait(told) = plan(&first(content.clone()), mode, None, &entry()) else { panic!("waits") };
                assert!(told.starts_with("05-first.conflist") && told.contains(why), "{told}");
            }
            let behind = plan(&first(content), &Mode::Chained, Some("10-a.conflist"), &entry());
            assert!(matches!(behind, Plan::Write { .. }), "the operator says which it is");
        }
        let mut last = files(&[("10-a.conflist", BRIDGE)]);
        last.insert("99-last.conflist".into(), Err("it is not UTF-8".into()));
        assert!(matches!(plan(&last, &Mode::Chained, None, &entry()), Plan::Write { .. }));
    }

    #[test]
    fn a_configured_name_means_its_sibling_too() {
        let folder = files(&[("10-a.conflist", BRIDGE), ("20-b.conflist", BRIDGE)]);
        assert_eq!(settle(folder.clone(), &Mode::Chained, Some("20-b.conf")).0, "20-b.conflist");
        let Plan::Wait(why) = plan(&folder, &Mode::Chained, Some("30-c.conf"), &entry()) else { panic!("waits") };
        assert!(why.contains("30-c.conf (CNI_CONF_NAME)"), "{why}");
    }

    #[test]
    fn without_a_primary_it_waits_and_says_what_is_unusable() {
        let Plan::Wait(why) = plan(&files(&[("10.conflist", "{")]), &Mode::Chained, None, &entry()) else {
            panic!("waits")
        };
        assert!(why.contains("10.conflist") && why.contains("not a JSON object"), "{why}");
        assert!(matches!(plan(&Files::new(), &Mode::Chained, None, &entry()), Plan::Wait(_)));
    }

    #[test]
    fn an_own_file_follows_its_primary_and_must_sort_first() {
        let mode = Mode::Owned { file: "02-fairway-cni.conflist".into() };
        let (file, mut folder) = settle(files(&[("10-a.conflist", BRIDGE)]), &mode, None);
        assert_eq!(file, "02-fairway-cni.conflist");
        assert_eq!(folder["10-a.conflist"], Ok(BRIDGE.into()), "the primary is not touched");
        folder.insert("10-a.conflist".into(), Ok(BRIDGE.replace("bridge", "ptp")));
        let (_, folder) = settle(folder, &mode, None);
        assert!(folder["02-fairway-cni.conflist"].as_ref().is_ok_and(|text| text.contains("ptp")));
        let late = Mode::Owned { file: "20-us.conflist".into() };
        let Plan::Wait(why) = plan(&folder, &late, Some("10-a.conflist"), &entry()) else { panic!("waits") };
        assert!(why.contains("must sort before"), "{why}");
    }

    #[test]
    fn a_standalone_file_needs_no_primary() {
        let mode = Mode::Standalone { file: "YYY-fairway-cni.conf".into() };
        let (file, folder) = settle(Files::new(), &mode, None);
        assert!(folder[&file].clone().unwrap().contains(r#""cniVersion": "0.3.1""#));
    }

    #[test]
    fn leaving_takes_out_what_is_ours_in_every_mode() {
        let own = Mode::Owned { file: "02-us.conflist".into() };
        let alone = Mode::Standalone { file: "YYY-us.conf".into() };
        let chained = settle(files(&[("10.conflist", BRIDGE)]), &Mode::Chained, None).1["10.conflist"].clone().unwrap();
        let left = without_us("10.conflist", &chained, &own).flatten().expect("the others stay");
        assert!(left.contains("bridge") && !left.contains("fairway-cni"));
        assert_eq!(without_us("02-us.conflist", &chained, &own), Some(None));
        let single = format!("{:#}", entry());
        assert_eq!(without_us("YYY-us.conf", &single, &alone), Some(None));
        assert_eq!(without_us("10.conflist", BRIDGE, &Mode::Chained), None);
        assert_eq!(without_us("10.conflist", "{", &own), None);
    }
}
