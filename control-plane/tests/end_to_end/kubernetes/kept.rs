//! What is kept and written in the cluster: the CA, its roots, the Lease, the state of objects.

use std::{fs, os::unix::fs::symlink};

use mesh_identity::authority::SigningAuthority;

use super::*;

const NAMESPACES: &str = "api/v1/namespaces";
const CONFIGMAPS: &str = "api/v1/configmaps";
const LEASES: &str = "apis/coordination.k8s.io/v1/leases";

fn namespace(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
}

/// What a namespace's ConfigMap says.
fn published(api: &ApiServer, namespace: &str) -> Option<String> {
    let map = api.get(CONFIGMAPS, namespace, "istio-ca-root-cert")?;
    assert_eq!(map["metadata"]["labels"]["istio.io/config"], "true");
    map["data"]["root-cert.pem"].as_str().map(str::to_owned)
}

fn holder(api: &ApiServer) -> Option<String> {
    api.get(LEASES, "istio-system", "fairwayd")?["spec"]["holderIdentity"].as_str().map(str::to_owned)
}

pub(super) fn ca_secret(authority: &SigningAuthority, roots: &str) -> Value {
    let bytes = |pem: &str| serde_json::to_value(k8s_openapi::ByteString(pem.as_bytes().to_vec())).unwrap();
    json!({
        "apiVersion": "v1", "kind": "Secret", "type": "istio.io/ca-root",
        "metadata": {"namespace": "istio-system", "name": "istio-ca-secret"},
        "data": {"ca-cert.pem": bytes(authority.certificate_pem()), "ca-key.pem": bytes(authority.key_pem()), "root-cert.pem": bytes(roots)},
    })
}

/// Whether the server shows a certificate that these roots vouch for.
async fn is_vouched_for(running: &Running, roots: &str) -> bool {
    support::try_channel(running.address, roots.as_bytes()).await.is_ok()
}

#[tokio::test]
async fn every_namespace_has_the_roots_and_gets_them_back() {
    let api = api_server().await;
    for name in ["demo", "kube-system", "kube-public", "kube-node-lease", "local-path-storage"] {
        api.put(NAMESPACES, namespace(name));
    }
    let running = run(&api).await;
    let roots = String::from_utf8(roots(&api)).unwrap();
    let has = async |namespace: &str| {
        eventually(namespace, async || published(&api, namespace).as_ref() == Some(&roots)).await;
    };
    has("demo").await;
    has("kube-system").await;
    api.put(NAMESPACES, namespace("late"));
    has("late").await;
    api.delete(CONFIGMAPS, "demo", "istio-ca-root-cert");
    has("demo").await;
    let mut edited = api.get(CONFIGMAPS, "demo", "istio-ca-root-cert").unwrap();
    edited["data"]["root-cert.pem"] = json!("nonsense");
    api.put(CONFIGMAPS, edited);
    has("demo").await;
    for without in ["kube-public", "kube-node-lease", "local-path-storage"] {
        assert_eq!(published(&api, without), None);
    }
    running.stop().await;
}

#[tokio::test]
async fn one_replica_writes_and_another_takes_over_when_it_goes_or_dies() {
    let api = api_server().await;
    api.put(NAMESPACES, namespace("demo"));
    let a = run_as(&api, "a").await;
    eventually("a leads", async || holder(&api).as_deref() == Some("a")).await;
    let b = run_as(&api, "b").await;
    support::ready(b.admin_address).await;
    let leads = async |running: &Running| admin(running.admin_address, "/metrics").await.contains("fairway_leader 1");
    eventually("a knows", async || leads(&a).await).await;
    assert!(!leads(&b).await);
    a.stop().await;
    eventually("b leads", async || holder(&api).as_deref() == Some("b")).await;

    let c = run_as(&api, "c").await;
    // It is gone without a word.
    drop(b);
    eventually("c leads", async || holder(&api).as_deref() == Some("c")).await;
    api.put(NAMESPACES, namespace("late"));
    eventually("c writes", async || published(&api, "late").is_some()).await;
    c.stop().await;
}

