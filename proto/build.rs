//! Compiles the schemas with protox, so that no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "authorization.proto",
        "ca.proto",
        "discovery.proto",
        "fairway.proto",
        "node.proto",
        "status.proto",
        "workload.proto",
        "zds.proto",
    ];
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(files, ["proto"])?;
    tonic_prost_build::configure().bytes(".").btree_map(".").compile_fds(descriptors)?;
    Ok(())
}
