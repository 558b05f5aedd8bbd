use std::{fs, net::SocketAddr, os::unix::fs::MetadataExt as _, path::Path};

use mesh_runtime::{metrics::Registry, readiness::Readiness};
use mesh_xds::server::Cache;

use super::*;
use crate::{
    app::{Config, Source},
    metrics::Metrics,
};

const BROKEN: &str = "kind: [\n";
const GOOD: &str = "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: a}\n";

fn pipeline(folder: &Path) -> (FolderPipeline, Arc<Cache>, Readiness) {
    let any_port: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let source = Source::Folder { manifests: folder.to_owned(), state: folder.join(".state") };
    let config = Config::new(source, any_port, any_port);
    let (cache, readiness) = (Arc::new(Cache::new()), Readiness::default());
    let metrics = Metrics::register(&Registry::new());
    let pipeline = Pipeline::new(config.index_settings(), cache.clone(), metrics, readiness.clone());
    (FolderPipeline::new(folder.to_owned(), config.object_settings(), pipeline), cache, readiness)
}

/// Whether the problem of a file that was never read is told.
fn tells_unread(pipeline: &FolderPipeline) -> bool {
    pipeline.pipeline.snapshot.borrow().problems.iter().any(|p| p.message.contains("since the control plane started"))
}

#[test]
fn a_start_waits_for_a_broken_file_but_not_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.yaml"), GOOD).unwrap();
    fs::write(dir.path().join("p.yaml"), BROKEN).unwrap();
    let (pipeline, cache, readiness) = pipeline(dir.path());
    assert_eq!(readiness.list(), ["first full state"]);
    let start = Instant::now();
    let mut pipeline = pipeline.step(start);
    for seconds in [1, 29] {
        assert!(!cache.is_ready());
        assert_eq!(readiness.list(), ["manifests that cannot be read: p.yaml"]);
        assert!(tells_unread(&pipeline));
        pipeline = pipeline.step(start + Duration::from_secs(seconds));
    }
    assert!(!cache.is_ready());
    pipeline = pipeline.step(start + UNREAD_LIMIT);
    assert!(cache.is_ready() && readiness.is_ready());
    assert!(tells_unread(&pipeline));
    fs::write(dir.path().join("p.yaml"), GOOD.replace("name: a", "name: b")).unwrap();
    pipeline = pipeline.step(start + UNREAD_LIMIT);
    assert_eq!(pipeline.pipeline.snapshot.borrow().problems.len(), 0);
}

#[test]
fn a_start_goes_on_once_the_broken_file_is_corrected_or_removed() {
    for corrected in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.yaml");
        fs::write(&path, BROKEN).unwrap();
        let (pipeline, cache, readiness) = pipeline(dir.path());
        let now = Instant::now();
        let pipeline = pipeline.step(now);
        assert!(!cache.is_ready());
        match corrected {
            true => fs::write(&path, GOOD).unwrap(),
            false => fs::remove_file(&path).unwrap(),
        }
        let pipeline = pipeline.step(now);
        assert!(cache.is_ready() && readiness.is_ready());
        // What breaks later is a problem as any other.
        fs::write(&path, BROKEN).unwrap();
        let pipeline = pipeline.step(now);
        assert!(cache.is_ready() && !tells_unread(&pipeline));
    }
}

#[test]
fn what_was_read_is_known_by_its_version() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.yaml");
    let (pipeline, ..) = pipeline(dir.path());
    let version = || {
        let meta = fs::metadata(&path).unwrap();
        (meta.ino(), meta.ctime(), meta.ctime_nsec())
    };
    fs::write(&path, BROKEN).unwrap();
    assert!(!pipeline.pipeline.snapshot.borrow().versions.contains(&version()));
    let pipeline = pipeline.step(Instant::now());
    assert!(pipeline.pipeline.snapshot.borrow().versions.contains(&version()));
}
