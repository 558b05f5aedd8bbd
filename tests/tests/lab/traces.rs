//! A lab leaves nothing behind, however it ends.

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::ensure;

use super::harness::{PODS, PROGRAM, apply, eventually, fairway, in_lab, in_mesh, label, wait_enrolment};
use lab::{control::Lab, protocol::Request};

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

#[test]
fn files_applied_together_may_need_each_other_in_any_order_and_a_bad_one_stops_none() {
    in_lab(|owned| {
        let folder = std::env::temp_dir().join(format!("fairway-{}", owned.lab.name()));
        fs::create_dir_all(&folder)?;
        let outcome = apply_together(&owned.lab, &folder);
        fs::remove_dir_all(&folder)?;
        outcome
    });
}

fn apply_together(lab: &Lab, folder: &Path) -> anyhow::Result<()> {
    let user = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: t, labels: {istio.io/use-waypoint: wp}}\nspec: {ports: [{port: 80}]}\n";
    let waypoint = "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: wp, namespace: t}\nspec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}\n---\napiVersion: v1\nkind: Service\nmetadata: {name: wp, namespace: t}\nspec: {ports: [{port: 15008}]}\n";
    let file = |name: &str, text: &str| -> anyhow::Result<String> {
        let path = folder.join(name);
        fs::write(&path, text)?;
        Ok(path.display().to_string())
    };
    // One of them without the suffix that manifests have in the folder.
    let (user, waypoint) = (file("user.yaml", user)?, file("waypoint", waypoint)?);
    let broken = file("broken.yaml", "kind: Pod\nmetadata: {name: broken}\nspec: {containers: [{name: c}]}\n")?;
    let together = |files: &[&String]| {
        let files = files.iter().flat_map(|file| ["-f", file.as_str()]);
        let arguments: Vec<&str> = ["lab", "apply", "--name", lab.name()].into_iter().chain(files).collect();
        let output = fairway(&arguments);
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (success, said) = together(&[&user, &broken]);
    ensure!(!success && said.contains("broken.yaml:") && said.contains("waypoint t/wp does not exist"), "{said}");
    let (success, said) = together(&[&user, &waypoint]);
    ensure!(success, "{said}");
    let (success, said) = together(&[&broken, &waypoint]);
    ensure!(!success && !said.contains("waypoint"), "{said}");
    lab.ask(&Request::Delete { pod: None, file: Some(waypoint.clone()) })?;
    ensure!(lab.problems(std::slice::from_ref(&waypoint))?.is_empty());
    eventually("the waypoint to be missed", || {
        let said = lab.problems(std::slice::from_ref(&user))?.join("\n");
        ensure!(said.contains("waypoint t/wp does not exist"), "{said}");
        Ok(())
    })
}
