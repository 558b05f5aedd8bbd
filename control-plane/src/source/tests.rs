use std::{fs, path::Path};

use super::{folder::MAX_FILE_BYTES, *};
use crate::objects::{Settings, Spec};

fn settings() -> Settings {
    Settings { root_namespace: "istio-system".into(), revision: "default".into() }
}

fn catalogue() -> Catalogue {
    Catalogue::new(settings())
}

/// `kind ns/name`, `-` before those that are gone.
fn names(changes: Vec<ObjectChange>) -> Vec<String> {
    changes.into_iter().map(|(key, object)| format!("{}{key}", if object.is_some() { "" } else { "-" })).collect()
}

fn set(catalogue: &mut Catalogue, file: &str, text: &str) -> Vec<String> {
    catalogue.set_file(&file.into(), text);
    names(catalogue.changes())
}

fn problems(text: &str) -> Vec<String> {
    let mut catalogue = catalogue();
    catalogue.set_file(&"f.yaml".into(), text);
    catalogue.problems().iter().map(ToString::to_string).collect()
}

fn policy(body: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{namespace: demo, name: p}}\n{body}"
    )
}

fn account(name: &str) -> String {
    format!("apiVersion: v1\nkind: ServiceAccount\nmetadata: {{namespace: demo, name: {name}}}\n")
}

#[test]
fn each_mistake_is_told_with_its_place_and_remedy() {
    let table: Vec<(&str, String, &str)> = vec![
        ("syntax", "a: [1\nb: 2\n".into(), "f.yaml:2: "),
        ("no kind", "apiVersion: v1\nmetadata: {name: x}\n".into(), "f.yaml:1: `kind` is missing; add `kind:`"),
        ("no name", "apiVersion: v1\nkind: Pod\nmetadata: {}\n".into(), "f.yaml:3: metadata: `name` is missing; add `name:`"),
        (
            "bad name",
            account("Has_Upper"),
            "f.yaml:3: metadata.name: not a valid name; expected lower-case letters, digits, `-` and `.`, at most 253",
        ),
        (
            "wrong group",
            "apiVersion: v1\nkind: AuthorizationPolicy\nmetadata: {name: x}\n".into(),
            "f.yaml:1: apiVersion: AuthorizationPolicy is not of `v1`; expected apiVersion security.istio.io/…; ignored until then",
        ),
        (
            "misspelt kind",
            "apiVersion: security.istio.io/v1\nkind: AuthorisationPolicy\nmetadata: {name: x}\n".into(),
            "f.yaml:2: kind: AuthorisationPolicy has no effect here; known kinds of security.istio.io: AuthorizationPolicy, PeerAuthentication",
        ),
        (
            "misspelt field",
            policy("spec:\n  rules:\n  - form:\n    - source: {namespaces: [a]}\n"),
            "f.yaml:6: spec.rules[0].form: unknown field; did you mean `from`?",
        ),
        (
            "misspelt field, flow style",
            policy("spec: {rules: [{from: [{source: {\n  principels: [a]}}]}]}\n"),
            "f.yaml:5: spec.rules[0].from[0].source.principels: unknown field; did you mean `principals`?",
        ),
        (
            "unlike any field",
            policy("spec:\n  whatever: 1\n"),
            "f.yaml:5: spec.whatever: unknown field; known here: selector, targetRef, targetRefs, action, provider, rules",
        ),
        (
            "port",
            policy("spec:\n  rules:\n  - to:\n    - operation:\n        ports: [\"80\", \"http\"]\n"),
            "f.yaml:8: spec.rules[0].to[0].operation.ports[1]: `http` is not valid here; expected a port number, 0 to 65535",
        ),
        (
            "address",
            policy("spec:\n  rules:\n  - from:\n    - source:\n        # which?\n        ipBlocks:\n        - 10.0.0.0/33\n"),
            "f.yaml:10: spec.rules[0].from[0].source.ipBlocks[0]: `10.0.0.0/33` is not an address or range; expected an IP address or CIDR range, like 10.0.0.0/8",
        ),
        (
            "scheme",
            policy("spec: {rules: [{from: [{source: {principals: [\"spiffe://td/ns/a/sa/b\"]}}]}]}\n"),
            "f.yaml:4: spec.rules[0].from[0].source.principals[0]: a principal is written without its scheme; remove `spiffe://`",
        ),
        (
            "trust domain by its end",
            policy("spec: {rules: [{from: [{source: {trustDomains: [\"*.example\"]}}]}]}\n"),
            "f.yaml:4: spec.rules[0].from[0].source.trustDomains[0]: `*.example` cannot be told apart at layer 4; write the whole trust domain, or its start and a `*`",
        ),
        (
            "trust domains beside principals",
            policy("spec: {rules: [{from: [{source: {principals: [\"*\"], trustDomains: [td]}}]}]}\n"),
            "f.yaml:4: spec.rules[0].from[0].source.trustDomains: trust domains beside principals are not supported; write the domain in the principals: `DOMAIN/ns/…`",
        ),
        (
            "provider without CUSTOM",
            policy("spec: {action: DENY, provider: {name: x}}\n"),
            "f.yaml:4: spec.provider: a provider decides for CUSTOM only; remove it",
        ),
        (
            "pattern",
            policy("spec: {rules: [{from: [{source: {namespaces: [\"a*b\"]}}]}]}\n"),
            "f.yaml:4: spec.rules[0].from[0].source.namespaces[0]: `a*b` is not a pattern; a `*` may stand alone, at the start or at the end",
        ),
        (
            "an empty list, which would mean any",
            policy("spec: {rules: [{from: [{source: {namespaces: []}}]}]}\n"),
            "f.yaml:4: spec.rules[0].from[0].source.namespaces: the list is empty; add a value, or remove the field",
        ),
        (
            "action",
            policy("spec: {action: PERMIT}\n"),
            "f.yaml:4: spec.action: `PERMIT` is not an action; expected ALLOW or DENY",
        ),
        (
            "condition",
            policy("spec: {rules: [{when: [{key: source.port, values: [a]}]}]}\n"),
            "f.yaml:4: spec.rules[0].when[0].key: `source.port` is not a known condition; expected source.ip, source.namespace, source.principal, destination.ip or destination.port",
        ),
        (
            "layer 7",
            policy("spec: {rules: [{to: [{operation: {methods: [GET]}}]}]}\n"),
            "f.yaml:4: spec.rules[0]: layer-7 conditions (spec.rules[0].to[0].operation.methods) are not known at layer 4: the rule is left out, so it allows nothing; use a waypoint, or ports and sources only",
        ),
        (
            "mode",
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: x}\nspec:\n  mtls:\n    mode: STRIKT\n".into(),
            "f.yaml:6: spec.mtls.mode: `STRIKT` is not valid here; expected one of STRICT, PERMISSIVE, DISABLE, UNSET",
        ),
        (
            "carriage returns",
            policy("spec:\n  whatever: 1\n").replace('\n', "\r\n"),
            "f.yaml:5: spec.whatever: unknown field; known here: selector, targetRef, targetRefs, action, provider, rules",
        ),
        (
            "second document",
            format!("# one\n{}---\n# two\n{}", account("a"), policy("spec: {whatever: 1}\n")),
            "f.yaml:10: spec.whatever: unknown field; known here: selector, targetRef, targetRefs, action, provider, rules",
        ),
        (
            "given twice",
            policy("spec: {}\nspec: {}\n"),
            "f.yaml:5: field `spec` is given twice; correct the YAML; objects read from this file before stay in force",
        ),
        (
            "pod address",
            "apiVersion: v1\nkind: Pod\nmetadata: {name: x}\nspec: {}\nstatus:\n  podIPs:\n  - ip: 10.0.0\n".into(),
            "f.yaml:7: status.podIPs[0].ip: `10.0.0` is not valid here; expected an IP address",
        ),
    ];
    for (case, text, expected) in table {
        let found = problems(&text);
        assert!(
            found.len() == 1 && found[0].starts_with(expected),
            "{case}:\nfound    {found:#?}\nexpected {expected}"
        );
    }
}

