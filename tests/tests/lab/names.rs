//! Who answers a pod's DNS.

use anyhow::{Context as _, ensure};
use lab::{apps::names::ANSWER, control::Lab};

use super::harness::{apply, apply_pods, enrol, eventually, in_lab};

const NAMESERVER: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: dns, namespace: elsewhere}
spec:
  nodeName: node2
  containers: [{name: dns, command: [fairway, app, nameserver]}]
"#;

/// The addresses a pod finds when it asks the lab's nameserver.
fn ask(lab: &Lab, from: &str, server: &str, name: &str, transport: &[&str]) -> anyhow::Result<String> {
    let command = [&["fairway", "app", "ask", server, name], transport].concat();
    let (code, text) = lab.run(from, &command)?;
    ensure!(code == 0, "{}", text.trim());
    Ok(text.trim().to_owned())
}

fn pod_address(lab: &Lab, name: &str) -> anyhow::Result<String> {
    let pod = lab.status()?.pods.into_iter().find(|pod| pod.name == name).with_context(|| format!("no pod {name}"))?;
    pod.addresses.into_iter().find(|address| !address.contains(':')).context("no IPv4 address")
}

#[test]
fn enrolled_pods_hear_the_mesh_of_its_names_and_their_nameserver_of_all_others() {
    in_lab(|owned| {
        let lab = &owned.lab;
        apply_pods(lab)?;
        apply(lab, "dns.yaml", NAMESERVER)?;
        let (stranger, transports) = (ANSWER.to_string(), [&[][..], &["--tcp"]]);
        let server = eventually("the nameserver", || {
            let server = format!("{}:53", pod_address(lab, "dns")?);
            ask(lab, "t/a2", &server, "b", &[]).map(|_| server)
        })?;
        let pods = ["t/a2", "elsewhere/outsider"];
        let names = ["b.t.svc.cluster.local", "b.t", "example.com"];
        let expect = |from, name, transport, expected: &str| {
            let found = ask(lab, from, &server, name, transport)?;
            ensure!(found == expected, "{from} finds {name} at {found:?}, not {expected:?}");
            anyhow::Ok(())
        };
        for transport in transports {
            for (from, name) in pods.into_iter().flat_map(|from| names.map(|name| (from, name))) {
                expect(from, name, transport, &stranger).context("before enrolment")?;
            }
        }
        enrol(lab)?;
        // The address by which the lab's own names lead there.
        let hosts = lab.run("t/a2", &["cat", "/etc/hosts"])?.1;
        let line = hosts.lines().find(|line| line.contains(" b.t.svc.cluster.local")).context("no such host")?;
        let vip = line.split(' ').next().unwrap_or_default();
        for transport in transports {
            for name in ["b", "b.t", "b.t.svc", "b.t.svc.cluster.local"] {
                expect("t/a2", name, transport, vip).context("ours")?;
            }
            for name in ["example.com", "b.nowhere.svc.cluster.local"] {
                expect("t/a2", name, transport, &stranger).context("not ours")?;
            }
            for name in names {
                expect("elsewhere/outsider", name, transport, &stranger).context("not enrolled")?;
            }
        }
        Ok(())
    });
}
