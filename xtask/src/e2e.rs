//! Fairway on a real Kubernetes, from images to evidence: builds, brings the images onto the nodes, and runs `tests/kube`.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, ensure};
use clap::Args;

use crate::images::Images;

#[derive(Args, Debug)]
pub(crate) struct E2e {
    /// Start a cluster on this machine with the tool in this folder (`cluster up | kubeconfig | load | image`), and test on that. Without
    /// it the cluster is the one that `kubectl` speaks to, and its nodes must be able to pull the images.
    #[arg(long, value_name = "DIR", num_args = 0..=1, default_missing_value = "../shared/cluster")]
    local: Option<PathBuf>,
    /// Cargo's profile for the images and programs.
    #[arg(long, default_value = "quick")]
    profile: String,
    /// The images are there already.
    #[arg(long)]
    no_images: bool,
    /// For the test itself; `--help` lists what it takes.
    #[arg(last = true)]
    arguments: Vec<String>,
}

const TAG: &str = "e2e";
const TOOLS: &str = "fairway-tools:e2e";

impl E2e {
    pub(crate) fn run(&self, root: &Path) -> anyhow::Result<()> {
        let target_dir = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
        let profile = if self.profile == "dev" { "debug" } else { &self.profile };
        let programs = root.join(target_dir).join(profile);
        run(cargo(root).args([
            "build",
            "--locked",
            "--profile",
            &self.profile,
            "--package",
            "cli",
            "--package",
            "kube-tests",
        ]))?;
        let mut test = Command::new(programs.join("kube-e2e"));
        if let Some(folder) = &self.local {
            let tool = fs::canonicalize(root.join(folder).join("cluster"))
                .with_context(|| format!("--local: {} has no program `cluster`", folder.display()))?;
            run(Command::new(&tool).arg("up"))?;
            if !self.no_images {
                let load = format!("{} load", tool.display());
                Images::for_test(TAG, &self.profile, &load).run(root)?;
                run(Command::new(&tool)
                    .args(["image", TOOLS])
                    .arg(programs.join("fairway"))
                    .args(["--base", "toolbox"]))?;
            }
            let kubeconfig = Command::new(&tool).arg("kubeconfig").output()?;
            let path = String::from_utf8(kubeconfig.stdout)?.trim().to_owned();
            test.env("KUBECONFIG", path).env("PATH", path_with(&kubectl_of(&tool, root)?)?);
        }
        test.arg("--fairway").arg(programs.join("fairway")).args(&self.arguments);
        run(&mut test)
    }
}

fn cargo(root: &Path) -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root);
    cargo
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command.status().with_context(|| format!("cannot run `{program}`"))?;
    ensure!(status.success(), "`{program}` ended with {status}");
    Ok(())
}

/// A folder with a `kubectl` that is the cluster tool's.
fn kubectl_of(tool: &Path, root: &Path) -> anyhow::Result<PathBuf> {
    let folder = root.join("target/e2e");
    fs::create_dir_all(&folder)?;
    let program = folder.join("kubectl");
    fs::write(&program, format!("#!/bin/sh\nexec '{}' kubectl \"$@\"\n", tool.display()))?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    Ok(folder)
}

fn path_with(folder: &Path) -> anyhow::Result<std::ffi::OsString> {
    let path = env::var_os("PATH").unwrap_or_default();
    Ok(env::join_paths([folder.to_owned()].into_iter().chain(env::split_paths(&path)))?)
}
