//! The webhook, as an API server calls it: believing only what its configuration says.

use std::sync::Arc;

use http::Method;
use mesh_identity::authority::SigningAuthority;
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject as _};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{kept::ca_secret, *};

const CONFIGURATIONS: &str = "apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations";
const NAME: &str = "fairway-istio-system";

/// As an installation makes it: who answers is known, but not yet what to believe of him.
fn configuration() -> Value {
    let service = json!({"name": "fairwayd", "namespace": "istio-system", "path": "/validate", "port": 443});
    json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration", "metadata": {"name": NAME},
        "webhooks": [{
            "name": "validation.fairway.dev", "admissionReviewVersions": ["v1"], "sideEffects": "None",
            "clientConfig": {"service": service},
        }],
    })
}

async fn run(api: &ApiServer) -> Running {
    let source = source(api, "a", Path::new("/nowhere"));
    let any_port: SocketAddr = "127.0.0.1:0".parse().unwrap();
    app::start(Config { webhook: Some(any_port), ..Config::new(source, any_port, any_port) }).await.unwrap()
}

fn bundle(api: &ApiServer) -> Option<String> {
    let bundle = api.get(CONFIGURATIONS, "", NAME)?["webhooks"][0]["clientConfig"]["caBundle"].clone();
    let bytes: k8s_openapi::ByteString = serde_json::from_value(bundle).ok()?;
    String::from_utf8(bytes.0).ok()
}

async fn bundle_is(api: &ApiServer, expected: &str) {
    eventually("the bundle", async || bundle(api).as_deref() == Some(expected)).await;
}

/// Connects as an API server does that was told to believe `roots`.
async fn connect(running: &Running, roots: &str) -> std::io::Result<TlsStream<TcpStream>> {
    let mut believed = rustls::RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(roots.as_bytes()) {
        believed.add(root.unwrap()).unwrap();
    }
    let mut tls = rustls::ClientConfig::builder_with_provider(mesh_identity::tls::provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(believed)
        .with_no_client_auth();
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    let name = ServerName::try_from("fairwayd.istio-system.svc").unwrap();
    let stream = TcpStream::connect(running.webhook_address.unwrap()).await?;
    TlsConnector::from(Arc::new(tls)).connect(name, stream).await
}

async fn ask(running: &Running, roots: &str, line: &str, body: &str) -> String {
    let mut stream = connect(running, roots).await.unwrap();
    let head = format!(
        "{line} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(body.as_bytes()).await.unwrap();
    stream.flush().await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

fn review(object: &Value) -> String {
    json!({
        "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
        "request": {
            "uid": "u-1", "operation": "CREATE", "object": object,
            "kind": {"group": "security.istio.io", "version": "v1", "kind": "AuthorizationPolicy"},
        },
    })
    .to_string()
}

fn response(answer: &str) -> Value {
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    serde_json::from_str::<Value>(body).unwrap()["response"].clone()
}

#[tokio::test]
async fn an_api_server_that_believes_the_bundle_is_told_what_is_wrong() {
    let api = ApiServer::start().await;
    api.put(CONFIGURATIONS, configuration());
    let running = run(&api).await;
    let roots = String::from_utf8(roots(&api)).unwrap();
    bundle_is(&api, &roots).await;
    let mut silent = connect(&running, &roots).await.unwrap();

    let good =
        response(&ask(&running, &roots, "POST /validate?timeout=2s", &review(&policy("good", json!([{}])))).await);
    assert_eq!(good, json!({"uid": "u-1", "allowed": true}));
    let wrong =
        response(&ask(&running, &roots, "POST /validate", &review(&policy("wrong", json!([{"form": []}])))).await);
    assert_eq!(wrong["allowed"], false);
    let told = "AuthorizationPolicy demo/wrong would not mean what it says:\n- spec.rules[0].form: unknown field; did you mean `from`?";
    assert_eq!(wrong["status"]["message"], told);

    let large = "x".repeat(3 * 1024 * 1024 + 1);
    for (line, body, status) in [
        ("POST /validate", "{}", "400"),
        ("POST /validate", &*large, "413"),
        ("GET /validate", "", "405"),
        ("POST /mutate", "{}", "404"),
    ] {
        let answer = ask(&running, &roots, line, body).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{line}: {answer}");
    }
    // Who says nothing is sent away.
    drop(tokio::time::timeout(support::PATIENCE, silent.read_to_end(&mut Vec::new())).await.expect("an end"));
    let metrics = admin(running.admin_address, "/metrics").await;
    for result in ["allowed", "denied", "malformed", "oversized", "timed_out"] {
        let line = format!("fairwayd_admission_reviews_total{{result=\"{result}\"}} 1\n");
        assert!(metrics.contains(&line), "{line}{metrics}");
    }
    running.stop().await;
}

#[tokio::test]
async fn peers_who_send_no_request_keep_no_api_server_out() {
    let api = ApiServer::start().await;
    let running = run(&api).await;
    let roots = String::from_utf8(roots(&api)).unwrap();
    let mut silent = Vec::new();
    for _ in 0..40 {
        silent.push(connect(&running, &roots).await.unwrap());
    }
    let asked = ask(&running, &roots, "POST /validate", &review(&policy("good", json!([{}])))).await;
    assert_eq!(response(&asked), json!({"uid": "u-1", "allowed": true}));
    let counted = "fairwayd_admission_reviews_total{result=\"displaced\"}";
    assert!(admin(running.admin_address, "/metrics").await.contains(counted));
    running.stop().await;
}

#[tokio::test]
async fn the_bundle_follows_a_rotation_and_is_put_back_and_nothing_is_made_where_none_is() {
    let authority = || SigningAuthority::generate("cluster.local").unwrap();
    let (old, new) = (authority(), authority());
    let both = format!("{}{}", old.root_pem(), new.root_pem());
    let api = ApiServer::start().await;
    api.put(SECRETS, ca_secret(&old, old.root_pem()));
    let running = run(&api).await;
    support::ready(running.admin_address).await;
    let leads = async || admin(running.admin_address, "/metrics").await.contains("fairway_leader 1");
    eventually("it leads", leads).await;
    assert_eq!(api.get(CONFIGURATIONS, "", NAME), None);
    api.put(CONFIGURATIONS, configuration());
    bundle_is(&api, old.root_pem()).await;
    let is_believed = async |roots: &str| connect(&running, roots).await.is_ok();
    assert!(is_believed(old.root_pem()).await);

    api.put(SECRETS, ca_secret(&old, &both));
    bundle_is(&api, &both).await;
    assert!(is_believed(&both).await);
    api.put(SECRETS, ca_secret(&new, &both));
    eventually("the new CA vouches for it", async || is_believed(new.root_pem()).await).await;
    assert!(is_believed(&both).await && !is_believed(old.root_pem()).await);
    api.put(SECRETS, ca_secret(&new, new.root_pem()));
    bundle_is(&api, new.root_pem()).await;

    // An upgrade that knows nothing of it.
    api.put(CONFIGURATIONS, configuration());
    bundle_is(&api, new.root_pem()).await;
    let writes =
        || api.asked().iter().filter(|a| a.method == Method::PATCH && a.path.contains("webhookconfigurations")).count();
    assert!((4..8).contains(&writes()), "written when it differs, not again and again");
    running.stop().await;
}
