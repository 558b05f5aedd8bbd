//! Folders of YAML that commands write and people commit: written, or compared with what is there.

use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, bail};

pub(crate) struct Generated {
    /// In the checkout. Every `*.yaml` in it is written by the command.
    pub(crate) folder: &'static str,
    /// What writes it.
    pub(crate) command: &'static str,
    /// File name to content.
    pub(crate) files: BTreeMap<String, String>,
}

impl Generated {
    /// With `check` nothing is written, and any difference is an error.
    pub(crate) fn put(&self, root: &Path, check: bool) -> anyhow::Result<()> {
        let folder = root.join(self.folder);
        if check { self.check(&folder) } else { self.write(&folder) }
    }

    fn write(&self, folder: &Path) -> anyhow::Result<()> {
        fs::create_dir_all(folder)?;
        for name in self.stale(folder)? {
            fs::remove_file(folder.join(name))?;
        }
        for (name, text) in &self.files {
            fs::write(folder.join(name), text).with_context(|| format!("cannot write {name}"))?;
        }
        println!("{}: {} files", folder.display(), self.files.len());
        Ok(())
    }

    fn check(&self, folder: &Path) -> anyhow::Result<()> {
        let mut wrong = self.stale(folder)?;
        for (name, text) in &self.files {
            let path = folder.join(name);
            if fs::read_to_string(&path).is_ok_and(|there| there == *text) {
                continue;
            }
            print_difference(&path, text)?;
            wrong.push(name.clone());
        }
        if wrong.is_empty() {
            return Ok(());
        }
        let Self { folder, command, .. } = self;
        bail!("{folder} is not what `{command}` writes ({}): run it and commit", wrong.join(", "))
    }

    /// Files that are written no more.
    fn stale(&self, folder: &Path) -> anyhow::Result<Vec<String>> {
        let Ok(entries) = fs::read_dir(folder) else { return Ok(Vec::new()) };
        let mut names = Vec::new();
        for entry in entries {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.retain(|name| name.ends_with(".yaml") && !self.files.contains_key(name));
        names.sort();
        Ok(names)
    }
}

fn print_difference(path: &Path, text: &str) -> anyhow::Result<()> {
    let mut diff = Command::new("diff")
        .args(["--unified", "--new-file"])
        .arg(path)
        .arg("-")
        .stdin(Stdio::piped())
        .spawn()
        .context("cannot run `diff`")?;
    if let Some(mut input) = diff.stdin.take() {
        input.write_all(text.as_bytes())?;
    }
    diff.wait()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generated(files: &[(&str, &str)]) -> Generated {
        let files = files.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect();
        Generated { folder: "out", command: "cargo xtask x", files }
    }

    #[test]
    fn what_was_written_passes_the_check_and_any_difference_fails_it() {
        let root = tempfile::tempdir().expect("a folder");
        let files = generated(&[("a.yaml", "a: 1\n"), ("b.yaml", "b: 1\n")]);
        files.put(root.path(), true).expect_err("nothing is there yet");
        files.put(root.path(), false).expect("written");
        files.put(root.path(), true).expect("the same");

        let fewer = generated(&[("a.yaml", "a: 1\n")]);
        fewer.put(root.path(), true).expect_err("b.yaml is too much");
        let changed = generated(&[("a.yaml", "a: 2\n"), ("b.yaml", "b: 1\n")]);
        let told = changed.put(root.path(), true).expect_err("a.yaml differs").to_string();
        assert_eq!(told, "out is not what `cargo xtask x` writes (a.yaml): run it and commit");
    }

    #[test]
    fn only_yaml_is_removed() {
        let root = tempfile::tempdir().expect("a folder");
        generated(&[("old.yaml", "a: 1\n")]).put(root.path(), false).expect("written");
        fs::write(root.path().join("out/README.md"), "told by people\n").expect("written");
        generated(&[("new.yaml", "a: 1\n")]).put(root.path(), false).expect("written");
        let there = |name| root.path().join("out").join(name).exists();
        assert_eq!([there("old.yaml"), there("new.yaml"), there("README.md")], [false, true, true]);
    }
}
