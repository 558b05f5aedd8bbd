//! Whose certificates are believed, and that it holds for what is open already.

use std::time::{Duration, SystemTime};

use mesh_core::identity::Identity;
use mesh_identity::{
    Compliance, Trust,
    authority::{CA_CERT_FILE, CA_KEY_FILE, ROOT_CERT_FILE, SigningAuthority},
    crl::Crls,
};
use rcgen::{
    CertificateRevocationListParams, Issuer, KeyIdMethod, KeyPair, RevokedCertParams, SerialNumber, date_time_ymd,
};
use tokio::{
    join,
    net::{TcpListener, TcpStream},
    time::timeout,
};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::{
    mesh::{BRIEF, Mesh, PATIENCE, Pod, expect_reset, identity, samples},
    ping_pong,
};

/// From now on the certificate of this account is revoked, and no other.
pub(crate) fn revoke(mesh: &Mesh, account: &str) {
    let dir = tempfile::tempdir().expect("folder");
    mesh.ca.authority().save(dir.path()).expect("save");
    let read = |name| std::fs::read_to_string(dir.path().join(name)).expect("read");
    let key = KeyPair::from_pem(&read(CA_KEY_FILE)).expect("key");
    let issuer = Issuer::from_ca_cert_pem(&read(CA_CERT_FILE), key).expect("issuer");
    let svid = mesh.identities.cached(&identity(account)).expect("a certificate");
    let (_, leaf) = X509Certificate::from_der(&svid.chain[0]).expect("leaf");
    let now = date_time_ymd(1970, 1, 1) + SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("late");
    let revoked = RevokedCertParams {
        serial_number: SerialNumber::from_slice(leaf.raw_serial()),
        revocation_time: now,
        reason_code: None,
        invalidity_date: None,
    };
    let list = CertificateRevocationListParams {
        this_update: now,
        next_update: now + Duration::from_secs(3600),
        crl_number: SerialNumber::from(1_u64),
        issuing_distribution_point: None,
        revoked_certs: vec![revoked],
        key_identifier_method: KeyIdMethod::Sha256,
    };
    let pem = list.signed_by(&issuer).and_then(|list| list.pem()).expect("list");
    mesh.identities.trust().set_crls(Crls::parse(pem.as_bytes()).expect("parse"));
}

async fn flow(from: &Pod, listener: &TcpListener) -> (TcpStream, TcpStream) {
    let address = listener.local_addr().expect("address");
    let both = async { join!(from.dial(address), listener.accept()) };
    let (near, accepted) = timeout(PATIENCE, both).await.expect("connected");
    (near, accepted.expect("accept").0)
}

