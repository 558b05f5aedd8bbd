//! Against a small API server: what is there before and after.

use std::{collections::BTreeMap, time::Duration};

use clap::Parser as _;
use serde_json::json;

use super::*;
use crate::{
    args::{Args, Command},
    cluster::fake::FakeApi,
};

fn selection(arguments: &[&str]) -> Selection {
    let words = [&["fairway", "install", "--skip-check", "--platform", "default"], arguments].concat();
    match Args::try_parse_from(words).unwrap().command {
        Command::Install(install) => install.selection,
        other => panic!("{other:?}"),
    }
}

async fn install(api: &FakeApi, arguments: &[&str]) -> anyhow::Result<()> {
    let selection = selection(arguments);
    let installation = Installation::prepare(api.cluster(), &selection).await?;
    installation.may_go_on(&selection).await?;
    match installation.before {
        None => installation.first(false, Duration::ZERO).await,
        Some(_) => installation.roll(false, Duration::ZERO).await,
    }
    .map(drop)
}

fn removal(arguments: &[&str]) -> crate::args::Uninstall {
    match Args::try_parse_from([&["fairway", "uninstall", "--yes"], arguments].concat()).unwrap().command {
        Command::Uninstall(uninstall) => uninstall,
        other => panic!("{other:?}"),
    }
}

const SYSTEM: &str = "/api/v1/namespaces/istio-system";

#[tokio::test]
async fn what_is_installed_is_what_uninstall_removes() {
    let api = FakeApi::start().await;
    let foreign = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "theirs", "namespace": "shop"}});
    let root = |namespace: &str| json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio-ca-root-cert", "namespace": namespace}});
    api.put(foreign);
    install(&api, &["--hub", "h", "--tag", "t"]).await.unwrap();
    for component in &COMPONENTS {
        let kind = Kind::named(component.kind).unwrap();
        let path = format!("{}/{}", kind.path(Some("istio-system")), component.name);
        let image = api.server.at(&path).unwrap()["spec"]["template"]["spec"]["containers"][0]["image"].clone();
        assert_eq!(image, format!("h/{}:t", component.name));
    }
    assert!(api.server.at(SYSTEM).is_some(), "the namespace is made");
    api.put(root("shop"));
    api.put(root("istio-system"));
    let options = removal(&[]);
    uninstall::with(&api.cluster(), &options).await.unwrap();
    assert_eq!(api.server.paths(), ["/api/v1/namespaces/shop/configmaps/theirs"]);
}

#[tokio::test]
async fn the_agents_go_before_ztunnel_and_ztunnel_before_the_control_plane_and_their_rights_last() {
    let api = FakeApi::start().await;
    install(&api, &[]).await.unwrap();
    api.changes();
    uninstall::with(&api.cluster(), &removal(&[])).await.unwrap();
    let changes = api.changes();
    let at = |what: &str| {
        changes.iter().position(|change| change.contains(what)).unwrap_or_else(|| panic!("{what}: {changes:?}"))
    };
    let order = [
        "daemonsets/fairway-node",
        "daemonsets/ztunnel",
        "deployments/fairwayd",
        "clusterroles/fairway-node-istio-system",
    ];
    assert!(order.windows(2).all(|pair| at(pair[0]) < at(pair[1])), "{changes:?}");
}

#[tokio::test]
async fn a_second_installation_keeps_what_is_not_said_again_and_prunes_what_is_no_more() {
    let api = FakeApi::start().await;
    install(&api, &["--hub", "h", "--tag", "one", "--set", "ztunnel.logLevel=debug"]).await.unwrap();
    let stale = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "stale", "namespace": "istio-system", "labels": {INSTALL: "istio-system"}}});
    api.put(stale);
    install(&api, &["--tag", "two"]).await.unwrap();
    assert!(api.server.at(&format!("{SYSTEM}/services/stale")).is_none());
    let record = Record::read(&api.cluster(), "istio-system").await.unwrap().unwrap();
    assert_eq!((record.hub.as_str(), record.tag.as_str()), ("h", "two"));
    assert_eq!(record.settings, BTreeMap::from([("ztunnel.logLevel".to_owned(), "debug".to_owned())]));
}

