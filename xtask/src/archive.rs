//! Image archives: an OCI layout that is `docker load`'s form as well, so that containerd, CRI-O's tools, podman and docker all take it.

use std::collections::{BTreeMap, BTreeSet};

use ring::digest::{SHA256, digest};
use serde_json::{Value, json};

use crate::tar::Tar;

/// What is in an image and how it starts. There is nothing else in it: no shell, no libraries, no users.
#[derive(Debug)]
pub(crate) struct Image<'a> {
    pub(crate) title: &'a str,
    /// With registry and tag; an image may have several.
    pub(crate) names: &'a [String],
    pub(crate) version: &'a str,
    /// As OCI has it: `amd64`, `arm64`.
    pub(crate) architecture: &'a str,
    /// `uid:gid`
    pub(crate) user: &'a str,
    /// Absolute path in the image to content; all are programs.
    pub(crate) programs: BTreeMap<&'a str, Vec<u8>>,
    pub(crate) entrypoint: &'a str,
}

const KIND: &str = "application/vnd.oci.image";
/// When reproducible images were made.
const EPOCH: &str = "1970-01-01T00:00:00Z";

#[derive(Default)]
struct Blobs(BTreeMap<String, Vec<u8>>);

impl Blobs {
    fn add(&mut self, kind: &str, bytes: Vec<u8>) -> Value {
        let sum = hex(&bytes);
        let descriptor =
            json!({"mediaType": format!("{KIND}.{kind}"), "digest": format!("sha256:{sum}"), "size": bytes.len()});
        self.0.insert(sum, bytes);
        descriptor
    }

    fn add_json(&mut self, kind: &str, value: &Value) -> Value {
        self.add(kind, value.to_string().into_bytes())
    }
}