#[test]
fn other_kinds_and_empty_documents_are_no_problem() {
    let deployment = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: x}\n";
    let knative = "apiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {name: x}\n";
    assert_eq!(problems(&format!("---\n# nothing\n---\n{deployment}---\n{knative}---\n")), Vec::<String>::new());
}

#[test]
fn a_list_is_its_items() {
    let list = "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: ServiceAccount, metadata: {name: a}}\n- {apiVersion: v1, kind: Pod, metadata: {}}\n";
    let mut catalogue = catalogue();
    assert_eq!(set(&mut catalogue, "f.yaml", list), ["ServiceAccount default/a"]);
    assert_eq!(catalogue.problems()[0].to_string(), "f.yaml:5: items[1].metadata: `name` is missing; add `name:`");
}

#[test]
fn only_what_changed_is_reported() {
    let mut catalogue = catalogue();
    let text = format!("{}---\n{}", account("a"), account("b"));
    assert_eq!(set(&mut catalogue, "f.yaml", &text), ["ServiceAccount demo/a", "ServiceAccount demo/b"]);
    assert_eq!(set(&mut catalogue, "f.yaml", &text), Vec::<String>::new());
    assert_eq!(set(&mut catalogue, "f.yaml", &account("a")), ["-ServiceAccount demo/b"]);
    catalogue.remove(&"f.yaml".into());
    assert_eq!(names(catalogue.changes()), ["-ServiceAccount demo/a"]);
}

