//! What an operator meets at three in the morning.

use anyhow::ensure;
use lab::{
    apps::load::Report,
    control::Lab,
    protocol::{Fault, Request},
};

use super::harness::{
    apply, apply_pods, assert_still_used, eventually, get, in_lab, in_mesh, label, progress, reconnect, transfer,
    wait_enrolment,
};

fn fault(lab: &Lab, fault: Fault) -> anyhow::Result<()> {
    lab.ask(&Request::Fault(fault))?;
    Ok(())
}

fn kill(lab: &Lab, program: &str, restart: bool) -> anyhow::Result<()> {
    fault(lab, Fault::Kill { program: program.to_owned(), restart })
}

#[test]
fn enrolling_and_leaving_under_load_fails_no_request() {
    in_lab(|owned| {
        let lab = &owned.lab;
        apply_pods(lab)?;
        let load = {
            let lab = lab.clone();
            let command =
                ["fairway", "app", "load", "b:80", "--connections", "4", "--seconds", "8", "--new-connections"];
            std::thread::spawn(move || lab.run("t/a2", &command))
        };
        for mode in [Some("ambient"), None] {
            label(lab, mode)?;
            wait_enrolment(lab, if mode.is_some() { "enabled" } else { "" })?;
            get(lab, "t/a", "http://b/x")?;
        }
        let (_, text) = load.join().map_err(|_| anyhow::anyhow!("the load's thread panicked"))??;
        let report: Report = serde_json::from_str(&text)?;
        ensure!(report.errors == 0 && report.requests > 100, "{report:?}");
        Ok(())
    });
}

#[test]
fn an_agent_killed_in_the_middle_of_enrolment_finishes_it() {
    in_lab(|owned| {
        let lab = &owned.lab;
        apply_pods(lab)?;
        label(lab, Some("ambient"))?;
        kill(lab, "agent/node1", true)?;
        kill(lab, "agent/node2", true)?;
        wait_enrolment(lab, "enabled")?;
        get(lab, "t/a2", "http://b/x")?;
        Ok(())
    });
}

#[test]
fn a_pod_deleted_with_open_connections_takes_only_them_along() {
    in_mesh(|lab| {
        let before = progress(lab)?;
        let download = {
            let lab = lab.clone();
            let command = ["fairway", "app", "transfer", "download", "b:9001", "--bytes", "4000000000"];
            std::thread::spawn(move || lab.run("t/a2", &command))
        };
        lab.ask(&Request::Delete { pod: Some("t/a2".to_owned()), file: None })?;
        drop(download.join());
        assert_still_used(lab, &before)?;
        get(lab, "t/a", "http://b/x")?;
        Ok(())
    });
}

#[test]
fn a_killed_ztunnel_serves_every_pod_again_and_lets_nothing_out_in_clear() {
    in_mesh(|lab| {
        lab.mark()?;
        kill(lab, "ztunnel/node1", true)?;
        eventually("requests to succeed", || get(lab, "t/a2", "http://b/secret"))?;
        let sight = lab.look(Some("/secret"))?;
        ensure!(sight.found == 0 && sight.clear_bytes == 0, "in clear: {sight:?}");
        Ok(())
    });
}

#[test]
fn without_agents_captured_pods_go_on_and_a_new_one_does_not_start_uncaptured() {
    in_mesh(|lab| {
        let before = progress(lab)?;
        kill(lab, "agent/node1", false)?;
        get(lab, "t/a2", "http://b/x")?;
        let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: new, namespace: t}\nspec:\n  nodeName: node1\n  containers: [{name: c, command: [fairway, app, idle]}]\n";
        let refused = apply(lab, "new.yaml", pod);
        ensure!(refused.is_err(), "a pod of the mesh started without being captured");
        assert_still_used(lab, &before)
    });
}

#[test]
fn a_frozen_control_plane_stops_nothing_that_is_known() {
    in_mesh(|lab| {
        let before = progress(lab)?;
        fault(lab, Fault::Freeze { program: "fairwayd".to_owned() })?;
        get(lab, "t/a2", "http://b/x")?;
        assert_still_used(lab, &before)?;
        fault(lab, Fault::Thaw { program: "fairwayd".to_owned() })
    });
}

