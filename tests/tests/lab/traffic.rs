//! What TCP can do, through the mesh.

use anyhow::ensure;
use lab::control::Lab;

use super::harness::{assert_still_used, get, in_mesh, progress, transfer};

fn everything_was_tls(lab: &Lab) -> anyhow::Result<()> {
    let sight = lab.look(None)?;
    ensure!(sight.clear_bytes == 0, "in clear: {:?}", sight.clear_example);
    Ok(())
}

#[test]
fn half_closes_and_resets_arrive_as_such_in_both_directions() {
    in_mesh(|lab| {
        lab.mark()?;
        for mode in ["upload", "close-first", "reset", "send-reset", "greeting"] {
            let target = if mode == "greeting" { "b:9002" } else { "b:9001" };
            transfer(lab, "t/a2", &[mode, target])?;
        }
        everything_was_tls(lab)
    });
}

#[test]
fn a_thousand_connections_at_once_arrive_intact() {
    in_mesh(|lab| {
        transfer(lab, "t/a2", &["many", "b:9001", "--connections", "1000", "--bytes", "20000"])?;
        Ok(())
    });
}

#[test]
fn a_gibibyte_arrives_intact_each_way_of_half_of_it() {
    in_mesh(|lab| {
        transfer(lab, "t/a2", &["download", "b:9001", "--bytes", "536870912"])?;
        transfer(lab, "t/a2", &["upload", "b:9001", "--bytes", "536870912"])?;
        Ok(())
    });
}

#[test]
fn a_slow_reader_does_not_hold_up_fast_ones() {
    in_mesh(|lab| {
        let before = progress(lab)?;
        let slow = {
            let lab = lab.clone();
            std::thread::spawn(move || transfer(&lab, "t/a", &["slow", "b:9001", "--bytes", "30000000"]))
        };
        // The steady client shares the slow one's pod, and so its tunnel.
        assert_still_used(lab, &before)?;
        for _ in 0..20 {
            get(lab, "t/a", "http://b/fast")?;
        }
        slow.join().map_err(|_| anyhow::anyhow!("the slow reader's thread panicked"))??;
        Ok(())
    });
}

#[test]
fn ipv6_is_carried_like_ipv4() {
    in_mesh(|lab| {
        lab.mark()?;
        let answer = get(lab, "t/a2", "http://b-v6/six")?;
        ensure!(answer.contains("fd44:1::"), "the server saw another family: {answer}");
        transfer(lab, "t/a2", &["upload", "b-v6:9001"])?;
        ensure!(lab.look(Some("GET /six"))?.found == 0, "in clear");
        everything_was_tls(lab)
    });
}

#[test]
fn the_server_sees_each_clients_own_address() {
    in_mesh(|lab| {
        let pods = lab.status()?.pods;
        for name in ["a", "a2"] {
            let pod = pods.iter().find(|p| p.name == name).expect("the pod was applied");
            let answer = get(lab, &format!("t/{name}"), "http://b/who")?;
            ensure!(answer.contains(&pod.addresses[0]), "{name} at {} was seen otherwise: {answer}", pod.addresses[0]);
        }
        Ok(())
    });
}
