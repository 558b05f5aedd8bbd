//! Both halves on the engine of `mesh-hbone`, as the proxy uses it.

use std::{
    net::{Ipv4Addr, SocketAddr},
    rc::Rc,
    sync::Arc,
};

use http::{HeaderMap, StatusCode};
use mesh_core::{headers::Authority, identity::Identity, reason::Reason};
use mesh_hbone::{
    Budget, ConnectRequest, Connector, Error, LocalBoxFuture, Pool, PoolConfig, Secured, Settings, TunnelKey, relay,
    server::{self, Handler, Malformed, Request, Responder},
    tls,
};
use mesh_runtime::drain;
use rustls::{ClientConfig, ServerConfig};
use tokio::net::TcpStream;

use super::tls::server_name;

/// The dialling half.
pub(super) struct Near {
    pool: Pool,
    key: TunnelKey,
}

struct Dial(Arc<ClientConfig>);

impl Connector for Dial {
    fn connect(&self, key: &TunnelKey) -> LocalBoxFuture<'_, Result<Secured, Error>> {
        let far = key.destination;
        Box::pin(async move {
            let dialled = async {
                let tcp = TcpStream::connect(far).await?;
                tcp.set_nodelay(true)?;
                mesh_net::sockets::limit_unsent(&tcp)?;
                tls::connect(tcp, &self.0, server_name()).await
            };
            let failed = |error| Error::dial(Reason::Connect, "cannot dial the far half", Some(Arc::new(error)));
            dialled.await.map_err(failed)
        })
    }
}

impl Near {
    pub(super) fn new(far: SocketAddr, tls: Arc<ClientConfig>) -> Self {
        let key = TunnelKey {
            source_uid: "near".into(),
            source_ip: Ipv4Addr::UNSPECIFIED.into(),
            source_identity: Identity::new("cluster.local", "bench", "near"),
            generation: 0,
            destination: far,
            accepted: Arc::new([]),
            network: "".into(),
        };
        Self { pool: Pool::new(PoolConfig::default(), Budget::default(), Rc::new(Dial(tls))), key }
    }

    pub(super) async fn carry(self: Rc<Self>, tcp: TcpStream, target: SocketAddr) -> anyhow::Result<()> {
        let request = ConnectRequest { authority: Authority::Address(target), headers: Vec::new() };
        // Boxed, because what it needs to open a tunnel is far more than what a flow needs afterwards.
        let (stream, _) = Box::pin(self.pool.open(&self.key, &request)).await?;
        drop(request);
        relay(Rc::new(tcp), stream, Rc::default()).await;
        Ok(())
    }
}

/// The accepting half: one tunnel, until it ends.
pub(super) async fn serve(tcp: TcpStream, tls: Arc<ServerConfig>) -> anyhow::Result<()> {
    mesh_net::sockets::limit_unsent(&tcp)?;
    let secured = tls::accept(tcp, &tls).await?;
    let (_never, drain) = drain::channel();
    server::serve(secured, &Settings::default(), Budget::default(), drain, Rc::new(Far)).await?;
    Ok(())
}

struct Far;

impl Handler for Far {
    fn connect(self: Rc<Self>, request: Request, responder: Responder) -> LocalBoxFuture<'static, ()> {
        Box::pin(async move {
            let Authority::Address(target) = request.authority else {
                return responder.reject(StatusCode::BAD_REQUEST);
            };
            let Ok(tcp) = connect(target).await else { return responder.reject(StatusCode::SERVICE_UNAVAILABLE) };
            if let Ok(stream) = responder.accept(&HeaderMap::new()) {
                relay(Rc::new(tcp), stream, Rc::default()).await;
            }
        })
    }

    fn malformed(&self, malformed: &Malformed) {
        eprintln!("{}", malformed.detail);
    }
}

async fn connect(target: SocketAddr) -> std::io::Result<TcpStream> {
    let tcp = TcpStream::connect(target).await?;
    tcp.set_nodelay(true)?;
    Ok(tcp)
}