fn assert_rejected(metrics: &str, reporter: &str) {
    let reporter = format!(r#"reporter="{reporter}""#);
    let closed =
        samples(metrics, "istio_tcp_connections_closed_total", &[&reporter, r#"response_flags="CERT_REVOKED""#]);
    assert_eq!(closed.len(), 1, "{metrics}");
    assert!(!samples(metrics, "istio_crl_policy_rejections_total", &[&reporter]).is_empty(), "{metrics}");
}

#[tokio::test]
async fn revoking_a_client_cuts_its_flows_refuses_new_ones_and_spares_the_others() {
    let mesh = Mesh::new();
    let (client, other, server) = (mesh.pod("client").await, mesh.pod("other").await, mesh.pod("server").await);
    let (listener, address) = server.listen().await;
    let (mut near, mut far) = flow(&client, &listener).await;
    let (mut other_near, mut other_far) = flow(&other, &listener).await;
    ping_pong(&mut near, &mut far).await;
    revoke(&mesh, "client");
    join!(expect_reset(&mut near), expect_reset(&mut far));
    ping_pong(&mut other_near, &mut other_far).await;
    expect_reset(&mut client.dial(address).await).await;
    drop((flow(&other, &listener).await, other_near, other_far));
    let metrics = server.finish().await;
    assert_rejected(&metrics, "destination");
    let refused = samples(&metrics, "fairway_connection_failures_total", &[r#"reason="revoked""#]);
    assert_eq!(refused.len(), 1, "{metrics}");
}

#[tokio::test]
async fn revoking_a_server_cuts_the_flows_to_it_refuses_new_ones_and_spares_the_others() {
    let mesh = Mesh::new();
    let (client, server, other) = (mesh.pod("client").await, mesh.pod("server").await, mesh.pod("other").await);
    let ((listener, address), (spared, _)) = (server.listen().await, other.listen().await);
    let (mut near, mut far) = flow(&client, &listener).await;
    let (mut other_near, mut other_far) = flow(&client, &spared).await;
    ping_pong(&mut near, &mut far).await;
    revoke(&mesh, "server");
    join!(expect_reset(&mut near), expect_reset(&mut far));
    ping_pong(&mut other_near, &mut other_far).await;
    expect_reset(&mut client.dial(address).await).await;
    drop((other_near, other_far));
    let metrics = client.finish().await;
    assert_rejected(&metrics, "source");
}

#[tokio::test]
async fn a_trust_domain_is_one_under_all_its_names_and_any_other_is_refused() {
    let names = ["cluster.local", "old.test"].map(Into::into).to_vec();
    let mesh = Mesh::trusting(Trust::new(names, Compliance::None));
    let of = async |name: &str, domain: &str| mesh.pod_with(name, |w| w.trust_domain = domain.into()).await;
    let (old, foreign) = (of("old", "old.test").await, of("foreign", "foreign.test").await);
    let new = of("new", "cluster.local").await;
    let (listener, address) = new.listen().await;
    let (mut near, mut far) = flow(&old, &listener).await;
    ping_pong(&mut near, &mut far).await;
    expect_reset(&mut foreign.dial(address).await).await;
    // And the other way round.
    let (listener, _) = old.listen().await;
    let (mut near, mut far) = flow(&new, &listener).await;
    ping_pong(&mut near, &mut far).await;
}

/// Signs with a key of its own, and says that `also` may be believed as well.
fn authority(also: &[&SigningAuthority]) -> SigningAuthority {
    let dir = tempfile::tempdir().expect("folder");
    let new = SigningAuthority::generate("cluster.local").expect("authority");
    new.save(dir.path()).expect("save");
    let roots: String = also.iter().map(|authority| authority.root_pem()).collect();
    std::fs::write(dir.path().join(ROOT_CERT_FILE), new.root_pem().to_owned() + &roots).expect("write");
    SigningAuthority::load(dir.path()).expect("load")
}

#[tokio::test]
async fn a_flow_lives_as_long_as_the_root_that_its_peer_hangs_on() {
    let mesh = Mesh::new();
    let (client, server) = (mesh.pod(BRIEF).await, mesh.pod("server").await);
    let (listener, _) = server.listen().await;
    let (mut near, mut far) = flow(&client, &listener).await;
    ping_pong(&mut near, &mut far).await;
    let mut changes = mesh.identities.trust().changes();
    changes.borrow_and_update();
    // Rotation: first both roots, then the new one only. A brief certificate is renewed soon.
    mesh.ca.replace(authority(&[&mesh.ca.authority()]));
    let renewed = async {
        while roots_of(&mesh, &identity(BRIEF)) != Some(2) {
            changes.changed().await.expect("running");
        }
    };
    timeout(PATIENCE, renewed).await.expect("renewed");
    ping_pong(&mut near, &mut far).await;
    mesh.ca.replace(authority(&[]));
    timeout(PATIENCE, expect_reset(&mut near)).await.expect("cut");
    timeout(PATIENCE, expect_reset(&mut far)).await.expect("cut");
    let metrics = client.finish().await;
    let failures = samples(&metrics, "fairway_connection_failures_total", &[r#"reason="tls""#, " 1"]);
    assert_eq!(failures.len(), 1, "{metrics}");
}

fn roots_of(mesh: &Mesh, identity: &Identity) -> Option<usize> {
    mesh.identities.cached(identity).map(|svid| svid.roots.len())
}
