//! Clocks: certificates and tokens are good from one moment to another.

use std::time::{Duration, SystemTime};

use serde_json::Value;

use super::{Item, Level, evidence::Evidence, some};

/// What certificates forgive; their validity begins that long before they are issued, or is far longer.
const TOLERABLE: Duration = Duration::from_secs(10);
/// Kubelets renew their leases every ten seconds, and may be late.
const RENEWAL: Duration = Duration::from_secs(60);

pub(super) fn judge(evidence: &Evidence) -> Vec<Item> {
    let Some((server, here)) = evidence.clocks else {
        return vec![Item::new("clocks", Level::Unknown, "the API server does not say what time it has", "")];
    };
    let mut items = Vec::new();
    let skew = apart(server, here);
    if skew > TOLERABLE {
        let says = format!("this machine and the API server are {} s apart", skew.as_secs());
        items.push(Item::new("clocks", Level::Warning, says, "synchronise them (NTP)"));
    }
    let (mut ahead, mut behind) = (Vec::new(), Vec::new());
    for lease in &evidence.leases {
        let node = lease["metadata"]["name"].as_str().unwrap_or_default();
        let Some(renewed) = lease["spec"]["renewTime"].as_str().and_then(time) else { continue };
        if !is_ready(evidence, node) {
            continue;
        }
        match (server.duration_since(renewed), renewed.duration_since(server)) {
            (_, Ok(future)) if future > TOLERABLE => ahead.push(format!("{node} ({} s)", future.as_secs())),
            (Ok(age), _) if age > RENEWAL => behind.push(format!("{node} ({} s)", age.as_secs())),
            _ => {}
        }
    }
    if !ahead.is_empty() {
        items.push(Item::new(
            "clocks",
            Level::Fault,
            format!("ahead of the API server: {}", some(&ahead)),
            "synchronise them (NTP)",
        ));
    }
    if !behind.is_empty() {
        let says = format!("behind the API server, or their kubelets are: {}", some(&behind));
        items.push(Item::new(
            "clocks",
            Level::Fault,
            says,
            "synchronise them (NTP): new certificates would not be valid yet there",
        ));
    }
    if items.is_empty() {
        items.push(Item::fine(
            "clocks",
            format!("{} nodes and this machine agree with the API server", evidence.leases.len()),
        ));
    }
    items
}

fn is_ready(evidence: &Evidence, name: &str) -> bool {
    let node = evidence.nodes.iter().find(|node| node["metadata"]["name"] == name);
    let conditions = node.and_then(|node| node["status"]["conditions"].as_array());
    conditions.into_iter().flatten().any(|c: &Value| c["type"] == "Ready" && c["status"] == "True")
}

fn apart(a: SystemTime, b: SystemTime) -> Duration {
    a.duration_since(b).unwrap_or_else(|error| error.duration())
}

fn time(text: &str) -> Option<SystemTime> {
    humantime::parse_rfc3339_weak(text).ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn clocks_that_disagree_are_told_by_whom() {
        let server = time("2026-01-01T00:10:00Z").unwrap();
        let evidence = |here: &str, renewed: &str| Evidence {
            clocks: Some((server, time(here).unwrap())),
            nodes: vec![
                json!({"metadata": {"name": "n"}, "status": {"conditions": [{"type": "Ready", "status": "True"}]}}),
            ],
            leases: vec![json!({"metadata": {"name": "n"}, "spec": {"renewTime": renewed}})],
            ..Evidence::default()
        };
        for (here, renewed, level) in [
            ("2026-01-01T00:10:02Z", "2026-01-01T00:09:55.123456Z", Level::Fine),
            ("2026-01-01T00:11:00Z", "2026-01-01T00:09:55.123456Z", Level::Warning),
            ("2026-01-01T00:10:00Z", "2026-01-01T00:10:40.000000Z", Level::Fault),
            ("2026-01-01T00:10:00Z", "2026-01-01T00:08:00.000000Z", Level::Fault),
        ] {
            assert_eq!(judge(&evidence(here, renewed))[0].level, level, "{here} {renewed}");
        }
    }
}