fn hex(bytes: &[u8]) -> String {
    digest(&SHA256, bytes).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn path_of(descriptor: &Value) -> String {
    let digest = descriptor["digest"].as_str().unwrap_or_default();
    format!("blobs/{}", digest.replace(':', "/"))
}

impl Image<'_> {
    /// The archive's bytes: the same image, the same bytes.
    pub(crate) fn archive(&self) -> Vec<u8> {
        let mut blobs = Blobs::default();
        let layer = blobs.add("layer.v1.tar", self.layer());
        let config = blobs.add_json("config.v1+json", &self.config(&layer));
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": format!("{KIND}.manifest.v1+json"),
            "config": config,
            "layers": [layer],
        });
        let mut manifest = blobs.add_json("manifest.v1+json", &manifest);
        manifest["platform"] = json!({"architecture": self.architecture, "os": "linux"});
        let index = json!({
            "schemaVersion": 2,
            "mediaType": format!("{KIND}.index.v1+json"),
            "manifests": self.names.iter().map(|name| {
                let mut named = manifest.clone();
                named["annotations"] = json!({
                    "io.containerd.image.name": name,
                    "org.opencontainers.image.ref.name": name.rsplit_once(':').map_or("latest", |(_, tag)| tag),
                });
                named
            }).collect::<Vec<_>>(),
        });
        let docker = json!([{"Config": path_of(&config), "RepoTags": self.names, "Layers": [path_of(&layer)]}]);

        let mut tar = Tar::default();
        tar.file("oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#);
        tar.file("index.json", 0o644, index.to_string().as_bytes());
        tar.file("manifest.json", 0o644, docker.to_string().as_bytes());
        tar.folder("blobs", 0o755);
        tar.folder("blobs/sha256", 0o755);
        for (sum, bytes) in &blobs.0 {
            tar.file(&format!("blobs/sha256/{sum}"), 0o644, bytes);
        }
        tar.finish()
    }

    fn layer(&self) -> Vec<u8> {
        let mut tar = Tar::default();
        for folder in self.folders() {
            tar.folder(folder, 0o755);
        }
        tar.folder("tmp", 0o1777);
        for (path, content) in &self.programs {
            tar.file(path.trim_start_matches('/'), 0o755, content);
        }
        tar.finish()
    }

    /// Parents before their children.
    fn folders(&self) -> BTreeSet<&str> {
        let mut folders = BTreeSet::new();
        for path in self.programs.keys() {
            let mut path = path.trim_start_matches('/');
            while let Some((parent, _)) = path.rsplit_once('/') {
                folders.insert(parent);
                path = parent;
            }
        }
        folders
    }

    fn config(&self, layer: &Value) -> Value {
        json!({
            "created": EPOCH,
            "architecture": self.architecture,
            "os": "linux",
            "config": {
                "User": self.user,
                "Env": ["PATH=/usr/local/bin"],
                "Entrypoint": [self.entrypoint],
                "WorkingDir": "/",
                "Labels": {
                    "org.opencontainers.image.title": self.title,
                    "org.opencontainers.image.version": self.version,
                    "org.opencontainers.image.licenses": "Apache-2.0",
                },
            },
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
            "history": [{"created": EPOCH, "created_by": "cargo xtask images"}],
        })
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        path::Path,
        process::{Command, Stdio},
    };

    use super::*;

    fn archive() -> Vec<u8> {
        let names = ["localhost/node:1".to_owned(), "localhost/node:edge".to_owned()];
        let programs = [("/usr/local/bin/node", vec![1; 3000]), ("/opt/cni/bin/plugin", vec![2])];
        Image {
            title: "node",
            names: &names,
            version: "1",
            architecture: "amd64",
            user: "0:0",
            programs: programs.into(),
            entrypoint: "/usr/local/bin/node",
        }
        .archive()
    }

    fn unpack(archive: &Path, folder: &Path) {
        let status = Command::new("tar").arg("--extract").arg("--file").arg(archive).current_dir(folder).status();
        assert!(status.expect("tar is there").success());
    }

    fn read(path: &Path) -> Value {
        serde_json::from_slice(&fs::read(path).expect("the file is there")).expect("JSON")
    }

    #[test]
    fn the_same_image_has_the_same_bytes() {
        assert!(archive() == archive());
    }

    #[test]
    fn every_digest_is_that_of_its_blob_and_both_forms_of_the_archive_name_the_same_ones() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("image.tar");
        fs::write(&file, archive()).expect("written");
        unpack(&file, folder.path());
        let blobs = folder.path().join("blobs/sha256");
        for blob in fs::read_dir(&blobs).expect("blobs") {
            let blob = blob.expect("readable");
            assert_eq!(hex(&fs::read(blob.path()).expect("readable")), blob.file_name().to_string_lossy());
        }
        let index = read(&folder.path().join("index.json"));
        let names: Vec<&str> = index["manifests"]
            .as_array()
            .expect("a list")
            .iter()
            .filter_map(|manifest| manifest["annotations"]["io.containerd.image.name"].as_str())
            .collect();
        assert_eq!(names, ["localhost/node:1", "localhost/node:edge"]);
        let manifest = read(&folder.path().join(path_of(&index["manifests"][0])));
        let docker = read(&folder.path().join("manifest.json"));
        assert_eq!(docker[0]["RepoTags"], json!(names));
        assert_eq!(docker[0]["Config"], json!(path_of(&manifest["config"])));
        assert_eq!(docker[0]["Layers"], json!([path_of(&manifest["layers"][0])]));
        let config = read(&folder.path().join(path_of(&manifest["config"])));
        assert_eq!(config["rootfs"]["diff_ids"], json!([manifest["layers"][0]["digest"]]));
    }

    #[test]
    fn a_layer_holds_the_programs_their_folders_and_a_place_for_temporary_files() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("image.tar");
        fs::write(&file, archive()).expect("written");
        unpack(&file, folder.path());
        let docker = read(&folder.path().join("manifest.json"));
        let layer = folder.path().join(docker[0]["Layers"][0].as_str().expect("a path"));
        let list = Command::new("tar").arg("--list").arg("--file").arg(layer).stdout(Stdio::piped()).output();
        let list = String::from_utf8(list.expect("tar is there").stdout).expect("text");
        let expected = [
            "opt/",
            "opt/cni/",
            "opt/cni/bin/",
            "usr/",
            "usr/local/",
            "usr/local/bin/",
            "tmp/",
            "opt/cni/bin/plugin",
            "usr/local/bin/node",
        ];
        assert_eq!(list.lines().collect::<Vec<_>>(), expected);
    }
}
