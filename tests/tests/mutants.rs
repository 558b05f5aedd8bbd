//! The lists of deliberate faults in `tests/mutants/` are about the code as it is, and `docs/compatibility.md` names tests that exist
//! and that such a fault was made for. Planting them takes hours and is `.ci/mutants`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// What `docs/compatibility.md` calls the crates whose tests it names.
const CRATES: [(&str, &str); 10] = [
    ("core", "mesh-core"),
    ("xds", "mesh-xds"),
    ("id", "mesh-identity"),
    ("hbone", "mesh-hbone"),
    ("net", "mesh-net"),
    ("zt", "ztunnel"),
    ("proxy", "ztunnel"),
    ("rt", "mesh-runtime"),
    ("cni", "cni-plugin"),
    ("cp", "control-plane"),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[derive(Default)]
struct Mutant {
    name: String,
    file: String,
    /// Crate and full name.
    tests: Vec<(String, String)>,
    old: Vec<String>,
    new: Vec<String>,
}

fn mutants() -> Vec<Mutant> {
    let mut mutants: Vec<Mutant> = Vec::new();
    let lists = fs::read_dir(root().join("tests/mutants")).expect("the folder of lists");
    let lists =
        lists.map(|entry| entry.expect("entry").path()).filter(|path| path.extension().is_some_and(|e| e == "txt"));
    for path in lists {
        let text = read(&path);
        for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            if let Some(name) = line.strip_prefix("mutant ") {
                mutants.push(Mutant { name: name.to_owned(), ..Mutant::default() });
                continue;
            }
            let mutant = mutants.last_mut().expect("a list begins with a mutant");
            match line.split_at(1) {
                ("-", code) => mutant.old.push(code.trim().to_owned()),
                ("+", code) => mutant.new.push(code.trim().to_owned()),
                _ => mutant.line(line),
            }
        }
    }
    mutants
}

impl Mutant {
    fn line(&mut self, line: &str) {
        if let Some(file) = line.strip_prefix("file ") {
            self.file = file.to_owned();
            return;
        }
        let words: Vec<&str> = line.split(' ').collect();
        let (["test", krate, "--lib", names @ ..] | ["test", krate, "--test" | "--bin", _, names @ ..]) = &words[..]
        else {
            panic!("{}: cannot read: {line}", self.name)
        };
        self.tests.extend(names.iter().map(|name| ((*krate).to_owned(), (*name).to_owned())));
    }

    fn occurrences(&self) -> usize {
        let text = read(&root().join(&self.file));
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        lines.windows(self.old.len().max(1)).filter(|window| *window == self.old).count()
    }
}

/// Names of functions in the sources of each crate.
struct Functions(BTreeMap<String, BTreeSet<String>>);

impl Functions {
    fn new() -> Self {
        let metadata = cargo_metadata::MetadataCommand::new().manifest_path(root().join("Cargo.toml")).no_deps().exec();
        let packages = metadata.expect("cargo metadata runs in a checkout").packages;
        let of = |package: &cargo_metadata::Package| {
            let mut names = BTreeSet::new();
            let folder = package.manifest_path.parent().expect("a package has a folder");
            ["src", "tests"].iter().for_each(|part| collect(folder.join(part).as_std_path(), &mut names));
            (package.name.to_string(), names)
        };
        Self(packages.iter().map(of).collect())
    }

    fn has(&self, krate: &str, test: &str) -> bool {
        let function = test.rsplit("::").next().unwrap_or(test);
        self.0.get(krate).is_some_and(|names| names.contains(function))
    }
}

fn collect(folder: &Path, names: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let path = entry.expect("entry").path();
        if path.is_dir() {
            collect(&path, names);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = read(&path);
            let functions = text.split("fn ").skip(1).filter_map(|after| after.split(['(', '<']).next());
            names.extend(functions.map(str::to_owned));
        }
    }
}

/// Crate and test of each name in the last column of the tables about upstream's protocol.
fn documented() -> Vec<(&'static str, String)> {
    let text = read(&root().join("docs/compatibility.md"));
    let tables = text.split("## ztunnel's protocol").nth(1).expect("the part about upstream's protocol");
    let tables = tables.split("## What our tunnels were tried with").next().unwrap_or_default();
    let mut found = Vec::new();
    for row in tables.lines().filter(|line| line.starts_with("| ")) {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").collect();
        let [_, _, tests] = cells[..] else { continue };
        let mut krate = None;
        for (index, part) in tests.split('`').enumerate() {
            if index % 2 == 1 {
                let krate = krate.unwrap_or_else(|| panic!("no crate before `{part}`"));
                found.push((krate, part.to_owned()));
            } else if let Some(short) = part.trim_matches([' ', ',', ';', '|']).split_whitespace().last() {
                krate = CRATES.iter().find(|(name, _)| *name == short).map(|(_, krate)| *krate);
            }
        }
    }
    found
}

#[test]
fn every_deliberate_fault_can_be_planted_and_names_tests_that_exist() {
    let (mutants, functions) = (mutants(), Functions::new());
    let mut wrong = Vec::new();
    let mut names = BTreeSet::new();
    for mutant in &mutants {
        let Mutant { name, file, tests, old, new } = mutant;
        if !names.insert(name) {
            wrong.push(format!("{name}: this name is used twice"));
        }
        if mutant.occurrences() != 1 || old == new || old.is_empty() {
            wrong.push(format!("{name}: its old lines are not in {file} exactly once, or its new ones are the same"));
        }
        if tests.is_empty() {
            wrong.push(format!("{name}: names no test"));
        }
        let missing = tests.iter().filter(|(krate, test)| !functions.has(krate, test));
        wrong.extend(missing.map(|(krate, test)| format!("{name}: {krate} has no test {test}")));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_test_in_the_compatibility_tables_exists_and_has_a_fault_to_notice() {
    let functions = Functions::new();
    let noticed: BTreeSet<(String, String)> = mutants()
        .into_iter()
        .flat_map(|mutant| mutant.tests)
        .map(|(krate, test)| (krate, test.rsplit("::").next().unwrap_or_default().to_owned()))
        .collect();
    let documented = documented();
    assert!(documented.len() > 100, "the tables are not read: {documented:?}");
    let mut wrong = BTreeSet::new();
    for (krate, test) in documented {
        if !functions.has(krate, &test) {
            wrong.insert(format!("{krate} has no test {test}"));
        } else if !noticed.contains(&(krate.to_owned(), test.clone())) {
            wrong.insert(format!("{krate}: {test} is named by no entry of tests/mutants"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.into_iter().collect::<Vec<_>>().join("\n"));
}
