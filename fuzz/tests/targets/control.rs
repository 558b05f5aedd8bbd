//! Discovery, and tokens.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
};

use control_plane::app::{self, Config, Running, Source};
use fuzz::target;
use mesh_core::{
    index::Resource,
    policy::{Action, Policy, Rule},
};
use mesh_identity::{ControlPlane, RootSource, TokenSource};
use mesh_xds::convert::{Unacceptable, resource_from_wire, resource_to_wire, unreadable_policy};
use proto::{
    ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL,
    ca::{IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient},
};
use tonic::{Code, Request, transport::Channel};

use crate::text;

target!(xds_address, |bytes: &[u8]| {
    if let Ok(resource) = resource_from_wire(ADDRESS_TYPE_URL, bytes) {
        assert_eq!(over_the_wire(&resource), Ok(resource));
    }
});

target!(xds_policy, |bytes: &[u8]| match resource_from_wire(AUTHORIZATION_TYPE_URL, bytes) {
    Ok(resource) => assert_eq!(enforced(&over_the_wire(&resource).expect("own bytes")), enforced(&resource)),
    Err(problem) => {
        assert!(!problem.field.is_empty());
        let stand_in = unreadable_policy("namespace/name", bytes, &problem);
        assert!(stand_in.action == Action::Deny && !stand_in.dry_run, "an unreadable policy must deny");
        assert!(stand_in.rules.iter().any(|rule| rule.clauses.is_empty()), "… whatever it selects");
    }
});

fn over_the_wire(resource: &Resource) -> Result<Resource, Unacceptable> {
    let encoded = resource_to_wire(resource);
    resource_from_wire(encoded.type_url, &encoded.body)
}

/// A policy without its places: one that arrived without them gets some when it is sent on.
fn enforced(resource: &Resource) -> Policy {
    let Resource::Policy(policy) = resource else { panic!("{resource:?} is no policy") };
    let rules = policy.rules.iter().map(|rule| Rule { clauses: rule.clauses.clone(), ..Rule::default() }).collect();
    Policy { rules, origin: Default::default(), ..Policy::clone(policy) }
}

target!(
    /// A caller whose token was not signed by this control plane is not let in, whatever it is.
    token,
    runs = 200,
    |bytes: &[u8]| {
        static SERVER: Mutex<Option<Server>> = Mutex::new(None);
        let mut server = SERVER.lock().unwrap_or_else(PoisonError::into_inner);
        let refused = server.get_or_insert_with(Server::start).ask(&text(bytes));
        assert!(refused.is_none_or(|code| code == Code::Unauthenticated), "{refused:?}");
    }
);

/// A control plane of its own, with its state in a folder that goes with it.
struct Server {
    runtime: tokio::runtime::Runtime,
    /// Serves until dropped.
    _running: Running,
    _folder: Arc<tempfile::TempDir>,
    channel: Channel,
}

impl Server {
    fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let folder = Arc::new(tempfile::tempdir().expect("a temporary directory"));
        let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
        let (manifests, state) = (folder.path().join("manifests"), folder.path().join("state"));
        std::fs::create_dir(&manifests).expect("a folder of manifests");
        let source = Source::Folder { manifests, state: state.clone() };
        let running = runtime.block_on(app::start(Config::new(source, any_port, any_port)));
        let running = running.expect("a control plane");
        let client = ControlPlane {
            address: running.address.to_string(),
            roots: RootSource::File(state.join("root-cert.pem")),
            token: TokenSource::None,
            headers: Vec::new(),
            alternative_name: None,
            tls: mesh_identity::ControlTls::default(),
        };
        let channel = runtime.block_on(client.connect()).expect("a channel");
        Self { runtime, _running: running, _folder: folder, channel }
    }

    /// The answer's code; `None` for a token that no header can carry.
    fn ask(&self, token: &str) -> Option<Code> {
        let mut request = Request::new(IstioCertificateRequest::default());
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().ok()?);
        let mut client = IstioCertificateServiceClient::new(self.channel.clone());
        let answer = self.runtime.block_on(client.create_certificate(request));
        Some(answer.map_or_else(|status| status.code(), |_| Code::Ok))
    }
}