#[test]
fn a_ztunnel_restarted_while_the_control_plane_is_dead_serves_and_enforces_what_it_knew() {
    in_mesh(|lab| {
        let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: t}\nspec:\n  action: DENY\n  rules:\n  - to: [{operation: {ports: [\"9000\"]}}]\n";
        apply(lab, "p.yaml", policy)?;
        eventually("the policy in force, and on disk", || {
            let (_, kept) =
                lab.run("node/node2", &["sh", "-c", "grep -a -c 't/p' /run/fairway/nodes/node2/state/discovery"])?;
            ensure!(kept.trim().parse::<u32>().unwrap_or(0) > 0, "not kept yet: {kept}");
            Ok(())
        })?;
        kill(lab, "fairwayd", false)?;
        for node in ["node1", "node2"] {
            kill(lab, &format!("ztunnel/{node}"), true)?;
            lab.ask(&Request::Ready { program: format!("ztunnel/{node}") })?;
        }
        lab.mark()?;
        eventually("requests to succeed", || get(lab, "t/a2", "http://b/kept"))?;
        ensure!(lab.look(Some("/kept"))?.found == 0, "in clear");
        ensure!(get(lab, "t/a2", "http://b:9000/").is_err(), "the policy is not enforced");
        Ok(())
    });
}

#[test]
fn a_partitioned_node_comes_back() {
    in_mesh(|lab| {
        fault(lab, Fault::Partition { node: "node2".to_owned() })?;
        ensure!(get(lab, "t/a2", "http://b/x").is_err(), "the cable is pulled, yet an answer came");
        fault(lab, Fault::Heal { node: "node2".to_owned() })?;
        eventually("requests to succeed", || get(lab, "t/a2", "http://b/x"))?;
        Ok(())
    });
}

#[test]
fn a_slow_wire_delays_and_breaks_nothing() {
    in_mesh(|lab| {
        let before = progress(lab)?;
        fault(lab, Fault::Delay { node: "node2".to_owned(), milliseconds: 60 })?;
        reconnect(lab)?;
        // The answer cannot have been faster than the delay it went through.
        eventually("the delay to show", || {
            ensure!(progress(lab)?.longest_gap_us >= 60_000, "not yet");
            Ok(())
        })?;
        transfer(lab, "t/a2", &["upload", "b:9001", "--bytes", "3000000"])?;
        fault(lab, Fault::Delay { node: "node2".to_owned(), milliseconds: 0 })?;
        get(lab, "t/a2", "http://b/x")?;
        ensure!(progress(lab)?.ticks > before.ticks, "the steady client is stuck");
        Ok(())
    });
}

#[test]
fn an_upgraded_ztunnel_takes_over_new_connections() {
    in_mesh(|lab| {
        fault(lab, Fault::Upgrade { node: "node1".to_owned(), binary: None })?;
        eventually("requests to succeed", || get(lab, "t/a2", "http://b/x"))?;
        Ok(())
    });
}

#[test]
fn strict_cuts_live_clear_text_and_a_policy_cuts_the_connections_it_forbids() {
    in_mesh(|lab| {
        let strict = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default, namespace: t}\nspec: {mtls: {mode: STRICT}}\n";
        ensure!(get(lab, "elsewhere/outsider", "http://b.t/x").is_ok(), "PERMISSIVE refused clear text");
        apply(lab, "strict.yaml", strict)?;
        eventually("clear text to be refused", || {
            ensure!(get(lab, "elsewhere/outsider", "http://b.t/x").is_err(), "still accepted");
            Ok(())
        })?;
        let before = progress(lab)?;
        let deny = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: no-a, namespace: t}\nspec:\n  action: DENY\n  rules:\n  - from:\n    - source: {principals: [\"cluster.local/ns/t/sa/a\"]}\n";
        apply(lab, "deny.yaml", deny)?;
        eventually("the live connection to be cut", || {
            ensure!(
                progress(lab)?.connections > before.connections || progress(lab)?.last_error != before.last_error,
                "it lives"
            );
            Ok(())
        })
    });
}

#[test]
fn a_bad_manifest_names_its_place_and_harms_no_other() {
    in_mesh(|lab| {
        apply(
            lab,
            "bad.yaml",
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: bad, namespace: t}\nspec:\n  action: DENNY\n  selector: {matchLabels: {app: nobody}}\n",
        )?;
        eventually("the problem to be reported", || {
            let (_, body) = lab.get("control", "http://127.0.0.1:15014/debug/problems")?;
            ensure!(body.contains("bad.yaml") && body.contains("action") && body.contains('5'), "{body}");
            Ok(())
        })?;
        get(lab, "t/a2", "http://b/x")?;
        Ok(())
    });
}