#[tokio::test]
async fn what_belongs_to_somebody_else_is_named_and_nothing_is_changed() {
    let api = FakeApi::start().await;
    let theirs = json!({"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": "ztunnel", "namespace": "istio-system",
        "annotations": {"meta.helm.sh/release-name": "ztunnel", "meta.helm.sh/release-namespace": "istio-system"}}});
    api.put(theirs);
    let error = format!("{:#}", install(&api, &[]).await.unwrap_err());
    assert!(error.contains("Helm release ztunnel") && error.contains("DaemonSet istio-system/ztunnel"), "{error}");
    assert!(api.changes().is_empty());
    install(&api, &["--take-over"]).await.unwrap();
}

#[tokio::test]
async fn a_cluster_that_is_not_fit_is_told_before_anything_is_changed() {
    let api = FakeApi::start().await;
    let info = json!({"operatingSystem": "linux", "kernelVersion": "4.19.0", "architecture": "amd64", "containerRuntimeVersion": "containerd://2"});
    api.server.put("api/v1/nodes", json!({"metadata": {"name": "old"}, "status": {"nodeInfo": info}}));
    let mut selection = selection(&[]);
    selection.skip_check = false;
    let installation = Installation::prepare(api.cluster(), &selection).await.unwrap();
    let error = format!("{:#}", installation.may_go_on(&selection).await.unwrap_err());
    assert!(error.contains("not fit"), "{error}");
    assert!(api.changes().is_empty());
}

#[tokio::test]
async fn a_dry_run_changes_nothing() {
    let api = FakeApi::start().await;
    let installation = Installation::prepare(api.cluster(), &selection(&[])).await.unwrap();
    installation.preview().await.unwrap();
    assert!(api.changes().is_empty() && api.server.paths().is_empty());
}

#[tokio::test]
async fn a_dry_run_tells_what_would_be_deleted_and_deletes_nothing() {
    let api = FakeApi::start().await;
    let stale = |labels: Value| json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "stale", "namespace": "istio-system", "labels": labels}});
    api.put(stale(json!({INSTALL: "istio-system"})));
    let prepare = async || Installation::prepare(api.cluster(), &selection(&[])).await.unwrap();
    assert!(prepare().await.superseded().await.unwrap().is_empty(), "a first installation deletes nothing");
    install(&api, &[]).await.unwrap();
    api.changes();
    let again = prepare().await;
    let told: Vec<String> = again.superseded().await.unwrap().iter().map(ToString::to_string).collect();
    assert_eq!(told, ["Service istio-system/stale"]);
    again.preview().await.unwrap();
    assert!(api.changes().is_empty());
}

#[tokio::test]
async fn a_ca_of_somebody_elses_stays_and_ours_goes_unless_it_is_wanted() {
    let secret = format!("{SYSTEM}/secrets/istio-ca-secret");
    for (labels, arguments, stays) in [
        (json!({MANAGED_BY: "fairwayd"}), &[][..], false),
        (json!({MANAGED_BY: "fairwayd"}), &["--keep-ca"], true),
        (json!({}), &[], true),
    ] {
        let api = FakeApi::start().await;
        install(&api, &[]).await.unwrap();
        let metadata = json!({"name": "istio-ca-secret", "namespace": "istio-system", "labels": labels});
        api.server.put("api/v1/secrets", json!({"metadata": metadata}));
        uninstall::with(&api.cluster(), &removal(arguments)).await.unwrap();
        assert_eq!(api.server.at(&secret).is_some(), stays, "{labels} {arguments:?}");
    }
}

