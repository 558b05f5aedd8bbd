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
