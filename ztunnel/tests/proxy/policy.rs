//! Who may talk to whom, for how long.

use std::sync::Arc;

use mesh_core::{
    index::Resource,
    policy::{Action, Scope},
    workload::Workload,
};
use tokio::{join, net::TcpStream};

use crate::{
    mesh::{Mesh, Pod, expect_reset, policy, samples},
    ping_pong,
};

const FAILURES: &str = "fairway_connection_failures_total";

async fn pods(mesh: &Mesh) -> (Pod, Pod) {
    (mesh.pod("client").await, mesh.pod("server").await)
}

async fn open(client: &Pod, server: &Pod) -> (TcpStream, TcpStream) {
    let (listener, address) = server.listen().await;
    let (near, accepted) = join!(client.dial(address), listener.accept());
    (near, accepted.expect("accept").0)
}

#[tokio::test]
async fn an_allowed_identity_gets_in_and_another_is_reset_with_the_reason() {
    let mesh = Mesh::new();
    let ((client, server), stranger) = (pods(&mesh).await, mesh.pod("stranger").await);
    mesh.policy("allow-client", Action::Allow, &["client"]);
    let (listener, address) = server.listen().await;
    expect_reset(&mut stranger.dial(address).await).await;
    let (mut near, accepted) = join!(client.dial(address), listener.accept());
    ping_pong(&mut near, &mut accepted.expect("accept").0).await;
    drop(near);
    let metrics = server.finish().await;
    assert_eq!(samples(&metrics, FAILURES, &[r#"reason="denied""#, " 1"]).len(), 1, "{metrics}");
    let denied = [r#"response_flags="DENY""#, r#"source_principal="spiffe://cluster.local/ns/demo/sa/stranger""#];
    assert_eq!(samples(&metrics, "istio_tcp_connections_failed_total", &denied).len(), 1, "{metrics}");
}

#[tokio::test]
async fn nobody_gets_in_before_the_policies_are_known_to_be_complete() {
    let mesh = Mesh::new();
    let (client, server) = pods(&mesh).await;
    mesh.state.update(|index| index.set_policies_complete(false));
    let (_listener, address) = server.listen().await;
    expect_reset(&mut client.dial(address).await).await;
    let metrics = server.finish().await;
    assert_eq!(samples(&metrics, FAILURES, &[r#"reason="policy_unknown""#]).len(), 1, "{metrics}");
}

#[tokio::test]
async fn a_new_policy_cuts_what_it_denies_and_nothing_else() {
    let mesh = Mesh::new();
    let ((client, server), other) = (pods(&mesh).await, mesh.pod("other").await);
    let (mut denied, mut denied_far) = open(&client, &server).await;
    let (mut kept, mut kept_far) = open(&other, &server).await;
    ping_pong(&mut denied, &mut denied_far).await;
    mesh.policy("deny-client", Action::Deny, &["client"]);
    expect_reset(&mut denied).await;
    expect_reset(&mut denied_far).await;
    ping_pong(&mut kept, &mut kept_far).await;
    drop((kept, kept_far));
    let metrics = server.finish().await;
    assert_eq!(samples(&metrics, FAILURES, &[r#"reason="denied""#, " 1"]).len(), 1, "{metrics}");
}

#[tokio::test]
async fn a_policy_newly_attached_to_a_workload_cuts_too() {
    let mesh = Mesh::new();
    let (client, server) = pods(&mesh).await;
    let (mut near, mut far) = open(&client, &server).await;
    let selective =
        mesh_core::policy::Policy { scope: Scope::WorkloadSelector, ..policy("p", Action::Deny, &["client"]) };
    mesh.upsert([Resource::Policy(Arc::new(selective))]);
    ping_pong(&mut near, &mut far).await;
    let bound = Workload { authorization_policies: vec!["demo/p".into()], ..(*server.workload).clone() };
    mesh.upsert([Resource::Workload(Arc::new(bound))]);
    expect_reset(&mut near).await;
    expect_reset(&mut far).await;
}

#[tokio::test]
async fn after_a_policy_is_gone_new_connections_get_in() {
    let mesh = Mesh::new();
    let (client, server) = pods(&mesh).await;
    mesh.policy("deny-client", Action::Deny, &["client"]);
    let (_listener, address) = server.listen().await;
    expect_reset(&mut client.dial(address).await).await;
    mesh.remove_policy("demo/deny-client");
    let (mut near, mut far) = open(&client, &server).await;
    ping_pong(&mut near, &mut far).await;
}
