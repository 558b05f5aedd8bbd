//! The nodes: whether the mesh's programs run there.

use serde_json::Value;

use super::{Item, Level, some};

const KERNEL: (u32, u32) = (5, 2);

pub(super) fn judge(nodes: &[Value]) -> Vec<Item> {
    if nodes.is_empty() {
        return Vec::new();
    }
    let info = |node: &Value, field: &str| node["status"]["nodeInfo"][field].as_str().unwrap_or_default().to_owned();
    let name = |node: &Value| node["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    let (linux, other): (Vec<&Value>, Vec<&Value>) =
        nodes.iter().partition(|node| info(node, "operatingSystem") == "linux");
    let mut items = Vec::new();
    let wrong = |fits: &dyn Fn(&Value) -> bool, say: &dyn Fn(&Value) -> String| -> Vec<String> {
        linux.iter().filter(|node| !fits(node)).map(|node| format!("{} ({})", name(node), say(node))).collect()
    };
    let mut look = |what: &'static str, level: Level, wrong: Vec<String>, fine: String, remedy: &str| {
        items.push(match wrong.is_empty() {
            true => Item::fine(what, fine),
            false => Item::new(what, level, some(&wrong), remedy),
        });
    };
    let is_old = |node: &Value| kernel(&info(node, "kernelVersion")).is_some_and(|version| version < KERNEL);
    let kernels = distinct(&linux, &|node| info(node, "kernelVersion"));
    let remedy = format!("the mesh needs nf_tables as of Linux {}.{}: upgrade these nodes", KERNEL.0, KERNEL.1);
    look("kernel", Level::Fault, wrong(&|n| !is_old(n), &|n| info(n, "kernelVersion")), kernels, &remedy);
    let known = |node: &Value| ["amd64", "arm64"].contains(&&*info(node, "architecture"));
    let architectures = distinct(&linux, &|node| info(node, "architecture"));
    look(
        "architecture",
        Level::Fault,
        wrong(&known, &|n| info(n, "architecture")),
        architectures,
        "there are images for amd64 and arm64 only",
    );
    let runtime = |node: &Value| info(node, "containerRuntimeVersion");
    let tried = |node: &Value| runtime(node).starts_with("containerd://") || runtime(node).starts_with("cri-o://");
    let runtimes = distinct(&linux, &runtime);
    look(
        "container runtime",
        Level::Warning,
        wrong(&tried, &runtime),
        runtimes,
        "containerd and CRI-O are known to work; with Docker use a CNI plugin",
    );
    let ready = |node: &Value| {
        let conditions = node["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
        conditions.iter().any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
    };
    let count = format!("{} ready", linux.len());
    look(
        "nodes",
        Level::Warning,
        wrong(&ready, &|_| "not ready".to_owned()),
        count,
        "their pods join the mesh when they are back",
    );
    if !other.is_empty() {
        let names: Vec<String> = other.iter().map(|node| name(node)).collect();
        items.push(Item::new(
            "nodes",
            Level::Warning,
            format!("not Linux: {}", some(&names)),
            "their pods stay outside the mesh",
        ));
    }
    items
}

/// `6.1.0-13-amd64` is 6.1.
fn kernel(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn distinct(nodes: &[&Value], of: &dyn Fn(&Value) -> String) -> String {
    let mut all: Vec<String> = nodes.iter().map(|node| of(node)).collect();
    all.sort();
    all.dedup();
    some(&all)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn nodes_that_cannot_run_the_mesh_are_named() {
        let node = |name: &str, os: &str, kernel: &str, architecture: &str, runtime: &str, ready: &str| {
            json!({"metadata": {"name": name}, "status": {"conditions": [{"type": "Ready", "status": ready}],
                "nodeInfo": {"operatingSystem": os, "kernelVersion": kernel, "architecture": architecture, "containerRuntimeVersion": runtime}}})
        };
        let nodes = [
            node("good", "linux", "6.1.0-13-amd64", "amd64", "containerd://2.0", "True"),
            node("old", "linux", "4.19.1", "amd64", "containerd://1.6", "True"),
            node("odd", "linux", "5.10", "riscv64", "docker://28", "False"),
            node("win", "windows", "10.0", "amd64", "containerd://2.0", "True"),
        ];
        let found = |what: &str, name: &str| {
            judge(&nodes).into_iter().find(|item| item.what == what && item.finding.contains(name))
        };
        assert_eq!(found("kernel", "old").map(|item| item.level), Some(Level::Fault));
        assert_eq!(found("architecture", "odd").map(|item| item.level), Some(Level::Fault));
        assert_eq!(found("container runtime", "odd").map(|item| item.level), Some(Level::Warning));
        assert_eq!(found("nodes", "odd").map(|item| item.level), Some(Level::Warning));
        assert_eq!(found("nodes", "win").map(|item| item.level), Some(Level::Warning));
        assert!(judge(&nodes[..1]).iter().all(|item| item.level == Level::Fine));
    }
}
