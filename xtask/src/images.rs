//! The images, built without an engine: one static program each, put into an archive.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail, ensure};
use clap::Args;

use crate::archive::Image;

#[derive(Args, Debug)]
pub(crate) struct Images {
    /// Only these; may be repeated.
    #[arg(long, value_name = "NAME", value_parser = NAMES)]
    only: Vec<String>,
    /// What the chart's `global.hub` says.
    #[arg(long, default_value = "localhost")]
    hub: String,
    /// What the chart's `global.tag` says.
    #[arg(long, default_value = env!("CARGO_PKG_VERSION"))]
    tag: String,
    /// Where to put the archives.
    #[arg(long, value_name = "DIR", default_value = "target/images")]
    out: PathBuf,
    /// Cargo's profile; `quick` builds in a fraction of the time and runs slower.
    #[arg(long, default_value = "image")]
    profile: String,
    /// The machine the images are for, as Rust calls it; default: this one.
    #[arg(long, value_name = "TRIPLE")]
    target: Option<String>,
    /// Put the images onto the nodes of a cluster, by the command of `--with`.
    #[arg(long, requires = "with")]
    load: bool,
    /// A command that takes the archives as arguments, such as `kind load image-archive`.
    #[arg(long, value_name = "CMD", requires = "load")]
    with: Option<String>,
}

/// What an image is made of.
struct Recipe {
    name: &'static str,
    package: &'static str,
    user: &'static str,
    /// Program to its folder in the image; the first is the one that is started.
    programs: &'static [(&'static str, &'static str)],
}

const BIN: &str = "/usr/local/bin";
const ROOT: &str = "0:0";
const NOBODY_SPECIAL: &str = "1337:1337";

const RECIPES: [Recipe; 4] = [
    Recipe { name: "fairwayd", package: "control-plane", user: NOBODY_SPECIAL, programs: &[("fairwayd", BIN)] },
    Recipe { name: "ztunnel", package: "ztunnel", user: ROOT, programs: &[("ztunnel", BIN)] },
    Recipe {
        name: "fairway-node",
        package: "cni-plugin",
        user: ROOT,
        // The agent copies the second onto the node.
        programs: &[("fairway-node", BIN), ("fairway-cni", "/opt/cni/bin")],
    },
    // The command line, of which the examples are made.
    Recipe { name: "fairway", package: "cli", user: NOBODY_SPECIAL, programs: &[("fairway", BIN)] },
];
const NAMES: [&str; 4] = [RECIPES[0].name, RECIPES[1].name, RECIPES[2].name, RECIPES[3].name];

impl Images {
    /// Everything but the command line's image, straight onto a cluster's nodes.
    pub(crate) fn for_test(tag: &str, profile: &str, load: &str) -> Self {
        let programs = NAMES.into_iter().filter(|name| *name != "fairway");
        Self {
            only: programs.map(str::to_owned).collect(),
            hub: "localhost".to_owned(),
            tag: tag.to_owned(),
            out: "target/images".into(),
            profile: profile.to_owned(),
            target: None,
            load: true,
            with: Some(load.to_owned()),
        }
    }

    pub(crate) fn run(&self, root: &Path) -> anyhow::Result<()> {
        let target = match &self.target {
            Some(target) => target.clone(),
            None => host()?,
        };
        let architecture = architecture(&target)?;
        let recipes: Vec<&Recipe> =
            RECIPES.iter().filter(|r| self.only.is_empty() || self.only.iter().any(|name| name == r.name)).collect();
        let programs = self.build(root, &target, &recipes)?;
        let out = root.join(&self.out);
        fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
        let mut archives = Vec::new();
        for recipe in recipes {
            let path = out.join(format!("{}.tar", recipe.name));
            let bytes = self.image(recipe, architecture, &programs)?;
            fs::write(&path, &bytes).with_context(|| format!("cannot write {}", path.display()))?;
            println!("{}/{}:{}  {} MB  {}", self.hub, recipe.name, self.tag, bytes.len() / 1_000_000, path.display());
            archives.push(path);
        }
        if let Some(command) = &self.with { load(command, &archives) } else { Ok(()) }
    }

