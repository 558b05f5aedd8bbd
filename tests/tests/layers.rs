//! Layers point downwards only. The table here is the one of ARCHITECTURE.md.

use std::collections::BTreeMap;

/// Crate to layer. Crates of one layer never name each other; `lab` and `cli` may use every program as a library.
const LAYERS: [(&str, u8); 18] = [
    ("proto", 0),
    ("mesh-core", 0),
    ("mesh-net", 0),
    ("mesh-runtime", 10),
    ("mesh-identity", 20),
    ("mesh-hbone", 20),
    ("mesh-xds", 20),
    ("ztunnel", 30),
    ("cni-plugin", 30),
    ("control-plane", 30),
    ("lab", 35),
    ("cli", 36),
    // Above every program, so that none can depend on it but for its tests.
    ("test-support", 37),
    ("kube-tests", 40),
    ("system-tests", 40),
    ("benches", 40),
    ("fuzz", 40),
    ("xtask", 40),
];

fn workspace() -> Vec<cargo_metadata::Package> {
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml");
    let metadata = cargo_metadata::MetadataCommand::new().manifest_path(manifest).no_deps().exec();
    metadata.expect("cargo metadata runs in a checkout").packages
}

#[test]
fn every_crate_has_a_layer_and_depends_only_on_lower_ones() {
    let layers: BTreeMap<&str, u8> = LAYERS.into();
    let packages = workspace();
    let mut wrong = Vec::new();
    for package in &packages {
        let Some(own) = layers.get(package.name.as_str()) else {
            wrong.push(format!("{} has no layer: add it here and to ARCHITECTURE.md", package.name));
            continue;
        };
        for dependency in package.dependencies.iter().filter(|d| d.kind != cargo_metadata::DependencyKind::Development)
        {
            if let Some(other) = layers.get(dependency.name.as_str())
                && other >= own
            {
                wrong.push(format!("{} (layer {own}) depends on {} (layer {other})", package.name, dependency.name));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn only_mesh_net_may_be_unsafe() {
    for package in workspace() {
        let name = package.name.as_str();
        if name == "mesh-net" || name == "proto" {
            continue;
        }
        let roots = package.targets.iter().filter(|t| t.is_lib()).map(|t| t.src_path.clone());
        for root in roots {
            let text = std::fs::read_to_string(&root).expect("sources are readable");
            assert!(text.contains("#![forbid(unsafe_code)]"), "{root} does not forbid unsafe code");
        }
    }
}

/// `docs/tunnel-engine.md`: tunnels are our own. ztunnel still has `h2` below gRPC, which is no data path.
#[test]
fn no_crate_that_carries_payload_depends_on_another_http2_or_tls_stack() {
    let carriers = ["mesh-hbone", "mesh-net", "ztunnel"];
    let foreign = ["h2", "hyper", "tokio-rustls"];
    for package in workspace().iter().filter(|package| carriers.contains(&package.name.as_str())) {
        let normal = package.dependencies.iter().filter(|d| d.kind == cargo_metadata::DependencyKind::Normal);
        let found: Vec<&str> = normal.map(|d| d.name.as_str()).filter(|name| foreign.contains(name)).collect();
        assert!(found.is_empty(), "{} depends on {}", package.name, found.join(", "));
    }
}
