//! `kubectl`, as a user would run it: what it prints is what they would see.

use std::{
    io::Write,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use serde_json::Value;

/// Longer than any single call should take; `kubectl` is told, so that it says what it waited for.
const REQUEST_LIMIT: &str = "--request-timeout=60s";

/// Runs `kubectl` and returns what it printed.
///
/// # Errors
/// With its standard error when it fails.
pub(crate) fn run(args: &[&str]) -> anyhow::Result<String> {
    output(&command(args).output()?, args)
}

/// As [`run`], with something on its standard input.
pub(crate) fn run_with_input(args: &[&str], input: &str) -> anyhow::Result<String> {
    let mut child = command(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes())?;
    }
    output(&child.wait_with_output()?, args)
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new("kubectl");
    command.arg(REQUEST_LIMIT).args(args).stdin(Stdio::null());
    command
}

fn output(output: &Output, args: &[&str]) -> anyhow::Result<String> {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!("kubectl {}: {}{}", args.join(" "), text, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(text)
}

/// Applies a manifest; `{{image}}` stands for the image of the test programs.
pub(crate) fn apply(manifest: &str, image: &str) -> anyhow::Result<()> {
    run_with_input(&["apply", "-f", "-"], &manifest.replace("{{image}}", image)).map(drop)
}

/// `kubectl get … -o json`.
pub(crate) fn get(args: &[&str]) -> anyhow::Result<Value> {
    let text = run(&[&["get", "-o", "json"], args].concat())?;
    serde_json::from_str(&text).context("kubectl's JSON")
}

/// The items of a list.
pub(crate) fn list(args: &[&str]) -> anyhow::Result<Vec<Value>> {
    Ok(get(args)?["items"].as_array().cloned().unwrap_or_default())
}

/// Waits until a Deployment, DaemonSet or StatefulSet is rolled out.
pub(crate) fn rolled_out(namespace: &str, what: &str) -> anyhow::Result<()> {
    let args = ["-n", namespace, "rollout", "status", what, "--timeout=180s"];
    // `rollout status` watches; the limit of a single request would end it.
    let printed = Command::new("kubectl").args(args).stdin(Stdio::null()).output()?;
    output(&printed, &args).map(drop)
}

/// Runs a command in a pod and returns what it printed on standard output.
pub(crate) fn exec(namespace: &str, pod: &str, command: &[&str]) -> anyhow::Result<String> {
    let printed = exec_command(namespace, pod, command).output()?;
    output(&printed, &[&["exec", pod, "--"], command].concat())
}

/// As [`exec`], without waiting for its end.
pub(crate) fn start_exec(namespace: &str, pod: &str, command: &[&str]) -> anyhow::Result<Running> {
    let child = exec_command(namespace, pod, command).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    Ok(Running { child, what: format!("exec {pod} -- {}", command.join(" ")) })
}

fn exec_command(namespace: &str, pod: &str, command: &[&str]) -> Command {
    let mut exec = Command::new("kubectl");
    exec.args(["-n", namespace, "exec", pod, "--"]).args(command).stdin(Stdio::null());
    exec
}

/// A command in a pod that goes on meanwhile.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    what: String,
}

impl Running {
    /// Waits for its end; what it printed.
    pub(crate) fn finish(self) -> anyhow::Result<String> {
        output(&self.child.wait_with_output()?, &[&self.what])
    }
}

/// Between two questions to a cluster.
const AGAIN: Duration = Duration::from_millis(200);

/// Asks until the answer is good; the last bad one is the error.
pub(crate) fn eventually<T>(
    what: &str,
    patience: Duration,
    mut ask: impl FnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + patience;
    loop {
        match ask() {
            Ok(answer) => return Ok(answer),
            Err(error) if Instant::now() > deadline => {
                return Err(error.context(format!("waited {} s for {what}", patience.as_secs())));
            }
            Err(_) => std::thread::sleep(AGAIN),
        }
    }
}