#[test]
fn a_wrong_policy_keeps_its_last_good_version_and_harms_nothing_else() {
    let mut catalogue = catalogue();
    let with = |spec: &str| format!("{}---\n{}", policy(spec), account("a"));
    assert_eq!(set(&mut catalogue, "f.yaml", &with("spec: {action: DENY}\n")).len(), 2);
    assert_eq!(set(&mut catalogue, "f.yaml", &with("spec: {action: DANY}\n")), Vec::<String>::new());
    assert_eq!(catalogue.problems().len(), 1);
    // Still so after a second mistake.
    assert_eq!(set(&mut catalogue, "f.yaml", &with("spec: {actoin: DENY}\n")), Vec::<String>::new());
    assert_eq!(set(&mut catalogue, "f.yaml", &with("spec: {action: ALLOW}\n")), ["AuthorizationPolicy demo/p"]);
    assert_eq!(catalogue.problems(), Vec::new());
}

#[test]
fn unreadable_yaml_keeps_everything_the_file_had_but_takes_what_can_be_read() {
    let mut catalogue = catalogue();
    set(&mut catalogue, "f.yaml", &format!("{}---\n{}", account("a"), account("b")));
    let broken = format!("{}---\nkind: [\n---\n{}", account("a"), account("c"));
    assert_eq!(set(&mut catalogue, "f.yaml", &broken), ["ServiceAccount demo/c"]);
    let gone = ["-ServiceAccount demo/a", "-ServiceAccount demo/b"];
    assert_eq!(set(&mut catalogue, "f.yaml", &account("c"))[..2], gone);
}

#[test]
fn a_policy_that_never_was_right_is_replaced_by_one_that_denies_what_it_selects() {
    let mut catalogue = catalogue();
    let text = policy("spec:\n  selector: {matchLabels: {app: web}}\n  rulez: []\n");
    catalogue.set_file(&"f.yaml".into(), &text);
    let changes = catalogue.changes();
    let Some(Spec::AuthorizationPolicy(stand_in)) = changes[0].1.as_ref().map(|o| &o.spec) else { panic!() };
    let policy = stand_in.policy.as_ref().unwrap();
    assert_eq!((policy.action, policy.rules.len()), (mesh_core::policy::Action::Deny, 1));
    assert_eq!(stand_in.selector.len(), 1);
    let origin = policy.rules[0].origin.to_string();
    assert_eq!(origin, "AuthorizationPolicy demo/p (rejected: unknown field) (f.yaml:6, spec.rulez)");
    // A stand-in is no version to keep.
    assert_eq!(set(&mut catalogue, "f.yaml", &account("a")).len(), 2);
}

#[test]
fn an_object_in_two_places_is_told_and_the_first_is_in_force() {
    let mut catalogue = catalogue();
    let labelled = |app: &str| {
        format!("# x\napiVersion: v1\nkind: Pod\nmetadata: {{name: p, labels: {{app: {app}}}}}\nspec: {{}}\n")
    };
    set(&mut catalogue, "b.yaml", &labelled("b"));
    assert_eq!(set(&mut catalogue, "a.yaml", &labelled("a")), ["Pod default/p"]);
    let told = "b.yaml:2: Pod default/p is also written at a.yaml:2, which is in force; remove one of the two";
    assert_eq!(catalogue.problems()[0].to_string(), told);
    catalogue.remove(&"a.yaml".into());
    let back = catalogue.changes();
    assert_eq!(back[0].1.as_ref().unwrap().place.to_string(), "b.yaml:2");
    assert_eq!(catalogue.problems(), Vec::new());
}

#[test]
fn origins_are_those_of_the_object_and_of_each_rule() {
    let mut catalogue = catalogue();
    let text = format!("# top\n{}", policy("spec:\n  rules:\n  - {}\n\n  - to:\n    - operation: {ports: [\"80\"]}\n"));
    catalogue.set_file(&"sub/f.yaml".into(), &text);
    let changes = catalogue.changes();
    let Some(Spec::AuthorizationPolicy(p)) = changes[0].1.as_ref().map(|o| &o.spec) else { panic!() };
    let policy = p.policy.as_ref().unwrap();
    assert_eq!(policy.origin.to_string(), "AuthorizationPolicy demo/p (sub/f.yaml:2)");
    let rules: Vec<String> = policy.rules.iter().map(|r| r.origin.to_string()).collect();
    let expected = ["(sub/f.yaml:7, spec.rules[0])", "(sub/f.yaml:9, spec.rules[1])"];
    assert_eq!(rules, expected.map(|place| format!("AuthorizationPolicy demo/p {place}")));
}

