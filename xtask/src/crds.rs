//! `deploy/crds/`: the definitions as `fairwayd` has them, one a file, for the chart.

use std::{
    collections::BTreeMap,
    env,
    ffi::OsString,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, ensure};
use clap::Args;
use serde_json::Value;

use crate::generated::Generated;

const FOLDER: &str = "deploy/crds";

#[derive(Args, Debug)]
pub(crate) struct Crds {
    /// Write nothing; fail with the differences if there are any.
    #[arg(long)]
    check: bool,
}

impl Crds {
    pub(crate) fn run(&self, root: &Path) -> anyhow::Result<()> {
        let files = files(&printed(root)?)?;
        Generated { folder: FOLDER, command: "cargo xtask crds", files }.put(root, self.check)
    }
}

/// What the program of this checkout prints.
fn printed(root: &Path) -> anyhow::Result<String> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut fairwayd = Command::new(cargo);
    fairwayd.args([
        "run",
        "--quiet",
        "--locked",
        "--package",
        "control-plane",
        "--bin",
        "fairwayd",
        "--",
        "definitions",
    ]);
    let output = fairwayd.current_dir(root).stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    ensure!(output.status.success(), "fairwayd definitions: {}", output.status);
    String::from_utf8(output.stdout).context("fairwayd definitions wrote no UTF-8")
}

fn files(printed: &str) -> anyhow::Result<BTreeMap<String, String>> {
    let mut files = BTreeMap::new();
    for document in printed.split("---\n").filter(|document| !document.is_empty()) {
        let definition: Value = serde_saphyr::from_str(document).context("fairwayd definitions")?;
        let name = definition["metadata"]["name"].as_str().context("a definition without a name")?;
        let text = format!("# Written by `cargo xtask crds`. Change control-plane/src/crd instead.\n{document}");
        files.insert(format!("{name}.yaml"), text);
    }
    Ok(files)
}
