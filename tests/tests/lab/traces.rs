//! A lab leaves nothing behind, however it ends.

use std::{collections::BTreeSet, fs};

use anyhow::ensure;

use super::harness::{PODS, PROGRAM, apply, eventually, in_lab, in_mesh, label, wait_enrolment};
use lab::protocol::Request;

/// What this machine shows of labs: processes of this build's binary, network links, mounts.
fn inventory() -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let executable = fs::read_link(entry.path().join("exe")).unwrap_or_default();
        let arguments = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let lab = String::from_utf8_lossy(&arguments).contains("traces-lab");
        if executable.ends_with(PROGRAM) && lab {
            all.insert(format!("process {}", entry.file_name().to_string_lossy()));
        }
    }
    let lines = |path: &str| fs::read_to_string(path).unwrap_or_default();
    all.extend(lines("/proc/net/dev").lines().filter_map(|l| Some(format!("link {}", l.split_once(':')?.0.trim()))));
    all.extend(lines("/proc/mounts").lines().map(|l| format!("mount {l}")));
    all
}

#[test]
fn a_lab_killed_at_once_or_later_leaves_no_process_link_or_mount() {
    in_lab(|owned| {
        let before = inventory();
        for later in [false, true] {
            let mut command = std::process::Command::new(PROGRAM);
            let name = format!("traces-lab-{}-{later}", std::process::id());
            command.args(["lab", "up", "--name", &name]).stdout(std::process::Stdio::null());
            let mut child = command.spawn()?;
            if later {
                ensure!(child.wait()?.success(), "the lab did not start");
                let down = std::process::Command::new(PROGRAM).args(["lab", "down", "--name", &name]).status()?;
                ensure!(down.success(), "the lab did not go down");
            } else {
                child.kill()?;
                child.wait()?;
            }
            eventually("everything to be gone", || {
                let left: Vec<String> = inventory().difference(&before).cloned().collect();
                ensure!(left.is_empty(), "left behind: {left:?}");
                Ok(())
            })?;
        }
        // The lab of this test itself ends with its waiter.
        ensure!(owned.process() > 0, "no process");
        Ok(())
    });
}

#[test]
fn leaving_the_mesh_leaves_no_rule_route_or_table_in_a_pod() {
    in_mesh(|lab| {
        let inventory = |pod: &str| lab.ask(&Request::Inventory { target: format!("t/{pod}") }).map(|r| r.text);
        let inside = inventory("a")?;
        ensure!(inside.contains("table istio-ambient-nat"), "nothing to remove: {inside}");
        label(lab, None)?;
        wait_enrolment(lab, "")?;
        lab.run("t/a", &["fairway", "app", "reconnect"])?;
        for pod in ["a", "a2", "b"] {
            eventually("the rules to be gone", || {
                let left = inventory(pod)?;
                ensure!(!left.contains("istio") && !left.contains("table 100"), "{pod} still has {left}");
                Ok(())
            })?;
        }
        Ok(())
    });
}

#[test]
fn malformed_manifests_are_refused_whole_with_file_and_line() {
    in_lab(|owned| {
        let twice =
            format!("{PODS}\n---\nkind: Pod\nmetadata: {{name: broken}}\nspec: {{containers: [{{name: c}}]}}\n");
        let error = apply(&owned.lab, "mine.yaml", &twice).unwrap_err().to_string();
        ensure!(error.contains("mine.yaml:") && error.contains("containers[0].command"), "{error}");
        ensure!(owned.lab.status()?.pods.is_empty(), "half of the file was applied");
        Ok(())
    });
}