#[tokio::test]
async fn a_ca_that_changes_in_its_secret_takes_effect_on_everything_at_once() {
    let (old, new) =
        (SigningAuthority::generate("cluster.local").unwrap(), SigningAuthority::generate("cluster.local").unwrap());
    let both = format!("{}{}", old.root_pem(), new.root_pem());
    let api = api_server().await;
    api.put(NAMESPACES, namespace("demo"));
    api.put(PODS, ztunnel("n1"));
    api.put(PODS, pod("client", "10.0.0.1", "n1"));
    api.review(&token("n1"), review("n1", "ztunnel"));
    api.put(SECRETS, ca_secret(&old, old.root_pem()));
    let running = run(&api).await;
    support::ready(running.admin_address).await;
    assert!(is_vouched_for(&running, old.root_pem()).await);

    // The steps of a rotation: both roots, the new signer, the new root only.
    api.put(SECRETS, ca_secret(&old, &both));
    eventually("both roots are published", async || published(&api, "demo").as_ref() == Some(&both)).await;
    assert!(is_vouched_for(&running, old.root_pem()).await);
    api.put(SECRETS, ca_secret(&new, &both));
    eventually("the new CA signs", async || is_vouched_for(&running, new.root_pem()).await).await;
    assert!(!is_vouched_for(&running, old.root_pem()).await);
    let identity = Identity::new("cluster.local", "demo", "client");
    let csr = Csr::generate(&identity).unwrap().pem;
    let channel = channel(running.address, both.as_bytes()).await;
    let chain = certificate(channel, Some(&token("n1")), Some(&identity.to_string()), csr).await.unwrap();
    assert_eq!(chain.last(), Some(&both), "clients trust whatever the bundle holds");
    api.put(SECRETS, ca_secret(&new, new.root_pem()));
    eventually("the old root is gone", async || published(&api, "demo").as_deref() == Some(new.root_pem())).await;

    // Key and certificate of two CAs: the last good one stays.
    let mut mixed = ca_secret(&new, new.root_pem());
    mixed["data"]["ca-key.pem"] = ca_secret(&old, new.root_pem())["data"]["ca-key.pem"].clone();
    api.put(SECRETS, mixed);
    let problem = r#""object":"Secret istio-system/istio-ca-secret""#;
    eventually("it is told", async || admin(running.admin_address, "/debug/problems").await.contains(problem)).await;
    assert!(is_vouched_for(&running, new.root_pem()).await);
    assert_eq!(published(&api, "demo").as_deref(), Some(new.root_pem()));
    running.stop().await;
}

#[tokio::test]
async fn objects_are_told_what_came_of_them_once() {
    let api = api_server().await;
    api.put(POLICIES, policy("good", json!([{}])));
    api.put(POLICIES, policy("wrong", json!([{"form": []}])));
    api.put(ENTRIES, json!({
        "apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry", "metadata": {"namespace": "demo", "name": "e"},
        "spec": {"hosts": ["api.example.com"], "resolution": "DNS", "ports": [{"number": 443, "name": "tls"}]},
    }));
    let running = run(&api).await;
    let told = |name: &str| {
        let condition = api.get(POLICIES, "demo", name).unwrap()["status"]["conditions"][0].clone();
        [condition["type"].clone(), condition["status"].clone(), condition["reason"].clone()]
    };
    eventually("good", async || told("good") == ["ZtunnelAccepted", "True", "Accepted"]).await;
    eventually("wrong", async || told("wrong") == ["ZtunnelAccepted", "False", "UnsupportedValue"]).await;
    let addresses = || api.get(ENTRIES, "demo", "e").unwrap()["status"]["addresses"].clone();
    eventually("addresses", async || addresses().as_array().is_some_and(|all| all.len() == 2)).await;
    let first = addresses();

    let mut corrected = api.get(POLICIES, "demo", "wrong").unwrap();
    corrected["spec"] = json!({"rules": [{}]});
    api.put(POLICIES, corrected);
    eventually("corrected", async || told("wrong") == ["ZtunnelAccepted", "True", "Accepted"]).await;
    // One write for each thing there was to tell: good, wrong, its correction, and the addresses.
    let writes = || api.asked().iter().filter(|asked| asked.path.ends_with("/status")).count();
    assert_eq!(writes(), 4);
    running.stop().await;

    let again = run_as(&api, "b").await;
    support::ready(again.admin_address).await;
    eventually("b leads", async || holder(&api).as_deref() == Some("b")).await;
    api.put(POLICIES, policy("another", json!([{}])));
    eventually("another", async || told("another") == ["ZtunnelAccepted", "True", "Accepted"]).await;
    assert_eq!((writes(), addresses()), (5, first), "a restart shuffles nothing and tells nothing twice");
    again.stop().await;
}