#[tokio::test]
async fn what_another_control_plane_uses_stays_whoever_installed_that() {
    for labels in [json!({"app": "istiod"}), json!({"app.kubernetes.io/name": "fairwayd", MANAGED_BY: "Helm"})] {
        let api = FakeApi::start().await;
        install(&api, &[]).await.unwrap();
        api.put(json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "other", "namespace": "elsewhere", "labels": labels}}));
        api.put(json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio-ca-root-cert", "namespace": "shop"}}));
        uninstall::with(&api.cluster(), &removal(&[])).await.unwrap();
        let expected = [
            "/api/v1/namespaces/shop/configmaps/istio-ca-root-cert",
            "/apis/apps/v1/namespaces/elsewhere/deployments/other",
        ];
        assert_eq!(api.server.paths(), expected, "{labels}");
    }
}

#[tokio::test]
async fn others_in_the_namespace_keep_it() {
    let api = FakeApi::start().await;
    install(&api, &[]).await.unwrap();
    let theirs =
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "theirs", "namespace": "istio-system"}});
    api.put(theirs);
    uninstall::with(&api.cluster(), &removal(&[])).await.unwrap();
    assert_eq!(api.server.paths(), [SYSTEM.to_owned(), format!("{SYSTEM}/configmaps/theirs")]);
}

#[tokio::test]
async fn a_definition_stays_while_there_are_objects_of_it() {
    const DEFINITIONS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
    let api = FakeApi::start().await;
    let define = |plural: &str| {
        json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
            "metadata": {"name": format!("{plural}.g.example"), "labels": {INSTALL: "istio-system"}},
            "spec": {"group": "g.example", "names": {"plural": plural}, "versions": [{"name": "v1", "served": true}]}})
    };
    install(&api, &[]).await.unwrap();
    api.put(define("used"));
    api.put(define("unused"));
    let object = "/apis/g.example/v1/namespaces/shop/used/one";
    api.server.put(
        "apis/g.example/v1/used",
        json!({"apiVersion": "g.example/v1", "kind": "Used", "metadata": {"name": "one", "namespace": "shop"}}),
    );
    uninstall::with(&api.cluster(), &removal(&[])).await.unwrap();
    assert_eq!(api.server.paths(), [format!("{DEFINITIONS}/used.g.example"), object.to_owned()]);
    api.put(define("used"));
    uninstall::with(&api.cluster(), &removal(&["--purge-crds"])).await.unwrap();
    assert_eq!(api.server.paths(), [object], "the server itself deletes the objects");
}

/// `used.g.example`, as it stays after an uninstallation, and one object of it.
fn leave_a_definition(api: &FakeApi) {
    api.put(json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "used.g.example", "labels": {MANAGED_BY: "fairway"}},
        "spec": {"group": "g.example", "names": {"plural": "used"}, "versions": [{"name": "v1", "served": true}]}}));
    api.server.put(
        "apis/g.example/v1/used",
        json!({"apiVersion": "g.example/v1", "kind": "Used", "metadata": {"name": "one", "namespace": "shop"}}),
    );
}

#[tokio::test]
async fn what_is_being_deleted_is_waited_for_and_only_what_does_not_go_is_left_behind() {
    let api = FakeApi::start().await;
    install(&api, &[]).await.unwrap();
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "slow", "namespace": "istio-system",
        "labels": {INSTALL: "istio-system"}, "finalizers": ["foregroundDeletion"]}});
    api.put(service.clone());
    // Somebody else's, so that the namespace stays, and does not take everything with it.
    api.put(
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "theirs", "namespace": "istio-system"}}),
    );
    let (asked, mut questions) = tokio::sync::mpsc::unbounded_channel();
    api.server.refuse(move |question| {
        drop(asked.send(format!("{} {}", question.method, question.path)));
        None
    });
    let collector = async {
        let mut looks = None;
        while let Some(question) = questions.recv().await {
            match looks.as_mut() {
                None if question == format!("DELETE {SYSTEM}/services/slow") => looks = Some(0),
                Some(looks) if question == "GET /api/v1/services" => {
                    *looks += 1;
                    // The first look has seen it.
                    if *looks == 2 {
                        api.server.delete("api/v1/services", "istio-system", "slow");
                    }
                }
                _ => {}
            }
        }
        unreachable!("the server asks as long as it is there");
    };
    let (cluster, options) = (api.cluster(), removal(&[]));
    let status = tokio::select! {
        status = uninstall::with(&cluster, &options) => status.unwrap(),
        () = collector => unreachable!(),
    };
    assert_eq!(format!("{status:?}"), format!("{:?}", ExitCode::SUCCESS));
    assert!(api.server.at(&format!("{SYSTEM}/services/slow")).is_none());

    install(&api, &[]).await.unwrap();
    api.put(service);
    let status = uninstall::with(&cluster, &removal(&["--timeout", "1s"])).await.unwrap();
    assert_eq!(format!("{status:?}"), format!("{:?}", ExitCode::FAILURE), "it never goes");
}

