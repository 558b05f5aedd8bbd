//! `fairway debug …`.

use std::{process::ExitCode, sync::Arc, time::Duration};

use mesh_core::identity::Identity;
use mesh_identity::{CaClient, ControlPlane, ControlTls, GrpcCa, GrpcCaConfig, RootSource, TokenSource, csr::Csr};

use crate::args::Debug;

pub(crate) fn run(debug: &Debug) -> anyhow::Result<ExitCode> {
    let Debug::RequestCertificate { address, root, token, identity } = debug;
    let identity: Identity = identity.parse()?;
    let server = ControlPlane {
        address: address.clone(),
        roots: RootSource::File(root.clone()),
        token: TokenSource::File(token.clone()),
        headers: Vec::new(),
        alternative_name: None,
        tls: ControlTls::default(),
    };
    let config = GrpcCaConfig { server, ttl: Duration::from_secs(3600), impersonate: true };
    let request = Csr::generate(&identity)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let answer = runtime.block_on(async {
        let ca: Arc<dyn CaClient> = Arc::new(GrpcCa::new(config)?);
        anyhow::Ok(ca.sign(&identity, request.pem).await?)
    });
    match answer {
        Ok(chain) => {
            crate::output::say!("issued: {} certificates for {identity}", chain.len());
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => {
            crate::output::say!("refused: {error:#}");
            Ok(ExitCode::FAILURE)
        }
    }
}