/// Runs `fairwayd ca rotate` as an operator does; what it says, and whether it did.
async fn rotate(api: &ApiServer, step: &str) -> (bool, String) {
    let folder = tempfile::tempdir().unwrap();
    let kubeconfig = folder.path().join("config");
    fs::write(&kubeconfig, api.kubeconfig()).unwrap();
    let output = tokio::process::Command::new(env!("CARGO_BIN_EXE_fairwayd"))
        .args(["ca", "rotate", "--step", step])
        .env("KUBECONFIG", &kubeconfig)
        .env_remove("KUBERNETES_SERVICE_HOST")
        .output()
        .await
        .unwrap();
    let told = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(told).unwrap())
}

#[tokio::test]
async fn an_operator_rotates_the_ca_in_three_steps_and_a_step_out_of_order_is_refused() {
    let api = api_server().await;
    let (done, told) = rotate(&api, "prepare").await;
    assert!(!done && told.contains("istio-ca-secret does not exist"), "{told}");
    api.put(NAMESPACES, namespace("demo"));
    let running = run(&api).await;
    let old = String::from_utf8(roots(&api)).unwrap();
    let trusted = async |count: usize| {
        eventually("roots", async || {
            published(&api, "demo").is_some_and(|roots| roots.matches("BEGIN CERTIFICATE").count() == count)
        })
        .await;
    };
    trusted(1).await;
    let (done, told) = rotate(&api, "finish").await;
    assert!(!done && told.contains("no rotation is under way; the next step is prepare"), "{told}");
    for (step, roots) in [("prepare", 2), ("switch", 2), ("finish", 1)] {
        let (done, told) = rotate(&api, step).await;
        assert!(done, "{told}");
        trusted(roots).await;
    }
    let new = String::from_utf8(roots(&api)).unwrap();
    assert_ne!(old, new);
    eventually("the new CA signs", async || is_vouched_for(&running, &new).await).await;
    assert!(!is_vouched_for(&running, &old).await);
    running.stop().await;
}

#[tokio::test]
async fn a_mounted_ca_comes_before_the_secret_and_is_followed() {
    let (old, new) =
        (SigningAuthority::generate("cluster.local").unwrap(), SigningAuthority::generate("cluster.local").unwrap());
    let mount = tempfile::tempdir().unwrap();
    // As the kubelet does it: a link to a folder of one version, replaced by rename.
    let version = |name: &str, authority: &SigningAuthority| {
        let folder = mount.path().join(name);
        fs::create_dir(&folder).unwrap();
        let parts = [
            ("tls.crt", authority.certificate_pem()),
            ("tls.key", authority.key_pem()),
            ("ca.crt", authority.root_pem()),
        ];
        for (file, pem) in parts {
            fs::write(folder.join(file), pem).unwrap();
        }
        symlink(name, mount.path().join("..data_tmp")).unwrap();
        fs::rename(mount.path().join("..data_tmp"), mount.path().join("..data")).unwrap();
    };
    version("..1", &old);
    for file in ["tls.crt", "tls.key", "ca.crt"] {
        symlink(format!("..data/{file}"), mount.path().join(file)).unwrap();
    }
    let api = api_server().await;
    let running = run_with(&api, "a", mount.path()).await;
    assert!(is_vouched_for(&running, old.root_pem()).await);
    assert_eq!(api.get(SECRETS, "istio-system", "istio-ca-secret"), None, "none is made");
    version("..2", &new);
    eventually("the new CA signs", async || is_vouched_for(&running, new.root_pem()).await).await;
    running.stop().await;
}
