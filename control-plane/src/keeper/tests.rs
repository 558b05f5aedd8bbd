use std::{collections::BTreeMap, fs};

use mesh_runtime::metrics::Registry;

use super::*;

fn generate() -> SigningAuthority {
    SigningAuthority::generate("cluster.local").unwrap()
}

/// Parts by name, in one of the layouts.
fn parts(authority: &SigningAuthority, layout: [&'static str; 3]) -> BTreeMap<&'static str, String> {
    let pem = [authority.certificate_pem(), authority.key_pem(), authority.root_pem()];
    layout.into_iter().zip(pem.map(str::to_owned)).collect()
}

fn read(parts: &BTreeMap<&'static str, String>) -> Result<SigningAuthority, KeeperError> {
    authority(|name| parts.get(name).cloned(), SystemTime::now())
}

#[test]
fn both_layouts_are_read_and_what_is_missing_is_named() {
    let own = generate();
    for layout in LAYOUTS {
        assert!(read(&parts(&own, layout)).unwrap().is_same(&own));
        let mut without_roots = parts(&own, layout);
        without_roots.remove(layout[2]);
        assert!(read(&without_roots).unwrap().is_same(&own), "a self-signed CA is its own root");
        for name in &layout[..2] {
            let mut without = parts(&own, layout);
            without.insert(name, "  \n".to_owned());
            let error = read(&without).unwrap_err().to_string();
            assert!(error.contains("is missing or empty"), "{name}: {error}");
        }
    }
    assert!(read(&BTreeMap::new()).unwrap_err().to_string().starts_with("`ca-cert.pem` is missing"));
}

#[test]
fn the_newest_usable_authority_is_in_force_and_an_unusable_one_is_a_problem() {
    let (first, second) = (generate(), generate());
    let metrics = Metrics::register(&Registry::new());
    let keeper = Keeper::new(read(&parts(&first, LAYOUTS[0])).unwrap(), "Secret a/b".into(), metrics.clone());
    let (mut in_force, problem) = (keeper.authority(), keeper.problem());

    keeper.offer(read(&parts(&first, LAYOUTS[1])));
    assert!(!in_force.has_changed().unwrap(), "the same parts are no change");

    let mut mixed = parts(&first, LAYOUTS[0]);
    mixed.insert("ca-key.pem", second.key_pem().to_owned());
    keeper.offer(read(&mixed));
    assert!(!in_force.has_changed().unwrap());
    let told = problem.borrow().as_ref().map(ToString::to_string).unwrap();
    assert!(told.starts_with("Secret a/b: what the CA signs would not be believed"), "{told}");
    assert_eq!(metrics.ca_rejected.get(), 1);

    keeper.offer(read(&parts(&second, LAYOUTS[0])));
    assert!(in_force.borrow_and_update().is_same(&second));
    assert_eq!(*problem.borrow(), None);
}

#[test]
fn a_folder_is_mounted_when_it_holds_a_key() {
    let dir = tempfile::tempdir().unwrap();
    assert!(!folder::is_mounted(&dir.path().join("nowhere")) && !folder::is_mounted(dir.path()));
    let own = generate();
    for (name, pem) in parts(&own, LAYOUTS[1]) {
        fs::write(dir.path().join(name), pem).unwrap();
    }
    assert!(folder::is_mounted(dir.path()));
    assert!(folder::authority(dir.path(), SystemTime::now()).unwrap().is_same(&own));
}

#[test]
fn a_secret_that_is_made_says_by_whom() {
    let made = secret::secret("istio-system", &generate());
    let labels = made.metadata.labels.unwrap();
    assert_eq!(labels.get("app.kubernetes.io/managed-by").map(String::as_str), Some("fairwayd"));
}
