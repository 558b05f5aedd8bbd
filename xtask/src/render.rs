//! `deploy/rendered/`: the chart's manifests for each platform, for those who have no helm, `fairway install` among them.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, ensure};
use clap::Args;
use serde_json::Value;

use crate::generated::Generated;

const CHART: &str = "deploy/charts/fairway";
const PLATFORMS: &str = "deploy/charts/fairway/files/platforms.yaml";
const RENDERED: &str = "deploy/rendered";
/// Every switch on. Nobody installs that; it has to render.
const EVERYTHING: &str = "deploy/charts/fairway/ci/everything-values.yaml";
/// What the chart may take for granted in these files; a cluster's own version is asked by `helm install` alone.
const KUBERNETES: &str = "1.34.0";

#[derive(Args, Debug)]
pub(crate) struct Render {
    /// Write nothing; fail with the differences if there are any.
    #[arg(long)]
    check: bool,
    #[arg(long, env = "HELM", default_value = "helm", value_name = "PROGRAM")]
    helm: PathBuf,
}

impl Render {
    pub(crate) fn run(&self, root: &Path) -> anyhow::Result<()> {
        let rendered = self.rendered(root)?;
        parse(&self.template(root, &["--values", EVERYTHING])?).context(EVERYTHING)?;
        Generated { folder: RENDERED, command: "cargo xtask render", files: rendered }.put(root, self.check)
    }

    /// File name to content.
    fn rendered(&self, root: &Path) -> anyhow::Result<BTreeMap<String, String>> {
        // Hooks are for helm alone: applied, they would act at once.
        const NO_HOOKS: &str = "--no-hooks";
        let mut files = BTreeMap::from([("default.yaml".to_owned(), self.template(root, &[NO_HOOKS])?)]);
        for platform in platforms(root)? {
            let values = format!("global.platform={platform}");
            files.insert(format!("{platform}.yaml"), self.template(root, &[NO_HOOKS, "--set", &values])?);
        }
        Ok(files)
    }

    fn template(&self, root: &Path, values: &[&str]) -> anyhow::Result<String> {
        let mut helm = Command::new(&self.helm);
        helm.args(["template", "fairway", CHART, "--namespace", "istio-system", "--kube-version", KUBERNETES]);
        let output = helm.args(values).current_dir(root).output().with_context(|| {
            format!("cannot run `{}`: install Helm 3, or say with --helm where it is", self.helm.display())
        })?;
        ensure!(output.status.success(), "helm template: {}", String::from_utf8_lossy(&output.stderr).trim());
        let text = String::from_utf8(output.stdout).context("helm template wrote no UTF-8")?;
        Ok(format!("# Written by `cargo xtask render`. Change {CHART} instead.\n{}", tidy(&text)))
    }
}

/// Whatever version of helm wrote it: no blanks at the ends of lines, no empty lines at the end.
fn tidy(text: &str) -> String {
    let lines: Vec<&str> = text.trim_end().lines().map(str::trim_end).collect();
    lines.join("\n") + "\n"
}

fn parse(text: &str) -> anyhow::Result<Vec<Value>> {
    let mut objects = Vec::new();
    for document in text.split("\n---\n") {
        let object: Value = serde_saphyr::from_str(document).with_context(|| format!("no YAML:\n{document}"))?;
        if !object.is_null() {
            objects.push(object);
        }
    }
    Ok(objects)
}

fn platforms(root: &Path) -> anyhow::Result<Vec<String>> {
    let text = fs::read_to_string(root.join(PLATFORMS)).context(PLATFORMS)?;
    let table: BTreeMap<String, Value> = serde_saphyr::from_str(&text).context(PLATFORMS)?;
    Ok(table.into_keys().collect())
}

#[cfg(test)]
mod tests;