#[tokio::test]
async fn a_second_uninstall_purges_what_the_first_was_not_asked_to() {
    let api = FakeApi::start().await;
    install(&api, &[]).await.unwrap();
    leave_a_definition(&api);
    api.put(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop", "labels": {"istio.io/dataplane-mode": "ambient"}}}));
    let theirs =
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "theirs", "namespace": "istio-system"}});
    api.put(theirs);
    uninstall::with(&api.cluster(), &removal(&[])).await.unwrap();
    let definition = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/used.g.example";
    for path in [SYSTEM, definition] {
        assert!(api.server.at(path).is_some(), "{path} stays");
    }
    api.server.delete("api/v1/configmaps", "istio-system", "theirs");
    uninstall::with(&api.cluster(), &removal(&["--purge-labels", "--purge-crds"])).await.unwrap();
    let object = "/apis/g.example/v1/namespaces/shop/used/one";
    assert_eq!(api.server.paths(), ["/api/v1/namespaces/shop", object], "the server itself deletes the objects");
    let shop = api.server.at("/api/v1/namespaces/shop").unwrap();
    assert!(shop["metadata"]["labels"]["istio.io/dataplane-mode"].is_null(), "{shop}");
}

#[tokio::test]
async fn a_definition_that_another_control_plane_may_use_stays_whatever_is_purged() {
    let api = FakeApi::start().await;
    leave_a_definition(&api);
    api.put(
        json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "fairwayd", "namespace": "elsewhere",
        "labels": {"app.kubernetes.io/name": "fairwayd", INSTALL: "elsewhere"}}}),
    );
    uninstall::with(&api.cluster(), &removal(&["--purge-crds"])).await.unwrap();
    assert!(api.changes().is_empty());
}

#[tokio::test]
async fn a_helm_release_is_left_to_helm_and_nothing_is_changed() {
    let api = FakeApi::start().await;
    let agent = |part_of: &str| {
        json!({"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": "ztunnel", "namespace": "istio-system",
            "labels": {"app.kubernetes.io/part-of": part_of},
            "annotations": {"meta.helm.sh/release-name": "mesh", "meta.helm.sh/release-namespace": "istio-system"}}})
    };
    api.put(agent("fairway"));
    leave_a_definition(&api);
    let options = removal(&["--purge-labels", "--purge-crds"]);
    let error = uninstall::with(&api.cluster(), &options).await.unwrap_err().to_string();
    assert_eq!(error, "this is the Helm release mesh: `helm uninstall mesh -n istio-system`; nothing was changed");
    assert!(api.changes().is_empty());
    api.put(agent("istio"));
    uninstall::with(&api.cluster(), &options).await.unwrap();
}

#[tokio::test]
async fn definitions_that_helm_has_kept_are_told_and_stay() {
    let api = FakeApi::start().await;
    let name = "peerauthentications.security.istio.io";
    api.put(json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": name, "annotations": {"meta.helm.sh/release-name": "mesh"}}}));
    let options = removal(&["--purge-crds"]);
    uninstall::with(&api.cluster(), &options).await.unwrap();
    assert!(api.changes().is_empty());
    let deadline = Instant::now();
    let removal = uninstall::Removal { cluster: api.cluster(), options: &options, deadline };
    let stays = removal.stays().await.unwrap();
    assert!(stays.len() == 1 && stays[0].contains(name), "{stays:?}");
}
