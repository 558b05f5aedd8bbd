//! The guided run.

use serde_json::Value;

use super::harness::{fairway, in_lab};

fn steps(arguments: &[&str]) -> (bool, Vec<Value>, String) {
    let output = fairway(arguments);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let steps =
        text.lines().filter_map(|l| serde_json::from_str::<Value>(l).ok()).filter(|v| !v["step"].is_null()).collect();
    (output.status.success(), steps, text + &String::from_utf8_lossy(&output.stderr))
}

#[test]
fn every_step_of_the_demo_is_as_promised() {
    in_lab(|_| {
        let (success, steps, text) = steps(&["demo", "--json"]);
        anyhow::ensure!(success, "{text}");
        anyhow::ensure!(steps.len() == 11, "{} steps: {text}", steps.len());
        Ok(())
    });
}

#[test]
fn without_namespaces_the_demo_still_shows_identity_and_policy() {
    let (success, steps, text) = steps(&["demo", "--json", "--loopback"]);
    assert!(success && steps.len() == 3, "{text}");
}
