//! `fairway top` and `fairway dump`: what an operator sees of a mesh that works.

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::harness::{eventually, fairway, get, in_mesh};

#[test]
fn top_shows_who_talks_to_whom_and_that_it_is_encrypted() {
    in_mesh(|lab| {
        let row = eventually("a line about the steady connection", || {
            let output = fairway(&["top", "--name", lab.name(), "--once", "--interval", "200ms", "-o", "json"]);
            let rows: Vec<Value> = serde_json::from_slice(&output.stdout)?;
            let is_it =
                |row: &&Value| row["source"] == "t/a" && row["destination"] == "t/b" && row["mutualTls"] == true;
            rows.iter().find(is_it).cloned().with_context(|| format!("{rows:?}"))
        })?;
        ensure!(row["open"].as_f64() >= Some(1.0) && row["service"] == "b.t.svc.cluster.local", "{row}");
        let output = fairway(&["top", "--name", lab.name(), "--once", "--interval", "100ms"]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(text.contains("SOURCE") && text.contains("mTLS"), "{text}");
        Ok(())
    });
}

#[test]
fn dump_shows_what_each_program_knows() {
    in_mesh(|lab| {
        get(lab, "t/a2", "http://b/x")?;
        let dump = |arguments: &[&str]| fairway(&[&["dump", "--name", lab.name()], arguments].concat());
        for (arguments, wanted) in [
            (&["ztunnel/node1", "workloads"][..], "Kubernetes//Pod/t/b"),
            (&["ztunnel/node2", "workloadState"], "inbound"),
            (&["ztunnel/node1", "certificates"], "spiffe://cluster.local/ns/t/sa/a"),
            (&["agent/node2", "pods"], "enrolled"),
            (&["fairwayd"], "b.t.svc.cluster.local"),
        ] {
            let output = dump(arguments);
            let text = String::from_utf8_lossy(&output.stdout);
            ensure!(output.status.success() && text.contains(wanted), "{arguments:?}: {text}");
        }
        let wrong = dump(&["ztunnel/node1", "workload"]);
        let said = String::from_utf8_lossy(&wrong.stderr).into_owned();
        ensure!(!wrong.status.success() && said.contains("it has") && said.contains("workloads"), "{said}");
        Ok(())
    });
}