    /// Builds every program at once, and says where each is.
    fn build(&self, root: &Path, target: &str, recipes: &[&Recipe]) -> anyhow::Result<BTreeMap<&'static str, PathBuf>> {
        let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.args(["build", "--locked", "--profile", &self.profile, "--target", target]);
        for recipe in recipes {
            cargo.args(["--package", recipe.package]);
            for (program, _) in recipe.programs {
                cargo.args(["--bin", program]);
            }
        }
        // A target that is named, be it this machine's: flags are then not for build scripts and macros, which cannot be static.
        cargo.env("RUSTFLAGS", flags(root)).current_dir(root);
        let status = cargo.status().context("cannot run cargo")?;
        ensure!(status.success(), "cargo build failed");
        let target_dir = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
        let profile = if self.profile == "dev" { "debug" } else { &self.profile };
        let folder = root.join(target_dir).join(target).join(profile);
        let names = recipes.iter().flat_map(|recipe| recipe.programs).map(|(name, _)| *name);
        Ok(names.map(|name| (name, folder.join(name))).collect())
    }

    fn image(&self, recipe: &Recipe, architecture: &str, built: &BTreeMap<&str, PathBuf>) -> anyhow::Result<Vec<u8>> {
        let mut programs = BTreeMap::new();
        let paths: Vec<String> = recipe.programs.iter().map(|(name, folder)| format!("{folder}/{name}")).collect();
        for ((name, _), path) in recipe.programs.iter().zip(&paths) {
            let content = fs::read(&built[name]).with_context(|| format!("cannot read {}", built[name].display()))?;
            if let Some(interpreter) = interpreter(&content)? {
                bail!("{name} wants {interpreter}, which an empty image does not have: it is not linked statically");
            }
            programs.insert(path.as_str(), content);
        }
        let image = Image {
            title: recipe.name,
            names: &[format!("{}/{}:{}", self.hub, recipe.name, self.tag)],
            version: env!("CARGO_PKG_VERSION"),
            architecture,
            user: recipe.user,
            programs,
            entrypoint: &paths[0],
        };
        Ok(image.archive())
    }
}

/// Static, and without the paths of the machine it was built on.
fn flags(root: &Path) -> String {
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| env::home_dir().map(|home| home.join(".cargo"))).unwrap_or_default();
    let own = env::var("RUSTFLAGS").unwrap_or_default();
    let (root, home) = (root.display(), home.display());
    format!("{own} -C target-feature=+crt-static --remap-path-prefix={root}=/fairway --remap-path-prefix={home}=/cargo")
        .trim_start()
        .to_owned()
}

fn host() -> anyhow::Result<String> {
    let output = Command::new("rustc").arg("-vV").output().context("cannot run rustc")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).context("rustc -vV names no host")
}

fn architecture(target: &str) -> anyhow::Result<&'static str> {
    match target.split_once('-') {
        Some(("x86_64", _)) => Ok("amd64"),
        Some(("aarch64", _)) => Ok("arm64"),
        _ => bail!("--target {target}: images are for x86_64 and aarch64"),
    }
}

fn load(command: &str, archives: &[PathBuf]) -> anyhow::Result<()> {
    let mut words = command.split_whitespace();
    let program = words.next().context("--with is empty")?;
    let status = Command::new(program).args(words).args(archives).status();
    let status = status.with_context(|| format!("cannot run `{program}`"))?;
    ensure!(status.success(), "`{command}` failed: {status}");
    Ok(())
}

/// The loader that a program asks the kernel for; none is what makes it static. Of 64-bit little-endian ELF.
fn interpreter(elf: &[u8]) -> anyhow::Result<Option<String>> {
    const PT_INTERP: usize = 3;
    let number = |at: usize, bytes: usize| {
        let field = elf.get(at..at.checked_add(bytes)?)?;
        field.iter().rev().try_fold(0_usize, |sum, byte| Some(sum.checked_mul(256)? | usize::from(*byte)))
    };
    ensure!(elf.starts_with(b"\x7fELF\x02\x01"), "not a program of a 64-bit little-endian machine");
    let find = || {
        let (table, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
        for index in 0..count {
            let header = table.checked_add(index.checked_mul(size)?)?;
            if number(header, 4)? == PT_INTERP {
                let (start, length) = (number(header + 8, 8)?, number(header + 32, 8)?);
                let text = elf.get(start..start.checked_add(length)?)?;
                return Some(Some(String::from_utf8_lossy(text).trim_end_matches('\0').to_owned()));
            }
        }
        Some(None)
    };
    find().context("the program's headers are cut short")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_wants_a_loader_is_told_from_a_static_one() {
        // This very test is linked dynamically.
        let own = fs::read(env::current_exe().expect("a path")).expect("readable");
        let loader = interpreter(&own).expect("a program").expect("a loader");
        assert!(loader.contains("ld-linux"), "{loader}");

        let mut bare = own[..64].to_vec();
        bare[56..58].fill(0);
        assert_eq!(interpreter(&bare).expect("a program"), None);
        assert!(interpreter(&own[..64]).is_err());
        assert!(interpreter(b"#!/bin/sh").is_err());
    }

    #[test]
    fn targets_become_what_registries_call_them() {
        assert_eq!(architecture("x86_64-unknown-linux-gnu").expect("known"), "amd64");
        assert_eq!(architecture("aarch64-unknown-linux-musl").expect("known"), "arm64");
        assert!(architecture("riscv64gc-unknown-linux-gnu").is_err());
    }
}
