//! `fairway debug …`.

use std::{path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use lab::wire::Recorder;
use mesh_core::identity::Identity;
use mesh_identity::{CaClient, ControlPlane, ControlTls, GrpcCa, GrpcCaConfig, RootSource, TokenSource, csr::Csr};
use mesh_net::NetNs;

use crate::args::Debug;

pub(crate) fn run(debug: Debug) -> anyhow::Result<ExitCode> {
    match debug {
        Debug::RequestCertificate { address, root, token, identity } => {
            request_certificate(address, root, token, &identity)
        }
        Debug::Wire { interface, pods, nonce, seconds } => {
            let recorder = Recorder::start(&NetNs::current()?, &interface, pods)?;
            crate::output::say!("listening");
            std::thread::sleep(Duration::try_from_secs_f64(seconds)?);
            crate::output::say!("{}", serde_json::to_string(&recorder.look(nonce.as_deref()))?);
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn request_certificate(address: String, root: PathBuf, token: PathBuf, identity: &str) -> anyhow::Result<ExitCode> {
    let identity: Identity = identity.parse()?;
    let server = ControlPlane {
        address,
        roots: RootSource::File(root),
        token: TokenSource::File(token),
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