#[test]
fn a_folder_is_read_with_its_subfolders_and_without_dot_files() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    write("a.yaml", &account("a"));
    write("sub/deep/b.yml", &account("b"));
    write(".hidden.yaml", &account("c"));
    write(".git/d.yaml", &account("d"));
    write("notes.txt", &account("e"));
    let mut folder = Folder::new(dir.path().to_owned(), settings());
    assert_eq!(names(folder.scan()), ["ServiceAccount demo/a", "ServiceAccount demo/b"]);
    assert_eq!(names(folder.scan()), Vec::<String>::new());

    write(".new", &account("f"));
    fs::rename(dir.path().join(".new"), dir.path().join("a.yaml")).unwrap();
    assert_eq!(names(folder.scan()), ["-ServiceAccount demo/a", "ServiceAccount demo/f"]);

    fs::write(dir.path().join("a.yaml"), b"a: 1\nb: \xff\n").unwrap();
    assert_eq!(names(folder.scan()), Vec::<String>::new());
    assert_eq!(folder.problems()[0].to_string(), "a.yaml:2: the file is not UTF-8; save it as UTF-8");
}

#[test]
fn a_folder_that_cannot_be_read_is_told_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("manifests");
    let mut folder = Folder::new(root.clone(), settings());
    assert_eq!(folder.scan(), Vec::new());
    assert!(!folder.is_readable());
    assert!(folder.problems()[0].message.starts_with("the manifest folder cannot be read"));
    fs::create_dir(&root).unwrap();
    fs::write(root.join("a.yaml"), account("a")).unwrap();
    assert_eq!(folder.scan().len(), 1);
    fs::remove_dir_all(&root).unwrap();
    assert_eq!(folder.scan(), Vec::new());
    assert_eq!(folder.catalogue.len(), 1);
}

#[test]
fn a_file_is_unread_until_all_of_it_was_identified_once() {
    let mut catalogue = catalogue();
    let unread = |catalogue: &Catalogue| catalogue.unread().iter().map(ToString::to_string).collect::<Vec<_>>();
    set(&mut catalogue, "wrong.yaml", &policy("spec: {rulez: []}\n")); // has a stand-in
    set(&mut catalogue, "f.yaml", &format!("{}---\nkind: [\n", account("a")));
    catalogue.set_unreadable(&"g.yaml".into(), 1, "it cannot be read", "");
    assert_eq!(unread(&catalogue), ["f.yaml", "g.yaml"]);
    set(&mut catalogue, "f.yaml", &account("a"));
    assert_eq!(unread(&catalogue), ["g.yaml"]);
    set(&mut catalogue, "f.yaml", "kind: [\n");
    catalogue.remove(&"g.yaml".into());
    assert_eq!(unread(&catalogue), Vec::<String>::new());
}

#[test]
fn a_file_that_cannot_be_looked_at_is_not_gone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.yaml");
    let to_itself = |path: &Path| {
        fs::remove_file(path).unwrap_or_default();
        std::os::unix::fs::symlink(path, path).unwrap();
    };
    fs::write(&path, account("a")).unwrap();
    to_itself(&dir.path().join("no-manifest"));
    let mut folder = Folder::new(dir.path().to_owned(), settings());
    assert_eq!(folder.scan().len(), 1);
    assert_eq!(folder.problems(), Vec::new());

    to_itself(&path);
    assert_eq!(names(folder.scan()), Vec::<String>::new());
    assert!(folder.is_readable());
    assert!(folder.problems()[0].to_string().starts_with("a.yaml:1: the file cannot be read: "));

    fs::remove_file(&path).unwrap();
    assert_eq!(names(folder.scan()), ["-ServiceAccount demo/a"]);
    assert_eq!(folder.problems(), Vec::new());
    // A dangling link is no file.
    std::os::unix::fs::symlink("nowhere", &path).unwrap();
    assert_eq!(names(folder.scan()), Vec::<String>::new());
    assert_eq!(folder.problems(), Vec::new());
}

#[test]
fn a_file_that_could_not_be_read_is_tried_again_and_can_go() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.yaml");
    fs::File::create(&path).unwrap().set_len(MAX_FILE_BYTES + 1).unwrap();
    let mut folder = Folder::new(dir.path().to_owned(), settings());
    assert_eq!(folder.scan(), Vec::new());
    assert!(folder.problems()[0].message.contains("larger"));
    assert!(folder.stamps.is_empty(), "nothing was read");
    fs::remove_file(&path).unwrap();
    assert_eq!(folder.scan(), Vec::new());
    assert_eq!(folder.problems(), Vec::new());
    fs::write(&path, account("a")).unwrap();
    assert_eq!(folder.scan().len(), 1);
    assert_eq!(folder.stamps.len(), 1);
}
