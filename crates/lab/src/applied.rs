//! Which of the manifests' folder came from which of the user's files, so that a problem is told where the user wrote it.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::manifest::Split;

/// What was applied, by the path below the manifests' folder.
#[derive(Debug, Default)]
pub(crate) struct Applied {
    places: BTreeMap<PathBuf, Place>,
}

#[derive(Debug)]
struct Place {
    /// As the user named it.
    file: String,
    /// Where the user wrote what the lab writes anew; `None` where lines are kept.
    line: Option<usize>,
}

impl Applied {
    pub(crate) fn take(&mut self, file: &str, parts: &Split) {
        self.places.retain(|_, place| place.file != file);
        if has_documents(&parts.rest) {
            let place = Place { file: file.to_owned(), line: None };
            self.places.insert(path_of(file), place);
        }
        for ((kind, namespace, name), line) in &parts.lines {
            let path = match &**kind {
                "Namespace" => format!("namespaces/{name}.yaml"),
                "Pod" => format!("pods/{namespace}_{name}.yaml"),
                _ => format!("services/{namespace}_{name}.yaml"),
            };
            self.places.insert(path.into(), Place { file: file.to_owned(), line: Some(*line) });
        }
    }

    /// What is at `path` is there no more.
    pub(crate) fn forget(&mut self, path: &Path) {
        self.places.remove(path);
    }

    /// The versions of what a file put there, as the control plane names them.
    ///
    /// # Errors
    /// When one of them is no longer there.
    pub(crate) fn versions(&self, file: &str, manifests: &Path) -> Result<Vec<String>> {
        let paths: Vec<&PathBuf> =
            self.places.iter().filter(|(_, place)| place.file == file).map(|(path, _)| path).collect();
        let version = |path: &PathBuf| {
            let meta = fs::metadata(manifests.join(path)).with_context(|| format!("what {file} applied is gone"))?;
            Ok(format!("{}-{}-{}", meta.ino(), meta.ctime(), meta.ctime_nsec()))
        };
        paths.into_iter().map(version).collect()
    }

    /// The control plane's problems with a file, in the user's terms.
    pub(crate) fn told(&self, file: &str, problems: &[Value]) -> Vec<String> {
        let told = |problem: &Value| {
            let text = |field: &str| problem[field].as_str().unwrap_or_default();
            let place = self.places.get(Path::new(text("file"))).filter(|place| place.file == file)?;
            let line = place.line.map_or_else(|| problem["line"].to_string(), |line| line.to_string());
            let field = if text("field").is_empty() { String::new() } else { format!("{}: ", text("field")) };
            Some(format!("{file}:{line}: {field}{}; {}", text("message"), text("remedy")))
        };
        problems.iter().filter_map(told).collect()
    }
}

/// Where, below the manifests' folder, the control plane reads what is not the lab's own of a file.
pub(crate) fn path_of(file: &str) -> PathBuf {
    let name = file.rsplit('/').next().unwrap_or("applied.yaml");
    let suffix = if name.ends_with(".yaml") || name.ends_with(".yml") { "" } else { ".yaml" };
    Path::new("applied").join(format!("{name}{suffix}"))
}

pub(crate) fn has_documents(rest: &str) -> bool {
    rest.lines().any(|line| !line.trim().is_empty() && !line.starts_with("---"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::manifest::split;

    const FILE: &str = "kind: Service\nmetadata: {name: web, namespace: demo}\n---\nkind: ServiceEntry\nmetadata: {name: api}\n---\nkind: Pod\nmetadata: {name: a}\nspec: {containers: [{command: [x]}]}\n";

    #[test]
    fn problems_are_told_where_the_user_wrote() {
        let mut applied = Applied::default();
        applied.take("dir/mine.yaml", &split("dir/mine.yaml", FILE).unwrap());
        let problem =
            |file: &str, field: &str| json!({"file": file, "line": 9, "field": field, "message": "m", "remedy": "r"});
        let problems = [
            problem("services/demo_web.yaml", "metadata"),
            problem("applied/mine.yaml", ""),
            problem("pods/default_a.yaml", "spec"),
            problem("applied/other.yaml", ""),
        ];
        let told = applied.told("dir/mine.yaml", &problems);
        assert_eq!(told, ["dir/mine.yaml:1: metadata: m; r", "dir/mine.yaml:9: m; r", "dir/mine.yaml:6: spec: m; r"]);
        applied.take("dir/mine.yaml", &split("dir/mine.yaml", "").unwrap());
        assert_eq!(applied.told("dir/mine.yaml", &problems), Vec::<String>::new());
    }

    #[test]
    fn every_version_of_what_was_applied_is_named() {
        let folder = std::env::temp_dir().join(format!("fairway-applied-{}", std::process::id()));
        let mut applied = Applied::default();
        applied.take("mine", &split("mine", FILE).unwrap());
        for path in applied.places.keys() {
            fs::create_dir_all(folder.join(path).parent().unwrap()).unwrap();
            fs::write(folder.join(path), "").unwrap();
        }
        let versions = applied.versions("mine", &folder).unwrap();
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(versions.len(), 3);
        assert!(versions.iter().all(|version| version.split('-').count() == 3), "{versions:?}");
        assert!(applied.versions("mine", &folder).is_err());
        applied.places.retain(|path, _| *path == path_of("mine"));
        applied.forget(&path_of("dir/mine"));
        assert_eq!(
            applied.versions("mine", &folder).unwrap(),
            Vec::<String>::new(),
            "what was deleted is not asked for"
        );
        assert_eq!(applied.versions("other", &folder).unwrap(), Vec::<String>::new());
    }
}
